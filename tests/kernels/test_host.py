"""The short ways of an eager call: past Triton's launcher (in a process of its own), and past PyTorch's dispatcher."""

import gc
import os
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from kernels.attention import op, portable
from kernels.attention.plain import Alike, is_heard
from tests.kernels.cases import DEVICE, leaves, random

ROOT = Path(__file__).resolve().parents[2]
F32 = torch.float32


@pytest.mark.skipif(shutil.which("gcc") is None, reason="Triton's launcher is compiled by gcc")
def test_launches_past_triton() -> None:
    """Same bytes as Triton's own launch, descriptors encoded once, hooks heard, little Python."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {
        "CUDA_VISIBLE_DEVICES": "",
        "TRITON_DEFAULT_FP_FUSION": "1",
    }
    command = [sys.executable, "-m", "tests.kernels.host_checks"]
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count(": ok") == 6


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the operators whose known calls went past the dispatcher from here on; none is known yet."""
    op.forget()
    names: list[str] = []
    run_known = op.run_known

    def note(call: op.KnownCall, *args: Any) -> Any:
        names.append(call.name)
        return run_known(call, *args)

    monkeypatch.setattr(op, "run_known", note)
    return names


def inputs(length: int = 8) -> list[Tensor]:
    return leaves(*(random(1, length, 2, 16, dtype=F32) for _ in range(3)))


def gradients(call: Callable[..., Any], given: list[Tensor]) -> list[Tensor]:
    out, lse, _ = call(*given, causal=True, return_attn_probs=True)
    loss = out.square().sum() + lse.sum()
    return [out, lse, *torch.autograd.grad(loss, given)]


def test_a_known_call_computes_the_same(taken: list[str]) -> None:
    given = inputs()
    first = gradients(kernels.flash_attn_func, given)
    assert not taken
    second = gradients(kernels.flash_attn_func, given)
    assert taken == ["attention"]
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    assert second[0].requires_grad
    with torch.no_grad():
        assert torch.equal(kernels.flash_attn_func(*given, causal=True), first[0])
    assert len(taken) == 2


def test_packed_and_varlen_calls_become_known(taken: list[str]) -> None:
    (qkv,) = leaves(random(20, 3, 2, 16, dtype=F32))
    (kv,) = leaves(random(1, 8, 2, 2, 16, dtype=F32))
    offsets = torch.tensor([0, 8, 20], dtype=torch.int32, device=DEVICE)
    calls = (
        (qkv, lambda: kernels.flash_attn_varlen_qkvpacked_func(qkv, offsets, 12)),
        (kv, lambda: kernels.flash_attn_kvpacked_func(inputs()[0].detach() * 0 + 1, kv)),
    )
    for leaf, call in calls:
        first, second = ((out := call()), *torch.autograd.grad(out.square().sum(), leaf)), call()
        assert torch.equal(first[0], second)
        assert torch.equal(first[1], torch.autograd.grad(second.square().sum(), leaf)[0])
    assert taken == ["attention_qkvpacked", "attention_kvpacked"]


