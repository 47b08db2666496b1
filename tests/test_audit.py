"""audit: the lawful scorer passes everything, every cheat fails, by the check that is named for it."""

import dataclasses
import hashlib
import importlib
import itertools
import json
import math
import pkgutil
from pathlib import Path

import numpy as np
import pytest

import stages.audit
from stages.audit import catalogue, probe_runner, sampling, stage
from stages.audit import report as render
from stages.audit.checks import (
    budgets,
    call_invariance,
    canary,
    causality,
    coverage,
    document_order,
    normalisation,
    normalisation_blackbox,
)
from stages.audit.precision import FLOAT32
from stages.audit.verdict import Check, Verdict, Words, failure_message, failures
from stages.common import bpb, shards
from stages.common.scorer import Scorer
from stages.common.stage import launch
from tests.audit_inputs import SECTIONS, write_artifacts
from tests.zoo import acausal, lawful, unnormalised
from tests.zoo.harness import (
    BOUNDARIES,
    BYTES,
    KEY,
    PARAMS,
    TOKENS,
    audit,
    chunk_table,
    count_decoded_bytes,
    failed_checks,
)


def by_name(verdicts: list[Verdict], name: str) -> Verdict:
    return next(verdict for verdict in verdicts if verdict.check.name == name)


@pytest.mark.parametrize("run", range(10))
def test_the_lawful_scorer_passes_everything(run: int, tmp_path: Path) -> None:
    verdicts = audit(lawful.Bigram, tmp_path, key=bytes([run]))
    assert {verdict.outcome for verdict in verdicts} == {"pass"}, [
        failure_message(verdict) for verdict in failures(verdicts)
    ]


def test_looking_one_token_ahead_fails_perturbation(tmp_path: Path) -> None:
    verdicts = audit(acausal.LookAhead, tmp_path)
    assert {
        "B1 future perturbation",
        "B3 counterfactual sum",
        "B4 ledger equals commitment",
    } <= failed_checks(verdicts)
    moved = by_name(verdicts, "future perturbation")
    assert moved.positions
    assert moved.saw != moved.expected
    assert "moved from" in moved.evidence


def test_a_second_pass_fails_perturbation_and_the_ledger(tmp_path: Path) -> None:
    assert {"B1 future perturbation", "B1 ledger without the future"} <= failed_checks(
        audit(acausal.SecondPass, tmp_path)
    )


def test_a_gate_that_knows_the_target_fails_the_counterfactual_sum(tmp_path: Path) -> None:
    verdicts = audit(unnormalised.TargetGate, tmp_path)
    assert "B3 counterfactual sum" in failed_checks(verdicts)
    assert "B1 future perturbation" not in failed_checks(verdicts)
    total = by_name(verdicts, "counterfactual sum").saw
    assert total is not None
    assert total > 1.01


def test_updating_before_scoring_fails_the_counterfactual_sum(tmp_path: Path) -> None:
    assert "B3 counterfactual sum" in failed_checks(audit(acausal.UpdateFirst, tmp_path))


def test_probabilities_that_do_not_sum_to_one_fail(tmp_path: Path) -> None:
    verdicts = audit(unnormalised.HashedBuckets, tmp_path)
    assert failed_checks(verdicts) == {
        "B3 committed distribution sums to one",
        "B8 self-sampled canary",
        "B17 certified sums",
        "B17 ledger equals certified score",
    }
    assert by_name(verdicts, "committed distribution sums to one").saw == pytest.approx(math.log(2))


def test_knowing_where_the_document_ends_fails_perturbation(tmp_path: Path) -> None:
    assert "B1 future perturbation" in failed_checks(audit(acausal.DocumentLength, tmp_path))


def test_a_dropped_tail_fails_coverage(tmp_path: Path) -> None:
    assert {"B6 coverage", "B6 protocol"} <= failed_checks(audit(acausal.DroppedTail, tmp_path))
    assert failed_checks(audit(lawful.Bigram, tmp_path, edit=lambda nll: nll[:-5])) == {"B6 coverage"}


def test_scoring_a_subset_fails_the_commitment(tmp_path: Path) -> None:
    # This key draws odd positions only, as one in 2^15 keys does. There this cheat is honest, and
    # substitution does not see it: that is why a position commits to a run of targets.
    assert {
        place % 2 for place in sampling.distribution_positions(KEY, len(TOKENS), PARAMS.distributions)
    } == {1}
    assert "B4 ledger equals commitment" in failed_checks(audit(acausal.Subset, tmp_path))


