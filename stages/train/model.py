"""The model: one forward pass for training, calibration, evaluation and test-time training.

Unusual here (#1493 and what it builds on):

* depth recurrence: once looping is on, a segment of blocks is visited again with the same weights
  (#1331, #1437); a *visit* is one application of a block;
* U-Net skips over the visits, each through a learned gate, so that the number of skips changes when
  looping is switched on;
* from block `parallel_from` on, attention and MLP read the same input and are added together
  (#1204, GPT-J style);
* every block sees x0, the normalised embedding, mixed into its input;
* exclusive self-attention (XSA): the component of a head's output along the token's own value is
  removed;
* q and k are normalised, and a learned gain on q sets the sharpness (QK-gain);
* the MLP squares a leaky ReLU, so that its negative side comes out positive too;
* three parts that are off unless the parameters turn them on: a gate on each head's output,
  computed from the first dimensions of the layer's input (#1667); SmearGate, which adds to each
  embedding a learned share of the one before it, never across the start of a document (#1667,
  #1851); and value embeddings, tables that add a row chosen by the token to its attention value,
  without a matrix product (modded-nanogpt).

Test-time training, decoding and calibration add to the same forward pass (`Extensions`): adapters
(adapters.py) to q, k and v, parallel to attention and to the MLP, and to the head; a KV cache in
place of attention over the pass alone; an observer of what the matrices multiply, for which the MLP
runs as two products. Each is chosen or called by the number of the visit. Without them no operation
is added. The operations with a fused form come from `ops`
(reference.py).

Weights are float32 and are cast to the dtype of the activations where they are used; losses are
computed in float32.

Shapes: B batch, T tokens, D width, H query heads, K key-value heads, C head dimension, E = (H + 2K)
C, R half the rotated dimensions, N = BT, V vocabulary, S skips.
"""

import math
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.common import cpu_math
from stages.common.parallel import World
from stages.train.adapters import Adapters, VisitAdapters, adapters_of_visit, apply_adapter
from stages.train.ops import select_ops
from stages.train.params import ModelParams
from stages.train.reference import (
    REFERENCE_OPS,
    DocumentBounds,
    Ops,
    Term,
    document_bounds,
    rms_norm,
    softcapped,
    squared_leaky_relu,
)

# Names of parameters in the state dict.
EMBEDDING = "embedding.weight"
SMEAR_GATE = "smear.gate"


