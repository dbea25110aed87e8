"""Masked patches replaced in the image itself, for methods whose encoder sees every place.

    B images   M hidden patches of P = prod(patch) C values, a patch's sides first, channel last

Only hidden patches are drawn and written: a hashed word makes two normal numbers or eight bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import pi, prod

import torch
from torch import Tensor

from .places import Masking, below, words

_KINDS = ("noise", "zeros", "swap", "mixed")


def _normal(seeds: Tensor, count: int) -> Tensor:
    """(B, count) standard normal float32 of each seed, by Box and Muller's transform."""
    draws = words(seeds, -(-count // 2), 15)
    high = ((draws >> 40 & 0xFFFFFF).float() + 0.5) * 2.0**-24
    angle = (draws & 0xFFFFFF).float() * (2 * pi * 2.0**-24)
    radius = (-2 * high.log()).sqrt()
    return torch.cat([radius * angle.cos(), radius * angle.sin()], 1)[:, :count]


def _bytes(seeds: Tensor, count: int) -> Tensor:
    """(B, count) int64 of each seed, uniform on 0..255."""
    draws = words(seeds, -(-count // 8), 15)
    shifts = torch.arange(0, 64, 8, device=seeds.device)
    return (draws[..., None] >> shifts & 0xFF).flatten(1)[:, :count]


def corrupt(
    images: Tensor, seeds: Tensor, masking: Masking, patch: int | Sequence[int], kind: str = "noise"
) -> Tensor:
    """The images with the patches of `masking.masked` replaced: a new tensor like `images`.

    kind: "noise" (standard normal; of uint8 images uniform on 0..255), "zeros", "swap" (the same
    place of the batch's next image, the last taking from the first) or "mixed" (one of the three,
    equally likely, a patch).  Noise and draws depend on the sample's seed and mask alone; a
    swapped patch also on its neighbor, which is one of this rank's batch.
    images (B, C, *S): float or uint8, 1 to 3 sides; patch: a side or one each, dividing S.
    Raises ValueError for shapes that do not fit, an unknown kind, and swaps in a batch of one.
    Source: Atito et al. 2022, GMML, arXiv:2205.14986, section 3; 2021, SiT, arXiv:2104.03602.

    >>> mask = Masking(torch.tensor([[0]]), torch.tensor([[1]]), torch.tensor([[0, 1]]))
    >>> corrupt(torch.ones(1, 1, 4), torch.tensor([7]), mask, 2, "zeros").tolist()
    [[[1.0, 1.0, 0.0, 0.0]]]
    """
    sides = images.shape[2:]
    sizes = (patch,) * len(sides) if isinstance(patch, int) else tuple(patch)
    fits = 1 <= len(sides) == len(sizes) <= 3 and min(sizes) > 0
    if not fits or any(s % p for p, s in zip(sizes, sides, strict=True)):
        raise ValueError(f"patch must divide the images' sides {tuple(sides)}, got {patch}")
    grid = [s // p for p, s in zip(sizes, sides, strict=True)]
    if masking.restore.shape != (len(images), prod(grid)):
        got = tuple(masking.restore.shape)
        raise ValueError(f"masking must be of {(len(images), prod(grid))} places, got {got}")
    if kind not in _KINDS:
        raise ValueError(f"kind must be one of {_KINDS}, got {kind!r}")
    if kind in ("swap", "mixed") and len(images) < 2:
        raise ValueError(f"kind={kind!r} takes patches from another image, got a batch of 1")
    out = images.clone()
    cells, ids = _cells(out, sizes), masking.masked
    here = _where(ids, grid)
    cells[here] = _filling(kind, seeds, _cells(images, sizes), here)
    return out


def _where(ids: Tensor, grid: Sequence[int]) -> tuple[Tensor, ...]:
    """Index of image and of grid place along each side: (B, 1) and (B, M) tensors."""
    places, left = [], ids
    for side in reversed(grid):
        places.append(left % side)
        left = left.div(side, rounding_mode="floor")
    return torch.arange(len(ids), device=ids.device)[:, None], *reversed(places)


def _filling(kind: str, seeds: Tensor, cells: Tensor, here: tuple[Tensor, ...]) -> Tensor:
    """What hidden patches become: (B, M, *patch, C) or a number, in the images' dtype."""
    image, *places = here
    if kind == "zeros":
        return cells.new_zeros(())
    if kind == "swap":
        return cells[((image + 1) % len(cells), *places)]
    B, M, shape = len(cells), places[0].shape[1], cells.shape[-1 - len(places) :]
    draw = _normal if cells.is_floating_point() else _bytes
    noise = draw(seeds, M * prod(shape)).view(B, M, *shape).to(cells.dtype)
    if kind == "noise":
        return noise
    drawn = below(words(seeds, M, 16), 3).view(B, M, *[1] * len(shape))
    swapped = _filling("swap", seeds, cells, here)
    return torch.where(drawn == 0, noise, torch.where(drawn == 1, 0, swapped))


def _cells(images: Tensor, sizes: Sequence[int]) -> Tensor:
    """(B, C, *S) as (B, *grid, *patch, C), a view whatever the strides."""
    n = len(sizes)
    for d, size in enumerate(sizes):
        images = images.unflatten(2 + 2 * d, (-1, size))
    return images.permute(0, *range(2, 2 + 2 * n, 2), *range(3, 3 + 2 * n, 2), 1)
