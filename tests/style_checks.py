"""Checks of the repository's text: names, docstrings, comments, paragraphs and references.

Every check is a function from text to a list of offences, so that `tests/test_style.py` can show
that it catches a planted one. Three kinds of text are read:

- the prose of a Python file, which is its docstrings and comments (`prose`);
- a Markdown file without its fenced blocks (`markdown_prose`);
- the comments of a YAML file (`yaml_prose`).

References are found by their spelling (`named_paths`, `named_keys` and so on). A spelling that may
also be something else is left alone: a missed reference costs little, but a check with false
alarms is soon switched off.
"""

import ast
import io
import os
import re
import tokenize
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

LONG = 25  # lines from which a function needs paragraphs
STRETCH = 12  # most lines of code in a row, in such a function, without a blank line or a comment

# Question words: a docstring begins with a noun or a verb instead.
RIDDLE = re.compile(r"(What|Who|Whose|Whether|Which|Where|How|By what|Of what)\b")

# Literal translations: the meaning that is not the word's in English, and the word.
CALQUES = {
    "behind (after)": r"\bbehind\b",
    "so many (N)": r"\bso many\b",
    "stands, lies (is)": r"\b(stands|lies|lie)\b",
    "anew (again)": r"\banew\b",
    "is no X (is not an X)": r"(?<!there )\b(is|are) no (?!longer|more)\w+",
    "shall": r"\bshall\b",
    "dear (expensive)": r"\bdear(er|est)?\b",
    "beside (next to, as well as)": r"\bbeside\b",
}

PACKAGES = ("stages", "tools", "tests", "benchmarks", "experiments", "examples")
FOLDERS = (*PACKAGES, "docs", "presets", "records", "data")
# Folders that a run or a tool makes: whether they are there says nothing about the repository.
MADE = {".git", ".venv", ".scratch", ".partial", "artifacts", "__pycache__"}
MADE |= {".mypy_cache", ".pytest_cache", ".ruff_cache", ".hypothesis"}

Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class Passage(NamedTuple):
    """A piece of prose and the line on which it begins."""

    line: int
    text: str


def docstrings(tree: ast.Module) -> Iterator[Passage]:
    """The docstrings of a module, its classes and its functions."""
    for node in ast.walk(tree):
        if not isinstance(node, Documented):
            continue
        text = ast.get_docstring(node)
        if text is not None:
            yield Passage(node.body[0].lineno, text)


def prose(source: str) -> list[Passage]:
    """Docstrings and comments of a Python file; comments on consecutive lines are one passage."""
    passages = list(docstrings(ast.parse(source)))
    last_line = -1
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        line = token.start[0]
        text = token.string.removeprefix("#").strip()
        if line == last_line + 1:
            passages[-1] = Passage(passages[-1].line, f"{passages[-1].text} {text}")
        else:
            passages.append(Passage(line, text))
        last_line = line
    return sorted(passages)


def markdown_prose(text: str) -> list[Passage]:
    """The paragraphs of a Markdown file, without its fenced blocks."""
    lines: list[str] = []
    fenced = False
    for line in text.splitlines():
        is_fence = line.lstrip().startswith("```")
        fenced ^= is_fence
        lines.append("" if fenced or is_fence else line)

    passages: list[Passage] = []
    in_paragraph = False
    for number, line in enumerate(lines, 1):
        if line.strip() and in_paragraph:
            passages[-1] = Passage(passages[-1].line, f"{passages[-1].text}\n{line}")
        elif line.strip():
            passages.append(Passage(number, line))
        in_paragraph = bool(line.strip())
    return passages


def yaml_prose(text: str) -> list[Passage]:
    """The comments of a YAML file, one passage a line."""
    passages = []
    for number, line in enumerate(text.splitlines(), 1):
        match = re.search(r"(?:^|\s)#\s?(.*)$", line)
        if match is not None:
            passages.append(Passage(number, match.group(1)))
    return passages


def riddles(source: str) -> list[str]:
    """Docstrings that begin with a question word."""
    found = docstrings(ast.parse(source))
    return [f"{line}: {text.splitlines()[0]}" for line, text in found if RIDDLE.match(text)]


