"""The attention operators of ``torch.library``: ``torch.ops.flashtrain.attention*``.

Three forward operators that differ only in how q, k and v are packed, and one backward operator for each,
which writes the gradients of a packed input into slices of one tensor (no concatenation):

    attention            q, k, v    (B, S, heads, D) each, or (total, heads, D)
    attention_kvpacked   q, kv      kv (B, S, 2, Hk, D) or (total, 2, Hk, D)
    attention_qkvpacked  qkv        (B, S, 3, H, D) or (total, 3, H, D)

Every forward returns (out, lse), both differentiable. Operators are opaque to ``torch.compile``, know their
output shapes (fake kernels), cast q, k, v under autocast, and refuse second derivatives. Random numbers are
drawn outside (``rng_state``), so that an operator is a pure function of its arguments.

PyTorch's way to an operator written in Python costs the host as much as starting its kernels. So a call that PyTorch
has taken once is known by its geometry, and the next one like it goes past the dispatcher, straight to the kernels
(`run_known`), wherever the dispatcher would have done nothing but come there (`is_plain`).
"""

import contextlib
import functools
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kernels.attention import portable
from kernels.attention.dispatch import PATH_ENV, AttnExtras, AttnParams, Path, choose_path, describe, get_path

NAMESPACE = "flashtrain"
_OPTIONS = (
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? alibi_slopes, Tensor? rng_state, "
    "SymInt max_seqlen_q, SymInt max_seqlen_k, float softmax_scale, bool causal, "
    "SymInt window_left, SymInt window_right, float softcap, float dropout_p, bool deterministic"
)
NUM_EXTRAS = 4
PACKINGS = {"attention": ("q", "k", "v"), "attention_kvpacked": ("q", "kv"), "attention_qkvpacked": ("qkv",)}
_MAX_ROW_STRIDE = 2**23
"""Kernels compute offsets inside a tile of up to 256 rows in 32 bits."""

_library = torch.library.Library(NAMESPACE, "FRAGMENT")


