"""Checkpoints that are whole or absent: written aside, checked, renamed; damaged ones passed over.

    checkpoints/
      step-00000123/     manifest.json (sha256 of every file), trainer.json, rng-0.pt ...,
                         encoder.safetensors (float32, timm's names), encoder-NAME.safetensors of
                         each other network that is not frozen, state-0.safetensors ... (states.py)
      latest             the newest name, moved last;  best: the best one's name
A file is opened only where the manifest names it and nothing else lies there; what is unpickled are
tensors and plain values of the generators alone, so that a stranger's checkpoint cannot run code.
Any number of processes, at any ZeRO stage and precision, takes up what any other has written.
"""

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from fastssl import distributed
from fastssl.files import sync, write_atomically
from fastssl.random import RESUME, mix

from .config import CheckpointConfig
from .networks import described, encoder_files, networks_of, other_frozen
from .states import EncoderFile, attempt, readable, state_file
from .tensor_files import in_order, named, write_split
from .verbs import Verbs

FORMAT = 3  # 1 had what a method keeps under other names, and both 1 and 2 DeepSpeed's own files
_OLD = re.compile(r"deepspeed/[^\0]+")  # never opened
T = TypeVar("T")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; says which, why, and what is still good."""

    exit_code, on_every_rank = 4, True


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """While a checkpoint is written, a dead reader is no error: the next batch tells of it.

    Torch raises it at once, wherever the main thread is, and DeepSpeed's half of a save is lost.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)


class _Save(NamedTuple):
    """What is still to be written of a checkpoint."""

    aside: Path
    name: str
    best: bool
    state: Callable[[Path], None]
    generators: dict[str, Any]
    encoders: dict[str, Callable[[Path], EncoderFile]]  # by file
    trainer: str
    group: distributed.Group


class _Thread:
    """A thread that began as it was made, and whose exception is that of `end`."""

    def __init__(self, action: Callable[[], None]):
        self._error: BaseException | None = None
        self._action = action
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._action()
        except BaseException as error:
            self._error = error

    def end(self) -> None:
        self._thread.join()
        if self._error is not None:
            raise self._error


