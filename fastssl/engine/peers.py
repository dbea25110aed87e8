"""Ranks that learn within a second that one of them has died, wherever they wait for it.

A collective notices a dead peer over its open connection; the making of a group waits half an hour
for the peer's address.  Here each rank keeps a connection to the first one: the kernel closes it
with the process, whatever killed it, and where a machine or its network is gone, as soon as it has
not answered for `_SILENCE` seconds.  The first rank tells the others who it was, and ends as well.

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
_SILENCE = 40  # seconds after which a machine that does not even acknowledge counts as gone


class RankLost(RuntimeError):
    """Another rank has ended, and this one cannot go on alone."""

    exit_code = 1


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Inside, this process ends soon after another rank has died: RankLost, or exit code 1.

    A rank that leaves by an exception that is not `on_every_rank`, or by Ctrl-C, counts as dead;
    one that leaves otherwise does not.  Under torchrun the launcher's death is a SIGTERM to this
    process.
    """
    peers = _connected() if distributed.world_size() > 1 else {}
    agent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
    done, leave = os.pipe()
    lost: list[str] = []
    watch = threading.Thread(target=_watch, args=(dict(peers), agent, done, lost), daemon=True)
    watch.start()
    last = b""  # words: none, if this rank leaves alone and knows not why
    try:
        yield
        last = _BYE
    except BaseException as error:
        last = _BYE if getattr(error, "on_every_rank", False) else _line(fails=_told(error))
        if not isinstance(error, Exception):  # Ctrl-C: it came to the others as well, or it did not
            raise
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
                connection.sendall(last)
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
        _end_when_silent(connection)
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
                _end_when_silent(connection)
                peers[connection] = int(said[32:])
            else:  # a stranger, of which a network has many
                connection.close()
    return peers


def _end_when_silent(connection: socket.socket) -> None:
    """The kernel asks for a sign of life, and gives the connection up without one."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    every = max(1, _SILENCE // 8)
    seconds = {"TCP_KEEPIDLE": every, "TCP_KEEPINTVL": every, "TCP_KEEPCNT": 7}
    for name, value in (seconds | {"TCP_USER_TIMEOUT": 1000 * _SILENCE}).items():
        if hasattr(socket, name):  # macOS has other names
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _watch(peers: dict[socket.socket, int], agent: int | None, done: int, lost: list[str]) -> None:
    talk = _Talk(peers)
    talk.tell({"host": talk.hosts[talk.rank]})
    while not lost:
        ready = _readable([done, *peers], _TICK)
        if done in ready:
            return
        for connection in [peer for peer in peers if peer in ready]:
            if not talk.hear(connection):
                del peers[connection]
                if why := talk.parted(connection):
                    lost.append(why)
                    talk.tell({"lost": why})
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
    {"is": status} to it, {"verdict": sentence} from it; {"stop": true} from whoever was asked to;
    {"host": name} at first, {"fails": error} at last, and {"lost": who} from the first rank.
    """

    def __init__(self, peers: dict[socket.socket, int]):
        self.peers, self.rank = peers, distributed.rank()
        self.ranks = dict(peers)  # also of those that have gone
        self.hosts = {self.rank: socket.gethostname()}
        self.why: dict[int, str] = {}  # a rank, or the connection to it, has ended
        self.lost = ""  # who was it, as the first rank has said
        self.begun: dict[socket.socket, bytes] = {}  # of a message
        self.answers: dict[int, dict[str, Any] | None] | None = None  # to a question of the first
        self.asked = self.told = 0.0  # when: the first rank the others, this one the first
        self.late = self.passed_on = False  # someone does not move; who is asked to stop is known

    def hear(self, connection: socket.socket) -> bool:
        """Read what has come and act on it; False where that was the last."""
        came = b""
        try:
            came = connection.recv(1 << 16)
        except ConnectionError:
            pass
        except OSError as error:
            self.why[self.ranks[connection]] = f"cannot be reached any more ({error.strerror})"
        *lines, rest = (self.begun.get(connection, b"") + came).split(b"\n")
        self.begun[connection] = rest
        for line in lines:
            self.act(json.loads(line), self.ranks[connection])
        return bool(came) and rest != _BYE

    def parted(self, connection: socket.socket) -> str:
        """Who is lost with this connection, and why; empty where all was well."""
        if self.begun.pop(connection, b"") == _BYE:
            return ""
        rank = self.ranks[connection]
        host = f" on {self.hosts[rank]}" if rank in self.hosts else ""
        return self.lost or f"rank {rank}{host} {self.why.get(rank, 'has ended')}"

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
        if "host" in said:
            self.hosts[rank] = said["host"]
        if "fails" in said:
            self.why[rank] = f"has ended ({said['fails']})"
        if "lost" in said and rank == 0:
            self.lost = said["lost"]

    def tell(self, said: dict[str, Any]) -> None:
        for connection in self.peers:
            with contextlib.suppress(OSError):
                connection.sendall(_line(**said))

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
                ranks = {0: None, self.rank: heart.status()}
                end(self.rank, verdict(ranks, heart.limit, self.hosts))
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
            sentence = verdict(ranks, heart.limit, self.hosts)
            self.tell({"verdict": sentence})
            end(self.rank, sentence)


def _line(**said: Any) -> bytes:
    return json.dumps(said).encode() + b"\n"


def _told(error: BaseException) -> str:
    """An error by its type and the first line of what it says."""
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0][:200]}" if said else type(error).__name__


def _sentence(lost: str) -> str:
    return f"{lost}, and the others with it: resume=auto takes the run up again"
