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
has taken once, where the dispatcher had nothing to do but come to us (`is_plain`), is remembered, and the next one on
tensors `Alike` goes past the dispatcher, straight to the kernels (`find_call`, `run_known`). Its backward is remembered
with it (`KnownCall.gradients`).
"""

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from kernels.attention import portable
from kernels.attention.dispatch import (
    PATH_ENV,
    AttnExtras,
    AttnParams,
    Direction,
    Path,
    choose_path,
    describe,
    get_path,
)
from kernels.attention.memory import uninitialised
from kernels.attention.plain import PLAIN_TYPES, Alike, is_heard, is_plain

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

_T = TypeVar("_T")
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
    """The path's own part, empty until a first call has gone through: one that fails half-way (out of memory), or that
    another thread overtakes, leaves nothing half done."""

    def forward(self, packed: tuple[Tensor, ...], extras: AttnExtras) -> tuple[Tensor, Tensor]:
        """(out, lse) of the tensors of an operator."""
        if is_elsewhere(packed[0]):
            with torch.cuda.device(packed[0].device):
                return self.forward(packed, extras)
        q, k, v = packed if len(packed) == 3 else unpack(packed)
        if not self.ready:
            q, k, v = (_kernel_ready(t) for t in (q, k, v))
        memo = self.memo or {}
        results = self.path.forward(q, k, v, self.params, extras, memo)
        if memo is not self.memo:
            self.memo.update(memo)
        return results


@dataclass(frozen=True, slots=True)
class _KnownBackward:
    """The same for a backward."""

    known: _Known
    need_q: bool
    need_kv: bool
    layouts: tuple[tuple[tuple[int, ...], tuple[int, ...], torch.dtype], ...]
    """Shape, strides and dtype of the gradient of each tensor of the operator, empty where none is wanted."""

    def run(
        self,
        dout: Tensor,
        dlse: Tensor | None,
        out: Tensor,
        lse: Tensor,
        packed: tuple[Tensor, ...],
        extras: AttnExtras,
    ) -> tuple[Tensor, ...]:
        """The gradients of ``packed``, tensors of an operator."""
        if is_elsewhere(dout):
            with torch.cuda.device(dout.device):
                return self.run(dout, dlse, out, lse, packed, extras)
        grads = tuple([uninitialised(*layout, dout) for layout in self.layouts])
        if extras.cu_seqlens_q is not None:  # tokens past its end belong to no sequence: no kernel writes theirs
            for grad in grads:
                grad.zero_()
        q, k, v = packed if len(packed) == 3 else unpack(packed)
        dq, dk, dv = unpack(grads) if self.need_kv else (grads[0], None, None)
        known = self.known
        if not known.ready:
            q, k, v, dout = (_kernel_ready(t) for t in (q, k, v, dout))
        if dlse is not None:
            dlse = dlse.contiguous()
        dq = dq if self.need_q else None
        memo = known.memo or {}
        known.path.backward(dout, q, k, v, out, lse, dlse, dq, dk, dv, known.params, extras, memo)
        if memo is not known.memo:
            known.memo.update(memo)
        return grads


@dataclass(frozen=True, slots=True)
class KnownCall:
    """A call of a public function that PyTorch has taken once."""

    name: str
    """Operator."""
    scalars: tuple[Any, ...]
    """The operator's arguments after its tensors."""
    known: _Known
    alike: Alike
    """Recognises the call's tensors: the operator's and those extras that there are, random numbers aside."""
    differentiable: bool
    has_extras: bool
    forced: str | None
    """The path that the environment named; the backwards remembered here take it too."""
    backwards: dict[tuple[bool, ...], tuple[Alike, _KnownBackward]] = field(default_factory=dict)
    """Which of the tensors want a gradient, and whether LSE has one -> the last such backward, with what recognises
    its tensors: all those of `gradients` that there are."""

    def forward(self, packed: tuple[Tensor, ...], extras: tuple[Tensor | None, ...]) -> tuple[Tensor, Tensor]:
        """(out, lse)."""
        return self.known.forward(packed, _parse_extras(extras) if self.has_extras else _NO_EXTRAS)

    def gradients(
        self, wanted: tuple[bool, ...], dout: Tensor | None, dlse: Tensor | None, saved: tuple[Any, ...]
    ) -> tuple[Tensor | None, ...] | None:
        """As `_gradients`, at once; None where the tensors differ from those of an earlier backward in more than their
        addresses."""
        remembered = self.backwards.get((*wanted, dlse is None))
        if remembered is None or dout is None or is_heard():
            return None
        alike, backward = remembered
        if not alike(_present((dout, dlse, *saved))):
            return None
        end = 2 + len(wanted)
        extras = _parse_extras(saved[end:]) if self.has_extras else _NO_EXTRAS
        grads = backward.run(dout, dlse, saved[0], saved[1], saved[2:end], extras)
        if all(wanted):
            return grads
        return tuple(g if want else None for g, want in zip(grads, wanted, strict=True))

    def remember(
        self,
        wanted: tuple[bool, ...],
        dout: Tensor,
        dlse: Tensor | None,
        saved: tuple[Any, ...],
        backward: _KnownBackward,
    ) -> None:
        """Let `gradients` take ``backward`` for tensors like these, which are plain."""
        if os.environ.get(PATH_ENV) == self.forced:
            self.backwards[(*wanted, dlse is None)] = Alike(_present((dout, dlse, *saved))), backward


