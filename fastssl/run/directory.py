"""A run's directory: one run at a time, never overwritten unasked, never lost to a mistake.

OUTPUT/NAME/             the run;  OUTPUT/.NAME.lock  held while it trains
OUTPUT/.NAME.replaced/   the run that overwrite=true replaces, until the new one can start
"""

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastssl import config, distributed
from fastssl.config import ConfigError, RunConfig
from fastssl.engine.checkpoint import Checkpoints
from fastssl.files import sync, write_atomically


@dataclass
class Place:
    """A run's directory until the run has something to keep.

    made: it was not there before.  begun: a step has been taken, or an earlier one taken up.
    """

    cfg: RunConfig
    made: bool = False
    begun: bool = False

    def begin(self) -> None:
        """From now on it stays, and the run that it replaces goes."""
        if not self.begun and distributed.rank() == 0:
            shutil.rmtree(_replaced(self.cfg), ignore_errors=True)
        self.begun = True

    def undo(self) -> None:
        """Unless it has begun: it goes, and the run that it was to replace comes back."""
        if self.begun or not self.made:
            return
        shutil.rmtree(self.cfg.directory, ignore_errors=True)
        if _replaced(self.cfg).is_dir():
            _replaced(self.cfg).rename(self.cfg.directory)


@contextlib.contextmanager
def prepared(cfg: RunConfig, data: dict[str, Any] | None = None) -> Iterator["Place"]:
    """The run's directory, new, replaced or taken up, with its configuration in it, and locked.

    data: the fingerprint of the run's data, kept in RUN/data.json.
    Raises ConfigError when a run of that name is going on, or exists and neither resume nor
    overwrite is asked for, and when the configuration or the data differ from what is resumed,
    naming each difference.  Data that are the same may lie elsewhere.
    A mistake of the user's that comes out before the place has begun leaves things as they were.
    """
    place = Place(cfg)
    with contextlib.ExitStack() as stack:
        problem = None
        if distributed.rank() == 0:
            try:
                output = cfg.directory.parent
                output.mkdir(parents=True, exist_ok=True)
                stack.enter_context(_locked(output / f".{cfg.name}.lock"))
                problem = _prepare(place, data)
            except ConfigError as error:
                problem = str(error)
            except BlockingIOError:
                problem = f"{cfg.directory} is being trained by another process: choose name=..."
            except OSError as error:
                problem = f"output={cfg.output} cannot be written to: {error}"
        problem = distributed.broadcast_object(problem)
        if problem:
            raise ConfigError(problem)
        try:
            yield place
        except Exception as error:
            if distributed.rank() == 0 and getattr(error, "exit_code", 2) == 2:
                place.undo()
            raise


@contextlib.contextmanager
def _locked(path: Path, seconds: float = 10.0) -> Iterator[None]:
    """Hold the lock file `path`, which goes when it is released.

    The loader processes of a run that was killed hold its lock a little longer.  Raises
    BlockingIOError when another process keeps it.
    """
    deadline = time.monotonic() + seconds
    while True:
        with open(path, "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = _is_at(file.fileno(), path)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
                continue
            if held:  # else its last holder has removed it since it was opened
                try:
                    return (yield)
                finally:
                    path.unlink(missing_ok=True)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _replaced(cfg: RunConfig) -> Path:
    """Where a run that is being overwritten waits until the new one can start."""
    return cfg.directory.with_name(f".{cfg.name}.replaced")


def _saved_data(directory: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads((directory / "data.json").read_text()))
    except (OSError, ValueError, TypeError):  # of a run before there was such a file
        return None


def _changed(cfg: RunConfig, data: dict[str, Any] | None) -> str | None:
    """Why the run in its directory cannot be taken up with this configuration and these data."""
    directory, before = cfg.directory, _saved_data(cfg.directory)
    allowed = cfg.data.changed == "allow"
    same = data is not None and data == before
    changed = config.differences(config.load(directory), cfg, same_data=same or allowed)
    if changed:
        return f"{directory} is another run: {'; '.join(changed)}; give name=... a new name"
    if data is None or before is None or same or allowed:
        return None
    counts = [
        f"{d.get('train')} training items and {d.get('test')} held out" for d in (before, data)
    ]
    what = f"{counts[0]}, now {counts[1]}" if counts[0] != counts[1] else "other names or labels"
    return (
        f"the data of {directory} have changed since it began ({what}): give the same, or "
        "data.changed=allow to go on with these"
    )


def _prepare(place: "Place", data: dict[str, Any] | None) -> str | None:
    cfg = place.cfg
    directory, saved = cfg.directory, cfg.directory / "config.yaml"
    if saved.is_file() and cfg.resume == "auto":
        changed = _changed(cfg, data)
        if changed:
            return changed
    elif saved.is_file() and not cfg.overwrite:
        return (
            f"{directory} already holds a run: resume=auto continues it, overwrite=true replaces "
            f"it, name=... makes another"
        )
    elif saved.is_file():
        shutil.rmtree(_replaced(cfg), ignore_errors=True)
        directory.rename(_replaced(cfg))
    place.made = not directory.exists()
    directory.mkdir(exist_ok=True)
    sync(directory.parent)
    Checkpoints(directory, cfg.checkpoint).check()
    # What was said of an earlier run is not said of the next one that reads this file.
    kept = cfg.model_copy(update={"overwrite": False, "resume": "never"})
    kept = kept.model_copy(update={"data": cfg.data.model_copy(update={"changed": "refuse"})})
    if data is not None:
        write_atomically(directory / "data.json", json.dumps(data))
    write_atomically(saved, config.dump(kept))
    return None
