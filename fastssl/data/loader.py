"""Batches of views in an order that a seed fixes, whatever the workers and the ranks.

The order of an epoch is a permutation keyed by (seed, epoch); global batch s of it is the
permutation's rows s * N to (s + 1) * N, of which each rank takes its contiguous share.  An item is
the pair (epoch, index) and all its randomness is keyed by (seed, epoch, index): a worker holds no
state, and to resume is to start at another step.
"""

import atexit
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .errors import BadItem, DataError
from .seeds import ORDER, REPLACE, mix, permutation, sample_seeds
from .source import Source
from .spec import ViewSpec, apply, blank
from .torch_views import drawn_parameters
from .views import Views

_REPLACEMENTS = 16  # items tried in the place of one bad one
Batch = dict[str, Any]
Items = list[tuple[int, int]]  # (epoch, index) of each sample


@contextmanager
def _one_thread() -> Iterator[None]:
    """Torch on one thread, as in a worker: with more, a sum over pixels rounds otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _Fetch(Dataset):
    """A batch of items, read and augmented; runs in the workers."""

    def __init__(self, source: Source, views: ViewSpec):
        self.source, self.views = source, views

    def __getitems__(self, items: Items) -> Batch:
        try:
            with _one_thread():
                return self.batch(items)
        except DataError as error:  # raised again by _run: a worker's own would come as a traceback
            return {"error": str(error)}

    def batch(self, items: Items) -> Batch:
        raise TypeError(f"{type(self).__name__} does not define batch(items)")


class _PretrainFetch(_Fetch):
    def __init__(self, source: Source, views: ViewSpec, seed: int, parameters: bool):
        super().__init__(source, views)
        self.seed, self.parameters = seed, parameters

    def batch(self, items: Items) -> Batch:
        bad: list[tuple[str, str]] = []
        seeds = sample_seeds(self.seed, *np.array(items).T)
        used, samples, drawn = [], [], []
        for (epoch, index), seed in zip(items, seeds.tolist(), strict=True):
            i, item = self._readable(epoch, index, bad)
            used.append(i)
            samples.append(apply(self.views, item, seed))
            if self.parameters:
                assert isinstance(self.views, Views), "the configuration refuses other kinds"
                drawn.append(drawn_parameters(self.views, item.shape, seed))
        labels = self.source.labels
        return {
            **({} if labels is None else {"label": labels[used]}),
            **({"params": list(torch.stack(drawn, 1))} if drawn else {}),
            "views": [torch.stack(view) for view in zip(*samples, strict=True)],
            "index": torch.tensor(used),
            "seeds": torch.from_numpy(seeds),
            "bad": bad,
        }

    def _readable(self, epoch: int, index: int, bad: list[tuple[str, str]]) -> tuple[int, Tensor]:
        """Item `index`, or the first readable of those that its key puts in its place."""
        try:
            return index, self.source.item(index)
        except BadItem as error:
            tried = [(error.name, error.reason)]
        for word in mix(REPLACE, self.seed, epoch, index, np.arange(_REPLACEMENTS)).tolist():
            i = word % len(self.source)
            try:
                item = self.source.item(i)
                bad.extend(tried)
                return i, item
            except BadItem as error:
                tried.append((error.name, error.reason))
        some = list(dict(tried).items())[:3]
        examples = "; ".join(f"{name}: {reason}" for name, reason in some)
        raise DataError(
            f"most of the data is unreadable, {len(tried)} items in a row ({examples}): "
            "remove or mend these files"
        )


class _EvalFetch(_Fetch):
    def batch(self, items: Items) -> Batch:
        bad, used, views = [], [], []
        for _, i in items:
            try:
                views.append(apply(self.views, self.source.item(i), 0)[0])
                used.append(i)
            except BadItem as error:
                bad.append((error.name, error.reason))
        stacked = torch.stack(views) if views else blank(self.views, self.source.channels, 0)
        return {"view": stacked, "index": torch.tensor(used, dtype=torch.int64), "bad": bad}


def _same(batch: Any) -> Any:
    return batch


def _outlive_signals(worker: int) -> None:
    """In a worker: the main process alone decides when to stop.

    A cluster, or Ctrl-C, signals the whole process group, and a run that wants to finish its step
    and save still needs batches.  An orphan is ended by torch's watchdog.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def _ended(batches: Any) -> Iterator[None]:
    """Workers told to end when the stream is left, at the latest when Python exits.

    Python itself ends them by a SIGTERM, which they ignore, and would wait for them for ever.
    """
    end = getattr(batches, "_shutdown_workers", None)
    if end is None:  # no workers
        yield
        return
    atexit.register(end)
    try:
        yield
    finally:
        atexit.unregister(end)
        end()


def _run(fetch: _Fetch, batches: Any, workers: int) -> Iterator[Batch]:
    """One DataLoader over all of `batches`: no pause between epochs, workers started once."""
    loader = DataLoader(
        fetch,
        batch_sampler=batches,
        collate_fn=_same,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # else it draws from the global one
        worker_init_fn=_outlive_signals,
    )
    with (
        warnings.catch_warnings()
    ):  # Python 3.12 on warns of any fork beside threads; torch has some
        warnings.filterwarnings("ignore", ".*multi-threaded.*fork", DeprecationWarning)
        batches = iter(loader)
    with _ended(batches):
        for batch in batches:
            if "error" in batch:
                raise DataError(batch["error"])
            yield batch


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
            first = s * own.batch_size + own.rank * share
            yield [(epoch, i) for i in order[first : first + share].tolist()]


@dataclass(frozen=True)
class PretrainLoader:
    """Batches of views for pretraining.

    batch_size is the global one, over all `world` ranks; the last, short batch of an epoch is left
    out.  Joined in rank order, the ranks' batches are the batch of one process, sample for sample.
    workers: processes that read and augment; 0: this one does.  The result is the same.
    parameters: whether batches of images tell what their views were drawn with.
    Raises DataError for a batch larger than the data or not divisible by world.
    """

    source: Source
    views: ViewSpec
    _: KW_ONLY
    batch_size: int
    seed: int
    rank: int = 0
    world: int = 1
    workers: int = 0
    parameters: bool = False

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
        return len(self.source) // self.batch_size

    def stream(self, start_step: int, end_step: int) -> Iterator[Batch]:
        """The batches of steps start_step to end_step - 1, counted over all epochs.

        Each is {"views": [(b, ...) float32 for each view], "index": (b,) int64 into the
        source, "seeds": (b,) int64, "bad": [(name, reason), ...]}, b = batch_size / world, and
        "label": (b,) int64 where the source has labels.  With `parameters`, "params": [(b, P)
        float32 for each view], one column for each of torch_views.PARAMETERS.  A bad item is
        replaced by another, that (seed, epoch, index) names; "index" has the replacement, "seeds"
        the place's own, "bad" every item that could not be read.
        Raises DataError when item after item is bad; ValueError for an impossible range.
        """
        if not 0 <= start_step <= end_step:
            raise ValueError(f"steps: want 0 <= start <= end, got {start_step} and {end_step}")
        fetch = _PretrainFetch(self.source, self.views, self.seed, self.parameters)
        return _run(fetch, _Steps(self, start_step, end_step), self.workers)


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
        fetch = _EvalFetch(self.source, self.views.evaluation())
        return _run(fetch, self._items(), self.workers)
