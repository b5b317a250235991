"""The seam: all implementations compute the same attention, and say so when they can't."""

from __future__ import annotations

import itertools
import logging
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from configs.errors import UserError
from configs.schema import Attention, ModelConfig, Position
from model import attention as seam
from model import build_model, resolve_attention
from model.attention import Context, Scores, attend
from model.layers import alibi_slopes, document_ids, rotary_tables, rotate, token_positions
from tests.model.small import LLAMA, batch, small

CPU = torch.device("cpu")
STARTS = torch.tensor([0, 3, 12, 16, 17, 32], dtype=torch.int32)  # two samples of 16: documents 3, 9, 4 and 1, 15


def reference(q: Tensor, k: Tensor, v: Tensor, scores: Scores, context: Context) -> Tensor:
    """Attention one query at a time, in fp64, from its definition."""
    batch_size, length, num_heads, head_dim = q.shape
    group = num_heads // k.shape[2]
    q, k, v = q.double(), k.double(), v.double()
    out = torch.zeros_like(q)
    starts = [0, *range(length, batch_size * length + 1, length)]
    if context.cu_seqlens is not None:
        starts = context.cu_seqlens.tolist()
    for b in range(batch_size):
        for i in range(length):
            first = max(s for s in starts if s <= b * length + i) - b * length
            if scores.window is not None:
                first = max(first, i - scores.window)
            for h in range(num_heads):
                score = k[b, first : i + 1, h // group] @ q[b, i, h] / head_dim**0.5
                if scores.softcap > 0:
                    score = scores.softcap * torch.tanh(score / scores.softcap)
                if context.alibi is not None:
                    score = score + context.alibi[h].double() * (torch.arange(first, i + 1) - i)
                out[b, i, h] = score.softmax(0) @ v[b, first : i + 1, h // group]
    return out


CASES: dict[str, tuple[Scores, bool, bool, int]] = {
    "causal": (Scores(), False, False, 4),
    "grouped": (Scores(), False, False, 2),
    "window": (Scores(window=3), False, False, 4),
    "window-0": (Scores(window=0), False, False, 4),
    "softcap": (Scores(softcap=1.5), False, False, 1),
    "alibi": (Scores(), True, False, 4),
    "documents": (Scores(), False, True, 4),
    "documents-window-grouped": (Scores(window=2), False, True, 2),
    "all": (Scores(window=5, softcap=2.0), True, True, 2),
}


def able(name: Attention, label: str) -> bool:
    """Whether it does not refuse, see the last test."""
    scores, _, documents, _ = CASES[label]
    if name is Attention.flash1:
        return label == "causal"
    if name is Attention.sdpa:
        return scores.softcap == 0
    return name is Attention.flash or not documents


ABLE = [
    pytest.param(name, case, id=f"{name.value}-{label}")
    for label, case in CASES.items()
    for name in (Attention.sdpa, Attention.standard, Attention.flash, Attention.flash1)
    if able(name, label)
]


@pytest.mark.parametrize(("name", "case"), ABLE)
def test_implementations_follow_the_definition(name: Attention, case: tuple[Scores, bool, bool, int]) -> None:
    scores, alibi, documents, num_kv_heads = case
    slopes = alibi_slopes(4, CPU) if alibi else None
    context = Context(name, alibi=slopes, cu_seqlens=STARTS if documents else None, max_seqlen=15)
    q = torch.randn(2, 16, 4, 8).requires_grad_()
    k, v = (torch.randn(2, 16, num_kv_heads, 8).requires_grad_() for _ in range(2))
    out = attend(q, k, v, scores, context)
    expected = reference(q, k, v, scores, context)
    weight = torch.randn_like(out)
    grads = torch.autograd.grad((out * weight).sum(), (q, k, v))
    expected_grads = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    for ours, theirs in zip((out, *grads), (expected, *expected_grads), strict=True):
        # Values are of order 1 and sums have at most 16 terms: fp32 rounds to a few 1e-6.
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-5, atol=5e-6)


MODELS: dict[str, tuple[dict[str, Any], bool]] = {
    "gpt2": ({}, False),
    "gpt2-documents": ({}, True),
    "gpt2-alibi-window": ({"position": Position.alibi, "window": 4}, False),
    "llama-grouped": (LLAMA | {"num_kv_heads": 2}, False),
    "llama-documents": (LLAMA | {"qk_norm": True}, True),
}


@pytest.mark.parametrize("case", MODELS.values(), ids=MODELS)
def test_models_agree_whatever_the_implementation(case: tuple[dict[str, Any], bool]) -> None:
    """Packed and separate queries, keys and values; outputs and all gradients."""
    options, documents = case
    results = []
    for name in (Attention.sdpa, Attention.flash):
        torch.manual_seed(1)
        config = small(attention=name, init_std=0.2, **options)
        model = build_model(config)
        tokens, targets = batch(config)
        starts = {"cu_seqlens": STARTS, "max_seqlen": 15} if documents else {}
        loss = model(tokens, targets, **starts)
        loss.sum().backward()
        results.append([loss, *(p.grad for p in model.parameters())])
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)