def unpack(packed: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as views of the inputs of an operator: (q, k, v), (q, kv) or (qkv,)."""
    if len(packed) == 3:
        return packed
    if len(packed) == 2:
        q, kv = packed
        return q, kv.select(-3, 0), kv.select(-3, 1)  # (..., 2, Hk, D) -> (..., Hk, D)
    (qkv,) = packed
    return qkv.select(-3, 0), qkv.select(-3, 1), qkv.select(-3, 2)  # (..., 3, H, D) -> (..., H, D)


@dataclass(frozen=True, slots=True)
class _Known:
    """What depends on nothing but the geometry of a call: worked out once, looked up ever after."""

    path: Path
    params: AttnParams
    ready: bool
    """The kernels can address all tensors as they are."""
    memo: dict[str, Any] = field(default_factory=dict)
    """The path's own part."""

    def forward(self, packed: tuple[Tensor, ...], extras: AttnExtras) -> tuple[Tensor, Tensor]:
        """(out, lse) of the tensors of an operator."""
        q, k, v = packed if len(packed) == 3 else unpack(packed)
        if not self.ready:
            q, k, v = (_kernel_ready(t) for t in (q, k, v))
        if is_elsewhere(q):
            with torch.cuda.device(q.device):
                return self.path.forward(q, k, v, self.params, extras, self.memo)
        return self.path.forward(q, k, v, self.params, extras, self.memo)


@dataclass(frozen=True, slots=True)
class KnownCall:
    """A call of a public function that PyTorch has taken once."""

    name: str
    """Operator."""
    scalars: tuple[Any, ...]
    """The operator's arguments after its tensors."""
    known: _Known


_known: dict[tuple[Any, ...], _Known] = {}
known_calls: dict[tuple[Any, ...], KnownCall] = {}
_MAX_KNOWN = 4096


def forget() -> None:
    """Drop all that was worked out for calls seen so far: needed after a change of a tuning table."""
    _known.clear()
    known_calls.clear()


def is_elsewhere(tensor: Tensor) -> bool:
    """Whether ``tensor`` is not on the current device, on which kernels start."""
    return tensor.is_cuda and tensor.get_device() != torch.cuda.current_device()


def key_of(tensors: tuple[Tensor | None, ...], scalars: tuple[Any, ...]) -> tuple[Any, ...]:
    """All that the launch of a kernel depends on but addresses: what a call on ``tensors``, the first of them present,
    and ``scalars`` is known by."""
    assert tensors[0] is not None
    geometry = [None if t is None else (t.shape, t.stride(), t.dtype, t.data_ptr() & 15 == 0) for t in tensors]
    return (os.environ.get(PATH_ENV), tensors[0].device, *geometry, *scalars)


def _learn(key: tuple[Any, ...], tensors: tuple[Tensor, ...], options: tuple[Any, ...], direction: Any) -> _Known:
    """Choose the path of a call on ``tensors`` (q, k, v, and dout backward) and keep the choice."""
    params, extras = _parse_options(options)
    path = get_path(choose_path(describe(tuple(map(_kernel_ready, tensors)), params, extras, direction)))
    known = _Known(path, params, all(_kernel_ready(t) is t for t in tensors))
    if len(_known) >= _MAX_KNOWN:
        _known.clear()
    _known[key] = known
    return known


_NO_EXTRAS = AttnExtras()


def _parse_extras(options: tuple[Any, ...]) -> AttnExtras:
    given = options[:NUM_EXTRAS]
    if given == (None,) * NUM_EXTRAS:
        return _NO_EXTRAS
    return AttnExtras(*(None if t is None else t.contiguous() for t in given))


def _parse_options(options: tuple[Any, ...]) -> tuple[AttnParams, AttnExtras]:
    extras = _parse_extras(options)
    max_q, max_k, scale, causal, left, right, softcap, dropout_p, deterministic = options[NUM_EXTRAS:]
    right = 0 if causal else right
    reach = max_q + max_k  # no pair of positions is further apart: such a limit is none
    params = AttnParams(
        softmax_scale=scale,
        max_seqlen_q=max_q,
        max_seqlen_k=max_k,
        causal=causal,
        window_left=left if 0 <= left < reach else -1,
        window_right=right if 0 <= right < reach else -1,
        softcap=max(softcap, 0.0),
        dropout_p=dropout_p,
        deterministic=deterministic,
    )
    return params, extras


def _kernel_ready(tensor: Tensor) -> Tensor:
    """``tensor``, copied if a kernel could not address it (last stride not 1, or rows too far apart)."""
    row_stride = tensor.stride(-3)
    unit = tensor.shape[-1] == 1 or tensor.stride(-1) == 1
    return tensor if unit and row_stride < _MAX_ROW_STRIDE else tensor.contiguous()


def _forward(num_tensors: int) -> Callable[..., tuple[Tensor, Tensor]]:
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        num_saved = num_tensors + NUM_EXTRAS
        packed, options = args[:num_tensors], args[num_tensors:]
        key = key_of(args[:num_saved], args[num_saved:])
        known = _known.get(key) or _learn(key, unpack(packed), options, "forward")
        return known.forward(packed, _parse_extras(options))

    return forward


def _forward_fake(num_tensors: int) -> Callable[..., tuple[Tensor, Tensor]]:
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        q, _, _ = unpack(args[:num_tensors])
        varlen = args[num_tensors] is not None
        shape = (q.shape[1], q.shape[0]) if varlen else (q.shape[0], q.shape[2], q.shape[1])
        return q.new_empty(q.shape), q.new_empty(shape, dtype=torch.float32)

    return forward


def _new_gradients(packed: tuple[Tensor, ...], wanted: tuple[bool, ...], varlen: bool) -> list[Tensor]:
    """One contiguous gradient per input, an empty tensor where none is wanted. Varlen gradients start at 0:
    tokens past cu_seqlens[-1] belong to no sequence, and no kernel writes them."""
    make = torch.zeros_like if varlen else torch.empty_like
    return [
        make(tensor, memory_format=torch.contiguous_format) if want else tensor.new_empty(0)
        for tensor, want in zip(packed, wanted, strict=True)
    ]


def _wanted(num_tensors: int, need_q: bool, need_kv: bool) -> tuple[bool, ...]:
    if num_tensors == 1:
        return (need_q or need_kv,)
    return (need_q, need_kv, need_kv)[:num_tensors]


def _backward(num_tensors: int) -> Callable[..., Any]:
    def backward(dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, *args: Any) -> Any:
        packed = args[:num_tensors]
        need_q, need_kv = args[num_tensors : num_tensors + 2]
        options = args[num_tensors + 2 :]
        extras = _parse_extras(options)
        grads = _new_gradients(packed, _wanted(num_tensors, need_q, need_kv), extras.varlen)
        slices = unpack(tuple(grads)) if num_tensors == 1 or need_kv else (grads[0], None, None)
        dq, dk, dv = slices if need_q or num_tensors == 1 else (None, *slices[1:])
        q, k, v = unpack(packed)
        tensors = (dout, dlse, out, lse, *packed, *options[:NUM_EXTRAS])
        key = key_of(tensors, (need_q, need_kv, *options[NUM_EXTRAS:]))
        known = _known.get(key) or _learn(key, (q, k, v, dout), options, "backward")
        if not known.ready:
            q, k, v, dout = (_kernel_ready(t) for t in (q, k, v, dout))
        dlse = None if dlse is None else dlse.contiguous()
        arguments = (dout, q, k, v, out, lse, dlse, dq, dk, dv, known.params, extras, known.memo)
        if is_elsewhere(q):
            with torch.cuda.device(q.device):
                known.path.backward(*arguments)
        else:
            known.path.backward(*arguments)
        return tuple(grads) if num_tensors > 1 else grads[0]

    return backward


_BACKWARD = {len(names): _backward(len(names)) for names in PACKINGS.values()}


def _backward_fake(num_tensors: int) -> Callable[..., Any]:
    def backward(dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, *args: Any) -> Any:
        packed = args[:num_tensors]
        need_q, need_kv = args[num_tensors : num_tensors + 2]
        grads = _new_gradients(packed, _wanted(num_tensors, need_q, need_kv), varlen=False)
        return tuple(grads) if num_tensors > 1 else grads[0]

    return backward


def _gradients(
    name: str,
    num_tensors: int,
    saved: tuple[Any, ...],
    scalars: tuple[Any, ...],
    wanted: tuple[bool, ...],
    dout: Tensor | None,
    dlse: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Gradients of an operator's tensors. ``saved``: out, lse, the tensors and the extras of the forward."""
    if dout is None and dlse is None:
        return (None,) * num_tensors
    out, lse, *rest = saved
    packed, extras = rest[:num_tensors], rest[num_tensors:]
    need_q, need_kv = wanted[0], any(wanted[1:]) or num_tensors == 1
    dout = torch.zeros_like(out) if dout is None else dout
    arguments = (dout, dlse, out, lse, *packed, need_q, need_kv, *extras, *scalars)
    # With gradients on, somebody wants second derivatives: the operator knows what to say
    if not torch.compiler.is_dynamo_compiling() and not torch.is_grad_enabled() and is_plain((*saved, dout, dlse)):
        grads = _BACKWARD[num_tensors](*arguments)
    else:
        grads = getattr(getattr(torch.ops, NAMESPACE), f"{name}_backward").default(*arguments)
    grads = grads if num_tensors > 1 else (grads,)
    if all(wanted):
        return grads
    return tuple(g if want else None for g, want in zip(grads, wanted, strict=True))


def _setup_context(num_tensors: int) -> Callable[..., None]:
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        num_saved = num_tensors + NUM_EXTRAS
        ctx.save_for_backward(*output, *inputs[:num_saved])
        ctx.scalars = inputs[num_saved:]
        ctx.set_materialize_grads(False)  # lse rarely has a gradient: None costs nothing, zeros would

    return setup_context


def _autograd(name: str, num_tensors: int) -> Callable[..., tuple[Tensor | None, ...]]:
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[:num_tensors]
        grads = _gradients(name, num_tensors, ctx.saved_tensors, ctx.scalars, wanted, dout, dlse)
        return grads + (None,) * (NUM_EXTRAS + len(ctx.scalars))

    return backward


def _no_second_derivative(ctx: Any, *grads: Any) -> None:
    raise RuntimeError(
        "flash attention has no second derivative; use standard_attention (model.attention=standard) "
        "where one is needed"
    )


class _KnownCallFunction(torch.autograd.Function):
    """What `torch.library.register_autograd` makes of an operator, without the way there."""

    @staticmethod
    def forward(ctx: Any, call: KnownCall, extras: tuple[Tensor | None, ...], *packed: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = call.known.forward(packed, _parse_extras(extras))
        ctx.save_for_backward(out, lse, *packed, *extras)
        ctx.call = call
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        call, wanted = ctx.call, ctx.needs_input_grad[2:]
        grads = _gradients(call.name, len(wanted), ctx.saved_tensors, call.scalars, wanted, dout, dlse)
        return (None, None, *grads)


# Function.apply, but for its look at functorch, which is_plain has excluded
_apply: Any = super(torch.autograd.Function, _KnownCallFunction).apply


def run_known(call: KnownCall, packed: tuple[Tensor, ...], extras: tuple[Tensor | None, ...]) -> tuple[Tensor, Tensor]:
    """(out, lse), differentiable, of tensors that `is_plain` and geometry that ``call`` was learned from."""
    if torch.is_grad_enabled():
        for tensor in packed:
            if tensor.requires_grad:
                out, lse = _apply(call, extras, *packed)
                return out, lse
    return call.known.forward(packed, _parse_extras(extras))


def learn_call(key: tuple[Any, ...], name: str, packed: tuple[Tensor, ...], options: tuple[Any, ...]) -> None:
    """Remember under ``key`` a call that the operator has just computed."""
    extras, given = options[:NUM_EXTRAS], options[NUM_EXTRAS:]
    kinds = (int, int, float, bool, int, int, float, float, bool)  # of _OPTIONS: the dispatcher has converted its own
    scalars = tuple(kind(value) for kind, value in zip(kinds, given, strict=True))
    known = _known.get(key_of((*packed, *extras), scalars))
    if known is not None:  # a mode may have computed it another way
        if len(known_calls) >= _MAX_KNOWN:
            known_calls.clear()
        known_calls[key] = KnownCall(name, scalars, known)


def is_plain(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether an operator called now on ``tensors``, the first of them present, would come to our kernels and nothing
    else: no mode, no autocast, no transform, no profiler that wants to hear of operators, no tensor that only looks
    like one, and a single device."""
    tls, dispatch_keys = _usual_keys(), torch._C._dispatch_keys
    if (
        torch._C._len_torch_function_stack()
        or torch.autograd._profiler_enabled()
        or torch._C._dispatch_tls_local_include_set().raw_repr() != tls[0]
        or torch._C._dispatch_tls_local_exclude_set().raw_repr() != tls[1]
    ):
        return False
    first = tensors[0]
    assert first is not None
    index, keys = first.get_device(), _plain_keys(first.is_cuda)
    for tensor in tensors:
        if tensor is not None and (
            (type(tensor) is not Tensor and type(tensor) is not torch.nn.Parameter)
            or tensor.get_device() != index
            or dispatch_keys(tensor).raw_repr() != keys
        ):
            return False
    return True


@functools.cache
def _usual_keys() -> tuple[int, int]:
    """Dispatch keys that a thread includes and excludes while nothing was switched on or off in it."""
    found: list[tuple[int, int]] = []

    def look() -> None:
        include, exclude = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
        found.append((include.raw_repr(), exclude.raw_repr()))

    thread = threading.Thread(target=look)  # a new one: this one may be within anything
    thread.start()
    thread.join()
    return found[0]


@functools.cache
def _plain_keys(cuda: bool) -> int:
    """Dispatch keys of a tensor that is nothing special, of a GPU or of the CPU. Called where `_usual_keys` hold."""
    return torch._C._dispatch_keys(torch.empty(0, device="cuda" if cuda else "cpu")).raw_repr()


def _register_autocast(name: str, num_tensors: int) -> None:
    """Under autocast q, k, v (not the fp32 statistics or slopes) are cast to the autocast dtype."""
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    for device, key in (("cuda", "AutocastCUDA"), ("cpu", "AutocastCPU")):
        dispatch_key = getattr(torch._C.DispatchKey, key)

        def rule(*args: Any, _device: str = device, _key: Any = dispatch_key) -> Any:
            dtype = torch.get_autocast_dtype(_device)
            cast = [t.to(dtype) if t.is_floating_point() else t for t in args[:num_tensors]]
            with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(_key)):
                return op(*cast, *args[num_tensors:])

        op.py_impl(dispatch_key)(rule)  # what tracing (torch.compile) looks up
        _library.impl(name, lambda _, *args, _rule=rule: _rule(*args), key, with_keyset=True)


def _define(name: str, inputs: tuple[str, ...]) -> None:
    num = len(inputs)
    tensors = ", ".join(f"Tensor {x}" for x in inputs)
    results = "Tensor" if num == 1 else f"({', '.join(['Tensor'] * num)})"
    _library.define(f"{name}({tensors}, {_OPTIONS}) -> (Tensor out, Tensor lse)")
    _library.define(
        f"{name}_backward(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, {tensors}, "
        f"bool need_q, bool need_kv, {_OPTIONS}) -> {results}"
    )
    for key in ("CUDA", "CPU"):
        _library.impl(name, _forward(num), key)
        _library.impl(f"{name}_backward", _BACKWARD[num], key)
    qualified = f"{NAMESPACE}::{name}"
    torch.library.register_fake(qualified, _forward_fake(num), lib=_library)
    torch.library.register_fake(f"{qualified}_backward", _backward_fake(num), lib=_library)
    torch.library.register_autograd(qualified, _autograd(name, num), setup_context=_setup_context(num), lib=_library)
    torch.library.register_autograd(f"{qualified}_backward", _no_second_derivative, lib=_library)
    _register_autocast(name, num)


def _probs(q: Tensor, k: Tensor, lse: Tensor, *options: Any) -> Tensor:
    params, extras = _parse_options(options)
    with torch.cuda.device(q.device) if is_elsewhere(q) else contextlib.nullcontext():
        return portable.probabilities(_kernel_ready(q), _kernel_ready(k), lse, params, extras)


def _probs_fake(q: Tensor, k: Tensor, lse: Tensor, *options: Any) -> Tensor:
    cu_seqlens_q, max_q, max_k = options[0], options[NUM_EXTRAS], options[NUM_EXTRAS + 1]
    batch = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    return q.new_empty((batch, q.shape[-2], max_q, max_k))


def _define_probs() -> None:
    """(B, H, Sq, Sk) probabilities from a finished forward: for tests of dropout, not differentiable."""
    _library.define(f"attention_probs(Tensor q, Tensor k, Tensor lse, {_OPTIONS}) -> Tensor")
    for key in ("CUDA", "CPU"):
        _library.impl("attention_probs", _probs, key)
    torch.library.register_fake(f"{NAMESPACE}::attention_probs", _probs_fake, lib=_library)


_define_probs()
for _name, _inputs in PACKINGS.items():
    _define(_name, _inputs)
