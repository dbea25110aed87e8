"""A run's data without its model, in a process that kills itself.

`read` streams two epochs and writes a line a step, its number and the ids of the samples, as a run
does that saves at every step; started again, it goes on behind the last whole line.  After
`dies_at` lines it ends by kill -9, its readers busy with the batches to come.
"""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

from fastssl.data.loader import PretrainLoader
from fastssl.data.render.backend import Rendering
from fastssl.data.sources.folder import scan_folder
from fastssl.data.views.image import preset

BATCH, EPOCHS = 8, 2


def steps_done(log: Path) -> int:
    """Whole lines; a line that the kill cut short goes."""
    if not log.is_file():
        return 0
    whole = [line for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]
    log.write_text("".join(whole))
    return len(whole)


def told(folder: str, rank: int, world: int, backend: str, start: int) -> Iterator[str]:
    """A line a step from `start` on: its number, the samples' ids, a sum over each view."""
    (source,) = scan_folder(Path(folder))
    loader = PretrainLoader(
        source,
        preset("simclr", 64),
        batch_size=BATCH,
        seed=5,
        rank=rank,
        world=world,
        workers=1,
        last="pad",
        rendering=Rendering(readers=1) if backend == "dali" else None,
    )
    for step, batch in enumerate(loader.stream(start, EPOCHS * loader.steps_per_epoch), start):
        marks = zip(batch["index"].tolist(), batch["padding"].tolist(), strict=True)
        ids = " ".join(f"{'pad' if padded else ''}{i}" for i, padded in marks)
        sums = " ".join(f"{float(view.double().sum()):.17g}" for view in batch["views"])
        yield f"{step}: {ids}: {sums}\n"


def read(log: Path, folder: str, rank: int, world: int, backend: str, dies_at: int) -> None:
    start = steps_done(log)
    with open(log, "a") as file:
        lines = told(folder, rank, world, backend, start)
        for count, line in enumerate(lines, start + 1):
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
            if count == dies_at:
                os.kill(os.getpid(), signal.SIGKILL)