@dataclass
class Checkpoints:
    """The checkpoints of one run's directory.

    back: steps before the next one that the run may go back by; a checkpoint for it is kept.
    notes: sentences on what was taken up, for the user.
    """

    run: Path
    cfg: CheckpointConfig
    back: int = 0
    notes: list[str] = field(default_factory=list)
    _writing: "_Thread | None" = None

    @property
    def folder(self) -> Path:
        return self.run / "checkpoints"

    def names(self, until: int | None = None) -> list[str]:
        """Whole ones, newest first, of step `until` at most: a directory has its name only once it
        is complete."""
        found = [path.parent.name for path in self.folder.glob("step-*/manifest.json")]
        return sorted((n for n in found if until is None or n <= _name(until)), reverse=True)

    def latest(self) -> str | None:
        names = self.names()
        return names[0] if names else None

    def check(self) -> None:
        """Raise OSError where something else stands in the place of a file or a folder of ours."""
        if self.folder.exists() and not self.folder.is_dir():
            raise NotADirectoryError(f"{self.folder} is not a directory")
        for name in ("best", "latest"):
            if (self.folder / name).is_dir():
                raise IsADirectoryError(f"{self.folder / name} is a directory")

    def save(self, engine: Verbs, step: int, trainer: dict[str, Any], *, best: bool) -> Path:
        """Write the state after `step` steps; collective.  trainer: what resume needs, JSON.

        With cfg.asynchronous the state is copied into the host's memory, and written while training
        goes on; `wait` tells how that ended.
        Raises CheckpointError on every rank when any rank could not write (full disk, read-only):
        nothing of it is left, and earlier checkpoints are untouched.
        """
        self.wait()
        with _undisturbed():
            name = _name(step)
            aside = self.folder / f".{name}.partial"
            errors: list[str] = []
            if distributed.rank() == 0:
                attempt(errors, lambda: _fresh_directory(aside))
            self._all_ok(errors, aside)
            networks = described(engine.method.networks())
            kept = {"format": FORMAT, "step": step, "world": distributed.world_size()}
            asynchronous = self.cfg.writes_aside(engine.device)
            write = _Save(
                aside=aside,
                name=name,
                best=best,
                state=engine.snapshot(copied=asynchronous),
                generators=_rng_state(),
                encoders={f: engine.encoder_reader(n) for n, f in encoder_files(networks).items()},
                trainer=json.dumps(kept | {"networks": networks} | trainer),
                group=distributed.beside() if asynchronous else None,
            )
            if asynchronous:
                self._writing = _Thread(lambda: self._write(write))
            else:
                self._write(write)
        return self.folder / name

    def writing(self) -> bool:
        """Whether one is being written aside."""
        return self._writing is not None

    def wait(self) -> None:
        """Until what is written aside is whole; collective.  Raises CheckpointError as `save`."""
        writing, self._writing = self._writing, None
        if writing is not None:
            with _undisturbed():
                writing.end()

    def _write(self, save: "_Save") -> None:
        """Collective, in whichever thread."""
        errors: list[str] = []
        aside, first = save.aside, distributed.rank() == 0
        attempt(errors, lambda: save.state(aside))
        path = aside / f"rng-{distributed.rank()}.pt"
        attempt(errors, lambda: torch.save(save.generators, path))
        if first:
            attempt(errors, lambda: write_atomically(aside / "trainer.json", save.trainer))
        self._all_ok(errors, aside, save.group)
        for file, reader in save.encoders.items() if first else ():
            attempt(errors, lambda file=file, reader=reader: _write_encoder(aside, file, reader))
        self._all_ok(errors, aside, save.group)
        self._seal(save, errors)
        self._all_ok(errors, aside, save.group)

    def load(
        self,
        engine: Verbs,
        notes: list[str],
        parse: Callable[[dict[str, Any]], T],
        *,
        seed: int = 0,
        until: int | None = None,
    ) -> T | None:
        """Restore the newest intact checkpoint, of step `until` at most; None when there is none;
        collective.

        notes: receives a sentence for each damaged checkpoint that was passed over.
        parse: makes of what `save` was given what is returned, or raises ValueError.
        seed: of the run.  Where as many processes wrote the checkpoint, each one's generators are
        as they were; else they are begun anew, by the seed, the step and the rank.
        Raises CheckpointError when it was written by a version that keeps other state, or does not
        fit.
        """
        for name in distributed.broadcast_object(self.names(until)):
            path = self.folder / name
            reason = damaged(path, share=True)
            if reason is None and _format(path) == FORMAT:
                reason = _unreadable(path, share=True)
            damage = [d for d in distributed.gather_objects(reason) if d]
            try:
                trainer = json.loads((path / "trainer.json").read_text())
                parsed = parse(trainer)
            except (OSError, ValueError, RecursionError) as error:
                damage.append(f"trainer.json: {str(error).splitlines()[0]}")
            if damage:
                notes.append(f"checkpoint {name} is damaged ({damage[0]}): passed over")
                if distributed.rank() == 0:  # it must not count among those that are kept
                    shutil.rmtree(self.folder / f".damaged-{name}", ignore_errors=True)
                    os.replace(path, self.folder / f".damaged-{name}")
                distributed.barrier()
                continue
            world = distributed.world_size()
            if trainer.get("format", 1) != FORMAT:
                raise CheckpointError(
                    f"checkpoint {name} was written by another version of fastssl, whose methods "
                    f"keep other state (format {trainer.get('format', 1)}, this one's is {FORMAT}):"
                    f" finish the run with that version, or begin it anew under another name"
                )
            other = other_frozen(networks_of(trainer), described(engine.method.networks()))
            if other:
                raise CheckpointError(
                    f"checkpoint {name} was made with other frozen weights of {other} than "
                    "model.weights has now: give those that the run began with"
                )
            try:
                engine.load(path)
                if trainer["world"] == world:
                    _set_rng_state(_load_rng(path / f"rng-{distributed.rank()}.pt"))
                else:
                    _seed_anew(int(mix(RESUME, seed, trainer["step"], distributed.rank())[0]))
                    self.notes.append(
                        f"written by {trainer['world']} processes and taken up by {world}, whose "
                        "generators (dropout) begin anew"
                    )
            except Exception as error:  # whole and harmless, and yet of something else
                refusal = CheckpointError(
                    f"checkpoint {path} does not fit this run ({type(error).__name__}: "
                    f"{str(error).splitlines()[0] if str(error) else ''}): move it away, and the "
                    f"one before it is taken up"
                )
                refusal.on_every_rank = False
                raise refusal from error
            return parsed
        return None

    def _seal(self, save: "_Save", errors: list[str]) -> None:
        """Checksums by all ranks; then on rank 0: manifest, rename, pointers, old ones go."""
        aside, name, sums = save.aside, save.name, {}
        attempt(errors, lambda: sums.update(_checksums(_files(aside)[_my_share()], aside)))
        parts = distributed.gather_objects(sums, save.group)
        merged = {key: value for part in parts for key, value in part.items()}

        def finish() -> None:
            text = json.dumps({"files": merged}, indent=1, sort_keys=True)
            write_atomically(aside / "manifest.json", text)
            sync(aside)
            whole = self.folder / name
            shutil.rmtree(whole, ignore_errors=True)
            os.replace(aside, whole)
            sync(self.folder)
            if save.best:
                write_atomically(self.folder / "best", name)
            write_atomically(self.folder / "latest", name)
            self._prune(int(name.partition("-")[2]))

        if distributed.rank() == 0 and not errors:
            attempt(errors, finish)

    def forget(self, step: int) -> None:
        """Those after `step` go; collective."""
        if distributed.rank() == 0:
            whole = self.names(step)
            for name in self.names():
                if name not in whole:
                    shutil.rmtree(self.folder / name, ignore_errors=True)
            if not self.has_best():
                (self.folder / "best").unlink(missing_ok=True)
            if whole:
                write_atomically(self.folder / "latest", whole[0])
        distributed.barrier()

    def has_best(self) -> bool:
        """Whether the best one is still there."""
        best = self.folder / "best"
        return best.is_file() and best.read_text().strip() in self.names()

    def _prune(self, step: int) -> None:
        """After the checkpoint of `step`."""
        keep = {*self.names()[: self.cfg.keep], *self.names(step - self.back)[:1]}
        best = self.folder / "best"
        if best.is_file():
            keep.add(best.read_text().strip())
        for name in self.names():
            if name not in keep:
                shutil.rmtree(self.folder / name, ignore_errors=True)

    def _all_ok(self, errors: list[str], aside: Path, group: distributed.Group = None) -> None:
        """Every rank goes on, or every rank raises and nothing half-written stays."""
        seen = [e for part in distributed.gather_objects(errors, group) for e in part]
        if not seen:
            return
        if distributed.rank() == 0:
            shutil.rmtree(aside, ignore_errors=True)
        last = self.latest()
        good = f"the last good one is {self.folder / last}" if last else "there is no earlier one"
        raise CheckpointError(f"could not write a checkpoint in {self.folder} ({seen[0]}); {good}")