def test_missing_losses_fail_coverage(tmp_path: Path) -> None:
    nll = lawful.Bigram(len(BYTES)).score_stream(TOKENS)
    for bad in (np.nan, np.inf, -1.0):
        edited = nll.copy()
        edited[100] = bad
        verdict = coverage.check_ledger("x", edited, len(BYTES))
        assert (verdict.outcome, verdict.positions) == ("fail", (101,))


def test_learning_from_the_whole_stream_fails_recomputation_alone(tmp_path: Path) -> None:
    assert failed_checks(audit(acausal.PeekAtStream, tmp_path)) == {
        "B1 ledger without the future",
        "B4 ledger equals commitment",
        "B17 ledger equals certified score",
    }


def test_a_fork_that_shares_state_fails(tmp_path: Path) -> None:
    assert "B2 own-token independence" in failed_checks(audit(acausal.SharedState, tmp_path))


def test_a_prediction_that_changes_when_it_is_read_fails(tmp_path: Path) -> None:
    assert "B2 own-token independence" in failed_checks(audit(acausal.LooksChange, tmp_path))


def test_an_edited_ledger_fails(tmp_path: Path) -> None:
    assert {"B1 ledger without the future", "B4 ledger equals commitment"} <= failed_checks(
        audit(lawful.Bigram, tmp_path, edit=lambda nll: nll * np.float32(0.99))
    )
    # a little everywhere, below what one loss may differ by: the mean shows it
    assert failed_checks(audit(lawful.Bigram, tmp_path, edit=lambda nll: nll - np.float32(5e-5))) == {
        "B1 ledger without the future",
        "B17 ledger equals certified score",
    }


def test_a_single_edited_loss_is_found_when_every_target_is_recomputed(tmp_path: Path) -> None:
    def one(nll: np.ndarray) -> np.ndarray:
        edited = nll.copy()
        edited[1717] = 0.0
        return edited

    verdicts = audit(
        lawful.Bigram, tmp_path, edit=one, params=dataclasses.replace(PARAMS, recomputed_share=1.0)
    )
    assert failed_checks(verdicts) == {"B1 ledger without the future", "B17 ledger equals certified score"}
    assert by_name(verdicts, "ledger without the future").positions == (1718,)


def test_a_target_gate_fails_sampled_substitution(tmp_path: Path) -> None:
    sampled = dataclasses.replace(PARAMS, substitutions=8)
    assert "B3 counterfactual sum" in failed_checks(audit(unnormalised.TargetGate, tmp_path, params=sampled))
    assert not failed_checks(audit(lawful.Bigram, tmp_path, params=sampled))


def test_a_reported_number_must_follow_from_the_ledger() -> None:
    nll = lawful.Bigram(len(BYTES)).score_stream(TOKENS)
    right = bpb.bits_per_byte(nll, BYTES)
    assert coverage.check_reported("x", nll, right, count_decoded_bytes()).outcome == "pass"
    assert coverage.check_reported("x", nll, right * (1 - 1e-9), count_decoded_bytes()).outcome == "fail"
    assert coverage.check_reported("x", nll, None, count_decoded_bytes()).outcome == "fail"
    assert coverage.check_reported("x", None, right, count_decoded_bytes()).outcome == "cannot tell"


def test_a_chunk_table_must_cover_every_target_once(tmp_path: Path) -> None:
    nll = lawful.Bigram(len(BYTES)).score_stream(TOKENS)
    table = chunk_table(nll, tmp_path)
    lines = table.splitlines()
    assert coverage.check_chunks("x", table, nll, BYTES).outcome == "pass"
    for broken in (lines[:-1], [*lines[:2], *lines[3:]], [*lines, lines[-1]], [lines[0].upper(), *lines[1:]]):
        assert coverage.check_chunks("x", "\n".join(broken), nll, BYTES).outcome == "fail"
    assert coverage.check_chunks("x", table, nll * np.float32(0.9), BYTES).outcome == "fail"


