"""One instruction set for every process: AVX2 with FMA, whatever else the CPU offers and whoever made it.

torch, oneDNN, MKL, OpenBLAS, numpy and numba each choose code by what the CPU can do, and code of
other vector widths adds up in another order. Each reads an environment variable when it is loaded
or first used, so `pin` must run before numpy and torch are imported: `stages/__init__.py` calls it.
What MKL does on AMD no variable can change, except that its slow COMPATIBLE branch is the same
everywhere; `stages/common/cpu_math.py` keeps the products away from it.
"""

import os
import sys
import warnings

# AVX-512 by all its names (X86_V4: numpy's since 2.4). A name that is unknown only gives an
# ImportWarning, hidden by Python.
NUMPY_BEYOND_AVX2 = "X86_V4 AVX512F AVX512CD AVX512_SKX AVX512_CLX AVX512_CNL AVX512_ICL AVX512_SPR"

VARIABLES = {
    "ATEN_CPU_CAPABILITY": "avx2",  # torch's own vectorised kernels
    "ONEDNN_MAX_CPU_ISA": "AVX2",  # products (cpu_math.py)
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "MKL_CBWR": "COMPATIBLE",  # the only branch that Intel promises to be the same on AMD
    "OPENBLAS_CORETYPE": "Haswell",  # numpy's products and factorisations
    "OPENBLAS_NUM_THREADS": "1",  # its products are small, and its idle threads would spin
    "NPY_DISABLE_CPU_FEATURES": NUMPY_BEYOND_AVX2,
    "NUMBA_CPU_NAME": "haswell",  # LLVM's name of AVX2 with FMA
    "NUMBA_CPU_FEATURES": "",  # none beyond those of the name
    "NUMBA_OPT": "3",
    "NUMBA_LOOP_VECTORIZE": "1",
    "NUMBA_SLP_VECTORIZE": "0",
    "NUMBA_DISABLE_INTEL_SVML": "1",  # a library that is used where it happens to be installed
    "OMP_DYNAMIC": "false",  # always as many threads as parallel.threads says: sums are divided over them
}


# What would change the number of threads or block sizes, or contradict a variable above.
REMOVED = (
    "NPY_ENABLE_CPU_FEATURES",
    "OMP_THREAD_LIMIT",
    "OMP_MAX_ACTIVE_LEVELS",
    "OPENBLAS_BLOCK_FACTOR",
    "OPENBLAS_L2_SIZE",
)


def pin() -> None:
    """Set the variables for this process and its children, whatever the environment said before."""
    unset = [name for name, value in VARIABLES.items() if os.environ.get(name) != value]
    loaded = [name for name in ("numpy", "torch", "numba") if name in sys.modules]
    if unset and loaded:
        warnings.warn(
            f"stages was imported after {', '.join(loaded)}: results may differ from those of other machines"
            " in the last bits; import stages first",
            stacklevel=3,
        )
    for name in REMOVED:
        os.environ.pop(name, None)
    os.environ.update(VARIABLES)
