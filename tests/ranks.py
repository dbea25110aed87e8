"""Run a function as W gloo ranks on this machine, and bring back what each returned."""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import os
import tempfile
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from multiprocessing import forkserver, resource_tracker, util
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# Processes fork from one server that has imported these already: a tenth of a second each, not ten.
PRELOAD = ["torch._dynamo", "torch.nn.parallel", "fastssl.losses"]  # DDP imports dynamo
PRELOAD += ["lightly.loss", "lightly.models.modules", "open_clip.loss"]  # of tests with a rival
PRELOAD += ["deepspeed", "fastssl.run.train", "fastssl.cli", "sklearn.linear_model"]
PRELOAD += ["deepspeed.runtime.zero.stage3", "deepspeed.runtime.zero.stage_1_and_2"]
PRELOAD += ["functorch.compile", "torch._inductor.compile_fx", "timm.optim", "pytest"]

_served = False


def serve() -> None:
    """Let the server be a fork of this process, which has imported most of PRELOAD anyway.

    Call it before there are threads: they do not live on in a fork.  Nor does a GPU's context.
    """
    global _served
    if _served or torch.cuda.is_available():
        return
    _served = True
    for name in PRELOAD:
        if find_spec(name.partition(".")[0]):
            import_module(name)
    gc.collect()
    gc.freeze()  # else each collection of garbage would copy what the processes share

    def fork(path: str, words: Sequence[str], descriptors: Sequence[int]) -> int:
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            _, alive = descriptors  # a pipe whose other end the test's process alone is to hold
            others = {int(name) for name in os.listdir("/proc/self/fd")} - {alive}
            for descriptor in others:
                with suppress(OSError):  # the folder's own, which is closed
                    if os.path.sameopenfile(descriptor, alive):
                        os.close(descriptor)
            warnings.simplefilter("ignore")  # pytest's are errors, which would end the server
            exec(words[-1])  # what a new interpreter would be given with -c
        except SystemExit:  # the test's process is gone
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    resource_tracker.ensure_running()
    spawn, util.spawnv_passfds = util.spawnv_passfds, fork  # pyright: ignore
    try:
        forkserver.set_forkserver_preload(["tests.on_cpu"])
        forkserver.ensure_running()
    finally:
        util.spawnv_passfds = spawn  # pyright: ignore


def start(fn: Callable[..., Any], *args: Any, daemon: bool = True) -> BaseProcess:
    """A new process that runs fn(*args) on the CPU, its libraries imported before it began.

    A daemon ends with this process, and may have no children.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.on_cpu", *PRELOAD])
    process = context.Process(target=_plainly, args=(fn, *args), daemon=daemon)
    process.start()
    return process


def _plainly(fn: Callable[..., Any], *args: Any) -> None:
    """As a program runs it: its children fork from it, and what waits for the exit is done."""
    multiprocessing.set_start_method(None, force=True)
    atexit._clear()  # the server's
    gc.freeze()  # else each collection, and DeepSpeed asks for them, goes through all libraries
    try:
        fn(*args)
    finally:
        atexit._run_exitfuncs()


def run_ranks(fn: Callable[..., Any], world: int, *args: Any, timeout: float = 400) -> list[Any]:
    """[fn(rank, world, *args) for each rank], the ranks joined by a gloo process group.

    fn: a module's top-level function; it returns tensors, numbers, strings and containers of them.
    Raises RuntimeError with every failed rank's traceback, or naming the ranks that hung.
    """
    with tempfile.TemporaryDirectory() as folder:
        ranks: list[BaseProcess] = []
        try:
            for rank in range(world):
                ranks.append(start(_rank, fn, rank, world, folder, args))
            for process in ranks:
                process.join(timeout)
            hung = [i for i, process in enumerate(ranks) if process.is_alive()]
        finally:
            for process in ranks:
                process.kill()
        errors = [path.read_text() for path in sorted(Path(folder).glob("*.error"))]
        if errors or hung or any(process.exitcode for process in ranks):
            codes = [process.exitcode for process in ranks]
            raise RuntimeError(f"hung ranks {hung}, exit codes {codes}\n" + "\n".join(errors))
        return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(world)]


def _rank(
    fn: Callable[..., Any], rank: int, world: int, folder: str, args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world
        )
        torch.save(fn(rank, world, *args), Path(folder) / f"{rank}.pt")
        dist.barrier()  # nobody leaves while another may still be talking
        dist.destroy_process_group()
    except BaseException:
        (Path(folder) / f"{rank}.error").write_text(f"rank {rank}: {traceback.format_exc()}")
        os._exit(1)  # without waiting for ranks that wait for this one
