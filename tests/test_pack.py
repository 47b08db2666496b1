"""pack: state and Hessians to model.bin and back, the byte budget, the stage and its table."""

import dataclasses
import functools
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from stages.calibrate.hessians import importance_name
from stages.common import config
from stages.common.stage import canonical_json, launch
from stages.pack import artifact, stage
from stages.pack.artifact import pack, unpack
from stages.pack.entropy import codecs
from stages.pack.entropy.codecs import StreamLayout
from stages.pack.file import container
from stages.pack.file.container import EncodedStream
from stages.pack.forms import (
    Corrected,
    CorrectedForm,
    Float16Form,
    GroupsForm,
    RowQuantised,
    RowsForm,
    TrellisForm,
)
from stages.pack.low_rank import Correction
from stages.pack.params import PackParams
from stages.pack.quantise import fit_budget, methods, tensor_kinds
from stages.pack.quantise.fit_budget import CoarsenessRange
from stages.pack.stats import layers_tsv, tensor_stats
from stages.train.model import Model, is_table
from stages.train.params import ModelParams
from tests.factories import PARALLEL, make_world
from tests.pack_inputs import (
    AT_RATE,
    CORRECTED,
    ENCODER,
    MODEL,
    PACK,
    SILENT,
    hessians_of,
    trained_like,
    with_budget,
)
from tools import inspect_model


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return trained_like()


