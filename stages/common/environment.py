"""What something was measured on, for timing.json and the results of benchmarks: nothing else may depend on it."""

import importlib.metadata
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch

from stages.common.cpu_math import processor

VERSIONED_PACKAGES = ("torch", "numpy", "sentencepiece", "brotli", "safetensors", "triton")
NVIDIA = Path("/proc/driver/nvidia/version")


def facts(device: torch.device | None = None) -> dict[str, Any]:
    """What was measured on: hardware, interpreter and package versions, the date. For timing.json only."""
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "hardware": hardware(device),
        "versions": versions(),
    }


def hardware(device: torch.device | None = None) -> dict[str, Any]:
    """Processor, cores, and the accelerator when `device` is one."""
    seen: dict[str, Any] = {"machine": platform.machine(), "processor": processor(), "cores": os.cpu_count()}
    if device is not None and device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        seen["accelerator"] = properties.name
        seen["accelerator_memory_bytes"] = properties.total_memory
        seen["accelerators"] = torch.cuda.device_count()
    return seen


def versions() -> dict[str, str]:
    """Python and the packages that can change a result."""
    found = {"python": platform.python_version()}
    for name in VERSIONED_PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def driver(file: Path = NVIDIA) -> str | None:
    """The version of the GPU driver, which PyTorch does not tell: the first line of what the kernel module says; None without one."""
    if not file.is_file():
        return None
    return " ".join(file.read_text(encoding="utf-8").partition("\n")[0].split())
