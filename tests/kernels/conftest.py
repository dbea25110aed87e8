"""Small chunks and blocks, so that the tests' small shapes cross several and divide none."""

from contextlib import ExitStack
from functools import partial
from itertools import groupby
from pathlib import Path

import pytest
import torch

from fastssl.kernels import pairwise_lse
from fastssl.kernels.common import chunks as _chunks
from fastssl.kernels.common import rows
from fastssl.kernels.common import tuning as _tuning
from fastssl.kernels.pairwise import lse_gemm as pairwise_products
from fastssl.kernels.pairwise import lse_ops as pairwise_ops
from fastssl.kernels.pairwise import lse_triton, scores_triton, symmetric_triton
from tests import covering

SMALL = {"BLOCK_M": 16, "BLOCK_N": 16}
FORCED = {
    "pairwise_lse_fwd": {**SMALL, "BLOCK_D": 16},
    "pairwise_lse_bwd": {**SMALL, "BLOCK_D": 16, "BLOCK_O": 16},
    "pairwise_lse_half": {**SMALL, "BLOCK_D": 16},
    "pairwise_summarize": SMALL,
    "pairwise_weigh": SMALL,
    "standardize_forward": {"BLOCK_N": 16, "BLOCK_D": 8, "STAGES": 2},
    "standardize_backward": {"BLOCK_N": 16, "BLOCK_D": 8, "STAGES": 2},
    "standardize_join": {"BLOCK_P": 2, "BLOCK_D": 8},
    "correlation_tiles": {"BLOCK": 32, "BLOCK_K": 16, "CORNER": 16},
    "correlation_settle": {"BLOCK_M": 16, "BLOCK_N": 32},
    "correlation_finish": {"BLOCK_M": 4, "BLOCK_N": 16},
    "tokens_gather": {"BLOCK_R": 4, "BLOCK_D": 4},
    "tokens_restore": {"BLOCK_R": 4, "BLOCK_D": 4},
    "tokens_scatter": {"BLOCK_R": 4, "BLOCK_D": 4},
    "bias_pick": {"BLOCK_I": 4, "BLOCK_J": 4},
    "bias_unpick": {"BLOCK_I": 4, "BLOCK_J": 4},
    "scaled_cosine_forward": {"BLOCK_R": 4, "BLOCK_D": 8},
    "scaled_cosine_backward": {"BLOCK_R": 4, "BLOCK_D": 8},
    "soft_forward": {"BLOCK": 8},
    "soft_backward": {"BLOCK": 8},
    "linear_forward": {**SMALL, "BLOCK_D": 16},
    "linear_backward": {**SMALL, "BLOCK_D": 16, "BLOCK_O": 16},
    "chamfer_nearest": {"BLOCK_N": 8, "BLOCK_M": 4},
    "chamfer_pull": {"BLOCK_N": 8, "BLOCK_M": 4},
}
SCHEDULES = ("tiles", "products")


@pytest.hookimpl(tryfirst=True)  # before -k, which chooses among the cases that are left
def pytest_collection_modifyitems(config, items):
    """A covering array of the cases of each test of this folder, unless --full."""
    if covering.FULL:
        return
    kept, rest = [], []
    for _, cases in groupby(items, lambda item: item.nodeid.partition("[")[0]):
        cases = list(cases)
        here = len(cases) > 1 and cases[0].path.is_relative_to(Path(__file__).parent)
        few = covering.reduced(cases) if here else cases
        kept += few
        rest += [case for case in cases if case not in few]
    config.hook.pytest_deselected(items=rest)
    items[:] = kept


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """512 floats a chunk."""
    for device in ("cpu", "cuda"):
        monkeypatch.setitem(_chunks.CHUNK_BYTES, device, 2048)


@pytest.fixture
def nan_filled():
    """New memory is nan, not what an earlier test has left there."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def five_places(monkeypatch):
    """A device that five programs fill: fewer blocks of rows share the columns, of at least 16."""
    monkeypatch.setattr(scores_triton, "programs", lambda device, each: 5)
    monkeypatch.setattr(scores_triton, "LEAST_SHARE", 16)


@pytest.fixture
def uneven(monkeypatch):
    """Rows are taken as they are, so that blocks are wider than they, and not a multiple."""
    monkeypatch.setattr(rows, "EVEN", 1)


@pytest.fixture
def small_blocks(monkeypatch, nan_filled, five_places, uneven):
    """16 rows and columns a tile; blocks of products of 20 rows and 40 columns; many rows."""
    with ExitStack() as stack:
        for kernel, blocks in FORCED.items():
            stack.enter_context(_tuning.forced(kernel, _tuning.Config(blocks)))
        monkeypatch.setattr(pairwise_products, "BLOCK_BYTES", 4 * 800)
        monkeypatch.setattr(lse_triton, "ONCE_FROM", 1)
        monkeypatch.setattr(symmetric_triton, "HALF_FROM", 1)
        monkeypatch.setattr(symmetric_triton, "SHARE", 2)
        monkeypatch.setattr(symmetric_triton, "PARTS_BYTES", 800)
        yield


@pytest.fixture(params=["torch", *SCHEDULES])
def lse(request, monkeypatch, small_blocks):
    """pairwise_lse by one implementation: chunked torch, or one of Triton's two schedules."""
    if request.param == "torch":
        return partial(pairwise_lse, impl="torch")
    monkeypatch.setattr(pairwise_ops, "schedule", lambda x, step: request.param)
    return partial(pairwise_lse, impl="triton")