@pytest.fixture(scope="module")
def hessians(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return hessians_of(state)


def test_decoded_weights_are_the_dequantised_ones(
    state: dict[str, Tensor], hessians: dict[str, Tensor]
) -> None:
    with_figures = pack(state, hessians, MODEL, PACK, ENCODER, SILENT)
    params, decoded = unpack(with_figures.blob)
    assert params == MODEL
    assert decoded.keys() == state.keys()
    entries = {entry.name: entry for entry in container.parse(with_figures.blob).tensors}
    for name, tensor in decoded.items():
        entry = entries[name]
        assert tensor.dtype == torch.float32
        if tensor_kinds.kind_of(name) == "rest":
            assert torch.equal(tensor, state[name].half().float())
            assert entry.form == Float16Form()
            continue
        clip, bits = (20.0, 8) if is_table(name) else (12.85, 6)
        qmax = 2 ** (bits - 1) - 1
        steps = (clip * state[name].std(dim=1) / qmax).half().float()[:, None]
        integers = tensor / steps
        assert entry.form == RowsForm(bits)
        assert torch.equal(integers.round() * steps, tensor)
        assert float(integers.abs().max()) < qmax + 0.01
        assert float((tensor - state[name]).abs().max()) < 6 * float(steps.max())


@pytest.mark.parametrize(
    "params",
    [
        PACK,
        with_budget(20_000, AT_RATE),
        dataclasses.replace(PACK, awq_groups=2, **CORRECTED),
        with_budget(20_000, dataclasses.replace(AT_RATE, **CORRECTED)),
    ],
    ids=["sdclip", "rate", "sdclip, corrected", "rate, corrected"],
)
def test_same_weights_same_bytes_whatever_the_threads(
    state: dict[str, Tensor], hessians: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, params: PackParams
) -> None:
    before = {name: tensor.clone() for name, tensor in (state | hessians).items()}
    blobs = []
    for cores, torch_threads in ((1, 1), (2, 2), (5, 1)):
        for module in (artifact, methods):
            monkeypatch.setattr(module, "usable_cores", lambda cores=cores: cores)
        torch.set_num_threads(torch_threads)
        blobs.append(pack(dict(reversed(state.items())), hessians, MODEL, params, ENCODER, SILENT).blob)
        assert torch.get_num_threads() == torch_threads
    assert blobs[0] == blobs[1] == blobs[2]
    assert all(torch.equal(before[name], tensor) for name, tensor in (state | hessians).items())


def test_load_model_gives_the_model_in_the_file(
    state: dict[str, Tensor], hessians: dict[str, Tensor], tmp_path: Path
) -> None:
    blob = pack(state, hessians, MODEL, PACK, ENCODER, SILENT).blob
    (tmp_path / "model.bin").write_bytes(blob)
    model = artifact.load_model(tmp_path / "model.bin", make_world())
    assert all(torch.equal(unpack(blob)[1][name], tensor) for name, tensor in model.state_dict().items())
    original = Model(MODEL)
    original.load_state_dict(state)
    tokens = torch.arange(32).view(2, 16)
    with torch.no_grad():
        difference = (model(tokens, tokens + 1) - original(tokens, tokens + 1)).abs().mean()
    assert float(difference) < 0.1


@pytest.mark.parametrize("share", [0.9, 0.7, 0.58])
def test_one_factor_on_the_clips_makes_it_fit(
    state: dict[str, Tensor], hessians: dict[str, Tensor], share: float
) -> None:
    full = pack(state, hessians, MODEL, PACK, ENCODER, SILENT)
    assert full.coarseness == 1.0
    allowed = int(share * len(full.blob))
    small = pack(state, hessians, MODEL, with_budget(allowed), ENCODER, SILENT)
    assert allowed - fit_budget.MAX_UNUSED_BYTES <= len(small.blob) <= allowed
    assert 1 < small.coarseness <= methods.MAX_CLIP_FACTOR
    _, decoded = unpack(small.blob)
    name = "blocks.0.mlp.up.weight"
    steps = (12.85 * small.coarseness * state[name].std(dim=1) / 31).half().float()[:, None]
    assert torch.equal((decoded[name] / steps).round() * steps, decoded[name])


def test_a_budget_that_cannot_be_met_gives_both_figures(
    state: dict[str, Tensor], hessians: dict[str, Tensor]
) -> None:
    with pytest.raises(
        ValueError,
        match=r"artifact over the byte budget: \d+ bytes at coarseness 8 after \d+ attempts, 2000 allowed",
    ):
        pack(state, hessians, MODEL, with_budget(2000), ENCODER, SILENT)


@pytest.mark.parametrize("share", [0.999, 0.9, 0.6, 0.3, 0.2])
def test_the_search_is_short_and_close_on_a_model_of_record_size(share: float) -> None:
    """Size by the entropy of 36 million Gaussian integers, with brotli's non-monotonic last digits."""
    weights, tried = 36_000_000, []

    def size(factor: float) -> int:
        tried.append(factor)
        spread = 31 / 12.85 / factor
        edges = [0.5 * (1 + math.erf((value - 0.5) / spread / math.sqrt(2))) for value in range(-40, 42)]
        shares = [high - low for low, high in itertools.pairwise(edges) if high > low]
        return int(weights / 8 * -sum(p * math.log2(p) for p in shares)) + 100_000 + hash(factor) % 3000

    allowed = int(share * size(1.0))
    tried.clear()
    factor, found = fit_budget.fit_to_budget(
        size, lambda found: found, allowed, weights, CoarsenessRange(1.0, 1.0, 8.0)
    )
    assert allowed - fit_budget.MAX_UNUSED_BYTES <= found <= allowed
    assert len(tried) <= 9
    assert tried.count(factor) == 1


@pytest.mark.parametrize("allowed", [8_000, 20_000, 40_000])
def test_at_a_rate_the_budget_is_filled_and_never_exceeded(
    state: dict[str, Tensor], hessians: dict[str, Tensor], allowed: int
) -> None:
    packed = pack(state, hessians, MODEL, with_budget(allowed, AT_RATE), ENCODER, SILENT)
    assert allowed - fit_budget.MAX_UNUSED_BYTES <= len(packed.blob) <= allowed
    _, decoded = unpack(packed.blob)
    for entry in container.parse(packed.blob).tensors:
        if tensor_kinds.kind_of(entry.name) == "rest":
            assert torch.equal(decoded[entry.name], state[entry.name].half().float())
        else:
            assert entry.form == TrellisForm(8)


@pytest.mark.parametrize("share", [0.999, 0.6, 0.25, 0.08])
def test_the_search_at_a_rate_is_short_on_a_model_of_record_size(share: float) -> None:
    """Size by the entropy of 36 million normal values, with some scatter; the first guess is 4 % off."""
    weights, tried = 36_000_000, []

    def size(coarseness: float) -> int:
        tried.append(coarseness)
        scatter = 300 * (hash(coarseness) % 3 - 1)
        return int(weights / 8 * math.log2(1 + 12 / coarseness**2) / 2) + scatter + 20_000

    allowed = int(share * size(1.0))
    rate = 2 * (allowed - 20_000) * 8 / weights
    first = 1.04 * (12 / (2**rate - 1)) ** 0.5
    tried.clear()
    range_ = CoarsenessRange(first, 1.0e-6, 1.0e6)
    coarseness, best = fit_budget.fit_to_budget(size, lambda bytes_: bytes_, allowed, weights, range_)

    assert allowed - fit_budget.MAX_UNUSED_BYTES <= best <= allowed
    assert coarseness in tried
    assert len(tried) <= 5


def test_more_budget_than_the_model_can_use_is_left(
    state: dict[str, Tensor], hessians: dict[str, Tensor]
) -> None:
    packed = pack(state, hessians, MODEL, with_budget(900_000, AT_RATE), ENCODER, SILENT)
    weights = sum(tensor.numel() for tensor in state.values())
    assert len(packed.blob) < 2 * methods.MAX_BITS / 8 * weights
    _, decoded = unpack(packed.blob)
    assert all(torch.allclose(decoded[name], state[name], atol=2e-3, rtol=2e-3) for name in state)


def test_a_rate_that_is_too_low_gives_both_figures(
    state: dict[str, Tensor], hessians: dict[str, Tensor]
) -> None:
    with pytest.raises(
        ValueError,
        match=r"artifact over the byte budget: \d+ bytes at coarseness \S+ after \d+ attempts, 2000 allowed",
    ):
        pack(state, hessians, MODEL, with_budget(2000, AT_RATE), ENCODER, SILENT)


def test_at_equal_bytes_the_rate_quantiser_is_expected_to_lose_half_at_most(
    state: dict[str, Tensor], hessians: dict[str, Tensor]
) -> None:
    plain = pack(state, hessians, MODEL, PACK, ENCODER, SILENT)
    at_rate = pack(state, hessians, MODEL, with_budget(len(plain.blob), AT_RATE), ENCODER, SILENT)
    losses = [sum(row.expected_loss or 0.0 for row in packed.stats) for packed in (plain, at_rate)]
    assert losses[1] < 0.5 * losses[0]


def test_without_importance_the_tensor_is_named(
    state: dict[str, Tensor], hessians: dict[str, Tensor]
) -> None:
    name = "blocks.1.attention.value.weight"
    without = {key: tensor for key, tensor in hessians.items() if key != importance_name(name)}
    absent = r"blocks\.1\.attention\.value\.weight: the importance of its rows, .* is not in the calibration"
    with pytest.raises(ValueError, match=absent):
        pack(state, without, MODEL, with_budget(20_000, AT_RATE), ENCODER, SILENT)
    silent = hessians | {importance_name(name): torch.zeros(len(state[name]))}
    with pytest.raises(
        ValueError, match=r"value\.weight: the importance of its rows has mean 0\.0; no gradient"
    ):
        pack(state, silent, MODEL, with_budget(20_000, AT_RATE), ENCODER, SILENT)
    with pytest.raises(ValueError, match=r"value\.weight: its weights are not finite"):
        pack(
            state | {name: torch.full_like(state[name], math.nan)},
            hessians,
            MODEL,
            with_budget(20_000, AT_RATE),
            ENCODER,
            SILENT,
        )


@pytest.mark.parametrize("step", [0.0, -1.0, math.nan, math.inf])
def test_impossible_steps_are_refused(
    state: dict[str, Tensor], hessians: dict[str, Tensor], step: float
) -> None:
    contents = container.parse(
        pack(state, hessians, MODEL, with_budget(20_000, AT_RATE), ENCODER, SILENT).blob
    )
    entry = next(entry for entry in contents.tensors if isinstance(entry.form, TrellisForm))
    levels, _, *exponents = entry.streams
    changed = dataclasses.replace(
        entry, streams=(levels, EncodedStream("plain", np.array(step, "<f4").tobytes()), *exponents)
    )
    entries = tuple(changed if other is entry else other for other in contents.tensors)
    with pytest.raises(ValueError, match=f"damaged model file: tensor {entry.name}: it has the step"):
        unpack(container.serialise(container.Contents(contents.model, entries)))


def test_the_table_measures_rates_against_their_bounds() -> None:
    """Normal values on a uniform grid, coded ideally, are 0.2546 bits above their bound at a high rate."""
    generator = np.random.default_rng(5)
    entered = generator.standard_normal((64, 4096)).astype(np.float32) * np.float32(50)
    row = tensor_stats.TensorStats("x", "matrix", (64, 4096), "rows:8", int(64 * 4096 * 7.5 / 8), 64 * 4096)
    measured = tensor_stats.with_bounds(row, entered, np.rint(entered), np.ones(4096, np.float32))
    exact = 7.5 - math.log2(50 * 12**0.5)
    assert measured.above_bound == pytest.approx(exact, abs=0.003)
    assert measured.above_bound_by_column == pytest.approx(exact, abs=0.02)  # variances of 64 values each
    columns = np.repeat(np.array([1, 16], np.float32), 2048)
    by_column = tensor_stats.with_bounds(
        row, entered * columns, np.rint(entered * columns), np.ones(4096, np.float32)
    ).above_bound_by_column
    assert by_column == pytest.approx(exact - 2, abs=0.02)


def test_roles_are_decided_by_name_not_by_size() -> None:
    kinds = {name: tensor_kinds.kind_of(name) for name in Model(MODEL).state_dict()}
    assert kinds["embedding.weight"] == "embedding"
    assert sum(kind == "attention" for kind in kinds.values()) == 4 * MODEL.layers
    assert sum(kind == "mlp" for kind in kinds.values()) == 2 * MODEL.layers
    assert {name for name, kind in kinds.items() if kind == "rest" and not name.startswith("blocks.")} == {
        "skip_weight",
        "skip_gate",
    }


def test_the_table_adds_up_to_the_file(state: dict[str, Tensor], hessians: dict[str, Tensor]) -> None:
    packed = pack(state, hessians, MODEL, PACK, ENCODER, SILENT)
    assert [row.name for row in packed.stats] == [*sorted(state), "container"]
    assert sum(row.bytes for row in packed.stats) == len(packed.blob)
    decoded = unpack(packed.blob)[1]
    row = next(row for row in packed.stats if row.name == "blocks.1.attention.value.weight")
    difference = (decoded[row.name] - state[row.name]).double()
    hessian = hessians["blocks.1.attention.query.weight"].double()
    assert row.mean_squared_error == pytest.approx(float(difference.square().mean()))
    relative = (difference @ hessian @ difference.T).trace() / (
        state[row.name].double() @ hessian @ state[row.name].double().T
    ).trace()
    assert row.relative_error == pytest.approx(float(relative), rel=1e-4)
    figures = layers_tsv.metrics(packed.stats, packed.coarseness)
    assert figures["bytes_model"] == len(packed.blob)
    assert figures["bits_per_weight"] == pytest.approx(
        8 * len(packed.blob) / sum(tensor.numel() for tensor in state.values())
    )
    canonical_json(figures)


def test_weights_or_hessians_that_do_not_fit_are_named(
    state: dict[str, Tensor], hessians: dict[str, Tensor]
) -> None:
    name = "blocks.1.mlp.down.weight"

    def attempt(
        change: dict[str, Tensor], drop: str = "", model: ModelParams = MODEL, change_hessian: bool = False
    ) -> None:
        weights, known = (state, hessians | change) if change_hessian else (state | change, hessians)
        weights, known = (
            {key: value for key, value in of.items() if key != drop or of is not known}
            for of in (weights, known)
        )
        pack(weights, known, model, PACK, ENCODER, SILENT)

    with pytest.raises(ValueError, match=r"tensor extra has shape \(1,\), and is absent"):
        attempt({"extra": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"blocks\.0\.attention\.gain: a value is not a finite float16"):
        attempt({"blocks.0.attention.gain": torch.full((4,), 1.0e5)})

    with pytest.raises(ValueError, match=r"is absent, and has shape"):
        attempt({}, model=dataclasses.replace(MODEL, smear_width=4))
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp\.down\.weight: its Hessian .* is not among"):
        attempt({}, drop=name, change_hessian=True)
    with pytest.raises(
        ValueError, match=r"blocks\.1\.mlp\.down\.weight: its Hessian is not positive definite"
    ):
        attempt({name: -torch.eye(64)}, change_hessian=True)
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp\.down\.weight: its Hessian has shape \(3, 3\)"):
        attempt({name: torch.eye(3)}, change_hessian=True)


def rewritten(blob: bytes, model: dict[str, Any] | None = None, first: dict[str, Any] | None = None) -> bytes:
    """The file with other model parameters, or another first tensor, under a right checksum."""
    contents = container.parse(blob)
    entries = (dataclasses.replace(contents.tensors[0], **(first or {})), *contents.tensors[1:])
    return container.serialise(container.Contents({**contents.model, **(model or {})}, entries))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"layers": 4000}}, "too few for the 4000 blocks"),
        ({"model": {"layers": 2**30}}, "above"),
        ({"model": {"width": 2**24}}, "in a model with these parameters"),
        ({"model": {"width": 10**14}}, "above"),
        ({"model": {"loops": 2**24}}, "visits more than"),
        ({"model": {"loops": 90_000}}, "skip_gate has shape"),
        ({"model": {"heads": 0}}, "not above zero"),
        ({"model": {"heads": "4"}}, "expected int"),
        ({"model": {"rope_base": 10**400}}, "digits"),
        ({"model": {"seed": 1}}, "unknown key"),
        ({"first": {"name": "renamed"}}, "is absent"),
        ({"first": {"shape": (16, 2)}}, "has shape"),
    ],
)
def test_lawful_containers_of_impossible_models_are_refused(
    state: dict[str, Tensor], hessians: dict[str, Tensor], change: dict[str, Any], message: str
) -> None:
    fast = dataclasses.replace(PACK, brotli_quality=1)
    blob = pack(state, hessians, MODEL, fast, ENCODER, SILENT).blob
    with pytest.raises(ValueError, match=f"damaged model file: .*{message}"):
        unpack(rewritten(blob, **change))


