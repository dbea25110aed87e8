"""Numbers shown as a run goes on: by TensorBoard, and where else engine.deepspeed says."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fastssl import distributed

from .config import EngineError
from .launch import deepspeed

# DeepSpeed's monitors, by their keys, and the packages that they want.
MONITORS = {"tensorboard": "", "csv_monitor": "", "wandb": "wandb", "comet": "comet_ml"}


class Scalars:
    """What rank 0 is given, through DeepSpeed's monitors.

    board: the directory of TensorBoard's events, or None.  given: engine.deepspeed.
    They are opened with the first step that is shown, and earlier numbers wait for it: a run that
    cannot take a step leaves nothing behind.
    Raises EngineError for what DeepSpeed refuses, and for a monitor whose package is not there.
    """

    def __init__(self, board: Path | None, given: dict[str, Any]):
        deepspeed()
        from deepspeed.monitor.config import get_monitor_config

        config = {key: given[key] for key in MONITORS if key in given}
        if board is not None:
            path = {"output_path": str(board.parent), "job_name": board.name}
            config["tensorboard"] = {"enabled": True, **path}
        for key, package in MONITORS.items():
            if package and config.get(key, {}).get("enabled") and find_spec(package) is None:
                raise EngineError(f"engine.deepspeed.{key} wants {package}: pip install {package}")
        try:
            self._config: Any = get_monitor_config(config)
        except ValidationError as error:
            said = error.errors()[0]
            key = ".".join(map(str, said["loc"]))
            raise EngineError(
                f"engine.deepspeed: {error.title} refuses {key}: {said['msg']}"
            ) from error
        self._held: list[tuple[str, float, int]] = []
        self._monitor: Any = None

    def write(self, scalars: dict[str, float], step: int) -> None:
        """Show them at `step`; before the first step, once it is done."""
        if distributed.rank() > 0 or not self._config.enabled:
            return
        self._held += [(name, value, step) for name, value in scalars.items()]
        if step == 0:
            return
        if self._monitor is None:
            from deepspeed.monitor.monitor import MonitorMaster

            self._monitor = MonitorMaster(self._config)
        self._monitor.write_events(self._held)
        self._held = []
