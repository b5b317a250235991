"""Kernel or operator -> category of the waterfall.

A kernel is known by its own name where a library names it well (cuBLAS, cuDNN, NCCL, our own), else by the operator
that launched it, since PyTorch calls a hundred different things `elementwise_kernel`; Inductor writes the operators it
fused into the kernel's name. What is known neither way is `other`, and the report lists it.
"""

from __future__ import annotations

import re
from enum import StrEnum

from training.waterfall.trace import BACKWARD, DATA_WAIT, MEMORY, OPTIMIZER, WINDOW


class Category(StrEnum):
    """Parts of a step, in the order of the report."""

    matmul = "matmul"
    attention_forward = "attention_forward"
    attention_backward = "attention_backward"
    norms = "norms"
    activations = "activations"
    casts = "casts"
    elementwise = "elementwise"
    loss = "loss"
    accumulation = "accumulation"
    optimizer = "optimizer"
    communication = "communication"
    copies = "copies"
    other = "other"
    data_wait = "data_wait"
    host = "host"
    idle = "idle"


LABELS: dict[Category, str] = {
    Category.matmul: "matrix products",
    Category.attention_forward: "attention forward",
    Category.attention_backward: "attention backward",
    Category.norms: "norms and residuals",
    Category.activations: "activations",
    Category.casts: "casts to fp8",
    Category.elementwise: "biases, embeddings, other elementwise",
    Category.loss: "loss",
    Category.accumulation: "gradient accumulation",
    Category.optimizer: "optimizer, clipping",
    Category.communication: "communication, not hidden",
    Category.copies: "copies and casts",
    Category.other: "other",
    Category.data_wait: "data wait",
    Category.host: "host gaps",
    Category.idle: "idle",
}
"""Names for people. `host`: nothing was launched that could have run. `idle`: launched, but not running yet."""

C = Category
FORWARD, GRADIENT = C.attention_forward, C.attention_backward

OUR_KERNELS: dict[str, Category] = {
    # kernels.attention.portable and flash1
    "attention_forward": FORWARD,
    "flash1_forward": FORWARD,
    "attention_delta": GRADIENT,
    "attention_dkdv": GRADIENT,
    "attention_dq": GRADIENT,
    "flash1_backward": GRADIENT,
    # kernels.attention.hopper
    "forward_kernel": FORWARD,
    "list_tiles": FORWARD,
    "backward_preprocess": GRADIENT,
    "backward_kernel": GRADIENT,
    "backward_postprocess": GRADIENT,
    # model.loss_kernel
    "_cross_entropy_kernel": C.loss,
    # model.norm_kernel
    "_add_norm_kernel": C.norms,
    "_add_norm_backward_kernel": C.norms,
    # training.adamw_kernel
    "_adamw_kernel": C.optimizer,
    # training.mean_kernel
    "_add_mean_kernel": C.accumulation,
}
"""Triton kernels of this repository: their functions' names."""

COMMUNICATION = re.compile(r"nccl|rccl|oneccl|c10d::|gloo:|record_param_comms|Memcpy PtoP", re.IGNORECASE)
"""Of collectives, and of `training.peers`: copies from another GPU and c10d's barriers."""
_ATTENTION = re.compile(r"flash|fmha|sdpa|_scaled_dot_product|attention|(?<!log)_softmax", re.IGNORECASE)
_GRADIENT = re.compile(r"bwd|bprop|backward|cutlassB|dkdv|_dq|dot_do_o|convert_dq", re.IGNORECASE)
_MATMUL = re.compile(
    r"nvjet|gemm|gemv|cutlass|xmma|cublas|splitk|triton_tem_|triton_mm|^Cijk_|_wgrad_|_dgrad_", re.IGNORECASE
)
_INDUCTOR = re.compile(r"^triton_(poi|per|red|tem|for|mix|spl)_fused_")
_CAST = re.compile(r"^triton_[a-z]+_fused_\w*_(amax|clamp|reciprocal)(?=_|$)")
"""The largest magnitude and the scale that it makes: of what Inductor compiles here, `model.fp8` alone has these."""
_MOVES = re.compile(r"_(to_copy|clone|copy|cat|stack|view|t|transpose|permute|slice|unsqueeze|select|split)(?=_|$)")
_ADD = re.compile(r"_add(?=_|$)")

