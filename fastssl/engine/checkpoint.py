"""Checkpoints that are whole or absent: written aside, checked, renamed; damaged ones passed over.

    checkpoints/
      step-00000123/     manifest.json (sha256 of every file), trainer.json, rng-0.pt ...,
                         encoder.safetensors (float32, timm's names), deepspeed/ (its own state)
      latest             the newest name, moved last;  best: the best one's name
Nothing is unpickled before the manifest's checksums match.
"""

import contextlib
import hashlib
import json
import os
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from fastssl import distributed

from .config import CheckpointConfig
from .engine import Engine

# A full disk is an OSError to Python, and these to torch.save and safetensors.
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)
TAG = "deepspeed"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; says which, why, and what is still good."""

    exit_code, on_every_rank = 4, True


@dataclass
class Checkpoints:
    """The checkpoints of one run's directory."""

    run: Path
    cfg: CheckpointConfig

    @property
    def folder(self) -> Path:
        return self.run / "checkpoints"

    def names(self) -> list[str]:
        """Whole ones, newest first: a directory has its name only once it is complete."""
        found = self.folder.glob("step-*/manifest.json")
        return sorted((path.parent.name for path in found), reverse=True)

    def latest(self) -> str | None:
        names = self.names()
        return names[0] if names else None

    def save(self, engine: Engine, step: int, trainer: dict[str, Any], *, best: bool) -> Path:
        """Write the state after `step` steps; collective.  trainer: what resume needs, JSON.

        Raises CheckpointError on every rank when any rank could not write (full disk, read-only):
        nothing of it is left, and earlier checkpoints are untouched.
        """
        name = f"step-{step:08d}"
        aside = self.folder / f".{name}.partial"
        errors: list[str] = []
        if distributed.rank() == 0:
            _try(errors, lambda: _fresh_directory(aside))
        self._all_ok(errors, aside)
        encoder = engine.encoder_state()
        if not all(torch.isfinite(value).all() for value in encoder.values()):
            errors.append("the encoder's weights are not finite")
        self._all_ok(errors, aside)
        with _recording(engine, errors):
            engine.ds.save_checkpoint(str(aside), tag=TAG, save_latest=False)
        _try(errors, lambda: torch.save(_rng_state(), aside / f"rng-{distributed.rank()}.pt"))
        if distributed.rank() == 0:
            _try(errors, lambda: save_file(encoder, aside / "encoder.safetensors"))
            text = json.dumps({"step": step, "world": distributed.world_size(), **trainer})
            _try(errors, lambda: _write_text(aside / "trainer.json", text))
        self._all_ok(errors, aside)
        self._seal(aside, name, errors, best)
        self._all_ok(errors, aside)
        return self.folder / name

    def load(self, engine: Engine, notes: list[str]) -> dict[str, Any] | None:
        """Restore the newest intact checkpoint, RNG included; None when there is none; collective.

        notes: receives a sentence for each damaged checkpoint that was passed over.
        Raises CheckpointError when it was written by another number of processes.
        """
        for name in distributed.broadcast_object(self.names()):
            path = self.folder / name
            damage = [d for d in distributed.gather_objects(damaged(path, share=True)) if d]
            if damage:
                notes.append(f"checkpoint {name} is damaged ({damage[0]}): passed over")
                if distributed.rank() == 0:  # it must not count among those that are kept
                    shutil.rmtree(self.folder / f".damaged-{name}", ignore_errors=True)
                    os.replace(path, self.folder / f".damaged-{name}")
                continue
            trainer = json.loads((path / "trainer.json").read_text())
            world = distributed.world_size()
            if trainer["world"] != world:
                raise CheckpointError(
                    f"checkpoint {name} was written by {trainer['world']} processes and this run "
                    f"has {world}: start {trainer['world']} (torchrun --nproc-per-node), or "
                    f"resume=never with another name"
                )
            engine.ds.load_checkpoint(str(path), tag=TAG, load_lr_scheduler_states=False)
            _set_rng_state(torch.load(path / f"rng-{distributed.rank()}.pt", weights_only=True))
            return trainer
        return None

    def _seal(self, aside: Path, name: str, errors: list[str], best: bool) -> None:
        """Checksums by all ranks; then on rank 0: manifest, rename, pointers, old ones go."""
        sums: dict[str, Any] = {}
        _try(errors, lambda: sums.update(_checksums(_files(aside)[_my_share()], aside)))
        merged = {k: v for part in distributed.gather_objects(sums) for k, v in part.items()}

        def finish() -> None:
            text = json.dumps({"files": merged}, indent=1, sort_keys=True)
            _write_text(aside / "manifest.json", text)
            whole = self.folder / name
            shutil.rmtree(whole, ignore_errors=True)
            os.replace(aside, whole)
            if best:
                _write_text(self.folder / "best", name)
            _write_text(self.folder / "latest", name)
            self._prune()

        if distributed.rank() == 0 and not errors:
            _try(errors, finish)

    def _prune(self) -> None:
        keep = set(self.names()[: self.cfg.keep])
        best = self.folder / "best"
        if best.is_file():
            keep.add(best.read_text().strip())
        for name in self.names():
            if name not in keep:
                shutil.rmtree(self.folder / name, ignore_errors=True)

    def _all_ok(self, errors: list[str], aside: Path) -> None:
        """Every rank goes on, or every rank raises and nothing half-written stays."""
        seen = [e for part in distributed.gather_objects(errors) for e in part]
        if not seen:
            return
        if distributed.rank() == 0:
            shutil.rmtree(aside, ignore_errors=True)
        last = self.latest()
        good = f"the last good one is {self.folder / last}" if last else "there is no earlier one"
        raise CheckpointError(f"could not write a checkpoint in {self.folder} ({seen[0]}); {good}")


