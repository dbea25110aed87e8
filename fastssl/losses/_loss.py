"""What every loss over the batch of all ranks has."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from fastssl.distributed import LOCAL, Group


class Loss(nn.Module):
    """A loss of the joined batch of a group of ranks, or of each rank's own.

    shown    the attributes that repr() tells.
    """

    shown: ClassVar[tuple[str, ...]] = ()

    def __init__(self, gather_distributed: bool = True, process_group: Group = None) -> None:
        super().__init__()
        self.process_group = process_group if gather_distributed else LOCAL

    @property
    def gather_distributed(self) -> bool:
        """Whether other ranks' rows count."""
        return self.process_group != LOCAL

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in self.shown)
