"""tokenize as a command: its sources, its split, its tokenizer, its errors."""

import gzip
import json
import lzma
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.common import bpb, shards
from stages.common.stage import launch
from stages.tokenize import docstrings, split, tokenizer
from stages.tokenize.encode import encode
from stages.tokenize.split import TextDocument
from stages.tokenize.stage import STAGE, main

OUTPUTS = {"train", "val", "tokenizer.model", "documents.u64", "manifest.json", "log.txt", "timing.json"}
DEFAULTS: dict[str, Any] = {
    "source": "files",
    "train_glob": "*.jsonl",
    "val_glob": "",
    "text_key": "text",
    "val_fraction": 0.2,
    "max_document_bytes": 100_000,
    "tokenizer": "train",
    "vocab_size": 400,
    "tokenizer_sample_bytes": 1_000_000,
    "threads": 2,
    "shard_tokens": 100_000,
}
WORDS = [
    "space",
    "token",
    "shard",
    "of",
    "a",
    "the",
    "model",
    "byte",
    "line",
    "word",
    "piece",
    "import",
    "torch",
    "return",
    "12",
    "907",
]


class Workspace:
    """The input folders of one tokenize, and a way to run it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("text", "shards", "tokenizer"):
            (root / name).mkdir()
        self.output = root / "out"
        self.lock = root / "requirements.lock"

    def run(self, **changes: Any) -> dict[str, Any]:
        file = self.root / "params.yaml"
        file.write_text(yaml.safe_dump({"tokenize": DEFAULTS | changes}))
        folders = [f"--{name}={self.root / name}" for name in ("text", "shards", "tokenizer")]
        launch(STAGE, main, [f"--params={file}", f"--output={self.output}", f"--lock={self.lock}", *folders])
        manifest: dict[str, Any] = json.loads((self.output / "manifest.json").read_text())
        return manifest

    def texts(self, side: str) -> list[str]:
        """The texts that the shards of a side decode to."""
        processor = bpb.load_tokenizer(self.output / "tokenizer.model")
        stream = shards.stream(self.output / side)
        return [
            processor.decode(document[1:].tolist())
            for document in shards.documents(stream, processor.bos_id())
        ]

    def write_jsonl(self, name: str, texts: list[str]) -> Path:
        path = self.root / "text" / name
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        return path


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path)


def some_texts(count: int, seed: int = 0) -> list[str]:
    """Texts of words and white space of every kind; document i contains the number i."""
    random = np.random.default_rng(seed)
    separators = np.array([" ", " ", " ", "  ", "\n", "\n    ", "\t", ", "])
    texts = []
    for i in range(count):
        words = random.choice(WORDS, size=40)
        gaps = random.choice(separators, size=40)
        texts.append(f"{seed}.{i}: " + "".join(word + gap for word, gap in zip(words, gaps, strict=True)))
    return texts


def folder_bytes(folder: Path) -> dict[str, bytes]:
    measured = ("log.txt", "timing.json")
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in measured
    }


@pytest.fixture(scope="module")
def lossless() -> tokenizer.Tokenizer:
    """A throw-away tokenizer of our own kind."""
    model = tokenizer.train(some_texts(200), 400, 1)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    return tokenizer.Tokenizer(model, processor, bpb.byte_table(processor))


# Sources


def test_files_end_to_end(workspace: Workspace) -> None:
    texts = some_texts(300)
    workspace.write_jsonl("a.jsonl", texts)
    manifest = workspace.run()
    assert {path.name for path in workspace.output.iterdir()} == OUTPUTS
    train, val = workspace.texts("train"), workspace.texts("val")
    assert sorted(train + val) == sorted(texts)
    assert 30 < len(val) < 90  # 0.2 of 300
    assert manifest["train"]["bytes"] == sum(len(text.encode()) for text in train)
    assert (
        manifest["val"]["source_bytes"] == manifest["val"]["bytes"] == sum(len(text.encode()) for text in val)
    )
    assert manifest["train"]["changed_documents"] == 0


def test_every_kind_of_file_gives_the_same_documents(workspace: Workspace) -> None:
    texts = some_texts(40)
    content = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode()

    folder = workspace.root / "text"
    expected = None
    for name, data in [
        ("a.jsonl", content),
        ("b.jsonl.gz", gzip.compress(content)),
        ("c.jsonl.xz", lzma.compress(content)),
    ]:
        (folder / name).write_bytes(data)
        workspace.run(train_glob=name)
        produced = folder_bytes(workspace.output)
        expected = expected or produced
        assert produced == expected

    # The same texts as files of text, whose manifest names other files.
    for i, text in enumerate(texts):
        data = text.encode()
        name, packed = [
            ("t{:03d}.txt", data),
            ("t{:03d}.txt.gz", gzip.compress(data)),
            ("t{:03d}.txt.xz", lzma.compress(data)),
        ][i % 3]
        (folder / name.format(i)).write_bytes(packed)
    workspace.run(train_glob="t*.txt*")
    produced = folder_bytes(workspace.output)
    assert {**produced, "manifest.json": b""} == {**(expected or {}), "manifest.json": b""}


def test_links_are_followed(workspace: Workspace, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in some_texts(40)))
    (workspace.root / "text" / "linked").symlink_to(elsewhere)
    assert workspace.run(train_glob="**/*.jsonl")["train"]["documents"] > 0


def test_given_val_files(workspace: Workspace) -> None:
    train, val = some_texts(50), some_texts(9, seed=1)
    workspace.write_jsonl("train.jsonl", train)
    workspace.write_jsonl("val.jsonl", val)
    workspace.run(train_glob="train.jsonl", val_glob="val.jsonl")
    assert (workspace.texts("train"), workspace.texts("val")) == (train, val)


def test_the_tokenizer_sees_train_alone(workspace: Workspace) -> None:
    workspace.write_jsonl("train.jsonl", some_texts(50))
    models = []
    for seed in (1, 2):
        workspace.write_jsonl(
            "val.jsonl", [text.replace("token", "zymurgy") for text in some_texts(20, seed)]
        )
        workspace.run(train_glob="train.jsonl", val_glob="val.jsonl")
        models.append((workspace.output / "tokenizer.model").read_bytes())
    assert models[0] == models[1]
    (workspace.root / "text" / "val.jsonl").unlink()
    texts = some_texts(100)
    workspace.write_jsonl("train.jsonl", texts)
    expected = tokenizer.sample([TextDocument(text, "") for text in texts], 0.2, 1_000_000).texts
    workspace.run()
    assert sorted(expected) == sorted(workspace.texts("train"))


def test_the_same_input_gives_the_same_bytes(workspace: Workspace) -> None:
    workspace.write_jsonl("a.jsonl", some_texts(100))
    produced = []
    for _ in range(2):
        workspace.run()
        produced.append(folder_bytes(workspace.output))
    assert produced[0] == produced[1]


def test_the_split_does_not_depend_on_order_or_spelling(workspace: Workspace) -> None:
    texts = some_texts(100)
    workspace.write_jsonl("a.jsonl", texts)
    workspace.run()
    val = set(workspace.texts("val"))
    shouted = [text.upper().replace(" ", "  ") for text in texts]
    workspace.write_jsonl("a.jsonl", [*shouted[::-1], *texts])
    workspace.run()
    assert set(workspace.texts("val")) == val | {text.upper().replace(" ", "  ") for text in val}


def test_adopted_shards_are_the_files_themselves(workspace: Workspace, tmp_path: Path) -> None:
    workspace.write_jsonl("a.jsonl", some_texts(120))
    first = workspace.run(shard_tokens=3000)
    assert len(first["shards"]) > 3
    for path in workspace.output.glob("*/*.bin"):
        (workspace.root / "shards" / path.name).write_bytes(path.read_bytes())
    (workspace.root / "tokenizer" / "own.model").write_bytes(
        (workspace.output / "tokenizer.model").read_bytes()
    )
    before = folder_bytes(workspace.output)
    second = workspace.run(
        source="shards", train_glob="train_*.bin", val_glob="val_*.bin", tokenizer="own.model"
    )
    after = folder_bytes(workspace.output)
    assert before.keys() == after.keys()
    assert all(after[name] == content for name, content in before.items() if name != "manifest.json")
    assert second["shards"] == first["shards"]
    for side in ("train", "val"):
        assert second[side].items() <= {**first[side], **second[side]}.items()
        assert all(second[side][key] == first[side][key] for key in ("tokens", "documents", "bytes"))


def test_adopted_documents_may_go_on_in_the_next_shard(
    workspace: Workspace, lossless: tokenizer.Tokenizer
) -> None:
    (workspace.root / "tokenizer" / "own.model").write_bytes(lossless.model_bytes)
    tokens = {}
    for seed, side in enumerate(("train", "val")):
        encoded = list(encode([TextDocument(text, "") for text in some_texts(20, seed)], lossless, 1))
        tokens[side] = np.concatenate([one.tokens for one in encoded])
        for i, part in enumerate(np.split(tokens[side], [len(tokens[side]) // 3, len(tokens[side]) // 2])):
            shards.write(workspace.root / "shards" / f"fineweb_{side}_{i:06d}.bin", part)
    manifest = workspace.run(
        source="shards", train_glob="*_train_*", val_glob="*_val_*", tokenizer="own.model"
    )
    for seed, side in enumerate(("train", "val")):
        assert workspace.texts(side) == some_texts(20, seed)
        assert manifest[side]["documents"] == 20
        assert manifest[side]["bytes"] == sum(len(text.encode()) for text in some_texts(20, seed))
        assert len(manifest["shards"]) == 6


def test_docstrings_of_a_module() -> None:
    long = "what it does, " * 20

    source = f'''
"""{long}module"""
class A:
    """{long}class"""
    def f(self):
        "short"
        if self:
            async def g():
                """{long}nested

                    indented
                """
try: pass
except Exception:
    def h(): """{long}handler"""
match 1:
    case _:
        def i(): """{long}case"""
x = """{long}no docstring"""
def j(): """{long}\\ud800 no text"""
'''

    texts = docstrings.docstrings(source.encode())
    assert texts is not None
    found = [text.removeprefix(long) for text in texts]
    assert found == ["module", "class", "nested\n\nindented", "handler", "case"]
    assert docstrings.docstrings(b'def f[T]():\n  """x"""') is None  # 3.12's syntax, on every Python
    assert docstrings.docstrings(b'"""\x00') is None


