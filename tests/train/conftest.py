"""Pictures are a third of a small run's time: drawn where a test is marked to look at them."""

import pytest

from tests.runs import without_pictures


@pytest.fixture(autouse=True)
def _pictures(request, monkeypatch):
    if request.node.get_closest_marker("pictures") is None:
        without_pictures(monkeypatch.setattr)
