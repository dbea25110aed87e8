"""Items of several streams: {"image": ..., "depth": ...}, read from one source, or from one each.

A source has streams where it says so: `source.streams`, their names.  Then `item(i)` is a mapping
by them, `channels` too, and `stream(source, name)` is one of them as a source like others.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, cast

import numpy as np
from torch import Tensor

from fastssl.data.errors import BadItem, DataError
from fastssl.data.sources.base import Source, Split


class StreamSource(Protocol):
    """A source whose items have several streams; else as `Source` is.  `floats`, where it has any,
    names the streams of float32 images.

    One may define `stream(name)` -> that stream alone, where reading it alone is less work, or
    where its items are encoded images (EncodedSource).
    """

    streams: tuple[str, ...]
    labels: Tensor | None
    classes: tuple[str, ...] | None

    @property
    def channels(self) -> dict[str, int]: ...

    def __len__(self) -> int: ...

    def item(self, i: int) -> dict[str, Tensor]:
        """Item i.  Raises BadItem."""
        ...

    def name(self, i: int) -> str: ...

    def select(self, indices: np.ndarray) -> "StreamSource": ...


def streams_of(source: Any) -> tuple[str, ...]:
    """The names of a source's streams; none where its items are plain."""
    return tuple(getattr(source, "streams", ()))


def stream(source: Any, name: str) -> Source:
    """One stream of a source, as a source of its own with the same labels and names.

    Raises DataError for a stream that it has not.
    """
    if name not in streams_of(source):
        raise _no_stream(source, name)
    own = getattr(source, "stream", None)
    return OneStream(source, name) if own is None else own(name)


def _no_stream(source: Any, name: str) -> DataError:
    known = ", ".join(streams_of(source))
    return DataError(
        f"data.streams names {name!r}, and the source has "
        f"{known or 'no streams: its items are plain, so leave data.streams out'}"
    )


class OneStream:
    """A stream of a source that reads all of its streams at once."""

    def __init__(self, source: Any, name: str):
        self.source, self.stream_name = source, name
        self.channels: int = source.channels[name]
        self.labels, self.classes = source.labels, source.classes
        self.floats: bool = name in getattr(source, "floats", ())

    def __len__(self) -> int:
        return len(self.source)

    def name(self, i: int) -> str:
        return self.source.name(i)

    def item(self, i: int) -> Tensor:
        return self.source.item(i)[self.stream_name]

    def select(self, indices: np.ndarray) -> "OneStream":
        return OneStream(self.source.select(indices), self.stream_name)


class Joined:
    """Sources of as many items each, one a stream: item i is that of all.

    Labels, classes and names are those of the first.
    Raises DataError for streams of different lengths.
    """

    def __init__(self, parts: Mapping[str, Source]):
        self.parts, self.streams = dict(parts), tuple(parts)
        lengths = {name: len(part) for name, part in self.parts.items()}
        if len(set(lengths.values())) > 1:
            told = ", ".join(f"{name!r} {count}" for name, count in lengths.items())
            raise DataError(f"streams have different numbers of items ({told}): pair them")
        self.channels = {name: part.channels for name, part in self.parts.items()}
        self.floats = tuple(n for n, part in self.parts.items() if getattr(part, "floats", False))
        self.labels, self.classes = self._first.labels, self._first.classes

    @property
    def _first(self) -> Source:
        return self.parts[self.streams[0]]

    def __len__(self) -> int:
        return len(self._first)

    def name(self, i: int) -> str:
        return self._first.name(i)

    def item(self, i: int) -> dict[str, Tensor]:
        """Item i of every stream.  Raises BadItem where one cannot be read."""
        return {name: part.item(i) for name, part in self.parts.items()}

    def stream(self, name: str) -> Source:
        """One stream."""
        return self.parts[name]

    def select(self, indices: np.ndarray) -> "Joined":
        return Joined({name: part.select(indices) for name, part in self.parts.items()})


class Chosen:
    """Some streams of a source, in an order of one's own."""

    def __init__(self, source: Any, names: Sequence[str]):
        self.source, self.streams = source, tuple(names)
        self.channels = {name: source.channels[name] for name in names}
        self.floats = tuple(getattr(source, "floats", ()))
        self.labels, self.classes = source.labels, source.classes

    def __len__(self) -> int:
        return len(self.source)

    def name(self, i: int) -> str:
        return self.source.name(i)

    def item(self, i: int) -> dict[str, Tensor]:
        """Item i.  Raises BadItem where the source leaves a stream out."""
        found = self.source.item(i)
        lost = [name for name in self.streams if name not in found]
        if lost:
            raise BadItem(self.name(i), f"it has no {', '.join(lost)}")
        return {name: found[name] for name in self.streams}

    def stream(self, name: str) -> Source:
        return stream(self.source, name)

    def select(self, indices: np.ndarray) -> "Chosen":
        return Chosen(self.source.select(indices), self.streams)


def chosen(source: Any, names: Sequence[str]) -> Any:
    """These streams of a source: one alone as a plain source, of several items by stream.

    names: none for a source without streams.
    Raises DataError where the source has others, or none, or has some and none is named.
    """
    has = streams_of(source)
    for name in names:
        if name not in has:
            raise _no_stream(source, name)
    if has and not names:
        raise DataError(
            f"the items of the source have streams ({', '.join(has)}): name those to train on, as "
            f"data.streams.{has[0]}={{}}"
        )
    if len(names) == 1:
        return stream(source, names[0])
    if isinstance(source, Joined):
        return Joined({name: source.parts[name] for name in names})
    return Chosen(source, names) if names else source


def each_part(split: Split, change: Callable[[Any], Any]) -> Split:
    """The split with both parts changed."""
    return Split(*(cast(Source, change(part)) for part in split))


def split_of_stream(split: Split, name: str | None = None) -> Split:
    """One stream of both parts, the first where none is named; `split` where it has none."""
    known = streams_of(split.train)
    return each_part(split, lambda part: stream(part, name or known[0])) if known else split
