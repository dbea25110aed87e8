"""kill -9 in mid-epoch, and again: every sample of an epoch is seen once, in the same batches."""

import signal

import pytest

from tests.data.killed_worker import BATCH, EPOCHS, read, told
from tests.data.photos import folder
from tests.ranks import start

COUNT = 61  # 8 steps of 8: the last one has 3 of padding
STEPS = EPOCHS * 8
NEVER = 2 * STEPS


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return str(folder(tmp_path_factory.mktemp("photos"), COUNT))


@pytest.mark.parametrize("world, backend", [(1, "dali"), (2, "torch")])
def test_every_sample_once_whatever_is_killed(world, backend, photos, tmp_path):
    logs = [tmp_path / f"rank{r}" for r in range(world)]

    def ends(dies_at):
        """How the ranks end that die after so many lines, one line apart from each other."""
        runs = [
            start(read, log, photos, r, world, backend, dies_at + r, daemon=False)
            for r, log in enumerate(logs)
        ]
        for run in runs:
            run.join(300)
            run.kill()
        return [run.exitcode for run in runs]

    count = 10  # in the midst of an epoch
    assert ends(dies_at=count) == [-signal.SIGKILL] * world
    whole = [log.read_text().splitlines(keepends=True) for log in logs]
    assert [len(part) for part in whole] == [count + r for r in range(world)]
    # The ranks died apart from each other: a run resumes from the step that all of them have.
    for log, part in zip(logs, whole, strict=True):
        log.write_text("".join(part[:count]))
    assert ends(dies_at=NEVER) == [0] * world
    parts = [[line.split(": ") for line in log.read_text().splitlines()] for log in logs]
    assert all([int(step) for step, *_ in part] == list(range(STEPS)) for part in parts)
    for epoch in range(EPOCHS):
        words = [
            word
            for step in range(8 * epoch, 8 * epoch + 8)
            for part in parts
            for word in part[step][1].split()
        ]
        assert len(words) == 8 * BATCH and sum(word.startswith("pad") for word in words) == 3
        seen = sorted(int(word) for word in words if not word.startswith("pad"))
        assert seen == list(range(COUNT))
    for rank, log in enumerate(logs):  # to the last bit of the views' sums
        assert log.read_text() == "".join(told(photos, rank, world, backend, 0))
