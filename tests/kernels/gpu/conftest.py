"""What the tests on a GPU share."""

import pytest
import torch

from kernels.attention.dispatch import PATH_ENV


@pytest.fixture(params=["auto", "portable"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test once as users run it, and on a Hopper GPU once more on the portable kernels."""
    name: str = request.param
    if name == "portable" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("portable is what auto takes here")
    monkeypatch.setenv(PATH_ENV, name)
    return name
