"""Record folders of others: a sound one is clean, and a made-up one for each known defect is found out."""

import base64
import functools
import json
import lzma
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stages.common.challenge import VALIDATION_BYTES
from tests import miniature_run
from tools.check_record import cli as check
from tools.check_record import folder, logs, source

TOKENS = 40_540_160
STEPS = {42: 4550, 314: 4561, 999: 4548}
BPB = {42: 1.08079352, 314: 1.08103112, 999: 1.08118451}
MODEL = {42: 15_975_300, 314: 15_976_325, 999: 15_976_011}
SOURCE = "import glob\n\n\ndef eval_val(h):\n    return sum(map(len, glob.glob(h.val_files))), '\u2581'\n"


@functools.cache
def wrapped(source: str) -> bytes:
    """A train_gpt.py as the challenge's records ship it."""
    packed = base64.b85encode(lzma.compress(source.encode(), preset=0))
    return f"import lzma as L,base64 as B\nexec(L.decompress(B.b85decode({packed.decode()!r})))\n".encode()


@dataclass
class Made:
    """A record folder before it is written. It is sound; a test changes something in it."""

    source: str = SOURCE
    raw: bool = False  # ship the source as it is, where the wrapped one is counted
    settings: dict[str, Any] = field(
        default_factory=lambda: {"ttt_epochs": 2, "train_shards": 80, "smear_enabled": True}
    )
    tokens: int = TOKENS
    counted_bytes: float = VALIDATION_BYTES  # that the scores are over
    bpb: dict[int, float] = field(default_factory=lambda: dict(BPB))
    steps: dict[int, int] = field(default_factory=lambda: dict(STEPS))
    model: dict[int, int] = field(default_factory=lambda: dict(MODEL))
    code_in_log: dict[int, int] = field(default_factory=dict)  # where a log's is another than the file's
    train_ms: int = 588_047
    hessians: str = "10.7"
    eval_ms: int = 366_525
    more_log: str = ""
    training: bool = True
    summary: Callable[[dict[str, Any]], None] = lambda summary: None
    readme: Callable[[str], str] = lambda text: text
    more: dict[str, bytes] = field(default_factory=dict)
    seeds_with_log: tuple[int, ...] = (42, 314, 999)

    def code(self) -> bytes:
        return wrapped(self.source)

    def write(self, path: Path) -> Path:
        path.mkdir()
        (path / "train_gpt.py").write_bytes(self.source.encode() if self.raw else self.code())
        for seed in self.seeds_with_log:
            (path / f"train_seed{seed}.log").write_text(self.log(seed))
        (path / "submission.json").write_text(json.dumps(self.submission()))
        (path / "README.md").write_text(self.readme(self.page()))
        for name, data in self.more.items():
            (path / name).write_bytes(data)
        return path

    def total(self, seed: int) -> int:
        return self.model[seed] + self.code_in_log.get(seed, len(self.code()))

    def log(self, seed: int) -> str:
        bpb = self.bpb[seed]
        loss = bpb * math.log(2) * self.counted_bytes / self.tokens
        settings = "".join(f"{name}: {value}\n" for name, value in self.settings.items())
        training = (
            "4000/20000 val_loss: 2.8722 val_bpb: 1.1119\n"
            f"stopping_early: wallclock_cap train_time: {self.train_ms}ms step: {self.steps[seed]}/20000\n"
        )
        return (
            f"Hyperparameters:\n{settings}seed: {seed}\nval_tokens: {self.tokens}\n"
            f"{training if self.training else ''}GPTQ:collected 67 Hessians in {self.hessians}s\n"
            "pre-quantization post-ema val_loss:2.80853 val_bpb:1.08735 eval_time:7480ms\n"
            "Serialized model: 135426937 bytes\n"
            f"Code size: {self.code_in_log.get(seed, len(self.code()))} bytes\n"
            f"Serialized model quantized+brotli: {self.model[seed]} bytes\n"
            f"Total submission size quantized+brotli: {self.total(seed)} bytes\n{self.more_log}"
            f"quantized_ttt val_loss:{loss:.8f} val_bpb:{bpb:.8f} eval_time:{self.eval_ms}ms\n"
        )

    def submission(self) -> dict[str, Any]:
        rows = {
            str(seed): {"val_bpb": round(bpb, 5), "artifact_bytes": self.total(seed)}
            for seed, bpb in self.bpb.items()
        }
        scores = [row["val_bpb"] for row in rows.values()]
        summary: dict[str, Any] = {
            "author": "someone",
            "track": "10min_16mb",
            "val_bpb": round(float(np.mean(scores)), 5),
            "val_bpb_std": round(float(np.std(scores, ddof=1)), 5),
            "bytes_total": max(self.total(seed) for seed in self.bpb),
            "seeds": list(self.bpb),
            "seed_results": rows,
        }
        self.summary(summary)
        return summary

    def page(self) -> str:
        rows = "".join(
            f"| {seed} | {STEPS[seed]:,} | **{bpb:.4f}** | {self.total(seed):,} |\n"
            for seed, bpb in BPB.items()
        )
        return (
            "# SP8192, looped\n\n**val_bpb = 1.0810** (3-seed mean)\n\n"
            "| Seed | Steps | TTT BPB | Artifact bytes |\n|---|---:|---:|---:|\n"
            f"{rows}\nScore-first TTT, 2 epochs; 4,550 steps in 588 s; SmearGate.\n"
        )


