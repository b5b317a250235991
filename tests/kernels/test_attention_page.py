"""The examples of docs/attention.md run as they stand, in the interpreter where there is no GPU."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.cases import DEVICE

ROOT = Path(__file__).parents[2]
EXAMPLES = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "attention.md").read_text(), re.MULTILINE | re.DOTALL)


def test_there_are_examples() -> None:
    assert len(EXAMPLES) == 5


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.splitlines()[-1])
def test_example_runs(example: str) -> None:
    """In a process of its own, since one of them puts modules in place of others."""
    if DEVICE == "cpu":
        if "torch.cuda." in example:
            pytest.skip("needs a CUDA device")
        example = example.replace("fullgraph=True", "fullgraph=True, backend='aot_eager'")  # no C++ compiler needed
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + example.replace('"cuda"', repr(DEVICE))
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)
