"""One forward and backward pass of params.yaml's model on the CPU, and Muon's orthogonalisation of its largest matrix."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks._measure import measure
from stages.common import config
from stages.train.model import Model, initialise_
from stages.train.muon import coefficients, orthogonalise
from stages.train.params import ModelParams

THREADS = 2
SEQUENCES = 8


@dataclass(frozen=True)
class Params:
    """What is read of the parameter file."""

    model: ModelParams


def main() -> None:
    """Print one line for each case."""
    torch.set_num_threads(THREADS)
    params = replace(config.load(Path("params.yaml"), Params, []).model, context=256)
    model = Model(params)
    initialise_(model, 0)
    tokens = torch.randint(
        0, params.vocab_size, (SEQUENCES, params.context + 1), generator=torch.Generator().manual_seed(0)
    )
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    size = sum(weight.numel() for weight in model.parameters())
    for looped in (False, True):
        what = f"forward and backward, {size:,} weights, {'looped' if looped else 'unlooped'}"

        def step(looped: bool = looped) -> None:
            model.zero_grad()
            model(inputs, targets, looped).sum().backward()

        def score(looped: bool = looped) -> None:
            with torch.no_grad():
                model(inputs, targets, looped)

        measure(what, inputs.numel(), "tokens", step)
        measure(what.replace("forward and backward", "forward"), inputs.numel(), "tokens", score)
    matrix = torch.randn(1, params.hidden, params.width, generator=torch.Generator().manual_seed(0))
    triples = coefficients("fixed", 5)
    what = f"orthogonalise, {params.hidden} x {params.width}, {len(triples)} steps"
    measure(what, 1, "matrices", lambda: orthogonalise(matrix, triples, torch.float32))


if __name__ == "__main__":
    main()
