"""The repository's text: no class name twice, true references, plain docstrings, paragraphs.

Each check of tests/style_checks.py is applied to every package, where a failing test lists the
offenders by file and line, and is shown to catch a planted offence.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import style_checks
from tests.style_checks import Passage, Repository

ROOT = Path(__file__).resolve().parent.parent
STAGES = sorted(f"stages/{path.parent.name}" for path in (ROOT / "stages").glob("*/__init__.py"))
PACKAGES = [*STAGES, "tools", "tests", "benchmarks", "experiments", "examples"]
# The month's log is not among the documents: it names the files of its day.
DOCUMENT_FOLDERS = (
    "",
    "docs",
    "records",
    "benchmarks",
    "experiments",
    "data/shards",
    "data/text",
    "data/tokenizer",
)
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix() for folder in DOCUMENT_FOLDERS for path in (ROOT / folder).glob("*.md")
)
SETTINGS = ["params.yaml", "dvc.yaml", "data/leaderboard.yaml"]
SETTINGS += [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "presets").glob("*.yaml"))]
# Files that the text names and that are elsewhere: in the folder of the shipped program, in
# Python's own machinery, and in the pull request of defect D26.
ELSEWHERE = ("data/train", "data/val", "data/tokenizer.model", "sitecustomize.py", "lossless_caps.py")

each_package = pytest.mark.parametrize("package", PACKAGES)


@functools.cache
def sources(package: str) -> dict[str, str]:
    """The text of each Python file of a package, by path."""
    paths = sorted((ROOT / package).rglob("*.py"))
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths}


def offenders(package: str, check: Callable[[str], list[str]]) -> list[str]:
    """The offences in the files of a package, each with its file."""
    found = []
    for path, source in sources(package).items():
        found += [f"{path}:{offence}" for offence in check(source)]
    return found


@functools.cache
def repository() -> Repository:
    """The repository as it is after a run."""
    stages: dict[str, Any] = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    outputs = list(ELSEWHERE)
    for stage in stages.values():
        for kind in ("outs", "metrics", "plots"):
            for output in stage.get(kind, []):
                outputs.append(next(iter(output)) if isinstance(output, dict) else output)
    parameters = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    return Repository(ROOT, outputs, parameters)


def passages(place: str) -> list[tuple[str, Passage]]:
    """The prose of a package, a document or a file of settings, each passage with its file."""
    readers = {".md": style_checks.markdown_prose, ".yaml": style_checks.yaml_prose}
    reader = readers.get(Path(place).suffix)
    if reader is not None:
        return [(place, passage) for passage in reader((ROOT / place).read_text(encoding="utf-8"))]
    found = []
    for path, source in sources(place).items():
        found += [(path, passage) for passage in style_checks.prose(source)]
    return found


@pytest.mark.parametrize("place", [*PACKAGES, *DOCUMENTS, *SETTINGS])
def test_every_path_parameter_and_defect_that_is_named_exists(place: str) -> None:
    found = []
    for path, passage in passages(place):
        found += [f"{path}:{passage.line}: {name}" for name in repository().missing(passage.text)]
    assert found == []


@pytest.mark.parametrize(
    "text",
    [
        "see stages/pack/no_such_module.py",
        "(no_such_module.py)",
        "`stages/{pack,no_such_stage}/params.py`",
        "`docs/no_such_page.md`.",
        "the folder tests/no_such_folder/",
        "run `python -m tools.no_such_tool --help`",
        "stages.pack.artifact.no_such_function",
        "as `pack.no_such_key` says",
        "ttt_eval.lora.no_such_key: 3",
        "found in D99",
        "(D20z)",
        "held by test_that_is_not_there",
    ],
)
def test_a_made_up_reference_is_found(text: str) -> None:
    assert len(repository().missing(text)) == 1


@pytest.mark.parametrize(
    "text",
    [
        "stages/pack/artifact.py, tests/zoo/ and docs/defects.md.",
        "`stages/{pack,train}/params.py`, stages/<stage>/params.py, `stages/NAME/params.py`, presets/*.yaml",
        "pack/artifact.py, or artifact.py",
        "artifacts/pack/model.bin",
        "stages.pack.artifact and stages.pack.artifact.pack",
        "`pack.states`, ttt_eval.lora.rank, train.log, pack.py, model.bin",
        "model.logits(tokens) and train/loss.tsv",
        "D20c and D1; cosets D0 to D3; #D99, 3D99",
        "https://example.org/stages/x.py and ~/tools/y.py",
        "test_one_word_for_a_stage in tests/test_dag.py",
    ],
)
def test_true_references_and_other_words_are_no_offence(text: str) -> None:
    assert repository().missing(text) == []


def test_no_class_name_is_used_twice_in_the_stages() -> None:
    """Except that the sections which a stage reads are `Params` in its params.py."""
    everything: dict[str, str] = {}
    for stage in STAGES:
        everything |= sources(stage)
    assert style_checks.repeated_classes(everything, {"Params": "params.py"}) == []


def test_a_class_name_used_twice_is_found() -> None:
    made_up = {
        "a.py": "class Row:\n    pass\n",
        "b.py": "def f():\n    class Row: ...\n",
        "c.py": "class Other: ...\nclass Params: ...\n",
        "x/params.py": "class Params: ...\n",
        "y/params.py": "class Params: ...\n",
    }
    found = style_checks.repeated_classes(made_up, {"Params": "params.py"})
    assert found == ["Params: c.py:2", "Row: a.py:1, b.py:2"]


@each_package
def test_long_functions_have_paragraphs(package: str) -> None:
    assert offenders(package, style_checks.unparagraphed) == []


def function_of(*body: str) -> str:
    """The source of a function with a signature of three lines and this body."""
    indented = [f"    {line}" if line else "" for line in body]
    return "\n".join(["def f(", "    x: int,", ") -> None:", *indented, ""])


def test_a_long_function_without_paragraphs_is_found() -> None:
    lines = [f"x = {i}" for i in range(26)]
    find = style_checks.unparagraphed
    assert find(function_of(*lines)) == ["1: f has 26 lines of code in a row"]
    assert find(function_of(*lines[:13], "", *lines[13:])) == ["1: f has 13 lines of code in a row"]
    assert find(function_of(*lines[:12], "", *lines[12:24], "# The rest.", *lines[24:])) == []
    assert find(function_of(*lines[:20])) == []  # 23 lines with the signature

    # A docstring does not count.
    assert find(function_of('"""A docstring', *([" of many lines."] * 20), '"""', *lines[:12])) == []

    # A statement of many lines counts as 12, and a blank line in a string does not count as blank.
    block = ["x = [", *(f"    {i}," for i in range(30)), "]"]
    assert find(function_of(*block)) == []
    assert find(function_of("x = 1", *block)) == ["1: f has 13 lines of code in a row"]
    string = ['x = """', *([""] * 20), '"""']
    assert find(function_of(*string, *lines[:12])) == ["1: f has 24 lines of code in a row"]


@each_package
def test_docstrings_begin_with_a_noun_or_a_verb(package: str) -> None:
    assert offenders(package, style_checks.riddles) == []


def test_a_docstring_that_begins_with_a_question_word_is_found() -> None:
    source = '"""How it works."""\ndef f():\n    """What f is."""\nclass A:\n    """Whoever reads this."""\n'
    assert style_checks.riddles(source) == ["1: How it works.", "3: What f is."]


@pytest.mark.parametrize("package", [name for name in PACKAGES if name != "tests"])
def test_no_word_is_a_literal_translation(package: str) -> None:
    assert offenders(package, style_checks.calques) == []


def test_a_literal_translation_is_found() -> None:
    source = (
        '"""This stands here."""\nx = "behind"  # so many\ny = 1  # it is no longer used, and is no error\n'
    )
    assert style_checks.calques(source) == [
        "1: stands, lies (is): stands",
        "2: so many (N): so many",
        "2: is no X (is not an X): is no error",
    ]


@pytest.mark.parametrize("package", ["tests", "benchmarks", "experiments"])
def test_no_module_imports_a_test_module(package: str) -> None:
    assert offenders(package, style_checks.imported_tests) == []


def test_an_import_of_a_test_module_is_found() -> None:
    source = (
        "from tests.test_pack import PACK\nimport tests.test_audit\nfrom tests import test_dag, factories\n"
    )
    found = style_checks.imported_tests(source)
    assert found == ["tests.test_pack.PACK", "tests.test_audit", "tests.test_dag"]
