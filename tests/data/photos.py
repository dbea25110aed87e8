"""Images like photographs, drawn and kept as JPEG: smooth, with edges and some texture."""

import io
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

SHAPES = ((90, 120), (120, 90), (64, 64), (101, 77), (48, 160))


def photo(k: int, height: int, width: int) -> np.ndarray:
    """(height, width, 3) uint8."""
    g = torch.Generator().manual_seed(k)
    coarse = torch.rand(1, 3, 6, 6, generator=g)
    x = F.interpolate(coarse, size=(height, width), mode="bicubic")[0]
    yy, xx = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    disc = (yy - height * 0.4) ** 2 + (xx - width * 0.6) ** 2 < (min(height, width) * 0.25) ** 2
    x = torch.where(disc, 1 - x, x) + 0.03 * torch.randn(3, height, width, generator=g)
    return (255 * x.clamp(0, 1)).round().to(torch.uint8).permute(1, 2, 0).numpy()


def jpeg(pixels: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", **{"quality": 92, **options})
    return file.getvalue()


def folder(root: Path, count: int) -> Path:
    """`count` JPEG files of several shapes in two class folders."""
    for k in range(count):
        path = root / "ab"[k % 2] / f"{k:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(photo(k, *SHAPES[k % len(SHAPES)])))
    return root
