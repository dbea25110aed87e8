"""Images turned by quarters, for methods that tell how an image lies."""

import torch
from torch import Tensor


def quarter_turns(images: Tensor) -> Tensor:
    """Images (B, ..., S, S) turned by 0 to 3 quarters: (B, 4, ..., S, S).

    Raises ValueError for images that are not square.

    >>> quarter_turns(torch.tensor([[[1, 2], [3, 4]]]))[0, 1].tolist()
    [[2, 4], [1, 3]]
    """
    if images.shape[-1] != images.shape[-2]:
        raise ValueError(f"turned images must be square, got {tuple(images.shape[-2:])}")
    return torch.stack([torch.rot90(images, k, (-2, -1)) for k in range(4)], 1)