class KVCache(Protocol):
    """Keys and values of earlier tokens, of each visit; the tokens of the pass come after them.

    Every row of the batch is one document.
    """

    def cos_sin(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the RoPE angles at the positions of the pass, each (T, R) float32."""
        ...

    def attend(self, visit: int, q_BTHC: Tensor, k_BTKC: Tensor, v_BTKC: Tensor) -> Tensor:
        """Store keys and values; return attention over the stored ones, like `ops.attend`, (B, T, H, C)."""
        ...


class InputObserver(Protocol):
    """Called before every product with a quantised matrix, to measure the inputs of the product."""

    def __call__(self, weight: nn.Parameter, visit: int | None, x: Tensor) -> None:
        """`x` (..., in) is multiplied by `weight`; `visit` is None for the head, which is outside all visits.

        Query, key and value have one input, which is reported with the weight of the query.
        """
        ...


class Extensions(NamedTuple):
    """Optional parts of a forward pass. A visit is identified by its position in the plan, from 0."""

    adapters: Adapters = Adapters()
    kv_cache: KVCache | None = None
    observer: InputObserver | None = None


NO_EXTENSIONS = Extensions()


class BlockContext(NamedTuple):
    """Inputs that all blocks share for one batch."""

    cos_TR: Tensor  # of the RoPE angles
    sin_TR: Tensor
    documents: DocumentBounds | None  # for the attention mask; None: attention over whole windows
    value_rows: tuple[Tensor, ...]  # the batch's rows of each value table, (B, T, KC)
    extensions: Extensions


# The residual stream as the terms of a weighted sum, which is computed only where a block reads it.
ResidualStream = list[Term]


def scale_terms(stream: ResidualStream, weight_D: Tensor) -> ResidualStream:
    """The stream multiplied by a vector."""
    return [Term(x, weight_D if w is None else w * weight_D) for x, w in stream]


class VisitPlan(NamedTuple):
    """The blocks in order of visit: encoder visits push their outputs as skips, decoder visits pop them."""

    encoder: tuple[int, ...]
    decoder: tuple[int, ...]

    @property
    def order(self) -> tuple[int, ...]:
        """The block of each visit."""
        return self.encoder + self.decoder


def visit_plan(params: ModelParams, looped: bool) -> VisitPlan:
    """The blocks in order of visit, split into halves; the decoder gets the odd one.

    >>> visit_plan(record, looped=True)
    VisitPlan(encoder=(0, 1, 2, 3, 4, 5, 3, 4), decoder=(5, 3, 4, 5, 6, 7, 8, 9, 10))
    """
    before = tuple(range(params.loop_first))
    segment = tuple(range(params.loop_first, params.loop_last + 1))
    after = tuple(range(params.loop_last + 1, params.layers))
    passes = 1 + params.loops if looped else 1
    order = before + segment * passes + after
    return VisitPlan(order[: len(order) // 2], order[len(order) // 2 :])


def skip_count(params: ModelParams) -> int:
    """S, the number of skip connections: as many as the looped plan can use."""
    plan = visit_plan(params, looped=True)
    return min(len(plan.encoder), len(plan.decoder))


def rope_cos_sin(tokens: int, params: ModelParams, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the RoPE angles, each (T, R) float32.

    Angles are computed in float32 from integers at every call: a buffer would be cast with the
    model, and positions in bfloat16 collapse (#1916 lost 0.46 bpb to that). Beyond the training
    context the base grows as in NTK-aware scaling.
    """
    dims = params.rope_dims
    base = params.rope_base
    if tokens > params.context and dims > 2:
        base = base * (tokens / params.context) ** (dims / (dims - 2))
    frequency = base ** (-torch.arange(0, dims, 2, device=device, dtype=torch.float32) / dims)
    angle = torch.arange(tokens, device=device, dtype=torch.float32)[:, None] * frequency
    return angle.cos(), angle.sin()


def value_table_index(params: ModelParams, block: int) -> int | None:
    """Index of the value table that a block reads, or None.

    The first blocks have one table each; the last blocks read the same tables again, in the same
    order.

    >>> [value_table_index(six_blocks_and_two_tables, block) for block in range(6)]
    [0, 1, None, None, 0, 1]
    """
    if block < params.value_tables:
        return block
    from_end = block - (params.layers - params.value_tables)
    return from_end if from_end >= 0 else None


class CastedLinear(nn.Module):
    """A linear map without bias whose weight (out, in) is cast to the dtype of its input."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) to (..., out)."""
        return F.linear(x, self.weight.to(x.dtype))


class Attention(nn.Module):
    """Causal grouped-query attention with normalised q and k, a gain on q, partial RoPE, and XSA."""

    def __init__(self, params: ModelParams, table_index: int | None, ops: Ops) -> None:
        super().__init__()
        self.params = params
        self.ops = ops
        self.query = CastedLinear(params.width, params.heads * params.head_dim)
        self.key = CastedLinear(params.width, params.kv_heads * params.head_dim)
        self.value = CastedLinear(params.width, params.kv_heads * params.head_dim)
        self.output = CastedLinear(params.heads * params.head_dim, params.width)
        self.gain = nn.Parameter(torch.full((params.heads,), params.query_gain))
        self.gate = nn.Parameter(torch.zeros(params.heads, params.gate_width)) if params.gate_width else None
        self.value_table_index = table_index
        self.table_share = nn.Parameter(torch.ones(params.kv_heads)) if table_index is not None else None

    def forward(self, x_BTD: Tensor, context: BlockContext, visit: int) -> Tensor:
        """The layer's output, (B, T, D)."""
        adapters = adapters_of_visit(context.extensions.adapters, visit)
        kv_cache = context.extensions.kv_cache
        observer = context.extensions.observer

        # Query, key and value projection as one product.
        if observer is not None:
            observer(self.query.weight, visit, x_BTD)
        weight_ED = torch.cat((self.query.weight, self.key.weight, self.value.weight)).to(x_BTD.dtype)
        joint_BTE = self._add_adapters(F.linear(x_BTD, weight_ED), x_BTD, adapters)

        starts_BT = context.documents.starts_BT if context.documents else None
        q_BTHC, k_BTKC, v_BTKC = self.ops.qk_norm_rope(
            joint_BTE, self.gain, context.cos_TR, context.sin_TR, starts_BT, self.params.kv_heads
        )
        if self.value_table_index is not None and self.table_share is not None:
            rows_BTKC = context.value_rows[self.value_table_index].view(v_BTKC.shape)
            v_BTKC = torch.addcmul(v_BTKC, rows_BTKC, self.table_share.to(v_BTKC.dtype)[:, None])

        if kv_cache is None:
            y_BTHC = self.ops.attend(q_BTHC, k_BTKC, v_BTKC, context.documents)
        else:
            y_BTHC = kv_cache.attend(visit, q_BTHC, k_BTKC, v_BTKC)
        if self.gate is not None:
            gate_inputs = x_BTD[..., : self.gate.shape[1]]
            gate_BTH = 2 * torch.sigmoid(F.linear(gate_inputs, self.gate.to(x_BTD.dtype)))
            y_BTHC = y_BTHC * gate_BTH.unsqueeze(-1)

        y_BTD = y_BTHC.flatten(2)
        if observer is not None:
            observer(self.output.weight, visit, y_BTD)
        # This adapter reads the layer's input: it is parallel to attention (adapters.py).
        return apply_adapter(self.output(y_BTD), x_BTD, adapters.output)

    def _add_adapters(self, joint_BTE: Tensor, x_BTD: Tensor, adapters: VisitAdapters) -> Tensor:
        """The joint projection with the adapters of query, key and value added to their parts."""
        qkv_adapters = (adapters.query, adapters.key, adapters.value)
        if qkv_adapters == (None, None, None):
            return joint_BTE
        kv_width = self.params.kv_heads * self.params.head_dim
        parts = joint_BTE.split((self.params.heads * self.params.head_dim, kv_width, kv_width), dim=-1)
        added = [apply_adapter(part, x_BTD, a) for part, a in zip(parts, qkv_adapters, strict=True)]
        return torch.cat(added, dim=-1)


class MLP(nn.Module):
    """down(leaky_relu(up(x))^2): z^2 above zero, z^2 / 4 below."""

    def __init__(self, params: ModelParams, ops: Ops) -> None:
        super().__init__()
        self.ops = ops
        self.up = CastedLinear(params.width, params.hidden)
        self.down = CastedLinear(params.hidden, params.width)

    def forward(self, x: Tensor, context: BlockContext, visit: int) -> Tensor:
        """x (..., D) to (..., D); under an observer as two products, because it needs the hidden layer."""
        observer = context.extensions.observer
        if observer is None and self.ops.mlp is not None:
            return self.ops.mlp(x, self.up.weight.to(x.dtype), self.down.weight.to(x.dtype))

        if observer is not None:
            observer(self.up.weight, visit, x)
        hidden = squared_leaky_relu(self.up(x))
        if observer is not None:
            observer(self.down.weight, visit, hidden)
        return self.down(hidden)


class Block(nn.Module):
    """One physical layer. Its input scale depends on its index and is the same at each of its visits."""

    def __init__(self, params: ModelParams, index: int, ops: Ops) -> None:
        super().__init__()
        self.ops = ops
        self.attention = Attention(params, value_table_index(params, index), ops)
        self.mlp = MLP(params, ops)
        self.attention_scale = nn.Parameter(torch.ones(params.width))
        self.mlp_scale = nn.Parameter(torch.ones(params.width))
        # Weights of the stream (ones) and of x0 (zeros), (2, D). On the meta device, where pack
        # checks shapes, torch.stack would import torch's compiler: two seconds a stage.
        self.mix = nn.Parameter(F.pad(torch.ones(1, params.width), (0, 0, 0, 1)))
        self.input_scale = 1 / math.sqrt(index + 1)
        self.parallel = index >= params.parallel_from

    def forward(
        self, stream: ResidualStream, x0_BTD: Tensor, context: BlockContext, visit: int
    ) -> ResidualStream:
        """The next residual stream; like the incoming one it is not summed yet."""
        # The stream with x0 mixed in, as a sum and normalised.
        x_BTD, normed_BTD = self.ops.weighted_sum_norm(
            [*scale_terms(stream, self.mix[0]), Term(x0_BTD, self.mix[1])], self.input_scale
        )
        terms = [Term(x_BTD), Term(self.attention(normed_BTD, context, visit), self.attention_scale)]

        # The MLP of a parallel block reads the same input as attention, otherwise the sum with it.
        if not self.parallel:
            x_BTD, normed_BTD = self.ops.weighted_sum_norm(terms, self.input_scale)
            terms = [Term(x_BTD)]
        adapter = adapters_of_visit(context.extensions.adapters, visit).mlp
        mlp_BTD = apply_adapter(self.mlp(normed_BTD, context, visit), normed_BTD, adapter)
        return [*terms, Term(mlp_BTD, self.mlp_scale)]


class Embedding(nn.Module):
    """A table with a row for each token.

    The tied table E (V, D) embeds the tokens, and the head uses it again for the logits x E^T. The
    value tables (V, KC) are embeddings too.
    """

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(vocab_size, width))

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Rows of the table, (B, T, width), in the table's dtype."""
        return F.embedding(tokens_BT, self.weight)