def _name(step: int) -> str:
    return f"step-{max(step, 0):08d}"


def damaged(path: Path, *, share: bool = False) -> str | None:
    """Why a checkpoint cannot be trusted, or None.  share: this rank checks its share of files."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())["files"]
        trainer = json.loads((path / "trainer.json").read_text())
        step, world, encoders = trainer["step"], trainer["world"], networks_of(trainer)
        old = trainer.get("format", 1) in (1, 2)
        sums = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"manifest.json or trainer.json: {type(error).__name__} {error}"
    if type(step) is not int or type(world) is not int or path.name != _name(step):
        return f"trainer.json is of step {step!r} and {world!r} processes"
    if not 0 < world < len(sums):
        return f"the manifest does not name the files of {world} processes"
    there = {str(f.relative_to(path)) for f in path.rglob("*") if f.is_symlink() or not f.is_dir()}
    strange = sorted(there - {"manifest.json", *sums})
    wanted = {"trainer.json", *(f"rng-{rank}.pt" for rank in range(world))}
    for file in encoder_files(encoders).values():
        wanted |= {*named(file, sums)}
    if not old:
        wanted |= {state_file(rank) for rank in range(world)}
    if strange:
        return f"the manifest does not name {strange[0]}"
    if wanted - sums.keys():
        return f"the manifest does not name {min(wanted - sums.keys())}"
    for name in sorted(sums)[_my_share()] if share else sorted(sums):
        file, (size, checksum) = path / name, sums[name]
        if name not in there:
            return f"{name} is missing"
        if name not in wanted and not (old and _OLD.fullmatch(name)):
            return f"{name} is no file of a checkpoint"
        if file.is_symlink() or not file.is_file():
            return f"{name} is no plain file"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, not {size}"
        if _sha256(file) != checksum:
            return f"{name} does not match its checksum"
    return None


def _format(path: Path) -> Any:
    """The format that an undamaged checkpoint says it has."""
    return json.loads((path / "trainer.json").read_text()).get("format", 1)


def _unreadable(path: Path, *, share: bool) -> str | None:
    """Which state of an undamaged checkpoint holds more than tensors and plain values, or None."""
    world = json.loads((path / "trainer.json").read_text())["world"]
    for rank in range(world)[_my_share()] if share else range(world):
        for name, read in ((f"rng-{rank}.pt", _load_rng), (state_file(rank), readable)):
            try:
                read(path / name)
            except Exception as error:  # whatever the bytes bring about
                return f"{name} holds more than tensors and plain values ({type(error).__name__})"
    return None


def _write_encoder(aside: Path, file: str, reader: Callable[[Path], EncoderFile]) -> None:
    """Out of the state's files, a tensor at a time.  Raises ValueError for what is not finite."""
    encoder = reader(aside)

    def tensors() -> Iterator[torch.Tensor]:
        for key in in_order(encoder.kinds):
            whole = encoder.tensor(key)
            if not torch.isfinite(whole).all():
                raise ValueError(f"{key} of {file} is not finite")
            yield whole

    write_split(aside / file, encoder.kinds, tensors())


