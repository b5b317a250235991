"""The grid on a GPU: every head dim, dtype, mask and feature at real lengths, against fp64 truth, on each path.

What costs time here is compilation (each combination of features is a kernel of its own), so features meet masks at two
head dims and the other head dims meet all features at once. ``-n 8`` compiles in parallel.
"""

from typing import Any

import pytest
import torch

from tests.kernels.cases import Case, check_dense, check_varlen

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("path")]
F16, BF16 = torch.float16, torch.bfloat16
HEAD_DIMS = [1, 8, 16, 32, 40, 59, 64, 80, 96, 111, 128, 160, 192, 224, 256]
LENGTHS = [
    *[(1, 1), (3, 3), (64, 32), (64, 128), (128, 192), (239, 1), (799, 3), (113, 203), (128, 217), (113, 211)],
    *[(108, 256), (256, 512), (384, 256), (640, 128), (512, 256), (1023, 1024), (1024, 1023), (2048, 2048)],
]
"""The lengths of flash-attn's suite, up to what fp64 truth costs."""
MASKS: list[dict[str, Any]] = [{}, {"causal": True}, {"window_size": (64, 20)}, {"window_size": (127, 0)}]


@pytest.mark.parametrize(
    ("head_dim", "causal"), [(d, True) for d in HEAD_DIMS] + [(d, False) for d in (8, 64, 96, 128, 256)]
)
def test_head_dims(head_dim: int, causal: bool) -> None:
    for dtype in (BF16, F16) if head_dim in (59, 64, 128) else (BF16,):
        check_dense(Case(333, 333, head_dim, 6, 3, batch=2, dtype=dtype, options={"causal": causal}))


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_lengths(lengths: tuple[int, int], head_dim: int, mask: dict[str, Any]) -> None:
    check_dense(Case(*lengths, head_dim, 4, 2, batch=2, dtype=BF16, options=mask, grad_factor=3))


FEATURES = [
    *[(d, m, f, BF16) for d in (64, 128) for m in MASKS[1:3] for f in ("softcap", "alibi", "dropout", "scale")],
    *[(d, MASKS[1], "all", BF16) for d in (40, 64, 96, 128, 192, 256)],
    *[(64, mask, "all", F16) for mask in MASKS],
]


@pytest.mark.parametrize(("head_dim", "mask", "feature", "dtype"), FEATURES, ids=str)
def test_features(head_dim: int, mask: dict[str, Any], feature: str, dtype: torch.dtype) -> None:
    options = dict(mask)
    if feature in ("softcap", "all"):
        options["softcap"] = 15.0
    if feature in ("scale", "all"):
        options["softmax_scale"] = 0.2
    case = Case(
        300,
        413,
        head_dim,
        heads=4,
        heads_k=2,
        batch=2,
        dtype=dtype,
        options=options,
        alibi=2 if feature in ("alibi", "all") else 0,
        dropout_p=0.17 if feature in ("dropout", "all") else 0.0,
        grad_factor=3,
    )
    check_dense(case)


@pytest.mark.parametrize(
    ("heads", "heads_k", "head_dim"),
    [(8, 8, 64), (8, 4, 64), (9, 3, 64), (8, 1, 128), (32, 1, 64), (6, 2, 192), (8, 1, 256)],
)
def test_grouped_heads(heads: int, heads_k: int, head_dim: int) -> None:
    check_dense(Case(257, 390, head_dim, heads, heads_k, dtype=BF16, options={"causal": True}, grad_factor=3))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("window", [0, 1, 63, 64, 65, 127, 128, 129])
def test_window_edges(window: int, head_dim: int) -> None:
    """Limits at, just below and just above the block sizes."""
    for size in ((window, 0), (0, window), (window, window), (window, -1), (-1, window)):
        check_dense(Case(384, 384, head_dim, dtype=BF16, options={"window_size": size}, grad_factor=3))


@pytest.mark.parametrize("blocks", range(1, 7))
@pytest.mark.parametrize("head_dim", [64, 128])
def test_numbers_of_key_blocks(blocks: int, head_dim: int) -> None:
    """One block up to more than the pipeline has stages, with and without a ragged tail."""
    for rest in (0, 1):
        check_dense(Case(128, 64 * blocks + rest, head_dim, dtype=F16, grad_factor=3))


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize(
    ("head_dim", "mask"),
    [(d, m) for d in (64, 128) for m in MASKS[:3]] + [(d, MASKS[1]) for d in (59, 96, 160, 256)],
    ids=str,
)
def test_varlen(head_dim: int, mask: dict[str, Any], everything: bool) -> None:
    lengths_q, lengths_k = [0, 511, 1, 129, 300, 64], [10, 511, 200, 0, 411, 63]
    case = Case(0, 0, head_dim, 4, 2, dtype=BF16, options=mask)
    if everything:
        case = Case(0, 0, head_dim, 4, 2, dtype=F16, options={**mask, "softcap": 9.0}, alibi=2, dropout_p=0.1)
    check_varlen(lengths_q, lengths_k, case, tail=0 if everything else 37)


@pytest.mark.parametrize("magnitude", [10.0, 100.0])
@pytest.mark.parametrize("causal", [False, True])
def test_large_scores(causal: bool, magnitude: float) -> None:
    """Scores up to 1e5: finite, and as exact as flash-attn's suite asks of such inputs."""
    check_dense(Case(300, 300, 64, dtype=BF16, magnitude=magnitude, grad_factor=5, options={"causal": causal}))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_fp32(head_dim: int) -> None:
    check_dense(Case(200, 230, head_dim, dtype=torch.float32, out_factor=4, grad_factor=4, options={"causal": True}))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("causal", [False, True])
def test_long(head_dim: int, causal: bool) -> None:
    """More blocks than a section or a wave: 4224 keys."""
    check_dense(Case(4224, 4224, head_dim, 1, 1, dtype=BF16, options={"causal": causal}, grad_factor=3))
