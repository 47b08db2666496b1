"""The fused kernels against their reference implementations in float64: results and every gradient.

Without a GPU they run in Triton's interpreter, in float32 and with blocks so small that a few tokens fill
several; on a GPU as they are, in bfloat16. The interpreter shows what a kernel computes, but not what the
compiler makes of it.
"""

import importlib
import os
import subprocess
import sys
import textwrap
import zlib
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch

from stages.train import reference as plain
from stages.train.model import Model, rope_cos_sin
from stages.train.ops import MAX_FUSED_SOFTCAP
from stages.train.reference import REFERENCE_OPS, Term
from tests.factories import TINY, random_model

pytest.importorskip(
    "triton",
    reason="Triton is not installed: torch for CUDA brings it, and `pip install triton` does on a CPU",
)
kernels = importlib.import_module("stages.train.kernels")

SOFTCAP = 30.0
HEADS = [(4, 2), (3, 3)]  # query heads and key-value heads


class Place(NamedTuple):
    """A device on which kernels run.

    `tolerance` bounds the distance to float64; texts are `stretch` times as long, to fill several blocks.
    """

    device: torch.device
    dtype: torch.dtype
    tolerance: float
    stretch: int


CPU = Place(torch.device("cpu"), torch.float32, 1e-5, 1)
CUDA = Place(torch.device("cuda"), torch.bfloat16, 2e-2, 8)


@pytest.fixture(params=[pytest.param(CPU, id="cpu"), pytest.param(CUDA, id="cuda", marks=pytest.mark.gpu)])
def place(request, monkeypatch):
    here = request.param
    if here is CPU:
        if torch.cuda.is_available():
            pytest.skip("kernels are compiled where there is a GPU: run them with `make test ARGS=--gpu`")
        for blocks in (kernels.mlp.FORWARD, kernels.mlp.BACKWARD):
            for key, size in (("BM", 32), ("BN", 32), ("BK", 16)):
                monkeypatch.setitem(blocks, key, size)
        set_attention_blocks(monkeypatch, (16, 16), (32, 16), (16, 16))
        monkeypatch.setattr(kernels.cross_entropy, "COLUMNS", 64)
        monkeypatch.setattr(kernels.residual_sum, "FORWARD_ROWS", 8)
        monkeypatch.setattr(kernels.residual_sum, "BACKWARD_ROWS", 4)
    return here


def set_attention_blocks(monkeypatch, *sizes):
    """Rows and columns of each kernel's blocks."""
    attention = kernels.attention
    for blocks, (rows, columns) in zip(
        (attention.FORWARD, attention.KEYS, attention.QUERIES), sizes, strict=True
    ):
        monkeypatch.setitem(blocks, "BM", rows)
        monkeypatch.setitem(blocks, "BN", columns)
    monkeypatch.setattr(attention, "MAX_BLOCK", max(map(max, sizes)))


@pytest.fixture
def draw(request, place):
    """Normal numbers in the dtype of activations, or another; every case has its own."""
    generator = torch.Generator().manual_seed(zlib.crc32(request.node.name.encode()))

    def normal(*shape, dtype=None):
        return torch.randn(shape, generator=generator).to(place.device, dtype or place.dtype)

    return normal


def results_and_gradients(function, inputs, dtype):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    results = function(*leaves)
    results = results if isinstance(results, tuple) else (results,)
    generator = torch.Generator().manual_seed(1)
    upstream = [
        torch.randn(result.shape, generator=generator).to(result.device, dtype).to(result.dtype)
        for result in results
    ]
    return [*results, *torch.autograd.grad(results, leaves, upstream)]


def distance(tensor, reference):
    """The error's norm over the reference's."""
    tensor, reference = tensor.detach().double(), reference.detach().double()
    return float((tensor - reference).norm() / reference.norm())


def check(place, fused, twin, *inputs):
    """Check results and all gradients of `fused` against `twin` in float64, for the same random upstream."""
    mine = results_and_gradients(fused, inputs, place.dtype)
    expected = results_and_gradients(twin, [tensor.double() for tensor in inputs], place.dtype)
    errors = [distance(*pair) for pair in zip(mine, expected, strict=True)]
    assert all(error < place.tolerance for error in errors), errors
    return mine


