"""What a loader's worker does: it reads a batch of items, and augments them or draws how to.

An item is asked for by (epoch, index), and all its randomness is keyed by (seed, epoch, index): a
worker holds no state.
"""

import errno
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.reduction import ForkingPickler
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils._pytree import tree_leaves
from torch.utils.data import Dataset, get_worker_info
from torch.utils.data._utils.pin_memory import pin_memory

from fastssl.data.errors import BadItem, DataError
from fastssl.data.readers import Readers
from fastssl.data.render.encoded import Encoded, drawn_columns, encoded_item, packed, union
from fastssl.data.render.streams import apply_streams, draw_streams, stream_parameters
from fastssl.data.render.torchvision import Drawn, draw_views, drawn_parameters
from fastssl.data.sources.base import Source
from fastssl.data.streams import stream, streams_of
from fastssl.data.views.image import Views
from fastssl.data.views.spec import ViewSpec, apply, blank
from fastssl.data.views.streams import AnyViews, StreamViews
from fastssl.random import REPLACE, mix, sample_seeds

_REPLACEMENTS = 16  # items tried in the place of one bad one
Batch = dict[str, Any]
Items = list[tuple[int, int]]  # (epoch, index) of each sample
T = TypeVar("T")


@contextmanager
def _one_thread() -> Iterator[None]:
    """Torch on one thread, as in a worker: with more, a sum over pixels rounds otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Fetch(Dataset):
    """A batch of items, read and augmented; runs in the workers."""

    def __init__(self, source: Source, views: AnyViews):
        self.source, self.views = source, views

    def __getitems__(self, items: Items) -> Batch:
        try:
            with _one_thread():
                return self.batch(items)
        except DataError as error:  # raised again by the loader: a worker's own is a traceback
            return {"error": str(error)}
        except (OSError, MemoryError) as error:
            return {"error": f"the data cannot be read ({error}): {machine_advice(error)}"}

    def batch(self, items: Items) -> Batch:
        raise TypeError(f"{type(self).__name__} does not define batch(items)")


FEW_FILES = "raise the limit of open files (ulimit -n), or lower data.workers"
_SPARE = 16  # descriptors that sending a batch may take for a moment
_no_room: list[str] = []  # of a worker: why its batches go as bytes


def machine_advice(error: Exception) -> str:
    """What to do about a failure of the machine."""
    code = error.errno if isinstance(error, OSError) else errno.ENOMEM
    if code in (errno.EMFILE, errno.ENFILE):
        return FEW_FILES
    if code == errno.ENOMEM:
        return "memory ran out: lower data.workers or batch_size"
    return "see that its disk answers, then go on with resume=auto"


class Parcel:
    """A batch on its way from a worker: its tensors in shared memory, or as bytes where there is no
    room for them.  `reason` says why, or is empty.

    Pickled here: what fails in the thread that multiprocessing sends by is lost without a word.
    """

    def __init__(self, batch: Batch):
        self.reason = ""
        if not _no_room:
            try:
                self.data = _shared(batch)
                return
            except (OSError, RuntimeError) as error:  # RuntimeError: torch's own
                _no_room.append(" ".join(str(error).split()))
        self.data, self.reason = pickle.dumps(batch), _no_room[0]

    def opened(self) -> Batch:
        """Raises DataError where file descriptors are too few to receive it."""
        try:
            return pickle.loads(self.data)
        except (ConnectionError, EOFError, FileNotFoundError) as error:
            raise DataError(
                f"the loader process that made a batch is gone ({type(error).__name__}), ended by "
                f"a signal or for want of memory: lower data.workers or batch_size"
            ) from error
        except (OSError, RuntimeError) as error:
            raise DataError(
                f"a batch could not be received from its loader process ({error}): {FEW_FILES}"
            ) from error

    def pin_memory(self) -> Batch:
        """Called by the DataLoader's thread."""
        try:
            return pin_memory(self.opened()) | {"reason": self.reason}  # type: ignore[operator]
        except DataError as error:
            return {"error": str(error)}