def test_values_beyond_their_bits_are_refused(state: dict[str, Tensor], hessians: dict[str, Tensor]) -> None:
    contents = container.parse(pack(state, hessians, MODEL, PACK, ENCODER, SILENT).blob)
    narrow = [
        dataclasses.replace(entry, form=RowsForm(3)) if "embedding" in entry.name else entry
        for entry in contents.tensors
    ]
    with pytest.raises(ValueError, match=r"embedding\.weight: it has integers beyond 3"):
        unpack(container.serialise(container.Contents(contents.model, tuple(narrow))))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("states", 3),
        ("rate_weight", -0.1),
        ("row_weight", -1.0),
        ("matrix_bits", 9),
        ("embedding_bits", 1),
        ("attention_clip", 0.0),
        ("mlp_clip", -1.0),
        ("awq_groups", -1),
        ("lqer_rank", 17),
        ("lqer_rank", -1),
        ("lqer_tensors", 0),
        ("damping", -0.1),
        ("brotli_quality", 12),
        ("code_reserve_bytes", 10**9),
    ],
)
def test_impossible_parameters_name_their_key(key: str, value: Any) -> None:
    with pytest.raises(config.InvalidKey, match=key):
        dataclasses.replace(PACK, **{key: value})


def run_stage(folder: Path) -> None:
    sections = {
        "parallel": dataclasses.asdict(dataclasses.replace(PARALLEL, kernels=True)),
        "model": dataclasses.asdict(MODEL),
        "pack": dataclasses.asdict(PACK),
    }
    (folder / "params.yaml").write_text(yaml.safe_dump(sections), encoding="utf-8")
    arguments = [
        f"--params={folder / 'params.yaml'}",
        f"--model={folder / 'model.safetensors'}",
        f"--hessians={folder / 'hessians.safetensors'}",
        f"--output={folder / 'out'}",
    ]
    launch(stage.STAGE, functools.partial(stage.main, encoder=ENCODER), arguments)


