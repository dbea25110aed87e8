"""Batches of views in an order that a seed fixes, whatever the workers and the ranks.

The order of an epoch is a permutation keyed by (seed, epoch); global batch s of it is the
permutation's rows s * N to (s + 1) * N, of which each rank takes its contiguous share.  An item is
the pair (epoch, index) and all its randomness is keyed by (seed, epoch, index): a worker holds no
state, and to resume is to start at another step.
"""

import atexit
import logging
import queue
import signal
import threading
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader

from fastssl.data.errors import DataError
from fastssl.data.readers import Readers, show_when_asked
from fastssl.data.render.backend import Rendering
from fastssl.data.sources.base import Source
from fastssl.data.views.spec import ViewSpec
from fastssl.data.views.streams import AnyViews
from fastssl.data.worker import (
    FEW_FILES,
    Batch,
    EncodedFetch,
    EvalFetch,
    Fetch,
    Items,
    Parcel,
    PretrainFetch,
    images_of,
    mostly_bad,
    sent,
)
from fastssl.random import ORDER, permutation

log = logging.getLogger(__name__)

_BAD_AFTER = 200  # samples, before a share of bad ones means anything
_SLICE = 0.5  # seconds: how long a wait for data goes on before it asks whether to stop
_PATIENCE = 2.0  # seconds that workers have to end by themselves
ShouldStop = Callable[[], bool] | None


def _outlive_signals(worker: int) -> None:
    """In a worker: the main process alone decides when to stop.

    A cluster, or Ctrl-C, signals the whole process group, and a run that wants to finish its step
    and save still needs batches.  An orphan is ended by torch's watchdog.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    show_when_asked()


@contextmanager
def _ended(batches: Any) -> Iterator[None]:
    """Workers told to end when the stream is left, at the latest when Python exits.

    Python itself ends them by a SIGTERM, which they ignore, and would wait for them for ever.  A
    stream that Python finds still open on its way out is left when modules are empty already.
    One that is stuck, in a read from a disk that does not answer, is killed.
    """
    unregister, shutdown = atexit.unregister, getattr(batches, "_shutdown_workers", None)
    if shutdown is None:  # no workers
        yield
        return

    def end() -> None:
        if batches._shutdown:  # and Python may be too far on its way out to start a thread
            return
        force = threading.Timer(_PATIENCE, lambda: [worker.kill() for worker in batches._workers])
        force.start()
        try:
            with suppress(RuntimeError):  # torch's handler of SIGCHLD tells of those killed
                shutdown()
        finally:
            force.cancel()

    atexit.register(end)
    try:
        yield
    finally:
        unregister(end)
        end()


def _run(
    fetch: Fetch, batches: Any, workers: int, should_stop: ShouldStop = None
) -> Generator[Batch, None, None]:
    """One DataLoader over all of `batches`: no pause between epochs, workers started once."""
    loader = DataLoader(
        fetch,
        batch_sampler=batches,
        collate_fn=sent,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # else it draws from the global one
        worker_init_fn=_outlive_signals,
        timeout=_SLICE if workers else 0,
    )
    with (
        warnings.catch_warnings()
    ):  # Python 3.12 on warns of any fork beside threads; torch has some
        warnings.filterwarnings("ignore", ".*multi-threaded.*fork", DeprecationWarning)
        batches = _started(loader)
    with _ended(batches):
        processes, told = getattr(batches, "_workers", ()), False
        if workers == 0 and should_stop is not None:
            batches = _read_by_thread(batches, should_stop)
        while True:
            try:
                batch = next(batches, None)
            except RuntimeError as error:
                if not str(error).startswith("DataLoader timed out"):
                    raise _told(error, processes) from error
                if should_stop is not None and should_stop():
                    return
                continue
            if batch is None:
                return
            if isinstance(batch, Parcel):
                batch = batch.opened() | {"reason": batch.reason}
            if "error" in batch:
                raise DataError(batch["error"])
            reason = batch.pop("reason", "")
            if reason and not told:
                told = True
                log.warning(
                    "batches come from their loader processes by a pipe, which is slower, for want "
                    "of shared memory or open files (%s): give /dev/shm more room (docker run "
                    "--shm-size=8g), or raise ulimit -n",
                    reason,
                )
            yield batch


def _started(loader: DataLoader) -> Any:
    """Its iterator, with workers started.

    torch would tell of a worker's death by an exception wherever this process is just then, be it
    in the midst of a checkpoint: it is left to the wait for a batch, which looks after them.
    """
    try:
        batches: Any = iter(loader)
    except OSError as error:
        raise DataError(
            f"loader processes cannot be started ({error}): give /dev/shm room, {FEW_FILES}"
        ) from error
    if getattr(batches, "_worker_pids_set", False):
        torch._C._remove_worker_pids(id(batches))
        batches._worker_pids_set = False
    return batches


def _told(error: RuntimeError, workers: Any) -> Exception:
    """What to raise for an error of torch's loader: a sentence, where a worker was killed."""
    dead = [worker for worker in workers if worker.exitcode]
    if not dead:
        return error
    code = dead[0].exitcode
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return DataError(
        f"a loader process ({dead[0].pid}) ended by {how}, as the system does when memory "
        "runs out: lower data.workers or batch_size, or give more memory; resume=auto goes on"
    )