def windows_with_bos(place, tokens, pattern):
    """Documents of two windows."""
    ids = torch.full((2, tokens), 9)
    if pattern == "some":
        ids = torch.randint(11, (2, tokens), generator=torch.Generator().manual_seed(tokens))
    if pattern == "block edges":
        step = 16 * place.stretch
        ids[0, step - 1 :: step] = ids[1, step::step] = TINY.bos_id
    if pattern == "last token":
        ids[:, -1] = TINY.bos_id
    return plain.DocumentBounds(
        *(tensor.to(place.device) for tensor in plain.document_bounds(ids, TINY.bos_id))
    )


# The stream

UNITS = [
    (False,),
    (True, False),
    (True, True),
    (False, True, False),
    (False,) * 5,
    (True, False, True, True, False),
]


def as_terms(inputs, units):
    """Make terms of the first inputs, with the other inputs as weights of those that are not `units`."""
    tensors, vectors = inputs[: len(units)], iter(inputs[len(units) :])
    return [
        Term(tensor, None if unit else next(vectors)) for tensor, unit in zip(tensors, units, strict=True)
    ]


def stream_inputs(draw, units, shape):
    return [draw(*shape) for _ in units] + [
        draw(shape[-1], dtype=torch.float32) for unit in units if not unit
    ]


@pytest.mark.parametrize("units", UNITS, ids=str)
def test_weighted_sum(place, draw, units):
    inputs = stream_inputs(draw, units, (3, 7, 24))
    check(
        place,
        lambda *inputs: kernels.weighted_sum(as_terms(inputs, units)),
        lambda *inputs: plain.weighted_sum(as_terms(inputs, units)),
        *inputs,
    )


@pytest.mark.parametrize("units", UNITS, ids=str)
def test_weighted_sum_norm(place, draw, units):
    inputs = stream_inputs(draw, units, (3, 7, 24))
    check(
        place,
        lambda *inputs: kernels.weighted_sum_norm(as_terms(inputs, units), 0.7),
        lambda *inputs: plain.weighted_sum_norm(as_terms(inputs, units), 0.7),
        *inputs,
    )


@pytest.mark.parametrize("used", [0, 1], ids=["sum", "norm"])
@pytest.mark.parametrize("units", [(True, False), (False, False)], ids=str)
def test_weighted_sum_norm_of_which_one_result_is_used(place, draw, units, used):
    inputs = stream_inputs(draw, units, (3, 7, 24))
    check(
        place,
        lambda *inputs: kernels.weighted_sum_norm(as_terms(inputs, units), 0.7)[used],
        lambda *inputs: plain.weighted_sum_norm(as_terms(inputs, units), 0.7)[used],
        *inputs,
    )


@pytest.mark.parametrize("shape", [(1, 5), (2, 1), (67, 33), (5, 64)], ids=str)
def test_weighted_sum_norm_of_any_shape(place, draw, shape):
    """Widths that are and are not powers of two, one row, and more rows than programs take at once."""
    units = (True, False)
    check(
        place,
        lambda *inputs: kernels.weighted_sum_norm(as_terms(inputs, units), 0.7),
        lambda *inputs: plain.weighted_sum_norm(as_terms(inputs, units), 0.7),
        *stream_inputs(draw, units, shape),
    )


# Heads


def angles(place, tokens, rope_dims):
    return [
        tensor.to(place.device)
        for tensor in rope_cos_sin(tokens, replace(TINY, rope_dims=rope_dims, width=64), torch.device("cpu"))
    ]


@pytest.mark.parametrize("pattern", [None, "some"])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("tokens", [5, 35])
def test_qk_norm_rope(place, draw, tokens, heads, kv_heads, pattern):
    """Fewer rows than a block, and no multiple of one."""
    cos, sin = angles(place, tokens, 8)
    starts = windows_with_bos(place, tokens, pattern).starts_BT if pattern else None
    check(
        place,
        lambda joint, gain: kernels.qk_norm_rope(joint, gain, cos, sin, starts, kv_heads),
        lambda joint, gain: plain.qk_norm_rope(joint, gain, cos.double(), sin.double(), starts, kv_heads),
        draw(2, tokens, (heads + 2 * kv_heads) * 16),
        3 + draw(heads, dtype=torch.float32),
    )


