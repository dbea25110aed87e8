"""Tables: numeric rows, each column standardized by the training part.

    z_ij = (x_ij - mean_j) / deviation_j,   mean and (biased) deviation over the training rows

A missing cell (empty, or "nan") takes the training mean, which is 0.  A column that is constant in
training has deviation 1: it stays, as the difference from that constant.  A column without a value
in training cannot be standardized, and is refused.
"""

import csv
from copy import copy
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
import torch
from pydantic import AfterValidator, Field, model_validator
from torch import Tensor
from typing_extensions import Self

from fastssl.data.errors import DataError
from fastssl.data.sources.base import Items, Source, SourceOptions, absolute

Shipped = Literal["breast_cancer", "wine", "iris", "digits"]


class Table(Items):
    """Rows (N, F) float64, nan where a cell is missing, as float32 items (F,).

    mean, deviation: (F,), what items are standardized by; until `fitted` 0 and 1.
    """

    per_item = ("rows", "labels", "places")

    def __init__(
        self,
        rows: np.ndarray,
        columns: list[str],
        labels: Tensor | None = None,
        classes: tuple[str, ...] | None = None,
    ):
        self.rows, self.columns, self.labels, self.classes = rows, columns, labels, classes
        self.channels = rows.shape[1]
        self.places = np.arange(len(rows))  # in the whole table, for the names
        self.mean, self.deviation = np.zeros(self.channels), np.ones(self.channels)

    def item(self, i: int) -> Tensor:
        """Row i, float32 (F,)."""
        z = (self.rows[i] - self.mean) / self.deviation
        return torch.from_numpy(np.nan_to_num(z, nan=0.0).astype(np.float32))

    def name(self, i: int) -> str:
        return f"row {self.places[i] + 1}"

    def fitted(self, train: np.ndarray) -> "Table":
        """The same table, standardized by the rows `train` (int64).

        Raises DataError naming a column that has no value there.
        """
        rows = self.rows[train]
        seen = ~np.isnan(rows)
        count = seen.sum(0)
        if (count == 0).any():
            column = self.columns[int((count == 0).argmax())]
            raise DataError(f"column {column!r} has no value in the training rows: remove it")
        whole = copy(self)
        whole.mean = np.where(seen, rows, 0).sum(0) / count
        deviation = np.sqrt((np.where(seen, rows - whole.mean, 0) ** 2).sum(0) / count)
        constant = deviation <= 1e-9 * np.abs(whole.mean)  # what rounding leaves is no spread
        whole.deviation = np.where(constant | (deviation == 0), 1.0, deviation)
        return whole


def _shipped(name: str) -> Table:
    from sklearn import datasets  # a second to import, for this source alone

    found: Any = getattr(datasets, f"load_{name}")()
    labels = torch.from_numpy(found.target.astype(np.int64))
    classes = tuple(str(c) for c in found.target_names)
    columns = [str(c) for c in found.feature_names]
    return Table(np.asarray(found.data, np.float64), columns, labels, classes)


def _is_number(cell: str) -> bool:
    try:
        return bool(cell) and float(cell) is not None
    except ValueError:
        return False


def _number(cell: str, where: str) -> float:
    cell = cell.strip()
    try:
        value = float(cell or "nan")
    except ValueError:
        raise DataError(f"{where} holds {cell!r}, which is no number: encode it") from None
    if np.isinf(value):
        raise DataError(f"{where} holds {cell!r}: give a finite number, or leave it empty")
    return value


def read_lines(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The header of a .csv file, and its rows with the numbers of their lines; blank ones are
    passed over.  Raises DataError, naming the line, for what is no table.
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
    for number, row in lines:
        if len(row) != len(header):
            raise DataError(f"line {number} has {len(row)} cells, the header {len(header)}")
    return header, lines


def classes_of(texts: list[str]) -> tuple[Tensor, tuple[str, ...]]:
    """Numbers (N,) int64 of the sorted texts, and these.  Raises DataError for empty ones."""
    if "" in texts:
        raise DataError(
            f"{texts.count('')} cells of data.source.label are empty (row {texts.index('') + 1} "
            "...): give each a class, or no data.source.label"
        )
    classes = tuple(sorted(set(texts)))
    number = {name: k for k, name in enumerate(classes)}
    return torch.tensor([number[text] for text in texts]), classes


def read_csv(path: Path, label: str | None) -> Table:
    """A table from a .csv file with a header.  label: the column of classes, of any text.

    Classes are numbered by the sorted texts.  Blank lines are passed over.
    Raises DataError, naming the line and the column, for what is no table of numbers.
    """
    header, lines = read_lines(path)
    if all(map(_is_number, header)):
        raise DataError(
            f"the first line of the table {str(path)!r} is numbers, and no header: put a line with "
            "the columns' names above it"
        )
    if label is not None and label not in header:
        raise DataError(f"no column {label!r} for the labels; there are: {', '.join(header)}")
    at = None if label is None else header.index(label)
    kept = [j for j in range(len(header)) if j != at]
    if not kept:
        raise DataError(f"the table {str(path)!r} has no column but its labels: add some")
    rows = [[_number(row[j], f"line {n}, column {header[j]!r}") for j in kept] for n, row in lines]
    columns = [header[j] for j in kept]
    if at is None:
        return Table(np.array(rows), columns)
    return Table(np.array(rows), columns, *classes_of([row[at].strip() for _, row in lines]))


class TableSource(SourceOptions):
    """Rows of a numeric table: one that scikit-learn ships, or a .csv file."""

    name: Literal["table"] = Field(default="table", description="which source this is")
    dataset: Shipped | None = Field(
        default=None, description=f"a table of scikit-learn's: {', '.join(get_args(Shipped))}"
    )
    path: Annotated[Path | None, AfterValidator(lambda p: p and absolute(p))] = Field(
        default=None, description="a .csv file with a header, numbers in all columns but the label"
    )
    label: str | None = Field(
        default=None, description="its column of classes; without one there are no labels"
    )

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.dataset is None) == (self.path is None):
            raise ValueError(f"want dataset or path, got {self.dataset} and {self.path}")
        if self.label is not None and self.path is None:
            raise ValueError(f"label={self.label} is for a path: {self.dataset} has its own")
        return self

    def open(self) -> tuple[Source, ...]:
        if self.path is not None:
            return (read_csv(self.path, self.label),)
        return (_shipped(str(self.dataset)),)
