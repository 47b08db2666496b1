"""Wiring: dvc.yaml, source, params.yaml, tests and README name the same stages, files and commands."""

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
from stages.bundle.closure import import_closure, module_name
from stages.bundle.importer_template import ENTRY
from stages.common import challenge, config
from stages.common.stage import MEASURED_OUTPUTS, Stage
from tools import dag, deps
from tools.__main__ import descriptions

FORKING = ("pack", "sliding_eval", "ttt_eval")  # stages that fork a process before they import torch

ROOT = Path(__file__).resolve().parent.parent
# The pipeline's order: a stage may import from those before it.
ORDER = tuple("tokenize train calibrate pack sliding_eval ttt_eval bundle audit submission".split())  # noqa: SIM905
# The folders of stages/ in the order of their imports: each may import from those before it. Two of them
# hold what stages share.
SHARED = ("common", "scoring")
LAYERS = ("common", *ORDER[:4], "scoring", *ORDER[4:])
# Modules that read the environment (torchrun's variables, the bundle's SEED) or write it (the instruction
# set, and numba's settings in a process of its own).
ENVIRONMENT_READERS = {
    "stages/common/clock.py",
    "stages/common/stage.py",
    "stages/common/instruction_set.py",
    "stages/pack/file/decode_process.py",
    "stages/common/parallel.py",
    "stages/common/failure_detector.py",
    "stages/common/rendezvous.py",
    "stages/common/torchrun.py",
}
# Packages that a CPU machine does not have; modules that need them are imported after a check.
OPTIONAL_PACKAGES = {"triton"}
# Imports within functions, by module. torch and numba are imported after the process that decodes was
# started.
LATE: set[tuple[str, str]] = {
    ("stages/bundle/program/entry.py", "stages.bundle.program"),
    ("stages/pack/file/decode_process.py", "stages.pack.entropy"),
    ("stages/pack/file/decode_process.py", "stages.pack.file"),
    *((f"stages/{name}/__main__.py", "stages.common.stage") for name in FORKING),
    *((f"stages/{name}/__main__.py", f"stages.{name}") for name in FORKING),
}

# Folders that no stage imports from.
OUTSIDE = {"tools", "tests", "benchmarks", "experiments", "examples"}

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


def declared(stage: str) -> Stage[Any]:
    found = importlib.import_module(f"stages.{stage}.stage").STAGE
    assert isinstance(found, Stage)
    return found


def paths(stage: str, *kinds: str) -> list[str]:
    """The paths under the keys `kinds` of a stage in dvc.yaml, without their options."""
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
    assert set(ORDER) <= set(config.read_parameters(ROOT / "params.yaml"))


@each_stage
def test_a_stage_has_its_name_everywhere(stage: str) -> None:
    assert declared(stage).name == stage
    assert PIPELINE[stage]["cmd"] == f"python -m stages.{stage}"
    assert {Path(path).parent for path in outputs(stage)} == {Path("artifacts") / stage}
    assert (ROOT / "tests" / f"test_{stage}.py").is_file()


def needed_by(stage: str) -> set[str]:
    """The files that a stage imports; for `bundle` also those that it carries."""
    modules = [f"stages.{stage}.__main__", *([ENTRY] if stage == "bundle" else [])]
    return {path.as_posix() for module in modules for path in import_closure(ROOT, module)}


def uncovered(dependencies: list[str], needed: set[str]) -> list[str]:
    """Files that are needed and in no dependency, which is a file or a folder."""
    return sorted(path for path in needed if not any(covers(dependency, path) for dependency in dependencies))


def superfluous(dependencies: list[str], needed: set[str]) -> list[str]:
    """Source files that a dependency names or has in it, and that are not needed."""
    sources = [*SOURCES, *TOOLS]
    named = {path for path in sources if any(covers(dependency, path) for dependency in dependencies)}
    return sorted(named - needed)


