"""Kinds of tensors, which decide how each is stored: by role in the model, never by size.

Block matrices, the embedding and value tables are quantised. Vectors and mixes are kept in float16.
"""

from typing import Literal, NamedTuple

from stages.pack.forms import largest_value
from stages.pack.params import PackParams
from stages.train.model import is_matrix, is_quantised

Kind = Literal["attention", "mlp", "embedding", "rest"]


class UniformGrid(NamedTuple):
    """Integers within +-qmax, with the largest at `clip` standard deviations."""

    bits: int
    clip: float

    @property
    def qmax(self) -> int:
        """The largest integer. The grid is symmetric, so one code of the 2^bits is unused."""
        return largest_value(self.bits)


def kind_of(name: str) -> Kind:
    """The kind of a tensor of the state dict, by its name; "rest" is not quantised.

    >>> kind_of("blocks.3.mlp.up.weight"), kind_of("embedding.weight"), kind_of("blocks.3.mix")
    ('mlp', 'embedding', 'rest')
    """
    if not is_quantised(name):
        return "rest"
    if not is_matrix(name):
        return "embedding"
    return "attention" if ".attention." in name else "mlp"


def uniform_grid(kind: Kind, params: PackParams, coarseness: float) -> UniformGrid:
    """The grid of a quantised kind. Its clip width is multiplied by `coarseness`.

    Each kind has its own clip width (#1586).
    """
    assert kind != "rest", "float16 tensors have no grid"
    clips = {"attention": params.attention_clip, "mlp": params.mlp_clip, "embedding": params.embedding_clip}
    bits = params.embedding_bits if kind == "embedding" else params.matrix_bits
    return UniformGrid(bits, coarseness * clips[kind])