_NAME_PATTERNS: tuple[tuple[re.Pattern[str], Category], ...] = (
    (re.compile(r"layer_?norm|rms_?norm|GammaBeta", re.IGNORECASE), C.norms),
    (re.compile(r"gelu|silu|swiglu|_relu|relu_|_sigmoid", re.IGNORECASE), C.activations),
    (re.compile(r"cross_entropy|nll_loss|logsumexp", re.IGNORECASE), C.loss),
    (re.compile(r"adam|LpNorm", re.IGNORECASE), C.optimizer),
    (re.compile(r"embedding", re.IGNORECASE), C.elementwise),
)
"""What libraries and Inductor call their kernels, most telling first."""

_BY_OPERATOR: dict[Category, str] = {
    C.matmul: "mm addmm addmm_ _addmm_activation mv linear matmul mkldnn_linear _scaled_mm linear_backward",
    C.norms: "native_layer_norm native_layer_norm_backward layer_norm rms_norm _fused_rms_norm "
    "_fused_rms_norm_backward add add_",
    C.activations: "gelu gelu_backward silu silu_backward relu threshold_backward sigmoid",
    C.loss: "logsumexp cross_entropy_loss nll_loss_forward nll_loss_backward",
    C.optimizer: "_fused_adamw_ _foreach_norm",
    C.copies: "copy_ clone contiguous _to_copy to cat stack fill_ zero_ zeros zeros_like ones_like full_like "
    "index_put_ scatter_ split_with_sizes_copy",
    C.elementwise: "mul mul_ div div_ sub sub_ rsub sum mean neg exp exp_ log log_ sqrt rsqrt square pow cos sin outer "
    "tanh where masked_fill masked_fill_ dropout native_dropout native_dropout_backward bernoulli_ embedding "
    "embedding_dense_backward embedding_backward index_select index index_add_ gather scatter_add_ arange cumsum "
    "searchsorted bitwise_and bitwise_or logical_and logical_or logical_not ne eq ge gt le lt maximum minimum clamp "
    "max min amax amin any all abs isfinite isnan isinf item _local_scalar_dense is_nonzero __or__ __and__ bitwise_not "
    "linalg_vector_norm reciprocal addcmul lerp random_ randint eye tril triu",
}
OPERATORS: dict[str, Category] = {f"aten::{op}": kind for kind, ops in _BY_OPERATOR.items() for op in ops.split()}
"""ATen operator -> category, inside the model; inside the optimizer all is optimizer."""

_COMPUTES_NOTHING = (
    "empty empty_like empty_strided new_empty new_zeros resize_ set_ view view_as _unsafe_view reshape _reshape_alias "
    "flatten unflatten as_strided t transpose permute expand squeeze unsqueeze select slice narrow split "
    "split_with_sizes chunk unbind alias detach detach_ lift_fresh resolve_conj resolve_neg result_type real numpy_T "
    "_has_compatible_shallow_copy_type scalar_tensor is_pinned pin_memory _pin_memory record_stream "
    "flatten_dense_tensors unflatten_dense_tensors"
)
_FREE = frozenset(f"aten::{op}" for op in _COMPUTES_NOTHING.split())
"""Operators that compute nothing: their time belongs to what called them."""

_ATTENTION_OPERATORS = ("aten::bmm", "aten::baddbmm", "aten::_softmax", "aten::_safe_softmax")
_ATTENTION_PREFIXES = (
    "flashtrain::attention",
    "aten::scaled_dot_product",
    "aten::_scaled_dot_product",
    "aten::_flash_attention",
    "aten::_cudnn_attention",
    "aten::_efficient_attention",
)
_AUTOGRAD = "autograd::engine::evaluate_function"
_COMPILED_GRAPH = "## Call CompiledFxGraph"
_LOSS_NODE = "_LinearCrossEntropy"


