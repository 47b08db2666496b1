"""The model's operations as Triton kernels for NVIDIA GPUs.

Each one is the fused counterpart of the function of the same name in stages/train/reference.py.
"""

from torch import Tensor

from stages.train.kernels import attention
from stages.train.kernels.cross_entropy import softcapped_cross_entropy
from stages.train.kernels.mlp import squared_leaky_relu_mlp
from stages.train.kernels.qkv_rope import qk_norm_rope
from stages.train.kernels.residual_sum import weighted_sum, weighted_sum_norm
from stages.train.reference import DocumentBounds, Ops, whole_window_bounds


def attend(q_BTHC: Tensor, k_BTKC: Tensor, v_BTKC: Tensor, documents: DocumentBounds | None) -> Tensor:
    """The fused counterpart of `reference.attend`; without documents each window is one document."""
    documents = documents or whole_window_bounds(q_BTHC.shape[0], q_BTHC.shape[1], q_BTHC.device)
    return attention.attend(q_BTHC, k_BTKC, v_BTKC, *documents)


FUSED_OPS = Ops(
    weighted_sum,
    weighted_sum_norm,
    qk_norm_rope,
    attend,
    squared_leaky_relu_mlp,
    softcapped_cross_entropy,
)
