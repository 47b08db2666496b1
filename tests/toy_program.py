"""A counted program of a few lines and its files, for the clean room (B14)."""

from pathlib import Path

from stages.audit.sandbox.clean_room import AuditedArtifact

TOY = """
import json, os, pathlib, socket, subprocess, sys, time
started = time.monotonic()
HERE
assert pathlib.Path("model.bin").read_bytes() == b"weights"
val = pathlib.Path("data/val/val_0.bin").read_bytes()
pathlib.Path("eval").mkdir()
pathlib.Path("eval/metrics.json").write_text(json.dumps({"toy_bpb": len(val) / 4}))
pathlib.Path("eval/timing.json").write_text(json.dumps({"evaluation_seconds": time.monotonic() - started}))
"""


def toy_artifact(tmp_path: Path, line: str = "") -> AuditedArtifact:
    """The program with `line` in it, and its files; without a line it is lawful."""
    folder = tmp_path / "artifact"
    (folder / "val").mkdir(parents=True)
    (folder / "train_gpt.py").write_text(TOY.replace("HERE", line))
    (folder / "model.bin").write_bytes(b"weights")
    (folder / "val" / "val_0.bin").write_bytes(b"text.")
    return AuditedArtifact(
        {name: folder / name for name in ("train_gpt.py", "model.bin")}, {"data/val": folder / "val"}
    )
