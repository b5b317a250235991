"""Before anything imports triton: without a GPU its kernels run in the interpreter.

Triton decides at import (at each ``@triton.jit``) whether a kernel is compiled or interpreted, and one pytest
process runs all tests: so this is the one place that can decide. Tests that compile start a process without
the variable.
"""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked ``gpu`` are skipped without a CUDA device."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
