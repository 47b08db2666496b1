"""The bundle: what it carries, that it is always the same file, and that it runs alone."""

import ast
import builtins
import dis
import inspect
import json
import os
import runpy
import shutil
import subprocess
import symtable
import sys
import tokenize
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import brotli
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from stages.bundle import (
    importer_template,
    latin1_literal,
    minify_whitespace,
    shorten_locals,
    strip,
    strip_ast,
)
from stages.bundle.closure import import_closure, module_name
from stages.bundle.importer_template import ENTRY
from stages.bundle.params import Params
from stages.bundle.program import cli as verbs
from stages.bundle.program import entry
from stages.bundle.stage import STAGE, embedded_parameters, main
from stages.common import config
from stages.common.stage import launch

ROOT = Path(__file__).resolve().parent.parent
TOY = {
    "stages/__init__.py": '"""Toy."""\n',
    "stages/bundle/__init__.py": "",
    "stages/bundle/program/__init__.py": "",
    "stages/bundle/program/entry.py": '''\
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


def build(root: Path) -> bytes:
    return importer_template.render_bundle(
        importer_template.collect_sources(root), {"a": [1.5, None, "caf\u00e9"]}, 11
    )


def run_alone(file: bytes, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The bundle as the challenge runs it: an isolated interpreter, a folder with nothing else in it."""
    folder.mkdir()
    (folder / "train_gpt.py").write_bytes(file)
    command = [sys.executable, "-I", str(folder / "train_gpt.py"), *arguments]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env={"PATH": "/nowhere"}, check=False
    )


def run_bundle(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "stages.bundle", *arguments]
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, env=os.environ | environment, check=False
    )


# --- what is carried


def test_the_closure_holds_what_is_imported_and_the_packages_above(toy: Path) -> None:
    assert {path.as_posix() for path in import_closure(toy, ENTRY)} == set(TOY) - {"stages/unused.py"}


def test_the_closure_counts_imports_inside_functions_and_names_what_is_missing(toy: Path) -> None:
    (toy / "stages/numbers.py").write_text("def f():\n    from stages import unused\n")
    assert Path("stages/unused.py") in import_closure(toy, ENTRY)
    (toy / "stages/numbers.py").write_text("import stages.gone\n")
    with pytest.raises(ValueError, match=r"numbers\.py imports stages\.gone, which does not exist"):
        import_closure(toy, ENTRY)


def test_the_closure_agrees_with_what_python_loads() -> None:
    names = {module_name(path) for path in import_closure(ROOT, ENTRY)}
    program = (
        f"import sys, {ENTRY}; print(*(name for name in sys.modules if name.partition('.')[0] == 'stages'))"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert set(loaded) <= names
    for other in (
        "stages.tokenize",
        "stages.audit",
        "stages.submission",
        "stages.bundle.importer_template",
    ):
        assert not any(name.startswith(other) for name in names)


# --- stripping

MODULES = sorted((ROOT / "stages").rglob("*.py"))
each_module = pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))


def read_at_run_time(source: str) -> Iterator[str]:
    """The annotations that code may read: in the body of a class, and of decorated functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            yield from (
                ast.dump(statement) for statement in node.body if isinstance(statement, ast.AnnAssign)
            )
        if isinstance(node, ast.FunctionDef) and node.decorator_list:
            yield ast.dump(node.args) + (ast.dump(node.returns) if node.returns else "")


def unbound(source: str) -> set[str]:
    """Names that the module or its functions read as globals and that nothing binds."""
    top = symtable.symtable(source, "module", "exec")
    bound = {
        symbol.get_name() for symbol in top.get_symbols() if symbol.is_assigned() or symbol.is_imported()
    }

    def free(table: symtable.SymbolTable) -> Iterator[str]:
        outermost = table.get_type() == "module"
        yield from (
            s.get_name() for s in table.get_symbols() if s.is_referenced() and (s.is_global() or outermost)
        )
        for child in table.get_children():
            yield from free(child)

    return set(free(top)) - bound - set(dir(builtins)) - {"__file__"}


@each_module
def test_stripping_leaves_the_program_of_every_module(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    stripped = strip.strip(source)
    assert strip.syntax_tree_text(stripped) == strip.syntax_tree_text(source)
    assert strip.strip(stripped) == stripped
    assert not [
        token
        for token in tokenize.generate_tokens(iter(stripped.splitlines(True)).__next__)
        if token.type == tokenize.COMMENT
    ]
    assert list(read_at_run_time(stripped)) == list(read_at_run_time(source))
    assert unbound(stripped) == unbound(source) == set()


@each_module
def test_layout_alone_leaves_the_tree_of_every_module(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert ast.dump(ast.parse(minify_whitespace.minify_whitespace(source))) == ast.dump(ast.parse(source))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("", ""),
        ('"""Only a docstring."""\n', ""),
        ("# only a comment", ""),
        ('def f():\n    """Doc."""\n', "def f():\n pass\n"),
        ('def f():\n    """Doc."""  # why\n    # more\n', "def f():\n pass\n"),
        ('class A: "doc"\n', "class A:pass\n"),
        ('def f(): "doc"; return 1\n', "def f():pass;return 1\n"),
        ('class A:\n    """Doc."""\n\n    x = 1  # one\n', "class A:\n x=1\n"),
        (
            'async def f():\n    ("a"\n     "b")\n    return """\n\n# kept\n\n"""\n',
            'async def f():\n return"""\n\n# kept\n\n"""\n',
        ),
        ('x = """\n\n"""\n\n\n', 'x="""\n\n"""\n'),
        ('x = [  # open\n\n    1,\n]\nf"""{x}\n\n    # {x}"""', 'x=[1,]\nf"""{x}\n\n    # {x}"""\n'),
        ('x = f"""{\n    1\n}  # {f"{2}"} {{"""  # c\n', 'x=f"""{\n    1\n}  # {f"{2}"} {{"""\n'),
        ('def f():\n    "caf\u00e9"; y = "\u00e9"  # \u00e9\n', 'def f():\n pass;y="\u00e9"\n'),
        ('def f():\n    b"not a docstring"\n', 'def f():\n b"not a docstring"\n'),
        ("if x:\n    y = 1 \\\n        + 2\n\n\nz = '#'\n", "if x:\n y=1+2\nz='#'\n"),
        (
            "if x:\n  y = f(\n    a,  # first\n\n    *b\n  )\nelse:\n      if y:\n       z = (\n    1)\n",
            "if x:\n y=f(a,*b)\nelse:\n if y:\n  z=(1)\n",
        ),
        ("x = 1 if y else 1. if z else .5 or 1 .real\n", "x=1 if y else 1. if z else.5 or 1 .real\n"),
        (
            "x = a if 'a' in b'a' else r'a' 'b' f'c' or not -a - -b\n",
            "x=a if'a'in b'a'else r'a''b'f'c'or not-a--b\n",
        ),
        (
            "x = y [1 : 2, ...] if (1) in {2 : 3} else lambda *a, ** b : (yield)\n",
            "x=y[1:2,...]if(1)in{2:3}else lambda*a,**b:(yield)\n",
        ),
        ("from . import a ; from .b import *\n", "from.import a;from.b import*\n"),
        ("\u00e9 = \u00e0 if 1_0 else 0x1f and \u00e9\n", "\u00e9=\u00e0 if 1_0 else 0x1f and \u00e9\n"),
    ],
)
def test_stripping_examples(source: str, expected: str) -> None:
    assert strip.strip(source) == expected


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (
            "def f(a: int, *b: str, c: float = 1.0, **d: A[B]) -> dict[str, int]: return a\n",
            "def f(a, *b, c = 1.0, **d): return a\n",
        ),
        (
            "def f(a: (int), b: ((int)) = 2) -> (\n    int  # c\n):\n    return a\n",
            "def f(a, b = 2):\n return a\n",
        ),
        ("def f(a, b): return lambda: 1\n", "def f(a, b): return lambda: 1\n"),
        ("caf\u00e9: '\u00e9' = '\u00e9'; b: int = (1)\n", "caf\u00e9 = '\u00e9'; b = (1)\n"),
        ("(x): int = 1\na[b:c]: int = 2\n", "(x) = 1\na[b:c] = 2\n"),
        ("def f() -> None:\n    x: int\n    x = 1\n", "def f():\n x: int\n x = 1\n"),
        (
            "class A(NamedTuple):\n    x: int = 1\n    def f(self, y: int) -> int: self.x: int = y\n",
            "class A(NamedTuple):\n x: int = 1\n def f(self, y): self.x = y\n",
        ),
        (
            "@jit\ndef f(a: constexpr) -> int:\n    def g(b: int) -> int: ...\n    c: int = 1\n",
            "@jit\ndef f(a: constexpr) -> int:\n def g(b): ...\n c = 1\n",
        ),
    ],
)
def test_annotations_that_nothing_reads_are_cut(source: str, expected: str) -> None:
    assert strip.strip(source) == minify_whitespace.minify_whitespace(expected)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from a import B\ndef f(x: B): pass\n", "def f(x): pass\n"),
        ("from a import B, C as D, E\ndef f(x: B) -> D: return E\n", "from a import E\ndef f(x): return E\n"),
        (
            "from ..a import (\n    B,\n    C as D,\n)\ndef f(x: B): return D\n",
            "from ..a import C as D\ndef f(x): return D\n",
        ),
        ("from a import B; x = 1\ndef f(x: 'B[int]'): pass\n", "pass; x = 1\ndef f(x): pass\n"),
        ("from a import B\ndef f(x: B): return 'B'\n", "from a import B\ndef f(x): return 'B'\n"),
        (
            "from a import B\nclass A:\n    x: B\n    def f(self, x: B): pass\n",
            "from a import B\nclass A:\n x: B\n def f(self, x): pass\n",
        ),
        ("from a import B\nimport c\ndef f(x: c.D): pass\n", "from a import B\nimport c\ndef f(x): pass\n"),
    ],
)
def test_an_import_goes_with_the_annotations_that_alone_used_it(source: str, expected: str) -> None:
    assert strip.strip(source) == minify_whitespace.minify_whitespace(expected)
    assert ast.dump(strip_ast.strip_tree(ast.parse(source))) == ast.dump(
        strip_ast.strip_tree(ast.parse(expected))
    )


def test_stripping_knows_no_version_of_python(tmp_path: Path) -> None:
    """Python 3.12 splits f-strings into tokens, 3.11 does not; each that is installed must strip alike."""
    odd = tmp_path / "odd.py"
    lines = 'x = f"""{\n    1 +\n    2  !r:>{9}}  # {f"{2}"}\n\n {{ \u00e9"""  # c\n'
    odd.write_text(lines + 'y = f"{x}" "z" \\\n  f"{x!r}"\n', encoding="utf-8")
    package = tmp_path / "stages/bundle"  # without the rest of stages, which needs the project's packages
    package.mkdir(parents=True)
    for name in ("strip_ast", "minify_whitespace", "strip"):
        shutil.copy(ROOT / f"stages/bundle/{name}.py", package)
    program = "import pathlib, sys; from stages.bundle.strip import strip\n"
    program += "texts = [pathlib.Path(path).read_text('utf-8') for path in sys.argv[1:]]\n"
    program += "for text in texts: sys.stdout.buffer.write(strip(text).encode())"
    seen = {}
    for name in ("python3.11", "python3.12", "python3.13"):
        if (
            shutil.which(name)
            and subprocess.run([name, "-c", ""], capture_output=True, check=False).returncode == 0
        ):
            words = [name, "-c", program, str(odd), *map(str, MODULES)]
            seen[name] = subprocess.run(words, cwd=tmp_path, capture_output=True, check=True).stdout
    if len(seen) < 2:
        pytest.skip(f"needs two versions of Python, found {', '.join(seen) or 'none'}")
    assert len(set(seen.values())) == 1


# --- bytes in a source file

AWKWARD = b"\0\r\n\\\"\x0b\x0c\x1a\x1c\x85\xa0\xff\xfe{}%#0189nxuN'ab"


def source_of(data: bytes) -> bytes:
    return (
        b"# coding: latin-1\nDATA = " + latin1_literal.quote(data).encode("latin-1") + b'.encode("latin-1")\n'
    )


@given(data=st.one_of(st.binary(max_size=300), st.lists(st.sampled_from(AWKWARD), max_size=40).map(bytes)))
@example(data=b'"')
@example(data=b'""""')
@example(data=b'\\"')
@example(data=b"\0" + b"1")
@example(data=b"\r\n")
def test_any_bytes_come_back_from_a_literal(data: bytes) -> None:
    scope: dict[str, bytes] = {}
    exec(compile(source_of(data), "literal", "exec", dont_inherit=True), scope)
    assert scope["DATA"] == data


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("literal")


@given(data=st.one_of(st.binary(max_size=300), st.lists(st.sampled_from(AWKWARD), max_size=40).map(bytes)))
def test_any_bytes_come_back_from_a_file(data: bytes, folder: Path) -> None:
    file = folder / "literal.py"
    file.write_bytes(source_of(data))
    assert runpy.run_path(str(file))["DATA"] == data
    with tokenize.open(file) as text:  # as linecache and inspect read it
        assert text.read().encode("latin-1") == source_of(data)


def test_python_s_own_reader_of_files_gives_every_pair_of_bytes_back(tmp_path: Path) -> None:
    """It reads by line and by its own rules; a pair holds whatever an escape can run into."""
    data = bytes(byte for first in range(256) for second in range(256) for byte in (first, second))
    data += bytes(byte for a in AWKWARD for b in AWKWARD for c in AWKWARD for byte in (a, b, c))
    (tmp_path / "pairs.py").write_bytes(source_of(data) + b"import sys; sys.stdout.buffer.write(DATA)\n")
    for isolated in ("-I", "-Werror"):
        done = subprocess.run(
            [sys.executable, isolated, str(tmp_path / "pairs.py")], capture_output=True, check=True
        )
        assert done.stdout == data
        assert done.stderr == b""


def test_a_literal_takes_little_more_than_its_bytes() -> None:
    data = os.urandom(50_000)
    assert len(latin1_literal.quote(data)) < 1.02 * len(data)


# --- one source, one file


def test_the_same_source_gives_the_same_file_from_a_copied_and_untidy_tree(toy: Path, tmp_path: Path) -> None:
    first = build(toy)
    copy = tmp_path / "elsewhere" / "copy"
    shutil.copytree(toy, copy)
    (copy / "stages/bundle/train_gpt.py").write_bytes(first)
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
    """The four findings on #1858.

    One file after a run, after another seed, with its own output in the tree, and from a copied tree.
    """
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
        metrics = json.loads((output / "metrics.json").read_text())
        assert metrics["bytes_code"] == (output / "train_gpt.py").stat().st_size

    # Another tree's bundle, from the interpreter of this one.
    options = ["--params", str(tree / "params.yaml"), "--source", str(tree / "stages")]
    done = run_bundle(*options, "--output", str(tmp_path / "from_here"))
    assert done.returncode == 0, done.stderr
    built.append((tmp_path / "from_here/train_gpt.py").read_bytes())

    assert built == [built[0]] * len(built)
    assert {path: path.read_bytes() for path in sources} == sources


def test_the_output_may_not_lie_in_the_source(
    toy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stopped:
        launch(STAGE, main, ["--source", str(toy / "stages"), "--output", str(toy / "stages/bundle")])
    assert stopped.value.code == 2
    assert "is inside the source" in capsys.readouterr().err
    assert not (toy / "stages/bundle/train_gpt.py").exists()


# --- it runs


def test_the_bundle_runs_alone_and_shows_its_source(toy: Path, tmp_path: Path) -> None:
    done = run_alone(build(toy), tmp_path / "empty", "eval", "--x")
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["source"] == "def shout(word):\n return word.upper()+'\u00e9 # not a comment'\n"
    assert seen["empty"] == "\n"
    assert seen["line"] == "import math\n"
    assert "return math.pi/0" in seen["trace"]
    assert seen["file"] == str(tmp_path / "empty/train_gpt.py/stages/numbers.py")
    assert seen["package"] == [str(tmp_path / "empty/train_gpt.py/stages/deep")]
    assert seen["parameters"] == {"a": [1.5, None, "caf\u00e9"]}
    assert seen["spoken"] == "CAF\u00c9\u00e9 # not a comment"
    assert seen["arguments"] == ["eval", "--x"]


def test_the_bundle_prefers_what_it_carries_to_a_folder_beside_it(toy: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    (folder / "stages").mkdir(parents=True)
    (folder / "stages/__init__.py").write_text("raise RuntimeError('the folder was imported')\n")
    (folder / "train_gpt.py").write_bytes(build(toy))
    done = subprocess.run(
        [sys.executable, "train_gpt.py"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_all_but_the_payload_is_readable(toy: Path) -> None:
    file = build(toy)
    tree = ast.parse(file)
    payload = next(
        node
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "PAYLOAD"
    )
    packed = ast.literal_eval(payload.value)
    before, after = file.decode("latin-1").split(latin1_literal.quote(packed.encode("latin-1")))
    assert (before + after).isascii()
    assert max(map(len, (before + after).split("\n"))) <= 140
    assert ast.get_docstring(tree)
    assert len(after.splitlines()) <= 32
    parameters, *carried = brotli.decompress(packed.encode("latin-1")).decode("utf-8").split("\0")
    assert dict(zip(carried[::2], carried[1::2], strict=True)) == importer_template.collect_sources(toy)
    assert json.loads(parameters) == {"a": [1.5, None, "caf\u00e9"]}


def test_readers_of_python_find_the_lines_of_the_file_itself(toy: Path, tmp_path: Path) -> None:
    (tmp_path / "train_gpt.py").write_bytes(build(toy))
    program = "import inspect, train_gpt; print(inspect.getsource(train_gpt.SourceImporter));"
    program += " print(train_gpt.SOURCES['stages/deep/er.py'])"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("class SourceImporter(")
    assert "def get_source(self, name):\n        return SOURCES[self.path(name)]\n\n" in done.stdout
    assert "from..numbers import fail as _fail\ndef shout(word):\n" in done.stdout


RANK = """
import inspect
import sys

import torch
import torch.distributed as dist

from stages.deep.er import shout

def main(parameters):
    dist.init_process_group("gloo")
    total = torch.tensor(dist.get_rank() + 1.0)
    dist.all_reduce(total)
    if dist.get_rank() == 0:
        print(total.item(), dist.get_world_size(), inspect.getsource(shout).splitlines()[0], sys.argv[1:])
    dist.destroy_process_group()
"""


def test_torchrun_runs_the_bundle_on_two_processes(toy: Path, tmp_path: Path) -> None:
    (toy / "stages/bundle/program/entry.py").write_text(RANK)
    (tmp_path / "train_gpt.py").write_bytes(build(toy))
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "train_gpt.py", "eval"]
    done = subprocess.run(
        [sys.executable, *words], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "3.0 2 def shout(word): ['eval']\n"


# --- what the entry does


@pytest.mark.parametrize("seed", ["x", "-1", "1.5", "", "\u0661"])
def test_a_seed_that_is_no_integer_is_an_error(
    seed: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SEED", seed)
    with pytest.raises(SystemExit) as stopped:
        entry.main({})
    assert stopped.value.code == 2
    assert f"SEED is {seed!r}, expected an integer" in capsys.readouterr().err


def test_training_reads_no_validation_data_and_scoring_no_training_data() -> None:
    assert set(verbs.TRAIN.reads) == {"train"}
    assert set(verbs.EVAL.reads) == {"model", "val", "tokenizer"}


def test_the_bundle_carries_every_parameter_that_runs_and_no_seed() -> None:
    params = config.build(config.read_parameters(ROOT / "params.yaml"), Params)
    carried = embedded_parameters(params)
    assert "seed" not in carried
    assert carried["scorer"] == params.scorer
    built = config.build(json.loads(json.dumps(carried)) | {"seed": 7}, verbs.EmbeddedParams)
    assert (built.model, built.train, built.pack, built.ttt_eval) == (
        params.model,
        params.train,
        params.pack,
        params.ttt_eval,
    )


def test_an_error_of_the_bundle_is_one_line(tmp_path: Path) -> None:
    params = config.build(config.read_parameters(ROOT / "params.yaml"), Params)
    done = run_alone(
        importer_template.render_bundle(
            importer_template.collect_sources(ROOT), embedded_parameters(params), 5
        ),
        tmp_path / "empty",
        "eval",
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: train_gpt: model.bin does not exist: check the path\n"
    assert sorted(path.name for path in (tmp_path / "empty").rglob("*")) == ["eval", "train_gpt.py"]


VARIABLES = {"LOAD_FAST", "STORE_FAST", "DELETE_FAST", "LOAD_DEREF", "STORE_DEREF", "DELETE_DEREF"}
VARIABLES |= {"LOAD_FAST_CHECK", "LOAD_FAST_AND_CLEAR", "LOAD_CLASSDEREF"}
CELLS = {"MAKE_CELL", "COPY_FREE_VARS", "LOAD_CLOSURE"}  # in the alphabetical order of the names


def without_names(code: types.CodeType, variables: list[str]) -> list[Any]:
    """The bytecode with constants and the functions in it; appends its variables to `variables`."""
    counts = (code.co_argcount, code.co_nlocals, len(code.co_cellvars), len(code.co_freevars))
    found: list[Any] = [code.co_name, code.co_names, code.co_varnames[: code.co_argcount], counts]
    for instruction in dis.get_instructions(code):
        value = instruction.argval
        if instruction.opname in CELLS:
            continue
        if isinstance(value, types.CodeType):
            value = without_names(value, variables)
        elif instruction.opname in VARIABLES:
            variables.append(value)
            value = "variable"
        found.append((instruction.opname, value))
    return found


def outermost_functions(code: types.CodeType) -> Iterator[types.CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            if constant.co_flags & inspect.CO_OPTIMIZED:
                yield constant
            else:
                yield from outermost_functions(constant)  # a class body


def same_but_for_names(one: str, other: str) -> bool:
    """True if two programs differ by one-to-one renamings of variables within outermost functions."""
    codes = [compile(source, "", "exec") for source in (one, other)]
    if without_names(codes[0], []) != without_names(codes[1], []):
        return False
    for pair in zip(*(outermost_functions(code) for code in codes), strict=True):
        variables: tuple[list[str], list[str]] = ([], [])
        for code, names in zip(pair, variables, strict=True):
            without_names(code, names)
        pairs = set(zip(*variables, strict=True))
        if not len(pairs) == len({old for old, _ in pairs}) == len({new for _, new in pairs}):
            return False
    return True


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("def f():\n first=1\n second=2\n return first-second", "def f():\n b=1\n a=2\n return b-a", True),
        ("def f():\n first=1\n second=2\n return first-second", "def f():\n a=1\n a=2\n return a-a", False),
        ("def f():\n first=1\n second=2\n return first-second", "def f():\n a=1\n b=2\n return b-a", False),
        ("def f():\n y=1;x=2\n return lambda:y-x", "def f():\n a=1;b=2\n return lambda:a-b", True),
        ("def f():\n y=1;x=2\n return lambda:y-x", "def f():\n a=1;b=2\n return lambda:b-a", False),
        ("def f():\n x=1\n return x", "def f():\n x=2\n return x", False),
    ],
)
def test_programs_are_compared_but_for_names(one: str, other: str, same: bool) -> None:
    assert same_but_for_names(one, other) is same


@each_module
def test_short_names_of_variables_leave_the_bytecode_of_every_module(path: Path) -> None:
    stripped = strip.strip(path.read_text(encoding="utf-8"))
    shortened = shorten_locals.shorten_locals(stripped)
    assert same_but_for_names(stripped, shortened)
    assert unbound(shortened) == unbound(stripped)
    assert shorten_locals.shorten_locals(shortened) == shortened


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("long=1\ndef f(given):\n local=given+long\n return local\n",
         "long=1\ndef f(given):\n a=given+long\n return a\n"),
        ("def f(a):\n first=second=a\n return first,second\n", "def f(a):\n b=c=a\n return b,c\n"),
        ("def f():\n length=1\n return[length*item for item in x.length]\n",
         "def f():\n a=1\n return[a*b for b in x.length]\n"),
        ("def f():\n total=1\n def inner():\n  nonlocal total\n  total=2\n", None),
        ("def f():\n global total\n total=1\n", None),
        ("def f():\n total=1\n return lambda total:total\n", None),
        ("def f():\n total=1\n return f'{total}'\n", None),
        ("def f():\n import os.path as path\n path=1\n", None),
        ("def f():\n list=1\n return list\n", None),
        ("def f():\n try:0\n except E as error:error=1\n", None),
        ("def g():\n global state\ndef f():\n def g():\n  state=1\n def h():return state\n", None),
        ("def f(limit=LIMIT):\n LIMIT=limit\n", None),
        ("@wrapped\ndef f():\n wrapped=1\n", None),
        ("match x:\n case[p,*rest]:\n  def f(d=rest):rest=d\n", None),
        ("try:0\nexcept E as error:\n def f():error=1\n", None),
        ("from os.path import*\ndef f():\n basename=1\n", None),
        ("def f():\n __file__=1\n", None),
        ("def f(x=(counter:=3)):0\ndef g():\n counter=1\n", None),
        ("def f():\n width=1\n return eval('width')\n", None),
        ("def f():\n width=1\n with numba.objmode(width=int):0\n", None),
        ("def f():\n total=1\n class A:\n  total=2\n", None),
        ("class A:\n total=1\n def f(self):\n  total=2\n", None),
        ("def f(x):\n match x:\n  case[*rest]:rest=1\n  case{**more}:more=1\n  case one:one=1\n", None),
        ("def f():\n \u00e9t\u00e9='\u00e9';value=\u00e9t\u00e9\n", "def f():\n a='\u00e9';b=a\n"),
        ("def f():\n if(value:=g()):return value\n", "def f():\n if(a:=g()):return a\n"),
        ("def f():\n g(value=1)\n value=2\n", "def f():\n g(value=1)\n a=2\n"),
    ],
)  # fmt: skip
def test_short_names_of_variables(source: str, expected: str | None) -> None:
    assert shorten_locals.shorten_locals(source) == (source if expected is None else expected)


def test_an_identifier_that_is_written_otherwise_than_it_is_read_is_named() -> None:
    with pytest.raises(ValueError, match="line 2: write the identifier 'file' as it is read"):
        shorten_locals.shorten_locals("def f():\n \ufb01le=3\n")