def calques(source: str) -> list[str]:
    """Words of CALQUES in docstrings and comments."""
    found = []
    for line, text in prose(source):
        for name, pattern in CALQUES.items():
            matches = re.finditer(pattern, text, re.IGNORECASE)
            found += [f"{line}: {name}: {match.group()}" for match in matches]
    return found


def repeated_classes(sources: dict[str, str], reserved: dict[str, str]) -> list[str]:
    """Class names that `sources` (path to text) define more than once.

    `reserved` are names that belong to files of one name, and may be defined once in each of them.
    """
    places = defaultdict(list)
    for path, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ClassDef) and reserved.get(node.name) != Path(path).name:
                places[node.name].append(f"{path}:{node.lineno}")

    repeated = []
    for name, found in sorted(places.items()):
        if len(found) > 1 or name in reserved:
            repeated.append(f"{name}: {', '.join(found)}")
    return repeated


def imported_tests(source: str) -> list[str]:
    """Test modules that a file imports; what several of them share has a module of its own."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module or ''}.{alias.name}" for alias in node.names]
    return [name for name in names if re.search(r"(^|\.)test_", name)]


def unparagraphed(source: str) -> list[str]:
    """Functions of LONG lines or more with more than STRETCH lines of code in a row.

    Neither the signature nor the docstring counts. A statement of many lines cannot be divided, so
    it counts as STRETCH lines at most.
    """
    lines = source.splitlines()
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if _last_line(node) - node.lineno + 1 < LONG:
            continue
        body = node.body if ast.get_docstring(node) is None else node.body[1:]
        longest = _longest_stretch(lines, body)
        if longest > STRETCH:
            found.append(f"{node.lineno}: {node.name} has {longest} lines of code in a row")
    return found


def _last_line(node: ast.stmt) -> int:
    assert node.end_lineno is not None
    return node.end_lineno


def _longest_stretch(lines: list[str], body: list[ast.stmt]) -> int:
    """Most lines of code between two blank lines or comments in the statements `body`."""
    breaks = set()
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            breaks.add(number)

    # Within a simple statement there are no breaks (a blank line there is part of a string), and
    # lines after the first STRETCH are free.
    free: set[int] = set()
    for statement in body:
        for node in ast.walk(statement):
            if isinstance(node, ast.stmt) and not hasattr(node, "body"):
                inside = range(node.lineno, _last_line(node) + 1)
                breaks -= set(inside)
                free |= set(inside[STRETCH:])

    longest = 0
    length = 0
    for number in range(body[0].lineno, _last_line(body[-1]) + 1):
        if number in breaks:
            length = 0
        elif number not in free:
            length += 1
            longest = max(longest, length)
    return longest


# References. A placeholder is `<stage>` or, as part of a path or dotted name, a word in capitals.
PLACEHOLDER = re.compile(r"<[^>]*>|(?<=[./])[A-Z][A-Z_]*\b(?!\.md)")
_BELOW_FOLDER = rf"(?:{'|'.join(FOLDERS)}|\.ci|\.github)/[\w./*<>{{}},-]*[\w*>}}/]"
_PYTHON_FILE = r"[\w/-]*[a-z_]\w*\.py"
PATH = re.compile(rf"(?<![\w/.:~$-])({_BELOW_FOLDER}|{_PYTHON_FILE})(?![\w/*])")
MODULE = re.compile(rf"(?<![\w./])((?:{'|'.join(PACKAGES)})(?:\.[A-Za-z_]\w*)+)")
# Endings of file names, which look like keys: train.log.
SUFFIXES = (
    ".bin",
    ".json",
    ".log",
    ".md",
    ".model",
    ".npy",
    ".png",
    ".py",
    ".safetensors",
    ".svg",
    ".tsv",
    ".txt",
    ".yaml",
)


def named_paths(text: str) -> list[str]:
    """Paths below the repository's folders, and names of Python files."""
    paths = []
    for match in PATH.finditer(text):
        paths += _expanded(match.group(1).rstrip(",."))
    return paths


def _expanded(name: str) -> list[str]:
    """The paths of a name with alternatives in braces, as a shell expands them."""
    match = re.search(r"\{([^{}]*)\}", name)
    if match is None:
        return [name]
    paths = []
    for part in match.group(1).split(","):
        paths += _expanded(name[: match.start()] + part + name[match.end() :])
    return paths