class Smear(nn.Module):
    """SmearGate: e_t + share * sigmoid(gate . e_t[:n]) e_{t-1}, with n = `smear_width`.

    A BOS and the first token of a window stay e_t: otherwise a document would read from the one
    before it, as in #1667 (mended in #1851).
    """

    def __init__(self, params: ModelParams) -> None:
        super().__init__()
        self.bos_id = params.bos_id
        self.gate = nn.Parameter(torch.zeros(params.smear_width))
        self.share = nn.Parameter(torch.zeros(()))

    def forward(self, rows_BTD: Tensor, tokens_BT: Tensor) -> Tensor:
        """Embeddings with the previous ones mixed in, (B, T, D)."""
        gate_BT = (
            self.share
            * torch.sigmoid(rows_BTD[..., : len(self.gate)] @ self.gate)
            * (tokens_BT != self.bos_id)
        )
        previous_BTD = F.pad(rows_BTD[:, :-1], (0, 0, 1, 0))
        return torch.addcmul(rows_BTD, gate_BT.unsqueeze(-1), previous_BTD)


class Model(nn.Module):
    """The whole network; `dtype` is that of the activations."""

    def __init__(
        self, params: ModelParams, dtype: torch.dtype = torch.float32, ops: Ops = REFERENCE_OPS
    ) -> None:
        super().__init__()
        self.params = params
        self.dtype = dtype
        self.ops = ops
        self.embedding = Embedding(params.vocab_size, params.width)
        self.smear = Smear(params) if params.smear_width else None
        self.value_tables = nn.ModuleList(
            Embedding(params.vocab_size, params.kv_heads * params.head_dim)
            for _ in range(params.value_tables)
        )
        self.blocks = nn.ModuleList(Block(params, index, ops) for index in range(params.layers))
        skips = skip_count(params)
        self.skip_weight = nn.Parameter(torch.ones(skips, params.width))
        self.skip_gate = nn.Parameter(torch.zeros(skips, params.width))
        self.plans = {looped: visit_plan(params, looped) for looped in (False, True)}

    def features(self, tokens_BT: Tensor, looped: bool, extensions: Extensions = NO_EXTENSIONS) -> Tensor:
        """The normalised residual stream before the head, (B, T, D)."""
        kv_cache = extensions.kv_cache
        if kv_cache is None:
            cos_TR, sin_TR = rope_cos_sin(tokens_BT.shape[1], self.params, tokens_BT.device)
        else:
            cos_TR, sin_TR = kv_cache.cos_sin(tokens_BT.shape[1])
        value_rows = tuple(table(tokens_BT).to(self.dtype) for table in self.value_tables)
        documents = None
        if self.params.attention == "documents" and kv_cache is None:
            documents = document_bounds(tokens_BT, self.params.bos_id)
        context = BlockContext(cos_TR, sin_TR, documents, value_rows, extensions)

        rows_BTD = self.embedding(tokens_BT)
        if self.smear is not None:
            rows_BTD = self.smear(rows_BTD, tokens_BT)
        x0_BTD = rms_norm(rows_BTD.to(self.dtype))

        plan = self.plans[looped]
        stream: ResidualStream = [Term(x0_BTD)]

        # Encoder: the output of each visit is summed and pushed as a skip.
        skips = []
        for visit, index in enumerate(plan.encoder):
            x_BTD = self.ops.weighted_sum(self.blocks[index](stream, x0_BTD, context, visit))
            skips.append(x_BTD)
            stream = [Term(x_BTD)]

        # Decoder: each visit first mixes in the last skip that is left.
        for slot, index in enumerate(plan.decoder):
            if skips:
                stream = self._with_skip(slot, stream, skips.pop())
            stream = self.blocks[index](stream, x0_BTD, context, len(plan.encoder) + slot)
        return self.ops.weighted_sum_norm(stream, 1.0)[1]

    def logits(
        self,
        tokens_BT: Tensor,
        looped: bool = True,
        scored_from: int = 0,
        extensions: Extensions = NO_EXTENSIONS,
    ) -> Tensor:
        """Softcapped logits of the positions from `scored_from` on, (B, T - scored_from, V) float32."""
        z_BTV = self.raw_logits(tokens_BT, looped, slice(scored_from, None), extensions)
        return softcapped(z_BTV, self.params.logit_softcap)

    def forward(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor,
        looped: bool = True,
        scored_from: int = 0,
        extensions: Extensions = NO_EXTENSIONS,
    ) -> Tensor:
        """Losses in nats of the targets from `scored_from` on, (B, T - scored_from) float32."""
        z_NV = self.raw_logits(tokens_BT, looped, slice(scored_from, None), extensions).flatten(0, 1)
        targets = targets_BT[:, scored_from:]
        nll_N = self.ops.cross_entropy(z_NV, targets.flatten(), self.params.logit_softcap)
        return nll_N.view(targets.shape)

    def raw_logits(
        self, tokens_BT: Tensor, looped: bool, positions: slice, extensions: Extensions = NO_EXTENSIONS
    ) -> Tensor:
        """Logits before the softcap at `positions`, (B, positions, V) in the model's dtype."""
        x_BTD = self.features(tokens_BT, looped, extensions)[:, positions]
        if extensions.observer is not None:
            extensions.observer(self.embedding.weight, None, x_BTD)
        z_BTV = F.linear(x_BTD, self.embedding.weight.to(x_BTD.dtype))
        return apply_adapter(z_BTV, x_BTD, extensions.adapters.head)

    def _with_skip(self, slot: int, stream: ResidualStream, skip_BTD: Tensor) -> ResidualStream:
        """g x + (1 - g) w s: stream x, skip s with weight w, and g the sigmoid of the slot's gate."""
        gate = torch.sigmoid(self.skip_gate[slot])
        return [*scale_terms(stream, gate), Term(skip_BTD, (1 - gate) * self.skip_weight[slot])]