def classify_kernel(name: str, kind: str, stack: tuple[str, ...]) -> Category | None:
    """Category of a device event by its name, its kind and the host events around its launch, innermost first.

    None: unknown.
    """
    if COMMUNICATION.search(name):
        return C.communication
    if OPTIMIZER in stack:
        return C.optimizer
    if kind == MEMORY:
        return C.copies
    named = OUR_KERNELS.get(name) or _cast(name) or _attention(name, stack)
    if named is not None:
        return named
    if _MATMUL.search(name):
        return C.matmul
    return _by_scope(stack) or _by_name(name) or _by_operator(stack)[0]


def classify_operator(stack: tuple[str, ...]) -> Category | None:
    """Category of the time that a CPU spends in the innermost event of `stack` itself. None: an unknown operator."""
    if _communicates(stack):
        return C.communication
    if DATA_WAIT in stack:
        return C.data_wait
    if OPTIMIZER in stack:
        return C.optimizer
    attention = _attention("", stack)
    if attention is not None:
        return attention
    category, unknown = _by_operator(stack)
    if category is C.matmul:
        return C.matmul
    if stack[0] in (WINDOW, BACKWARD):
        return C.host
    if stack[0].startswith(_COMPILED_GRAPH):  # its loops are one call; the operators that aren't fused show in it
        return C.elementwise
    return _by_scope(stack) or category or (None if unknown else C.host)


def _communicates(stack: tuple[str, ...]) -> bool:
    """Whether a collective is the innermost thing that means something; one that runs on beside others isn't."""
    first = next((name for name in stack if name in OPERATORS or COMMUNICATION.search(name)), "")
    return COMMUNICATION.search(first) is not None


def _cast(name: str) -> Category | None:
    """Casts to fp8, where they aren't fused with what makes the values. Inductor also writes into the name what the
    operator is called that made them, such as attention."""
    if not _CAST.match(name):
        return None
    return next((category for pattern, category in _NAME_PATTERNS[:2] if pattern.search(name)), C.casts)


def _attention(name: str, stack: tuple[str, ...]) -> Category | None:
    """Forward or backward where a kernel's name or an operator around it is attention's."""
    if _ATTENTION.search(name) and not name.startswith("triton_poi"):
        return GRADIENT if _GRADIENT.search(name) else FORWARD
    for place, operator in enumerate(stack):
        if operator.startswith(_ATTENTION_PREFIXES):
            return GRADIENT if "backward" in operator else FORWARD
        if operator.startswith("aten::_softmax_backward"):
            return GRADIENT
        if operator in _ATTENTION_OPERATORS:
            return GRADIENT if any("Backward" in outer for outer in stack[place:]) else FORWARD
    return None


def _by_scope(stack: tuple[str, ...]) -> Category | None:
    """What the place in the step decides, whatever the operation."""
    if any(name.startswith(_LOSS_NODE) for name in stack):
        return C.loss
    if any("AccumulateGrad" in name for name in stack):
        return C.accumulation
    in_autograd = any(name.startswith(_AUTOGRAD) for name in stack)
    if BACKWARD in stack and not in_autograd:  # what the engine does to gradients once they are there
        return C.accumulation
    return None


def _by_name(name: str) -> Category | None:
    """What Inductor or a library says in a kernel's name."""
    for pattern, category in _NAME_PATTERNS:
        if pattern.search(name):
            return category
    if not _INDUCTOR.match(name):
        return None
    if _ADD.search(name):
        return C.norms  # a residual, or the sum of two gradients
    copies = re.sub(
        r"_(to_copy|clone|copy|cat|stack|view|t|transpose|permute|slice|unsqueeze|select|split)(?=_|$)", "", name
    )
    return C.copies if re.fullmatch(r"triton_[a-z]+_fused_*\d*", copies) else C.elementwise


def _by_operator(stack: tuple[str, ...]) -> tuple[Category | None, bool]:
    """The innermost known operator's category, and whether there was an unknown one."""
    unknown = False
    for name in stack:
        if name in OPERATORS:
            return OPERATORS[name], unknown
        unknown = unknown or (name.startswith("aten::") and name not in _FREE)
    return None, unknown
