"""Attention kernels with flash-attn 2's interface, written in Triton.

``from kernels import flash_attn_func`` takes the place of ``from flash_attn import flash_attn_func``.
Importing needs no GPU; calling needs CUDA tensors, or Triton's interpreter (``TRITON_INTERPRET=1``) for CPU
tensors.
"""

from kernels.attention.api import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from kernels.attention.flash1 import flash1_attn_func
from kernels.attention.standard import standard_attention

__all__ = [
    "flash1_attn_func",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "standard_attention",
]
