"""Property tests: any shape, mask and stride gives what the definition says."""

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kernels
from kernels.attention.reference import attention_reference
from tests.kernels.cases import DEVICE, Case, check_dense, check_varlen, random

FEW = settings(
    max_examples=100 if DEVICE == "cuda" else 12,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
MOST = 300 if DEVICE == "cuda" else 40
lengths = st.integers(1, MOST)
windows = st.tuples(st.integers(-1, MOST), st.integers(-1, MOST))


@FEW
@given(
    seqlen_q=lengths,
    seqlen_k=lengths,
    head_dim=st.integers(1, 40),
    heads_k=st.integers(1, 2),
    group=st.integers(1, 2),
    causal=st.booleans(),
    window=windows,
    softcap=st.sampled_from([0.0, 3.0]),
    seed=st.integers(0, 99),
)
def test_dense(
    seqlen_q: int,
    seqlen_k: int,
    head_dim: int,
    heads_k: int,
    group: int,
    causal: bool,
    window: tuple[int, int],
    softcap: float,
    seed: int,
) -> None:
    """Forward and all gradients. (Factor 3: the error of so few numbers scatters.)"""
    options = {"causal": causal, "window_size": window, "softcap": softcap}
    heads = heads_k * group
    check_dense(
        Case(seqlen_q, seqlen_k, head_dim, heads, heads_k, options=options, grad_factor=3, seed=seed, out_factor=3)
    )


@FEW
@given(
    pairs=st.lists(st.tuples(st.integers(0, MOST), st.integers(0, MOST)), min_size=1, max_size=4),
    causal=st.booleans(),
    window=windows,
    tail=st.integers(0, 5),
    seed=st.integers(0, 99),
)
def test_varlen(pairs: list[tuple[int, int]], causal: bool, window: tuple[int, int], tail: int, seed: int) -> None:
    """Any lengths, empty ones too, and tokens that belong to no sequence."""
    case = Case(0, 0, 16, 1, 1, options={"causal": causal, "window_size": window}, seed=seed, out_factor=3)
    check_varlen([q for q, _ in pairs], [k for _, k in pairs], case, tail)


@FEW
@given(
    seqlen=lengths,
    pads=st.tuples(st.integers(0, 3), st.integers(0, 2), st.integers(0, 8)),
    order=st.permutations(range(3)),
    seed=st.integers(0, 99),
)
def test_strides(seqlen: int, pads: tuple[int, int, int], order: list[int], seed: int) -> None:
    """q cut out of a permuted, padded, NaN-filled buffer: the bits of the contiguous call."""
    torch.manual_seed(seed)
    shape = (2, seqlen, 2, 16)
    wide = [shape[0] + pads[0], shape[1], shape[2] + pads[1], shape[3] + pads[2]]
    buffer = torch.full([wide[i] for i in order] + [wide[3]], float("nan"), dtype=torch.float16, device=DEVICE)
    view = buffer.permute(*[order.index(i) for i in range(3)], 3)[:2, :, :2, :16]
    assert view.shape == shape
    view.copy_(random(*shape, dtype=torch.float16))
    expected = kernels.flash_attn_func(*[view.contiguous()] * 3, causal=True)
    assert torch.equal(kernels.flash_attn_func(view, view, view, causal=True), expected)


@FEW
@given(seqlen=lengths, shift=st.floats(-50, 50), seed=st.integers(0, 99))
def test_shifting_all_scores_changes_lse_alone(seqlen: int, shift: float, seed: int) -> None:
    """Softmax is invariant to a constant: an extra key dimension that adds ``shift`` to every score."""
    torch.manual_seed(seed)
    q, k, v = (random(1, seqlen, 1, 15, dtype=torch.float32) for _ in range(3))
    ones = torch.ones(1, seqlen, 1, 1, device=DEVICE)
    v = torch.cat([v, 0 * ones], -1)
    results = [
        kernels.flash_attn_func(
            torch.cat([q, ones], -1), torch.cat([k, c * ones], -1), v, softmax_scale=1.0, return_attn_probs=True
        )
        for c in (0.0, shift)
    ]
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(results[0][1] + shift, results[1][1], rtol=1e-4, atol=1e-4)


@FEW
@given(seqlen_q=lengths, seqlen_k=lengths, window=windows, causal=st.booleans())
def test_visibility_of_single_keys(seqlen_q: int, seqlen_k: int, window: tuple[int, int], causal: bool) -> None:
    """With v = one-hot rows, out tells exactly which keys each query saw (v's columns are key index mod 16)."""
    q = torch.zeros(1, seqlen_q, 1, 16, dtype=torch.float32, device=DEVICE)
    k = torch.zeros(1, seqlen_k, 1, 16, dtype=torch.float32, device=DEVICE)
    v = torch.eye(16, device=DEVICE).repeat(seqlen_k // 16 + 1, 1)[None, :seqlen_k, None]
    out = kernels.flash_attn_func(q, k, v, causal=causal, window_size=window)
    truth, _ = attention_reference(q, k, v, causal=causal, window_size=window)
    torch.testing.assert_close(out.double(), truth, rtol=1e-5, atol=1e-6)