def test_other_arguments_are_another_call(taken: list[str]) -> None:
    """Nothing of a known call is assumed of one with other arguments, and its errors are not skipped."""
    q, k, v = (t.detach() for t in inputs())
    results = []
    for _ in range(2):
        for options in ({}, {"causal": True}, {"softmax_scale": 0.5}, {"window_size": (1, 1)}, {"softcap": 2.0}):
            results.append(kernels.flash_attn_func(q, k, v, **options))
    assert len(taken) == 5
    for first, second in zip(results[:5], results[5:], strict=True):
        assert torch.equal(first, second)
    assert len({r.sum().item() for r in results}) == 5
    for wrong in ({"dropout_p": 1.0}, {"window_size": (1,)}, {"alibi_slopes": torch.zeros(3, device=DEVICE)}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            kernels.flash_attn_func(q, k, v, **wrong)
    with pytest.raises(ValueError, match="k and v must have one shape"):
        kernels.flash_attn_func(q, k, v[:, :4])
    limits = torch.tensor([1, 1])  # may change under us: such a call is never known
    kernels.flash_attn_func(q, k, v, window_size=limits)
    limits.fill_(-1)
    assert torch.equal(kernels.flash_attn_func(q, k, v, window_size=limits), results[0])


def test_known_calls_draw_new_masks(taken: list[str]) -> None:
    q = random(1, 8, 2, 16, dtype=F32)
    torch.manual_seed(0)
    outs = [kernels.flash_attn_func(q, q, q, dropout_p=0.5) for _ in range(3)]
    assert len(taken) == 2
    assert not torch.equal(outs[1], outs[2])
    torch.manual_seed(0)
    assert torch.equal(kernels.flash_attn_func(q, q, q, dropout_p=0.5), outs[0])


def test_the_second_derivative_of_a_known_call_is_refused(taken: list[str]) -> None:
    given = inputs()
    for _ in range(2):
        out = kernels.flash_attn_func(*given)
    assert taken
    (dq,) = torch.autograd.grad(out.square().sum(), given[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative.*standard_attention"):
        dq.sum().backward()


class _Seen(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class _Heard(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class _Like(Tensor):
    """Of which a Tensor method may mean anything."""


def _profiled() -> Any:
    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])


CONTEXTS: dict[str, Callable[[], Any]] = {
    "autocast": lambda: torch.autocast(DEVICE, dtype=torch.bfloat16),
    "dispatch mode": _Seen,
    "function mode": _Heard,
    "inference": torch.inference_mode,
    "profiler": _profiled,
    "below autograd": torch._C._AutoDispatchBelowAutograd,
}


@pytest.mark.parametrize("name", CONTEXTS)
def test_whatever_wants_to_hear_of_operators_does(name: str, taken: list[str]) -> None:
    q, k, v = (t.detach() for t in inputs())
    for _ in range(2):
        kernels.flash_attn_func(q, k, v)
    assert len(taken) == 1
    with CONTEXTS[name]():
        out = kernels.flash_attn_func(q, k, v)
    assert len(taken) == 1
    assert out.dtype == (torch.bfloat16 if name == "autocast" else F32)
    kernels.flash_attn_func(q, k, v)
    assert len(taken) == 2, "and what was switched on is off again"


def test_modes_in_the_backward_hear_of_it(taken: list[str]) -> None:
    heard: list[str] = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            heard.append(str(func))
            return func(*args, **(kwargs or {}))

    given = inputs()
    for _ in range(2):
        out = kernels.flash_attn_func(*given)
    assert taken
    with Mode():
        out.sum().backward()
    assert any("attention_backward" in name for name in heard)


@pytest.fixture
def worked_out(taken: list[str], monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, ...]]:
    """Which gradients were wanted in backwards, from here on, that were not remembered."""
    wanted: list[tuple[bool, ...]] = []
    inner = op._gradients

    def note(name: str, saved: Any, scalars: Any, which: tuple[bool, ...], *args: Any) -> Any:
        wanted.append(which)
        return inner(name, saved, scalars, which, *args)

    monkeypatch.setattr(op, "_gradients", note)
    return wanted


def test_a_backward_is_worked_out_once(worked_out: list[tuple[bool, ...]]) -> None:
    """And anew without a gradient of LSE, or for another layout of dO."""
    given = inputs()
    expected = gradients(kernels.flash_attn_func, given)[2:]
    gradients(kernels.flash_attn_func, given)
    out, lse, _ = kernels.flash_attn_func(*given, causal=True, return_attn_probs=True)
    worked_out.clear()
    loss = out.square().sum() + lse.sum()
    for got, true in zip(torch.autograd.grad(loss, given, retain_graph=True), expected, strict=True):
        assert torch.equal(got, true)
    assert not worked_out
    dout = random(*out.shape, dtype=F32)
    turned = dout.transpose(1, 2).contiguous().transpose(1, 2)
    first = [torch.autograd.grad(out, given[1:], d, retain_graph=True) for d in (dout, dout, turned, turned)]
    assert len(worked_out) == 2
    for dk, dv in first[1:]:
        assert torch.equal(dk, first[0][0])
        assert torch.equal(dv, first[0][1])
    op.forget()
    torch.autograd.grad(out, given[1:], turned)
    assert len(worked_out) == 3, "what a graph holds is forgotten too"


def test_a_remembered_backward_computes_what_is_wanted(worked_out: list[tuple[bool, ...]]) -> None:
    q, k, v = inputs()
    expected = gradients(kernels.flash_attn_func, [q, k, v])[2:]
    worked_out.clear()
    for given, which in (([q, k.detach(), v.detach()], [0]), ([q.detach(), k, v], [1, 2])):
        for _ in range(3):
            out, lse, _ = kernels.flash_attn_func(*given, causal=True, return_attn_probs=True)
            loss = out.square().sum() + lse.sum()
            grads = torch.autograd.grad(loss, [given[at] for at in which])
            for grad, at in zip(grads, which, strict=True):
                assert torch.equal(grad, expected[at])
    assert worked_out == [(True, False, False), (True, False, False), (False, True, True), (False, True, True)]


def test_a_backward_where_keys_of_no_tensor_are_excluded_is_remembered(worked_out: list[tuple[bool, ...]]) -> None:
    """As torch 2.11 does in every node of autograd: it excludes the key of tensors with names."""
    given = inputs()
    kernels.flash_attn_func(*given)
    key_set, key = torch._C.DispatchKeySet, torch._C.DispatchKey
    for _ in range(2):
        out = kernels.flash_attn_func(*given)
        with torch._C._ExcludeDispatchKeyGuard(key_set(key.Functionalize)):
            torch.autograd.grad(out.square().sum(), given)
    assert len(worked_out) == 1
    with torch._C._ExcludeDispatchKeyGuard(key_set(key.ADInplaceOrView)):
        assert not op.is_plain(given)


def test_a_backward_under_another_path_is_not_remembered(
    worked_out: list[tuple[bool, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = inputs()
    kernels.flash_attn_func(*given)
    out = kernels.flash_attn_func(*given).sum()
    monkeypatch.setenv("FLASH_ATTN_PATH", "portable")
    torch.autograd.grad(out, given, retain_graph=True)
    monkeypatch.delenv("FLASH_ATTN_PATH")
    for _ in range(2):
        torch.autograd.grad(out, given, retain_graph=True)
    assert len(worked_out) == 2


def test_hooks_may_return_saved_tensors_in_another_layout(worked_out: list[tuple[bool, ...]]) -> None:
    """As offloading does: what comes back is contiguous, whatever was saved."""
    (qkv,) = leaves(random(1, 8, 3, 2, 16, dtype=F32))
    given = list(qkv.unbind(2))
    assert not given[0].is_contiguous()
    expected = gradients(kernels.flash_attn_func, given)
    gradients(kernels.flash_attn_func, given)
    worked_out.clear()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: t.numpy(force=True), lambda a: torch.tensor(a, device=DEVICE)
    ):
        for _ in range(2):
            for got, true in zip(gradients(kernels.flash_attn_func, given), expected, strict=True):
                assert torch.equal(got, true)
    assert len(worked_out) == 1
    gradients(kernels.flash_attn_func, given)
    assert len(worked_out) == 2


def test_alike_is_all_but_the_address() -> None:
    base = torch.zeros(2, 8, 2, 8, device=DEVICE)
    cu = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    alike, twice = Alike((base, cu)), Alike((base, cu, cu))
    assert alike((base.clone(), cu.clone()))
    assert twice((base.clone(), other := cu.clone(), other))
    assert not twice((base, cu, cu.clone()))
    assert not Alike((base, cu, cu.clone()))((base, cu, cu))
    with FakeTensorMode():
        fake = torch.zeros(2, 8, 2, 8)
    differ = {
        "shape": torch.zeros(2, 9, 2, 8, device=DEVICE),
        "strides": base.transpose(0, 2).contiguous().transpose(0, 2),
        "dtype": base.int(),
        "requires_grad": base.clone().requires_grad_(),
        "type": torch.nn.Parameter(base, requires_grad=False),
        "subclass": base.as_subclass(_Like),
        "alignment": torch.zeros(base.numel() + 1, device=DEVICE)[1:].view_as(base),
        "device": base.to("meta"),
        "fake": fake,
        "negated": torch._neg_view(base),
    }
    for name, tensor in differ.items():
        assert not alike((tensor, cu)), name
    assert not alike((base,))
    assert Alike((differ["alignment"], cu))((differ["alignment"], cu))
    for name, context in CONTEXTS.items():
        with context():
            assert is_heard() or not alike((base, cu)), name
    seen: list[bool] = []
    torch.func.vmap(lambda x: (seen.append(is_heard()), x)[1])(base)
    torch.func.grad(lambda x: (seen.append(is_heard()), x.sum())[1])(base)
    assert seen == [True, True]


def test_alike_keeps_no_tensor() -> None:
    tensor = torch.zeros(4)
    alike, dead = Alike((tensor,)), weakref.ref(tensor)
    del tensor
    gc.collect()
    assert dead() is None
    assert alike((torch.zeros(4),))


def test_tensors_that_only_look_like_one_are_left_to_pytorch() -> None:
    (q,) = leaves(random(1, 8, 2, 16, dtype=F32))
    negated = torch.view_as_complex(q.detach().unflatten(-1, (8, 2))).conj().imag
    with FakeTensorMode():
        fake = torch.empty(1)
    others = [q.detach().as_subclass(_Like), q.detach().to_sparse(), negated, torch.empty(1, device="meta"), fake]
    assert op.is_plain((q, None))
    assert op.is_plain((torch.nn.Parameter(q.detach()), q))
    assert negated.is_neg()
    for other in others:
        assert not op.is_plain((q, other)), type(other)
    seen = []
    torch.func.vmap(lambda x: (seen.append(op.is_plain((x,))), x)[1])(q.detach())
    torch.func.grad(lambda x: (seen.append(op.is_plain((x,))), x.sum())[1])(q.detach())
    assert seen == [False, False]


def test_a_call_that_failed_half_way_can_be_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As out of memory does: what a path works out once is kept once all of it is there."""
    op.forget()
    given = inputs()

    def out_of_memory(plan: Any) -> Any:
        raise torch.OutOfMemoryError(plan.kernel.__name__)

    def first_fails(call: Callable[[], Any]) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(portable, "prepare", out_of_memory)
            for _ in range(2):
                with pytest.raises(torch.OutOfMemoryError):
                    call()
        return call()

    out = first_fails(lambda: kernels.flash_attn_func(*given))
    grads = first_fails(lambda: torch.autograd.grad(out.sum(), given, retain_graph=True))
    for got, true in zip(grads, torch.autograd.grad(out.sum(), given), strict=True):
        assert torch.equal(got, true)


def test_sizes_may_be_symbols(taken: list[str]) -> None:
    mode = FakeTensorMode(shape_env=ShapeEnv())
    given = [mode.from_tensor(t.detach(), static_shapes=False) for t in inputs(9)]
    assert any(isinstance(size, torch.SymInt) for size in given[0].shape)
    for _ in range(2):
        assert kernels.flash_attn_func(*given).shape == given[0].shape
    assert not taken


def test_a_checkpointed_call_becomes_known_between_forward_and_recomputation(taken: list[str]) -> None:
    """Both ways save the same tensors in the same order, which checkpointing insists on."""
    given = inputs()
    expected = torch.autograd.grad(kernels.flash_attn_func(*given).square().sum(), given)
    op.forget()
    out = torch.utils.checkpoint.checkpoint(kernels.flash_attn_func, *given, use_reentrant=False)
    assert not taken
    for got, true in zip(torch.autograd.grad(out.square().sum(), given), expected, strict=True):
        assert torch.equal(got, true)
    assert taken