def _fresh_directory(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    path.parent.mkdir(exist_ok=True)  # not its parent: a run that was deleted is not begun anew
    path.mkdir()


def _files(path: Path) -> list[str]:
    return sorted(str(f.relative_to(path)) for f in path.rglob("*") if f.is_file())


def _my_share() -> slice:
    return slice(distributed.rank(), None, distributed.world_size())


def _checksums(names: list[str], folder: Path) -> dict[str, Any]:
    """Checksums of what reached the disk: each file is synced first."""
    sums = {}
    for name in names:
        with open(folder / name, "rb") as file:
            os.fsync(file.fileno())
        sums[name] = {"bytes": (folder / name).stat().st_size, "sha256": _sha256(folder / name)}
    return sums


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _rng_state() -> dict[str, Any]:
    _, keys, position, has_gauss, gauss = np.random.get_state()  # type: ignore[misc]
    version, internal, gauss_next = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": [torch.from_numpy(np.asarray(keys).copy()), position, has_gauss, gauss],
        "python": [version, list(internal), gauss_next],
    }


def _load_rng(path: Path) -> Any:
    """Unpickle tensors and plain values, and nothing else."""
    return torch.load(path, map_location="cpu", weights_only=True)


def _seed_anew(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def _set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy(), position, has_gauss, gauss))
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
