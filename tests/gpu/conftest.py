"""What only a device shows. Every test is skipped without CUDA, and where the tests are not shown the devices."""

import pytest
import torch

REASON = "no CUDA device here, or not shown: UBSMOE_DS_REQUIRE=gpu python -m pytest tests/gpu"


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The first CUDA device."""
    if not torch.cuda.is_available():
        pytest.skip(REASON)
    return torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _needs_a_device(device):
    """Tests that start processes ask for no device themselves."""
