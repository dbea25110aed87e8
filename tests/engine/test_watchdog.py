"""A run that hangs ends, and says who holds it up; one that is slow does not."""

import multiprocessing
import os
import re
import signal
import socket
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fastssl.engine import watchdog
from fastssl.engine.peers import watched
from fastssl.engine.watchdog import DATA, SAVING, STEP, Heart, heart, verdict
from tests.ranks import start

LIMIT = 2.0
HOST = socket.gethostname()


def hangs_here():
    threading.Event().wait(60)


def rank_of_two(rank, folder, how):
    """Step 4, in which rank 1 does not come to the collective; what is said goes to a file."""
    out = os.open(f"{folder}/said-{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(out, 2)
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    with watched(), heart.watched(LIMIT):
        heart.at(STEP, 4)
        if rank == 1 and how == "hangs":
            hangs_here()
        if rank == 1 and how == "stops":
            os.kill(os.getpid(), signal.SIGSTOP)
        for _ in range(7 if rank == 1 else 0):  # slow, and yet it moves
            heart.beat()
            time.sleep(LIMIT / 4)
        if rank == 1:
            with heart.paused():
                time.sleep(1.5 * LIMIT)
        dist.all_reduce(torch.zeros(1))


def run(how, folder):
    ranks = [start(rank_of_two, r, str(folder), how) for r in (0, 1)]
    try:
        ranks[0].join(100)
        ranks[1].join(0 if how == "stops" else 100)
        return [r.exitcode for r in ranks], [(folder / f"said-{r}").read_text() for r in (0, 1)]
    finally:
        for process in ranks:
            process.kill()


def test_ranks_that_hang_end_and_name_the_one_that_holds_them_up(tmp_path):
    codes, said = run("hangs", tmp_path)
    assert codes == [6, 6]
    for rank in (0, 1):
        assert (
            f"rank {rank}: nothing has moved for 2 s (engine.watchdog): rank 1 on {HOST} is in "
            in said[rank]
        )
        assert "the step (step 4), and the others wait for it" in said[rank]
    assert f"rank 0 on {HOST} is in a collective (all_reduce) (step 4)" in said[0]
    assert f"rank 1 on {HOST} is in the step (step 4)" in said[1] and "hangs_here" in said[1]


def test_a_rank_that_is_stopped_does_not_answer(tmp_path):
    codes, said = run("stops", tmp_path)
    told = re.sub(f" on {HOST}", "", said[0])  # it may have stopped before it told its host
    assert codes[0] == 6 and "rank 1 does not answer" in told


def test_a_rank_that_is_slow_but_moves_is_waited_for(tmp_path):
    assert run("moves", tmp_path) == ([0, 0], ["", ""])


def one(folder):
    reader = multiprocessing.Process(target=hangs_here, daemon=True)
    reader.start()
    Path(folder, "reader").write_text(str(reader.pid))
    os.dup2(os.open(f"{folder}/said", os.O_WRONLY | os.O_CREAT), 2)
    with watched(), heart.watched(LIMIT):
        heart.at(STEP, 1)
        hangs_here()


def test_a_single_process_that_hangs_ends(tmp_path):
    process = start(one, str(tmp_path), daemon=False)
    process.join(100)
    assert process.exitcode == 6 and "hangs_here" in (tmp_path / "said").read_text()
    reader = Path(f"/proc/{(tmp_path / 'reader').read_text()}/cmdline")
    for _ in range(100):  # its own wait would be over after a minute
        if not reader.exists() or not reader.read_bytes():  # gone, or as good as
            return
        time.sleep(0.1)
    raise AssertionError("the reader lives on")


@pytest.mark.parametrize("place, starved, late", [(DATA, 2, 3), (STEP, 9, 2), (SAVING, 9, 9)])
def test_who_waits_for_data_has_the_time_to_save(place, starved, late, monkeypatch):
    """A limit of 30 s, looked at every 9 s, but for one look after a minute without any."""
    clock = [0.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: clock[0])
    pulse = Heart()
    with pulse.watched(30):
        pulse.at(place, 1)
        looks = []
        for seconds in (9, 60, 9, 9, 9, 9, 9, 9):  # in the minute it was stopped
            clock[0] += seconds
            looks.append((pulse.starved(), pulse.late()))
        first = [next((n for n, look in enumerate(looks) if look[i]), None) for i in (0, 1)]
    assert first == [{DATA: 4}.get(place), {DATA: 7, STEP: 4}.get(place)]
    assert pulse.idle() == 0


def said(step=4, beats=0, place=STEP, waits=False):
    return {"step": step, "beats": beats, "place": place, "waits": waits}


@pytest.mark.parametrize(
    "ranks, words",
    [
        ([said(waits=True), None, said()], "rank 1 on b does not answer"),
        ([said()], "in the step .step 4."),
        ([said(waits=True), said(), said()], r"one of the ranks \[1, 2\] on b is in the step"),
        (
            [said(), *[said(waits=True)] * 9, *[None] * 9],
            r"one of the ranks \[.*\] on k,.*, r and others does",
        ),
        ([said(waits=True), said(waits=True, beats=1)], "rank 0 is behind"),
        ([said(waits=True), said(3, waits=True, beats=1)], "rank 1 on b is behind"),
        ([said(), said()], "every rank is in the step"),
    ],
)
def test_the_culprit_is_named_where_it_can_be_known(ranks, words):
    """Of rank 0 no host is known."""
    hosts = {1: "b", 2: "b"} | {n: chr(ord("a") + n) for n in range(3, 19)}
    assert re.search(f"for 7 s .*: {words}", verdict(dict(enumerate(ranks)), 7, hosts))
