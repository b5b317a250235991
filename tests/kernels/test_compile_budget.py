"""The representative subset of the shipped kernels against the budget (scripts/compile_check.py does all of them)."""

from __future__ import annotations

import pytest

from kernels.compile_check import Budget, check, compile_provider, load_budget
from scripts.compile_check import PROVIDERS


@pytest.mark.parametrize("provider", PROVIDERS)
def test_representative_kernels_are_within_budget(provider: str) -> None:
    reports = compile_provider(provider, quick=True)
    assert reports, f"{provider} marks no case as quick"
    budget = load_budget()
    assert [breach for report in reports for breach in check(report, budget)] == []


def test_budget_of_the_hopper_path_allows_no_serialisation_and_few_spills() -> None:
    """`--update-budget` must not make these regressions pass unnoticed."""
    budget = {key: entry for key, entry in load_budget().items() if key.startswith("hopper.")}
    attention = {key: entry for key, entry in budget.items() if "forward[" in key or "hopper.backward" in key}
    assert len(attention) >= 68

    for key, entry in attention.items():
        assert isinstance(entry, Budget)
        assert entry.hgmma, key
        assert entry.serialized == 0, key
        # 256 columns of O leave no registers. Where the backward rounds dQ it spills once a tile, not in its loops.
        assert entry.spill_bytes <= (204 if "d256" in key else 116 if "rounds" in key else 0), key
        assert entry.shared_bytes <= 232_448, key


def test_budget_of_the_portable_path_allows_no_serialisation() -> None:
    budget = {key: entry for key, entry in load_budget().items() if key.startswith("portable.")}
    assert len(budget) >= 250
    assert [key for key, entry in budget.items() if entry.serialized] == []
    dropout = {key: entry for key, entry in budget.items() if ",dropout," in key and key.endswith("sm_90")}
    products = {key: entry for key, entry in dropout.items() if "portable.delta" not in key and "probs" not in key}
    assert len(products) == 6
    assert [key for key, entry in products.items() if entry.spill_bytes or not entry.hgmma] == []