@each_stage
def test_deps_cover_what_the_stage_imports(stage: str) -> None:
    missing = uncovered(paths(stage, "deps"), needed_by(stage))
    assert missing == [], f"add to the deps of {stage} in dvc.yaml"


@each_stage
def test_deps_name_no_source_that_the_stage_does_not_import(stage: str) -> None:
    """A folder is listed only if the stage needs every file in it."""
    assert superfluous(paths(stage, "deps"), needed_by(stage)) == [], (
        f"an edit there re-runs {stage} for nothing"
    )


def test_deps_are_what_the_tool_writes() -> None:
    text = (ROOT / "dvc.yaml").read_text(encoding="utf-8")
    is_current = deps.with_deps(text) == text  # a comparison in the assert would print a diff for minutes
    assert is_current, "run python -m tools.deps"


def test_the_tool_replaces_sources_and_nothing_else() -> None:
    """Files that are gone or missing, in one stage; all else stays, comments included."""
    text = (ROOT / "dvc.yaml").read_text(encoding="utf-8")
    wrong = text.replace("      - stages/common/ledger.py\n", "      - stages/common/gone.py\n")
    wrong = wrong.replace("      - stages/common/shards.py\n", "")
    assert wrong.count("gone.py") > 1
    is_restored = deps.with_deps(wrong) == text
    assert is_restored


def test_missing_and_superfluous_dependencies_are_found() -> None:
    needed = {path for path in SOURCES if path.startswith("stages/scoring/")} | {"stages/common/bpb.py"}
    assert uncovered(["stages/scoring"], needed) == ["stages/common/bpb.py"]
    assert superfluous(["stages/scoring", "stages/common/bpb.py"], needed) == []
    assert "stages/common/ledger.py" in superfluous(["stages/scoring", "stages/common"], needed)
    assert superfluous(["stages/scoring", "tools/__main__.py"], needed) == ["tools/__main__.py"]


@each_stage
def test_editing_a_tool_a_test_or_a_benchmark_re_runs_no_stage(stage: str) -> None:
    outside = [path for path in needed_by(stage) if not path.startswith("stages/")]
    assert outside == []
    assert [path for path in paths(stage, "deps") if path.split("/")[0] in OUTSIDE] == []


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
    written = {str(Path("artifacts") / stage / name) for name in declared(stage).writes + MEASURED_OUTPUTS}
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


def not_upstream(source: str, names: set[str]) -> list[str]:
    """Imports `names` of the file `source` that are not from its own folder or one before it in LAYERS."""
    own = Path(source).parts[1]
    allowed = LAYERS[: LAYERS.index(own) + 1] if own in LAYERS else ("common",)
    found = []
    for name in sorted(names):
        top, *below = name.split(".")
        if top in OUTSIDE or (top == "stages" and below and below[0] not in allowed):
            found.append(name)
    return found


@pytest.mark.parametrize("source", SOURCES)
def test_imports_point_upstream_only(source: str) -> None:
    """A tool may import from every stage, and no stage from a tool."""
    assert not_upstream(source, imported(source)) == []


def test_an_import_that_points_downstream_is_found() -> None:
    names = {
        "stages.common.bpb",
        "stages.train.model",
        "stages.pack.artifact",
        "stages.scoring",
        "tools.plan",
        "json",
    }
    downstream = ["stages.pack.artifact", "stages.scoring", "tools.plan"]
    assert not_upstream("stages/calibrate/hessians.py", names) == downstream
    assert not_upstream("stages/audit/verdict.py", names) == ["tools.plan"]


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
    modules = "stages.pack.entropy.codecs, stages.pack.file.container, stages.pack.file.shared_memory"
    program = f"import sys, {modules}, stages.pack.forms; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


@each_source
def test_the_environment_is_read_in_one_place(source: str) -> None:
    """No parameter comes from an environment variable; only the bundle's program may read SEED."""
    if source in ENVIRONMENT_READERS or source.startswith("stages/bundle/"):
        return
    readers = {"environ", "getenv", "environb", "putenv"}
    found = []
    for node in ast.walk(tree_of(source)):
        if isinstance(node, ast.Attribute) and node.attr in readers:
            found.append(f"{node.lineno}: {node.attr}")
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            found += [f"{node.lineno}: {alias.name}" for alias in node.names if alias.name in readers]
    assert found == []


