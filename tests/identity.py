"""Hashes of every operation that results depend on, and of a tiny run of the pipeline.

    python -m tests.identity [--all] [--threads N] [--write]

The committed hashes are in identity.json. Every machine must make the same ones, and so must emulated CPUs
of other vendors (tests/test_identity.py). `--all` adds the adapters and what numba compiles, which take
long under emulation; `--write` replaces identity.json.
"""

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import stages  # noqa: F401  (pins the instruction set, which numpy and torch read when they are imported)

# isort: split
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stages.calibrate.hessians import collect_hessians
from stages.calibrate.params import CalibrateParams
from stages.calibrate.params import Params as CalibrateInput
from stages.common import cpu_math
from stages.common.clock import Interval
from stages.common.progress import Logger
from stages.common.scorer import Scorer
from stages.pack.artifact import pack, unpack
from stages.sliding_eval.params import SlidingEvalParams
from stages.sliding_eval.scorer import SlidingScorer
from stages.train.cpu_attention import attention
from stages.train.loop import train
from stages.train.model import Model
from stages.train.params import Params
from stages.ttt_eval.build import build_scorer
from tests import pack_inputs
from tests.factories import PARALLEL, TINY, TRAIN, TTT, make_world, scorer_inputs, write_shards

COMMITTED = Path(__file__).with_name("identity.json")
THREADS = 2  # of the committed hashes; part of a result's identity
# Large enough for products in several jobs and for reductions that torch divides over threads; small
# enough to emulate.
MODEL = replace(TINY, vocab_size=512, context=64, width=48, hidden=96, heads=4, kv_heads=2, rope_dims=4)
SLIDING = SlidingEvalParams(window=64, stride=16, batch_windows=4, chunk=128)
PACK = replace(pack_inputs.PACK, rate_weight=0.0, budget_bytes=120_000)
SILENT = Logger(is_main=False)


def digest(value: Any) -> str:
    """The first 16 hexadecimal digits of the sha256 of a tensor, an array or a text."""
    if isinstance(value, Tensor):
        value = value.detach().contiguous().numpy()
    if isinstance(value, np.ndarray):
        value = np.ascontiguousarray(value).tobytes()
    if isinstance(value, str):
        value = value.encode("utf-8")
    return hashlib.sha256(value).hexdigest()[:16]


def digest_of_state(state: dict[str, Tensor]) -> str:
    """One hash of many tensors."""
    return digest("".join(f"{name} {digest(tensor)}\n" for name, tensor in sorted(state.items())))


