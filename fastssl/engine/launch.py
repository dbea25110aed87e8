"""Processes and devices: one process needs no launcher, several come from torchrun."""

import contextlib
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
    alone = {} if found or _launched() else _world_of_one()
    os.environ.update(alone)
    place = torch.device("cpu")
    if on_cuda:
        place = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(place)
    backend = "nccl" if on_cuda else "gloo"
    try:
        with contextlib.nullcontext() if found else _store_of_this_start():
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
def _store_of_this_start() -> Iterator[None]:
    """Inside, MASTER_PORT is that of a store of the ranks' own, under torchrun.

    The launcher's own store outlives the ranks that it starts again (--max-restarts), and holds the
    addresses of those that are gone, which the new ones would take for each other's (pytorch issue
    135712).  How often it has started them it does not say alike on all machines, so the first rank
    says in the launcher's where it has opened another, and those who read an old answer ask again.
    """
    env = os.environ
    if env.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or env["WORLD_SIZE"] == "1":
        yield
        return
    host, before, wait = env["MASTER_ADDR"], env["MASTER_PORT"], timedelta(seconds=1)
    met = TCPStore(host, int(before), is_master=False)
    if env["RANK"] == "0":
        own, word = TCPStore(host, 0, is_master=True, multi_tenant=True), secrets.token_hex(16)
        own.set("word", word)
        met.set("fastssl/store", f"{own.port} {word}")
    else:
        own = None
        while own is None:
            port, word = met.get("fastssl/store").decode().split()
            with contextlib.suppress(OSError, DistError):  # of a start that is over
                socket.create_connection((host, int(port)), timeout=1).close()
                there = TCPStore(host, int(port), is_master=False, timeout=wait)
                own = there if there.get("word").decode() == word else None
            time.sleep(0 if own else 0.2)
    env.update(MASTER_PORT=str(own.port), TORCHELASTIC_USE_AGENT_STORE="False")
    try:
        yield
    finally:
        env.update(MASTER_PORT=before, TORCHELASTIC_USE_AGENT_STORE="True")


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


def _launched() -> bool:
    """Whether a launcher has set this process up as one of several, or as the only one."""
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