def _read_by_thread(batches: Iterator[Batch], should_stop: Callable[[], bool]) -> Iterator[Batch]:
    """The same batches, read one at a time by a thread, so that this one can leave a stuck read."""
    asked: queue.SimpleQueue[bool] = queue.SimpleQueue()
    read: queue.SimpleQueue[tuple[Batch | None, BaseException | None]] = queue.SimpleQueue()

    def work() -> None:
        while asked.get():
            try:
                read.put((next(batches, None), None))
            except BaseException as error:
                read.put((None, error))

    threading.Thread(target=work, daemon=True).start()
    try:
        while True:
            asked.put(True)
            while True:
                with suppress(queue.Empty):
                    batch, error = read.get(timeout=_SLICE)
                    break
                if should_stop():
                    return
            if error is not None:
                raise error
            if batch is None:
                return
            yield batch
    finally:
        asked.put(False)


def _check_split(rank: int, world: int, workers: int) -> None:
    if not 0 <= rank < world:
        raise ValueError(f"rank: want 0 <= rank < world, got rank {rank} of world {world}")
    if workers < 0:
        raise ValueError(f"workers: want 0 or more, got {workers}")


@dataclass(frozen=True)
class _Steps:
    """The items of a rank's batches, from one step to another."""

    loader: "PretrainLoader"
    start: int
    end: int

    def __len__(self) -> int:
        return self.end - self.start

    def __iter__(self) -> Iterator[Items]:
        own, share = self.loader, self.loader.batch_size // self.loader.world
        order_of, order = -1, None
        for step in range(self.start, self.end):
            epoch, s = divmod(step, own.steps_per_epoch)
            if order is None or epoch != order_of:
                order_of, order = epoch, permutation(len(own.source), ORDER, own.seed, epoch)
            first, end = (s * own.batch_size + part for part in own.stretch(step))
            places = [*range(first, end)]
            # Beyond the end, with last="pad" alone, the epoch's first ones come again.
            extra = own.rank * share - (first - s * own.batch_size)
            places += range(extra, extra + share - len(places))
            yield [(epoch, int(order[i])) for i in places]


def _watched(batches: Generator[Batch, None, None], limit: float) -> Iterator[Batch]:
    """The same batches.  Raises DataError once more than `limit` of all items read were bad."""
    drawn = bad = 0
    with closing(batches):
        for batch in batches:
            bad += len(batch["bad"])
            drawn += len(batch["index"]) + len(batch["bad"])
            if drawn >= _BAD_AFTER and bad > limit * drawn:
                raise mostly_bad(f"{bad} of {drawn} items", batch["bad"])
            yield batch


