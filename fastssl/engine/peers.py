"""Ranks that learn within a second that one of them has died, wherever they wait for it.

A collective notices a dead peer over its open connection; the making of a group waits half an hour
for the peer's address.  Here each rank keeps a connection to the first one: the kernel closes it
with the process, whatever killed it, and the first rank passes that on by ending as well.

Over the same connections the ranks tell each other, in a line of JSON, that they do not move, and
the first one asks all of them before it says that the run hangs (watchdog.py).
"""

import contextlib
import json
import os
import secrets
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from fastssl import distributed

from .watchdog import end, heart, verdict

_BYE = b"."
_GRACE = 3.0  # seconds in which a rank may end by itself, with a better message
_TICK = 1.0  # seconds between two looks at the clock
_ANSWER = 5.0  # seconds in which a rank answers, unless its process or its machine hangs


class RankLost(RuntimeError):
    """Another rank has ended, and this one cannot go on alone."""

    exit_code = 1


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Inside, this process ends soon after another rank has died: RankLost, or exit code 1.

    A rank that leaves by an exception that is not `on_every_rank` counts as dead; one that leaves
    otherwise does not.  Under torchrun the launcher's death is a SIGTERM to this process.
    """
    peers = _connected() if distributed.world_size() > 1 else {}
    agent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
    done, leave = os.pipe()
    lost: list[int] = []
    watch = threading.Thread(target=_watch, args=(dict(peers), agent, done, lost), daemon=True)
    watch.start()
    together = True
    try:
        yield
    except Exception as error:
        together = getattr(error, "on_every_rank", False)
        if not isinstance(error, ValueError):  # a broken collective may be why; the watch knows
            watch.join(1.0 if peers else 0.0)
        if lost:
            raise RankLost(_sentence(lost[0])) from error
        raise
    finally:
        os.write(leave, _BYE)
        watch.join()
        os.close(leave)
        os.close(done)
        for connection in peers:
            with contextlib.suppress(OSError):
                if together:
                    connection.sendall(_BYE)
                connection.shutdown(socket.SHUT_RDWR)  # a reader forked from here holds it open
            connection.close()


def _connected() -> dict[socket.socket, int]:
    """Connections, each with the rank at its end: the first rank's to all others, theirs to it."""
    store = torch.distributed.distributed_c10d._get_default_store()
    world, rank = distributed.world_size(), distributed.rank()
    if rank > 0:
        port, word = store.get("fastssl/peers").decode().split()
        connection = socket.create_connection((os.environ["MASTER_ADDR"], int(port)), timeout=60)
        connection.sendall(f"{word}{rank:08d}".encode())
        connection.settimeout(None)
        return {connection: 0}
    word, peers = secrets.token_hex(16), {}
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    with socket.create_server(
        ("", 0), family=family, dualstack_ipv6=family == socket.AF_INET6
    ) as door:
        store.set("fastssl/peers", f"{door.getsockname()[1]} {word}")
        door.settimeout(120)
        while len(peers) < world - 1:
            try:
                connection, _ = door.accept()
            except TimeoutError:
                gone = sorted({*range(1, world)} - {*peers.values()})
                raise RankLost(f"ranks {gone} have not come in 120 s") from None
            connection.settimeout(10)
            said = b""
            with contextlib.suppress(OSError):
                said = connection.recv(40, socket.MSG_WAITALL)
            if said[:32] == word.encode():
                peers[connection] = int(said[32:])
            else:  # a stranger, of which a network has many
                connection.close()
    return peers


def _watch(peers: dict[socket.socket, int], agent: int | None, done: int, lost: list[int]) -> None:
    talk = _Talk(peers)
    while not lost:
        ready = _readable([done, *peers], _TICK)
        if done in ready:
            return
        for connection in [peer for peer in peers if peer in ready]:
            if not talk.hear(connection):
                rank = peers.pop(connection)
                if not talk.parted(connection):
                    lost.append(rank)
        if agent is not None and os.getppid() != agent:
            agent = None
            os.kill(os.getpid(), signal.SIGTERM)
        talk.tick()
    if not _readable([done], _GRACE):  # the main thread waits for the dead
        sys.stderr.write(f"fastssl, rank {distributed.rank()}: {_sentence(lost[0])}\n")
        sys.stderr.flush()
        os._exit(RankLost.exit_code)


