"""Ranks that learn within a second that one of them has died, wherever they wait for it.

A collective notices a dead peer over its open connection; the making of a group waits half an hour
for the peer's address.  Here each rank keeps a connection to the first one: the kernel closes it
with the process, whatever killed it, and the first rank passes that on by ending as well.
"""

import contextlib
import os
import secrets
import select
import signal
import socket
import sys
import threading
from collections.abc import Iterator

import torch

from fastssl import distributed

_BYE = b"."
_GRACE = 3.0  # seconds in which a rank may end by itself, with a better message


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
    if not peers and agent is None:
        yield
        return
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
    while not lost:
        ready, *_ = select.select([done, *peers], [], [], None if agent is None else 1.0)
        if done in ready:
            return
        for connection in [peer for peer in peers if peer in ready]:
            rank = peers.pop(connection)
            if _said(connection) != _BYE:
                lost.append(rank)
        if agent is not None and os.getppid() != agent:
            agent = None
            os.kill(os.getpid(), signal.SIGTERM)
    if not select.select([done], [], [], _GRACE)[0]:  # the main thread waits for the dead
        sys.stderr.write(f"fastssl, rank {distributed.rank()}: {_sentence(lost[0])}\n")
        sys.stderr.flush()
        os._exit(RankLost.exit_code)


def _sentence(rank: int) -> str:
    return f"rank {rank} has ended, and the others with it: resume=auto takes the run up again"


def _said(connection: socket.socket) -> bytes:
    try:
        return connection.recv(1)
    except OSError:
        return b""
