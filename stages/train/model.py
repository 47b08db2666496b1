"""The model: one forward pass for training, calibration, evaluation and test-time training.

Unusual here (#1493 and what it builds on):

* depth recurrence: a segment of blocks is visited again with the same weights once looping is on (#1331, #1437);
* U-Net skips over the *visits*, each through a learned gate, so that the number of skips changes when looping is switched on;
* from block `parallel_from` on, attention and MLP read the same input and are added together (#1204, GPT-J style);
* every block sees x0, the normalised embedding, mixed into its input;
* exclusive self-attention: the component of a head's output along the token's own value is removed;
* q and k are normalised, and a learned gain on q sets the sharpness (QK-gain);
* the MLP squares a leaky ReLU, so that its negative side comes out positive too;
* three parts that are off unless the parameters ask for them: a gate on each head's output, read from the first dimensions of the layer's
  input (#1667); each embedding with a learned share of the one before it, never across a document's start (SmearGate: #1667, #1851); and
  tables that add to a token's attention value what the token alone decides (value embeddings: modded-nanogpt; no product is needed).

Adapters (adapters.py) plug into every product of a block and into the head's; without them no operation is added.

Weights are float32 and are cast to the dtype of the activations where they are used; losses are computed in float32.

Shapes: B batch, T tokens, D width, H query heads, K key-value heads, C head dimension, E = (H + 2K) C, R half the rotated dimensions,
N = BT, V vocabulary, S skips.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.common import cpu_math
from stages.common.parallel import World
from stages.train.adapters import Adapter, Adapters, VisitAdapters, adapted
from stages.train.ops import PLAIN, Operations, operations
from stages.train.params import ModelParams
from stages.train.reference import Documents, Term, documents_of, rms_norm, softcapped, squared_leaky

EMBEDDING, SMEAR_GATE = "embedding.weight", "smear.gate"
UNADAPTED, NO_ADAPTERS = VisitAdapters(), Adapters()  # of a visit, of a forward pass


class Places(NamedTuple):
    """What every block is told of a batch's tokens: the angles of every position, the documents that attention keeps to, if it does,
    and what each value table holds for them."""

    cos_TR: Tensor
    sin_TR: Tensor
    documents: Documents | None
    values: tuple[Tensor, ...]  # (B, T, KC) of each table


Stream = list[Term]  # the residual stream, kept as a weighted sum until it is read


def weighed(stream: Stream, weight: Tensor) -> Stream:
    """The stream times a vector (D,)."""
    return [Term(x, weight if w is None else w * weight) for x, w in stream]


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
    order = (
        tuple(range(params.loop_first)) + segment * passes + tuple(range(params.loop_last + 1, params.layers))
    )
    return VisitPlan(order[: len(order) // 2], order[len(order) // 2 :])


def skip_count(params: ModelParams) -> int:
    """S, the number of skip connections: as many as the looped plan can use."""
    plan = visit_plan(params, looped=True)
    return min(len(plan.encoder), len(plan.decoder))


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


def value_table(params: ModelParams, block: int) -> int | None:
    """Which value table a block reads: the first blocks have one each, and the last blocks the same ones again, in the same order.

    >>> [value_table(of_six_blocks_and_two_tables, block) for block in range(6)]
    [0, 1, None, None, 0, 1]
    """
    first, last = block, block - (params.layers - params.value_tables)
    if first < params.value_tables:
        return first
    return last if last >= 0 else None


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

    def __init__(self, params: ModelParams, table: int | None, operations: Operations) -> None:
        super().__init__()
        self.params = params
        self.operations = operations
        self.query = Matrix(params.width, params.heads * params.head_dim)
        self.key = Matrix(params.width, params.kv_heads * params.head_dim)
        self.value = Matrix(params.width, params.kv_heads * params.head_dim)
        self.output = Matrix(params.heads * params.head_dim, params.width)
        self.gain = nn.Parameter(torch.full((params.heads,), params.query_gain))
        self.gate = nn.Parameter(torch.zeros(params.heads, params.gate_width)) if params.gate_width else None
        self.table = table
        self.table_share = nn.Parameter(torch.ones(params.kv_heads)) if table is not None else None

    def forward(self, x_BTD: Tensor, places: Places, adapters: VisitAdapters = UNADAPTED) -> Tensor:
        """The layer's output, (B, T, D). The three projections of one input are one product."""
        weight_ED = torch.cat((self.query.weight, self.key.weight, self.value.weight)).to(x_BTD.dtype)
        starts = places.documents.starts_BT if places.documents else None
        joint = self._adapted(F.linear(x_BTD, weight_ED), x_BTD, adapters)
        q, k, v = self.operations.split_heads(
            joint, self.gain, places.cos_TR, places.sin_TR, starts, self.params.kv_heads
        )
        if self.table is not None and self.table_share is not None:
            v = torch.addcmul(
                v, places.values[self.table].view(v.shape), self.table_share.to(v.dtype)[:, None]
            )
        y = self.operations.attend(q, k, v, places.documents)
        if self.gate is not None:
            y = y * (
                2 * torch.sigmoid(F.linear(x_BTD[..., : self.gate.shape[1]], self.gate.to(x_BTD.dtype)))
            ).unsqueeze(-1)
        return adapted(self.output(y.flatten(2)), x_BTD, adapters.output)

    def _adapted(self, joint_BTE: Tensor, x_BTD: Tensor, adapters: VisitAdapters) -> Tensor:
        each = (adapters.query, adapters.key, adapters.value)
        if each == (None, None, None):
            return joint_BTE
        kv_width = self.params.kv_heads * self.params.head_dim
        parts = joint_BTE.split((self.params.heads * self.params.head_dim, kv_width, kv_width), dim=-1)
        return torch.cat(
            [adapted(part, x_BTD, adapter) for part, adapter in zip(parts, each, strict=True)], dim=-1
        )