@pytest.mark.parametrize("rope_dims", [0, 2, 16])
def test_qk_norm_rope_rotates_none_or_all_of_a_head(place, draw, rope_dims):
    cos, sin = angles(place, 9, rope_dims)
    check(
        place,
        lambda joint, gain: kernels.qk_norm_rope(joint, gain, cos, sin, None, 1),
        lambda joint, gain: plain.qk_norm_rope(joint, gain, cos.double(), sin.double(), None, 1),
        draw(2, 9, 4 * 16),
        3 + draw(2, dtype=torch.float32),
    )


# Attention


def attention_inputs(draw, tokens, heads, kv_heads):
    return 2 * draw(2, tokens, heads, 16), draw(2, tokens, kv_heads, 16), draw(2, tokens, kv_heads, 16)


@pytest.mark.parametrize(
    ("tokens", "pattern"),
    [
        (5, "none"),
        (5, "some"),
        (32, "none"),
        (32, "some"),
        (49, "none"),
        (49, "some"),
        (49, "block edges"),
        (49, "last token"),
    ],
)
def test_attention_within_documents(place, draw, tokens, pattern):
    """Fewer tokens than a block, a multiple of all blocks, and neither."""
    tokens *= place.stretch
    within = windows_with_bos(place, tokens, pattern)
    inputs = attention_inputs(draw, tokens, 2, 1)
    check(
        place,
        lambda q, k, v: kernels.attend(q, k, v, within),
        lambda q, k, v: plain.attend(q, k, v, within),
        *inputs,
    )


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_attention_of_several_groups(place, draw, heads, kv_heads):
    tokens = 21 * place.stretch
    within = windows_with_bos(place, tokens, "some")
    query, key, value = attention_inputs(draw, tokens, heads, kv_heads)
    value[1, 3] = 0  # has no direction to exclude
    check(
        place,
        lambda q, k, v: kernels.attend(q, k, v, within),
        lambda q, k, v: plain.attend(q, k, v, within),
        query,
        key,
        value,
    )


