"""The model's operations as kernels for NVIDIA GPUs, each the twin of a function in stages/train/reference.py."""

from torch import Tensor

from stages.train.kernels import attention
from stages.train.kernels.cross_entropy import softcapped_cross_entropy
from stages.train.kernels.mlp import squared_leaky_mlp
from stages.train.kernels.qkv_rope import split_heads
from stages.train.kernels.residual_sum import combine, combine_norm
from stages.train.ops import Operations
from stages.train.reference import Documents, whole_windows


def attend(q_BTHC: Tensor, k_BTKC: Tensor, v_BTKC: Tensor, within: Documents | None) -> Tensor:
    """The fused twin of `plain.attend`; a whole window is one document."""
    within = within or whole_windows(q_BTHC.shape[0], q_BTHC.shape[1], q_BTHC.device)
    return attention.attend(q_BTHC, k_BTKC, v_BTKC, *within)


FUSED = Operations(combine, combine_norm, split_heads, attend, squared_leaky_mlp, softcapped_cross_entropy)