class MLP(nn.Module):
    """down(leaky_relu(up(x))^2): z^2 above zero, z^2 / 4 below."""

    def __init__(self, params: ModelParams, operations: Operations) -> None:
        super().__init__()
        self.operations = operations
        self.up = Matrix(params.width, params.hidden)
        self.down = Matrix(params.hidden, params.width)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) to (..., D)."""
        if self.operations.mlp is not None:
            return self.operations.mlp(x, self.up.weight.to(x.dtype), self.down.weight.to(x.dtype))
        return self.down(squared_leaky(self.up(x)))


class Block(nn.Module):
    """One physical layer; its input scale depends on its index, also when it is visited again."""

    def __init__(self, params: ModelParams, index: int, operations: Operations) -> None:
        super().__init__()
        self.operations = operations
        self.attention = Attention(params, value_table(params, index), operations)
        self.mlp = MLP(params, operations)
        self.attention_scale = nn.Parameter(torch.ones(params.width))
        self.mlp_scale = nn.Parameter(torch.ones(params.width))
        # Ones above zeros. On the meta device (pack's check of shapes) torch.stack would import torch's compiler: two seconds a stage.
        self.mix = nn.Parameter(F.pad(torch.ones(1, params.width), (0, 0, 0, 1)))
        self.input_scale = 1 / math.sqrt(index + 1)
        self.parallel = index >= params.parallel_from

    def forward(
        self, stream: Stream, x0: Tensor, places: Places, adapters: VisitAdapters = UNADAPTED
    ) -> Stream:
        """The stream (B, T, D) and x0 to the next stream; neither is summed before it is read."""
        u, h = self.operations.combine_norm(
            [*weighed(stream, self.mix[0]), Term(x0, self.mix[1])], self.input_scale
        )
        attended = Term(self.attention(h, places, adapters), self.attention_scale)
        if self.parallel:
            return [Term(u), attended, Term(adapted(self.mlp(h), h, adapters.mlp), self.mlp_scale)]
        y, h = self.operations.combine_norm([Term(u), attended], self.input_scale)
        return [Term(y), Term(adapted(self.mlp(h), h, adapters.mlp), self.mlp_scale)]


class Table(nn.Module):
    """A row for each token: the tied table E (V, D), whose rows go in and by which z = x E^T comes out, and the value tables."""

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(vocab_size, width))

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Rows of the table, (B, T, width), in the table's dtype."""
        return F.embedding(tokens_BT, self.weight)