def damaged(path: Path, *, share: bool = False) -> str | None:
    """Why a checkpoint cannot be trusted, or None.  share: this rank checks its share of files."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"manifest.json: {error}"
    names = sorted(manifest)
    for name in names[_my_share()] if share else names:
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != manifest[name]["bytes"]:
            return f"{name} has {file.stat().st_size} bytes, not {manifest[name]['bytes']}"
        if _sha256(file) != manifest[name]["sha256"]:
            return f"{name} does not match its checksum"
    return None


def encoder_file(run: Path) -> Path:
    """The encoder's weights in a run's newest intact checkpoint.

    Raises CheckpointError when there is none.
    """
    checkpoints = Checkpoints(run, CheckpointConfig())  # type: ignore[call-arg]
    reasons = []
    for name in checkpoints.names():
        reason = damaged(checkpoints.folder / name)
        if reason is None:
            return checkpoints.folder / name / "encoder.safetensors"
        reasons.append(f"{name}: {reason}")
    raise CheckpointError(f"{run} holds no intact checkpoint {reasons or ''}".rstrip())


@contextlib.contextmanager
def _recording(engine: Engine, errors: list[str]):
    """DeepSpeed has barriers between its writes: a rank whose write failed must reach them too."""
    writer, ds = engine.ds.checkpoint_engine, engine.ds
    save = writer.save
    writer.save = lambda state_dict, path: _try(errors, lambda: save(state_dict, path))
    ds._copy_recovery_script = lambda path: None  # scripts that nobody here needs
    try:
        yield
    finally:
        writer.save = save
        del ds._copy_recovery_script


def _try(errors: list[str], action) -> None:
    try:
        action()
    except WRITE_ERRORS as error:
        errors.append(str(error).strip().splitlines()[0] if str(error) else type(error).__name__)


def _fresh_directory(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    (path / TAG).mkdir(parents=True)


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


def _write_text(path: Path, text: str) -> None:
    """Replace a small file in one step."""
    aside = path.with_name(f".{path.name}.partial")
    with open(aside, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def _rng_state() -> dict[str, Any]:
    _, keys, position, has_gauss, gauss = np.random.get_state()  # type: ignore[misc]
    version, internal, gauss_next = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": [torch.from_numpy(np.asarray(keys).copy()), position, has_gauss, gauss],
        "python": [version, list(internal), gauss_next],
    }


def _set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy(), position, has_gauss, gauss))
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