@pytest.mark.parametrize(
    "sizes", [((16, 32), (16, 32), (16, 32)), ((32, 16), (16, 16), (32, 16))], ids=["wide", "tall"]
)
def test_attention_with_blocks_of_other_sizes(place, draw, monkeypatch, sizes):
    larger = max(1, place.stretch // 2)
    set_attention_blocks(monkeypatch, *((rows * larger, columns * larger) for rows, columns in sizes))
    tokens = 49 * place.stretch
    within = windows_with_bos(place, tokens, "some")
    inputs = attention_inputs(draw, tokens, 2, 1)
    check(
        place,
        lambda q, k, v: kernels.attend(q, k, v, within),
        lambda q, k, v: plain.attend(q, k, v, within),
        *inputs,
    )


def test_attention_over_whole_windows_repeats_bit_for_bit(place, draw):
    inputs = attention_inputs(draw, 21 * place.stretch, 2, 1)
    first, again = (
        check(
            place,
            lambda q, k, v: kernels.attend(q, k, v, None),
            lambda q, k, v: plain.attend(q, k, v, None),
            *inputs,
        )
        for _ in range(2)
    )
    assert all(map(torch.equal, first, again))


# MLP


@pytest.mark.parametrize(("tokens", "width", "hidden"), [(70, 24, 40), (7, 8, 16), (64, 32, 64)])
def test_squared_leaky_relu_mlp(place, draw, tokens, width, hidden):
    """No side a multiple of a block, all smaller than one, and all multiples."""
    inputs = draw(tokens, width), draw(hidden, width), draw(width, hidden)
    check(place, kernels.squared_leaky_relu_mlp, plain.squared_leaky_relu_mlp, *inputs)


def test_squared_leaky_relu_mlp_with_frozen_weights(place, draw):
    """Adapters train while these weights take no gradients; the input's gradient is the same to the bit."""
    x, up, down = draw(70, 24), draw(40, 24), draw(24, 40)
    gradients = []
    for frozen in (False, True):
        leaf, *weights = (
            x.clone().requires_grad_(),
            up.clone().requires_grad_(not frozen),
            down.clone().requires_grad_(not frozen),
        )
        kernels.squared_leaky_relu_mlp(leaf, *weights).float().square().sum().backward()
        gradients.append(leaf.grad)
        assert all((weight.grad is None) == frozen for weight in weights)
    assert torch.equal(*gradients)
    arguments = operator_arguments(draw, place)["squared_leaky_relu_mlp_backward"]
    torch.library.opcheck(torch.ops.caddie.squared_leaky_relu_mlp_backward.default, (*arguments[:-1], True))


# Cross entropy


@pytest.mark.parametrize("vocab", [37, 64, 130])
@pytest.mark.parametrize("scale", [3.0, 60.0])
def test_softcapped_cross_entropy(place, draw, vocab, scale):
    """Less than a block of logits, one, and no multiple; far inside the cap, and at it."""
    targets = torch.arange(13, device=place.device) * 7 % vocab
    targets[0], targets[1] = 0, vocab - 1
    check(
        place,
        lambda z: kernels.softcapped_cross_entropy(z, targets, SOFTCAP),
        lambda z: plain.softcapped_cross_entropy(z, targets, SOFTCAP),
        scale * draw(13, vocab),
    )


@pytest.mark.parametrize("sign", [-1, 1])
def test_cross_entropy_of_logits_that_all_are_at_the_cap(place, sign):
    """The sum of exponentials has no running maximum; for the largest softcap it still is a number."""
    cap = MAX_FUSED_SOFTCAP
    z = torch.full((2, 5), sign * 1e4, device=place.device, dtype=place.dtype)
    losses = kernels.softcapped_cross_entropy(z, torch.tensor([0, 4], device=place.device), cap)
    torch.testing.assert_close(losses.cpu(), torch.full((2,), 5.0).log(), atol=1e-4, rtol=0)


# All together

SMALL = replace(
    TINY,
    context=17,
    width=32,
    layers=3,
    heads=2,
    kv_heads=1,
    rope_dims=8,
    parallel_from=2,
    loop_first=1,
    loop_last=1,
    loops=1,
    value_tables=1,
)


@pytest.mark.parametrize("looped", [False, True], ids=["straight", "looped"])
@pytest.mark.parametrize("attention", ["windows", "documents"])
def test_the_model_of_fused_operations_is_the_plain_model(place, monkeypatch, attention, looped):
    """Losses and gradients are about as near to float64's as those of the plain model in the same dtype."""
    if place is CPU:  # larger blocks: the interpreter's time is that of its programs
        set_attention_blocks(monkeypatch, *[(32, 32)] * 3)
        for module, name in (
            (kernels.residual_sum, "FORWARD_ROWS"),
            (kernels.residual_sum, "BACKWARD_ROWS"),
            (kernels.qkv_rope, "ROWS"),
        ):
            monkeypatch.setattr(module, name, 32)

    tokens = torch.randint(TINY.vocab_size, (2, 18), generator=torch.Generator().manual_seed(0))
    tokens[0, 5] = tokens[1, 0] = tokens[1, 16] = TINY.bos_id
    tokens = tokens.to(place.device)
    params = replace(SMALL, attention=attention)
    exact = losses_and_gradients(params, torch.float64, REFERENCE_OPS, tokens, looped)
    simple = losses_and_gradients(params, place.dtype, REFERENCE_OPS, tokens, looped)
    fused = losses_and_gradients(params, place.dtype, kernels.FUSED_OPS, tokens, looped)

    for name, reference in exact.items():
        allowed = 4 * distance(simple[name], reference) + 10 * place.tolerance
        assert distance(fused[name], reference) < allowed, name


def losses_and_gradients(model_params, dtype, ops, tokens, looped):
    model = Model(model_params, dtype, ops).to(tokens.device)
    model.load_state_dict(random_model(7, model_params).state_dict())
    if dtype == torch.float64:
        model.double()
    losses = model(tokens[:, :-1], tokens[:, 1:], looped)
    losses.mean().backward()
    return {"losses": losses.detach()} | {
        name: parameter.grad for name, parameter in model.named_parameters()
    }


# Operators


def operator_arguments(draw, place):
    """Arguments of small shapes for each operator; those that have a gradient require it."""

    def leaf(*shape, dtype=None):
        return draw(*shape, dtype=dtype).requires_grad_()

    # Shapes: qkv projection, queries, keys or values, one number a query; stream and hidden layer.
    single = torch.float32
    joint, query, value, row = (1, 5, 64), (1, 5, 2, 16), (1, 5, 1, 16), (1, 2, 5)
    small, wide = (5, 8), (5, 16)
    cos, sin = angles(place, 5, 8)
    within = plain.whole_window_bounds(1, 5, place.device)
    targets = torch.tensor([0, 1, 2, 3, 6], device=place.device)

    arguments = {
        "weighted_sum": ([leaf(*small), leaf(*small)], leaf(2, 8, dtype=single), 2, True, 0.5),
        "qk_norm_rope": (leaf(*joint), leaf(2, dtype=single), cos, sin, within.starts_BT, 1),
        "document_attention": (leaf(*query), leaf(*value), leaf(*value), *within),
        "squared_leaky_relu_mlp": (leaf(*small), leaf(16, 8), leaf(8, 16)),
        "softcapped_cross_entropy": (leaf(5, 7), targets, SOFTCAP),
    }

    # Their backward operators, of gradients, inputs, and what the forward pass saved.
    terms = [draw(*small), draw(*small)]
    arguments["weighted_sum_backward"] = (
        *(draw(*small), draw(*small), draw(*small), terms, draw(2, 8, dtype=single)),
        *(2, 0.5),
    )
    arguments["qk_norm_rope_backward"] = (
        *(draw(*joint), draw(2, dtype=single), cos, sin, None),
        *(draw(*query), draw(*value), draw(*value)),
    )

    arguments["document_attention_backward"] = (
        *(draw(*query), draw(*query), draw(*value), draw(*value), *within),
        *(draw(*query), draw(*row, dtype=single), draw(*row, dtype=single)),
    )
    arguments["squared_leaky_relu_mlp_backward"] = (
        *(draw(*small), draw(*small), draw(16, 8), draw(8, 16)),
        *(draw(*wide), draw(*wide), False),
    )

    losses = draw(5, dtype=single)
    arguments["softcapped_cross_entropy_backward"] = (
        *(losses, draw(5, 7), targets, draw(5, dtype=single), SOFTCAP),
    )
    return arguments


def test_operators_keep_their_word_to_the_compiler(place, draw):
    """Schema, shapes without data, and gradients, as torch.compile relies on them."""
    arguments = operator_arguments(draw, place)
    registered = {
        name.removeprefix("caddie::")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("caddie::")
    }
    assert registered == set(arguments)
    for name, values in arguments.items():
        torch.library.opcheck(getattr(torch.ops.caddie, name).default, values)


def test_kernels_are_compiled_side_by_side_and_then_no_more(tmp_path):
    """For an absent GPU, on which a launch fails: the block makes none, and compiles all kernels."""
    program = """
        import torch
        from triton import knobs
        from triton.backends.compiler import GPUTarget
        from triton.runtime import driver
        from stages.train.kernels import residual_sum as stream
        from stages.train.kernels.precompile import precompile_kernels
        from stages.train.reference import REFERENCE_OPS, Term

        # A GPU that is absent.
        class Absent:
            get_current_device = get_current_stream = lambda self, *of: 0
            get_current_target = lambda self: GPUTarget("cuda", 90, 32)

        driver.set_active(Absent())
        compiled, asked = [], []
        knobs.runtime.jit_post_compile_hook = lambda fn, **of: compiled.append(fn.name)
        x, w = torch.zeros(4, 8, requires_grad=True), torch.ones(8)

        def run():
            stream.weighted_sum_norm([Term(x), Term(x, w)], 1.0)[1].sum().backward()

        with precompile_kernels(-1):
            run()
            run()
        print(*sorted(compiled))
        knobs.runtime.jit_cache_hook = lambda **of: asked.append(of) or True
        try:
            run()
        except AttributeError:
            print("launched after", len(asked))
    """

    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout.splitlines() == ["_weighted_sum_backward _weighted_sum_forward", "launched after 0"]