class Smear(nn.Module):
    """e_t + share sigmoid(gate e_t[:n]) e_{t-1}; what begins a document, or the window, stays as it is (D20c)."""

    def __init__(self, params: ModelParams) -> None:
        super().__init__()
        self.bos_id = params.bos_id
        self.gate = nn.Parameter(torch.zeros(params.smear_width))
        self.share = nn.Parameter(torch.zeros(()))

    def forward(self, rows_BTD: Tensor, tokens_BT: Tensor) -> Tensor:
        """Embeddings (B, T, D) to the same."""
        gate_BT = (
            self.share
            * torch.sigmoid(rows_BTD[..., : len(self.gate)] @ self.gate)
            * (tokens_BT != self.bos_id)
        )
        before = F.pad(rows_BTD[:, :-1], (0, 0, 1, 0))
        return torch.addcmul(rows_BTD, gate_BT.unsqueeze(-1), before)


class Head(nn.Module):
    """The product with the tied table; a module of its own so that its input can be observed (calibration)."""

    def forward(self, x: Tensor, table_VD: Tensor, adapter: Adapter | None = None) -> Tensor:
        """x (..., D) to logits (..., V) before the softcap, in the dtype of x."""
        return adapted(F.linear(x, table_VD.to(x.dtype)), x, adapter)


class Model(nn.Module):
    """The whole network; `dtype` is that of the activations."""

    def __init__(
        self, params: ModelParams, dtype: torch.dtype = torch.float32, operations: Operations = PLAIN
    ) -> None:
        super().__init__()
        self.params = params
        self.dtype = dtype
        self.operations = operations
        self.embedding = Table(params.vocab_size, params.width)
        self.smear = Smear(params) if params.smear_width else None
        self.value_tables = nn.ModuleList(
            Table(params.vocab_size, params.kv_heads * params.head_dim) for _ in range(params.value_tables)
        )
        self.blocks = nn.ModuleList(Block(params, index, operations) for index in range(params.layers))
        skips = skip_count(params)
        self.skip_weight = nn.Parameter(torch.ones(skips, params.width))
        self.skip_gate = nn.Parameter(torch.zeros(skips, params.width))
        self.head = Head()
        self.plans = {looped: visit_plan(params, looped) for looped in (False, True)}

    def features(self, tokens_BT: Tensor, looped: bool, adapters: tuple[VisitAdapters, ...] = ()) -> Tensor:
        """The normalised residual stream before the head, (B, T, D); `adapters` are one set for each visit, or none."""
        cos_TR, sin_TR = rotary(tokens_BT.shape[1], self.params, tokens_BT.device)
        within = self.params.attention == "documents"
        values = tuple(table(tokens_BT).to(self.dtype) for table in self.value_tables)
        places = Places(
            cos_TR, sin_TR, documents_of(tokens_BT, self.params.bos_id) if within else None, values
        )
        rows = self.embedding(tokens_BT)
        x0 = rms_norm((rows if self.smear is None else self.smear(rows, tokens_BT)).to(self.dtype))
        plan = self.plans[looped]
        visits = iter(adapters or (UNADAPTED,) * (len(plan.encoder) + len(plan.decoder)))
        stream: Stream = [Term(x0)]
        pushed = []
        for index in plan.encoder:
            x = self.operations.combine(self.blocks[index](stream, x0, places, next(visits)))
            pushed.append(x)
            stream = [Term(x)]
        for step, index in enumerate(plan.decoder):
            if pushed:
                stream = self._with_skip(step, stream, pushed.pop())
            stream = self.blocks[index](stream, x0, places, next(visits))
        return self.operations.combine_norm(stream, 1.0)[1]

    def logits(self, tokens_BT: Tensor, looped: bool = True, scored_from: int = 0) -> Tensor:
        """Softcapped logits of the positions from `scored_from` on, (B, T - scored_from, V) float32."""
        return softcapped(
            self.uncapped(tokens_BT, looped, slice(scored_from, None)), self.params.logit_softcap
        )

    def forward(
        self, tokens_BT: Tensor, targets_BT: Tensor, looped: bool = True, scored_from: int = 0
    ) -> Tensor:
        """Negative log-likelihood in nats of the targets from `scored_from` on, (B, T - scored_from) float32."""
        z_NV = self.uncapped(tokens_BT, looped, slice(scored_from, None)).flatten(0, 1)
        targets = targets_BT[:, scored_from:]
        return self.operations.cross_entropy(z_NV, targets.flatten(), self.params.logit_softcap).view(
            targets.shape
        )

    def uncapped(
        self, tokens_BT: Tensor, looped: bool, places: slice, adapters: Adapters = NO_ADAPTERS
    ) -> Tensor:
        """Logits before the softcap of the positions `places`, (B, positions, V) in the model's dtype."""
        return self.head(
            self.features(tokens_BT, looped, adapters.visits)[:, places], self.embedding.weight, adapters.head
        )

    def _with_skip(self, step: int, stream: Stream, skipped: Tensor) -> Stream:
        """(1 - g) w s + g x, with g the sigmoid of the slot's gate."""
        gate = torch.sigmoid(self.skip_gate[step])
        return [*weighed(stream, gate), Term(skipped, (1 - gate) * self.skip_weight[step])]