def build_model(params: ModelParams, world: World) -> Model:
    """A model on the world's device, in its dtype and with its operations. Its weights are not set yet."""
    return Model(params, world.dtype, select_ops(world.kernels, params)).to(world.device)


def is_matrix(name: str) -> bool:
    """True for the state-dict names of the blocks' matrices; tables and vectors are not matrices here."""
    return name.startswith("blocks.") and name.endswith(".weight")


def is_table(name: str) -> bool:
    """True for the state-dict names of the tables with a row for each token: embedding and value tables."""
    return name == EMBEDDING or (name.startswith("value_tables.") and name.endswith(".weight"))


def is_quantised(name: str) -> bool:
    """True for tensors that are calibrated and quantised: the blocks' matrices and the tables."""
    return is_matrix(name) or is_table(name)


def scale_logits(state: dict[str, Tensor], factor: float) -> dict[str, Tensor]:
    """The weights of the same model with its logits before the softcap multiplied by `factor`.

    Only the head depends on the length of the tied table's rows: as embeddings they are normalised,
    and the smear gate is divided by the factor to make up for it.
    """
    scaled = state | {EMBEDDING: factor * state[EMBEDDING]}
    if SMEAR_GATE in state:
        scaled |= {SMEAR_GATE: state[SMEAR_GATE] / factor}
    return scaled


@torch.no_grad()
def initialise_(model: Model, seed: int) -> None:
    """Set the initial weights: orthogonal matrices, zero output projections, a small normal embedding.

    Value tables stay zero. Values are drawn on the CPU in float32, so that every device starts from
    the same ones; with bfloat16 activations they are rounded to bfloat16, as in #1493 (which also
    keeps the embedding in bfloat16: here all weights are float32).
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name == EMBEDDING:
            table = torch.empty(parameter.shape).normal_(0, model.params.embedding_std, generator=generator)
            parameter.copy_(table.to(model.dtype))
        elif is_matrix(name) and not name.endswith(("attention.output.weight", "mlp.down.weight")):
            rows, columns = parameter.shape
            parameter.copy_(cpu_math.orthogonal(rows, columns, generator).to(model.dtype))