_known: dict[tuple[Any, ...], _Known] = {}
_known_backwards: dict[tuple[Any, ...], _KnownBackward] = {}
known_calls: dict[tuple[Any, ...], list[KnownCall]] = {}
"""What is asked of `find_call` but for the tensors' details -> the calls that differ in those, last learned first."""
_MAX_KNOWN = 4096
_MAX_ALIKE = 8
"""Calls that one key leads to."""


def forget() -> None:
    """Drop all that was worked out for calls seen so far: needed after a change of a tuning table."""
    for calls in known_calls.values():
        for call in calls:
            call.backwards.clear()  # autograd may hold the call
    known_calls.clear()
    _known_backwards.clear()
    _known.clear()


def is_elsewhere(tensor: Tensor) -> bool:
    """Whether ``tensor`` is not on the current device, on which kernels start."""
    return tensor.is_cuda and tensor.get_device() != torch._C._cuda_getDevice()


def key_of(tensors: tuple[Tensor | None, ...], scalars: tuple[Any, ...]) -> tuple[Any, ...]:
    """All that the launch of a kernel depends on but addresses: what a call on ``tensors``, the first of them present,
    and ``scalars`` is known by."""
    assert tensors[0] is not None
    geometry = [None if t is None else (t.shape, t.stride(), t.dtype, t.data_ptr() & 15 == 0) for t in tensors]
    return (os.environ.get(PATH_ENV), tensors[0].device, *geometry, *scalars)


def _learn(tensors: tuple[Tensor, ...], options: tuple[Any, ...], direction: Direction) -> _Known:
    """Choose the path of a call on ``tensors`` (q, k, v, and dout backward)."""
    params, extras = _parse_options(options)
    path = get_path(choose_path(describe(tuple(map(_kernel_ready, tensors)), params, extras, direction)))
    return _Known(path, params, all(_kernel_ready(t) is t for t in tensors))


def _keep(table: dict[tuple[Any, ...], _T], key: tuple[Any, ...], value: _T) -> _T:
    if len(table) >= _MAX_KNOWN:
        forget()
    table[key] = value
    return value


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
        known = _known.get(key) or _keep(_known, key, _learn(unpack(packed), options, "forward"))
        return known.forward(packed, _parse_extras(options))

    return forward


def _forward_fake(num_tensors: int) -> Callable[..., tuple[Tensor, Tensor]]:
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        q, _, _ = unpack(args[:num_tensors])
        varlen = args[num_tensors] is not None
        shape = (q.shape[1], q.shape[0]) if varlen else (q.shape[0], q.shape[2], q.shape[1])
        return q.new_empty(q.shape), q.new_empty(shape, dtype=torch.float32)

    return forward


def _wanted(num_tensors: int, need_q: bool, need_kv: bool) -> tuple[bool, ...]:
    if num_tensors == 1:
        return (need_q or need_kv,)
    return (need_q, need_kv, need_kv)[:num_tensors]


def _backward_of(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, packed: tuple[Tensor, ...], need_q: bool,
    need_kv: bool, options: tuple[Any, ...],
) -> _KnownBackward:  # fmt: skip
    """How to compute the gradients of these tensors: looked up, or worked out."""
    tensors = (dout, dlse, out, lse, *packed, *options[:NUM_EXTRAS])
    key = key_of(tensors, (need_q, need_kv, *options[NUM_EXTRAS:]))
    found = _known_backwards.get(key)
    if found is None:
        known = _learn((*unpack(packed), dout), options, "backward")
        likes = zip(packed, _wanted(len(packed), need_q, need_kv), strict=True)
        grads = [torch.empty(t.shape if want else (0,), dtype=t.dtype, device="meta") for t, want in likes]
        layouts = tuple((tuple(g.shape), g.stride(), g.dtype) for g in grads)
        any_q, any_kv = (need_q or need_kv, True) if len(packed) == 1 else (need_q, need_kv)
        found = _keep(_known_backwards, key, _KnownBackward(known, any_q, any_kv, layouts))
    return found


def _backward(num_tensors: int) -> Callable[..., Any]:
    def backward(dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, *args: Any) -> Any:
        packed, (need_q, need_kv) = args[:num_tensors], args[num_tensors : num_tensors + 2]
        options = args[num_tensors + 2 :]
        found = _backward_of(dout, dlse, out, lse, packed, need_q, need_kv, options)
        grads = found.run(dout, dlse, out, lse, packed, _parse_extras(options))
        return grads if num_tensors > 1 else grads[0]

    return backward


def _backward_fake(num_tensors: int) -> Callable[..., Any]:
    def backward(dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, *args: Any) -> Any:
        packed = args[:num_tensors]
        need_q, need_kv = args[num_tensors : num_tensors + 2]
        grads = tuple(
            tensor.new_empty(tensor.shape if want else 0)
            for tensor, want in zip(packed, _wanted(num_tensors, need_q, need_kv), strict=True)
        )
        return grads if num_tensors > 1 else grads[0]

    return backward


