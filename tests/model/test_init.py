"""Initial weights: normal, the same however they are drawn, and never drawn twice."""

from __future__ import annotations

from collections.abc import Callable
from threading import Barrier, BrokenBarrierError, get_ident

import pytest
import torch
from torch import Tensor

from model import build_model, init
from model.init import CHUNK, chunk_seed, host_threads, normal_
from tests.model.small import small


def drawn(weight: Tensor, std: float = 0.5, seed: int = 3) -> Tensor:
    """`weight` after `normal_`, from a generator that was seeded just before."""
    torch.manual_seed(seed)
    normal_(weight, std)
    return weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_weights_depend_on_the_seed_alone(dtype: torch.dtype) -> None:
    """For any number of threads and any dtype they are one thread's fp32 numbers, rounded; and so is what the global
    generator gives next."""
    shape = (5, CHUNK // 2 + 7)  # two chunks and a half
    with host_threads(1):
        expected, following = drawn(torch.empty(shape)), torch.get_rng_state()
    for count in (1, 2, 5):
        with host_threads(count):
            found = drawn(torch.empty(shape, dtype=dtype))
            assert torch.get_num_threads() == count
        assert torch.equal(found, expected.to(dtype)), count
        assert torch.equal(torch.get_rng_state(), following), count
    assert not torch.equal(drawn(torch.empty(shape), seed=4), expected)


def test_weights_are_normal() -> None:
    """Against the moments and quantiles of a normal distribution, each within five standard errors of so many numbers.

    Of all, of each chunk, and of the sum of each two chunks, which also tells whether they go together.
    """
    num_chunks, std = 6, 0.02
    chunks = drawn(torch.empty(num_chunks, CHUNK), std).double() / std
    pairs = [(chunks[a] + chunks[b]) / 2**0.5 for a in range(num_chunks) for b in range(a)]
    for x in (chunks.view(-1), *chunks, *pairs):
        error = 5 / x.numel() ** 0.5
        assert abs(x.mean()) < error
        assert abs(x.square().mean() - 1) < error * 2**0.5
        assert abs(x.pow(3).mean()) < error * 15**0.5
        assert abs(x.pow(4).mean() - 3) < error * 96**0.5
        for at, below in [(-2.0, 0.022750), (-1.0, 0.158655), (0.0, 0.5), (0.5, 0.691462), (3.0, 0.998650)]:
            assert abs((x < at).double().mean() - below) < error * (below * (1 - below)) ** 0.5 + 1e-6
        assert 4.5 < x.abs().max() < 6.5
        assert abs((x[1:] * x[:-1]).mean()) < error


def test_nothing_is_drawn_twice() -> None:
    """Chunks and tensors differ from each other; a shorter tensor is no special case."""
    torch.manual_seed(3)
    tensors = [torch.empty(size) for size in (2 * CHUNK, 2 * CHUNK, CHUNK, 100, 100)]
    for tensor in tensors:
        normal_(tensor, 1.0)
    beginnings = torch.stack([chunk[:100] for tensor in tensors for chunk in tensor.split(CHUNK)])
    assert beginnings.unique().numel() > 0.99 * beginnings.numel()  # fp32 numbers meet now and then


def test_seeds_of_a_tensor_are_distinct_and_well_mixed() -> None:
    """Also where they wrap around, and where keys are neighbours; half of the bits change from one to the next."""
    for key in (0, 1, 2**32 - 1000):
        seeds = [chunk_seed(key, number) for number in range(20_000)]
        assert len(set(seeds)) == len(seeds)
        assert min(seeds) >= 0
        assert 2**31 < max(seeds) < 2**32
        changed = [(a ^ b).bit_count() for a, b in zip(seeds[1:], seeds[:-1], strict=True)]
        assert sum(changed) / len(changed) == pytest.approx(16, abs=0.1)  # 32 bits, standard error 0.02


def test_seeds_of_tensors_are_distinct(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a model of many matrices no two chunks have one seed."""
    seeds: list[int] = []

    def spy(key: int, number: int) -> int:
        seeds.append(chunk_seed(key, number))
        return seeds[-1]

    monkeypatch.setattr(init, "chunk_seed", spy)
    monkeypatch.setattr(init, "CHUNK", 512)
    torch.manual_seed(1)
    build_model(small(num_layers=4))
    assert len(seeds) > 100
    assert len(set(seeds)) == len(seeds)


def test_a_fill_draws_nothing_on_the_meta_device() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    normal_(torch.empty(100, device="meta"), 1.0)
    assert torch.equal(torch.get_rng_state(), before)


def meeting(parties: int, seen: set[int]) -> Callable[[int, int], int]:
    """A `chunk_seed` in which as many threads have to meet; notes them in `seen`."""
    barrier = Barrier(parties)

    def seed(key: int, number: int) -> int:
        barrier.wait(timeout=10)
        seen.add(get_ident())
        return chunk_seed(key, number)

    return seed


def test_threads_draw_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as PyTorch has, but one a chunk at most; each runs PyTorch's operations by itself."""
    monkeypatch.setattr(init, "CHUNK", 64)
    for count, num_chunks, parties in [(3, 6, 3), (5, 2, 2), (4, 1, 1), (1, 4, 1)]:
        seen: set[int] = set()
        monkeypatch.setattr(init, "chunk_seed", meeting(parties, seen))
        with host_threads(count):
            normal_(torch.empty(64 * num_chunks), 1.0)
        assert len(seen) == parties
        assert (get_ident() in seen) == (parties == 1)  # no pool for one


def test_operations_in_threads_start_no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: set[int] = set()

    def seed(key: int, number: int) -> int:
        counts.add(torch.get_num_threads())
        return chunk_seed(key, number)

    monkeypatch.setattr(init, "chunk_seed", seed)
    monkeypatch.setattr(init, "CHUNK", 64)
    with host_threads(3):
        normal_(torch.empty(640, dtype=torch.bfloat16), 1.0)
        assert torch.get_num_threads() == 3
    assert counts == {1}


def test_an_error_in_a_thread_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(init, "CHUNK", 64)
    barrier = Barrier(2)
    barrier.abort()

    def seed(key: int, number: int) -> int:
        return barrier.wait()

    monkeypatch.setattr(init, "chunk_seed", seed)
    with host_threads(3):
        with pytest.raises(BrokenBarrierError):
            normal_(torch.empty(640), 1.0)
        assert torch.get_num_threads() == 3


def test_other_dtypes_than_the_models_are_its_weights_rounded() -> None:
    torch.manual_seed(5)
    direct = build_model(small(init_std=0.3))
    with torch.device("meta"):
        model = build_model(small(init_std=0.3))
    torch.manual_seed(5)
    model = model.materialise("cpu", dtype=torch.bfloat16)
    for (name, a), (_, b) in zip(direct.named_parameters(), model.named_parameters(), strict=True):
        assert b.dtype == torch.bfloat16
        assert torch.equal(a.bfloat16(), b), name


@pytest.mark.gpu
def test_weights_on_a_gpu_are_those_of_a_cpu() -> None:
    torch.manual_seed(5)
    expected = build_model(small(width=1024, num_heads=8, vocab_size=5000))  # the embedding takes several chunks
    torch.manual_seed(5)
    with torch.device("cuda"), host_threads(4):
        model = build_model(expected.config)
    for (name, a), (_, b) in zip(expected.named_parameters(), model.named_parameters(), strict=True):
        assert b.is_cuda
        assert torch.equal(a, b.cpu()), name