def model_for(params: ModelParams, world: World) -> Model:
    """A model on the world's device, in its dtype and with its operations; its weights are still to be set."""
    return Model(params, world.dtype, operations(world.kernels, params)).to(world.device)


def is_matrix(name: str) -> bool:
    """Whether a state-dict name is one of the blocks' matrices (tables and vectors are not)."""
    return name.startswith("blocks.") and name.endswith(".weight")


def is_table(name: str) -> bool:
    """Whether a state-dict name is a table with a row for each token: the embedding, or one of the value tables."""
    return name == EMBEDDING or (name.startswith("value_tables.") and name.endswith(".weight"))


def is_quantised(name: str) -> bool:
    """Whether a tensor is kept with fewer bits in the packed file, and so calibrated: the blocks' matrices and the tables."""
    return is_matrix(name) or is_table(name)


def with_scaled_logits(state: dict[str, Tensor], factor: float) -> dict[str, Tensor]:
    """The weights of the same model but for its logits before the softcap, which are `factor` times what they were.

    Only the head sees the length of the tied table's rows: on their way in they are normalised, and the smear gate makes up for it.
    """
    scaled = state | {EMBEDDING: factor * state[EMBEDDING]}
    return scaled | {SMEAR_GATE: state[SMEAR_GATE] / factor} if SMEAR_GATE in state else scaled


@torch.no_grad()
def initialise_(model: Model, seed: int) -> None:
    """Initial weights from the seed: orthogonal matrices, zero output projections, a small normal embedding, value tables of zeros.

    Drawn on the CPU in float32, so that every device starts from the same values; with bfloat16 activations they start bfloat16-rounded, as
    in #1493 (which also holds the embedding in bfloat16: here all weights are float32).
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name == EMBEDDING:
            table = torch.empty(parameter.shape).normal_(0, model.params.embedding_std, generator=generator)
            parameter.copy_(table.to(model.dtype))
        elif is_matrix(name) and not name.endswith(("attention.output.weight", "mlp.down.weight")):
            rows, columns = parameter.shape
            parameter.copy_(cpu_math.orthogonal(rows, columns, generator).to(model.dtype))