def test_the_denominator_is_counted_from_decoded_text() -> None:
    folder = Path(__file__).parents[2] / "shared" / "data"
    models = sorted(folder.rglob("*.model"))
    if not models:
        pytest.skip("the shared tokenizer is not on this machine")
    tokenizer = bpb.load_tokenizer(models[0])
    table = bpb.byte_table(tokenizer)
    texts = ["The cat sat.", "naïve 123 \u2603 \U0001f600", "a", "two\nlines  and   spaces"]
    tokens = np.concatenate([[table.bos, *tokenizer.encode(text)] for text in texts]).astype(np.uint16)
    size = bpb.target_bytes(tokens, table)
    decoded = coverage.count_decoded_bytes(tokens, tokenizer)
    assert coverage.check_denominator(tokens, table.bos, size, decoded).outcome == "pass"
    doubled = size + table.leading_space[tokens[1:]]
    verdict = coverage.check_denominator(tokens, table.bos, doubled, decoded)
    assert verdict.outcome == "fail"
    assert verdict.positions[0] == 0


def test_sizes_and_clocks_over_budget_fail_and_passing_verdicts_hold_no_time() -> None:
    assert budgets.check_sizes({"model.bin": 60, "train_gpt.py": 40}, 100).outcome == "pass"
    over = budgets.check_sizes({"model.bin": 61, "train_gpt.py": 40}, 100)
    assert over.outcome == "fail"
    assert "101 bytes" in over.evidence
    assert budgets.check_clock("training", "files", 599.9, 600.0) == budgets.check_clock(
        "training", "files", 1.5, 600.0
    )
    over_time = budgets.check_clock("training", "files", 600.1, 600.0)
    assert (over_time.outcome, over_time.shown_numbers) == ("fail", (600.1, "within", 600.0))
    assert budgets.check_clock("training", "files", None, 600.0).outcome == "cannot tell"


def test_a_val_document_in_train_is_found() -> None:
    val = budgets.document_hashes(TOKENS, lawful.BOS)
    train = np.sort(budgets.document_hashes(lawful.random_stream(seed=9), lawful.BOS))
    first = next(shards.documents(TOKENS, lawful.BOS))
    assert val[0].tobytes() == hashlib.sha256(first.astype("<u2").tobytes()).digest()[:8]
    both = np.concatenate([train, np.sort(val)])
    assert budgets.check_disjoint(val, both, len(train), len(val)).outcome == "pass"
    assert budgets.check_disjoint(val, both, None, len(val)).outcome == "cannot tell"
    planted = np.concatenate([np.sort([*train, val[3]]).astype("<u8"), np.sort(val)])
    assert "1 of" in budgets.check_disjoint(val, planted, len(train) + 1, len(val)).evidence
    assert budgets.check_disjoint(val, planted, len(train) + 1, len(val)).outcome == "fail"
    assert budgets.check_disjoint(val[1:], both, len(train), len(val)).outcome == "fail"
    assert budgets.check_shards({"a.bin": "1"}, {"a.bin": "2"}).outcome == "fail"


def test_positions_follow_from_the_key_and_reach_every_kind_of_edge() -> None:
    groups = sampling.perturbation_groups(KEY, TOKENS, lawful.BOS, BOUNDARIES, 20, 64)
    again = sampling.perturbation_groups(KEY, TOKENS, lawful.BOS, BOUNDARIES, 20, 64)
    other = sampling.perturbation_groups(b"other", TOKENS, lawful.BOS, BOUNDARIES, 20, 64)
    assert groups == again != other
    assert {group.kind for group in groups} == {"chunk", "window", "document", "random"}
    assert sum(len(group.positions) for group in groups) == 6 * 3 + 1
    for group in groups:
        assert group.start >= 1
        assert group.stop <= len(TOKENS)
        assert group.stop - group.start == 64
        assert all(group.start <= position < group.stop - 1 for position in group.positions)
    (edge,) = next(group for group in groups if group.kind == "chunk").positions
    assert (edge - 1) % 512 in (511, 0, 1)
    document = next(group for group in groups if group.kind == "document").positions[1]
    assert TOKENS[document] == lawful.BOS
    places = sampling.distribution_positions(KEY, len(TOKENS), 16)
    assert len(places) == 16
    assert sum(place > 0.75 * len(TOKENS) for place in places) >= 8
    stretches = sampling.recomputed_spans(KEY, len(TOKENS), 0.1, 64)
    assert sum(stop - start for start, stop in stretches) == pytest.approx(0.1 * len(TOKENS), abs=64)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(stretches))


