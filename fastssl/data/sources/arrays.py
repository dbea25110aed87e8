"""Images held as arrays."""

import numpy as np
import torch
from torch import Tensor


class ArrayImages:
    """Images held in memory, uint8 (N, C, H, W)."""

    def __init__(self, pixels: Tensor, labels: Tensor, classes: tuple[str, ...], names: list[str]):
        self.pixels, self.labels, self.classes, self._names = pixels, labels, classes, names
        self.channels = pixels.shape[1]

    def __len__(self) -> int:
        return len(self.pixels)

    def item(self, i: int) -> Tensor:
        return self.pixels[i]

    def name(self, i: int) -> str:
        return self._names[i]

    def select(self, indices: np.ndarray) -> "ArrayImages":
        at = torch.from_numpy(indices)
        names = [self._names[i] for i in indices.tolist()]
        return ArrayImages(self.pixels[at], self.labels[at], self.classes, names)
