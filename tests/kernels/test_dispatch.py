"""The choice of a path and of tiles: pure functions of the problem."""

import dataclasses
import functools
from typing import Any

import pytest
import torch

import kernels
from kernels.attention import dispatch
from kernels.attention.dispatch import AttnExtras, AttnParams, Problem, choose_path, describe
from kernels.attention.hopper import tuning
from kernels.attention.portable import supports
from kernels.attention.portable.launch import Call
from kernels.attention.portable.tuning import choose_tile, padded_head_dim, section_heads
from tests.kernels.cases import DEVICE, random

PARAMS = AttnParams(0.125, 4096, 4096, causal=True, window_right=0)


def problem(**changes: object) -> Problem:
    values: dict = {
        "direction": "forward",
        "dtype": torch.bfloat16,
        "batch": 2,
        "seqlen_q": 4096,
        "seqlen_k": 4096,
        "num_heads": 16,
        "num_heads_k": 16,
        "head_dim": 128,
        "params": PARAMS,
        "capability": (9, 0),
    }
    return Problem(**{**values, **changes})


def test_auto_takes_only_proven_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(dispatch.PATH_ENV, raising=False)
    assert choose_path(problem()) in dispatch.AUTO_PATHS
    monkeypatch.setenv(dispatch.PATH_ENV, "portable")
    assert choose_path(problem()) == "portable"