def test_the_stage_and_inspect(
    state: dict[str, Tensor], hessians: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file(state, tmp_path / "model.safetensors")
    save_file(hessians, tmp_path / "hessians.safetensors")
    run_stage(tmp_path)
    out = tmp_path / "out"
    blob = (out / "model.bin").read_bytes()
    assert blob == pack(state, hessians, MODEL, PACK, ENCODER, SILENT).blob
    assert json.loads((out / "metrics.json").read_text())["bytes_model"] == len(blob)

    # The table.
    lines = (out / "layers.tsv").read_text().splitlines()
    assert lines[0].split("\t") == list(layers_tsv.COLUMNS)
    assert len(lines) == len(state) + 2
    assert all(line.count("\t") == len(layers_tsv.COLUMNS) - 1 for line in lines)

    # The tool that prints the same from the file alone.
    capsys.readouterr()
    inspect_model.main([str(out / "model.bin")])
    printed = capsys.readouterr().out
    assert f"{len(blob)}" in printed
    assert all(name in printed for name in state)

    # A reader that closes the pipe, as `head` does, is not an error.
    command = [sys.executable, "-m", "tools.inspect_model", str(out / "model.bin")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_damaged_inputs_end_with_one_line_and_code_2(
    state: dict[str, Tensor], hessians: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file(state, tmp_path / "model.safetensors")
    save_file(hessians, tmp_path / "hessians.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SystemExit, match="2"):
        run_stage(tmp_path)
    assert "is not a whole safetensors file" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out" / "model.bin").exists()
    with pytest.raises(SystemExit, match="2"):
        inspect_model.main([str(tmp_path / "model.safetensors")])
    assert "model.safetensors: not a model file" in capsys.readouterr().err
    for path, message in ((tmp_path / "none.bin", "none.bin does not exist"), (tmp_path, "is a folder")):
        with pytest.raises(SystemExit, match="2"):
            inspect_model.main([str(path)])
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
        assert line.endswith("; run `dvc repro pack` first, or name another")


def test_a_group_of_columns_gets_eight_bits_and_comes_back(
    state: dict[str, Tensor], hessians: dict[str, Tensor]
) -> None:
    """AWQ-lite: the group with the largest product of input and weight, here by a made-up loud input."""
    name = "blocks.1.mlp.down.weight"
    loud = 1.0e4 * hessians[name]
    params = dataclasses.replace(PACK, awq_groups=1)
    packed = pack(state, hessians | {name: loud}, MODEL, params, ENCODER, SILENT)
    entries = {entry.name: entry for entry in container.parse(packed.blob).tensors}
    assert [entry.name for entry in entries.values() if isinstance(entry.form, GroupsForm)] == [name]
    steps = (12.85 * state[name].std(dim=1) / 31).half().float()[:, None]
    integers = unpack(packed.blob)[1][name] / (steps / 4)
    assert torch.equal(integers.round(), integers)
    assert (integers % 4 != 0).any()

    # Its error is a quarter without, a half of that at most.
    plain = pack(state, hessians | {name: loud}, MODEL, PACK, ENCODER, SILENT)
    errors = [{row.name: row.relative_error for row in of.stats}[name] for of in (packed, plain)]
    assert errors[0] is not None
    assert errors[1] is not None
    assert errors[0] < errors[1] / 2

    # A file whose groups are neither coarse nor fine.
    entry = entries[name]
    hostile = codecs.encode("brotli", bytes([2]), entry.form.layouts(entry.shape)[2], 5)
    changed = dataclasses.replace(entry, streams=(*entry.streams[:2], EncodedStream("brotli", hostile)))
    model = container.parse(packed.blob).model
    forged = container.serialise(container.Contents(model, tuple((entries | {name: changed}).values())))
    with pytest.raises(ValueError, match=r"mlp\.down\.weight: it has groups of columns that are neither"):
        unpack(forged)


@pytest.mark.parametrize("params", [PACK, with_budget(20_000, AT_RATE)], ids=["sdclip", "rate"])
def test_corrections_are_in_the_file_where_they_gain_most(
    state: dict[str, Tensor], hessians: dict[str, Tensor], params: PackParams
) -> None:
    """At the same coarseness, corrected tensors come closer and all others are unchanged."""
    plain = pack(state, hessians, MODEL, params, ENCODER, SILENT)
    corrected = pack(state, hessians, MODEL, dataclasses.replace(params, **CORRECTED), ENCODER, SILENT)
    assert len(corrected.blob) <= params.model_budget_bytes
    entries = [
        entry for entry in container.parse(corrected.blob).tensors if isinstance(entry.form, CorrectedForm)
    ]
    assert len(entries) == 3
    assert {entry.form.header.rank for entry in entries} == {2}
    assert all(entry.streams[-2].codec == params.codec for entry in entries)
    assert all(
        ("+2" in row.form) == (row.name in {entry.name for entry in entries}) for row in corrected.stats
    )
    if params is PACK:  # both at coarseness 1
        before, after = ({row.name: row.expected_loss for row in of.stats} for of in (plain, corrected))
        for entry in entries:
            assert (after[entry.name] or 1.0) < (before[entry.name] or 0.0)
        assert all(
            before[name] == after[name] for name in before if name not in {entry.name for entry in entries}
        )


def test_weights_are_the_bits_that_torch_would_make() -> None:
    generator = np.random.default_rng(0)
    values = generator.integers(-127, 128, (40, 64)).astype(np.int8)
    steps, finer = generator.normal(1e-3, 1e-4, 40).astype(np.float16), np.arange(64, dtype=np.uint8) % 7
    quantised = RowQuantised(values, steps, finer)
    by_hand = torch.from_numpy(values).float() * (
        torch.from_numpy(steps).float()[:, None] / torch.exp2(torch.from_numpy(finer).float())
    )
    assert torch.equal(torch.from_numpy(RowsForm(8).dequantise(quantised)), by_hand)
    correction = Correction(
        generator.integers(-127, 128, (3, 104)).astype(np.int8),
        generator.normal(0, 1e-4, 3).astype(np.float32),
    )
    total = torch.zeros(40, 64)
    for levels, step in zip(
        torch.from_numpy(correction.levels_KN).float(), torch.from_numpy(correction.steps_K), strict=True
    ):
        total += (levels[:40] * step)[:, None] * levels[40:]
    corrected = CorrectedForm(RowsForm(8), 3).dequantise(Corrected(quantised, correction))
    assert torch.equal(torch.from_numpy(corrected), by_hand + total)


def test_steps_of_a_correction_that_are_not_finite_are_refused(
    state: dict[str, Tensor], hessians: dict[str, Tensor]
) -> None:
    contents = container.parse(
        pack(state, hessians, MODEL, dataclasses.replace(PACK, **CORRECTED), ENCODER, SILENT).blob
    )
    entry = next(entry for entry in contents.tensors if isinstance(entry.form, CorrectedForm))
    steps = EncodedStream(
        "brotli", codecs.encode("brotli", np.array([1, np.inf], "<f4").tobytes(), StreamLayout(4, 1, 2), 5)
    )
    changed = dataclasses.replace(entry, streams=(*entry.streams[:-1], steps))
    entries = tuple(changed if other is entry else other for other in contents.tensors)
    with pytest.raises(
        ValueError, match=f"damaged model file: tensor {entry.name}: it has values that are not finite"
    ):
        unpack(container.serialise(container.Contents(contents.model, entries)))