def _readable(files: Sequence[Any], seconds: float) -> list[Any]:
    """Those of which there is something to read, or an end, within so many seconds; their numbers
    may be above the 1,023 that `select.select` takes."""
    poll, by_number = select.poll(), {}
    for file in files:
        number = file if isinstance(file, int) else file.fileno()
        by_number[number] = file
        poll.register(number, select.POLLIN)
    return [by_number[number] for number, _ in poll.poll(1000 * seconds)]


class _Talk:
    """What goes over the connections: {"late": true} to the first rank, {"ask": true} from it and
    {"is": status} to it, {"verdict": sentence} from it; {"stop": true} from whoever was asked to.
    """

    def __init__(self, peers: dict[socket.socket, int]):
        self.peers, self.rank = peers, distributed.rank()
        self.begun: dict[socket.socket, bytes] = {}  # of a message
        self.answers: dict[int, dict[str, Any] | None] | None = None  # to a question of the first
        self.asked = self.told = 0.0  # when: the first rank the others, this one the first
        self.late = self.passed_on = False  # someone does not move; who is asked to stop is known

    def hear(self, connection: socket.socket) -> bool:
        """Read what has come and act on it; False where that was the last."""
        try:
            came = connection.recv(1 << 16)
        except OSError:
            came = b""
        *lines, rest = (self.begun.get(connection, b"") + came).split(b"\n")
        self.begun[connection] = rest
        for line in lines:
            self.act(json.loads(line), self.peers[connection])
        return bool(came) and rest != _BYE

    def parted(self, connection: socket.socket) -> bool:
        """Whether it was the other's will that the connection ends."""
        return self.begun.pop(connection, b"") == _BYE

    def act(self, said: dict[str, Any], rank: int) -> None:
        self.told = 0.0
        if "late" in said:
            self.late = True
        if "ask" in said:
            self.tell({"is": heart.status()})
        if "is" in said and self.answers is not None:
            self.answers[rank] = said["is"]
        if "verdict" in said:
            end(self.rank, said["verdict"])
        if "stop" in said:
            heart.asked_to_stop = True

    def tell(self, said: dict[str, Any]) -> None:
        line = json.dumps(said).encode() + b"\n"
        for connection in self.peers:
            with contextlib.suppress(OSError):
                connection.sendall(line)

    def tick(self) -> None:
        now = time.monotonic()
        if heart.asked_to_stop != self.passed_on:
            self.passed_on = heart.asked_to_stop
            if self.passed_on:
                self.tell({"stop": True})
        if self.answers is not None:
            self.judge(now)
        elif self.rank == 0 and (heart.late() or self.late) and now - self.asked > _ANSWER:
            self.late, self.asked = False, now
            self.answers = {0: None, **dict.fromkeys(self.peers.values())}
            self.tell({"ask": True})
        elif self.rank > 0 and heart.late():
            if self.told and now - self.told > 3 * _ANSWER:
                end(self.rank, verdict({0: None, self.rank: heart.status()}, heart.limit))
            self.told = self.told or now
            self.tell({"late": True})

    def judge(self, now: float) -> None:
        """Of the first rank: whether the run hangs, once all have answered or had the time to."""
        assert self.answers is not None
        self.answers[0] = heart.status()
        heard = [said for said in self.answers.values() if said is not None]
        if len(heard) < len(self.answers) and now - self.asked < _ANSWER:
            return
        ranks, self.answers = self.answers, None
        if all(said["late"] for said in heard):
            sentence = verdict(ranks, heart.limit)
            self.tell({"verdict": sentence})
            end(self.rank, sentence)


def _sentence(rank: int) -> str:
    return f"rank {rank} has ended, and the others with it: resume=auto takes the run up again"