def test_auto_falls_back_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first path that supports the problem; a forced one that does not is an error with its reason."""

    class Narrow:
        @staticmethod
        def supports(problem: Problem) -> str | None:
            return None if problem.head_dim == 128 else f"head dim {problem.head_dim} is not 128"

    real = dispatch.get_path
    monkeypatch.setattr(dispatch, "get_path", lambda name: Narrow if name == "hopper" else real(name))
    monkeypatch.setattr(dispatch, "AUTO_PATHS", ("hopper", "portable"))
    monkeypatch.delenv(dispatch.PATH_ENV, raising=False)
    assert choose_path(problem()) == "hopper"
    assert choose_path(problem(head_dim=64)) == "portable"
    monkeypatch.setenv(dispatch.PATH_ENV, "hopper")
    with pytest.raises(ValueError, match=r"FLASH_ATTN_PATH=hopper.*head dim 64 is not 128"):
        choose_path(problem(head_dim=64))


def test_portable_limits() -> None:
    assert supports(problem()) is None
    assert "above 256" in (supports(problem(head_dim=257)) or "")
    assert "(7, 5)" in (supports(problem(capability=(7, 5))) or "")
    assert "float64" in (supports(problem(dtype=torch.float64)) or "")


def test_describe() -> None:
    q = random(2, 30, 4, 16, dtype=torch.float16)
    k = random(2, 40, 2, 17, dtype=torch.float16)[..., :16]
    dense = describe((q, k, k), AttnParams(1.0, 30, 40), AttnExtras(), "forward")
    assert (dense.batch, dense.num_heads, dense.num_heads_k, dense.head_dim) == (2, 4, 2, 16)
    assert not dense.varlen
    assert not dense.aligned  # rows of 17 halves are 34 bytes apart
    cu = torch.tensor([0, 10, 30], dtype=torch.int32, device=DEVICE)
    packed = describe((q[0], q[0], q[0]), AttnParams(1.0, 20, 20), AttnExtras(cu, cu), "backward")
    assert (packed.batch, packed.varlen, packed.aligned) == (2, True, True)
    assert hash(packed) == hash(packed)


@pytest.mark.parametrize("capability", [None, (8, 0), (8, 6), (9, 0), (10, 0), (12, 0)], ids=str)
@pytest.mark.parametrize("element_size", [2, 4])
def test_tiles_fit(capability: tuple[int, int] | None, element_size: int) -> None:
    """Every head dim has a tile of powers of two whose operands fit the shared memory of the architecture."""
    limit = 227 * 1024 if capability in ((8, 0), (9, 0), (10, 0)) else 99 * 1024
    for head_dim in range(1, 257):
        width = padded_head_dim(head_dim)
        assert width >= max(16, head_dim)
        for kernel in ("forward", "dq", "dkdv"):
            for dropout in (False, True):
                tile = choose_tile(kernel, head_dim, element_size, capability, dropout)
                for size in (tile.block_m, tile.block_n):
                    assert size >= 16
                    assert size & (size - 1) == 0
                # operands that stay, and those in flight: one stage fewer is buffered than num_stages counts at most
                stay, flow = (tile.block_n, tile.block_m) if kernel == "dkdv" else (tile.block_m, tile.block_n)
                resident = stay * (1 if kernel == "forward" else 2)
                stages = max(1, tile.num_stages - 1)
                assert (resident + 2 * flow * stages) * width * element_size <= limit


def test_short_rows_without_a_mask_have_a_tile_of_their_own() -> None:
    """On Hopper, forward, at width 64; and a call knows whether it is such."""
    own = functools.partial(choose_tile, "forward", 64, 2)
    assert [own((9, 0), False, keys).num_warps for keys in (512, 1024, 1025, None)] == [4, 4, 8, 8]
    assert own((10, 0), False, 512) == own((10, 0), False)
    assert choose_tile("forward", 40, 2, (9, 0), False, 512) == own((9, 0), False)  # it would spill there
    assert own((9, 0), True, 512) == own((9, 0), True)
    assert choose_tile("dq", 64, 2, (9, 0), False, 512) == choose_tile("dq", 64, 2, (9, 0), False)

    def warps(**options: Any) -> int:
        q = torch.empty(1, 512, 2, 64, dtype=torch.bfloat16, device="meta")
        slopes = torch.empty(2, device="meta") if options.pop("alibi", False) else None
        call = Call(q, q, AttnParams(1.0, 512, 512, **options), AttnExtras(alibi_slopes=slopes), (9, 0))
        return call.tile("forward").num_warps

    assert warps() == 4
    assert {warps(window_right=0), warps(window_left=64), warps(softcap=30.0), warps(alibi=True)} == {8}


def test_sections() -> None:
    """At least one head, at most all of them, within the budget, and no wider than what is in flight."""
    assert section_heads(2**30, 100, 1) == 1
    assert section_heads(2**20, 100, 1) == 16
    assert section_heads(1, 100, 1) == 100
    assert section_heads(0, 0, 1) == 1
    assert section_heads(2**18, 512, 4) == 64
    assert section_heads(2**17, 512, 4) == 66  # 264 programs, 4 a head
    assert section_heads(2**18, 512, 0) == 64


def test_sections_on_hopper() -> None:
    """As many heads as the SMs hold, in groups that share keys, if their tensors fit in L2."""
    sections = functools.partial(tuning.section_heads, 2**25)
    assert sections(2**18, 512, 4, 132) == 33
    assert sections(2**23, 16, 128, 132) == 2
    assert sections(2**25, 16, 256, 132) == 1
    assert sections(2**30, 16, 1, 132) == 1
    assert sections(2**16, 96, 4, 132, multiple=8) == 40
    assert sections(2**16, 6, 4, 132, multiple=6) == 6


def test_sections_in_a_window() -> None:
    """What is in flight and, per head, a window of rows fit in L2 together; heads that share keys stay together."""
    sections = functools.partial(tuning.window_section_heads, 2**25, 1024)
    assert sections(1151, 16, 132 * 128) == 13  # 32,768 rows of 1 KB, 16,896 of them in flight
    assert sections(1151, 8, 132 * 128) == 8
    assert sections(2**14, 16, 132 * 128) == 0
    assert sections(128, 512, 2**16) == 0
    assert sections(1151, 64, 132 * 128, multiple=8) == 64
    assert sections(1151, 512, 132 * 128, multiple=8) == 208


def test_keys_in_sight() -> None:
    assert tuning.keys_in_sight(8192, 1023, 0) == 1024
    assert tuning.keys_in_sight(8192, 0, 0) == 1
    assert tuning.keys_in_sight(512, 1023, 5) == 512
    assert tuning.keys_in_sight(8192, 1023, -1) == 8192
    assert tuning.keys_in_sight(8192, -1, 0) == 8192


@pytest.mark.parametrize(
    ("width", "keys", "left", "right", "block_m"),
    [
        (64, 512, False, False, 192),
        (64, 2048, False, True, 128),
        (64, 2049, False, True, 192),
        (64, 8192, True, True, 128),
        (64, 8192, True, False, 128),
        (128, 16384, False, False, 128),
        (256, 16384, False, True, 128),
    ],
)
def test_forward_tiles_on_hopper(width: int, keys: int, left: bool, right: bool, block_m: int) -> None:
    """Tall where rows have much to do: full attention, and causal from 4,096 keys; never in a window."""
    assert tuning.forward_tile(width, keys, left, right).block_m == block_m


def test_first_key_blocks_store_in_short_calls() -> None:
    tile = tuning.BACKWARD[128]
    assert tile.stores_first(4096)
    assert not tile.stores_first(4097)
    assert dataclasses.replace(tile, first_stores=True).stores_first(10**6)
    assert not dataclasses.replace(tile, first_stores=False).stores_first(1)
    assert not tuning.BACKWARD[256].stores_first(1)


def test_forced_path_reaches_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment is read at every call; forcing Hopper kernels where they can not run says why."""
    q = random(1, 8, 1, 300 - 44, dtype=torch.float16)
    monkeypatch.setenv(dispatch.PATH_ENV, "portable")
    assert kernels.flash_attn_func(q, q, q).shape == q.shape
    if DEVICE == "cpu":
        monkeypatch.setenv(dispatch.PATH_ENV, "hopper")
        with pytest.raises(ValueError, match="FLASH_ATTN_PATH=hopper"):
            kernels.flash_attn_func(q, q, q)
