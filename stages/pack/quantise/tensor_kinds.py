"""What becomes of each tensor: decided by its role, never by its size.

Block matrices, the embedding and value tables are quantised; gains, scales, mixes and skips are kept in float16.
"""

from typing import Literal, NamedTuple

from stages.pack.file.tensors import largest_value
from stages.pack.params import PackParams
from stages.train.model import is_matrix, is_quantised

Kind = Literal["attention", "mlp", "embedding", "rest"]


class Grid(NamedTuple):
    """The uniform grid of a quantised kind: integers within +-qmax, of which the largest stands for `clip` standard deviations."""

    bits: int
    clip: float

    @property
    def qmax(self) -> int:
        """The largest magnitude; symmetric, so that one code of the 2^bits is unused."""
        return largest_value(self.bits)


def kind_of(name: str) -> Kind:
    """The role of a tensor of the state dict.

    >>> kind_of("blocks.3.mlp.up.weight"), kind_of("embedding.weight"), kind_of("blocks.3.mix")
    ('mlp', 'embedding', 'rest')
    """
    if not is_quantised(name):
        return "rest"
    if not is_matrix(name):
        return "embedding"
    return "attention" if ".attention." in name else "mlp"


def grid(kind: Kind, params: PackParams, clip_factor: float) -> Grid:
    """The grid of a quantised kind with every clip width multiplied by `clip_factor`; a clip for each class of matrices (#1586)."""
    assert kind != "rest", "float16 tensors have no grid"
    clips = {"attention": params.attention_clip, "mlp": params.mlp_clip, "embedding": params.embedding_clip}
    return Grid(
        params.embedding_bits if kind == "embedding" else params.matrix_bits, clip_factor * clips[kind]
    )