def operations() -> Iterator[tuple[str, str]]:
    """Hash each floating-point operation of the pipeline on the CPU, over magnitudes from 2^-60 to 2^60."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    for dtype in (torch.float32, torch.float64):
        kind = str(dtype).removeprefix("torch.")
        x = normal(4000, dtype=dtype) * torch.exp2(
            torch.randint(-20, 7, (4000,), generator=generator).to(dtype)
        )
        positive = torch.exp2(normal(4000, dtype=dtype) * 20)
        rows = normal(40, 99, dtype=dtype)
        yield f"normal {kind}", digest(x)

        for name, function in _functions().items():
            needs_positive = name in ("sqrt", "log", "rsqrt", "log2")
            yield f"{name} {kind}", digest(function(positive if needs_positive else x.clamp(-80, 80)))
        for name, reduction in _reductions().items():
            yield f"{name} {kind}", digest(reduction(rows))
        for name, product in _products(lambda *shape, dtype=dtype: normal(*shape, dtype=dtype)).items():
            yield f"{name} {kind}", digest(product)
        for name, result in _factorisations(normal(70, 70, dtype=dtype), generator).items():
            yield f"{name} {kind}", digest(result)
    yield from ((name, digest(value)) for name, value in _attention(normal).items())
    yield from ((name, digest(value)) for name, value in _numpy().items())


def _functions() -> dict[str, Callable[[Tensor], Tensor]]:
    names = (
        "sqrt",
        "log",
        "sigmoid",
        "sin",
        "cos",
        "exp",
        "exp2",
        "log2",
        "rsqrt",
        "reciprocal",
        "square",
        "expm1",
    )
    functions: dict[str, Callable[[Tensor], Tensor]] = {name: getattr(torch, name) for name in names}
    return functions | {"leaky_relu": lambda x: F.leaky_relu(x, 0.5), "pow": lambda x: x.abs() ** 1.7}


def _reductions() -> dict[str, Callable[[Tensor], Tensor]]:
    return {
        "sum": torch.sum,
        "sum of rows": lambda x: x.sum(1),
        "sum of columns": lambda x: x.sum(0),
        "mean": lambda x: x.mean(1),
        "std": lambda x: x.std(1),
        "norm": torch.linalg.vector_norm,
        "norm of rows": lambda x: torch.linalg.vector_norm(x, dim=1),
        "softmax": lambda x: x.softmax(1),
        "log_softmax": lambda x: x.log_softmax(1),
        "rms_norm": lambda x: F.rms_norm(x, (x.shape[-1],), eps=1e-7),
        "normalize": lambda x: F.normalize(x, dim=-1),
        "lerp": lambda x: x.lerp(x.flip(0), 0.3),
        "addcmul": lambda x: torch.addcmul(x, x, x.flip(0)),
        "cumsum": lambda x: x.cumsum(1),
    }


PRODUCTS = ((256, 128, 96), (100, 257, 77), (48, 523, 64), (7, 5, 3), (1, 128, 64), (64, 128, 1))


def _products(normal: Callable[..., Tensor]) -> dict[str, Tensor]:
    found = {}
    for rows, depth, columns in (*PRODUCTS, (64, 1100, 33)):
        a = normal(rows, depth)
        b = normal(columns, depth)
        found[f"mm {rows} {depth} {columns}"] = a @ b.T
        found[f"mm, both transposed, {rows} {depth} {columns}"] = a.T.contiguous().T @ b.T.contiguous()

    batch = normal(5, 33, 65)
    other = normal(5, 65, 34)
    return found | {
        "bmm": batch @ other,
        "baddbmm": torch.baddbmm(normal(5, 33, 34), batch, other, beta=0.5, alpha=-1.5),
        "addmm": torch.addmm(normal(33, 34), batch[0], other[0]),
        "mv": batch[0] @ other[0, :, 0],
        "dot": batch[0, 0] @ other[0, :, 0],
    }


def _factorisations(matrix: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    factor = cpu_math.cholesky((matrix @ matrix.T + 70 * torch.eye(70, dtype=matrix.dtype))[None])[0]
    assert factor is not None
    return {
        "cholesky": factor,
        "inverse of a triangle": cpu_math.invert(factor[None]),
        "orthogonal": cpu_math.orthogonal(70, 40, generator),
    }


def _attention(normal: Callable[..., Tensor]) -> dict[str, Tensor]:
    q, k, v = (normal(2, heads, 150, 16).requires_grad_() for heads in (4, 2, 2))
    out = attention(q, k, v, None)
    found = {"attention": out}
    gradients = torch.autograd.grad(out.square().sum(), (q, k, v))
    for name, gradient in zip("qkv", gradients, strict=True):
        found[f"attention, gradient of {name}"] = gradient
    return found


def _numpy() -> dict[str, Any]:
    generator = np.random.Generator(np.random.PCG64(0))
    x = generator.normal(size=4000) * np.exp2(generator.integers(-20, 7, 4000))
    positive = np.exp2(generator.normal(size=4000) * 20)
    found: dict[str, Any] = {"numpy normal": x}
    for dtype in (np.float32, np.float64):
        kind = np.dtype(dtype).name
        values = np.clip(x, -80, 80).astype(dtype)
        for name in ("exp", "exp2", "expm1"):
            found[f"numpy {name} {kind}"] = getattr(np, name)(values)
        for name in ("log", "log2", "log1p", "sqrt"):
            found[f"numpy {name} {kind}"] = getattr(np, name)(positive.astype(dtype))

        grid: Any = values[:3960].reshape(40, 99)
        found[f"numpy sum {kind}"] = grid.sum()
        found[f"numpy mean {kind}"] = grid.mean(0)
        found[f"numpy std {kind}"] = grid.std(1)
        found[f"numpy cumsum {kind}"] = grid.cumsum(1)
        found[f"numpy product {kind}"] = grid @ grid.T
    return found


def pipeline(everything: bool, threads: int) -> Iterator[tuple[str, str]]:
    """Hash a tiny training, calibration, packing and scoring.

    `everything` adds the default quantiser, its coder, adapters, tilt and mixture.
    """
    world = make_world()
    parallel = replace(PARALLEL, threads=threads)
    with tempfile.TemporaryDirectory() as name:
        folder = write_shards(Path(name) / "train", (3000, 2000), MODEL.vocab_size)
        settings = replace(TRAIN, steps=4, batch_tokens=256, micro_batch_tokens=128)
        trained = train(Params(42, parallel, MODEL, settings), folder, world, SILENT, Interval())
        yield "losses of training", digest(np.array(trained.losses))
        yield "trained weights", digest_of_state(trained.state)

        section = CalibrateParams(
            tokens=256, importance_tokens=128, micro_batch_tokens=128, revisit_weight=1.0
        )
        calibrate = CalibrateInput(42, parallel, MODEL, section)
        hessians = collect_hessians(trained.state, calibrate, folder, world, SILENT, Interval())
        yield "Hessians", digest_of_state(hessians)

    packed = pack(trained.state, hessians, MODEL, PACK, pack_inputs.ENCODER, SILENT)
    yield "model.bin, sdclip, brotli", digest(packed.blob)
    if everything:
        at_rate = replace(PACK, quantiser="rate", codec="adaptive", rate_weight=0.1)
        packed_at_rate = pack(trained.state, hessians, MODEL, at_rate, pack_inputs.ENCODER, SILENT)
        yield "model.bin, rate, adaptive", digest(packed_at_rate.blob)

    tokens = np.random.Generator(np.random.PCG64(3)).integers(4, MODEL.vocab_size, 400).astype(np.uint16)
    tokens[::90] = 1
    for words, scorer in _scorers(unpack(packed.blob)[1], len(tokens) - 1, everything):
        yield f"losses, {words}", digest(scorer.score_stream(tokens))


def _scorers(state: dict[str, Tensor], targets: int, everything: bool) -> Iterator[tuple[str, Scorer]]:
    def model() -> Model:
        made = Model(MODEL)
        made.load_state_dict(state)
        return made

    sgd = replace(TTT, chunk=128, batch_tokens=64)
    yield "sliding", SlidingScorer(model(), SLIDING, make_world())
    ways = {"SGD": sgd}
    if everything:
        ways["adapters"] = replace(sgd, kind="lora")
        ways["SGD, tilt and mixture"] = replace(sgd, tilt_rate=0.05, mixer_rate=0.001)
    for words, params in ways.items():
        yield words, build_scorer("ttt_eval", SLIDING, params, scorer_inputs(model(), targets))


def hashes(everything: bool, threads: int) -> dict[str, str]:
    """All hashes by name."""
    cpu_math.require_avx2()
    cpu_math.install()
    torch.set_num_threads(threads)
    torch.set_deterministic_debug_mode("error")
    return dict(operations()) | dict(pipeline(everything, threads))


def main() -> None:
    """Print the hashes, one a line, or write them."""
    parser = argparse.ArgumentParser(prog="python -m tests.identity", description=__doc__.partition("\n")[0])
    parser.add_argument("--all", action="store_true", help="also the adapters and what numba compiles")
    parser.add_argument("--write", action="store_true", help=f"replace {COMMITTED.name}")
    parser.add_argument("--threads", type=int, default=THREADS, help="other numbers have hashes of their own")
    arguments = parser.parse_args()
    text = json.dumps(hashes(arguments.all or arguments.write, arguments.threads), indent=1) + "\n"
    if arguments.write:
        COMMITTED.write_text(text, encoding="utf-8")
    else:
        sys.stdout.write(text)


if __name__ == "__main__":
    main()
