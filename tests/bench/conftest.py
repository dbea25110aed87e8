"""What the benchmark's tests share."""

import pytest

from fastssl.bench.measure import memory


@pytest.fixture(autouse=True)
def quick_children(monkeypatch):
    """The server that children fork from imports what these tests need, and no other library."""
    needed = ["torch", "fastssl.losses", "fastssl.bench.measure.gate", "lightly.loss"]
    monkeypatch.setattr(memory, "PRELOAD", needed)
