"""Host time of an eager attention call, layer by layer, on a machine without a GPU.

Kernels are compiled for an H100 and started on a driver that does nothing (`kernels.fake_cuda`), so the driver's own
time is missing, and PyTorch's CPU allocator stands for that of the GPU. Numbers are microseconds, the least of many
short runs (other processes only add). ``--triton 3.6.0`` takes the triton in ``.cache/triton`` that
`scripts/compile_check.py` put there; ``--profile`` lists where the time of one layer goes.

    python scripts/profile_host.py
    python scripts/profile_host.py --triton 3.6.0 --profile "forward, no gradient"
"""

import argparse
import cProfile
import functools
import os
import pstats
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from configs import end_on_ctrl_c, run_tool

end_on_ctrl_c(__name__)


def least_us(call: Callable[[], Any], calls: int = 30, runs: int = 200) -> float:
    """Microseconds per call in the fastest of ``runs`` runs of ``calls`` calls."""
    for _ in range(calls):
        call()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append(time.perf_counter() - start)
    return min(times) / calls * 1e6


def layers(seqlen: int, head_dim: int, heads: int) -> dict[str, Callable[[], Any]]:
    """Name -> a call of one layer on (1, S, H, D) bf16; each layer contains those below it."""
    import torch

    import kernels
    from kernels.attention import hopper
    from kernels.attention.dispatch import AttnExtras, AttnParams

    torch.set_num_threads(1)
    shape = (1, seqlen, heads, head_dim)
    q, k, v, dout = (torch.zeros(shape, dtype=torch.bfloat16) for _ in range(4))
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    attention: Callable[..., Any] = functools.partial(kernels.flash_attn_func, causal=True)
    attention(*leaves)
    out = attention(*leaves)  # the first call goes another way
    scale = head_dim**-0.5
    options = (None, None, None, None, seqlen, seqlen, scale, True, -1, -1, 0.0, 0.0, False)
    operators: Any = torch.ops.flashtrain
    result, lse = operators.attention(q, k, v, *options)
    params, extras = AttnParams(scale, seqlen, seqlen, causal=True, window_right=0), AttnExtras()
    dq, dk, dv = (torch.empty_like(t) for t in (q, k, v))
    memo: dict[str, dict[str, Any]] = {"forward": {}, "backward": {}}

    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *tensors: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(*tensors)
            return dout.detach()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> Any:
            return (grad, *ctx.saved_tensors[1:])

    nothing: Any = Nothing.apply
    product = nothing(*leaves)

    return {
        "forward, with gradient": lambda: attention(*leaves),
        "forward, no gradient": lambda: attention(q, k, v),
        "forward, operator": lambda: operators.attention(q, k, v, *options),
        "forward, path": lambda: hopper.forward(q, k, v, params, extras, memo["forward"]),
        "backward, autograd": lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True),
        "backward, operator": lambda: operators.attention_backward(
            dout, None, result, lse, q, k, v, True, True, *options
        ),
        "backward, path": lambda: hopper.backward(
            dout, q, k, v, result, lse, None, dq, dk, dv, params, extras, memo["backward"]
        ),
        "an autograd.Function that does nothing, forward": lambda: nothing(*leaves),
        "an autograd.Function that does nothing, backward": lambda: torch.autograd.grad(
            product, leaves, dout, retain_graph=True
        ),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--triton", help="a version in .cache/triton instead of the installed one")
    parser.add_argument("--seqlen", type=int, default=128)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--profile", metavar="LAYER", help="where the time of this layer goes, by function")
    args = parser.parse_args(argv)
    if args.triton:
        sys.path.insert(0, str(ROOT / ".cache" / "triton" / args.triton))
    os.environ.pop("TRITON_INTERPRET", None)
    from kernels.fake_cuda import activate, install

    with tempfile.TemporaryDirectory() as directory:
        fake = install(Path(directory))
        activate()
        found = layers(args.seqlen, args.head_dim, args.heads)
        if args.profile:
            call = found[args.profile]
            call()
            with cProfile.Profile() as profile:
                for _ in range(2000):
                    call()
            pstats.Stats(profile).sort_stats("tottime").print_stats(25)
            return 0
        for name, call in found.items():
            least_us(call, runs=1)
            before = fake.launches, fake.encodes
            call()
            counts = f"{fake.launches - before[0]} launches, {fake.encodes - before[1]} descriptors encoded"
            print(f"{name:<50} {least_us(call):7.1f} us, {counts}", flush=True)
    return 0


if __name__ == "__main__":
    run_tool(main)
