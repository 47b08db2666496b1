"""The model: its forward pass, its initial values, and attention within documents."""

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from stages.common import config
from stages.train.model import Model, initialise_, scale_logits, value_table_index, visit_plan
from stages.train.ops import select_ops
from stages.train.params import ModelParams, Params
from stages.train.reference import REFERENCE_OPS, document_bounds
from tests.factories import TINY, params, random_model
from tests.slow_model import logits as slow_logits

ROOT = Path(__file__).parents[1]
DOCUMENTS = replace(TINY, attention="documents")
BOS = TINY.bos_id
# Three documents and, before the first BOS, what is left of one; a document of one token; 15 tokens.
TOKENS = (9, 4, BOS, 7, 20, 4, 4, 30, BOS, BOS, 12, 5, 9, 4, 33)
PIECES = (slice(0, 2), slice(2, 8), slice(8, 9), slice(9, 15))

each_attention = pytest.mark.parametrize(
    "model_params", [TINY, DOCUMENTS], ids=lambda model_params: model_params.attention
)
each_plan = pytest.mark.parametrize("looped", [False, True], ids=["straight", "looped"])


def record_model_params() -> ModelParams:
    raw = config.read_parameters(ROOT / "params.yaml")
    overlay = yaml.safe_load((ROOT / "presets/record.yaml").read_text())
    return config.build({**raw["model"], **overlay["model"]}, ModelParams)


# The forward pass


