"""Views of items that have several streams: a spec for each, and whose places the others share.

A stream that shares those of another has its geometric draws: crop (and `within`), flips, turn and
move, as shares of its own image, so that one place is seen by both, whatever the sizes of images
and views.  Its own spec says how large its views are, how they are resized, and what is done to
their values, drawn from its own seed; the fields of PLACES are those of the stream that it shares.
"""

from dataclasses import dataclass, field
from typing import ClassVar

from fastssl.data.views.image import PLACES, Views, unknown
from fastssl.data.views.spec import ViewSpec


@dataclass(frozen=True)
class StreamViews:
    """The views of each stream, by name; the first is the primary one, which evaluation reads.

    shares: a stream -> the stream whose geometric draws it has; both are of images, and make as
    many views.  `streams` are then those given, with the fields of PLACES taken over.
    Raises ValueError for a stream that shares with itself, in a circle, with one that there is not,
    or with one of another kind or number of views, or where RandAugment moves one of the two.
    """

    kind: ClassVar[str] = "streams"
    streams: dict[str, ViewSpec]
    shares: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        for name, other in self.shares.items():
            check_shares(name, other, list(self.streams))
            path = [name]
            while (at := path[-1]) in self.shares:
                if (onward := self.shares[at]) in path:
                    raise ValueError(f"streams share in a circle: {', '.join([*path, onward])}")
                path.append(onward)
            a, b = self.streams[name], self.streams[other]
            for one, spec in ((name, a), (other, b)):
                if not isinstance(spec, Views):
                    raise ValueError(
                        f"stream {name!r} shares the places of {other!r}, and views of {one!r} are "
                        f"of {spec.kind}s: only images can share"
                    )
                if any(view.rand_augment for view in spec.views):
                    raise ValueError(
                        f"stream {name!r} shares the places of {other!r}, and rand_augment moves "
                        f"those of {one!r} by draws of its own: set it to 0"
                    )
            if a.count != b.count:
                raise ValueError(
                    f"stream {name!r} makes {a.count} view(s) of an item and {other!r}, whose "
                    f"places it shares, {b.count}: give them as many"
                )
        made = {name: self._placed(name) for name in self.streams}
        object.__setattr__(self, "streams", made)

    def _placed(self, name: str) -> ViewSpec:
        own, root = self.streams[name], self.streams[self.root(name)]
        if own is root:
            return own
        assert isinstance(own, Views) and isinstance(root, Views)
        views = [
            {**view.model_dump(), "count": 1, **place.model_dump(include={*PLACES, "over"})}
            for view, place in zip(own.crops, root.crops, strict=True)
        ]
        return Views.model_validate({"views": views, "mean": own.mean, "std": own.std})

    @property
    def primary(self) -> str:
        """The name of the first stream."""
        return next(iter(self.streams))

    @property
    def count(self) -> int:
        """How many views of an item the primary stream makes."""
        return self.streams[self.primary].count

    def stream(self, name: str) -> ViewSpec:
        """The views of one stream.  Raises ValueError for an unknown one, naming the closest."""
        if name not in self.streams:
            raise unknown("stream", name, list(self.streams))
        return self.streams[name]

    def root(self, name: str) -> str:
        """The stream whose places those of `name` are: itself, where it shares with none."""
        while name in self.shares:
            name = self.shares[name]
        return name

    def shapes(self, channels: dict[str, int]) -> dict[str, list[tuple[int, ...]]]:
        """The shape of each view of each stream, without the batch."""
        return {name: spec.shapes(channels[name]) for name, spec in self.streams.items()}


AnyViews = ViewSpec | StreamViews


def check_shares(name: str, other: str, known: list[str]) -> None:
    """Raise ValueError where stream `name` cannot share with a stream of the name `other`."""
    if other == name:
        raise ValueError(f"stream {name!r} shares with itself: give another, or none")
    if other not in known:
        raise ValueError(f"stream {name!r} shares with {other!r}, which is none of {known}")


def specs_of(views: AnyViews) -> list[ViewSpec]:
    """The views of each stream, or `views` alone."""
    return [*views.streams.values()] if isinstance(views, StreamViews) else [views]


def of_stream(views: AnyViews, name: str | None = None) -> ViewSpec:
    """The views of one stream, the primary where none is named; `views` where they have none."""
    if isinstance(views, StreamViews):
        return views.stream(name or views.primary)
    return views