def make_package(folder: Path, modules: dict[str, str]) -> None:
    for name, text in modules.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def test_pydocs_splits_whole_modules(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [" ".join(text.split()) for text in some_texts(200)]
    modules = {
        f"caddietoy/m{i:03d}.py": f'"""{texts[2 * i]}"""\ndef f():\n    """{texts[2 * i + 1]}"""\n'
        for i in range(100)
    }

    # Modules with a docstring of another, but for case.
    same = texts[0].upper()
    modules |= {
        f"caddietoy/n{i:03d}.py": f'"""{same}"""\ndef f():\n    """{texts[1]}"""\n' for i in range(20)
    }
    make_package(
        tmp_path / "lib", {"caddietoy/__init__.py": "raise ImportError('must not be imported')", **modules}
    )
    make_package(
        tmp_path / "lib",
        {"caddietoy-1.2.dist-info/METADATA": "Metadata-Version: 2.1\nName: caddietoy\nVersion: 1.2+cpu\n"},
    )

    monkeypatch.syspath_prepend(str(tmp_path / "lib"))
    monkeypatch.setattr(docstrings, "PACKAGES", ("caddietoy",))
    monkeypatch.setattr(docstrings, "MIN_CHARACTERS", 50)
    workspace.lock.write_text("# pinned\ncaddietoy==1.2\nother==3\n")

    # Docstrings of one module are on one side, and repeated ones count once.
    manifest = workspace.run(source="pydocs")
    train, val = set(workspace.texts("train")), set(workspace.texts("val"))
    assert val

    for i in range(100):
        assert len({texts[2 * i], texts[2 * i + 1]} & val) in (0, 2)
    sides = {
        split.normalised(text): side
        for side in (train, val)
        for text in side
        if split.normalised(text) == split.normalised(same)
    }
    assert len(sides) == 1
    assert manifest["corpus"]["packages"] == {"caddietoy": "1.2"}
    assert manifest["corpus"]["docstrings_repeated"] + manifest["corpus"]["docstrings_on_both_sides"] == 39

    # A version that is not the installed one is refused.
    workspace.lock.write_text("caddietoy==1.3\n")
    with pytest.raises(SystemExit):
        workspace.run(source="pydocs")


# Tokenizer

AWKWARD = [
    "def f(x):\n    if x:\n        return '\t'\n",
    "  two spaces first, trailing  ",
    "tabs\t\tand\r\nline ends\n\n\n",
    "a NUL \0 inside, \0",
    "\u00e9\u0301 \u3000 \u00a0 \u200b \U0001f600 \ufeff \ue001",
    "<s> </s> <unk> <0x41> \u2585 \u2047",
    " ",
    "\n",
    "x",
]


def test_own_tokenizer_has_the_design_s_properties(lossless: tokenizer.Tokenizer) -> None:
    processor = lossless.processor
    assert (processor.pad_id(), processor.bos_id(), processor.eos_id(), processor.unk_id()) == (0, 1, 2, 3)
    assert processor.vocab_size() == 400
    assert tokenizer.miscounted_ids(lossless) == {}
    pieces = [processor.id_to_piece(i) for i in range(400) if not processor.is_byte(i)]
    assert all(sum(character.isdigit() for character in piece) <= 1 for piece in pieces)


@pytest.mark.parametrize("text", AWKWARD)
def test_own_tokenizer_loses_nothing(lossless: tokenizer.Tokenizer, text: str) -> None:
    (encoded,) = encode([TextDocument(text, "it")], lossless, 1)
    assert encoded.text == text
    assert encoded.counted_bytes == len(text.encode()) - text.startswith(" ")


def test_the_marker_itself_is_a_changed_document(workspace: Workspace) -> None:
    workspace.write_jsonl("train.jsonl", [*some_texts(50), "a\u2581b and \u2581", " leading"])
    workspace.write_jsonl("val.jsonl", [*some_texts(5, seed=1), "  x", ""])
    manifest = workspace.run(train_glob="train.jsonl", val_glob="val.jsonl")
    assert manifest["train"]["changed_documents"] == 1
    assert manifest["train"]["source_bytes"] - manifest["train"]["document_bytes"] == 4
    assert (
        manifest["train"]["document_bytes"] - manifest["train"]["bytes"]
        == manifest["train"]["uncounted_leading_spaces"]
        == 1
    )
    assert manifest["val"]["uncounted_leading_spaces"] == 1
    assert manifest["val"]["empty_documents"] == 1
    assert workspace.texts("train")[-2:] == ["a b and  ", " leading"]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")), max_size=5
    )
)
def test_any_text_survives(texts: list[str]) -> None:
    processor = _PROCESSOR
    model = tokenizer.Tokenizer(b"", processor, bpb.byte_table(processor))
    for encoded, text in zip(
        encode([TextDocument(text, "it") for text in texts], model, 1), texts, strict=True
    ):
        assert encoded.text == text


