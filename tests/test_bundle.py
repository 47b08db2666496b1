"""The bundle: what it carries, that it is always the same file, and that it runs alone."""

import ast
import base64
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import brotli
import pytest

from stages import config
from stages.bundle import carrier, entry, strip
from stages.bundle.__main__ import embedded
from stages.bundle.carrier import ENTRY
from stages.bundle.closure import closure, module_name
from stages.bundle.params import Params

ROOT = Path(__file__).resolve().parent.parent
TOY = {
    "stages/__init__.py": '"""Toy."""\n',
    "stages/bundle/__init__.py": "",
    "stages/bundle/entry.py": '''\
"""What runs."""

import inspect
import json
import linecache
import sys
import traceback

from stages import numbers
from stages.deep.er import shout  # a comment


def main(parameters):
    """Print what is seen from inside."""
    try:
        numbers.fail()
    except ZeroDivisionError:
        trace = traceback.format_exc()
    print(json.dumps({
        "empty": inspect.getsource(sys.modules["stages.deep"]),
        "source": inspect.getsource(shout),
        "line": linecache.getline(numbers.__file__, 1, vars(numbers)),
        "trace": trace,
        "file": numbers.__file__,
        "package": sys.modules["stages.deep"].__path__,
        "parameters": parameters,
        "spoken": shout("caf\\u00e9"),
        "arguments": sys.argv[1:],
    }))
''',
    "stages/numbers.py": "import math\n\n\ndef fail():\n    '''Documented.'''\n    return math.pi / 0\n",
    "stages/deep/__init__.py": "# only a comment\n",
    "stages/deep/er.py": """\
from ..numbers import fail as _fail


def shout(word):
    # upper case
    return word.upper() + '\u00e9 # not a comment'
""",
    "stages/unused.py": "raise RuntimeError('nobody asked for this')\n",
}


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    for name, text in TOY.items():
        (tmp_path / "toy" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "toy" / name).write_text(text, encoding="utf-8")
    return tmp_path / "toy"


def build(root: Path) -> str:
    return carrier.render(carrier.sources(root), {"a": [1.5, None, "caf\u00e9"]}, 11)


def run_alone(text: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The bundle as the challenge runs it: an isolated interpreter, a folder with nothing else in it."""
    folder.mkdir()
    (folder / "train_gpt.py").write_text(text, encoding="utf-8")
    command = [sys.executable, "-I", str(folder / "train_gpt.py"), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env={"PATH": "/nowhere"}, check=False)


def run_bundle(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "stages.bundle", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=os.environ | environment, check=False)


# --- what is carried


def test_the_closure_holds_what_is_imported_and_the_packages_above(toy: Path) -> None:
    assert {path.as_posix() for path in closure(toy, ENTRY)} == set(TOY) - {"stages/unused.py"}


def test_the_closure_counts_imports_inside_functions_and_names_what_is_missing(toy: Path) -> None:
    (toy / "stages/numbers.py").write_text("def f():\n    from stages import unused\n")
    assert Path("stages/unused.py") in closure(toy, ENTRY)
    (toy / "stages/numbers.py").write_text("import stages.gone\n")
    with pytest.raises(ValueError, match=r"numbers\.py imports stages\.gone, which does not exist"):
        closure(toy, ENTRY)


def test_the_closure_agrees_with_what_python_loads() -> None:
    names = {module_name(path) for path in closure(ROOT, ENTRY)}
    program = f"import sys, {ENTRY}; print(*(name for name in sys.modules if name.partition('.')[0] == 'stages'))"
    loaded = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert set(loaded) <= names
    for stranger in ("stages.tokenize", "stages.audit", "stages.submission", "stages.bundle.carrier"):
        assert not any(name.startswith(stranger) for name in names)


# --- stripping


@pytest.mark.parametrize("path", sorted((ROOT / "stages").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_stripping_leaves_the_program_of_every_module(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    stripped = strip.strip(source)
    assert strip.shape(stripped) == strip.shape(source)
    assert strip.strip(stripped) == stripped
    assert not any(line.strip().startswith("#") for line in stripped.split("\n") if '"' not in stripped)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("", ""),
        ('"""Only a docstring."""\n', ""),
        ("# only a comment", ""),
        ('def f():\n    """Doc."""\n', "def f():\n    pass\n"),
        ('def f():\n    """Doc."""  # why\n    # more\n', "def f():\n    pass\n"),
        ('class A: "doc"\n', "class A: pass\n"),
        ('def f(): "doc"; return 1\n', "def f(): pass; return 1\n"),
        ('class A:\n    """Doc."""\n\n    x = 1  # one\n', "class A:\n    x = 1\n"),
        ('async def f():\n    ("a"\n     "b")\n    return """\n\n# kept\n\n"""\n', 'async def f():\n    return """\n\n# kept\n\n"""\n'),
        ('x = """\n\n"""\n\n\n', 'x = """\n\n"""\n'),
        ('x = [  # open\n\n    1,\n]\nf"""{x}\n\n# {x}"""', 'x = [\n    1,\n]\nf"""{x}\n\n# {x}"""\n'),
        ('def f():\n    "caf\u00e9"; y = "\u00e9"  # \u00e9\n', 'def f():\n    pass; y = "\u00e9"\n'),
        ('def f():\n    b"not a docstring"\n', 'def f():\n    b"not a docstring"\n'),
        ("if x:\n    y = 1 \\\n        + 2\n\n\nz = '#'\n", "if x:\n    y = 1 \\\n        + 2\nz = '#'\n"),
    ],
)
def test_stripping_examples(source: str, expected: str) -> None:
    assert strip.strip(source) == expected


