"""The encoders of a run, read from its newest intact checkpoint: safetensors, never a pickle."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from .checkpoint import CheckpointError, Checkpoints, damaged
from .config import CheckpointConfig, EngineError
from .networks import encoder_files, networks_of
from .states import EncoderFile, saved_tensors
from .tensor_files import files_of


class Saved(NamedTuple):
    """An encoder of a run: its name; its file, or of a frozen one what it is frozen as; and the
    channels of the data, by stream where there are several, as trainer.json has them."""

    name: str
    path: Path | None
    frozen: str
    channels: Any

    def channels_of(self, stream: str) -> int | None:
        """How many channels a stream has, where that is told."""
        told = self.channels.get(stream) if isinstance(self.channels, dict) else self.channels
        return told if type(told) is int and told > 0 else None

    def weights(self) -> dict[str, Tensor]:
        """Raises CheckpointError for a file that is no safetensors."""
        assert self.path is not None, f"{self.name} is frozen"
        folder, weights = self.path.parent, {}
        try:
            for name in files_of(self.path.name, [file.name for file in folder.iterdir()]):
                weights |= safetensors.torch.load_file(folder / name)  # a Deferred replaces it
            return weights
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.path} holds no weights: {error}") from error


def saved_encoder(run: Path, name: str = "") -> Saved:
    """An encoder in a run's newest intact checkpoint: the primary one, or that of the name.

    Raises CheckpointError where there is no intact checkpoint, and EngineError for another name.
    """
    return _saved(run, _intact(run), name)


def saved_method(run: Path) -> EncoderFile:
    """All parameters and buffers in a run's newest intact checkpoint, by the names that the method
    has for them; none of a frozen network.

    Raises CheckpointError where there is no intact checkpoint.
    """
    return saved_tensors(_intact(run))


def moving_networks(run: Path) -> list[str]:
    """The networks in a run's newest intact checkpoint that are not frozen, the primary one first.

    Raises CheckpointError where there is no intact checkpoint.
    """
    trainer = json.loads((_intact(run) / "trainer.json").read_text())
    return [*encoder_files(networks_of(trainer))]


def _intact(run: Path) -> Path:
    """The newest checkpoint that is whole."""
    checkpoints = Checkpoints(run, CheckpointConfig())  # type: ignore[call-arg]
    reasons = []
    for step in checkpoints.names():
        path = checkpoints.folder / step
        reason = damaged(path)
        if reason is None:
            return path
        reasons.append(f"{step}: {reason}")
    raise CheckpointError(f"{run} holds no intact checkpoint {reasons or ''}".rstrip())


def _saved(run: Path, path: Path, name: str) -> Saved:
    trainer = json.loads((path / "trainer.json").read_text())
    networks, channels = networks_of(trainer), trainer.get("channels")
    if name and name not in networks:
        there = ", ".join(networks)
        raise EngineError(f"{run} has no encoder of the name {name!r}; there are: {there}")
    name = name or next(iter(networks))
    file = encoder_files(networks).get(name)
    return Saved(name, path / file if file else None, networks[name], channels)
