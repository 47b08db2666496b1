"""Hardware and software of a run, for timing.json and results of benchmarks.

Nothing else may depend on them.
"""

import importlib.metadata
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch

from stages.common.cpu_math import processor

VERSIONED_PACKAGES = ("torch", "numpy", "sentencepiece", "brotli", "safetensors", "triton")
NVIDIA = Path("/proc/driver/nvidia/version")  # written by the driver's kernel module


def run_environment(device: torch.device | None = None) -> dict[str, Any]:
    """Date, hardware, and versions of the interpreter and of packages."""
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "hardware": hardware(device),
        "versions": versions(),
    }


def hardware(device: torch.device | None = None) -> dict[str, Any]:
    """Processor and cores, and the accelerator when `device` is one."""
    found: dict[str, Any] = {
        "machine": platform.machine(),
        "processor": processor(),
        "cores": os.cpu_count(),
    }
    if device is not None and device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["accelerator"] = properties.name
        found["accelerator_memory_bytes"] = properties.total_memory
        found["accelerators"] = torch.cuda.device_count()
    return found


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a result; those not installed are left out."""
    found = {"python": platform.python_version()}
    for name in VERSIONED_PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def gpu_driver_version(file: Path = NVIDIA) -> str | None:
    """Version of the GPU driver, which PyTorch does not offer: the first line of `file`.

    None without a driver.
    """
    if not file.is_file():
        return None
    return " ".join(file.read_text(encoding="utf-8").partition("\n")[0].split())