def _shared(batch: Batch) -> bytes:
    for tensor in tree_leaves(batch):
        if isinstance(tensor, torch.Tensor):
            tensor.share_memory_()
    spare = []
    try:
        spare += [os.dup(0) for _ in range(_SPARE)]
    finally:
        for descriptor in spare:
            os.close(descriptor)
    return bytes(ForkingPickler.dumps(batch))


def sent(batch: Any) -> Batch | Parcel:
    """A batch as it leaves a worker; where there is none, as it is."""
    return batch if get_worker_info() is None else Parcel(batch)


class _TrainFetch(Fetch):
    """Items for training: bad ones are replaced by others.  readers: told which are being read."""

    def __init__(
        self,
        source: Source,
        views: AnyViews,
        seed: int,
        parameters: bool,
        readers: Readers | None = None,
    ):
        super().__init__(source, views)
        self.seed, self.parameters, self.readers = seed, parameters, readers

    def described(self, seeds: np.ndarray, used: list[int], bad: list[tuple[str, str]]) -> Batch:
        labels = self.source.labels
        return {
            **({} if labels is None else {"label": labels[used]}),
            "index": torch.tensor(used),
            "seeds": torch.from_numpy(seeds),
            "bad": bad,
        }

    def told(self, shapes: list[Any], seeds: np.ndarray) -> Batch:
        """What the views are drawn with, for a method that asks."""
        if not self.parameters:
            return {}
        drawn = [
            self._drawn(shape, seed) for shape, seed in zip(shapes, seeds.tolist(), strict=True)
        ]
        return {"params": _stacked(drawn)}

    def _drawn(self, shape: Any, seed: int) -> Any:
        if isinstance(self.views, StreamViews):
            return stream_parameters(self.views, shape, seed)
        assert isinstance(self.views, Views), "the configuration refuses other kinds"
        return drawn_parameters(self.views, shape, seed)

    def readable(
        self, items: Items, read: Callable[[int], T]
    ) -> tuple[list[int], list[T], list[tuple[str, str]]]:
        """The indices of `items` and what read(index) gives, bad ones replaced; all bad ones."""
        bad: list[tuple[str, str]] = []
        read = read if self.readers is None else _announced(read, self.readers)
        used, got = zip(*(self._readable(*item, read, bad) for item in items), strict=True)
        return list(used), list(got), bad

    def _readable(
        self, epoch: int, index: int, read: Callable[[int], T], bad: list[tuple[str, str]]
    ) -> tuple[int, T]:
        """Item `index`, or the first readable of those that its key puts in its place."""
        try:
            return index, read(index)
        except BadItem as error:
            tried = [(error.name, error.reason)]
        for word in mix(REPLACE, self.seed, epoch, index, np.arange(_REPLACEMENTS)).tolist():
            i = word % len(self.source)
            try:
                item = read(i)
                bad.extend(tried)
                return i, item
            except BadItem as error:
                tried.append((error.name, error.reason))
        raise mostly_bad(f"{len(tried)} items in a row", tried)


def _announced(read: Callable[[int], T], readers: Readers) -> Callable[[int], T]:
    """`read`, with its items told to `readers`."""

    def reading(i: int) -> T:
        readers.at(i)
        try:
            return read(i)
        finally:
            readers.at(-1)

    return reading


def mostly_bad(how_many: str, found: list[tuple[str, str]]) -> DataError:
    """The error for data that are mostly unreadable; it names up to three items of `found`."""
    examples = "; ".join(f"{name}: {reason}" for name, reason in list(dict(found).items())[:3])
    return DataError(
        f"most of the data is unreadable, {how_many} ({examples}): remove or mend these files"
    )


class PretrainFetch(_TrainFetch):
    """Views made here, by torchvision."""

    def batch(self, items: Items) -> Batch:
        seeds = sample_seeds(self.seed, *np.array(items).T)
        used, got, bad = self.readable(items, self.source.item)
        samples = [_views(self.views, x, s) for x, s in zip(got, seeds.tolist(), strict=True)]
        return {
            **self.described(seeds, used, bad),
            **self.told([_shapes(x) for x in got], seeds),
            "views": _stacked(samples),
        }


