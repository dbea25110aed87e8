"""Processes and devices: one process needs no launcher, several come from torchrun."""

import contextlib
import os
import re
from collections.abc import Iterator
from typing import Any

import torch

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
    deepspeed().init_distributed(dist_backend="nccl" if on_cuda else "gloo", verbose=False)
    try:
        with contextlib.nullcontext() if found else watched():
            yield place
    finally:
        if not found:
            deepspeed().comm.destroy_process_group()
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