def test_projection_goes_to_the_kernel_uncut_where_nothing_is_done_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def packs(**options: Any) -> bool:
        spy = Mock(wraps=seam.flash_packed)
        monkeypatch.setattr(seam, "flash_packed", spy)
        config = small(attention=Attention.flash, num_layers=1, **options)
        build_model(config)(batch(config)[0])
        return bool(spy.called)

    assert packs()
    assert not packs(num_kv_heads=2)
    assert not packs(position=Position.rope)
    assert not packs(qk_norm=True)


@pytest.mark.parametrize("name", [Attention.sdpa, Attention.flash])
def test_documents_are_as_if_run_alone(name: Attention) -> None:
    for options in ({}, LLAMA):
        config = small(attention=name, init_std=0.2, **options)
        model = build_model(config)
        tokens, _ = batch(config)
        packed = model(tokens, cu_seqlens=STARTS).flatten(0, 1)
        alone = [model(tokens.flatten()[a:b][None])[0] for a, b in itertools.pairwise(STARTS)]
        torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(packed, model(tokens).flatten(0, 1), atol=1e-3)


@pytest.mark.parametrize("window", [0, 2, 5])
def test_a_window_hides_what_lies_before_it(window: int) -> None:
    config = small(num_layers=1, window=window, position=Position.rope, init_std=0.2)
    model = build_model(config)
    tokens, _ = batch(config, size=1)
    changed = tokens.clone()
    changed[0, 4] = (changed[0, 4] + 1) % 131
    differs = (model(tokens) != model(changed)).any(dim=-1)[0]
    assert differs.nonzero().flatten().tolist() == list(range(4, 4 + window + 1))


def test_cudnn_says_what_it_needs() -> None:
    config = small(attention=Attention.cudnn, head_dim=20, attention_softcap=3.0)
    with pytest.raises(UserError) as error:
        resolve_attention(config, torch.device("cuda"), torch.float32)
    for part in ("head dim 20 is no multiple of 8", "has no soft cap", "needs a CUDA device and 16 bits"):
        assert part in str(error.value)
    assert resolve_attention(small(attention=Attention.cudnn), torch.device("cuda"), torch.bfloat16) is Attention.cudnn


def test_no_token_sees_the_future() -> None:
    for options in ({}, LLAMA | {"num_kv_heads": 1}, {"position": Position.alibi}):
        config = small(init_std=0.2, **options)
        model = build_model(config)
        tokens, _ = batch(config, size=1)
        changed = tokens.clone()
        changed[0, 9:] = (changed[0, 9:] + 1) % 131
        before, after = model(tokens), model(changed)
        assert torch.equal(before[:, :9], after[:, :9])
        assert not torch.equal(before[:, 9:], after[:, 9:])


