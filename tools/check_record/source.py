"""Check the shipped code, and the order of events in a log. The code is read as text and never run."""

import ast
import re
from collections.abc import Iterator
from typing import NamedTuple

from tools.check_record.finding import Finding
from tools.check_record.folder import CODE, README, RecordFolder
from tools.check_record.logs import Log

EXTERNAL_PROGRAMS = ("lrzip", "gcc", "g++", "nvcc", "clang", "cc1plus")
MAX_PROGRAM_STRING = 200  # characters; a longer string constant is text or data, not a command
COUNTED_SUFFIXES = (".py", ".c", ".cc", ".cpp", ".cu", ".so", ".pyd", ".model")
# Names of files that are not needed to train or score, so they need not be counted.
UNCOUNTED_TOOLS = re.compile(r"prep|prepare|download|packager|package_|build_|run_all|plot", re.IGNORECASE)
MAX_SHOWN_CHARACTERS = 80  # of a log line
# Printed with every report.
NOT_CHECKED = (
    "whether the code that is here made the logs that are here",
    "causality, normalisation and score-first order (the audit of a run sees them)",
    "learned parameters that never had a gradient (#1923)",
    "words about what the code does that it does not do (#1858's void fraction)",
)
# Affixes of settings that are not part of the feature's name: smear_enabled and use_smear are about
# "smear".
SETTING_PREFIXES = ("use_", "enable_")
SETTING_SUFFIXES = ("_enabled", "_fix", "_fixed", "_on")


class Phrase(NamedTuple):
    """A way to write that a feature is not used: a pattern, and two examples for the feature "smear"."""

    pattern: str
    examples: tuple[str, str]


# The negations are not anchored at the start of a word.
OFF_PHRASES = (
    Phrase(r"(?:no|not|without|off|disabled)\W+{feature}", ("there is no smear", "disabled: smear")),
    Phrase(r"(?:no|not|without|off|disabled)\W+\w+\W+{feature}", ("without a smear", "not the Smear")),
    Phrase(r"{feature}\W+(?:off|disabled|not)\b", ("smear off", "Smear (disabled)")),
    Phrase(r"{feature}\W+(?:is|was) (?:off|disabled|not)\b", ("smear is off", "smear was not used")),
)


def findings(folder: RecordFolder) -> Iterator[Finding]:
    """Yield every finding about code and the order of events."""
    if folder.source:
        yield from _external_programs(folder)
        yield from _brotli_fallback(folder)
        yield from _overwrites_itself(folder)
        yield from _broken_word_marker(folder)
        yield from _train_data_in_evaluation(folder)
    yield from _uncounted_files(folder)
    yield from _disabled_features(folder)
    yield from _casefolded_text(folder)
    for log in folder.logs:
        yield from _order_of_log(log)


def string_constants(source: str) -> set[str]:
    """Return the string constants of a program; if it does not parse, its words."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return set(re.findall(r"[\w+]+", source))
    constants = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return {value for value in constants if isinstance(value, str)}


def _external_programs(folder: RecordFolder) -> Iterator[Finding]:
    words: set[str] = set()
    for text in string_constants(folder.source):
        if len(text) < MAX_PROGRAM_STRING:
            words.update(re.findall(r"[\w+]+", text))
    used = sorted(words & set(EXTERNAL_PROGRAMS))
    if used and re.search(r"\bsubprocess\b|os\.system|shutil\.which|load_inline", folder.source):
        message = f"needs {', '.join(used)} on the machine, which is not counted"
        yield Finding(CODE, message, "#1855, #1437, #2135")


def _brotli_fallback(folder: RecordFolder) -> Iterator[Finding]:
    uses_both = "lrzip" in folder.source and "brotli" in folder.source
    if uses_both and re.search(r"which\(|FileNotFoundError", folder.source):
        message = "falls back to brotli if lrzip is missing, and would be over the cap"
        yield Finding(CODE, message, "#2135")


def _overwrites_itself(folder: RecordFolder) -> Iterator[Finding]:
    """Find a script that writes its own file: it would pack the packed code with the second seed."""
    writes = re.search(
        r"open\(\s*(?:__file__|['\"]train_gpt\.py['\"])\s*,\s*['\"]w|__file__\)?\.write_(?:text|bytes)",
        folder.source,
    )
    if writes:
        yield Finding(CODE, "overwrites itself: the next seed runs and counts another file", "#1858")


def _broken_word_marker(folder: RecordFolder) -> Iterator[Finding]:
    """Find SentencePiece's word marker, U+2581, turned into a question mark by a wrong encoding."""
    has_marker = "\u2581" in folder.source or "\\u2581" in folder.source
    if re.search(r"startswith\(\s*['\"]\?['\"]\s*\)", folder.source) and not has_marker:
        message = "looks for '?' where SentencePiece marks words with U+2581: bytes are miscounted"
        yield Finding(CODE, message, "#144")


