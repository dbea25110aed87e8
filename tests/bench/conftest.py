"""What the benchmark's tests share."""

import pytest

from fastssl.bench.measure import memory
from tests.ranks import PRELOAD


@pytest.fixture(autouse=True)
def quick_children(monkeypatch):
    """The server that children fork from serves ranks as well: a process has only one."""
    monkeypatch.setattr(memory, "PRELOAD", [*PRELOAD, "fastssl.bench.measure.gate"])