def test_positions_restart_with_each_document() -> None:
    tokens = torch.zeros(2, 16, dtype=torch.int64)
    assert token_positions(tokens, None).tolist() == list(range(16))
    expected = [*range(3), *range(9), *range(4)], [0, *range(15)]
    assert token_positions(tokens, STARTS).tolist() == list(expected)
    assert document_ids(torch.arange(32, dtype=torch.int32), STARTS).tolist()[:4] == [0, 0, 0, 1]


def test_rotation_depends_on_distance_alone_and_stays_exact_far_out() -> None:
    cos, sin = rotary_tables(torch.arange(5000), 8, 10000.0)
    q, k = torch.randn(2, 1, 1, 1, 8)

    def product(i: int, j: int) -> float:
        at = [rotate(x, cos[p : p + 1], sin[p : p + 1]) for x, p in ((q, i), (k, j))]
        return float((at[0] * at[1]).sum())

    assert product(4990, 4985) == pytest.approx(product(5, 0), abs=2e-3)
    assert product(5, 0) != pytest.approx(product(5, 1), abs=1e-2)
    torch.testing.assert_close(cos[4097, 1], torch.tensor(4097 / 10.0).cos(), rtol=0, atol=1e-3)


def test_rotation_is_not_rounded_with_the_model() -> None:
    """A table stored as a buffer would become bf16 with `model.bfloat16()`."""
    model = build_model(small(**LLAMA)).bfloat16()
    rotary = model.context(torch.zeros(1, 16, dtype=torch.int64), None, None).rotary
    assert rotary is not None
    assert rotary[0].dtype is torch.float32


def test_alibi_slopes_are_the_papers() -> None:
    assert alibi_slopes(8, CPU).tolist() == [2.0**-i for i in range(1, 9)]
    twelve = [2.0**-i for i in range(1, 9)] + [2.0**-0.5, 2.0**-1.5, 2.0**-2.5, 2.0**-3.5]
    assert alibi_slopes(12, CPU).tolist() == pytest.approx(twelve)


def test_auto_takes_flash_on_cuda_and_sdpa_on_cpu_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    auto = small(attention=Attention.auto)
    cuda = torch.device("cuda")
    assert resolve_attention(auto, cuda, torch.bfloat16) is Attention.flash
    assert resolve_attention(auto, cuda, torch.float16) is Attention.flash
    assert resolve_attention(auto, cuda, torch.float32) is Attention.sdpa
    assert resolve_attention(small(attention=Attention.auto, head_dim=512), cuda, torch.bfloat16) is Attention.sdpa
    seam._say_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="model.attention"):
        for _ in range(3):
            assert resolve_attention(auto, CPU, torch.float32) is Attention.sdpa
    assert [r.getMessage() for r in caplog.records] == ["model.attention=auto: sdpa on cpu in float32"]
    capped = small(attention=Attention.auto, attention_softcap=5.0)
    assert resolve_attention(capped, CPU, torch.float32) is Attention.standard


def test_what_an_implementation_cannot_do_names_the_key_and_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def message(config: ModelConfig) -> str:
        with pytest.raises(UserError) as caught:
            resolve_attention(config, CPU, torch.float32)
        return str(caught.value)

    assert "model.attention=flash or standard" in message(small(attention_softcap=2.0))
    assert "model.window" in message(small(attention=Attention.flash1, window=3))
    assert "model.num_kv_heads" in message(small(attention=Attention.flash1, num_kv_heads=2))
    assert "limit of 128" in message(small(attention=Attention.flash1, head_dim=160))
    assert "limit of 256" in message(small(attention=Attention.flash, head_dim=264))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "needs a CUDA device" in message(small(attention=Attention.flash))
    config = small(attention=Attention.standard)
    with pytest.raises(UserError, match=r"document_mask"):
        build_model(config)(batch(config)[0], cu_seqlens=STARTS)