@each_source
def test_every_module_says_what_it_is(source: str) -> None:
    assert source.endswith("__init__.py") or ast.get_docstring(tree_of(source))


# Whatever a foreign scorer raises, SystemExit among it, is an answer to the audit.
SERVER = "stages/audit/remote/server.py"


@each_source
def test_no_broad_except_and_no_pickle(source: str) -> None:
    for node in ast.walk(tree_of(source)):
        if isinstance(node, ast.ExceptHandler):
            broad = node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
            raises_again = isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None
            assert not broad or raises_again or source == SERVER, f"{source}:{node.lineno}"
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


def unknown_commands(text: str) -> list[str]:
    """Targets of make, modules, presets and parameters that the commands of a Markdown text name in vain."""
    targets = set(re.findall(r"^([a-z]+):", MAKEFILE, flags=re.MULTILINE))
    lines = "\n".join(commands(text) + re.findall(r"`([^`\n]+)`", text))
    found = [f"make {target}" for target in re.findall(r"\bmake ([a-z]+)", lines) if target not in targets]
    for module in re.findall(r"-m ((?:stages|tools|tests|benchmarks|experiments)\.[a-z_][a-z_.0-9]*)", lines):
        stem = ROOT / Path(*module.split("."))
        if not (stem.with_suffix(".py").is_file() or (stem / "__main__.py").is_file()):
            found.append(module)

    for preset in re.findall(r"NAME=([a-z]+)", lines):
        if not (ROOT / "presets" / f"{preset}.yaml").is_file():
            found.append(f"NAME={preset}")
    for key in re.findall(r"(?:-S|--set|--set-param) '?([a-z_.]+)=", lines):
        raw: Any = config.read_parameters(ROOT / "params.yaml")
        for part in key.split("."):
            raw = raw.get(part) if isinstance(raw, dict) else None
        if raw is None and key != "key.path":  # a placeholder
            found.append(key)
    return found


PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
PAGES += [ROOT / folder / "README.md" for folder in ("benchmarks", "experiments", "examples", "records")]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())


@each_page
def test_documented_commands_exist(page: Path) -> None:
    assert unknown_commands(page.read_text(encoding="utf-8")) == []


def test_an_unknown_command_is_found() -> None:
    text = "`make nothing`, `make test`\n```sh\npython -m tools.nothing\npython -m tools.preset\n"
    text += "make preset NAME=nothing\nmake preset NAME=record\n"
    text += "dvc exp run -S train.nothing=1 -S train.steps=2\n```\n"
    assert unknown_commands(text) == ["make nothing", "tools.nothing", "NAME=nothing", "train.nothing"]


def test_the_readme_names_its_two_commands_and_every_stage() -> None:
    assert {"make repro", "make test"} <= set(commands(README))
    assert [stage for stage in ORDER if f"`{stage}`" not in README] == []


