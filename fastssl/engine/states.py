"""DeepSpeed's own files in a checkpoint: which there may be, how they are written and read.

What is unpickled are tensors, plain values and the few classes that DeepSpeed saves, and nothing
else, so that a stranger's checkpoint cannot run code.
"""

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from fastssl.models import set_aside

from .launch import deepspeed

# A full disk is an OSError to Python, and these to torch.save and safetensors.
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)
TAG = "deepspeed"  # the folder they lie in
_STATES = re.compile(rf"{TAG}/((bf16_)?zero_pp_rank_\d+_)?mp_rank_00_(model|optim)_states\.pt")
_SWAPPED = re.compile(rf"{TAG}/offloaded_tensors/[^\0]+")  # with NVMe offload; never unpickled


def is_state(name: str) -> bool:
    """Whether a file of a checkpoint is DeepSpeed's, and will be unpickled."""
    return _STATES.fullmatch(name) is not None


def is_swapped(name: str) -> bool:
    """Whether it is DeepSpeed's, and read as it is."""
    return _SWAPPED.fullmatch(name) is not None


def holds_weights(name: str) -> bool:
    """Whether it is one without which there is nothing to load."""
    return name.endswith("model_states.pt")


def write_states(ds: Any, folder: Path) -> list[str]:
    """Into folder/TAG, collective; what could not be written.

    DeepSpeed has barriers between its writes: a rank whose write failed must reach them too.
    Frozen networks are in none of it.
    """
    errors: list[str] = []
    with _recording(ds, errors), set_aside(ds.module):
        ds.save_checkpoint(str(folder), tag=TAG, save_latest=False)
    return errors


def read_states(ds: Any, folder: Path) -> None:
    """From folder/TAG, by `load_state`: DeepSpeed's own way runs what the files say."""
    reader = ds.checkpoint_engine
    reader.load = load_state
    try:
        with set_aside(ds.module):
            ds.load_checkpoint(str(folder), tag=TAG, load_lr_scheduler_states=False)
    finally:
        del reader.load


def load_state(path: str | Path, map_location: Any = "cpu") -> Any:
    """Unpickle tensors, plain values, and the few classes that DeepSpeed saves; nothing else."""
    deepspeed()
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
        return torch.load(path, map_location=map_location, weights_only=True)


@contextlib.contextmanager
def _recording(ds: Any, errors: list[str]) -> Iterator[None]:
    writer = ds.checkpoint_engine
    save = writer.save
    writer.save = lambda state_dict, path: attempt(errors, lambda: save(state_dict, path))
    ds._copy_recovery_script = lambda path: None  # scripts that nobody here needs
    try:
        yield
    finally:
        writer.save = save
        del ds._copy_recovery_script


def attempt(errors: list[str], action: Callable[[], Any]) -> None:
    """Do it, and write down why it could not be written."""
    try:
        action()
    except WRITE_ERRORS as error:
        errors.append(str(error).strip().splitlines()[0] if str(error) else type(error).__name__)
