"""What the shipped code and the course of a log betray, read as text and never run."""

import ast
import re
from collections.abc import Iterator

from tools.check_record.finding import Finding
from tools.check_record.folder import CODE, README, Folder
from tools.check_record.logs import Log

PROGRAMS = ("lrzip", "gcc", "g++", "nvcc", "clang", "cc1plus")
COUNTED = (".py", ".c", ".cc", ".cpp", ".cu", ".so", ".pyd", ".model")
TOOLS = re.compile(
    r"prep|prepare|download|packager|package_|build_|run_all|plot", re.IGNORECASE
)  # not needed to train or score
# What the folder cannot show, said with every report.
BLIND = (
    "whether the code that is here made the logs that are here",
    "causality, normalisation and score-first order (the audit of a run sees them)",
    "learned parameters that never had a gradient (#1923)",
    "words about what the code does that it does not do (#1858's void fraction)",
)


def findings(folder: Folder) -> Iterator[Finding]:
    """Every finding about code and the course of a run."""
    if folder.source:
        yield from _programs(folder)
        yield from _fallback(folder)
        yield from _itself(folder)
        yield from _marker(folder)
        yield from _train_data_in_evaluation(folder)
    yield from _beside(folder)
    yield from _features(folder)
    for log in folder.logs:
        yield from _course(log)


def strings(source: str) -> set[str]:
    """The string constants of a program; of a text that is none, its words."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return set(re.findall(r"[\w+]+", source))
    return {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


def _programs(folder: Folder) -> Iterator[Finding]:
    words = {
        word for text in strings(folder.source) if len(text) < 200 for word in re.findall(r"[\w+]+", text)
    }
    used = sorted(words & set(PROGRAMS))
    if used and re.search(r"\bsubprocess\b|os\.system|shutil\.which|load_inline", folder.source):
        yield Finding(
            CODE, f"needs {', '.join(used)} on the machine, which is not counted", "#1855, #1437, #2135"
        )


def _fallback(folder: Folder) -> Iterator[Finding]:
    if (
        "lrzip" in folder.source
        and "brotli" in folder.source
        and re.search(r"which\(|FileNotFoundError", folder.source)
    ):
        yield Finding(CODE, "falls back to brotli where lrzip is missing, and would be over the cap", "#2135")


def _itself(folder: Folder) -> Iterator[Finding]:
    """A script that writes the file that it reads to count itself packs the packed with the second seed."""
    writes = re.search(
        r"open\(\s*(?:__file__|['\"]train_gpt\.py['\"])\s*,\s*['\"]w|__file__\)?\.write_(?:text|bytes)",
        folder.source,
    )
    if writes:
        yield Finding(CODE, "overwrites itself: the next seed runs and counts another file", "#1858")


def _marker(folder: Folder) -> Iterator[Finding]:
    """SentencePiece's word marker, U+2581, which a wrong encoding makes a question mark."""
    if (
        re.search(r"startswith\(\s*['\"]\?['\"]\s*\)", folder.source)
        and "\u2581" not in folder.source
        and "\\u2581" not in folder.source
    ):
        yield Finding(
            CODE, "looks for '?' where SentencePiece marks words with U+2581: bytes are miscounted", "#144"
        )


def _train_data_in_evaluation(folder: Folder) -> Iterator[Finding]:
    """A function that scores or evaluates and opens training shards."""
    try:
        tree = ast.parse(folder.source)
    except (SyntaxError, ValueError, RecursionError):
        return
    for node in ast.walk(tree):
        if (
            not isinstance(node, ast.FunctionDef)
            or not re.search(r"eval|score", node.name)
            or "train" in node.name
        ):
            continue
        if re.search(r"train_files|fineweb_train|train_shards?\b", ast.unparse(node)):
            yield Finding(CODE, f"{node.name} opens training shards at evaluation", "#1924, #535, #569")


def _beside(folder: Folder) -> Iterator[Finding]:
    """Other sources and libraries that the code imports or opens, and that are not counted."""
    modules = set(re.findall(r"^\s*(?:from|import)\s+(\w+)", folder.source, flags=re.MULTILINE))
    for name in folder.files:
        stem = name.rpartition("/")[2].partition(".")[0]
        if name == CODE or not name.endswith(COUNTED) or TOOLS.search(name):
            continue
        if name.endswith((".so", ".pyd")):
            yield Finding(name, "a compiled library lies beside the code and is not counted", "#1529")
        elif stem in modules or name.rpartition("/")[2] in folder.source:
            yield Finding(name, "the code needs this file, which is not counted", "#1437, #1514, #2130")


def _features(folder: Folder) -> Iterator[Finding]:
    """What the README tells of and a log shows switched off; and text that was changed for good."""
    for log in folder.logs:
        for setting in sorted(log.off):
            feature = re.sub(r"^(?:use|enable)_|_(?:enabled|fix|fixed|on)$", "", setting)
            words = r"[ _-]?".join(map(re.escape, feature.split("_")))
            denied = rf"(?:no|not|without|off|disabled)\W+(?:\w+\W+)?{words}|{words}\W+(?:is |was )?(?:off|disabled|not)\b"
            told = re.search(words, folder.readme, re.IGNORECASE)
            if feature != setting and told and not re.search(denied, folder.readme, re.IGNORECASE):
                yield Finding(README, f"tells of {told[0]}, and {log.name} has {setting} off", "#1855, #2130")
    if re.search(r"case ?fold", folder.readme, re.IGNORECASE):
        yield Finding(
            README, "tells of casefolded text: what is scored does not give the original back", "#1578, #1604"
        )


def _course(log: Log) -> Iterator[Finding]:
    """The order of a log's lines: trained here, and training data not read once evaluation began."""
    if (
        log.final
        and log.steps is None
        and not re.search(r"^\s*(?:step[ :]*)?\d+/\d+ ", log.text, re.MULTILINE)
    ):
        yield Finding(log.name, "has a score and no training: it evaluated a stored artifact", "#1787")
    began = re.search(r"^\s*quantized\w* val_loss", log.text, re.MULTILINE)
    after = log.text[began.end() :] if began else ""
    late = re.search(
        r"^.*(?:calibrat|fitt?(?:ing|ed)?\b|hessian).*train.*$", after, re.MULTILINE | re.IGNORECASE
    )
    if late:
        yield Finding(
            log.name, f"reads training data after evaluation began: {late[0].strip()[:80]!r}", "#1924, #1851"
        )
