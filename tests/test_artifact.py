"""Counted files of an artifact (artifact.py): every byte that a program can read of it is counted."""

import os
import socket
from pathlib import Path

import pytest

from stages.audit.sandbox.artifact import artifact_files, copy_artifact, counted_bytes


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    folder = tmp_path / "artifact"
    (folder / "sub" / "empty").mkdir(parents=True)
    (folder / "train_gpt.py").write_bytes(b"x" * 100)
    (folder / "sub" / "model.bin").write_bytes(b"x" * 1000)
    (folder / "sub" / "link").symlink_to("model.bin")
    return folder


def test_contents_names_and_links_count(artifact: Path) -> None:
    assert counted_bytes(artifact) == {
        "train_gpt.py": 100 + 12,
        "sub/": 3,
        "sub/empty/": 9,
        "sub/model.bin": 1000 + 13,
        "sub/link": 8 + 9,
    }
    assert artifact_files(artifact) == {
        "train_gpt.py": artifact / "train_gpt.py",
        "sub/model.bin": artifact / "sub" / "model.bin",
        "sub/link": artifact / "sub" / "model.bin",
    }


def test_data_in_the_names_of_empty_files_and_folders_counts(artifact: Path) -> None:
    before = sum(counted_bytes(artifact).values())
    for number in range(50):
        (artifact / f"{number:0200}").touch()
        (artifact / f"folder{number:0194}").mkdir()
    assert sum(counted_bytes(artifact).values()) == before + 2 * 50 * 200


def test_names_that_are_no_text_count_by_their_bytes(artifact: Path) -> None:
    Path(os.fsdecode(bytes(artifact) + b"/\xff\xfe")).write_bytes(b"1")
    Path(artifact / "é").write_bytes(b"1")
    sizes = counted_bytes(artifact)
    assert sizes[os.fsdecode(b"\xff\xfe")] == 3
    assert sizes["é"] == 3


def test_a_single_file_is_an_artifact(artifact: Path) -> None:
    assert counted_bytes(artifact / "train_gpt.py") == {"train_gpt.py": 112}
    assert artifact_files(artifact / "train_gpt.py") == {"train_gpt.py": artifact / "train_gpt.py"}


def test_an_artifact_that_is_reached_by_a_link_is_the_same(artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(artifact)
    assert counted_bytes(tmp_path / "link") == counted_bytes(artifact)


@pytest.mark.parametrize(
    "kind", ["absolute", "relative", "through", "folder", "own folder", "nothing", "loop"]
)
def test_links_that_leave_the_artifact_or_lead_to_no_file_are_refused(
    artifact: Path, tmp_path: Path, kind: str
) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "big").write_bytes(b"x" * 30_000_000)
    (artifact / "link").symlink_to(
        {
            "absolute": artifact / "train_gpt.py",
            "relative": Path("../outside/big"),
            "through": Path("../artifact/../outside/big"),
            "folder": Path("../outside"),
            "own folder": Path("sub"),
            "nothing": Path("no such file"),
            "loop": Path("link"),
        }[kind]
    )
    for function in (counted_bytes, artifact_files):
        with pytest.raises(ValueError, match="link"):
            function(artifact)


def test_pipes_and_sockets_are_refused(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(artifact / "pipe")
    with pytest.raises(ValueError, match="neither a file nor a folder"):
        counted_bytes(artifact)
    (artifact / "pipe").unlink()
    monkeypatch.chdir(artifact)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
    with pytest.raises(ValueError, match="neither a file nor a folder"):
        counted_bytes(artifact)


def test_a_copy_has_the_contents_names_and_links_and_nothing_else(artifact: Path, tmp_path: Path) -> None:
    model = artifact / "sub" / "model.bin"
    model.chmod(0o751)
    os.utime(model, ns=(123, 456))
    os.utime(artifact / "sub", ns=(123, 456))
    os.setxattr(model, "user.data", b"hidden")
    copy_artifact(artifact, tmp_path / "copy")
    copied = tmp_path / "copy"

    # The same entries and contents.
    assert counted_bytes(copied) == counted_bytes(artifact)
    assert (copied / "sub" / "model.bin").read_bytes() == model.read_bytes()
    assert (copied / "sub" / "link").readlink() == Path("model.bin")

    # Times and modes alike, no attributes.
    for path in [copied, *copied.rglob("*")]:
        assert path.lstat().st_mtime_ns == 0
    assert {oct(path.lstat().st_mode) for path in copied.rglob("*")} == {"0o100444", "0o40755", "0o120777"}
    assert os.listxattr(copied / "sub" / "model.bin") == []
