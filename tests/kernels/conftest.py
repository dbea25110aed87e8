import pytest

from fastssl.kernels import _chunks


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """512 floats a chunk, so that the tests' small shapes cross several and divide none."""
    for device in ("cpu", "cuda"):
        monkeypatch.setitem(_chunks.CHUNK_BYTES, device, 2048)
