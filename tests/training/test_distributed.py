"""Who a process is, under each launcher, and what the processes agree on."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.distributed as dist

from configs.errors import UserError
from configs.schema import Device
from data.cpus import available_cpus, cpu_quotas, own_cpus
from model.init import host_threads
from tests.ranks import on_ranks
from training import distributed
from training.distributed import (
    Launch,
    Place,
    Processes,
    detect_launch,
    first_node,
    keep_to_quota,
    pick_device,
    share_of,
)


def test_no_launcher() -> None:
    assert detect_launch({}) is None
    assert detect_launch({"LOCAL_RANK": "0"}) is None


def test_torchrun() -> None:
    environment = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert detect_launch(environment) == Launch(5, 8, 1, "env://")
    slurm = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}
    assert detect_launch({**environment, **slurm}) == Launch(5, 8, 1, "env://")  # torchrun started by srun


def test_slurm_step() -> None:
    step = {
        "SLURM_STEP_NUM_TASKS": "16",
        "SLURM_STEP_NODELIST": "gpu[007-008]",
        "SLURM_PROCID": "9",
        "SLURM_LOCALID": "1",
        "SLURM_JOB_ID": "123456",
    }
    assert detect_launch(step) == Launch(9, 16, 1, "tcp://gpu007:23456")
    assert detect_launch({**step, "MASTER_ADDR": "h", "MASTER_PORT": "7"}) == Launch(9, 16, 1, "tcp://h:7")


def test_batch_script_without_srun_is_one_process() -> None:
    assert detect_launch({"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_JOB_ID": "1"}) is None


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu7", "gpu7"),
        ("gpu[007-009,12],login", "gpu007"),
        ("gpu[3,5]", "gpu3"),
        ("a-b1,c2", "a-b1"),
        ("rack[1-2]-node", "rack1-node"),
    ],
)
def test_first_node(nodes: str, first: str) -> None:
    assert first_node(nodes) == first


def test_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert pick_device(Device.auto, 3) == torch.device("cuda", 3)
    assert pick_device(Device.cpu, 3) == torch.device("cpu")
    with pytest.raises(UserError, match="process 5 on this node has no GPU: 4 are visible; start 4 a node"):
        pick_device(Device.cuda, 4)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # each process sees its own GPU only
    assert pick_device(Device.cuda, 3) == torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device(Device.auto, 0) == torch.device("cpu")
    with pytest.raises(UserError, match=r"hardware\.device=cuda: .*possible: hardware\.device=cpu"):
        pick_device(Device.cuda, 0)


@pytest.mark.parametrize(
    ("places", "shares"),
    [
        ([("a", range(64))], [64]),
        ([("a", range(64))] * 4 + [("b", range(64))] * 8, [16] * 4 + [8] * 8),  # torchrun
        ([("a", range(8)), ("a", range(8, 16)), ("b", range(8))], [8, 8, 8]),  # srun --cpus-per-task=8
        ([("a", range(8)), ("a", range(4, 8))], [6, 2]),
        ([("a", range(2))] * 8, [1] * 8),
        ([("a", range(14))] * 7, [2] * 7),  # sevenths add up to a whole
    ],
)
def test_shares_of_a_hosts_cpus(places: list[tuple[str, range]], shares: list[int]) -> None:
    sets = [Place(host, frozenset(cpus)) for host, cpus in places]
    assert [share_of(rank, sets) for rank in range(len(sets))] == shares


@pytest.mark.parametrize(
    ("quotas", "shares"),
    [
        ([{7: 8}] * 4, [2] * 4),  # one container
        ([{7: 6}] * 4, [2] * 4),  # a part of a CPU is one
        ([{1: 3}, {2: 5}, {}], [3, 5, 21]),  # a container each, and a rank outside
        ([{1: 3, 9: 4}, {2: 6, 9: 4}], [2, 2]),  # of a job that is limited as well
        ([{7: 1}] * 4, [1] * 4),
        ([{7: 400}] * 2, [32] * 2),
    ],
)
def test_shares_of_a_quota(quotas: list[dict[int, int]], shares: list[int]) -> None:
    own = [Place("a", frozenset(range(64)), {group: Fraction(n) for group, n in each.items()}) for each in quotas]
    others = [Place("b", frozenset(range(64)), {7: Fraction(1)})] * 3  # the inode of another host
    assert [share_of(rank, [*own, *others]) for rank in range(len(own))] == shares


def test_pytorch_keeps_to_the_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    with host_threads(6):
        for available, environment, expected in (
            (8, {}, 6),
            (4, {"OMP_NUM_THREADS": "6"}, 6),
            (4, {"MKL_NUM_THREADS": "6"}, 6),
            (4, {}, 4),
        ):
            monkeypatch.setattr(distributed, "available_cpus", lambda number=available: number)
            keep_to_quota(environment)
            assert torch.get_num_threads() == expected


def test_alone(processes: Processes) -> None:
    assert (processes.rank, processes.world_size, processes.is_main) == (0, 1, True)
    assert processes.broadcast({"a": 1}) == {"a": 1}
    assert processes.gather("x") == ["x"]
    assert processes.any(True)
    assert not processes.any(False)
    processes.barrier()
    assert processes.cpu_share() == available_cpus()
    value = torch.ones(2)
    dist.all_reduce(value)
    assert value.tolist() == [1.0, 1.0]


def talk() -> dict[str, Any]:
    """What one of two ranks hears."""
    own = distributed.init(Device.cpu, timeout_minutes=0.5)
    value = torch.tensor([float(own.rank + 1)])
    dist.all_reduce(value)
    result = {
        "rank": own.rank,
        "main": own.is_main,
        "broadcast": own.broadcast(f"from {own.rank}"),
        "gather": own.gather(own.rank * 10),
        "any of last": own.any(own.rank == 1),
        "any of none": own.any(False),
        "sum": value.item(),
        "cpus": own.cpu_share(),
    }
    own.barrier()
    own.close()
    own.close()
    return result


def test_two_processes() -> None:
    same = {"broadcast": "from 0", "gather": [0, 10], "any of last": True, "any of none": False, "sum": 3.0}
    same["cpus"] = share_of(0, [Place("here", own_cpus(), cpu_quotas())] * 2)
    assert on_ranks(2, talk) == [{"rank": 0, "main": True, **same}, {"rank": 1, "main": False, **same}]