@each_attention
@each_plan
def test_model_equals_a_slow_float64_version(model_params, looped):
    model = random_model(3, model_params).double()
    model.dtype = torch.float64
    weights = {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        fast = model.logits(torch.tensor(TOKENS)[None], looped)[0].double().numpy()
    slow = slow_logits(weights, TOKENS, model_params, looped)
    assert (
        np.linalg.norm(fast - slow) / np.linalg.norm(slow) < 1e-5
    )  # angles, norms' eps and the softcap are float32


def test_losses_are_cross_entropies_of_the_logits_and_scored_from_only_selects():
    model = random_model(1)
    tokens = torch.randint(TINY.vocab_size, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        losses = model(tokens[:, :-1], tokens[:, 1:])
        chosen = torch.log_softmax(model.logits(tokens[:, :-1]).double(), -1).gather(-1, tokens[:, 1:, None])[
            ..., 0
        ]
        torch.testing.assert_close(losses.double(), -chosen, atol=1e-5, rtol=0)
        torch.testing.assert_close(
            model(tokens[:, :-1], tokens[:, 1:], scored_from=8), losses[:, 8:], atol=1e-5, rtol=0
        )


def test_the_record_has_the_record_s_parameters():
    with torch.device("meta"):
        model = Model(record_model_params())
    assert sum(parameter.numel() for parameter in model.parameters()) == 35_944_536


def test_visits_of_the_record():
    record = record_model_params()
    assert visit_plan(record, looped=False) == ((0, 1, 2, 3, 4), (5, 6, 7, 8, 9, 10))
    assert visit_plan(record, looped=True) == ((0, 1, 2, 3, 4, 5, 3, 4), (5, 3, 4, 5, 6, 7, 8, 9, 10))


def test_which_block_reads_which_value_table():
    assert [value_table_index(replace(TINY, layers=6, value_tables=2), block) for block in range(6)] == [
        0,
        1,
        None,
        None,
        0,
        1,
    ]
    assert [value_table_index(replace(TINY, value_tables=0), block) for block in range(TINY.layers)] == [
        None
    ] * TINY.layers


def test_gates_smear_and_value_tables_begin_as_if_they_were_not_there():
    plain = replace(TINY, gate_width=0, smear_width=0, value_tables=0)
    models = [Model(TINY), Model(plain)]
    for model in models:
        initialise_(model, 3)
        torch.nn.init.eye_(model.get_parameter("blocks.0.attention.output.weight"))
    assert (
        len(models[0].state_dict()) - len(models[1].state_dict())
        == TINY.layers + 2 + TINY.value_tables + 2 * TINY.value_tables
    )
    with torch.no_grad():
        with_all, without = (model.logits(torch.tensor(TOKENS)[None]) for model in models)
    torch.testing.assert_close(with_all, without, atol=1e-6, rtol=0)


@each_attention
def test_scaled_logits_are_those_of_the_same_model_times_the_factor(model_params):
    model, scaled, tokens = (
        random_model(8, model_params),
        random_model(8, model_params),
        torch.tensor(TOKENS)[None],
    )
    scaled.load_state_dict(scale_logits(model.state_dict(), 0.75))
    with torch.no_grad():
        before, after = (of.raw_logits(tokens, True, slice(None)) for of in (model, scaled))
    torch.testing.assert_close(after, 0.75 * before, atol=1e-5, rtol=1e-4)


def test_smear_adds_the_embedding_before_but_not_to_a_bos():
    model, tokens = random_model(8), torch.tensor(TOKENS)[None]
    assert model.smear is not None
    with torch.no_grad():
        rows = model.embedding(tokens)
        added = (model.smear(rows, tokens) - rows)[0].norm(dim=-1)
    assert [bool(size > 0) for size in added] == [t > 0 and token != BOS for t, token in enumerate(TOKENS)]


@each_attention
def test_the_model_is_causal(model_params):
    """A BOS that comes later moves no document that has begun."""
    model = random_model(5, model_params)
    tokens = torch.tensor(TOKENS)[None]
    changed = tokens.clone()
    changed[:, 10:] = torch.tensor([3, BOS, 8, 8, BOS])
    with torch.no_grad():
        before, after = model.logits(tokens), model.logits(changed)
    assert torch.equal(before[:, :10], after[:, :10])
    assert not torch.equal(before[:, 10:], after[:, 10:])


@each_attention
def test_every_parameter_gets_a_gradient_when_looped(model_params):
    """D33: a parameter that never moves is dead weight in the artifact."""
    model = random_model(2, model_params)
    tokens = torch.randint(TINY.vocab_size, (2, 17), generator=torch.Generator().manual_seed(0))
    model(tokens[:, :-1], tokens[:, 1:], looped=True).mean().backward()
    dead = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is None or not parameter.grad.any()
    ]
    assert dead == []


# Initial values


def test_initial_values():
    model = Model(TINY)
    initialise_(model, 42)
    state = model.state_dict()
    assert 0.003 < float(state["embedding.weight"].std()) < 0.007
    query = state["blocks.0.attention.query.weight"]
    torch.testing.assert_close(query @ query.T, torch.eye(TINY.width), atol=1e-5, rtol=0)
    assert not state["blocks.0.attention.output.weight"].any()
    assert not state["blocks.0.mlp.down.weight"].any()
    assert (state["blocks.1.attention.gain"] == 5.25).all()
    assert (state["skip_weight"] == 1).all()
    assert not state["skip_gate"].any()
    assert (state["blocks.2.mix"] == torch.tensor([[1.0], [0.0]])).all()


def test_with_bfloat16_activations_matrices_start_rounded_and_every_weight_is_float32():
    model = Model(TINY, torch.bfloat16)
    initialise_(model, 42)
    for name in ("blocks.0.attention.query.weight", "embedding.weight"):
        weight = model.state_dict()[name]
        assert weight.any()
        assert torch.equal(weight, weight.bfloat16().float())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


# Documents


def test_documents_begin_at_each_bos_and_what_precedes_the_first_is_one():
    tokens = torch.tensor([TOKENS[:11], (BOS, *TOKENS[1:10], BOS), (8,) * 11])
    starts, ends = document_bounds(tokens, BOS)
    assert starts.tolist() == [
        [0, 0, 2, 2, 2, 2, 2, 2, 8, 9, 9],
        [0, 0, 2, 2, 2, 2, 2, 2, 8, 9, 10],
        [0] * 11,
    ]
    assert ends.tolist() == [
        [1, 1, 7, 7, 7, 7, 7, 7, 8, 10, 10],
        [1, 1, 7, 7, 7, 7, 7, 7, 8, 9, 10],
        [10] * 11,
    ]
    assert starts.dtype == ends.dtype == torch.int32


@each_plan
def test_each_document_of_a_window_is_as_if_it_were_alone(looped):
    """D20c: no information of one document reaches the next."""
    model, across = random_model(4, DOCUMENTS), random_model(4, TINY)
    tokens = torch.tensor(TOKENS)
    with torch.no_grad():
        together = model.logits(tokens[None], looped)[0]
        alone = torch.cat([model.logits(tokens[None, piece], looped)[0] for piece in PIECES])
        over_the_edges = across.logits(tokens[None], looped)[0]
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    first = PIECES[0]
    torch.testing.assert_close(over_the_edges[first], alone[first], atol=1e-5, rtol=0)
    assert ((over_the_edges - alone)[first.stop :].abs().amax(-1) > 1e-2).all()


def first_queries_and_keys(model_params, tokens):
    """q and k of the first block as attention gets them, (T, heads, C) each."""
    seen: list[torch.Tensor] = []

    def attend(q, k, v, documents):
        seen.extend((q[0], k[0]))
        return REFERENCE_OPS.attend(q, k, v, documents)

    model = Model(model_params, ops=REFERENCE_OPS._replace(attend=attend))
    model.load_state_dict(random_model(6).state_dict())
    with torch.no_grad():
        model.logits(torch.tensor(tokens)[None])
    return seen[:2]


def test_positions_restart_at_bos():
    """Scores within a document show differences of positions only, so this looks at q and k themselves."""
    twice = (BOS, 7, 20, 4) * 2
    assert all(torch.equal(heads[:4], heads[4:]) for heads in first_queries_and_keys(DOCUMENTS, twice))
    assert not any(torch.equal(heads[:4], heads[4:]) for heads in first_queries_and_keys(TINY, twice))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("gate_width", TINY.width + 1, "25 is not between 0 and the width 24"),
        ("smear_width", -1, "-1 is not between 0 and the width 24"),
        ("value_tables", 3, "3 is not between 0 and half of the 5 layers"),
    ],
)
def test_parts_that_do_not_fit_the_model_are_refused(key, value, message):
    raw = asdict(params())
    raw["model"][key] = value
    with pytest.raises(ValueError, match=rf"^model\.{key}: {message}$"):
        config.build(raw, Params)


@pytest.mark.parametrize("bos_id", [-1, TINY.vocab_size])
def test_a_bos_outside_the_vocabulary_is_refused(bos_id):
    raw = asdict(params())
    raw["model"]["bos_id"] = bos_id
    with pytest.raises(
        ValueError, match=rf"^model\.bos_id: {bos_id} is not an id of the vocabulary of {TINY.vocab_size}$"
    ):
        config.build(raw, Params)


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("model.heads", {"width": 96, "heads": 4}),
        ("model.heads", {"width": 32, "heads": 4}),
        ("model.hidden", {"width": 64, "heads": 4, "hidden": 36}),
        ("model.logit_softcap", {"width": 64, "heads": 4, "logit_softcap": 50.0}),
    ],
)
def test_shapes_that_the_kernels_cannot_take_are_refused_by_key(key, changes):
    model = replace(TINY, **({"width": 64, "hidden": 64} | changes))
    with pytest.raises(ValueError, match=rf"^{key}: .*parallel\.kernels: false"):
        select_ops(True, model)
    assert select_ops(False, model) is REFERENCE_OPS
