"""Processes and devices: one process needs no launcher, several come from torchrun."""

import contextlib
import ipaddress
import os
import re
import secrets
import socket
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import DistError, TCPStore

from .config import EngineError
from .peers import watched

# What starts several processes without saying where they find each other -> how many it started.
STARTERS = ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
LEAST = (0, 19, 8)  # of DeepSpeed
_MEET = timedelta(minutes=30)  # until all ranks are there, as torch.distributed has it
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # as torchrun sets


@contextlib.contextmanager
def session(device: str) -> Iterator[torch.device]:
    """Run inside torch.distributed on this process's device, which is what is yielded.

    device: "auto", "cpu" or "cuda".  Under torchrun the ranks it made; alone, a world of one.
    Back end: nccl on CUDA, gloo on CPU.  A process group that is there already is used and left.
    Raises EngineError when CUDA is asked for and absent, in half of a launcher's environment, and
    where Slurm or MPI started several processes that would each train alone.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise EngineError("device=cuda, but torch sees no CUDA device; use device=cpu or auto")
    on_cuda = device != "cpu" and torch.cuda.is_available()
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if on_cuda else "cpu")
    found = torch.distributed.is_initialized()
    alone = {} if launched() else _world_of_one()
    os.environ.update(alone)
    place = torch.device("cpu")
    if on_cuda:
        place = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(place)
    backend = "nccl" if on_cuda else "gloo"
    try:
        with contextlib.nullcontext() if found else _ways_to_each_other():
            deepspeed().init_distributed(dist_backend=backend, verbose=False)
            try:
                with contextlib.nullcontext() if found else watched():
                    yield place
            finally:
                if not found:
                    deepspeed().comm.destroy_process_group()
    finally:
        for name in alone:  # a process started from here is no rank of ours
            os.environ.pop(name, None)


def deepspeed() -> Any:
    """The deepspeed module, imported when first needed (it takes seconds) and kept quiet."""
    import deepspeed as module
    from deepspeed.utils import logger

    check_version(module.__version__)
    # An all-reduce through shared memory, compiled at the first start: gloo needs no compiler.
    module.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logger.setLevel("ERROR")
    return module


@contextlib.contextmanager
def _ways_to_each_other() -> Iterator[None]:
    """Inside, MASTER_PORT is that of a store that belongs to these ranks alone, under torchrun; and
    gloo has the network interface that leads to the other machines, where there are any.
    """
    env = os.environ
    names = ("MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE", "GLOO_SOCKET_IFNAME")
    before = {name: env.get(name) for name in names}
    agents = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    local = env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE") or "1"  # DeepSpeed's launcher says
    apart = int(local) < int(env["WORLD_SIZE"]) and "GLOO_SOCKET_IFNAME" not in env
    store = None
    if agents and env["WORLD_SIZE"] != "1":
        store = _store_of_this_start()
        env.update(MASTER_PORT=str(store.port), TORCHELASTIC_USE_AGENT_STORE="False")
    elif apart:  # the one that torch.distributed will open or find there
        where = env["MASTER_ADDR"], int(env["MASTER_PORT"])
        store = TCPStore(*where, is_master=env["RANK"] == "0", multi_tenant=True, timeout=_MEET)
    if apart and store is not None and (name := _interface(store)):
        env["GLOO_SOCKET_IFNAME"] = name
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                env.pop(name, None)
            else:
                env[name] = value


def _store_of_this_start() -> TCPStore:
    """A store that these ranks have opened themselves.

    The launcher's own store outlives the ranks that it starts again (--max-restarts), and holds the
    addresses of those that are gone, which the new ones would take for each other's (pytorch issue
    135712).  How often it has started them it does not say alike on all machines, so the first rank
    says in the launcher's where it has opened another, and those who read an old answer ask again.
    """
    env = os.environ
    host, wait = env["MASTER_ADDR"], timedelta(seconds=1)
    met = TCPStore(host, int(env["MASTER_PORT"]), is_master=False)
    if env["RANK"] == "0":
        own, word = TCPStore(host, 0, is_master=True, multi_tenant=True), secrets.token_hex(16)
        own.set("word", word)
        met.set("fastssl/store", f"{own.port} {word}")
        return own
    while True:
        port, word = met.get("fastssl/store").decode().split()
        with contextlib.suppress(OSError, DistError):  # of a start that is over
            socket.create_connection((host, int(port)), timeout=1).close()
            own = TCPStore(host, int(port), is_master=False, timeout=wait)
            if own.get("word").decode() == word:
                own.set_timeout(_MEET)
                return own
        time.sleep(0.2)


def _interface(store: TCPStore) -> str | None:
    """The network interface of this machine that leads to the other ones; None if it has no name.

    Gloo would take the one of the host's name, which on many machines is 127.0.1.1, and on others
    unknown.  A machine that knows MASTER_ADDR by such a name asks the other ranks for theirs.
    """
    from psutil import net_if_addrs

    env = os.environ
    here = _address_towards(env["MASTER_ADDR"])
    store.set(f"fastssl/address/{env['RANK']}", here)
    for rank in reversed(range(int(env["WORLD_SIZE"]))):
        if not ipaddress.ip_address(here).is_loopback:
            break
        there = store.get(f"fastssl/address/{rank}").decode()
        if not ipaddress.ip_address(there).is_loopback:
            here = _address_towards(there)
    for name, addresses in net_if_addrs().items():
        if here in [address.address.partition("%")[0] for address in addresses]:
            return name
    return None


def _address_towards(host: str) -> str:
    """The address that this machine has for `host`; of a loopback where it cannot be reached."""
    for family, kind, protocol, _, there in socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM):
        with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as way:
            way.connect(there)  # sends nothing
            return way.getsockname()[0].partition("%")[0]
    return "127.0.0.1"


def check_version(version: str) -> None:
    """Raise EngineError for a DeepSpeed that computes wrong gradients.

    Before 0.19.8 it loses at stage 2 a part of the gradient of a module that is called twice.

    >>> check_version("0.19.8+cu130")
    >>> check_version("0.20.0rc1")
    """
    if tuple(int(n) for n in re.findall(r"\d+", version)[:3]) < LEAST:
        least = ".".join(map(str, LEAST))
        raise EngineError(
            f"deepspeed {version} computes wrong gradients at ZeRO stage 2 for an encoder that is "
            f"called more than once in a step: pip install 'deepspeed>={least}'"
        )


def launched() -> bool:
    """Whether this process has been set up as one of several, or as the only one: by a launcher, or
    by a process group that is there."""
    if torch.distributed.is_initialized():
        return True
    missing = [name for name in LAUNCHER if name not in os.environ]
    if "RANK" in os.environ and missing:
        raise EngineError(
            f"RANK is set, but {', '.join(missing)} not: start with torchrun, or unset RANK"
        )
    if missing:
        several = next((s for s in STARTERS if os.environ.get(s, "1") not in ("", "1")), None)
        if several:
            raise EngineError(
                f"{several}={os.environ[several]}, but these processes know nothing of each other "
                "and would train the same run: start one task a node, and its ranks with torchrun "
                f"(or unset {several} to train in this process alone)"
            )
    return not missing


def _world_of_one() -> dict[str, str]:
    """What a launcher would have put into the environment of a single process.

    Port 0: the store takes a free one as it opens, so that no other process can be quicker.
    """
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    return {**ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