def anchors(document: Path) -> set[str]:
    """The names by which links reach the headings of a Markdown file on GitHub."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(document: Path) -> list[str]:
    """Links of a Markdown file to files or headings that do not exist; paths are relative to the document."""
    text = document.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)\s]+)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    targets += re.findall(r"^\[[^\]]+\]: (\S+)$", text, flags=re.MULTILINE)
    broken = []
    for target in targets:
        path, _, anchor = target.partition("#")
        linked = document.parent / path if path else document
        if target.startswith(("http:", "https:")):
            continue
        if not linked.exists() or (anchor and anchor not in anchors(linked)):
            broken.append(target)
    return broken


@each_page
def test_links_between_documents_lead_somewhere(page: Path) -> None:
    assert broken_links(page) == []


def test_links_in_the_log_lead_somewhere() -> None:
    for page in ROOT.glob("docs/log/*.md"):
        assert broken_links(page) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# A heading, of `words`\n")
    page = tmp_path / "page.md"
    page.write_text(
        "## Here\n[a](#here) [b](other.md#a-heading-of-words) [c](https://example.org/#x) [d](#there)\n"
        "[e](nowhere.md) [f](other.md#heading)\n\n[g]: missing.md\n"
    )
    assert broken_links(page) == ["#there", "nowhere.md", "other.md#heading", "missing.md"]


def test_every_tool_is_a_command_with_a_line_in_the_list() -> None:
    """`python -m tools` lists them; a package has its command in cli.py."""
    lines = descriptions()
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


def test_the_challenges_constants_are_written_in_one_module() -> None:
    large = {value for value in vars(challenge).values() if isinstance(value, int) and value > 1_000_000}
    assert len(large) == 7
    elsewhere = [
        f"{path}: {node.value}"
        for folder in ("stages", "tools", "benchmarks", "experiments")
        for path in (ROOT / folder).rglob("*.py")
        if path.name != "challenge.py"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value in large
    ]
    assert elsewhere == []


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
            package, version = match.groups()
            assert package not in pinned, f"{line} is pinned twice"
            assert not package.startswith(("nvidia", "cuda")), line
            assert package != "triton" or name == "requirements-dev.lock", "torch for CUDA brings it"
            pinned[package] = version

    assert pinned["dvc"] == "3.67.1"
    expected = "torch numpy sympy networkx sentencepiece brotli safetensors matplotlib pyyaml pytest"
    assert set(expected.split()) <= set(pinned)


def test_dvcignore_keeps_bytecode_out_of_folder_dependencies() -> None:
    ignored = (ROOT / ".dvcignore").read_text(encoding="utf-8").splitlines()
    assert {"__pycache__", "*.pyc", ".partial"} <= set(ignored)


@pytest.mark.parametrize("document", dag.DOCUMENTS)
def test_the_chart_of_the_pipeline_is_the_one_that_dvc_yaml_gives(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    assert dag.with_chart(text, dag.mermaid(PIPELINE)) == text, "run: python -m tools.dag"


def test_the_chart_leaves_out_what_a_path_over_other_stages_implies() -> None:
    first = {"deps": ["data/text"], "outs": ["artifacts/a/x.bin"]}
    middle = {"deps": ["artifacts/a/x.bin", "artifacts/a/timing.json"], "outs": ["artifacts/b/y"]}
    last = {"deps": ["artifacts/a/x.bin", "artifacts/b/y"]}
    chart = dag.mermaid({"a": first, "b": middle, "c": last})
    assert '  a -->|"x.bin"| b\n' in chart
    assert '  b -->|"y/"| c\n' in chart
    assert '  a -->|"x.bin"| c\n' in chart

    many = {
        f"s{i}": {"deps": [f"artifacts/s{i - 1}/y"] if i else [], "outs": [f"artifacts/s{i}/y"]}
        for i in range(6)
    }
    everything = {"deps": [f"artifacts/s{i}/y" for i in range(6)]}
    assert [line for line in dag.mermaid(many | {"end": everything}).splitlines() if "> end" in line] == [
        "  s5 --> end"
    ]


@pytest.mark.parametrize(
    "text", ["", "[]", "vars: []", "stages: null", "stages: {a: {foreach: [1], do: {}}}"]
)
def test_a_pipeline_without_plain_stages_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "dvc.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match="expected a section `stages`, each with a `cmd`"):
        dag.read_stages(path)


def test_stages_without_dependencies_are_drawn() -> None:
    assert '  a["a"]\n' in dag.mermaid(
        {"a": {"cmd": "x", "outs": None}, "b": {"cmd": "y", "deps": ["artifacts"]}}
    )


def test_a_document_without_the_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="expected one <!-- dag -->"):
        dag.with_chart("no chart here", "chart\n")
