"""A function on several ranks, each a process of its own in torchrun's environment.

Ranks are forked from one process that has imported what takes seconds, once for all tests of a pytest process.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

TIMEOUT_S = 500.0
"""For a rank to answer; compilation on a busy machine takes minutes."""
PRELOADED = ["torch._dynamo", "tests.training.conftest"]


@dataclass
class Failure:
    """How a rank failed."""

    traceback: str


def free_port() -> int:
    """A TCP port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def on_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `function(*arguments)`, from the top level of a module, returns on each rank, in the order of ranks.

    It joins and leaves the process group itself. Tensors travel as arrays: memory of a process that has ended is gone.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    answers, port = context.Queue(), free_port()
    places = [{"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)} for rank in range(world_size)]
    for place in places:
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [context.Process(target=_rank, args=(place, answers, function, arguments)) for place in places]
    for one in ranks:
        one.start()
    try:
        found = dict(_answer(answers) for _ in ranks)
        for one in ranks:
            one.join(timeout=30)
    finally:
        for one in ranks:
            if one.is_alive():
                one.kill()
    assert [one.exitcode for one in ranks] == [0] * world_size
    return [found[rank] for rank in range(world_size)]


def _answer(answers: Any) -> tuple[int, Any]:
    """The next rank's."""
    rank, answer = answers.get(timeout=TIMEOUT_S)
    assert not isinstance(answer, Failure), f"rank {rank} of the test failed:\n{answer.traceback}"
    return rank, answer


def _rank(place: dict[str, str], answers: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ |= place
    torch.set_num_threads(1)
    try:
        answer = function(*arguments)
    except BaseException:  # noqa: BLE001 - told to the test
        answer = Failure(traceback.format_exc())
    answers.put((int(place["RANK"]), answer))
