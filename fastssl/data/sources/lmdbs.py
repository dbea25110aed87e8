"""Images in an LMDB database: a key's value is the encoded image."""

import fnmatch
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, Field
from torch import Tensor

from fastssl.data.errors import BadItem, DataError
from fastssl.data.sources.base import Source, SourceOptions, absolute, needed
from fastssl.data.sources.decode import EncodedItems
from fastssl.data.sources.names import Names, printable

_OPENED: dict[tuple[int, str], Any] = {}  # by process and path: one may not open a database twice


_lmdb = partial(needed, "lmdb", "lmdb")


def _environment(path: Path) -> Any:
    """The database, read-only and without locks, opened once by each process.

    Raises DataError for what is none.
    """
    lmdb, key = _lmdb(), (os.getpid(), os.path.realpath(path))
    if key not in _OPENED:
        for other in [old for old in _OPENED if old[1] == key[1]]:
            _OPENED.pop(other).close()  # the copy that a fork left here; its parent's stays
        try:
            _OPENED[key] = lmdb.open(
                key[1], subdir=path.is_dir(), readonly=True, lock=False, readahead=False
            )
        except (lmdb.Error, OSError) as error:
            raise DataError(
                f"{str(path)!r} is no readable LMDB database ({error}): give its folder or file"
            ) from error
    return _OPENED[key]


def _check_whole(path: Path, environment: Any) -> None:
    """A mapped file that is cut off would end the process at the first page that is missing."""
    file = path / "data.mdb" if path.is_dir() else path
    want = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    have = file.stat().st_size
    if have < want:
        raise DataError(f"{str(file)!r} has {have} bytes of {want}: it is cut off, fetch it again")


@dataclass(eq=False)
class LmdbImages(EncodedItems):
    """The images of the keys `names`, read when asked for.  `labels` is None without any."""

    path: Path
    names: Names
    labels: Tensor | None = None
    classes: tuple[str, ...] | None = None

    def encoded(self, i: int) -> bytes:
        """The value of key i.  Raises BadItem."""
        lmdb, name = _lmdb(), self.name(i)
        try:
            with _environment(self.path).begin() as transaction:
                value = transaction.get(os.fsencode(name))
        except lmdb.Error as error:
            raise BadItem(name, f"the database is damaged there ({error})") from error
        if value is None:
            raise BadItem(name, "the database has no such key any more")
        return value


def _keys(environment: Any, pattern: str) -> list[str]:
    """The keys that match, in order; those that begin with __ describe the database."""
    with environment.begin() as transaction:
        keys = map(os.fsdecode, transaction.cursor().iternext(keys=True, values=False))
        return [k for k in keys if fnmatch.fnmatchcase(k, pattern) and not k.startswith("__")]


def _texts(environment: Any, names: list[str], image: str, label: str) -> list[str]:
    """The value of each image's label key: what `*` stands for in the one, put into the other."""
    before, after = image.split("*")
    found = []
    with environment.begin() as transaction:
        for name in names:
            key = label.replace("*", name[len(before) : len(name) - len(after)])
            value = transaction.get(os.fsencode(key))
            if value is None or len(value) > 1000:
                raise DataError(f"key {name!r} has no label at {key!r}: mend label={label!r}")
            found.append(value.decode(errors="replace").strip())
    return found


def _numbered(texts: list[str]) -> tuple[Tensor, tuple[str, ...]]:
    """Labels and classes: sorted as numbers if all are, else as texts."""
    plain = all(text.isdecimal() for text in set(texts))
    classes = tuple(sorted(set(texts), key=(lambda t: (int(t), t)) if plain else None))
    number = {name: k for k, name in enumerate(classes)}
    return torch.tensor([number[text] for text in texts]), tuple(map(printable, classes))


class LmdbSource(SourceOptions):
    """Images in an LMDB database."""

    name: Literal["lmdb"] = Field(default="lmdb", description="which source this is")
    path: Annotated[Path, AfterValidator(absolute)] = Field(
        description="the database: a folder with data.mdb, or a file"
    )
    image: str = Field(default="*", description="keys of the images, with one * for what differs")
    label: str | None = Field(
        default=None,
        description="keys of the labels' texts, * as in the image's key; None: an image's class is "
        "what is before the first / of its key, if all have one",
    )

    def open(self) -> tuple[Source, ...]:
        for key in ("image", "label"):
            pattern = getattr(self, key)
            if pattern is not None and pattern.count("*") != 1:
                raise DataError(f"{key}={pattern!r} has not one *: such as image=image-*")
        environment = _environment(self.path)
        _check_whole(self.path, environment)
        try:
            names = _keys(environment, self.image.replace("[", "[[]").replace("?", "[?]"))
            texts = _texts(environment, names, self.image, self.label) if self.label else []
        except _lmdb().Error as error:
            raise DataError(
                f"{str(self.path)!r} is damaged ({error}): make or fetch it again"
            ) from error
        if not names:
            raise DataError(f"{str(self.path)!r} has no key like {self.image!r}: mend image=")
        labels = classes = None
        if self.label is not None:
            labels, classes = _numbered(texts)
        elif all("/" in name for name in names):
            labels, classes = _numbered([name.split("/", 1)[0] for name in names])
        return (LmdbImages(self.path, Names(names), labels, classes),)
