"""One finished run for the tests that only read or damage it; pictures where they are looked at."""

import shutil

import pytest

from fastssl.run.train import pretrain
from tests.runs import tiny, without_pictures


@pytest.fixture(autouse=True)
def _pictures(request):
    """Pictures are drawn, and probes fitted whole, where a test is marked to look at them."""
    with pytest.MonkeyPatch.context() as patch:  # not the test's own, which it may undo
        if request.node.get_closest_marker("pictures") is None:
            without_pictures(patch.setattr)
        yield


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The configuration of an MAE of two epochs, its results beside it: not to be written to."""
    cfg = tiny("mae", tmp_path_factory.mktemp("finished"))
    with pytest.MonkeyPatch.context() as patch:
        without_pictures(patch.setattr)
        return cfg, pretrain(cfg)


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run, with checkpoints of steps 5 and 10, to be taken up."""
    cfg, _ = finished
    shutil.copytree(cfg.directory, tmp_path / "run")
    return cfg.model_copy(update={"output": tmp_path, "resume": "auto"})
