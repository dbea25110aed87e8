"""scikit-learn's 1,797 handwritten digits, 8 x 8 gray: real data, no download."""

from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field

from fastssl.data.sources.arrays import ArrayImages
from fastssl.data.sources.base import Source, SourceOptions


class DigitsSource(SourceOptions):
    """scikit-learn's handwritten digits."""

    name: Literal["digits"] = Field(default="digits", description="which source this is")

    def open(self) -> tuple[Source, ...]:
        return (_digits(),)


def _digits() -> ArrayImages:
    from sklearn.datasets import load_digits  # a second to import, for this source alone

    found: Any = load_digits()
    pixels = torch.from_numpy((found.images * (255 / 16)).round().astype(np.uint8))[:, None]
    names = [f"digits/{i}" for i in range(len(pixels))]
    labels = torch.from_numpy(found.target.astype(np.int64))
    return ArrayImages(pixels, labels, tuple(str(d) for d in range(10)), names)
