"""Sequence parallelism on gloo: the sums and gradients of one rank, for every way to attend and to place tokens."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist

from configs.schema import Attention, ModelConfig, Position
from model import GPT, build_model
from model.sequence import SequenceGroup, problems
from model.weight_gradient import bind_sums
from tests.model.small import LLAMA, batch, small
from tests.ranks import on_ranks

STARTS = torch.tensor([0, 3, 12, 16, 17, 32], dtype=torch.int32)  # documents that begin and end on different ranks
CASES: dict[str, tuple[dict[str, Any], bool]] = {
    "learned": ({}, False),
    "learned-documents": ({}, True),
    "alibi-window": ({"position": Position.alibi, "window": 4}, False),
    "softcap": ({"attention": Attention.standard, "attention_softcap": 2.0}, False),
    "llama-documents-qk-norm": (LLAMA | {"qk_norm": True}, True),
    "grouped": (LLAMA | {"num_kv_heads": 2}, False),
    "one-key-head": (LLAMA | {"num_kv_heads": 1}, True),
    "packed": ({"attention": Attention.flash}, False),
    "packed-documents": ({"attention": Attention.flash, "position": Position.alibi}, True),
    "flash-grouped": ({"attention": Attention.flash, "num_kv_heads": 2}, False),
    "z-loss": ({"z_loss": 0.1}, False),
}

RUNS = {2: list(CASES), 4: ["grouped", "alibi-window", "llama-documents-qk-norm"]}
"""Ranks → cases: on four, two key heads are fewer than the ranks, and documents span three of them."""
COMPILED = "grouped"


def loss_of(model: GPT, config: ModelConfig, documents: bool) -> torch.Tensor:
    starts = {"cu_seqlens": STARTS, "max_seqlen": 15} if documents else {}
    sums: torch.Tensor = model(*batch(config), **starts)
    return sums


def results(
    name: str, group: SequenceGroup | None, compiled: bool = False, recompute: bool = False, fused: bool = False
) -> list[torch.Tensor]:
    """The sums (2,) and all gradients, added up over the ranks. `fused`: layers add theirs themselves."""
    options, documents = CASES[name]
    torch.manual_seed(1)
    config = small(init_std=0.2, **options)
    model = build_model(config)
    model.set_sequence_group(group)
    model.set_recompute(recompute)
    if compiled:
        model.compile_blocks()
    totals = {p: torch.zeros_like(p.data) for p in model.parameters()}
    if fused:
        bind_sums(model, totals)
    sums = loss_of(model, config, documents)
    sums.sum().backward()
    for parameter, total in totals.items():
        assert fused or parameter.grad is not None
        total += 0.0 if parameter.grad is None else parameter.grad
    found = [sums.detach(), *totals.values()]
    for tensor in found if group is not None else ():
        dist.all_reduce(tensor)
    return found


def dropped(group: SequenceGroup) -> torch.Tensor:
    """How this rank's heads of a constant value come out of attention with dropout, one entry a token and head."""
    from model.attention import Context, Scores, attend

    torch.manual_seed(100 + group.rank)
    queries = torch.zeros(1, 16 // group.size, 4, 8)
    out = attend(queries, queries, queries + 1, Scores(dropout=0.5), Context(Attention.sdpa, sequence=group))
    gathered = [torch.empty_like(out) for _ in range(group.size)]
    dist.all_gather(gathered, out.contiguous())
    return torch.cat(gathered, dim=1)[0, :, :, 0]  # (S, H)


def found_on_rank() -> dict[str, Any]:
    """One rank's results of all cases for so many ranks."""
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    group = SequenceGroup(rank, size, dist.group.WORLD.group_name)  # type: ignore[union-attr]
    found = {name: results(name, group) for name in RUNS[size]}
    found["dropped"] = [dropped(group)]
    if size == 2:
        found["compiled"] = results(COMPILED, group, compiled=True)
        found["recomputed"] = results(COMPILED, group, recompute=True)
        found["fused"] = results(COMPILED, group, fused=True)
        found["fused-compiled"] = results(COMPILED, group, compiled=True, recompute=True, fused=True)
    model = build_model(small())
    model.set_sequence_group(group)
    found["logits"] = [model(batch(model.config)[0]).detach()]
    dist.barrier()
    dist.destroy_process_group()
    return {name: [t.numpy() for t in tensors] for name, tensors in found.items()}


@pytest.fixture(scope="module")
def shared() -> dict[int, dict[str, list[torch.Tensor]]]:
    """By number of ranks, rank 0's results."""
    assert os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available()
    found = {size: on_ranks(size, found_on_rank)[0] for size in RUNS}
    return {
        size: {name: [torch.from_numpy(t) for t in ts] for name, ts in cases.items()} for size, cases in found.items()
    }


def compare(found: list[torch.Tensor], name: str) -> None:
    for ours, alone in zip(found, results(name, None), strict=True):
        scale = alone.abs().max().item()
        torch.testing.assert_close(ours, alone, rtol=1e-5, atol=1e-5 * max(scale, 1e-3))


@pytest.mark.parametrize(("size", "name"), [(size, name) for size, names in RUNS.items() for name in names])
def test_ranks_compute_what_one_does(shared: Any, size: int, name: str) -> None:
    compare(shared[size][name], name)


def test_blocks_compile_with_the_exchange_inside(shared: Any) -> None:
    compare(shared[2]["compiled"], COMPILED)


def test_recomputed_blocks_exchange_again(shared: Any) -> None:
    compare(shared[2]["recomputed"], COMPILED)


def test_layers_sum_their_own_gradients(shared: Any) -> None:
    """`engine.fuse_weight_gradients`, here in fp32, where nothing else rounds: autograd's gradients on one rank."""
    compare(shared[2]["fused"], COMPILED)
    compare(shared[2]["fused-compiled"], COMPILED)


def test_each_rank_drops_attention_weights_of_its_own(shared: Any) -> None:
    """Heads of different ranks have different masks: a shared one would drop the same keys of the same queries."""
    for size in RUNS:
        (heads,) = shared[size]["dropped"]  # (S, H)
        per_rank = heads.unflatten(1, (size, -1))  # (S, P, H/P)
        for other in range(1, size):
            assert not torch.equal(per_rank[:, 0], per_rank[:, other])


def test_logits_are_of_whole_samples(shared: Any) -> None:
    """Sampling needs no group: a rank that generates text does so alone."""
    assert shared[2]["logits"][0].shape == (2, 16, 131)


def test_what_cannot_be_shared_names_the_key_and_the_remedy() -> None:
    assert problems(small(), 1) == problems(small(), 2) == problems(small(num_kv_heads=1), 4) == []
    (heads,) = problems(small(sequence_length=24), 8)
    assert "engine.sequence_parallel_size=8 does not divide model.num_heads=4; use one of 1, 2, 4" in heads
    (length,) = problems(small(sequence_length=18), 4)
    assert "model.sequence_length=18" in length
    (kv,) = problems(small(num_heads=12, width=96, num_kv_heads=3), 4)[:1]
    assert "model.num_kv_heads=3" in kv