_PROCESSOR = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.train(some_texts(50), 300, 1))


def test_training_repeats_and_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    assert tokenizer.train(some_texts(100), 400, 2) == tokenizer.train(some_texts(100), 400, 2)
    assert capfd.readouterr() == ("", "")


def test_the_sample_does_not_depend_on_order() -> None:
    documents = [TextDocument(text, "") for text in some_texts(60)]
    size = sum(len(document.text.encode()) for document in documents)
    forward, backward = (tokenizer.sample(order, 0.1, size // 3) for order in (documents, documents[::-1]))
    assert forward == backward
    assert size // 4 < forward.size == sum(len(text.encode()) for text in forward.texts) <= size // 3


# Bad input

Prepare = Callable[[Workspace], dict[str, Any]]


def jsonl(*lines: str) -> Prepare:
    def prepare(workspace: Workspace) -> dict[str, Any]:
        (workspace.root / "text" / "a.jsonl").write_text(
            "\n".join([json.dumps({"text": "a good line"}), *lines]) + "\n"
        )
        return {}

    return prepare


def raw_file(name: str, content: bytes) -> Prepare:
    def prepare(workspace: Workspace) -> dict[str, Any]:
        (workspace.root / "text" / name).write_bytes(content)
        return {"train_glob": name}

    return prepare


def shard_set(damage: Callable[[Path], None]) -> Prepare:
    """A sound set of shards, of which `damage` spoils the first train shard."""

    def prepare(workspace: Workspace) -> dict[str, Any]:
        model = tokenizer.train(some_texts(100), 400, 1)
        (workspace.root / "tokenizer" / "own.model").write_bytes(model)
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        for seed, side in enumerate(("train", "val")):
            ids = [token for text in some_texts(5, seed) for token in [1, *processor.encode(text)]]
            shards.write(workspace.root / "shards" / f"{side}_0.bin", np.array(ids, dtype=np.uint16))
        damage(workspace.root / "shards" / "train_0.bin")
        return {"source": "shards", "train_glob": "train_*", "val_glob": "val_*", "tokenizer": "own.model"}

    return prepare


def set_word(word: int, value: int) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[4 * word : 4 * word + 4] = value.to_bytes(4, "little")
        path.write_bytes(content)

    return damage


def set_token(position: int, value: int) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        content = bytearray(path.read_bytes())
        start = shards.HEADER_BYTES + 2 * position
        content[start : start + 2] = value.to_bytes(2, "little")
        path.write_bytes(content)

    return damage


def append_val(path: Path) -> None:
    val = shards.view(path.with_name("val_0.bin"))
    document = list(shards.documents(np.array(val), 1))[2]
    shards.write(path, np.concatenate([shards.view(path), document]))


def given_model(**options: Any) -> Prepare:
    """A tokenizer trained with `options` laid over ours."""

    def prepare(workspace: Workspace) -> dict[str, Any]:
        workspace.write_jsonl("a.jsonl", [*some_texts(100), "    indented\n        twice"])
        with (workspace.root / "tokenizer" / "given.model").open("wb") as file:
            ours: dict[str, Any] = {
                "sentence_iterator": iter(some_texts(200)),
                "model_writer": file,
                "model_type": "bpe",
                "vocab_size": 400,
                "byte_fallback": True,
                "normalization_rule_name": "identity",
                "remove_extra_whitespaces": False,
                "add_dummy_prefix": False,
                "minloglevel": 2,
            }
            sentencepiece.SentencePieceTrainer.train(**ours | options)
        return {"tokenizer": "given.model"}

    return prepare


def given_model_of_its_size(**options: Any) -> Prepare:
    """The same, and the parameter set to whatever size came out, so that the size is not what is wrong."""

    def prepare(workspace: Workspace) -> dict[str, Any]:
        random = np.random.default_rng(0)
        words = ["".join(random.choice(list("abcdefghij"), size=5)) for _ in range(500)]
        changes = given_model(**{"sentence_iterator": iter(words)} | options)(workspace)
        return changes | {
            "vocab_size": bpb.load_tokenizer(workspace.root / "tokenizer" / "given.model").vocab_size()
        }

    return prepare


def corrupt_model(workspace: Workspace) -> dict[str, Any]:
    workspace.write_jsonl("a.jsonl", some_texts(20))
    (workspace.root / "tokenizer" / "given.model").write_bytes(b"not a model")
    return {"tokenizer": "given.model"}


def val_in_train(workspace: Workspace) -> dict[str, Any]:
    texts = some_texts(40)
    workspace.write_jsonl("train.jsonl", texts)
    workspace.write_jsonl("val.jsonl", [*some_texts(5, seed=1), texts[17].upper()])
    return {"train_glob": "train.jsonl", "val_glob": "val.jsonl"}


def with_texts(**changes: Any) -> Prepare:
    def prepare(workspace: Workspace) -> dict[str, Any]:
        workspace.write_jsonl("a.jsonl", some_texts(30))
        return changes

    return prepare


def lock(content: str) -> Prepare:
    def prepare(workspace: Workspace) -> dict[str, Any]:
        workspace.lock.write_text(content)
        return {"source": "pydocs"}

    return prepare


GOOD_LINE = json.dumps({"text": "a good line"}).encode() + b"\n"
BAD_INPUT: dict[str, tuple[Prepare, str]] = {
    "missing source": (
        with_texts(train_glob="other*.jsonl"),
        r"tokenize.train_glob: no file in .*text matches 'other\*.jsonl'",
    ),
    "missing val": (with_texts(val_glob="val*.jsonl"), "tokenize.val_glob: no file"),
    "empty file": (raw_file("a.jsonl", b""), "a.jsonl is empty"),
    "file without documents": (raw_file("a.jsonl", b"\n \n"), "a.jsonl holds no documents"),
    "unknown suffix": (raw_file("a.csv", b"x"), "a.csv: unknown kind of file"),
    "truncated gz": (
        raw_file("a.jsonl.gz", gzip.compress(GOOD_LINE * 99)[:-9]),
        r"a.jsonl.gz, after document \d+: truncated or damaged",
    ),
    "damaged gz": (raw_file("a.jsonl.gz", b"not gzip"), "a.jsonl.gz, after document 0: truncated or damaged"),
    "truncated xz": (
        raw_file("a.txt.xz", lzma.compress(b"x" * 999)[:-9]),
        "a.txt.xz, after document 0: truncated or damaged",
    ),
    "damaged xz": (
        raw_file("a.jsonl.xz", b"not xz at all"),
        "a.jsonl.xz, after document 0: truncated or damaged",
    ),
    "not UTF-8": (raw_file("a.jsonl", GOOD_LINE + b'{"text": "\xff"}\n'), "a.jsonl, line 2: not UTF-8"),
    "text not UTF-8": (raw_file("a.txt", b"abc\xff"), "a.txt: not UTF-8: invalid start byte at byte 3"),
    "not JSON": (jsonl("{"), "a.jsonl, line 2: not JSON"),
    "deeply nested JSON": (jsonl("[" * 100_000), "a.jsonl, line 2: not JSON"),
    "not an object": (jsonl('["text"]'), "a.jsonl, line 2: saw a JSON list"),
    "no text key": (
        jsonl('{"body": "x"}'),
        "a.jsonl, line 2: no key 'text' .tokenize.text_key.; it has 'body'",
    ),
    "text not a string": (jsonl('{"text": 7}'), "a.jsonl, line 2: key 'text' holds int"),
    "unpaired surrogate": (
        jsonl('{"text": "ab\\ud800"}'),
        r"a.jsonl, line 2: unpaired surrogate \\ud800 at character 2",
    ),
    "long document": (
        jsonl(json.dumps({"text": "x" * 100_001})),
        "a.jsonl, line 2: 100001 bytes, a document above tokenize.max_document_bytes",
    ),
    "endless line": (
        jsonl(json.dumps({"text": "x" * 3_000_000})),
        "a.jsonl, line 2: .* a document above tokenize.max_document_bytes",
    ),
    "long text file": (
        raw_file("a.txt", b"x" * 100_001),
        "a.txt: document above tokenize.max_document_bytes",
    ),
    "document larger than a shard": (
        with_texts(shard_tokens=20),
        "line 1: .* tokens do not fit a shard of tokenize.shard_tokens",
    ),
    "empty val": (with_texts(val_fraction=1.0e-9), "no document is on the side of val"),
    "empty train": (with_texts(val_fraction=0.999999999), "no train documents to train the tokenizer on"),
    "vocabulary too large": (
        with_texts(vocab_size=50_000),
        "too little text for 50000 pieces; set tokenize.vocab_size and model.vocab_size to at most [0-9]+",
    ),
    "vocabulary below the characters of the corpus": (
        with_texts(vocab_size=262),
        "262 pieces are too few for the different characters of the text; .* to at least [0-9]+",
    ),
    "val document in train": (
        val_in_train,
        "train.jsonl, line 18: this train document is a val document .*val.jsonl, line 6",
    ),
    "same file on both sides": (with_texts(val_glob="a.jsonl"), "a.jsonl matches both"),
    "shard with wrong magic": (shard_set(set_word(0, 7)), "train_0.bin: magic number 7"),
    "shard with wrong version": (shard_set(set_word(1, 7)), "train_0.bin: shard version 7"),
    "shard with wrong length": (shard_set(set_word(2, 7)), "train_0.bin: .* bytes, expected"),
    "shard with an unknown id": (
        shard_set(set_token(9, 400)),
        "train_0.bin: token id 400 at position 9, but the vocabulary has 400",
    ),
    "shard without BOS": (shard_set(set_token(0, 300)), "train_0.bin: the first token is 300, expected BOS"),
    "val document in train shards": (
        shard_set(append_val),
        "a val document is in train: the one at token .* of train/train_000000.bin",
    ),
    "tokenizer missing": (with_texts(tokenizer="none.model"), "none.model does not exist"),
    "tokenizer damaged": (corrupt_model, "given.model is not a SentencePiece model"),
    "tokenizer without byte fallback": (
        given_model_of_its_size(byte_fallback=False),
        "given.model: the tokenizer has 0 byte-fallback pieces",
    ),
    "tokenizer without the space piece": (
        given_model_of_its_size(),
        "given.model: the tokenizer has no piece for a lone space",
    ),
    "tokenizer without BOS": (given_model(bos_id=-1), "given.model: the tokenizer has no BOS"),
    "tokenizer of another size": (
        given_model(vocab_size=390),
        "given.model has 390 ids, but tokenize.vocab_size is 400",
    ),
    "tokenizer that the rule miscounts": (
        given_model(allow_whitespace_only_pieces=True),
        r"a.jsonl, line \d+: \d+ bytes counted for .* first at piece",
    ),
    "package not pinned": (lock("numpy==1\n"), "requirements.lock does not pin torch"),
    "package of another version": (
        lock("torch==1.0\nnumpy==1\n"),
        "torch .* is installed, but .*requirements.lock pins 1.0",
    ),
    "no lock file": (lambda _: {"source": "pydocs"}, "requirements.lock does not exist"),
    "negative size": (with_texts(shard_tokens=-1), "tokenize.shard_tokens: -1 is not above zero"),
    "unknown source": (with_texts(source="web"), "tokenize.source: saw 'web'"),
    "glob that leaves the folder": (
        with_texts(train_glob="../*"),
        "tokenize.train_glob: .* leaves the folder",
    ),
    "number as a string": (with_texts(val_fraction="1e-4"), "tokenize.val_fraction: saw the string '1e-4'"),
    "unknown key": (with_texts(colour=1), "tokenize.colour: unknown key"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_and_nothing_written(
    case: str, workspace: Workspace, capfd: pytest.CaptureFixture[str]
) -> None:
    prepare, message = BAD_INPUT[case]
    changes = prepare(workspace)
    with pytest.raises(SystemExit) as stopped:
        workspace.run(**changes)
    assert stopped.value.code == 2
    stderr = capfd.readouterr().err
    assert stderr.count("\n") == 1
    assert stderr.startswith("error: tokenize: ")
    assert re.search(message, stderr), stderr
    assert not workspace.output.exists() or list(workspace.output.iterdir()) == []


def test_text_for_no_vocabulary_at_all_names_no_size() -> None:
    """The largest size that SentencePiece offers is below the smallest allowed one."""
    with pytest.raises(ValueError, match=r"too little text for 300 pieces; give more text$"):
        tokenizer.train(["a"], 300, 1)
