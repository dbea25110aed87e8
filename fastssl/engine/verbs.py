"""What a run asks of an engine, in eight verbs: all that is known of one outside of engine/.

    build             Engine(method, optim, cfg, device=..., batch_size=...)
    step              one optimizer step, or none where something is not finite
    features          what the encoder makes of images; reconstruct, what the method makes of them
    snapshot, load    all that a run needs to go on, into a folder and from it
    full parameters   whole tensors: read out of such a folder, or in place while a context lasts
    piece             what this process holds of a parameter: fastssl.pieces, which the engine fills
    agree             the least that any rank votes

B: a rank's samples.  Every verb but `features` is collective: all ranks call it, in one order.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastssl import distributed

from .states import EncoderFile


class Limits(NamedTuple):
    """Above which a step is not applied: of the loss's mean over ranks, of the gradient's norm."""

    loss: float
    norm: float


@dataclass
class Step:
    """What a step did: metrics as 0-d tensors on the device, and whether parameters moved.

    finite: loss and gradients of all ranks.  stop: some rank was asked to stop.  Under limits,
    loss and norm: what was measured, the same on all ranks; spike: one of them was above its limit.
    """

    metrics: dict[str, Tensor]
    applied: bool
    finite: bool
    stop: bool
    loss: float | None = None
    norm: float | None = None
    spike: bool = False


class Verbs(ABC):
    """An engine that trains `method`, a fastssl.methods.Method, on `device`.

    notes: sentences that the user of a run should read.
    Building it raises EngineError for what it cannot do, before anything is written.
    """

    method: Any
    device: torch.device
    notes: Sequence[str]

    @abstractmethod
    def step(
        self,
        batch: dict[str, Any],
        lr: float,
        *,
        progress: float = 0.0,
        epoch: float | None = None,
        stop: bool = False,
        limits: Limits | None = None,
    ) -> Step:
        """One optimizer step on this rank's share of the batch, at learning rate `lr`.

        batch: a tree of tensors with B rows, on any device.
        progress: of the run in [0, 1], once the step is done.
        epoch: epochs of the run before this step, for groups that are frozen at first.
        stop: this rank was asked to stop; the answer tells whether any rank was.
        limits: what is above them leaves no trace, as what is not finite.
        Raises ValueError, naming the leaf, for a batch whose leaves do not share their rows, and
        EngineError for a method that makes of it what is no loss.
        """

    @abstractmethod
    def features(self, images: Tensor) -> Tensor:
        """Pooled features (B, F) float32 of images (B, C, H, W), in evaluation mode."""

    @abstractmethod
    def reconstruct(self, images: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor]:
        """The method's own `reconstruct` of images (B, C, H, W), in evaluation mode."""

    @abstractmethod
    def snapshot(self, *, copied: bool) -> Callable[[Path], None]:
        """This rank's share of the state, to be written into a folder that is there.

        copied: what is written is the state of now, whatever happens to it until then; otherwise it
        must be written at once.  To write it is no collective, and raises what the disk does.
        """

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Take the state that any number of ranks wrote; raises what its files bring about."""

    @abstractmethod
    def encoder_reader(self, name: str = "") -> Callable[[Path], EncoderFile]:
        """What reads an encoder's state_dict out of the shares of all ranks, a tensor at a time.

        name: among the method's networks; the first of them by default.  To read is no collective.
        """

    @abstractmethod
    def whole_parameters(self) -> AbstractContextManager[Any]:
        """A context in which every rank sees the method's parameters whole, to be read."""

    def close(self) -> None:  # noqa: B027
        """The run is over: give back what would outlive it; no other verb is used any more."""

    def measure(self) -> None:  # noqa: B027
        """From here on keep times for `breakdown`; an engine need not."""

    def breakdown(self) -> dict[str, float]:
        """Seconds of this rank by part of a step since it was last asked; nothing unmeasured."""
        return {}

    def agree(self, vote: int) -> int:
        """The least of all ranks' votes, on every rank, without waiting for the device."""
        return distributed.least(vote)
