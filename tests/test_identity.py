"""The same bytes on every x86-64 machine with AVX2: hashes of operations and of a tiny pipeline.

They are compared on this CPU and on emulated ones.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.common import cpu_math, cpu_products, instruction_set
from tests import identity

ROOT = Path(__file__).resolve().parent.parent
COMMITTED: dict[str, str] = json.loads(identity.COMMITTED.read_text(encoding="utf-8"))
# Variables that would choose other code if they were not overwritten, or that tests set and users do not.
MISLEADING = {
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "AUTO",
    "OPENBLAS_CORETYPE": "SANDYBRIDGE",
    "OPENBLAS_NUM_THREADS": "3",
    "NPY_ENABLE_CPU_FEATURES": "AVX2",
    "OMP_THREAD_LIMIT": "1",
    "OMP_DYNAMIC": "true",
    "NUMBA_OPT": "0",
}
FOR_TESTS = ("NUMBA_BOUNDSCHECK", "TRITON_INTERPRET")
PASSIVE = {
    "OMP_WAIT_POLICY": "passive"
}  # threads that wait for each other do not spin: tests run side by side
EMULATED = (
    "Haswell",
    "EPYC-Rome",
    "EPYC-Milan",
    "Skylake-Client",
)  # without AVX-512, which QEMU does not emulate


def environment(**more: str) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in FOR_TESTS} | PASSIVE | more


def hashes(*command: str, **variables: str) -> dict[str, str]:
    done = subprocess.run(
        [*command], cwd=ROOT, env=environment(**variables), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, str] = json.loads(done.stdout)
    return found


def test_every_operation_and_a_tiny_pipeline_have_the_committed_hashes() -> None:
    found = hashes(sys.executable, "-m", "tests.identity", "--all", **MISLEADING)
    assert {name: value for name, value in found.items() if COMMITTED.get(name) != value} == {}
    assert found.keys() == COMMITTED.keys()


@pytest.mark.slow
@pytest.mark.parametrize("cpu", EMULATED)
def test_emulated_cpus_make_the_same_hashes(cpu: str) -> None:
    emulator = shutil.which("qemu-x86_64")
    if emulator is None:
        pytest.skip("no qemu-x86_64: install qemu-user")
    found = hashes(emulator, "-cpu", cpu, sys.executable, "-m", "tests.identity")
    assert {name: value for name, value in found.items() if COMMITTED[name] != value} == {}
    assert len(found) > 100


@pytest.mark.slow
def test_a_cpu_without_avx2_is_refused_by_name() -> None:
    emulator = shutil.which("qemu-x86_64")
    if emulator is None:
        pytest.skip("no qemu-x86_64: install qemu-user")
    command = [emulator, "-cpu", "SandyBridge", sys.executable, "-m", "stages.train", "--train", "nowhere"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "has no AVX2 with FMA" in done.stderr


def test_other_kernels_of_torch_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    with pytest.raises(ValueError, match="import `stages` first"):
        cpu_math.require_avx2()
    monkeypatch.setattr(torch.cpu, "_is_avx2_supported", lambda: False)
    with pytest.raises(ValueError, match="has no AVX2 with FMA"):
        cpu_math.require_avx2()


def test_importing_stages_last_is_said() -> None:
    program = "import numpy, warnings; warnings.simplefilter('error'); import stages"
    free = {name: value for name, value in environment().items() if name not in instruction_set.VARIABLES}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=free, capture_output=True, text=True, check=False
    )
    assert "stages was imported after numpy" in done.stderr


def test_a_process_pins_itself_and_its_children() -> None:
    program = "import stages, os, torch; print(torch.backends.cpu.get_cpu_capability());"
    program += " print(os.environ['MKL_CBWR'], os.environ['NUMBA_CPU_NAME'])"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=environment(**MISLEADING),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["AVX2", "COMPATIBLE", "haswell"]


def strided(
    rows: int, columns: int, how: str, batch: int = 0, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """A matrix of normal numbers by rows, by columns, as a slice, with gaps, or one for a whole batch."""
    shape = (batch, rows, columns) if batch else (rows, columns)
    if how == "columns":
        return torch.randn(*shape[:-2], columns, rows, dtype=dtype).mT
    if how == "slice":
        return torch.randn(*shape[:-2], rows + 3, columns + 5, dtype=dtype)[..., 2:-1, 1:-4]
    if how == "gaps":
        return torch.randn(*shape[:-1], 2 * columns, dtype=dtype)[..., ::2]
    if how == "expanded":
        return torch.randn(rows, columns, dtype=dtype).expand(shape)
    return torch.randn(shape, dtype=dtype)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("how", ["rows", "columns", "slice", "gaps", "expanded"])
@pytest.mark.parametrize(
    "shape", [(0, 5, 3), (4, 0, 3), (1, 1, 1), (1, 300, 70), (90, 41, 1), (37, 130, 55), (61, 20, 333)]
)
@pytest.mark.parametrize("batch", [0, 1, 2, 5])
def test_products_equal_those_in_double_precision(
    batch: int, shape: tuple[int, int, int], how: str, dtype: torch.dtype, threads: int
) -> None:
    torch.manual_seed(1)
    torch.set_num_threads(threads)
    rows, depth, columns = shape
    a, b = strided(rows, depth, how, batch, dtype), strided(depth, columns, how, batch, dtype)
    expected = slow(a, b)
    tolerance = {torch.float32: 1e-4, torch.float64: 1e-11, torch.bfloat16: 0.3}[dtype]
    torch.testing.assert_close(
        (a @ b).double(), expected, atol=tolerance, rtol=1e-2 if dtype == torch.bfloat16 else 0
    )


def slow(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The product as a sum of elementwise ones."""
    return (a.double()[..., :, :, None] * b.double()[..., None, :, :]).sum(-2)


