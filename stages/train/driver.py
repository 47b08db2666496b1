"""The version of the GPU driver, which PyTorch does not tell: for timing.json, beside the versions of packages."""

from pathlib import Path

NVIDIA = Path("/proc/driver/nvidia/version")


def driver(file: Path = NVIDIA) -> str | None:
    """The first line of what the kernel module says of itself; None without one."""
    if not file.is_file():
        return None
    return " ".join(file.read_text(encoding="utf-8").partition("\n")[0].split())
