"""Live news of a run on a terminal: a bar with loss, speed and time left; sentences above it.

Where the output is no terminal (a log file, a pipe) a line every few seconds takes the bar's place.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fastssl.files import printable

QUIET_SECONDS = 10.0  # between two lines where there is no terminal


class RichWatch:
    """A `fastssl.run.log.Watch` over a rich console."""

    def __init__(self, console: Console, epochs: int):
        self.console, self.epochs = console, epochs
        self.bar = Progress(
            TextColumn("[bold]{task.fields[epoch]}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[news]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=not console.is_terminal,
        )
        self.task, self.total, self.started, self.spoken = None, 0, 0.0, 0.0
        self.first = 0

    def say(self, text: str) -> None:
        self.console.print(printable(text), markup=False, highlight=False)

    def begin(self, total: int, done: int) -> None:
        self.total, self.first, self.started = total, done, time.monotonic()
        self.task = self.bar.add_task("", total=total, completed=done, epoch="", news="")
        self.bar.start()

    def advance(self, step: int, row: dict[str, Any] | None) -> None:
        if self.task is None:
            return
        self.bar.update(self.task, completed=step)
        if row is None:
            return
        epoch = f"epoch {min(int(row['epoch']) + 1, self.epochs)}/{self.epochs}"
        news = f"loss {row['loss']:.4f}  {row['images_per_s']:,.0f} images/s"
        self.bar.update(self.task, epoch=epoch, news=news)
        now = time.monotonic()
        last = step == self.total
        if self.bar.disable and (last or now - self.spoken >= QUIET_SECONDS):
            self.spoken = now
            left = (now - self.started) / max(step - self.first, 1) * (self.total - step)
            self.say(f"{epoch}  step {step}/{self.total}  {news}  {left:.0f} s left")

    def end(self) -> None:
        self.bar.stop()


@contextmanager
def counted(console: Console, total: int, what: str) -> Iterator[Callable[[int], None]]:
    """A bar over `total` things of a kind; what it gives is told how many more are done.

    Where the output is no terminal nothing is shown.
    """
    bar = Progress(
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn(what),
        TimeRemainingColumn(compact=True),
        console=console,
        disable=not console.is_terminal,
    )
    task = bar.add_task("", total=total)
    with bar:
        yield lambda count: bar.update(task, advance=count)
