"""A table of paths: a .csv file with a column of files for each stream, and perhaps one of labels.

    image,depth,label
    rgb/7.jpg,depth/7.png,cat

One column of files alone makes plain images.
"""

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from fastssl.data.errors import DataError
from fastssl.data.sources.base import SourceOptions, absolute
from fastssl.data.sources.folder import FolderImages
from fastssl.data.sources.names import Names
from fastssl.data.sources.reading import Read, check_read, read_as
from fastssl.data.sources.tables import classes_of, read_lines
from fastssl.data.streams import Joined

_NAMED = 3  # lines that an error gives


def read_columns(path: Path) -> dict[str, list[str]]:
    """The cells of each column of a .csv file with a header.  Raises DataError."""
    header, lines = read_lines(path)
    if len(set(header)) < len(header) or not all(header):
        raise DataError(f"the header of {str(path)!r} must be names, each once: {header}")
    return {name: [row[j].strip() for _, row in lines] for j, name in enumerate(header)}


def _check_files(root: Path, columns: dict[str, list[str]]) -> None:
    """Raise DataError for files that are not there, of which it counts all and gives some."""
    lost = [
        f"{cell!r} of {name}" if cell else f"an empty cell of {name}, row {i + 1}"
        for name, cells in columns.items()
        for i, cell in enumerate(cells)
        if not cell or not os.path.isfile(root / cell)
    ]
    if lost:
        raise DataError(
            f"{len(lost)} files of the table are not below {str(root)!r} "
            f"({'; '.join(lost[:_NAMED])}{' ...' * (len(lost) > _NAMED)}): mend the paths, or set "
            "data.source.root; a column of classes is data.source.label"
        )


class PathsSource(SourceOptions):
    """A .csv file with a column of files for each stream."""

    name: Literal["paths"] = Field(default="paths", description="which source this is")
    path: Annotated[Path, AfterValidator(absolute)] = Field(description="a .csv file with a header")
    root: Annotated[Path | None, AfterValidator(lambda p: p and absolute(p))] = Field(
        default=None, description="the folder that its paths start from; none: its own"
    )
    columns: tuple[str, ...] = Field(
        default=(), description="its columns of files, one a stream; none named: all but the label"
    )
    label: str | None = Field(
        default=None, description="its column of classes; without one there are no labels"
    )
    read: dict[str, Read] = Field(
        default={}, description="by stream: color, gray, or values (float32, units of their own)"
    )

    def open(self) -> tuple[Any, ...]:
        table = read_columns(self.path)
        for name in (*self.columns, *filter(None, [self.label])):
            if name not in table:
                known = ", ".join(table)
                raise DataError(f"{str(self.path)!r} has no column {name!r}: there are {known}")
        names = self.columns or tuple(name for name in table if name != self.label)
        if not names:
            raise DataError(f"{str(self.path)!r} has no column but its labels: add one of files")
        columns = {name: table[name] for name in names}
        check_read(self.read, columns)
        root = self.root or self.path.parent
        _check_files(root, columns)
        labels, classes = (None, None) if self.label is None else classes_of(table[self.label])
        parts: dict[str, Any] = {
            name: read_as(
                FolderImages(root, Names(cells), labels, classes),
                self.read.get(name, "color"),
                name,
            )
            for name, cells in columns.items()
        }
        return (Joined(parts) if len(parts) > 1 else parts[names[0]],)
