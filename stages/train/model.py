"""The model: one forward pass for training, calibration, evaluation and test-time training.

Unusual here (#1493 and what it builds on):

* depth recurrence: a segment of blocks is visited again with the same weights once looping is on (#1331, #1437);
* U-Net skips over the *visits*, each through a learned gate, so that the number of skips changes when looping is switched on;
* from block `parallel_from` on, attention and MLP read the same input and are added together (#1204, GPT-J style);
* every block sees x0, the normalised embedding, mixed into its input;
* exclusive self-attention: the component of a head's output along the token's own value is removed;
* q and k are normalised, and a learned gain on q sets the sharpness (QK-gain);
* the MLP squares a leaky ReLU, so that its negative side comes out positive too.

Weights are float32 and are cast to the dtype of the activations where they are used; losses are computed in float32.

Shapes: B batch, T tokens, D width, H query heads, K key-value heads, C head dimension, F hidden, V vocabulary, S skips.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.train.params import ModelParams

NORM_EPS = torch.finfo(torch.float32).eps
NEGATIVE_SLOPE = 0.5


class VisitPlan(NamedTuple):
    """The order in which blocks are visited: the encoder visits push their outputs, the decoder visits pop them."""

    encoder: tuple[int, ...]
    decoder: tuple[int, ...]


def visit_plan(params: ModelParams, looped: bool) -> VisitPlan:
    """Blocks in order of visit, split into halves (the decoder has the odd one).

    >>> visit_plan(record, looped=True)
    VisitPlan(encoder=(0, 1, 2, 3, 4, 5, 3, 4), decoder=(5, 3, 4, 5, 6, 7, 8, 9, 10))
    """
    segment = tuple(range(params.loop_first, params.loop_last + 1))
    passes = 1 + params.loops if looped else 1
    order = tuple(range(params.loop_first)) + segment * passes + tuple(range(params.loop_last + 1, params.layers))
    return VisitPlan(order[: len(order) // 2], order[len(order) // 2 :])


def skip_count(params: ModelParams) -> int:
    """S, the number of skip connections: as many as the looped plan can use."""
    plan = visit_plan(params, looped=True)
    return min(len(plan.encoder), len(plan.decoder))


def rms_norm(x: Tensor) -> Tensor:
    """x over its root mean square along the last dimension; no weight."""
    return F.rms_norm(x, (x.shape[-1],), eps=NORM_EPS)


def rotary(tokens: int, params: ModelParams, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles, each (T, rope_dims / 2) float32.

    Angles are computed in float32 from integers at every call: a buffer would be cast with the model, and positions in bfloat16 collapse
    (#1916 lost 0.46 bpb to that). Beyond the training context the base grows NTK-style.
    """
    dims = params.rope_dims
    base = params.rope_base
    if tokens > params.context and dims > 2:
        base = base * (tokens / params.context) ** (dims / (dims - 2))
    frequency = base ** (-torch.arange(0, dims, 2, device=device, dtype=torch.float32) / dims)
    angle = torch.arange(tokens, device=device, dtype=torch.float32)[:, None] * frequency
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the leading dimensions of x (B, heads, T, C) by the angles (T, rope_dims / 2), as two halves; the rest is untouched."""
    half = cos.shape[-1]
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((first * cos + second * sin, second * cos - first * sin, rest), dim=-1)


def exclude_own_value(y: Tensor, v: Tensor) -> Tensor:
    """y (B, H, T, C) without its component along the token's own value v (B, K, T, C); head h belongs to group h // (H / K)."""
    batch, heads, tokens, dim = y.shape
    groups = v.shape[1]
    direction = F.normalize(v, dim=-1)[:, :, None]
    y = y.view(batch, groups, heads // groups, tokens, dim)
    y = y - (y * direction).sum(-1, keepdim=True) * direction
    return y.reshape(batch, heads, tokens, dim)


class Matrix(nn.Module):
    """A linear map without bias whose weight (out, in) is cast to the dtype of its input."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) to (..., out)."""
        return F.linear(x, self.weight.to(x.dtype))


class Attention(nn.Module):
    """Causal grouped-query attention with normalised q and k, a gain on q, partial rotation, and own-value exclusion."""

    def __init__(self, params: ModelParams) -> None:
        super().__init__()
        self.params = params
        self.query = Matrix(params.width, params.heads * params.head_dim)
        self.key = Matrix(params.width, params.kv_heads * params.head_dim)
        self.value = Matrix(params.width, params.kv_heads * params.head_dim)
        self.output = Matrix(params.heads * params.head_dim, params.width)
        self.gain = nn.Parameter(torch.full((params.heads,), params.query_gain))

    def forward(self, x_BTD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The layer's output, (B, T, D)."""
        batch, tokens, _ = x_BTD.shape
        dim = self.params.head_dim
        q = self.query(x_BTD).view(batch, tokens, self.params.heads, dim).transpose(1, 2)
        k = self.key(x_BTD).view(batch, tokens, self.params.kv_heads, dim).transpose(1, 2)
        v = self.value(x_BTD).view(batch, tokens, self.params.kv_heads, dim).transpose(1, 2)
        q = rotate(rms_norm(q), cos, sin) * self.gain.to(q.dtype)[:, None, None]
        k = rotate(rms_norm(k), cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        y = exclude_own_value(y, v)
        return self.output(y.transpose(1, 2).reshape(batch, tokens, self.params.heads * dim))


class MLP(nn.Module):
    """down(leaky_relu(up(x))^2): z^2 above zero, z^2 / 4 below."""

    def __init__(self, params: ModelParams) -> None:
        super().__init__()
        self.up = Matrix(params.width, params.hidden)
        self.down = Matrix(params.hidden, params.width)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) to (..., D)."""
        return self.down(F.leaky_relu(self.up(x), NEGATIVE_SLOPE).square())


class Block(nn.Module):
    """One physical layer; its input scale depends on its index, also when it is visited again."""

    def __init__(self, params: ModelParams, index: int) -> None:
        super().__init__()
        self.attention = Attention(params)
        self.mlp = MLP(params)
        self.attention_scale = nn.Parameter(torch.ones(params.width))
        self.mlp_scale = nn.Parameter(torch.ones(params.width))
        self.mix = nn.Parameter(torch.stack((torch.ones(params.width), torch.zeros(params.width))))
        self.input_scale = 1 / math.sqrt(index + 1)
        self.parallel = index >= params.parallel_from

    def forward(self, x: Tensor, x0: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x and x0 (B, T, D) to the next residual stream."""
        mix = self.mix.to(x.dtype)
        u = mix[0] * x + mix[1] * x0
        h = rms_norm(u) * self.input_scale
        y = u + self.attention_scale.to(x.dtype) * self.attention(h, cos, sin)
        if not self.parallel:
            h = rms_norm(y) * self.input_scale
        return y + self.mlp_scale.to(x.dtype) * self.mlp(h)


class Embedding(nn.Module):
    """The tied table E (V, D): rows go in, and z = x E^T comes out."""

    def __init__(self, params: ModelParams) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(params.vocab_size, params.width))

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Rows of the table, (B, T, D), in the table's dtype."""
        return F.embedding(tokens_BT, self.weight)


class Head(nn.Module):
    """Softcapped logits; a module of its own so that its input can be observed (calibration)."""

    def __init__(self, params: ModelParams) -> None:
        super().__init__()
        self.softcap = params.logit_softcap

    def forward(self, x: Tensor, table_VD: Tensor) -> Tensor:
        """x (..., D) to logits (..., V) float32 within +-softcap."""
        z = F.linear(x, table_VD.to(x.dtype)).float()
        return self.softcap * torch.tanh(z / self.softcap)


class Model(nn.Module):
    """The whole network; `dtype` is that of the activations."""

    def __init__(self, params: ModelParams, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.params = params
        self.dtype = dtype
        self.embedding = Embedding(params)
        self.blocks = nn.ModuleList(Block(params, index) for index in range(params.layers))
        skips = skip_count(params)
        self.skip_weight = nn.Parameter(torch.ones(skips, params.width))
        self.skip_gate = nn.Parameter(torch.zeros(skips, params.width))
        self.head = Head(params)
        self.plans = {looped: visit_plan(params, looped) for looped in (False, True)}

    def features(self, tokens_BT: Tensor, looped: bool) -> Tensor:
        """The normalised residual stream before the head, (B, T, D)."""
        cos, sin = rotary(tokens_BT.shape[1], self.params, tokens_BT.device)
        x0 = x = rms_norm(self.embedding(tokens_BT).to(self.dtype))
        plan = self.plans[looped]
        pushed = []
        for index in plan.encoder:
            x = self.blocks[index](x, x0, cos, sin)
            pushed.append(x)
        for step, index in enumerate(plan.decoder):
            if pushed:
                x = self._skip(step, x, pushed.pop())
            x = self.blocks[index](x, x0, cos, sin)
        return rms_norm(x)

    def logits(self, tokens_BT: Tensor, looped: bool = True, scored_from: int = 0) -> Tensor:
        """Logits of the positions from `scored_from` on, (B, T - scored_from, V) float32."""
        x = self.features(tokens_BT, looped)[:, scored_from:]
        return self.head(x, self.embedding.weight)

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor, looped: bool = True, scored_from: int = 0) -> Tensor:
        """Negative log-likelihood in nats of the targets from `scored_from` on, (B, T - scored_from) float32."""
        logits = self.logits(tokens_BT, looped, scored_from)
        targets = targets_BT[:, scored_from:]
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)

    def _skip(self, step: int, x: Tensor, skipped: Tensor) -> Tensor:
        gate = torch.sigmoid(self.skip_gate[step]).to(x.dtype)
        return (1 - gate) * (self.skip_weight[step].to(x.dtype) * skipped) + gate * x


def is_matrix(name: str) -> bool:
    """Whether a state-dict name is one of the blocks' matrices (the embedding and the vectors are not)."""
    return name.startswith("blocks.") and name.endswith(".weight")


@torch.no_grad()
def initialise_(model: Model, seed: int) -> None:
    """Initial weights from the seed: orthogonal matrices, zero output projections, a small normal embedding.

    Drawn on the CPU in float32, so that every device starts from the same values. With bfloat16 activations the matrices start from
    bfloat16-rounded values and the embedding is held in bfloat16, as in #1493.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name == "embedding.weight":
            table = torch.empty(parameter.shape).normal_(0, model.params.embedding_std, generator=generator)
            parameter.data = table.to(model.dtype).to(parameter.device)
        elif is_matrix(name) and not name.endswith(("attention.output.weight", "mlp.down.weight")):
            matrix = nn.init.orthogonal_(torch.empty(parameter.shape), generator=generator)
            parameter.copy_(matrix.to(model.dtype))


def load_(model: Model, state: dict[str, Tensor]) -> None:
    """Put a float32 state into a model of the same parameters; the embedding takes the dtype of the activations."""
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    model.embedding.weight.data = state["embedding.weight"].to(model.dtype).to(model.embedding.weight.device)
