"""The encoders of a run, read from its newest intact checkpoint: safetensors, never a pickle."""

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .checkpoint import CheckpointError, Checkpoints, damaged, encoder_files, networks_of
from .config import CheckpointConfig, EngineError


def encoder_file(run: Path, name: str = "") -> Path:
    """Where an encoder's weights are: the primary one's, or those of the network of that name.

    Raises CheckpointError where there is no intact checkpoint, and EngineError for another name.
    """
    checkpoints = Checkpoints(run, CheckpointConfig())  # type: ignore[call-arg]
    reasons = []
    for step in checkpoints.names():
        path = checkpoints.folder / step
        reason = damaged(path)
        if reason is None:
            files = encoder_files(networks_of(json.loads((path / "trainer.json").read_text())))
            if name and name not in files:
                there = ", ".join(files)
                raise EngineError(f"{run} has no encoder of the name {name!r}; there are: {there}")
            return path / files[name or next(iter(files))]
        reasons.append(f"{step}: {reason}")
    raise CheckpointError(f"{run} holds no intact checkpoint {reasons or ''}".rstrip())


def encoder_weights(run: Path, name: str = "") -> tuple[dict[str, Tensor], int | None]:
    """An encoder's weights in a run's newest intact checkpoint, and its channels if they are told.

    name: as of `encoder_file`, which says what is raised; and CheckpointError for a file that is no
    safetensors.
    """
    path = encoder_file(run, name)
    channels = json.loads(path.with_name("trainer.json").read_text()).get("channels")
    try:
        return load_file(path), channels if type(channels) is int and channels > 0 else None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} holds no weights: {error}") from error
