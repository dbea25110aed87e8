"""pytest as a watched child: `-p fastssl.bench.gpu.plugin` writes a line for each test.

--share I/N takes every Nth of the collected tests, from the Ith on.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from typing import Any

import pytest

from fastssl.bench.gpu.watched import Watch, describe, settle, share

_STATE = pytest.StashKey[dict[str, Any]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Which tests are this child's."""
    parser.addoption("--share", default="0/1", metavar="I/N", help="every Nth test, from the Ith")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tell the plan, and leave out what is done."""
    watch = Watch.told()
    part, parts = share(config.getoption("--share"))
    items[:] = items[part::parts]
    config.stash[_STATE] = {"watch": watch, "numbers": {id(x): n for n, x in enumerate(items)}}
    watch.plan([_name(item) for item in items])
    del items[: watch.skip]


def _name(item: pytest.Item) -> str:
    return item.nodeid.rpartition("/")[2].replace("test_", "").replace(".py::", " ")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Generator:
    """Keep the first error of a test's phases: later ones may be its consequence."""
    report = yield
    state = item.config.stash[_STATE]
    if call.when == "setup":
        state["begun"], state["error"] = call.start, None
    if call.excinfo is not None and state["error"] is None:
        state["error"] = describe(call.excinfo.value)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator:
    """After a test's last phase: wait for the GPU, write the line, and end where it is lost."""
    made = yield
    state = item.config.stash[_STATE]
    error = state["error"]
    try:
        settle()
    except Exception as raised:
        error = error or describe(raised)
    seconds = time.time() - state["begun"]
    state["watch"].end(state["numbers"][id(item)], _name(item), seconds, error)
    return made
