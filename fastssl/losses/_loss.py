"""What every loss over the batch of all ranks has."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ClassVar

from torch import nn

from fastssl.distributed import BUILT, LOCAL, Group


def by_group(read: Callable[[Any], Any]) -> Any:
    """A property that the process group decides.  A subclass may set it to what it is anyway.

    Setting it to anything else, which would change nothing, is a ValueError.
    """
    name = read.__name__

    def write(self: Any, given: Any) -> None:
        if given != read(self):
            must = f"must be what process_group makes it, {read(self)}"
            raise ValueError(f"{name} {must}, got {given}")

    return property(read, write, doc=read.__doc__)


def also_named(**names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Let a forward take its arguments by the names of a second library too: theirs="ours"."""

    def decorate(forward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(forward)
        def call(self: Any, *arguments: Any, **named: Any) -> Any:
            if not named:
                return forward(self, *arguments)
            ours = {names.get(name, name): x for name, x in named.items()}
            if len(ours) < len(named):
                raise TypeError(f"an argument was given by two names, among {', '.join(named)}")
            return forward(self, *arguments, **ours)

        return call

    return decorate


class Loss(nn.Module):
    """A loss of the joined batch of a group of ranks, or of each rank's own.

    shown    the attributes that repr() tells.
    Raises   ValueError: gather_distributed=True, which is the default where torch.distributed is
             there, in a torch that was built without.
    """

    shown: ClassVar[tuple[str, ...]] = ()

    def __init__(self, gather_distributed: bool = BUILT, process_group: Group = None) -> None:
        super().__init__()
        if gather_distributed and not BUILT:
            without = "gather_distributed must be False without torch.distributed"
            raise ValueError(f"{without}, got {gather_distributed}")
        self.process_group = process_group if gather_distributed else LOCAL

    def _slow_forward(self, *arguments: Any, **named: Any) -> Any:
        """What torch calls in place of forward, under torch.jit.trace alone."""
        raise RuntimeError(
            "torch.jit.trace would keep the number of images, and what was asked of their values, "
            "of this one batch: compile the loss by torch.compile"
        )

    @by_group
    def gather_distributed(self) -> bool:
        """Whether other ranks' rows count."""
        return self.process_group != LOCAL

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in self.shown)
