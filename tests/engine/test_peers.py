"""Ranks that end when another one has died, wherever they wait (faults 32 and 46)."""

import multiprocessing
import os
import signal
import socket
import threading
import time

import pytest
import torch.distributed as dist

from fastssl.engine.peers import _end_when_silent, _Talk, _watch, watched
from fastssl.engine.watchdog import heart
from tests.ranks import start


def rank_of_two(rank, folder, how):
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    with watched():
        if how == "leaves":
            return
        if rank == 1 and how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if rank == 1:
            raise ValueError("of this rank alone")
        dist.distributed_c10d._get_default_store().get("as the making of a group waits")


@pytest.mark.parametrize(
    "how, codes", [("killed", [1, -signal.SIGKILL]), ("fails", [1, 1]), ("leaves", [0, 0])]
)
def test_a_rank_does_not_wait_for_a_dead_one(how, codes, tmp_path):
    ranks = [start(rank_of_two, r, str(tmp_path), how) for r in (0, 1)]
    for process in ranks:
        process.join(200)  # without the watch: half an hour
    ended = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    assert ended == codes


@pytest.mark.parametrize(
    "rank, said, lost",
    [
        (1, b"", ["rank 1 has ended"]),
        (1, b'{"host": "b"}\n{"fails": "OSError"}\n', ["rank 1 on b has ended (OSError)"]),
        (0, b'{"host": "a"}\n{"lost": "rank 2 on c has ended"}\n', ["rank 2 on c has ended"]),
        (1, b".", []),
    ],
)
def test_a_closed_connection_is_a_death_unless_it_was_announced(rank, said, lost):
    (ours, theirs), (done, leave), found = socket.socketpair(), os.pipe(), []
    watch = threading.Thread(target=_watch, args=({ours: rank}, None, done, found))
    theirs.sendall(said)
    theirs.close()
    watch.start()
    while lost and not found:
        time.sleep(0.01)
    os.write(leave, b".")
    watch.join()
    assert found == lost
    for descriptor in (done, leave):
        os.close(descriptor)
    ours.close()


def test_a_machine_that_is_silent_is_given_up_within_a_minute():
    """What the kernel does then: test_hosts, where there is a cable to be pulled."""
    with socket.socket() as connection:
        _end_when_silent(connection)
        names = ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT", "TCP_USER_TIMEOUT")
        idle, every, count, limit = (
            connection.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) for name in names
        )
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    assert 20 < idle + every * count < 50 and 20_000 < limit < 50_000


def test_who_is_asked_to_stop_tells_the_others_and_they_pass_it_on():
    """So that one who waits for data leaves, though the signal came to another rank."""
    (ours, theirs), (other, end) = socket.socketpair(), socket.socketpair()
    talk = _Talk({ours: 1, other: 2})
    with heart.watched(0):
        talk.tick()
        theirs.sendall(b'{"stop": true}\n{"ask"')
        assert talk.hear(ours) and heart.asked_to_stop
        theirs.sendall(b": true}\n")
        assert talk.hear(ours)
        talk.tick()
        talk.tick()
    assert end.recv(999).count(b'{"stop": true}\n') == 1
    assert theirs.recv(999).startswith(b'{"is": {"step": ')
    for connection in (ours, theirs, other, end):
        connection.close()


def worker(told):
    os.environ["TORCHELASTIC_RUN_ID"] = "one"
    signal.signal(signal.SIGTERM, lambda *_: told.touch())
    with watched():
        (told.parent / "ready").touch()
        for _ in range(2000):
            if told.exists():
                return
            time.sleep(0.1)


def launcher(told):
    multiprocessing.get_context("fork").Process(target=worker, args=(told,)).start()
    while not (told.parent / "ready").exists():
        time.sleep(0.05)
    os._exit(0)  # without waiting for its worker, as kill -9 would


def test_an_orphan_of_torchrun_is_told_to_stop(tmp_path):
    told = tmp_path / "told"
    launched = start(launcher, told, daemon=False)
    launched.join(200)
    for _ in range(2000):
        if told.exists():
            return
        time.sleep(0.1)
    raise AssertionError("the orphan was not told")