def test_a_short_stream_can_be_audited_and_a_shorter_one_is_refused() -> None:
    for length in range(9, 40):
        groups = sampling.perturbation_groups(KEY, TOKENS[:length], lawful.BOS, BOUNDARIES, 20, 64)
        assert all(group.start >= 1 and group.stop <= length for group in groups)
        assert all(1 <= place < length for place in sampling.distribution_positions(KEY, length, 16))
    with pytest.raises(ValueError, match="needs at least"):
        sampling.perturbation_groups(KEY, TOKENS[:8], lawful.BOS, BOUNDARIES, 20, 64)


def test_a_walk_recomputes_what_it_is_asked_to_and_shows_probes_no_more_than_the_prefix() -> None:
    @dataclasses.dataclass(frozen=True)
    class Where:
        start: int

        @property
        def cost(self) -> probe_runner.Cost:
            return probe_runner.Cost()

        def run(self, scorer: Scorer, tokens: np.ndarray) -> tuple[int, int | None]:
            assert isinstance(scorer, lawful.Bigram)
            return scorer.observed, scorer.last

    whole = lawful.Bigram(len(BYTES)).score_stream(TOKENS)
    losses, found = probe_runner.run_probes(
        lawful.Bigram(len(BYTES)),
        TOKENS,
        {"a": [Where(900), Where(7)], "b": [], "c": [Where(7)]},
        [(5, 50), (60, 61)],
        segment=16,
    )
    assert found == {"a": [(900, TOKENS[899]), (7, TOKENS[6])], "b": [], "c": [(7, TOKENS[6])]}

    held = ~np.isnan(losses)
    assert np.array_equal(np.flatnonzero(held), [*range(4, 49), 59])
    assert np.array_equal(losses[held], whole[held])
    complete, _ = probe_runner.run_probes(
        lawful.Bigram(len(BYTES)), TOKENS, {"a": [Where(900)]}, [(1, len(TOKENS))], segment=64
    )
    assert np.array_equal(complete, whole)


class Counting(lawful.Bigram):
    """Counts what it is asked for, over all forks; score_stream counts once, and not what it is made of."""

    def __init__(self, n_targets: int) -> None:
        super().__init__(n_targets)
        self.asked = [probe_runner.Cost()]  # shared by all forks
        self.scoring = False

    def count(self, **more: int) -> None:
        if not self.scoring:
            self.asked[0] += probe_runner.Cost(**more)

    def fork(self) -> "Counting":
        twin = super().fork()
        assert isinstance(twin, Counting)
        twin.asked = self.asked
        return twin

    def predict(self) -> np.ndarray:
        self.count(predictions=1)
        return super().predict()

    def observe(self, token: int) -> None:
        self.count(targets=1)
        super().observe(token)

    def score_stream(self, tokens: np.ndarray) -> np.ndarray:
        self.count(calls=1, targets=len(tokens))
        self.scoring = True
        losses = super().score_stream(tokens)
        self.scoring = False
        return losses


def every_kind_of_probe(key: bytes) -> list[probe_runner.Probe]:
    """Probes of each class, with and without predict(), all ids and drawn ones."""
    groups = sampling.perturbation_groups(key, TOKENS, lawful.BOS, BOUNDARIES, 20, 64)
    places = sampling.distribution_positions(key, len(TOKENS) - normalisation.RUN_TARGETS, 8)
    late = sampling.late_positions(key, "x", len(TOKENS) - 64, 4)
    probes: list[probe_runner.Probe] = []
    probes += causality.probes(key, groups, TOKENS, lawful.VOCAB, lawful.BOS, FLOAT32.rounding)
    for substitutions in (9, lawful.VOCAB):
        probes += normalisation.probes(
            key, places, len(TOKENS), lawful.VOCAB, substitutions, FLOAT32.rounding
        )
    probes += normalisation_blackbox.probes(key, places, TOKENS, lawful.VOCAB, 9)
    for documents in (2, 5):
        probes.append(
            document_order.probe(key, late[0], TOKENS, lawful.VOCAB, lawful.BOS, documents, FLOAT32.rounding)
        )
    for predicts in (True, False):
        probes += call_invariance.probes(key, late, len(TOKENS), 64, predicts)
    probes += canary.probes(key, late, 50, TOKENS, lawful.VOCAB, lawful.PIECES, 0.0).values()
    probes.append(canary.self_sampled_probe(key, late[0], 20, 0.0))
    return probes


