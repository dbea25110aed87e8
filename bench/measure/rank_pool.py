"""Processes that compute one loss together, step after step, as ranks of a process group.

Each rank holds its own rows; `step()` has them all compute value and gradient once, and returns
when the last one is done.  gloo on a CPU (one thread a rank), nccl with a GPU a rank.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import traceback
import weakref
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastssl.bench.measure.memory import forkserver

Loss = Callable[..., Tensor]
PATIENCE_S = 300.0


class RankPool:
    """W ranks; `build()` gives each its loss, `rows[i][r]` is argument i of rank r.

    `build` must be importable by its name.  The processes end with the pool.
    Raises RuntimeError with a rank's traceback when one fails.
    """

    def __init__(
        self, build: Callable[[], Loss], rows: Sequence[Sequence[Tensor]], device: torch.device
    ) -> None:
        on_gpu = device.type == "cuda"
        context: Any = multiprocessing.get_context("spawn") if on_gpu else forkserver()
        self.world = len(rows[0])
        self._folder = tempfile.TemporaryDirectory(prefix="fastssl-ranks-")
        self._pipes: list[Connection] = []
        processes = []
        for rank in range(self.world):
            here, there = context.Pipe()
            mine = [part[rank].detach().cpu() for part in rows]
            place = (rank, self.world, self._folder.name, device.type)
            process = context.Process(target=_rank, args=(there, place, build, mine), daemon=True)
            process.start()
            there.close()
            self._pipes.append(here)
            processes.append(process)
        self._end = weakref.finalize(self, _end, self._pipes, processes, self._folder)
        self._ask("ready")

    def step(self) -> Tensor:
        """Value and gradients once on every rank; the mean over ranks of the value, 0-d float64."""
        return torch.tensor(self._ask("step"), dtype=torch.float64).mean()

    def gradients(self) -> list[Tensor]:
        """The last step's gradients of the mean over ranks, by argument, all ranks' rows joined."""
        by_rank = self._ask("gradients")
        return [torch.cat(parts) / self.world for parts in zip(*by_rank, strict=True)]

    def close(self) -> None:
        """End the processes."""
        self._end()

    def _ask(self, what: str) -> list[Any]:
        for pipe in self._pipes:
            pipe.send(what)
        answers = []
        for rank, pipe in enumerate(self._pipes):
            try:
                answer = pipe.recv() if pipe.poll(PATIENCE_S) else "it did not answer"
            except EOFError:
                answer = "its process ended"
            if isinstance(answer, str):
                self._end()
                raise RuntimeError(f"rank {rank} of {self.world}: {answer}")
            answers.append(answer[0])
        return answers


def _end(pipes: list[Connection], processes: list[Any], folder: Any) -> None:
    for pipe in pipes:
        pipe.close()
    for process in processes:
        process.kill()
        process.join()
    folder.cleanup()


def _rank(
    pipe: Connection, place: tuple[int, int, str, str], build: Callable[[], Loss], rows: Any
) -> None:
    try:
        _work(pipe, place, build, rows)
    except (EOFError, BrokenPipeError):  # the pool is closed
        return
    except Exception:
        pipe.send(traceback.format_exc())


def _work(
    pipe: Connection, place: tuple[int, int, str, str], build: Callable[[], Loss], rows: Any
) -> None:
    rank, world, folder, kind = place
    torch.set_num_threads(1)
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if kind == "cuda" else "gloo",
        init_method=f"file://{Path(folder) / 'meet'}",
        rank=rank,
        world_size=world,
    )
    loss, inputs = build(), [x.to(device).requires_grad_() for x in rows]
    gradients: Sequence[Tensor] = ()
    while True:
        asked = pipe.recv()
        if asked == "step":
            value = loss(*inputs)
            gradients = torch.autograd.grad(value, inputs)
            pipe.send((float(value.detach()),))  # waits for the device
        elif asked == "gradients":
            pipe.send(([g.cpu() for g in gradients],))
        else:
            pipe.send((True,))
