"""These tests need a GPU, or FASTSSL_GPU_REHEARSAL=1; plain `pytest` does not come here."""

import pytest
import torch

from tests.gpu.room import REHEARSAL


@pytest.fixture(scope="session", autouse=True)
def machine():
    """Stop at once, in a sentence, where there is nothing to test on."""
    if not REHEARSAL and not torch.cuda.is_available():
        pytest.exit("tests/gpu needs a GPU; FASTSSL_GPU_REHEARSAL=1 rehearses it on a CPU", 2)


@pytest.fixture(autouse=True)
def full_products():
    """Each test starts with float32 products in IEEE."""
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision("highest")
