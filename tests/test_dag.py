"""The wiring: dvc.yaml, the source, params.yaml, the tests and the README name the same stages, files and commands."""

import argparse
import ast
import dataclasses
import functools
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks import real_text
from stages.bundle.closure import closure, module_name
from stages.bundle.importer_template import ENTRY
from stages.common import command, config
from tools.__main__ import described

ROOT = Path(__file__).resolve().parent.parent
# The pipeline's order: a stage may import from those before it.
ORDER = (
    "tokenize",
    "train",
    "calibrate",
    "pack",
    "sliding_eval",
    "ttt_eval",
    "bundle",
    "audit",
    "submission",
)
# The folders of stages/ in the order of their imports: each may import from those before it. Two are no stages.
SHARED = ("common", "scoring")
LAYERS = ("common", *ORDER[:4], "scoring", *ORDER[4:])
# Where the environment is read: torchrun's variables, and the bundle's SEED; or written: the instruction set, and what numba shall do in a
# process of its own.
ENVIRONMENT_READERS = {
    "stages/common/clock.py",
    "stages/common/command.py",
    "stages/common/instruction_set.py",
    "stages/pack/file/decode_process.py",
    "stages/common/parallel.py",
}
# Modules that need a package which a CPU machine does not have; their stage imports them behind a check.
OPTIONAL_PACKAGES = {"triton"}
# What is imported late, for a process to be begun before: torch, by those who wait for the weights, and numba, by the one that decodes.
LATE = {
    ("stages/bundle/program/entry.py", "stages.bundle.program"),
    ("stages/pack/file/decode_process.py", "stages.pack.entropy"),
    ("stages/pack/file/decode_process.py", "stages.pack.file"),
}

PIPELINE: dict[str, Any] = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
SOURCES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "stages").rglob("*.py"))
TOOLS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tools").rglob("*.py"))
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")

each_stage = pytest.mark.parametrize("stage", ORDER)
each_source = pytest.mark.parametrize("source", [*SOURCES, *TOOLS])


@functools.cache
def tree_of(source: str) -> ast.Module:
    return ast.parse((ROOT / source).read_text(encoding="utf-8"))


def declared(stage: str) -> command.Stage[Any]:
    found = importlib.import_module(f"stages.{stage}.__main__").STAGE
    assert isinstance(found, command.Stage)
    return found


def paths(stage: str, *kinds: str) -> list[str]:
    """The paths under the keys `kinds` of a stage in dvc.yaml, their options aside."""
    entries = [entry for kind in kinds for entry in PIPELINE[stage].get(kind, [])]
    return [next(iter(entry)) if isinstance(entry, dict) else entry for entry in entries]


def outputs(stage: str) -> list[str]:
    return paths(stage, "outs", "metrics", "plots")


def covers(dependency: str, path: str) -> bool:
    return Path(dependency) == Path(path) or Path(dependency) in Path(path).parents


