"""Where a step's time goes: the host's clock on CPU, CUDA's events on a GPU, read at log time.

Parts do not overlap: what is inside another part is taken from it.  Reduction is what is waited
for after the backward; what travels while that goes on is in `backward`.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch

_METHODS = {"encode": "encode", "targets": "encode", "loss": "loss", "on_step": "on_step"}
_ENGINES = {"backward": "backward", "allreduce_gradients": "reduction", "step": "optimizer"}


class Breakdown:
    """Times the calls of a method and a DeepSpeed engine from here on."""

    def __init__(self, method: Any, ds: Any, device: torch.device):
        self._cuda, self._marks, self._stack = device.type == "cuda", [], ["other"]
        for owner, parts in ((method, _METHODS), (ds, _ENGINES)):
            for name, part in parts.items():
                setattr(owner, name, self._timed(part, getattr(owner, name)))

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What is done inside is of this part, but for parts in it."""
        self._mark()
        self._stack.append(name)
        try:
            yield
        finally:
            self._mark()
            self._stack.pop()

    def read(self) -> dict[str, float]:
        """Seconds of each part since it was last read; waits for the device."""
        if self._cuda and self._marks:
            torch.cuda.synchronize()
        spent: dict[str, float] = {}
        for (since, _), (until, name) in zip(self._marks, self._marks[1:], strict=False):
            seconds = since.elapsed_time(until) / 1e3 if self._cuda else until - since
            if name is not None:
                spent[name] = spent.get(name, 0.0) + seconds
        self._marks = []
        return spent

    def begin(self) -> None:
        """A step begins; what was between it and the last one is of no part."""
        self._mark(between=True)

    def _mark(self, between: bool = False) -> None:
        if self._cuda:
            now: Any = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self._marks.append((now, None if between else self._stack[-1]))

    def _timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(part):
                return call(*args, **kwargs)

        return timed