def _train_data_in_evaluation(folder: RecordFolder) -> Iterator[Finding]:
    """Find a function that scores or evaluates, by its name, and opens training shards."""
    try:
        tree = ast.parse(folder.source)
    except (SyntaxError, ValueError, RecursionError):
        return
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef):
            continue
        if not re.search(r"eval|score", node.name) or "train" in node.name:
            continue
        if re.search(r"train_files|fineweb_train|train_shards?\b", ast.unparse(node)):
            yield Finding(CODE, f"{node.name} opens training shards at evaluation", "#1924, #535, #569")


def _uncounted_files(folder: RecordFolder) -> Iterator[Finding]:
    """Find sources and libraries that the code imports or opens, which are not counted."""
    modules = set(re.findall(r"^\s*(?:from|import)\s+(\w+)", folder.source, flags=re.MULTILINE))
    for path in folder.files:
        name = path.rpartition("/")[2]
        if path == CODE or not path.endswith(COUNTED_SUFFIXES) or UNCOUNTED_TOOLS.search(path):
            continue
        if path.endswith((".so", ".pyd")):
            yield Finding(path, "a compiled library is next to the code and is not counted", "#1529")
        elif name.partition(".")[0] in modules or name in folder.source:
            message = "the code needs this file, which is not counted"
            yield Finding(path, message, "#1437, #1514, #2130")


def _disabled_features(folder: RecordFolder) -> Iterator[Finding]:
    """Find features that the README mentions, without saying that they are off, and that a log shows off."""
    for log in folder.logs:
        for setting in sorted(log.disabled_settings):
            feature = feature_of(setting)
            mentioned = re.search(_pattern_of(feature), folder.readme, re.IGNORECASE)
            if feature != setting and mentioned and not says_off(folder.readme, feature):
                message = f"tells of {mentioned[0]}, but {log.name} has {setting} off"
                yield Finding(README, message, "#1855, #2130")


def feature_of(setting: str) -> str:
    """Return the name of the feature that a setting switches.

    >>> feature_of("use_smear"), feature_of("smear_gate_enabled"), feature_of("smear")
    ('smear', 'smear_gate', 'smear')
    """
    for prefix in SETTING_PREFIXES:
        if setting.startswith(prefix):
            setting = setting.removeprefix(prefix)
            break
    for suffix in SETTING_SUFFIXES:
        if setting.endswith(suffix):
            return setting.removesuffix(suffix)
    return setting


def says_off(text: str, feature: str) -> bool:
    """Tell if a text says that a feature is not used."""
    pattern = _pattern_of(feature)
    return any(re.search(p.pattern.format(feature=pattern), text, re.IGNORECASE) for p in OFF_PHRASES)


def _pattern_of(feature: str) -> str:
    """Return a pattern for the name of a feature, whose words may be joined or separated in any way."""
    return r"[ _-]?".join(map(re.escape, feature.split("_")))


def _casefolded_text(folder: RecordFolder) -> Iterator[Finding]:
    """Find a README about text without upper case, from which the original cannot be recovered."""
    if re.search(r"case ?fold", folder.readme, re.IGNORECASE):
        message = "tells of casefolded text: what is scored does not give the original back"
        yield Finding(README, message, "#1578, #1604")


def _order_of_log(log: Log) -> Iterator[Finding]:
    """Check that a log has training, and that no training data is read after evaluation began."""
    has_step_lines = re.search(r"^\s*(?:step[ :]*)?\d+/\d+ ", log.text, re.MULTILINE)
    if log.final_scores and log.steps is None and not has_step_lines:
        yield Finding(log.name, "has a score and no training: it evaluated a stored artifact", "#1787")

    evaluation_began = re.search(r"^\s*quantized\w* val_loss", log.text, re.MULTILINE)
    if evaluation_began is None:
        return
    late = re.search(
        r"^.*(?:calibrat|fitt?(?:ing|ed)?\b|hessian).*train.*$",
        log.text[evaluation_began.end() :],
        re.MULTILINE | re.IGNORECASE,
    )
    if late:
        line = late[0].strip()[:MAX_SHOWN_CHARACTERS]
        yield Finding(log.name, f"reads training data after evaluation began: {line!r}", "#1924, #1851")
