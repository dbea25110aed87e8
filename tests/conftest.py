"""Every test runs on the CPU or the GPU alike; without a GPU, Triton interprets its kernels."""

import gc
import os
import random
import sys
from importlib.metadata import version
from importlib.util import find_spec

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    # One thread here, in ranks and in programs started: with two, sums round otherwise.
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import fastssl.kernels  # noqa: E402  after the variable is set
from fastssl.kernels.common import tuning  # noqa: E402

from . import covering, interpreter  # noqa: E402

if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton"):
    interpreter.quicken()

# The doctests of kernels/ are collected by the folder's name.  Imported a second time under it, the
# operators would be registered twice, and the second would not know the masks of the first.
if find_spec("triton"):
    tuning.kernels()  # imports what is otherwise imported with a first launch
for name, module in list(sys.modules.items()):
    if name.startswith(fastssl.kernels.__name__):
        sys.modules[name.removeprefix("fastssl.")] = module

# A suite must not fail by luck: the same examples and the same numbers each time, whichever tests
# ran before in this process.  For examples of another draw: --hypothesis-profile default.
if find_spec("hypothesis"):  # a GPU machine may be without
    from hypothesis import HealthCheck, settings

    slow = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
    settings.register_profile("same", derandomize=True, database=None, **slow)
    settings.load_profile("same")


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="whole products of parameters")


def pytest_configure(config):
    """On a GPU a case takes next to no time, and there a pair of values may not say it all."""
    covering.FULL = config.getoption("--full") or torch.cuda.is_available()
    if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton"):
        if problem := interpreter.problem(version("triton"), np.__version__):
            raise pytest.UsageError(problem)


def pytest_collection_finish():
    """What was imported and collected stays: no collection of garbage need go through it again."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()  # some libraries call it a leak that they were not cleared


def pytest_runtest_setup():
    """Before a test and the fixtures that it is the first to ask for."""
    if ranks := sys.modules.get("tests.ranks"):
        ranks.serve()
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
