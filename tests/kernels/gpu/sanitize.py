"""Run every attention kernel once on small ragged shapes under ``compute-sanitizer --tool memcheck``, on each path.

python tests/kernels/gpu/sanitize.py            # starts compute-sanitizer on itself; exit 77 if it is not there
python tests/kernels/gpu/sanitize.py --work     # the work alone
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
SKIPPED = 77


def work() -> None:
    """Forward and backward: dense and varlen, every feature, head dims with and without padding."""
    sys.path.insert(0, str(ROOT))
    import torch

    import kernels

    for head_dim in (40, 64, 128, 256):
        q = torch.randn(1, 77, 4, head_dim, dtype=torch.float16, device="cuda", requires_grad=True)
        k, v = (
            torch.randn(1, 91, 2, head_dim, dtype=torch.float16, device="cuda", requires_grad=True) for _ in range(2)
        )
        slopes = torch.rand(4, device="cuda")
        for options in (
            {},
            {"causal": True},
            {"window_size": (20, 5), "softcap": 5.0},
            {"alibi_slopes": slopes, "dropout_p": 0.2, "return_attn_probs": True},
        ):
            out = kernels.flash_attn_func(q, k, v, **options)
            (out[0] if isinstance(out, tuple) else out).sum().backward()
        cu_q = torch.tensor([0, 0, 50, 77], dtype=torch.int32, device="cuda")
        cu_k = torch.tensor([0, 11, 60, 91], dtype=torch.int32, device="cuda")
        kernels.flash_attn_varlen_func(q[0], k[0], v[0], cu_q, cu_k, 50, 49, causal=True).sum().backward()
        if head_dim > 128:  # flash1's limit
            continue
        x = torch.randn(1, 77, 4, head_dim, dtype=torch.float16, device="cuda", requires_grad=True)
        if head_dim <= 128:
            kernels.flash1_attn_func(x, x, x, causal=True).sum().backward()
    torch.cuda.synchronize()


def main() -> int:
    if "--work" in sys.argv:
        work()
        return 0
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not os.path.exists(tool):
        print("compute-sanitizer is not installed (it comes with the CUDA toolkit)")
        return SKIPPED
    # torch's caching allocator would hide accesses past a tensor inside its own blocks
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [tool, "--tool", "memcheck", "--error-exitcode", "1", sys.executable, __file__, "--work"]
    codes = []
    for path in ("auto", "portable"):
        print(f"FLASH_ATTN_PATH={path}", flush=True)
        codes.append(subprocess.run(command, env={**env, "FLASH_ATTN_PATH": path}, check=False).returncode)
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