def imported(source: str) -> set[str]:
    """The modules that a file imports, as absolute names; `from a import b` counts as a.b too."""
    names: set[str] = set()
    package = module_name(Path(source)).split(".")
    package = package if source.endswith("__init__.py") else package[:-1]
    for node in ast.walk(tree_of(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return names


def test_one_word_for_a_stage() -> None:
    folders = {path.parent.name for path in (ROOT / "stages").glob("*/__init__.py")}
    assert tuple(PIPELINE) == ORDER
    assert folders == set(ORDER) | set(SHARED)
    assert set(ORDER) <= set(config.SECTIONS)
    assert set(ORDER) <= set(config.read(ROOT / "params.yaml"))


@each_stage
def test_a_stage_has_its_name_everywhere(stage: str) -> None:
    assert declared(stage).name == stage
    assert PIPELINE[stage]["cmd"] == f"python -m stages.{stage}"
    assert {Path(path).parent for path in outputs(stage)} == {Path("artifacts") / stage}
    assert (ROOT / "tests" / f"test_{stage}.py").is_file()


def needed_by(stage: str) -> set[str]:
    """The files that a stage imports; for `bundle` also those that it carries."""
    modules = [f"stages.{stage}.__main__", *([ENTRY] if stage == "bundle" else [])]
    return {path.as_posix() for module in modules for path in closure(ROOT, module)}


@each_stage
def test_deps_cover_what_the_stage_imports(stage: str) -> None:
    dependencies = paths(stage, "deps")
    missing = sorted(
        path for path in needed_by(stage) if not any(covers(dependency, path) for dependency in dependencies)
    )
    assert missing == [], f"add to the deps of {stage} in dvc.yaml"


@each_stage
def test_deps_name_no_source_that_the_stage_does_not_import(stage: str) -> None:
    """A folder is listed only if the stage needs every file in it."""
    dependencies = paths(stage, "deps")
    covered = {
        source
        for source in [*SOURCES, *TOOLS]
        if any(covers(dependency, source) for dependency in dependencies)
    }
    assert sorted(covered - needed_by(stage)) == [], f"an edit there re-runs {stage} for nothing"
    assert [path for path in dependencies if covers("tools", path)] == []


@each_stage
def test_every_dependency_exists_or_is_made_before(stage: str) -> None:
    made = [path for earlier in ORDER[: ORDER.index(stage)] for path in outputs(earlier)]
    for path in paths(stage, "deps"):
        if path.startswith("artifacts/"):
            assert any(covers(path, out) or covers(out, path) for out in made), path
        else:
            assert (ROOT / path).exists(), path


@each_stage
def test_params_are_the_sections_that_the_stage_declares(stage: str) -> None:
    fields = [field.name for field in dataclasses.fields(declared(stage).params)]
    assert PIPELINE[stage].get("params", []) == fields


@each_stage
def test_what_a_stage_reads_and_writes_is_declared(stage: str) -> None:
    dependencies = paths(stage, "deps")
    for name, path in declared(stage).reads.items():
        # Of the source, and of another stage's whole folder, only the files that are read are dependencies.
        inside = path in (Path("stages"), Path("artifacts") / path.name) and any(
            covers(str(path), dependency) for dependency in dependencies
        )
        assert inside or any(covers(dependency, str(path)) for dependency in dependencies), f"{name}: {path}"
    written = {
        str(Path("artifacts") / stage / name) for name in declared(stage).writes + command.MEASURED_OUTPUTS
    }
    assert set(outputs(stage)) == written


@each_stage
def test_every_stage_depends_on_the_lock_file(stage: str) -> None:
    """Every byte is a function of code, parameters, seed, data and lock file."""
    assert "requirements.lock" in paths(stage, "deps")


def test_training_never_opens_the_validation_text() -> None:
    for stage in ("train", "calibrate"):
        dependencies = paths(stage, "deps") + [str(path) for path in declared(stage).reads.values()]
        assert not any(covers(dependency, "artifacts/tokenize/val") for dependency in dependencies)
        assert not any("artifacts" in dependency and "eval" in dependency for dependency in dependencies)


def test_small_comparable_files_lie_in_git_and_blobs_in_the_cache() -> None:
    for stage in ORDER:
        for kind in ("metrics", "plots"):
            for entry in PIPELINE[stage].get(kind, []):
                assert isinstance(entry, dict), f"{entry}: add cache: false"
                assert next(iter(entry.values()))["cache"] is False, entry
        assert "persist" not in str(PIPELINE[stage])
        assert "frozen" not in PIPELINE[stage]
        assert "always_changed" not in PIPELINE[stage]


def test_metrics_json_is_a_metric_wherever_it_is_written() -> None:
    for stage in ORDER:
        assert [path for path in outputs(stage) if path.endswith("metrics.json")] == paths(stage, "metrics")


@pytest.mark.parametrize("source", SOURCES)
def test_imports_point_upstream_only(source: str) -> None:
    """In the order of the layers; a tool may import from any of them, and none of them from a tool."""
    own = Path(source).parts[1]
    allowed = set(LAYERS[: LAYERS.index(own) + 1]) if own in LAYERS else {"common"}
    names = imported(source)
    assert (
        sorted(name for name in names if name.startswith("stages.") and name.split(".")[1] not in allowed)
        == []
    )
    assert not {name.partition(".")[0] for name in names} & {"tools", "tests", "benchmarks"}


def test_stages_common_imports_nothing_before_the_instruction_set_is_pinned() -> None:
    """Importing stages/common/instruction_set.py runs the packages above it, and they must not load numpy."""
    assert imported("stages/common/__init__.py") == set()
    assert not {name.partition(".")[0] for name in imported("stages/common/instruction_set.py")} & {
        "numpy",
        "torch",
        "numba",
    }


@each_source
def test_no_stage_needs_dvc(source: str) -> None:
    packages = {name.partition(".")[0] for name in imported(source)}
    assert not packages & {"dvc", "dvclive", "hydra", "omegaconf", "ruamel"}


def nested_imports(tree: ast.Module) -> Iterator[ast.Import | ast.ImportFrom]:
    for function in ast.walk(tree):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield from (node for node in ast.walk(function) if isinstance(node, (ast.Import, ast.ImportFrom)))


@each_source
def test_no_import_inside_a_function(source: str) -> None:
    names = {ast.unparse(node): node.lineno for node in nested_imports(tree_of(source))}
    optional = (*OPTIONAL_PACKAGES, "stages.train.kernels")  # which need Triton
    early = {text: line for text, line in names.items() if (source, text.split()[1]) not in LATE}
    assert {text: line for text, line in early.items() if not text.split()[1].startswith(optional)} == {}


@pytest.mark.parametrize("module", ["stages.pack.file.decode_process", "stages.bundle.program.entry"])
def test_what_is_begun_first_waits_for_nothing(module: str) -> None:
    program = f"import sys, {module}; print(*{{'numba', 'numpy', 'torch'}} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "\n"


def test_what_decodes_has_no_torch() -> None:
    program = (
        "import sys; from stages.pack.entropy import codecs; from stages.pack.file import container, shared_memory, tensors;"
        " assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


@each_source
def test_the_environment_is_read_in_one_place(source: str) -> None:
    """No parameter comes from an environment variable; the carrier and entry of the bundle may read SEED."""
    if source in ENVIRONMENT_READERS or source.startswith("stages/bundle/"):
        return
    readers = {"environ", "getenv", "environb", "putenv"}
    lines = [
        node.lineno
        for node in ast.walk(tree_of(source))
        if isinstance(node, ast.Attribute) and node.attr in readers
    ]
    names = {
        alias.name
        for node in ast.walk(tree_of(source))
        if isinstance(node, ast.ImportFrom) and node.module == "os"
        for alias in node.names
    }
    assert lines == []
    assert not names & readers


@each_source
def test_every_module_says_what_it_is(source: str) -> None:
    assert source.endswith("__init__.py") or ast.get_docstring(tree_of(source))


@each_source
def test_no_broad_except_and_no_pickle(source: str) -> None:
    for node in ast.walk(tree_of(source)):
        if isinstance(node, ast.ExceptHandler):
            broad = node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
            raises_again = isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None
            assert not broad or raises_again, f"{source}:{node.lineno}"
    assert not {name.partition(".")[0] for name in imported(source)} & {"pickle", "dill", "joblib", "marshal"}


def test_every_module_imports_in_a_fresh_interpreter_and_does_nothing() -> None:
    """One interpreter imports all: nothing printed, no process group, no thread setting, no device."""
    modules = [module_name(Path(source)) for source in [*SOURCES, *TOOLS]]
    program = f"""
import importlib, sys
import torch
threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
for name in {modules!r}:
    importlib.import_module(name)
assert not torch.distributed.is_initialized()
assert (threads, dtype) == (torch.get_num_threads(), torch.get_default_dtype())
assert not torch.cuda.is_initialized()
assert not torch.are_deterministic_algorithms_enabled()
assert not any(name.partition(".")[0] in ("dvc", "pytest", "sympy_plots") for name in sys.modules)
"""
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def commands(text: str) -> list[str]:
    """The lines of the shell blocks of a Markdown text, comments and prompts aside."""
    blocks = re.findall(r"^```(?:sh|bash|console)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    lines = [
        line.partition("  #")[0].removeprefix("$ ").strip() for block in blocks for line in block.splitlines()
    ]
    return [line for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("stage", real_text.STAGES)
def test_the_benchmark_of_the_whole_path_hands_on_every_artifact_that_a_stage_reads(stage: str) -> None:
    """An audit on a GPU once ended for want of one that a new test had come to read."""
    arguments = argparse.Namespace(text=Path("text"), tokenizer=Path("tokenizer"))
    given = {str(word) for word in real_text.inputs(stage, Path("folder"), arguments)}
    read = {
        f"--{name.replace('_', '-')}"
        for name, path in declared(stage).reads.items()
        if path.parts[0] == "artifacts"
    }
    assert read <= given


@pytest.mark.parametrize(
    "document", ["README.md", "CONTRIBUTING.md", "benchmarks/README.md", "records/README.md"]
)
def test_documented_commands_exist(document: str) -> None:
    targets = set(re.findall(r"^([a-z]+):", MAKEFILE, flags=re.MULTILINE))
    text = (ROOT / document).read_text(encoding="utf-8")
    lines = "\n".join(commands(text) + re.findall(r"`([^`\n]+)`", text))
    for target in re.findall(r"\bmake ([a-z]+)", lines):
        assert target in targets, f"make {target}"
    for module in re.findall(r"-m ((?:stages|tools|benchmarks)\.[a-z_][a-z_.0-9]*)", lines):
        stem = ROOT / Path(*module.split("."))
        assert stem.with_suffix(".py").is_file() or (stem / "__main__.py").is_file(), module
    for preset in re.findall(r"NAME=([a-z]+)", lines):
        assert (ROOT / "presets" / f"{preset}.yaml").is_file(), preset
    for key in re.findall(r"(?:-S|--set) '?([a-z_.]+)=", lines):
        raw: Any = config.read(ROOT / "params.yaml")
        for part in key.split("."):
            assert part in raw, key
            raw = raw[part]


def test_the_readme_names_its_two_commands_and_every_stage() -> None:
    assert {"make repro", "make test"} <= set(commands(README))
    assert [stage for stage in ORDER if f"`{stage}`" not in README] == []


@pytest.mark.parametrize(
    "document",
    ["README.md", "CONTRIBUTING.md", "docs/README.md", "benchmarks/README.md", "records/README.md"],
)
def test_links_between_documents_lead_somewhere(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)", text) + re.findall(r'(?:src|href)="([^"#]+)"', text):
        if not target.startswith(("http:", "https:")):
            assert ((ROOT / document).parent / target).exists(), target


def test_every_tool_is_a_command_with_a_line_in_the_list() -> None:
    """`python -m tools` lists them; a package has its command in cli.py."""
    lines = described()
    names = {Path(path).relative_to("tools").parts[0].removesuffix(".py") for path in TOOLS}
    assert set(lines) == {name for name in names if not name.startswith("__")}
    for name, line in lines.items():
        folder = ROOT / "tools" / name
        command_file, main_file = (
            (folder / "cli.py", folder / "__main__.py")
            if folder.is_dir()
            else (folder.with_suffix(".py"),) * 2
        )
        assert line, name
        assert f'prog="python -m tools.{name}"' in command_file.read_text(encoding="utf-8")
        assert 'if __name__ == "__main__":\n    main()' in main_file.read_text(encoding="utf-8")


def test_make_help_lists_every_target() -> None:
    listed = set(re.findall(r"^([a-z]+):.*  ## ", MAKEFILE, flags=re.MULTILINE))
    phony = re.search(r"^\.PHONY: (.*)$", MAKEFILE, flags=re.MULTILINE)
    assert phony is not None
    assert listed == set(phony.group(1).split())


def test_lock_files_pin_exactly_and_name_no_cuda_package() -> None:
    pinned: dict[str, str] = {}
    for name in ("requirements.lock", "requirements-dev.lock"):
        for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
            if line.startswith("#") or line == "-r requirements.lock":
                continue
            match = re.fullmatch(r"([a-z0-9.-]+)==([0-9][A-Za-z0-9.]*)", line)
            assert match, f"{name}: {line}"
            assert match.group(1) not in pinned, f"{line} is pinned twice"
            assert not match.group(1).startswith(("nvidia", "cuda")), line
            assert match.group(1) != "triton" or name == "requirements-dev.lock", "torch for CUDA brings it"
            pinned[match.group(1)] = match.group(2)
    assert pinned["dvc"] == "3.67.1"
    assert {
        "torch",
        "numpy",
        "sympy",
        "networkx",
        "sentencepiece",
        "brotli",
        "safetensors",
        "matplotlib",
        "pyyaml",
        "pytest",
    } <= set(pinned)


def test_dvcignore_keeps_bytecode_out_of_folder_dependencies() -> None:
    assert {"__pycache__", "*.pyc", ".partial"} <= set(
        (ROOT / ".dvcignore").read_text(encoding="utf-8").splitlines()
    )