def named_modules(text: str) -> list[str]:
    """Dotted names below the repository's packages."""
    return MODULE.findall(text)


def named_keys(text: str, sections: Iterable[str]) -> list[str]:
    """Dotted keys of params.yaml (`section.key`), but no file names, modules or calls."""
    names = re.findall(rf"(?<![\w./-])((?:{'|'.join(sections)})(?:\.[a-z]\w*)+)(?![\w(/]|\.\w)", text)
    return [name for name in names if not name.endswith(SUFFIXES)]


def named_defects(text: str) -> list[str]:
    """Numbers of docs/defects.md."""
    return re.findall(r"(?<![\w#./-])D[1-9]\d*[a-z]?\b", text)


def named_tests(text: str) -> list[str]:
    """Names of test functions; the name of a test module is a path."""
    return re.findall(r"(?<![\w/.])(test_\w+)(?!\w|\.py|/)", text)


class Repository:
    """Looks references up: files, modules, parameters, defects and tests of the repository at `root`.

    `outputs` are paths that exist after a run, `parameters` the content of params.yaml.
    """

    def __init__(self, root: Path, outputs: Iterable[str], parameters: dict[str, Any]) -> None:
        files = set(outputs)
        for folder, subfolders, names in os.walk(root):
            subfolders[:] = [name for name in subfolders if name not in MADE]
            files |= {(Path(folder) / name).relative_to(root).as_posix() for name in names}
        self.paths = set(files)
        for path in files:
            self.paths |= {parent.as_posix() for parent in Path(path).parents}
        self.parameters = parameters

        self.sources = {}
        for path in files:
            if path.endswith(".py") and path.startswith(PACKAGES):
                self.sources[path] = (root / path).read_text(encoding="utf-8")

        defects = (root / "docs/defects.md").read_text(encoding="utf-8")
        self.defects = set(re.findall(r"^### (D\d+[a-z]?)\b", defects, flags=re.MULTILINE))
        self.tests: set[str] = set()
        for path, source in self.sources.items():
            if path.startswith("tests/"):
                self.tests |= set(re.findall(r"^ *def (test_\w+)", source, flags=re.MULTILINE))

    def has_path(self, name: str) -> bool:
        """True if a file or folder of that name exists.

        `*` matches any text without a slash, and leading folders may be left out. Of a name with a
        placeholder only the folders before it must exist.
        """
        before, placeholder, _ = PLACEHOLDER.sub("\0", name).partition("\0")
        if placeholder:
            return before.rpartition("/")[0] in self.paths
        pattern = re.compile(r"(?:.*/)?" + re.escape(name.rstrip("/")).replace(r"\*", "[^/]*"))
        return any(pattern.fullmatch(path) for path in self.paths)

    def has_module(self, name: str) -> bool:
        """True if a dotted name is a module, a package, or something that a module mentions."""
        parts = PLACEHOLDER.sub("", name).rstrip(".").split(".")
        for count in range(len(parts), 0, -1):
            stem = "/".join(parts[:count])
            for path in (f"{stem}.py", f"{stem}/__init__.py"):
                if path in self.sources:
                    rest = parts[count:]
                    return not rest or bool(re.search(rf"\b{rest[0]}\b", self.sources[path]))
            if stem in self.paths:
                return count == len(parts)
        return False

    def has_key(self, name: str) -> bool:
        """True if params.yaml has this dotted key."""
        value: Any = self.parameters
        for part in name.split("."):
            if not isinstance(value, dict) or part not in value:
                return False
            value = value[part]
        return True

    def missing(self, text: str) -> list[str]:
        """The references of a text that lead nowhere."""
        sections = [name for name, value in self.parameters.items() if isinstance(value, dict)]
        return [
            *(name for name in named_paths(text) if not self.has_path(name)),
            *(name for name in named_modules(text) if not self.has_module(name)),
            *(name for name in named_keys(text, sections) if not self.has_key(name)),
            *(name for name in named_defects(text) if name not in self.defects),
            *(name for name in named_tests(text) if name not in self.tests),
        ]
