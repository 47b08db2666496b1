"""The loader's errors: each names the dotted key, what was seen and what was expected."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from stages.bundle.params import Params as BundleInput
from stages.calibrate.params import Params as CalibrateInput
from stages.common import config
from stages.common.parallel import ParallelParams
from stages.pack.params import Params as PackInput
from stages.submission.params import Params as SubmissionInput
from stages.train.params import ModelParams, Params
from stages.ttt_eval.params import Params as TttEvalInput

ROOT = Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Toy:
    width: int
    rate: float
    flag: bool
    kind: Literal["a", "b"]
    sizes: tuple[int, ...]
    pair: tuple[int, float]
    name: str | None

    def __post_init__(self) -> None:
        config.require_positive(self, "width")
        config.require_fraction(self, "rate")


@dataclasses.dataclass(frozen=True)
class ToyParams:
    seed: int
    model: Toy


GOOD: dict[str, Any] = {
    "width": 8,
    "rate": 0.5,
    "flag": True,
    "kind": "a",
    "sizes": [1, 2],
    "pair": [1, 2.0],
    "name": None,
}

MODEL: dict[str, Any] = {
    "vocab_size": 256,
    "context": 32,
    "width": 32,
    "layers": 4,
    "heads": 4,
    "kv_heads": 2,
    "hidden": 64,
    "rope_dims": 4,
    "attention": "windows",
    "bos_id": 1,
    "rope_base": 10000.0,
    "logit_softcap": 30.0,
    "query_gain": 1.5,
    "parallel_from": 2,
    "loop_first": 1,
    "loop_last": 2,
    "loops": 1,
    "gate_width": 0,
    "smear_width": 0,
    "value_tables": 0,
    "embedding_std": 0.02,
}


def build(**changes: Any) -> ToyParams:
    return config.build({"seed": 1, "model": GOOD | changes}, ToyParams)


def test_a_good_mapping_becomes_a_frozen_dataclass() -> None:
    params = build()
    assert params == ToyParams(1, Toy(8, 0.5, True, "a", (1, 2), (1, 2.0), None))
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.seed = 2  # type: ignore[misc]


def test_an_integer_is_a_lawful_float_and_a_name_a_lawful_option() -> None:
    assert build(rate=1).model.rate == 1.0
    assert type(build(rate=1).model.rate) is float
    assert build(name="x").model.name == "x"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 1}, r"^model\.depth: unknown key; known are model\.width, "),
        ({"width": "8"}, r"^model\.width: saw '8' \(str\), expected int"),
        ({"width": 8.0}, r"^model\.width: saw 8\.0 \(float\), expected int"),
        ({"width": True}, r"^model\.width: saw True \(bool\), expected int"),
        ({"width": None}, r"^model\.width: saw None \(NoneType\), expected int"),
        ({"width": 0}, r"^model\.width: 0 is not above zero"),
        ({"width": -8}, r"^model\.width: -8 is not above zero"),
        (
            {"rate": "1e-4"},
            r"^model\.rate: saw the string '1e-4', expected a number;"
            r" YAML 1\.1 requires a dot in it, as in 1\.0e-4",
        ),
        ({"rate": "fast"}, r"^model\.rate: saw 'fast' \(str\), expected float"),
        ({"rate": True}, r"^model\.rate: saw True \(bool\), expected float"),
        ({"rate": float("nan")}, r"^model\.rate: saw nan, expected a finite number"),
        ({"rate": float("inf")}, r"^model\.rate: saw inf, expected a finite number"),
        ({"rate": 1.5}, r"^model\.rate: 1\.5 is not between 0 and 1"),
        ({"flag": 1}, r"^model\.flag: saw 1 \(int\), expected bool"),
        ({"flag": "yes"}, r"^model\.flag: saw 'yes' \(str\), expected bool"),
        ({"kind": "c"}, r"^model\.kind: saw 'c', expected one of 'a', 'b'"),
        ({"sizes": 3}, r"^model\.sizes: saw 3, expected a list"),
        ({"sizes": [1, "2"]}, r"^model\.sizes\[1\]: saw '2' \(str\), expected int"),
        ({"pair": [1]}, r"^model\.pair: saw \[1\], expected a list of 2 values"),
        ({"name": 3}, r"^model\.name: saw 3 \(int\), expected str"),
    ],
)
def test_a_wrong_value_names_its_dotted_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**changes)


@pytest.mark.parametrize("key", GOOD)
def test_a_missing_key_is_named(key: str) -> None:
    section = {name: value for name, value in GOOD.items() if name != key}
    with pytest.raises(ValueError, match=rf"^model\.{key}: missing key"):
        config.build({"seed": 1, "model": section}, ToyParams)


def test_a_missing_section_is_named() -> None:
    with pytest.raises(ValueError, match=r"^model: missing key"):
        config.build({"seed": 1}, ToyParams)


def test_a_section_that_is_no_mapping_is_named() -> None:
    with pytest.raises(ValueError, match=r"^model: saw 3, expected a section with keys"):
        config.build({"seed": 1, "model": 3}, ToyParams)


def test_sections_of_other_stages_are_left_alone() -> None:
    assert config.build({"seed": 1, "model": GOOD, "pack": {"anything": 1}}, ToyParams) == build()


def test_yaml_reads_1e_4_as_a_string_and_the_loader_says_so(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(
        yaml.safe_dump({"seed": 1, "model": GOOD}).replace("rate: 0.5", "rate: 1e-4"), encoding="utf-8"
    )
    with pytest.raises(ValueError, match=r"^model\.rate: saw the string '1e-4'.* as in 1\.0e-4"):
        config.load(path, ToyParams, [])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"seed: 1\noptimiser: {}\n", r"^optimiser: unknown key in .*; known are seed, scorer, parallel, "),
        (b"- 1\n", r"holds list, expected a mapping of sections"),
        (b"", r"holds NoneType, expected a mapping of sections"),
        (b"seed: [1\n", r"is not YAML: "),
        (b"seed: \xff\n", r"is not YAML: "),
    ],
)
def test_a_file_that_is_no_parameter_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as refusal:
        config.read_parameters(path)
    assert "\n" not in str(refusal.value)


def test_a_file_that_is_absent_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent\.yaml does not exist; name one with --params"):
        config.read_parameters(tmp_path / "absent.yaml")


def test_set_changes_a_copy() -> None:
    raw = {"seed": 1, "model": dict(GOOD)}
    changed = config.override(raw, ["seed=7", "model.sizes=[3, 4]", "model.name=x=y", "model.rate=1.0e-4"])
    assert (changed["seed"], changed["model"]["sizes"], changed["model"]["name"]) == (7, [3, 4], "x=y")
    assert changed["model"]["rate"] == 1.0e-4
    assert raw == {"seed": 1, "model": GOOD}


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("seed", r"^--set seed: expected key\.path=value"),
        ("model.depth=1", r"^model\.depth: unknown key"),
        ("models.width=1", r"^models\.width: unknown key"),
        ("seed.x=1", r"^seed\.x: unknown key"),
        ("model.width.x=1", r"^model\.width\.x: unknown key"),
        ("model.width=[1", r"^model\.width: '\[1' is not YAML: "),
    ],
)
def test_set_only_changes_what_is_there(assignment: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config.override({"seed": 1, "model": dict(GOOD)}, [assignment])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": -32}, r"^model\.width: -32 is not above zero"),
        ({"heads": 0}, r"^model\.heads: 0 is not above zero"),
        ({"heads": 5}, r"^model\.heads: 5 does not divide the width 32"),
        ({"kv_heads": 3}, r"^model\.kv_heads: 3 does not divide the 4 heads"),
        ({"rope_dims": 3}, r"^model\.rope_dims: 3 is not an even number between 0 and the head dimension 8"),
        ({"rope_dims": 10}, r"^model\.rope_dims: 10 is not an even number"),
        ({"loop_last": 4}, r"^model\.loop_first: blocks 1 to 4 are not a segment of 4 layers"),
        ({"vocab_size": 65537}, r"^model\.vocab_size: 65537 ids do not fit the uint16 tokens"),
    ],
)
def test_a_model_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    @dataclasses.dataclass(frozen=True)
    class OnlyModel:
        model: ModelParams

    assert config.build({"model": MODEL}, OnlyModel).model.head_dim == 8
    with pytest.raises(ValueError, match=message):
        config.build({"model": MODEL | changes}, OnlyModel)


def test_a_renamed_key_is_answered_with_its_new_name() -> None:
    raw = config.read_parameters(ROOT / "params.yaml")
    message = r"^ttt_eval\.confidence: unknown key; it is called ttt_eval\.weight_by_surprise now$"
    with pytest.raises(ValueError, match=message):
        config.override(raw, ["ttt_eval.confidence=true"])
    del raw["ttt_eval"]["weight_by_surprise"]
    raw["ttt_eval"]["confidence"] = True
    with pytest.raises(ValueError, match=message):
        config.build(raw, TttEvalInput)


@pytest.mark.parametrize("has_new_key", [False, True])
def test_a_key_that_moved_is_answered_with_its_new_place(has_new_key: bool) -> None:
    """Also for a stage that does not read the section that the key was in."""
    raw = config.read_parameters(ROOT / "params.yaml")
    message = r"^submission\.scorer: unknown key; it is called scorer now$"
    with pytest.raises(ValueError, match=message):
        config.override(raw, ["submission.scorer=sliding_eval"])
    raw["submission"]["scorer"] = "sliding_eval"
    if not has_new_key:
        del raw["scorer"]
    for schema in (BundleInput, SubmissionInput):
        with pytest.raises(ValueError, match=message):
            config.build(raw, schema)
    config.build(raw, TttEvalInput)  # reads neither of the two


def test_renamed_keys_exist_under_their_new_names_alone() -> None:
    raw = config.read_parameters(ROOT / "params.yaml")
    for old, new in config.RENAMED_KEYS.items():
        config.override(raw, [f"{new}=null"])
        with pytest.raises(ValueError, match="it is called"):
            config.override(raw, [f"{old}=null"])


def test_a_batch_that_is_no_multiple_of_the_context_is_refused() -> None:
    raw = config.override(config.read_parameters(ROOT / "params.yaml"), ["train.batch_tokens=1"])
    with pytest.raises(ValueError, match=r"^train\.batch_tokens: 1 is not a multiple of model\.context"):
        config.build(raw, Params)


def test_bfloat16_on_the_cpu_is_refused() -> None:
    with pytest.raises(config.InvalidKey, match=r"^dtype: bfloat16 needs device cuda"):
        ParallelParams(
            nproc=1,
            threads=1,
            device="cpu",
            dtype="bfloat16",
            deterministic=True,
            compile=False,
            kernels=True,
        )


@pytest.mark.parametrize(
    ("schema", "assignment", "message"),
    [
        (CalibrateInput, "calibrate.revisit_weight=-0.5", r"calibrate\.revisit_weight: -0\.5 is negative"),
        (PackInput, "pack.attention_clip=0.0", r"pack\.attention_clip: 0\.0 is not above zero"),
        (PackInput, "pack.mlp_clip=-1.0", r"pack\.mlp_clip: -1\.0 is not above zero"),
        (PackInput, "pack.lqer_rank=17", r"pack\.lqer_rank: 17 is not between 0 and 16"),
        (PackInput, "pack.lqer_tensors=0", r"pack\.lqer_tensors: 0 is not above zero"),
        (PackInput, "pack.awq_groups=-1", r"pack\.awq_groups: -1 is negative"),
        (PackInput, "pack.awq_groups=1.5", r"pack\.awq_groups: saw 1\.5 \(float\), expected int"),
    ],
)
def test_parameters_of_calibration_and_packing_name_their_dotted_key(
    schema: type, assignment: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        config.load(ROOT / "params.yaml", schema, [assignment])


def test_a_preset_name_in_place_of_a_file_is_answered_with_the_command() -> None:
    with pytest.raises(ValueError, match=r"there is no file record; .*python -m tools\.preset record"):
        config.read_parameters(Path("record"))
