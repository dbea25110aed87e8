"""A table of paths: a .csv file with a column of files for each stream, and perhaps one of labels.

    image,depth,label
    rgb/7.jpg,depth/7.png,cat

One column of files alone makes plain images.
"""

import csv
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, Field
from torch import Tensor

from fastssl.data.errors import DataError
from fastssl.data.sources.base import SourceOptions, absolute
from fastssl.data.sources.folder import FolderImages
from fastssl.data.sources.names import Names
from fastssl.data.sources.reading import Read, check_read, read_as
from fastssl.data.streams import Joined

_NAMED = 3  # lines that an error gives


def read_columns(path: Path) -> dict[str, list[str]]:
    """The cells of each column of a .csv file with a header; blank lines are passed over.

    Raises DataError, naming the line, for what is no table.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            lines = [(reader.line_num, row) for row in reader if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"cannot read the table {str(path)!r} ({reason}): mend it") from error
    if len(lines) < 2:
        raise DataError(f"the table {str(path)!r} has no rows below its header: add some")
    header = [name.strip() for name in lines.pop(0)[1]]
    if len(set(header)) < len(header) or not all(header):
        raise DataError(f"the header of {str(path)!r} must be names, each once: {header}")
    for number, row in lines:
        if len(row) != len(header):
            raise DataError(f"line {number} has {len(row)} cells, the header {len(header)}")
    return {name: [row[j].strip() for _, row in lines] for j, name in enumerate(header)}


def _labels(texts: list[str] | None) -> tuple[Tensor | None, tuple[str, ...] | None]:
    if texts is None:
        return None, None
    if "" in texts:
        raise DataError(
            f"{texts.count('')} cells of data.source.label are empty (row {texts.index('') + 1} "
            "...): give each a class, or no data.source.label"
        )
    classes = tuple(sorted(set(texts)))
    number = {name: k for k, name in enumerate(classes)}
    return torch.tensor([number[text] for text in texts]), classes


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
        labels, classes = _labels(None if self.label is None else table[self.label])
        parts: dict[str, Any] = {
            name: read_as(
                FolderImages(root, Names(cells), labels, classes),
                self.read.get(name, "color"),
                name,
            )
            for name, cells in columns.items()
        }
        return (Joined(parts) if len(parts) > 1 else parts[names[0]],)