@dataclass(frozen=True)
class PretrainLoader:
    """Batches of views for pretraining.

    batch_size is the global one, over all `world` ranks.  Joined in rank order, the ranks' batches
    are the batch of one process, sample for sample.
    workers: processes that read and augment; 0: this one does.  The result is the same.
    parameters: whether batches of images tell what their views were drawn with.
    last: "drop" leaves an epoch's last, short batch out; "pad" fills each rank's part of it up with
    the epoch's first samples, marked, so that every sample comes once and over all ranks none is
    lost.
    rendering: how DALI makes the views, of images alone; None: torchvision does.
    max_bad: the share of unreadable samples, over the stream, that ends it.
    Raises DataError for a batch larger than the data or not divisible by world.
    """

    source: Source
    views: AnyViews
    _: KW_ONLY
    batch_size: int
    seed: int
    rank: int = 0
    world: int = 1
    workers: int = 0
    parameters: bool = False
    last: Literal["drop", "pad"] = "drop"
    rendering: Rendering | None = None
    max_bad: float = 0.5

    def __post_init__(self):
        _check_split(self.rank, self.world, self.workers)
        n, size = len(self.source), self.batch_size
        if size < 1:
            raise DataError(f"batch_size {size} is not positive: give 1 or more")
        if size > n:
            raise DataError(
                f"batch_size {size} is larger than the data set ({n} training images): "
                f"lower it to {n} or less, or add images"
            )
        if size % self.world:
            raise DataError(
                f"batch_size {size} is not divisible by the {self.world} ranks: "
                f"give a multiple of {self.world}"
            )

    @property
    def steps_per_epoch(self) -> int:
        whole, rest = divmod(len(self.source), self.batch_size)
        return whole + (self.last == "pad" and rest > 0)

    def stretch(self, step: int) -> tuple[int, int]:
        """From where to where this rank's own samples are in the global batch of a step.

        The ranks have as many of a short batch, or one more.
        """
        count = self._count(step)
        return count * self.rank // self.world, count * (self.rank + 1) // self.world

    def even_rows(self, step: int) -> int:
        """How many samples of a step every rank has, its first ones: all, or of a short batch what
        divides among the ranks."""
        return self._count(step) // self.world

    def _count(self, step: int) -> int:
        """How many samples of a step, over all ranks, are no padding."""
        left = len(self.source) - step % self.steps_per_epoch * self.batch_size
        return min(self.batch_size, left)

    def _padding(self, step: int) -> torch.Tensor:
        """(b,) bool: which of this rank's samples of a step only fill up the epoch's last batch."""
        first, end = self.stretch(step)
        return torch.arange(self.batch_size // self.world) >= end - first

    def stream(
        self,
        start_step: int,
        end_step: int,
        should_stop: ShouldStop = None,
        readers: Readers | None = None,
    ) -> Iterator[Batch]:
        """The batches of steps start_step to end_step - 1, counted over all epochs.

        should_stop() is asked every half second while a batch is waited for, and ends the stream
        early where it says so, on this rank alone; a batch that is ready is given in any case.
        readers: one of `new_readers`, which then tells what they are at.

        Each is {"views": [(b, ...) float32 for each view], "index": (b,) int64 into the
        source, "seeds": (b,) int64, "bad": [(name, reason), ...]}, b = batch_size / world, and
        "label": (b,) int64 where the source has labels.  With `parameters`, "params": [(b, P)
        float32 for each view], one column for each of PARAMETERS.  With last="pad",
        "padding": (b,) bool.  Of several streams "views" and "params" are dictionaries of such
        lists, by stream.  A bad item is replaced by another, that (seed, epoch, index) names;
        "index" has the replacement, "seeds" the place's own, "bad" every item that could not be
        read.  DALI's views are on the device of `rendering`.
        Raises DataError when the data are mostly bad; ValueError for an impossible range.
        """
        if not 0 <= start_step <= end_step:
            raise ValueError(f"steps: want 0 <= start <= end, got {start_step} and {end_step}")
        batches = _watched(
            self._made(_Steps(self, start_step, end_step), should_stop, readers), self.max_bad
        )
        if self.last == "drop":
            return batches
        steps = enumerate(batches, start_step)
        return ({**batch, "padding": self._padding(step)} for step, batch in steps)

    def first(self, count: int) -> Batch:
        """A batch of the first `count` items, its views made here, by torchvision."""
        fetch = PretrainFetch(self.source, self.views, self.seed, self.parameters)
        return fetch.batch([(0, i) for i in range(count)])

    def new_readers(self) -> Readers:
        """For `stream`: what its readers are at."""
        return Readers(self.rendering.readers if self.rendering else self.workers)

    def _made(
        self, steps: _Steps, should_stop: ShouldStop, readers: Readers | None
    ) -> Generator[Batch, None, None]:
        given: Any = (self.source, self.views, self.seed, self.parameters, readers)
        if self.rendering is None:
            return _run(PretrainFetch(*given), steps, self.workers, should_stop)
        from fastssl.data.render.dali import Part, Renderer  # DALI takes a second to import

        fetch, share = EncodedFetch(*given), self.batch_size // self.world
        channels, views = self.source.channels, images_of(self.views)
        by_stream = channels if isinstance(channels, dict) else {"": channels}
        parts = {name: Part(own, by_stream[name]) for name, own in views.items()}
        renderer = Renderer(parts, self.rendering, share, fetch.again)
        return renderer.rendered(_run(fetch, steps, self.rendering.readers, should_stop))


@dataclass(frozen=True)
class EvalLoader:
    """Every item once, in order, as `views.evaluation()` shows it.

    Iterating yields {"view": (b, ...) float32, "index": (b,) int64, "bad": [(name, reason), ...]}:
    bad items are left out, and listed; the last batch may be short.  A rank has one contiguous
    stretch of the source, at most one item longer than another's.
    """

    source: Source
    views: ViewSpec
    batch_size: int
    _: KW_ONLY
    rank: int = 0
    world: int = 1
    workers: int = 0

    def __post_init__(self):
        _check_split(self.rank, self.world, self.workers)
        if self.batch_size < 1:
            raise ValueError(f"batch_size: want 1 or more, got {self.batch_size}")

    def _items(self) -> list[Items]:
        n = len(self.source)
        first, last = (n * r // self.world for r in (self.rank, self.rank + 1))
        starts = range(first, last, self.batch_size)
        return [[(0, i) for i in range(s, min(s + self.batch_size, last))] for s in starts]

    def __len__(self) -> int:
        return len(self._items())

    def __iter__(self) -> Iterator[Batch]:
        fetch = EvalFetch(self.source, self.views.evaluation())
        return _run(fetch, self._items(), self.workers)