@pytest.mark.parametrize("run", range(5))
def test_each_probe_asks_for_what_it_states(run: int) -> None:
    for probe in every_kind_of_probe(bytes([run])):
        scorer = Counting(len(BYTES))
        for token in TOKENS[: probe.start].tolist():
            scorer.observe(token)
        before = scorer.asked[0]
        probe.run(scorer.fork(), TOKENS)
        assert before + probe.cost == scorer.asked[0], probe
        assert probe.cost.targets > 0


def test_a_probe_at_the_end_of_the_stream_asks_for_less() -> None:
    (probe,) = normalisation.probes(KEY, [len(TOKENS) - 1], len(TOKENS), lawful.VOCAB, 8, FLOAT32.rounding)
    scorer = Counting(len(BYTES))
    for token in TOKENS[: probe.start].tolist():
        scorer.observe(token)
    before = scorer.asked[0]
    probe.run(scorer.fork(), TOKENS)
    unread = normalisation.RUN_TARGETS - 1
    assert scorer.asked[0] + probe_runner.Cost(targets=unread, predictions=unread) == before + probe.cost


def declared_checks() -> set[Check]:
    """All checks that are constants of the audit's modules."""
    found: set[Check] = set()
    for module in pkgutil.walk_packages(stages.audit.__path__, "stages.audit."):
        if module.name != "stages.audit.__main__":
            for value in vars(importlib.import_module(module.name)).values():
                values = value.values() if isinstance(value, dict) else [value]
                found.update(one for one in values if isinstance(one, Check))
    return found


def test_the_catalogue_has_every_check_once_under_its_number() -> None:
    entries = [*catalogue.SCORER_CHECKS, *catalogue.FILE_CHECKS]
    checks = [check for entry in entries for check in entry.checks]
    assert len(checks) == len(set(checks))
    assert set(checks) == declared_checks()
    assert all(check.number == entry.not_run.number for entry in entries for check in entry.checks)
    numbers = [entry.not_run.number for entry in entries]
    assert sorted(numbers) == sorted({*(f"B{i}" for i in range(1, 19)), "B1c", "budget"})
    for check in checks:
        assert check.conditions
        assert set(check.conditions) <= set(render.CONDITIONS)


def test_what_did_not_run_is_cannot_tell_with_words_for_its_numbers() -> None:
    reasons = {"B14": "switched off"}
    verdicts = catalogue.with_missing([budgets.check_sizes({"a": 1}, 2)], ["x"], reasons)
    missing = {verdict.check.number: verdict for verdict in verdicts[1:]}
    assert "budget" not in missing
    assert {verdict.outcome for verdict in missing.values()} == {"cannot tell"}
    assert (missing["B14"].check.name, missing["B14"].subject) == ("clean room", "files")
    assert missing["B14"].evidence == "not run: switched off"
    assert missing["B10"].evidence.startswith("not run: needs a factory")
    shown = missing["B9"].as_json()
    assert (shown["saw"], shown["expected"], shown["bound"]) == ("nothing", "-", "-")


def test_a_report_has_words_only_where_there_is_no_number() -> None:
    bounded = Check(
        "B7", "bits", ("C1",), sees="{count} kinds", blind="others", words=Words("some", "<= bound")
    )
    with pytest.raises(AssertionError, match="unfilled"):
        Verdict.passed(bounded, "x", "")
    filled = bounded.fill(count=3)
    assert (filled.sees, filled.blind) == ("3 kinds", "others")
    assert Verdict.of(filled, "x", True, "", saw=0, bound=64.0).shown_numbers == (0, "<= bound", 64.0)
    assert Verdict.failed(filled, "x", "", saw=math.nan, expected=-math.inf).shown_numbers == (
        "nan",
        "-inf",
        "-",
    )
    assert Verdict.passed(filled, "x", "").shown_numbers[0] == "some"
    assert Verdict.cannot_tell(filled, "x", "").shown_numbers[0] == "nothing"
    assert [Verdict.of(filled, "x", holds, "").outcome for holds in (True, False)] == ["pass", "fail"]


