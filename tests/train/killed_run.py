"""fastssl in a process of its own, which may kill itself."""

import os
import signal
import sys
import threading
from pathlib import Path

from fastssl.cli import main
from fastssl.engine.checkpoint import Checkpoints
from fastssl.engine.engine import Engine
from tests.runs import without_pictures


def run(words: list[str], log: Path, dies_at: int | None = None) -> None:
    """`fastssl WORDS` in a session of its own, what it says written to `log`.

    With `dies_at` optimizer steps done it ends by kill -9, its readers busy with batches to come;
    and so that a last checkpoint, where it is written aside, is not yet whole.
    """
    os.setsid()
    out = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", 1)
    step = Engine.step

    def killed(self, *args, **options):
        if self.ds.global_steps == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *args, **options)

    write = Checkpoints._seal

    def unfinished(self, save, errors):
        if dies_at and self.cfg.asynchronous and int(save.name[5:]) + 3 > dies_at:
            threading.Event().wait(60)
        write(self, save, errors)

    Engine.step, Checkpoints._seal = killed, unfinished
    without_pictures()
    sys.argv = ["fastssl", *words]
    main()