def _gradients(
    name: str,
    saved: tuple[Any, ...],
    scalars: tuple[Any, ...],
    wanted: tuple[bool, ...],
    dout: Tensor | None,
    dlse: Tensor | None,
    call: "KnownCall | None" = None,
) -> tuple[Tensor | None, ...]:
    """Gradients of an operator's tensors, of each of which ``wanted`` says whether it needs one. ``saved``: out, lse,
    the tensors and the extras of the forward. ``call``: what is to remember how it was done."""
    if dout is None and dlse is None:
        return (None,) * len(wanted)
    out, lse, packed, extras = saved[0], saved[1], saved[2 : 2 + len(wanted)], saved[2 + len(wanted) :]
    need_q, need_kv = wanted[0], any(wanted[1:]) or len(wanted) == 1
    dout = torch.zeros_like(out) if dout is None else dout
    # With gradients on, somebody wants second derivatives: the operator knows what to say
    if not torch.compiler.is_dynamo_compiling() and not torch.is_grad_enabled() and is_plain((dout, dlse, *saved)):
        found = _backward_of(dout, dlse, out, lse, packed, need_q, need_kv, (*extras, *scalars))
        grads = found.run(dout, dlse, out, lse, packed, _parse_extras(extras))
        if call is not None:
            call.remember(wanted, dout, dlse, saved, found)
    else:
        backward = getattr(getattr(torch.ops, NAMESPACE), f"{name}_backward").default
        grads = backward(dout, dlse, out, lse, *packed, need_q, need_kv, *extras, *scalars)
        grads = grads if len(wanted) > 1 else (grads,)
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
        grads = _gradients(name, ctx.saved_tensors, ctx.scalars, wanted, dout, dlse)
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
        out, lse = call.forward(packed, extras)
        ctx.save_for_backward(out, lse, *packed, *extras)
        ctx.call = call
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        call, saved, wanted = ctx.call, ctx.saved_tensors, ctx.needs_input_grad[2:]
        grads = None
        if not torch.compiler.is_dynamo_compiling() and not torch.is_grad_enabled():
            grads = call.gradients(wanted, dout, dlse, saved)
        if grads is None:
            grads = _gradients(call.name, saved, call.scalars, wanted, dout, dlse, call)
        return (None, None, *grads)


# Function.apply, but for its look at functorch, which is_plain has excluded
_apply: Any = super(torch.autograd.Function, _KnownCallFunction).apply


def find_call(
    scalars: tuple[Any, ...], packed: tuple[Tensor, ...], extras: tuple[Tensor | None, ...]
) -> KnownCall | None:
    """What `learn_call` made of a call with these ``scalars``, on tensors that differ from these in their addresses at
    most."""
    if is_heard() or not PLAIN_TYPES.issuperset(map(type, packed)):  # sizes of others may be symbols
        return None
    calls = known_calls.get(_call_key(scalars, packed))
    if calls is not None:
        given = _present((*packed, *extras))
        for call in calls:
            if call.alike(given):
                return call
    return None


def run_known(call: KnownCall, packed: tuple[Tensor, ...], extras: tuple[Tensor | None, ...]) -> tuple[Tensor, Tensor]:
    """(out, lse), differentiable, of tensors for which ``call`` was found."""
    if call.differentiable and torch.is_grad_enabled():
        out, lse = _apply(call, extras, *packed)
        return out, lse
    return call.forward(packed, extras)


def learn_call(scalars: tuple[Any, ...], name: str, packed: tuple[Tensor, ...], options: tuple[Any, ...]) -> None:
    """Let `find_call` find under ``scalars`` a call that the operator has just computed."""
    extras, given = options[:NUM_EXTRAS], options[NUM_EXTRAS:]
    kinds = (int, int, float, bool, int, int, float, float, bool)  # of _OPTIONS: the dispatcher has converted its own
    converted = tuple(kind(value) for kind, value in zip(kinds, given, strict=True))
    tensors = _present((*packed, *extras[:-1]))
    known = _known.get(key_of((*packed, *extras), converted)) if is_plain(tensors) else None
    if known is None:  # a mode may have computed it another way
        return
    call = KnownCall(
        name,
        converted,
        known,
        Alike(tensors),
        differentiable=any(t.requires_grad for t in packed),
        has_extras=any(t is not None for t in extras),
        forced=os.environ.get(PATH_ENV),
    )
    key = _call_key(scalars, packed)
    calls = known_calls.get(key) or _keep(known_calls, key, [])
    calls.insert(0, call)
    del calls[_MAX_ALIKE:]


def _call_key(scalars: tuple[Any, ...], packed: tuple[Tensor, ...]) -> tuple[Any, ...]:
    return (os.environ.get(PATH_ENV), packed[0].shape, packed[-1].shape, *scalars)


def _present(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    return [t for t in tensors if t is not None]


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
        _library.impl(f"{name}_backward", _backward(num), key)
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