@pytest.mark.parametrize("beta", [0.0, 1.0, 0.5])
def test_products_that_are_added(beta: float) -> None:
    a, b, addend = torch.randn(3, 40, 50), torch.randn(3, 50, 60), torch.randn(60)
    if not beta:
        addend = addend.fill_(float("nan"))
    expected = -1.5 * slow(a, b) + (beta * addend.double() if beta else 0)
    torch.testing.assert_close(
        torch.baddbmm(addend, a, b, beta=beta, alpha=-1.5).double(), expected, atol=1e-4, rtol=0
    )
    torch.testing.assert_close(
        torch.addmm(addend, a[0], b[0], beta=beta, alpha=-1.5).double(), expected[0], atol=1e-4, rtol=0
    )

    into = addend.expand(3, 40, 60).clone()
    into.baddbmm_(a, b, beta=beta, alpha=-1.5)
    torch.testing.assert_close(into.double(), expected, atol=1e-4, rtol=0)
    torch.baddbmm(addend, a, b, beta=beta, alpha=-1.5, out=into)
    torch.testing.assert_close(into.double(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("mm", ((3, 4), (5, 6))),
        ("bmm", ((2, 3, 4), (2, 5, 6))),
        ("bmm", ((2, 3, 4), (3, 4, 5))),
        ("addmm", ((3, 6), (3, 4), (5, 6))),
        ("mv", ((3, 4), (5,))),
        ("dot", ((3,), (4,))),
    ],
)
def test_factors_that_do_not_fit_are_refused(name: str, shapes: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(RuntimeError):
        getattr(torch, name)(*(torch.randn(shape) for shape in shapes))


def test_factors_of_two_types_are_refused() -> None:
    with pytest.raises(RuntimeError, match="one dtype"):
        torch.mm(torch.randn(3, 4), torch.randn(4, 5, dtype=torch.float64))


def test_operands_that_do_not_fit_are_refused() -> None:
    with pytest.raises(RuntimeError, match="one dtype"):
        torch.addmm(torch.zeros(5, dtype=torch.float64), torch.randn(3, 4), torch.randn(4, 5))
    with pytest.raises(RuntimeError, match="expected factors of 2 dimensions, got 3"):
        torch.mm(torch.randn(2, 3, 4), torch.randn(2, 4, 5))
    with pytest.raises(RuntimeError, match="expected factors of 3 dimensions, got 2"):
        torch.bmm(torch.randn(3, 4), torch.randn(4, 5))


def test_conjugated_complex_products() -> None:
    z = torch.randn(3, 4, dtype=torch.complex64)
    expected = torch.from_numpy(z.numpy().conj().T @ z.numpy())
    torch.testing.assert_close(z.mH @ z, expected)


def test_vectors_and_integers() -> None:
    a, x = torch.randn(30, 40), torch.randn(40)
    torch.testing.assert_close((a @ x).double(), (a.double() * x.double()).sum(1), atol=1e-4, rtol=0)
    torch.testing.assert_close((x @ x).double(), x.double().square().sum(), atol=1e-4, rtol=0)
    whole = torch.arange(12).view(3, 4)
    assert torch.equal(whole @ whole.T, torch.tensor([[14, 38, 62], [38, 126, 214], [62, 214, 366]]))


def test_products_without_the_libraries_have_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(2)
    pairs: list[tuple[Any, Any]] = [
        (torch.randn(100, 257), torch.randn(257, 77)),
        (torch.randn(5, 60, 64), torch.randn(5, 64, 200)),
        (torch.randn(3, 4), torch.randn(4, 0)),
        (torch.randn(0, 4), torch.randn(4, 2)),
        (torch.randn(3, 0), torch.randn(0, 2)),
        (torch.randn(0, 4, 5), torch.randn(0, 5, 3)),
    ]
    expected = [a @ b for a, b in pairs]
    monkeypatch.setattr(cpu_products, "_product_functions", lambda: None)
    assert all(torch.equal(a @ b, product) for (a, b), product in zip(pairs, expected, strict=True))


def test_gradients_of_products() -> None:
    a, b = (
        torch.randn(4, 5, 6, dtype=torch.float64, requires_grad=True),
        torch.randn(4, 6, 3, dtype=torch.float64, requires_grad=True),
    )
    assert torch.autograd.gradcheck(torch.bmm, (a, b))


@pytest.mark.parametrize("name", ["sqrt", "log"])
def test_functions(name: str) -> None:
    function = getattr(torch, name)
    x = torch.tensor([0.0, 1.0, 2.0, 1e-30, 1e30, float("inf"), -1.0, float("nan")])
    torch.testing.assert_close(function(x).double(), function(x.double()), rtol=1e-6, atol=0, equal_nan=True)
    assert function(torch.tensor([1, 4])).dtype == torch.float32
    assert function(torch.tensor([-1 + 0j])).imag.abs() > 0.5
    with pytest.raises(RuntimeError, match="cannot be cast"):
        getattr(torch.tensor([1, 4]), f"{name}_")()
    assert function(x.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(getattr(x.clone(), f"{name}_")().nan_to_num(7), function(x).nan_to_num(7))


def test_factorisations() -> None:
    generator = torch.Generator().manual_seed(2)
    matrix = torch.randn(50, 50, dtype=torch.float64, generator=generator)
    good = matrix @ matrix.T + torch.eye(50, dtype=torch.float64)
    factor, missing = cpu_math.cholesky(torch.stack((good, -good)))
    assert missing is None
    assert factor is not None
    torch.testing.assert_close(slow(factor, factor.T), good)
    assert torch.equal(factor, factor.tril())
    torch.testing.assert_close(
        slow(cpu_math.invert(factor[None])[0], factor), torch.eye(50, dtype=torch.float64)
    )

    for rows, columns in ((40, 25), (25, 40), (1, 3)):
        made = cpu_math.orthogonal(rows, columns, generator).double()
        gram = slow(made.T, made) if rows > columns else slow(made, made.T)
        torch.testing.assert_close(
            gram, torch.eye(min(rows, columns), dtype=torch.float64), atol=1e-6, rtol=0
        )
