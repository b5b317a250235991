"""Run flash-attn's own published tests against our kernels.

    python -m tests.kernels.gpu.flash_attn_suite PATH/TO/flash-attention/tests/test_flash_attn.py [pytest arguments]
    python -m tests.kernels.gpu.flash_attn_suite PATH/TO/test_flash_attn.py -n 16 --one-of 20

It has some two hundred thousand cases; ``--one-of N`` runs those whose name's CRC-32 is a multiple of N.

Puts modules named ``flash_attn`` into ``sys.modules`` that hand out our functions, then runs the given file. Its tests
of key-value caches, paged keys and the generator slot (inference) are left out: those functions are not ours. Needs
``einops``, which that suite imports.
"""

import sys
import types
import zlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import kernels

NAMES = [name for name in kernels.__all__ if name.startswith("flash_attn_")]
DESELECTED = "not kvcache and not paged and not splitkv and not generator"


def _in_their_scale(function: Callable[..., Any]) -> Callable[..., Any]:
    """Their S_dmask is exp(score - row maximum) and their suite normalises it; ours is normalised already."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("block_table") is not None:
            pytest.skip("paged keys are not ours")
        result = function(*args, **kwargs)
        if not isinstance(result, tuple) or result[2].numel() == 0:
            return result
        out, lse, probs = result
        largest = probs.float().abs().amax(-1, keepdim=True)
        return out, lse, torch.where(largest > 0, probs.float() / largest, probs.float())

    return wrapped


def _unpad_input(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """(B, S, ...) and a (B, S) mask -> (tokens (total, ...), their indices, cu_seqlens, longest, lengths)."""
    lengths = mask.sum(-1, dtype=torch.int32)
    indices = mask.flatten().nonzero().flatten()
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return x.flatten(0, 1)[indices], indices, cu_seqlens, int(lengths.max()), lengths


def _pad_input(x: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """The inverse: (total, ...) -> (B, S, ...), zeros elsewhere."""
    padded = x.new_zeros(batch * seqlen, *x.shape[1:]).index_copy(0, indices, x)
    return padded.unflatten(0, (batch, seqlen))


def _absent(*args: Any, **kwargs: Any) -> Any:
    raise NotImplementedError("an inference function of flash-attn that is not ours")


def install() -> None:
    """Put the ``flash_attn`` modules that the suite imports into ``sys.modules``."""
    modules = {
        "flash_attn": {name: _in_their_scale(getattr(kernels, name)) for name in NAMES}
        | {"flash_attn_with_kvcache": _absent},
        "flash_attn.bert_padding": {"unpad_input": _unpad_input, "pad_input": _pad_input},
        # one block as wide as the matrix: S_dmask above is relative to the maximum of the whole row
        "flash_attn.flash_attn_interface": {
            "_get_block_size_n": lambda *args: 2**30,
            "USE_TRITON_ROCM": False,
            "_flash_attn_varlen_forward": _absent,
        },
        "flash_attn.layers": {},
        "flash_attn.layers.rotary": {"apply_rotary_emb": _absent},
    }
    for name, members in modules.items():
        module = types.ModuleType(name)
        module.__dict__.update(members)
        sys.modules[name] = module


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--one-of", type=int, default=1, help="run one of N cases, chosen by name")


def pytest_configure(config: pytest.Config) -> None:
    """In every process that runs tests, before their file is imported."""
    install()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    n = config.getoption("--one-of")
    items[:] = [item for item in items if zlib.crc32(item.nodeid.rpartition("::")[2].encode()) % n == 0]


def main() -> int:
    if len(sys.argv) < 2:
        print(__doc__)
        return 2
    plugins = ["-p", "no:cacheprovider", "-p", "tests.kernels.gpu.flash_attn_suite"]
    return int(pytest.main([sys.argv[1], *plugins, "-k", DESELECTED, *sys.argv[2:]]))


if __name__ == "__main__":
    sys.exit(main())
