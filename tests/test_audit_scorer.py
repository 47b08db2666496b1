"""Outside scorers audited from the command line: an external scorer passes and its two-pass variant fails.

Also: replay, claims, bounded cost, user errors.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from examples import external_scorer
from examples.external_scorer import ScoresOnly
from stages.audit import isolated
from stages.audit.sandbox import room
from stages.common import bpb, shards
from stages.tokenize import tokenizer
from tools.audit_scorer import cli as outside
from tools.audit_scorer import effort

ROOT = Path(__file__).resolve().parent.parent
SCORERS_FOLDER = Path(__file__).resolve().parent / "scorers"
VOCAB_SIZE = 320
TEXTS = [f"Document {i} says that {i * i} is the square of {i}, and nothing more.\n" * 2 for i in range(40)]


@pytest.fixture(autouse=True)
def modules_of_scorers(monkeypatch: pytest.MonkeyPatch) -> None:
    """audited_scorers.py is found as a user's module is: in a folder of the path."""
    monkeypatch.syspath_prepend(str(SCORERS_FOLDER))


@pytest.fixture(scope="module")
def val(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer of 320 ids and a shard."""
    folder = tmp_path_factory.mktemp("outside")
    (folder / "tokenizer.model").write_bytes(tokenizer.train(TEXTS, VOCAB_SIZE, 1))
    processor = bpb.load_tokenizer(folder / "tokenizer.model")
    tokens = np.concatenate([[processor.bos_id(), *processor.encode(text)] for text in TEXTS])
    shards.write(folder / "val.bin", tokens.astype(np.uint16))
    return folder


def words(val: Path, output: Path, factory: str, *more: str) -> list[str]:
    named = [
        "--scorer",
        f"audited_scorers:{factory}",
        "--tokens",
        str(val / "val.bin"),
        "--tokenizer",
        str(val / "tokenizer.model"),
    ]
    return [*named, "--output", str(output), "--quiet", *more]


def audit(val: Path, output: Path, factory: str, *more: str) -> tuple[int, dict[str, Any]]:
    """The exit code and the report."""
    with pytest.raises(SystemExit) as ended:
        outside.main(words(val, output, factory, *more))
    report = output / "report.json"
    return int(ended.value.code or 0), json.loads(report.read_text()) if report.exists() else {}


def outcomes(report: dict[str, Any]) -> dict[str, str]:
    """The worst outcome of each check."""
    found: dict[str, str] = {}
    for verdict in report["verdicts"]:
        if found.get(verdict["check"]) != "fail":
            found[verdict["check"]] = verdict["outcome"]
    return found


def test_an_external_scorer_is_audited_from_the_command_line(val: Path, tmp_path: Path) -> None:
    """As a user would: the file alone in a folder, with that folder and this repository on the path."""
    example = (ROOT / "examples" / "external_scorer.py").read_text()
    assert "stages" not in example
    default = f"VOCAB_SIZE = {external_scorer.VOCAB_SIZE}"
    assert default in example
    (tmp_path / "mine.py").write_text(example.replace(default, f"VOCAB_SIZE = {VOCAB_SIZE}"))
    command = [word.replace("audited_scorers", "mine") for word in words(val, tmp_path / "audit", "make")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    ended = subprocess.run(
        [sys.executable, "-m", "tools.audit_scorer", *command],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "--nonce" in ended.stdout

    report = json.loads((tmp_path / "audit" / "report.json").read_text())
    found = outcomes(report)
    passed = {check for check, outcome in found.items() if outcome == "pass"}
    assert passed >= {"B1", "B1c", "B2", "B3", "B4", "B5", "B7", "B8", "B9", "B12"}
    assert {found[check] for check in ("B10", "B14", "B15", "B16", "budget")} == {"cannot tell"}
    assert report["conditions"]["C1"] == {"scorer": "pass"}
    assert report["conditions"]["clean room"] == {"files": "cannot tell"}
    assert "## C2: full normalised distribution" in (tmp_path / "audit" / "report.md").read_text()


def test_scores_alone_are_enough_to_pass_and_to_fail(val: Path, tmp_path: Path) -> None:
    code, report = audit(val, tmp_path / "one", "scores_only", "--window", "40")
    found = outcomes(report)
    assert code == 0
    assert {found[check] for check in ("B1", "B3", "B13", "B7", "B9")} == {"pass"}
    assert {found[check] for check in ("B2", "B5", "B8", "B12", "B17")} == {"cannot tell"}
    assert report["conditions"]["C2"] == {"scorer": "cannot tell"}
    assert report["declared"]["targets shown"] > 4 * 40
    # A fixed nonce: B13 misses this scorer at 3 % of the nonces.
    nonce = "6e340b9cffb37a989ca544e6bb780a2c"
    code, report = audit(val, tmp_path / "two", "two_passes", "--window", "40", "--nonce", nonce)
    found = outcomes(report)
    assert code == 1
    assert {found[check] for check in ("B1", "B1c", "B3", "B13")} == {"fail"}


def test_without_a_sandbox_the_four_conditions_cannot_be_told(
    val: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a system that allows no namespaces: the scorer runs, sees its folders, and nothing passes."""
    for module in (isolated, room):
        monkeypatch.setattr(module, "detect_isolation", lambda: room.Isolation(False, "not tried"))
    (tmp_path / "counted").mkdir()
    more = ["--artifact", str(tmp_path / "counted"), "--targets", "12000"]
    code, report = audit(val, tmp_path / "audit", "make", *more)
    assert (code, report["audit_fail"], outcomes(report)["B18"]) == (0, 0, "cannot tell")
    assert {report["conditions"][key]["scorer"] for key in ("C1", "C2", "C3", "C4")} == {"cannot tell"}


def test_the_nonce_repeats_an_audit_and_another_draws_other_positions(
    val: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    audit(val, tmp_path / "a", "scores_only", "--window", "40")
    nonce = capsys.readouterr().out.split()[1].rstrip(":")
    audit(val, tmp_path / "b", "scores_only", "--window", "40", "--nonce", nonce)
    audit(val, tmp_path / "c", "scores_only", "--window", "40")
    reports = [(tmp_path / name / "report.json").read_bytes() for name in "abc"]
    assert reports[0] == reports[1] != reports[2]


def test_a_claim_is_held_against_what_can_be_counted(val: Path, tmp_path: Path) -> None:
    tokens = np.array(shards.view(val / "val.bin"))
    nll = ScoresOnly(VOCAB_SIZE, passes=1).score_stream(tokens)
    np.save(tmp_path / "nll.npy", nll)
    processor = bpb.load_tokenizer(val / "tokenizer.model")
    size = bpb.target_bytes(tokens, bpb.byte_table(processor))

    # A claim that is right, and one with a byte and a second too many.
    right: dict[str, Any] = {
        "ledger": "nll.npy",
        "bpb": bpb.bits_per_byte(nll, size),
        "bytes": int(size.sum()),
        "targets": len(nll),
    }
    seeds = [{"seed": seed, "nats": 2.4 + seed / 1e4, "config": "x"} for seed in range(3)]
    right |= {"seeds": seeds, "baseline_nats": [2.5], "evaluation_seconds": 30.0}
    wrong = right | {"bytes": right["bytes"] + 1, "evaluation_seconds": 601.0}

    # The counted files: a program that reports the claimed score.
    counted = tmp_path / "counted"
    counted.mkdir()
    (counted / "model.bin").write_bytes(b"weights")
    lines = [
        "import json, os, pathlib",
        "os.mkdir('eval')",
        f"pathlib.Path('eval/metrics.json').write_text(json.dumps({{'val_bpb': {right['bpb']!r}}}))",
    ]
    (counted / "train_gpt.py").write_text("\n".join(lines))

    # The original text.
    (tmp_path / "val.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))

    found = []
    for name, claim in (("right", right), ("wrong", wrong)):
        (tmp_path / f"{name}.json").write_text(json.dumps(claim))

        # The audit of that claim.
        more = ["--window", "40", "--claim", str(tmp_path / f"{name}.json")]
        more += [
            "--artifact",
            str(counted),
            "--run",
            "train_gpt.py eval",
            "--text",
            str(tmp_path / "val.jsonl"),
        ]
        found.append(audit(val, tmp_path / name, "scores_only", *more))

    assert [code for code, _ in found] == [0, 1]
    assert {outcomes(found[0][1])[check] for check in ("B6", "B11", "B16", "budget")} == {"pass"}
    assert found[0][1]["conditions"]["metric"] == {"files": "pass", "scorer": "pass"}
    assert {verdict["name"]: verdict["outcome"] for verdict in found[0][1]["verdicts"]}[
        "runs from the counted files alone"
    ] == "pass"
    assert {check for check, outcome in outcomes(found[1][1]).items() if outcome == "fail"} == {
        "B11",
        "budget",
    }


def test_training_text_is_held_against_the_stream(val: Path, tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    shards.write(tmp_path / "train" / "train_000000.bin", np.array(shards.view(val / "val.bin"))[:600])
    code, report = audit(
        val, tmp_path / "audit", "scores_only", "--window", "40", "--train", str(tmp_path / "train")
    )
    assert (code, outcomes(report)["B15"]) == (1, "fail")


@pytest.mark.parametrize(("level", "allowed"), [("quick", 10_000), ("quick", 30_000), ("exhaustive", 40_000)])
def test_the_cost_is_bounded_by_what_is_allowed(val: Path, tmp_path: Path, level: str, allowed: int) -> None:
    _, report = audit(val, tmp_path, "with_variants", "--level", level, "--targets", str(allowed))
    assert report["audit_passed"] == 1
    assert allowed / 3 < asked_targets(report) <= allowed


def asked_targets(report: dict[str, Any]) -> int:
    """Targets that the scorer scored or observed, in all of its processes."""
    found = re.search(r"(\d+) targets scored", report["declared"]["work"])
    assert found is not None
    return int(found[1])


def test_a_level_without_a_limit_is_not_reduced() -> None:
    params, shown, probed = effort.fit_stepwise_scorer(effort.EFFORTS["exhaustive"], None, 1000, VOCAB_SIZE)
    assert params == effort.EFFORTS["exhaustive"].params()
    assert shown == probed == 1000


@pytest.mark.parametrize(("level", "allowed"), [("quick", 200_000), ("exhaustive", 400_000)])
def test_the_cost_of_a_scorer_without_forks_is_bounded_too(
    val: Path, tmp_path: Path, level: str, allowed: int
) -> None:
    more = ["--level", level, "--targets", str(allowed), "--window", "40"]
    _, report = audit(val, tmp_path, "scores_with_variants", *more)
    assert report["audit_passed"] == 1
    assert allowed / 5 < asked_targets(report) <= allowed


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--scorer", "nowhere"], "expected module:factory"),
        (["--scorer", "no_such_module:f"], "there is no module no_such_module"),
        (["--scorer", "audited_scorers:VOCAB_SIZE"], "raised TypeError: 'int' object is not callable"),
        (["--scorer", "audited_scorers:nobody"], "has no attribute 'nobody'"),
        (["--scorer", "os.path:isabs"], "raised TypeError"),
        (["--scorer", "builtins:str"], "lacks predict, observe, fork"),
        (["--nonce", "xyz"], "hexadecimal"),
        (["--targets", "50"], "too few"),
        (["--tokens", "nowhere.bin"], "does not exist"),
        (["--artifact", "nowhere"], "expected a folder"),
        (["--claim", "pyproject.toml"], "--claim"),
    ],
)
def test_misuse_is_one_line_and_exit_code_2(
    val: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    code, report = audit(val, tmp_path / "audit", "make", *more)
    errors = capsys.readouterr().err.splitlines()
    assert (code, report, len(errors)) == (2, {}, 1)
    assert errors[0].startswith("error: audit_scorer: ")
    assert message in errors[0]


@pytest.mark.parametrize(
    ("factory", "raised"),
    [
        ("raises_in_predict", "ValueError: shapes differ"),
        ("raises_in_factory", "FileNotFoundError: weights.bin"),
    ],
)
def test_an_error_inside_the_scorer_is_reported_with_its_name(
    val: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], factory: str, raised: str
) -> None:
    code, _ = audit(val, tmp_path / "audit", factory)
    scorer = f"audited_scorers:{factory}"
    message = f"error: audit_scorer: {scorer} raised {raised}; it could not be audited\n"
    assert (code, capsys.readouterr().err) == (2, message)


def test_a_report_that_cannot_be_written_is_not_blamed_on_the_scorer(
    val: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("not a folder")
    code, _ = audit(val, tmp_path / "file" / "audit", "make")
    error = capsys.readouterr().err
    assert code == 2
    assert error.startswith("error: audit_scorer: ")
    assert "Not a directory" in error
    assert "raised" not in error


def test_a_claim_of_the_wrong_type_is_a_user_error(
    val: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "claim.json").write_text('{"seeds": 3}')
    code, _ = audit(val, tmp_path / "audit", "make", "--claim", str(tmp_path / "claim.json"))
    assert code == 2
    assert f"--claim {tmp_path / 'claim.json'}: " in capsys.readouterr().err
