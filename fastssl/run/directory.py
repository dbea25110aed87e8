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
from fastssl.run.restarts import launches, sign


@dataclass
class Place:
    """A run's directory until the run has something to keep.

    made: it was not there before.  begun: a step has been taken, or an earlier one taken up.
    before: the configuration of the run that is taken up, on the first rank, and as it is written.
    """

    cfg: RunConfig
    made: bool = False
    begun: bool = False
    before: RunConfig | None = None
    written: str = ""

    def begin(self) -> None:
        """From now on it stays, and the run that it replaces goes."""
        if not self.begun and distributed.rank() == 0:
            shutil.rmtree(_replaced(self.cfg), ignore_errors=True)
        self.begun = True

    def undo(self) -> None:
        """Unless it has begun: it goes, and the run that it was to replace comes back; one that
        was to be taken up stays as it was."""
        if not self.begun and self.written and self.cfg.directory.is_dir():
            write_atomically(self.cfg.directory / "config.yaml", self.written)
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
    What ends the run before the place has begun, a mistake or Ctrl-C, leaves things as they were.
    """
    place, launch = Place(cfg), launches()
    with contextlib.ExitStack() as stack:
        problem = None
        if distributed.rank() == 0:
            try:
                output = cfg.directory.parent
                output.mkdir(parents=True, exist_ok=True)
                stack.enter_context(_locked(output / f".{cfg.name}.lock"))
                problem = _prepare(place, data, launch)
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
        except BaseException:
            if distributed.rank() == 0:
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


def _changed(cfg: RunConfig, saved: RunConfig, data: dict[str, Any] | None) -> str | None:
    """Why the run in its directory cannot be taken up with this configuration and these data."""
    directory, before = cfg.directory, _saved_data(cfg.directory)
    allowed = cfg.data.changed == "allow"
    same = data is not None and data == before
    how: dict[str, Any] = {"same_data": same or allowed}
    changed = config.differences(saved, cfg, **how, extends=cfg.resume == "extend")
    if changed and not config.differences(saved, cfg, **how, extends=True):
        return (
            f"{directory} was begun with another schedule ({'; '.join(changed)}): resume=extend "
            "goes on with this one from where the run stands, name=... makes another run"
        )
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


def _prepare(place: "Place", data: dict[str, Any] | None, launch: dict[str, Any]) -> str | None:
    cfg = place.cfg
    directory, saved = cfg.directory, cfg.directory / "config.yaml"
    if saved.is_file() and cfg.resume != "never":
        before = config.load(directory)
        changed = _changed(cfg, before, data)
        if changed:
            return changed
        place.before, place.written = before, saved.read_text()
    elif saved.is_file() and not cfg.overwrite:
        return (
            f"{directory} already holds a run: resume=auto continues it, overwrite=true replaces "
            f"it, name=... makes another"
        )
    elif saved.is_file() and _replaced(cfg).is_dir():  # it was to replace that, and never began
        shutil.rmtree(directory)
    elif saved.is_file():
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
    sign(directory, launch)
    return None


def extension(before: RunConfig, now: RunConfig, step: int, steps_per_epoch: int) -> str:
    """What becomes of the learning rate of a run that goes on at `step` on another schedule.

    Empty where it goes on as it was.
    """
    changed = set(config.differences(before, now)) - {
        *config.differences(before, now, extends=True)
    }
    if not changed:
        return ""
    totals = [cfg.epochs * steps_per_epoch for cfg in (before, now)]
    rates = [
        f"{cfg.optim.lr * cfg.optim.schedule.factor(min(step, total - 1), total):.3g}"
        for cfg, total in zip((before, now), totals, strict=True)
    ]
    return (
        f"{'; '.join(sorted(changed))}: from step {step} on the schedule is that of a run of "
        f"{totals[1]} steps, so that the learning rate goes from {rates[0]} to {rates[1]} there, "
        "and all else that follows a run's progress moves with it"
    )