# --- one source, one file


def test_the_same_source_gives_the_same_file_from_a_copied_and_untidy_tree(toy: Path, tmp_path: Path) -> None:
    first = build(toy)
    copy = tmp_path / "elsewhere" / "copy"
    shutil.copytree(toy, copy)
    (copy / "stages/bundle/train_gpt.py").write_text(first)
    (copy / "stages/bundle/notes.py").write_text("x = 1\n")
    (copy / "stages/__pycache__").mkdir()
    (copy / "stages/__pycache__/numbers.cpython-311.pyc").write_bytes(b"stale")
    for path in copy.rglob("*.py"):
        os.utime(path, (1, 1))
    assert build(copy) == first


def test_line_ends_comments_and_docstrings_change_nothing_and_code_does(toy: Path) -> None:
    first = build(toy)
    path = toy / "stages/numbers.py"
    path.write_bytes(("# a new comment\n" + TOY["stages/numbers.py"]).replace("\n", "\r\n").encode())
    assert build(toy) == first
    path.write_text(TOY["stages/numbers.py"].replace("math.pi", "math.e"))
    assert build(toy) != first


def test_the_stage_builds_one_file_whatever_happened_before(tmp_path: Path) -> None:
    """The four findings on #1858: after a run, after another seed, with its own output in the tree, from a copied tree."""
    tree = tmp_path / "tree"
    shutil.copytree(ROOT / "stages", tree / "stages", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "params.yaml", tree)
    sources = {path: path.read_bytes() for path in tree.rglob("*.py")}
    output = tree / "artifacts/bundle"
    built = []
    for seed in ("42", "999"):
        done = run_bundle("--set", f"seed={seed}", "--output", str(output), cwd=tree, SEED=seed)
        assert done.returncode == 0, done.stderr
        built.append((output / "train_gpt.py").read_bytes())
        assert json.loads((output / "metrics.json").read_text())["bytes_code"] == (output / "train_gpt.py").stat().st_size
    done = run_bundle("--params", str(tree / "params.yaml"), "--source", str(tree / "stages"), "--output", str(tmp_path / "from_here"))
    assert done.returncode == 0, done.stderr
    built.append((tmp_path / "from_here/train_gpt.py").read_bytes())
    assert built == [built[0]] * len(built)
    assert {path: path.read_bytes() for path in sources} == sources


