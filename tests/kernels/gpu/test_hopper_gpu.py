"""The Hopper path on a GPU. Each group of hopper_checks.py runs in a process of its own under a watchdog: a
hang is a failure.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.kernels.gpu.hopper_checks import GROUPS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
    ),
]
ROOT = Path(__file__).resolve().parents[3]
LIMIT_S = float(os.environ.get("HOPPER_WATCHDOG_S", "240"))


@pytest.mark.parametrize("group", GROUPS)
def test_group(group: str) -> None:
    command = [sys.executable, "-m", "tests.kernels.gpu.hopper_checks", group]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            output, _ = process.communicate(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
            started = [line for line in output.splitlines() if line.startswith("start ")]
            pytest.fail(f"hang, or slower than {LIMIT_S:.0f} s, in: {started[-1] if started else 'the import'}")
    assert process.returncode == 0, output[-6000:]
