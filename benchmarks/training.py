"""Speed on the CPU of a training pass of params.yaml's model, and of Muon's orthogonalisation."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from benchmarks._measure import measure
from stages.common import config
from stages.train.model import Model, initialise_
from stages.train.muon import newton_schulz_coefficients, orthogonalise
from stages.train.params import ModelParams

THREADS = 2
SEQUENCES = 8


@dataclass(frozen=True)
class Params:
    """The section of params.yaml that is read."""

    model: ModelParams


def main() -> None:
    """Print one line for each case."""
    torch.set_num_threads(THREADS)
    params = replace(config.load(Path("params.yaml"), Params, []).model, context=256)
    model = Model(params)
    initialise_(model, 0)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, params.vocab_size, (SEQUENCES, params.context + 1), generator=generator)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    size = sum(weight.numel() for weight in model.parameters())

    def step(looped: bool) -> None:
        model.zero_grad()
        model(inputs, targets, looped).sum().backward()

    def score(looped: bool) -> None:
        with torch.no_grad():
            model(inputs, targets, looped)

    for looped in (False, True):
        kind = f"{size:,} weights, {'looped' if looped else 'unlooped'}"
        measure(f"forward and backward, {kind}", inputs.numel(), "tokens", partial(step, looped))
        measure(f"forward, {kind}", inputs.numel(), "tokens", partial(score, looped))

    matrix = torch.randn(1, params.hidden, params.width, generator=torch.Generator().manual_seed(0))
    triples = newton_schulz_coefficients("fixed", 5)
    name = f"orthogonalise, {params.hidden} x {params.width}, {len(triples)} steps"
    measure(name, 1, "matrices", lambda: orthogonalise(matrix, triples, torch.float32))


if __name__ == "__main__":
    main()