def test_the_output_may_not_lie_in_the_source(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "stages", tmp_path / "stages", ignore=shutil.ignore_patterns("__pycache__"))
    done = run_bundle("--source", str(tmp_path / "stages"), "--output", str(tmp_path / "stages/bundle"))
    assert done.returncode == 2
    assert "lies in the source" in done.stderr
    assert not (tmp_path / "stages/bundle/train_gpt.py").exists()


# --- it runs


def test_the_bundle_runs_alone_and_shows_its_source(toy: Path, tmp_path: Path) -> None:
    done = run_alone(build(toy), tmp_path / "empty", "eval", "--x")
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["source"] == "def shout(word):\n    return word.upper() + '\u00e9 # not a comment'\n"
    assert seen["empty"] == "\n"
    assert seen["line"] == "import math\n"
    assert "return math.pi / 0" in seen["trace"]
    assert seen["file"] == str(tmp_path / "empty/train_gpt.py/stages/numbers.py")
    assert seen["package"] == [str(tmp_path / "empty/train_gpt.py/stages/deep")]
    assert seen["parameters"] == {"a": [1.5, None, "caf\u00e9"]}
    assert seen["spoken"] == "CAF\u00c9\u00e9 # not a comment"
    assert seen["arguments"] == ["eval", "--x"]


def test_the_bundle_prefers_what_it_carries_to_a_folder_beside_it(toy: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    (folder / "stages").mkdir(parents=True)
    (folder / "stages/__init__.py").write_text("raise RuntimeError('the folder was imported')\n")
    (folder / "train_gpt.py").write_text(build(toy), encoding="utf-8")
    done = subprocess.run([sys.executable, "train_gpt.py"], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_file_has_a_readable_shape(toy: Path) -> None:
    text = build(toy)
    assert max(map(len, text.split("\n"))) <= 140
    tree = ast.parse(text)
    assert ast.get_docstring(tree)
    payload = next(node for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "PAYLOAD")
    plain = brotli.decompress(base64.b85decode("".join(ast.literal_eval(payload.value).split())))
    carried, parameters = json.loads(plain)
    assert carried == carrier.sources(toy)
    assert parameters == {"a": [1.5, None, "caf\u00e9"]}
    assert len(text.split('"""\n', 3)[-1].splitlines()) <= 32


# --- what the entry does


@pytest.mark.parametrize("seed", ["x", "-1", "1.5", "", "\u0661"])
def test_a_seed_that_is_no_integer_is_an_error(seed: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("SEED", seed)
    with pytest.raises(SystemExit) as stopped:
        entry.main({})
    assert stopped.value.code == 2
    assert f"SEED is {seed!r}, expected an integer" in capsys.readouterr().err


def test_training_reads_no_validation_data_and_scoring_no_training_data() -> None:
    assert set(entry.TRAIN.reads) == {"train"}
    assert set(entry.EVAL.reads) == {"model", "val", "tokenizer"}


def test_the_bundle_carries_every_parameter_that_runs_and_no_seed() -> None:
    params = config.build(config.read(ROOT / "params.yaml"), Params)
    carried = embedded(params)
    assert "seed" not in carried
    assert carried["submission"] == {"scorer": params.submission.scorer}
    built = config.build(json.loads(json.dumps(carried)) | {"seed": 7}, entry.Params)
    assert (built.model, built.train, built.pack, built.ttt_eval) == (params.model, params.train, params.pack, params.ttt_eval)


def test_an_error_of_the_bundle_is_one_line(tmp_path: Path) -> None:
    params = config.build(config.read(ROOT / "params.yaml"), Params)
    done = run_alone(carrier.render(carrier.sources(ROOT), embedded(params), 5), tmp_path / "empty", "eval")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: train_gpt: model.bin does not exist: check the path\n"
    assert sorted(path.name for path in (tmp_path / "empty").rglob("*")) == ["eval", "train_gpt.py"]