def _views(spec: AnyViews, item: Any, seed: int) -> Any:
    """Every view of one item: a list, by stream where it has several."""
    if isinstance(spec, StreamViews):
        return apply_streams(spec, item, seed)
    return apply(spec, item, seed)


def _shapes(item: Any) -> Any:
    if isinstance(item, dict):
        return {name: tuple(x.shape) for name, x in item.items()}
    return item.shape


def _stacked(samples: Sequence[Any]) -> Any:
    """A tensor (b, ...) each view, of the views of b samples; by stream where these are."""
    if isinstance(samples[0], dict):
        return {name: _stacked([sample[name] for sample in samples]) for name in samples[0]}
    return [torch.stack(view) for view in zip(*samples, strict=True)]


class EncodedFetch(_TrainFetch):
    """Bytes, and what DALI is to make of them: see encoded.py and dali.py."""

    views: Views | StreamViews

    def batch(self, items: Items, *, careful: bool = False) -> Batch:
        """careful: every image is decoded here."""
        sources = {name: stream(self.source, name) for name in streams_of(self.source)}
        sources = sources or {"": self.source}

        def read(i: int) -> dict[str, Encoded]:
            return {name: encoded_item(own, i, careful=careful) for name, own in sources.items()}

        seeds = sample_seeds(self.seed, *np.array(items).T)
        used, got, bad = self.readable(items, read)
        sizes = [{name: (x.height, x.width) for name, x in item.items()} for item in got]
        drawn = [self._places(size, s) for size, s in zip(sizes, seeds.tolist(), strict=True)]
        channels = {name: own.channels for name, own in sources.items()}
        shapes: list[Any] = [
            {name: (channels[name], *size) for name, size in item.items()} for item in sizes
        ]
        if "" in sources:
            shapes = [shape[""] for shape in shapes]
        return {
            **self.described(seeds, used, bad),
            **self.told(shapes, seeds),
            "encoded": {
                name: _encoded(views, [x[name] for x in got], [p[name] for p in drawn])
                for name, views in images_of(self.views).items()
            },
            **{"items": items, "careful": careful},
        }

    def _places(self, sizes: dict[str, tuple[int, int]], seed: int) -> dict[str, list[Drawn]]:
        if isinstance(self.views, StreamViews):
            return draw_streams(self.views, sizes, seed)
        return {"": draw_views(self.views, *sizes[""], seed)}

    def again(self, batch: Batch) -> Batch:
        """The same batch, every image decoded here; those that cannot be are replaced."""
        again = self.__class__.batch(self, batch["items"], careful=True)
        return {
            **again,
            "bad": [*batch["bad"], *(b for b in again["bad"] if b not in batch["bad"])],
        }


def images_of(views: AnyViews) -> dict[str, Views]:
    """The views of each stream of images by name; of images without streams by ""."""
    by_name = views.streams if isinstance(views, StreamViews) else {"": views}
    return {name: own for name, own in by_name.items() if isinstance(own, Views)}


def _encoded(views: Views, items: list[Encoded], drawn: list[list[Drawn]]) -> dict[str, Any]:
    """What one stream's images are made of: their bytes and where these end, the parts of them
    that are decoded, and the columns of what each view was drawn with."""
    parts, columns = [union(own) for own in drawn], []
    for own, (top, left, *_) in zip(drawn, parts, strict=True):
        pairs = zip(views.crops, own, strict=True)
        columns.append([drawn_columns(view, p, top, left) for view, p in pairs])
    data, ends = packed(items)
    table = torch.tensor(columns, dtype=torch.float32).transpose(0, 1).contiguous()
    return {"data": data, "ends": ends, "part": torch.tensor(parts), "drawn": table}


class EvalFetch(Fetch):
    """Items as evaluation sees them: bad ones are left out."""

    views: ViewSpec

    def batch(self, items: Items) -> Batch:
        bad, used, views = [], [], []
        for _, i in items:
            try:
                views.append(apply(self.views, self.source.item(i), 0)[0])
                used.append(i)
            except BadItem as error:
                bad.append((error.name, error.reason))
        view = torch.stack(views) if views else blank(self.views, self.source.channels, 0)
        return {"view": view, "index": torch.tensor(used, dtype=torch.int64), "bad": bad}
