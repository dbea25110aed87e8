"""Two hosts on this machine: network namespaces and a cable, or else two addresses of loopback.

In a namespace a host has a name, and knows itself by it as 127.0.1.1, as Debian's installer writes.
"""

import ctypes
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.distributed.launcher.api import elastic_launch
from torch.distributed.run import config_from_args, parse_args

from fastssl.cli import main
from fastssl.engine import peers
from fastssl.engine.engine import Engine
from tests.ranks import start
from tests.runs import without_pictures

SPACES = {"CLONE_NEWNS": 0x00020000, "CLONE_NEWUTS": 0x04000000, "CLONE_NEWNET": 0x40000000}


def can_be_apart() -> bool:
    """Whether this process may make network namespaces, and the kernel has the cable."""
    if not (shutil.which("unshare") and shutil.which("ip") and shutil.which("nsenter")):
        return False
    trial = ["unshare", "--net", "--uts", "--mount", "sh", "-c"]
    trial += ["ip link add type veth && mount --bind /etc/hosts /etc/hosts"]
    return subprocess.run(trial, capture_output=True).returncode == 0


APART = can_be_apart()
ADDRESSES = ["10.77.0.1", "10.77.0.2"] if APART else ["127.0.0.1", "127.0.0.2"]
NAMES = ["node0", "node1"] if APART else [socket.gethostname()] * 2


def within(seconds, done, why="it did not come to that"):
    """Wait until `done()`; AssertionError after so many seconds."""
    limit = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < limit, why
        time.sleep(0.05)


class Hosts:
    """On both hosts a rank that runs `worker`.

    folder: on a disk that both have; there are their logs, host-0 and host-1.
    words: of each host, those after `torchrun`; or the environment that another launcher leaves.
    """

    def __init__(self, folder: Path, words, how: str):
        self.folder = folder
        self.hosts = [start(_host, n, folder, words[n], how, daemon=False) for n in (0, 1)]
        if APART:
            within(60, lambda: all((folder / f"apart-{n}").exists() for n in (0, 1)))
            one, two = (str(host.pid) for host in self.hosts)
            cable = ["name", "eth0", "netns", one, "type", "veth"]
            cable += ["peer", "name", "eth0", "netns", two]
            subprocess.run(["ip", "link", "add", *cable], check=True)
            (folder / "wired").touch()

    def cut(self) -> None:
        """Pull the cable out of the second host."""
        where = ["nsenter", "--net", "--target", str(self.hosts[1].pid)]
        subprocess.run([*where, "ip", "link", "set", "eth0", "down"], check=True)

    def end(self, seconds: float) -> tuple[list[int | None], list[str]]:
        """Exit codes, and what each host said; what still runs is ended."""
        try:
            limit = time.monotonic() + seconds
            for host in self.hosts:
                host.join(max(0, limit - time.monotonic()))
            codes = [host.exitcode for host in self.hosts]
        finally:
            for host in self.hosts:
                host.terminate()  # an agent ends its worker
            for host in self.hosts:
                host.join(20)
                host.kill()
        return codes, [(self.folder / f"host-{n}").read_text() for n in (0, 1)]


def _host(n: int, folder: Path, words, how: str) -> None:
    out = os.open(folder / f"host-{n}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
    if APART:
        _go_apart(n, folder)
    if isinstance(words, dict):  # as a launcher other than torchrun leaves the environment
        os.environ.update(words)
        worker(folder, how)
        return
    config, *_ = config_from_args(parse_args([*words, "none"]))
    config.start_method = "fork"  # of this process, which has all libraries
    elastic_launch(config, worker)(folder, how)


def _go_apart(n: int, folder: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(sum(SPACES.values())):
        raise OSError(ctypes.get_errno(), "unshare")
    socket.sethostname(NAMES[n])
    known = ["127.0.0.1 localhost", f"127.0.1.1 {NAMES[n]}", f"{ADDRESSES[1 - n]} {NAMES[1 - n]}"]
    (folder / f"hosts-{n}").write_text("\n".join(known) + "\n")
    steps = [["mount", "--make-rprivate", "/"]]
    steps += [["mount", "--bind", str(folder / f"hosts-{n}"), "/etc/hosts"]]
    steps += [["ip", "link", "set", "lo", "up"]]
    for step in steps:
        subprocess.run(step, check=True)
    (folder / f"apart-{n}").touch()
    within(60, (folder / "wired").exists)
    subprocess.run(["ip", "address", "add", f"{ADDRESSES[n]}/24", "dev", "eth0"], check=True)
    subprocess.run(["ip", "link", "set", "eth0", "up"], check=True)


def worker(folder: Path, how: str) -> None:
    """A rank: `fastssl pretrain` of the recipe in `folder`; how: what the second one does."""
    without_pictures()
    torch.set_num_threads(1)
    peers._SILENCE = 4
    step = Engine.step

    def disturbed(self, *args, **options):
        if self.ds.global_steps == 2 and os.environ["RANK"] == "1" and how == "fails":
            raise ArithmeticError("of this rank alone")
        return step(self, *args, **options)

    Engine.step = disturbed
    (folder / f"pid-{os.environ['RANK']}").write_text(str(os.getpid()))
    sys.argv = ["fastssl", "pretrain", str(folder / "recipe.yaml")]
    main()