def test_the_report_repeats_and_reads(tmp_path: Path) -> None:
    verdicts = [*audit(unnormalised.TargetGate, tmp_path), budgets.check_sizes({"model.bin": 1}, 2)]
    again = [*audit(unnormalised.TargetGate, tmp_path), budgets.check_sizes({"model.bin": 1}, 2)]
    declared = {"targets": len(BYTES)}
    text = render.as_markdown(verdicts, declared)
    assert text == render.as_markdown(again, declared)
    assert json.loads(json.dumps(render.as_json(verdicts, declared), allow_nan=False))["audit_passed"] == 0
    row = next(line for line in text.splitlines() if line.startswith("| C2: full normalised distribution"))
    assert row.count("**fail**") == 1
    assert "\n" not in failure_message(failures(verdicts)[0])
    for verdict in verdicts:
        if verdict.outcome == "cannot tell":
            continue
        assert verdict.check.sees in text
        assert verdict.check.blind in text


@pytest.mark.parametrize("kind", ["sgd", "lora"])
def test_the_stage_passes_and_twice_alike(tmp_path: Path, kind: str) -> None:
    sections = SECTIONS | {
        "ttt_eval": SECTIONS["ttt_eval"]
        | {"kind": kind, "lora": SECTIONS["ttt_eval"]["lora"] | {"lr": 0.001}}
    }
    arguments = write_artifacts(tmp_path, sections)
    reports = []
    for name in ("a", "b") if kind == "sgd" else ("a",):
        launch(stage.STAGE, stage.main, [*arguments, f"--output={tmp_path / name}"], sections)
        reports.append([(tmp_path / name / file).read_bytes() for file in stage.STAGE.writes])
    assert reports[0] == reports[-1]
    metrics = json.loads(reports[0][2])
    assert (metrics["audit_passed"], metrics["audit_fail"]) == (1, 0)
    report = json.loads(reports[0][0])
    assert {verdict["subject"] for verdict in report["verdicts"]} == {"files", "sliding_eval", "ttt_eval"}
    unknown = {verdict["check"] for verdict in report["verdicts"] if verdict["outcome"] == "cannot tell"}
    assert unknown == {"B12", "B14", "B16", "B17"}
    assert {report["conditions"][key]["ttt_eval"] for key in ("metric", "budget")} == {"pass"}

    # Too few targets are certified for a statement on the whole stream.
    four = ("C1", "C2", "C3", "C4")
    assert {report["conditions"][key]["ttt_eval"] for key in four} == {"cannot tell"}
    assert report["conditions"]["clean room"] == {"files": "cannot tell"}


def test_a_false_ledger_is_one_line_and_a_report_and_no_decoder_or_room_bears_it_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sections = SECTIONS | {"audit": SECTIONS["audit"] | {"decoded_targets": 8, "clean_room": True}}
    arguments = write_artifacts(tmp_path, sections)
    claimed = {
        f"{name}_bpb": json.loads((tmp_path / name / "metrics.json").read_text())[f"{name}_bpb"]
        for name in ("sliding", "ttt")
    }
    claimed["ttt_bpb"] += 0.01

    # A program that reports other scores, and a ledger with half of the losses.
    lines = [
        "import json, pathlib",
        "pathlib.Path('eval').mkdir()",
        f"pathlib.Path('eval/metrics.json').write_text(json.dumps({claimed}))",
    ]
    (tmp_path / "train_gpt.py").write_text("\n".join(lines))

    nll = np.load(tmp_path / "ttt" / "nll.npy")
    np.save(tmp_path / "ttt" / "nll.npy", nll * np.float32(0.5))
    capsys.readouterr()

    output = tmp_path / "failed"
    with pytest.raises(SystemExit) as ended:
        launch(stage.STAGE, stage.main, [*arguments, f"--output={output}"], sections)
    assert ended.value.code == 1

    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert errors[0].startswith("error: audit: ttt_eval fails B6 (reported bits per byte)")
    assert sorted(path.name for path in output.iterdir()) == sorted(stage.FAILED_REPORTS)
    assert "**fail**" in (output / "failed-report.md").read_text()
    verdicts = {
        (verdict["subject"], verdict["check"], verdict["name"]): verdict["outcome"]
        for verdict in json.loads((output / "failed-report.json").read_text())["verdicts"]
    }

    for check in (("B12", "decoder round trip"), ("B14", "runs from the counted files alone")):
        assert (verdicts["sliding_eval", *check], verdicts["ttt_eval", *check]) == ("pass", "fail")
