"""Images in a data set of Hugging Face's `datasets` on the local disk; nothing is downloaded.

A folder is what `save_to_disk` wrote; else one with .parquet files; else one with images and
perhaps a metadata file, which `datasets` calls an imagefolder.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import AfterValidator, Field
from torch import Tensor

from fastssl.data.errors import BadItem, DataError
from fastssl.data.sources.base import Source, SourceOptions, absolute, needed
from fastssl.data.sources.decode import EncodedItems, of_the_machine, read_bytes
from fastssl.data.sources.records import MOST_CLASSES
from fastssl.data.sources.webdataset import TESTS

_datasets = partial(needed, "datasets", "hf_datasets")


@dataclass(eq=False)
class HubImages(EncodedItems):
    """Rows `at` (int64) of a datasets.Dataset whose images stay encoded."""

    rows: Any
    column: str
    title: str
    at: np.ndarray
    labels: Tensor | None = None
    classes: tuple[str, ...] | None = None
    per_item = ("at", "labels")

    def name(self, i: int) -> str:
        """The split and the row of image i."""
        return f"{self.title}/{int(self.at[i])}"

    def encoded(self, i: int) -> bytes:
        """The bytes of image i as stored.  Raises BadItem."""
        name = self.name(i)
        try:
            value = self.rows[int(self.at[i])][self.column]
        except Exception as error:  # a damaged table leads its reader anywhere
            if of_the_machine(error):
                raise
            reason = " ".join(str(error).split()) or type(error).__name__
            raise BadItem(name, f"its row cannot be read ({reason})") from error
        if value is None:
            raise BadItem(name, "its row has no image")
        if value["bytes"] is not None:
            return value["bytes"]
        return read_bytes(Path(value["path"]), name)


def _loaded(path: Path, cache: Path | None) -> dict[str, Any]:
    """The data set's splits.  Raises DataError."""
    datasets = _datasets()
    if not path.exists():
        raise DataError(f"folder {str(path)!r} does not exist: give that of a data set")
    saved = any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json"))
    try:
        if saved:
            found = datasets.load_from_disk(str(path))
        else:
            parquet = path.suffix == ".parquet" or any(path.rglob("*.parquet"))
            where = {"data_files": str(path)} if path.is_file() else {"data_dir": str(path)}
            found = datasets.load_dataset(
                "parquet" if parquet else "imagefolder", cache_dir=cache and str(cache), **where
            )
    except Exception as error:  # its readers raise what their libraries do
        if of_the_machine(error):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{str(path)!r} is no data set that can be read ({reason})") from error
    return dict(found) if isinstance(found, dict) else {"train": found}


def _image_column(rows: Any, column: str) -> Any:
    """The rows with undecoded images.  Raises DataError where `column` is not of images."""
    datasets = _datasets()
    feature = rows.features.get(column)
    if isinstance(feature, datasets.Value) and "binary" in feature.dtype:
        rows = rows.cast_column(column, datasets.Image())
    elif not isinstance(feature, datasets.Image):
        known = ", ".join(f"{name} ({kind})" for name, kind in rows.features.items())
        raise DataError(f"column image={column!r} has no images; the columns are {known}")
    return rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))


def _labels(splits: list[Any], column: str) -> tuple[list[np.ndarray], tuple[str, ...]] | None:
    """Labels (N,) of each split and the names they stand for; None where a split has none."""
    features = [rows.features.get(column) for rows in splits]
    if None in features:
        return None
    found = [list(rows.select_columns([column]).with_format(None)[:][column]) for rows in splits]
    if any(all(value in (None, -1) for value in values) for values in found):  # -1: not published
        return None
    kinds = {type(value) for values in found for value in values}
    if type(None) in kinds:
        lost = sum(value is None for values in found for value in values)
        raise DataError(
            f"column label={column!r} is null in {lost} rows, and not in others: give them labels, "
            "leave the rows out, or set data.source.labels=false to use none"
        )
    if not kinds <= {int, str}:
        raise DataError(f"column label={column!r} is {features[0]}: want whole numbers or texts")
    names = getattr(features[0], "names", None)
    if str in kinds:
        found = [list(map(str, values)) for values in found]
        names = sorted(set().union(*found))
        number = {name: k for k, name in enumerate(names)}
        found = [[number[value] for value in values] for values in found]
    numbers = [np.array(values, np.int64) for values in found]
    low, high = (int(f([f(values) for values in numbers])) for f in (np.min, np.max))
    if low < 0 or high >= MOST_CLASSES:
        raise DataError(
            f"column label={column!r} goes from {low} to {high}: want 0 to {MOST_CLASSES - 1}; "
            "labels=false uses none"
        )
    return numbers, tuple(names or map(str, range(high + 1)))


class HFDatasetsSource(SourceOptions):
    """A data set of Hugging Face's `datasets` on the local disk."""

    name: Literal["hf_datasets"] = Field(default="hf_datasets", description="which source this is")
    path: Annotated[Path, AfterValidator(absolute)] = Field(
        description="what save_to_disk wrote, or a folder with .parquet files, or of images"
    )
    image: str = Field(default="image", description="column of the images")
    label: str = Field(default="label", description="column of the labels, if there is one")
    labels: bool = Field(default=True, description="whether to read labels")
    cache: Path | None = Field(
        default=None, description="where `datasets` keeps what it converts; None: its own place"
    )

    def open(self) -> tuple[Source, ...]:
        splits = _loaded(self.path, self.cache)
        train = "train" if "train" in splits else next(iter(splits))
        test = next((name for name in TESTS if name in splits and name != train), None)
        chosen = [train] if test is None else [train, test]
        labeled = _labels([splits[n] for n in chosen], self.label) if self.labels else None
        numbers, classes = labeled or ([None] * len(chosen), None)
        sources = []
        for name, own in zip(chosen, numbers, strict=True):
            rows = _image_column(splits[name], self.image)
            labels = None if own is None else torch.from_numpy(own)
            at = np.arange(len(rows))
            sources.append(HubImages(rows, self.image, name, at, labels, classes))
        return tuple(sources)