def set_in(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda summary: summary.update({key: value})


def set_in_seed(seed: int, key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda summary: summary["seed_results"][str(seed)].update({key: value})


def append(text: str) -> Callable[[str], str]:
    return lambda page: page + text


def swap(old: str, new: str) -> Callable[[str], str]:
    def change(page: str) -> str:
        assert old in page
        return page.replace(old, new)

    return change


def found_in(path: Path) -> list[str]:
    return [finding.line() for finding in check.findings(folder.read_folder(path))]


def test_a_sound_folder_is_clean(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = Made().write(tmp_path / "sound")
    assert found_in(path) == []
    with pytest.raises(SystemExit) as ended:
        check.main([str(path)])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert (
        "3 logs, seeds 42, 314, 999, record track\nnothing was found\ncannot be checked from files alone: "
        in printed
    )
    assert folder.read_folder(path).source == SOURCE  # unwrapped, and not run


RAW = "x = 1\n" * 9000
TALL = Made()
# Name, folder, and the finding about it. D numbers are those of docs/defects.md.
DEFECTS: dict[str, tuple[Made, str]] = {
    # Counts and data.
    "D1 leading spaces twice": (
        Made(counted_bytes=VALIDATION_BYTES * 1.167),
        r"\(\+16\.70%\): leading spaces counted twice",
    ),
    "D2 marker": (Made(source="def f(p):\n    return p.startswith('?')\n"), r"looks for '\?'"),
    "D3 fallback bytes": (
        Made(counted_bytes=157_319_833),
        r"\(\+4\.13%\): byte-fallback pieces counted as three bytes",
    ),
    "D4 sidecar off": (
        Made(tokens=47_851_520, counted_bytes=164_594_398),
        r"\(\+8\.95%\): CaseOps' transformed text",
    ),
    "D5 casefold": (Made(readme=append("\nCasefold tokenizer.\n")), r"casefolded text"),
    "D6 no documents": (Made(more_log="num_docs: 0\n"), r"no documents: BOS was not written"),
    "D7 ten thousand documents": (
        Made(tokens=9_662_464, counted_bytes=36e6),
        r"scored 9,662,464 tokens: the first 10,000 documents",
    ),
    "D8 val in train": (Made(settings={"train_shards": 1499}), r"1,499 train shards, but there are 128"),
    "D10 lost shards": (
        Made(tokens=36_562_944, counted_bytes=136.2e6),
        r"scored 36,562,944 tokens: a partition that lost shards",
    ),
    "D11 subset": (Made(tokens=8_000_000, counted_bytes=29_365_687), r"scored 8,000,000 tokens, a subset"),
    "D11 subset in words": (
        Made(readme=append("\nPPM on the first 8M tokens.\n")),
        r"README\.md: says 'first 8M tokens'",
    ),
    "D11 mixture on a prefix": (
        Made(more_log="ppm_mix bytes=29365687 mix_bpb=0.994872\n"),
        r"train_seed42\.log: says 'ppm_mix'",
    ),
    "D11 unknown count": (
        Made(tokens=30_000_000, counted_bytes=111e6),
        r"scored 30,000,000 tokens; known are 40,540,160",
    ),
    "D12 shards missing": (Made(settings={"train_shards": 39}), r"39 train shards of 80 or 128"),
    "D17 Hessians after the deadline": (
        Made(train_ms=599_600, hessians="4.7"),
        r"4\.7 s of Hessians on training data are over 600 s",
    ),
    "D18 over the training budget": (Made(train_ms=602_048), r"trained for 602\.0 s"),
    "D19 over the evaluation budget": (Made(eval_ms=688_000), r"evaluated for 688\.0 s"),
    # Artifact and reproducibility.
    "D21 over the cap": (
        Made(model=dict.fromkeys(MODEL, 16_042_632)),
        r"submission\.json: 16,042,\d+ bytes are over the cap",
    ),
    "D21 over the cap with what is shipped": (
        Made(source=RAW, raw=True),
        r"with the code on disk the artifact has 16,030,325 bytes, over 16,000,000",
    ),
    "D22 wrapper never shipped": (
        Made(raw=True, source=RAW),
        r"a raw source is shipped, but a wrapped one is counted",
    ),
    "D23 overwrites itself": (
        Made(source="open(__file__, 'w').write('x')\n"),
        r"overwrites itself: the next seed",
    ),
    "D23 packs the packed": (Made(code_in_log={314: 16_104}), r"the code has other sizes for other seeds"),
    "D24 programs": (
        Made(source="import subprocess\nsubprocess.run(['lrzip', '-z'])\n"),
        r"needs lrzip on the machine",
    ),
    "D25 library": (Made(more={"evt.so": b"\x7fELF"}), r"evt\.so: a compiled library"),
    "D26 sources beside": (
        Made(source="import lossless_caps\n", more={"lossless_caps.py": b"x=1"}),
        r"lossless_caps\.py: the code needs this",
    ),
    "D26 C beside": (
        Made(source="open('expert.c').read()\n", more={"expert.c": b"int x;"}),
        r"expert\.c: the code needs this file",
    ),
    "D27 silent fallback": (
        Made(source="import shutil, brotli\npack = 'lrzip' if shutil.which('lrzip') else 'brotli'\n"),
        r"falls back to brotli if lrzip is missing",
    ),
    "D28 other code": (Made(code_in_log={42: 16_630}), r"the code has other sizes for other seeds"),
    "D29 steps in submission.json": (
        Made(summary=set_in("steps", 3770)),
        r"seed 42: 3,770 steps, its log says 4,550",
    ),
    "D29 steps in README": (
        Made(readme=swap("4,550 steps in", "3,770 steps in")),
        r"says 3,770 steps, the logs 4,548, 4,550, 4,561",
    ),
    "D29 steps in the table": (
        Made(readme=swap("| 314 | 4,561", "| 314 | 3,770")),
        r"seed 314: 3,770 steps, its log says 4,561",
    ),
    "D29 epochs": (Made(readme=swap("2 epochs", "3 epochs")), r"says 3 epochs, the logs say 2"),
    "D29 model for total": (
        Made(summary=set_in_seed(42, "artifact_bytes", MODEL[42])),
        r"15,975,300 \(the model's alone\), its log says",
    ),
    "D29 code bytes": (
        Made(summary=set_in("bytes_code", 32_500)),
        r"submission\.json counts 32,500: the file is not what was counted",
    ),
    "D30 best of more": (
        Made(more={"train_seed7.log": TALL.log(42).replace("seed: 42", "seed: 7").encode()}),
        r"there is a log of seed 7, which the record leaves out",
    ),
    "D30 seed without log": (
        Made(seeds_with_log=(42, 314)),
        r"seed 999 is claimed, but there is no log of it",
    ),
    "D30 headline": (
        Made(readme=swap("val_bpb = 1.0810", "val_bpb = 1.0435")),
        r"its val_bpb is 1\.0435, that of submission\.json 1\.081",
    ),
    "D30 score not in the log": (
        Made(summary=set_in_seed(314, "val_bpb", 1.0791)),
        r"seed 314: val_bpb 1\.0791 is not in its log",
    ),
    "D30 mean": (
        Made(summary=set_in("val_bpb", 1.0805)),
        r"val_bpb 1\.0805 is not the mean of its seeds, 1\.081",
    ),
    "D30 deviation": (
        Made(summary=set_in("val_bpb_std", 0.00002)),
        r"val_bpb_std 2e-05 is not the sample deviation",
    ),
    "D30 table": (
        Made(readme=swap("**1.0812**", "**1.0802**")),
        r"seed 999: tt?t? bpb 1\.0802 is not in its log",
    ),
    "D31 stored artifact": (
        Made(training=False),
        r"has a score and no training: it evaluated a stored artifact",
    ),
    "D32 feature that was off": (
        Made(settings={"smear_enabled": False}),
        r"tells of Smear, but train_seed42\.log has smear_enabled off",
    ),
    "D34 fitted at evaluation": (
        Made(
            more_log="quantized val_loss:2.84 val_bpb:1.0997 eval_time:1ms\n"
            "calibrating logits on 100000 train tokens\n"
        ),
        r"reads training data after evaluation began",
    ),
    "D34 opens train at evaluation": (
        Made(source="def eval_ttt(h):\n    return open(h.train_files)\n"),
        r"eval_ttt opens training shards at evaluation",
    ),
    # The four findings on #1858.
    "#1858 total of one seed": (
        Made(summary=set_in("bytes_total", TALL.total(42))),
        r"bytes_total 15,975,\d+ is not the worst seed's",
    ),
    "#1858 code overwritten": (
        Made(source="import pathlib\npathlib.Path(__file__).write_text('x')\n"),
        r"overwrites itself: the next seed runs and counts another file",
    ),
    "#1858 code by seed": (
        Made(code_in_log={999: 16_104}),
        r"train_seed999\.log 16,104; they ran different code, or packed the packed",
    ),
    "#1858 raw code": (
        Made(raw=True, source=RAW),
        r"54,000 bytes on disk, train_seed314\.log counts \d+: a raw source",
    ),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_each_known_defect_is_found(name: str, tmp_path: Path) -> None:
    made, expected = DEFECTS[name]
    lines = found_in(made.write(tmp_path / "folder"))
    assert any(re.search(expected, line) for line in lines), "\n".join(lines)
    assert all(re.search(r" \[.*(?:#\d+|rules).*\]$", line) for line in lines)


@pytest.mark.parametrize("phrase", source.OFF_PHRASES)
def test_a_feature_that_a_readme_says_is_off(phrase: source.Phrase) -> None:
    """Each way to say so is found by its own pattern; a mere mention by none."""
    for text in phrase.examples:
        assert re.search(phrase.pattern.format(feature="smear"), text, re.IGNORECASE)
        assert source.says_off(text, "smear")
    assert not source.says_off("The smear gate looks at the token before.", "smear")
    assert source.feature_of("use_smear_gate") == source.feature_of("smear_gate_fixed") == "smear_gate"


def test_what_a_folder_cannot_show_is_said() -> None:
    assert any("#1923" in text for text in source.NOT_CHECKED)  # D33
    assert any("#1858" in text for text in source.NOT_CHECKED)  # D35


@pytest.mark.parametrize(
    ("summary", "expected"),
    [
        ("{", "submission.json: is not JSON"),
        ("[]", "submission.json: holds list, expected a JSON object"),
        ("{}", "states no val_bpb"),
        (
            '{"val_bpb": 1.2, "seeds": "4", "seed_results": [1, {"seed": "x"}], "bytes_total": "16,000,001"}',
            "16,000,001 bytes are over the cap",
        ),
        ('{"val_bpb": "1.08", "seed_results": {"42": 3}}', "states no size"),
    ],
)
def test_whatever_submission_json_holds_is_read(summary: str, expected: str, tmp_path: Path) -> None:
    path = Made().write(tmp_path / "odd")
    (path / "submission.json").write_text(summary)
    assert any(expected in line for line in found_in(path))


@pytest.mark.parametrize("kept", [("submission.json",), ("README.md",), ("train_gpt.py",)])
def test_a_folder_of_one_file_is_read(kept: tuple[str, ...], tmp_path: Path) -> None:
    path = Made().write(tmp_path / "part")
    for file in path.iterdir():
        if file.name not in kept:
            file.unlink()
    assert any("no figure can be checked" in line for line in found_in(path))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nowhere", "nowhere is not a folder"),
        ("empty", "name the folder of one record"),
        ("artifacts/submission", "has no train_gpt.py; run `dvc repro submission` or `dvc pull`"),
    ],
)
def test_nothing_to_check_is_exit_code_2(
    given: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit) as ended:
        check.main([str(tmp_path / given)])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: check_record: ")
    assert message in line


def test_findings_are_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        check.main([str(Made(raw=True).write(tmp_path / "raw"))])
    assert ended.value.code == 1
    assert "1 findings" in capsys.readouterr().out


def test_other_names_and_forms_are_understood(tmp_path: Path) -> None:
    """Per-seed results as a list, sizes as words, seeds only there; a log called otherwise."""
    made = Made()
    rows = [
        {
            "seed": seed,
            "bpb": round(bpb, 4),
            "total_bytes": f"{made.total(seed):,}",
            "step_stop": STEPS[seed],
            "train_time_s": 588.0,
        }
        for seed, bpb in BPB.items()
    ]
    made.summary = lambda summary: summary.update({"seed_results": rows, "seeds": None})
    path = made.write(tmp_path / "other")
    for seed in BPB:
        (path / f"train_seed{seed}.log").rename(path / f"log_Seed-{seed}.txt")
    assert found_in(path) == []
    rows[0]["step_stop"] = 1
    rows[1]["train_time_s"] = 601.3
    assert len(found_in(made.write(tmp_path / "wrong"))) == 2


def test_a_log_in_the_words_of_our_stages() -> None:
    text = (
        "   181.4s train: 400 steps in 174.0 s, 2,355 tokens/s\n"
        "     7.0s calibrate: 42 Hessians from 32,768 tokens, data read for 2.7 s\n"
        "     6.1s bundle: 67 modules, 216,574 characters stripped, 58,538 bytes packed\n"
        "    23.3s sliding_eval: 2.186220 bpb over 57,738 targets, 151,916 bytes\n"
        "    49.6s audit: pass: files budget bytes:"
        " 417758 (model.bin) + 58538 (train_gpt.py) = 476296 bytes on disk\n"
    )
    log = logs.parse_log("train_seed999.log", text)
    assert log is not None
    assert (log.seed, log.steps, log.tokens, log.bytes) == (999, 400, 57_738, 151_916)
    assert (log.bytes_model, log.bytes_code, log.bytes_total) == (417_758, 58_538, 476_296)
    assert (log.train_seconds, log.hessian_seconds) == (174.0, 2.7)
    assert [score.bpb for score in log.final_scores] == [2.18622]
    assert logs.parse_log("notes.txt", "nothing of a run") is None


def test_our_words_on_the_record_track(tmp_path: Path) -> None:
    """The whole stream with its tail is not a subset; the clocks of each run are judged."""
    path = tmp_path / "ours"
    path.mkdir()
    code, model = b"print()\n", 15_900_000
    total = model + len(code)

    summary: dict[str, Any] = {
        "track": "10min_16mb",
        "val_bpb": 1.05,
        "bytes_total": total,
        "seeds": [1, 2, 3],
        "seed_results": {str(seed): {"val_bpb": 1.05, "bytes_total": total} for seed in (1, 2, 3)},
        "measured": {
            str(seed): {"training_seconds": 590.0, "evaluation_seconds": 500.0} for seed in (1, 2, 3)
        },
        "coverage": {"targets": 40_541_162, "bytes": 151_080_000},
    }

    (path / "train_gpt.py").write_bytes(code)
    sizes = f"{model} (model.bin) + {len(code)} (train_gpt.py) = {total} bytes on disk"

    log = (
        "     9.0s train: 4600 steps in 588.0 s, 2,355 tokens/s\n"
        "     9.1s calibrate: 66 Hessians, data read for 2.7 s\n"
        f"     9.2s audit: pass: files budget bytes: {sizes}\n"
        "     9.3s ttt_eval: 1.050000 bpb over 40,541,162 targets, 151,080,000 bytes\n"
    )

    for seed in (1, 2, 3):
        (path / f"train_seed{seed}.log").write_text(log)
    (path / "submission.json").write_text(json.dumps(summary))
    assert found_in(path) == []

    summary["measured"]["2"] = {"training_seconds": 600.5, "evaluation_seconds": 601.0}
    (path / "submission.json").write_text(json.dumps(summary))
    assert [line.partition(" [")[0] for line in found_in(path)] == [
        "submission.json: seed 2: train_seconds 600.5 is over 600",
        "submission.json: seed 2: eval_seconds 601.0 is over 600",
    ]


def test_our_own_submission_is_clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of one seed; tests/test_record_cli.py has one of three."""
    monkeypatch.chdir(tmp_path)
    miniature_run.make(tmp_path)
    assert found_in(miniature_run.run(tmp_path)) == []
