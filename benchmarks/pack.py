"""What each way to pack one and the same model costs in bytes and in loss.

    python -m benchmarks.pack --preset sprint --model FILE --hessians FILE --held-out SHARDS --results FILE [--set KEY=VALUE ...]

FILEs are train's model.safetensors and calibrate's hessians.safetensors. First #1493's way: fixed widths and brotli; its bytes become the
budget of all others. Then the same integers with our coder; then steps and levels at a rate, on a uniform grid and on trellises; then what
each of its parts is worth, left out alone. Each row says bytes, bits a weight above the bounds of layers.tsv, errors, the loss expected
from them, and the loss measured on windows of held-out training text with the decoded weights, against the unquantised ones. Programs that
are installed (xz, lrzip with ZPAQ) are run over the plain integers too, for scale.
"""

import argparse
import dataclasses
import json
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file

from benchmarks._held_out import HeldOut
from benchmarks._preset import preset_file
from stages import clock, config
from stages.pack import codec, container
from stages.pack.artifact import Packed, pack, unpack
from stages.pack.params import Params as PackInput
from stages.parallel import world
from stages.report import Report

VARIANTS: dict[str, dict[str, Any]] = {
    "fixed widths, our coder": {"quantiser": "sdclip", "codec": "adaptive", "damping": 0.01},
    "at a rate, uniform grid": {"states": 1},
    "at a rate, 4 states": {"states": 4},
    "at a rate, 8 states": {"states": 8},
    "at a rate, 32 states": {"states": 32},
    "8 states, rows alike": {"row_weight": 0.0},
    "8 states, rows by their full importance": {"row_weight": 1.0},
    "8 states, by error and bits": {"rate_weight": 0.1},
    "8 states, damping 0.01": {"damping": 0.01},
}
PROGRAMS = {"xz": ["xz", "-9e", "-k"], "lrzip": ["lrzip", "-z", "-L", "9", "-Q"]}


def figures(packed: Packed, seconds: float, held_out: HeldOut, base: np.ndarray) -> dict[str, Any]:
    """One row of the table."""
    rows = [row for row in packed.rows if row.expected_loss is not None]
    weights = sum(row.weights for row in rows)
    started = time.monotonic()
    state = unpack(packed.blob)[1]
    decode_seconds = time.monotonic() - started
    difference = held_out.losses(state) - base

    def mean(key: str) -> float:
        return float(sum(getattr(row, key) * row.weights for row in rows) / weights)

    return {
        "bytes": len(packed.blob),
        "bits_per_weight": 8 * sum(row.bytes for row in rows) / weights,
        **{key: mean(key) for key in ("above_bound", "above_bound_by_column", "mean_squared_error", "relative_error")},
        "expected_loss": sum(row.expected_loss or 0.0 for row in rows),
        "loss": float(difference.mean()),
        "loss_standard_error": float(difference.std(ddof=1) / len(difference) ** 0.5),
        "pack_seconds": seconds,
        "decode_seconds": decode_seconds,
    }


def by_programs(raw: bytes) -> dict[str, int]:
    """Bytes by each of the programs that are installed, and by brotli."""
    found = {}
    for name, command in PROGRAMS.items():
        if shutil.which(command[0]) is None:
            continue
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "raw").write_bytes(raw)
            subprocess.run([*command, "raw"], cwd=folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            found[name] = sum(path.stat().st_size for path in Path(folder).iterdir() if path.name != "raw")
    return found | {"brotli": len(codec.deflate(raw, 11)), "integers": len(raw)}


def outside(blob: bytes) -> dict[str, int]:
    """Bytes of the quantised integers by programs that are installed, one file for all tensors."""
    entries = [entry for entry in container.read(blob).entries if entry.form.kind == "rows"]
    return by_programs(b"".join(container.decode_streams(entry)[0] for entry in entries))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--hessians", type=Path, required=True)
    parser.add_argument("--held-out", type=Path, required=True, help="shards of training text that the model was not trained on")
    parser.add_argument("--windows", type=int, default=512)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--variant", action="append", metavar="NAME", choices=list(VARIANTS), help="these only")
    parser.add_argument("--results", type=Path, required=True)
    arguments = parser.parse_args()
    with preset_file(arguments.preset) as file:
        params = config.load(file, PackInput, arguments.set)
    assert isinstance(params, PackInput)
    state, hessians = load_file(arguments.model), load_file(arguments.hessians)
    reserve = params.pack.code_reserve_bytes
    with world(dataclasses.replace(params.parallel, nproc=1)) as here:
        held_out = HeldOut(arguments.held_out, arguments.windows, params.model, here)
        base = held_out.losses(state)
        result: dict[str, Any] = {
            "unquantised_nats": float(base.mean()),
            "variants": {},
            "changes": arguments.set,
            "preset": arguments.preset,
        }

        def run(name: str, **changes: Any) -> Packed:
            started = time.monotonic()
            of = dataclasses.replace(params.pack, **changes)
            packed = pack(state, hessians, params.model, of, Report(is_main=False))
            result["variants"][name] = figures(packed, time.monotonic() - started, held_out, base) | {"changes": changes}
            print(name, json.dumps(result["variants"][name]), flush=True)
            text = json.dumps(result | clock.facts(here.device), indent=2, sort_keys=True)
            arguments.results.write_text(text + "\n")
            return packed

        plain = run("fixed widths, brotli", quantiser="sdclip", codec="brotli", damping=0.01)  # all as in #1493
        result["outside"] = outside(plain.blob)
        for name in arguments.variant or VARIANTS:
            run(name, **({"budget_bytes": len(plain.blob) + reserve} | VARIANTS[name]))


if __name__ == "__main__":
    main()
