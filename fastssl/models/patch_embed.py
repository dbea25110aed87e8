"""Patches of clips and signals for timm's VisionTransformer, and positions of n-D grids.

    C channels   S sides of a sample: (W,) of a signal, (T, H, W) of a clip
    E width      L = prod(S / patch) places, row-major over the grid

`PatchEmbed1d` and `PatchEmbed3d` are what timm's `PatchEmbed` is to images: one convolution whose
stride is its kernel.  `vit_signal` and `vit_video` are registered with timm, so that
`timm.create_model` and a recipe's `model.name` find them.
Source: tubelets, Arnab et al. 2021, ViViT, arXiv:2103.15691, section 3.2; Tong et al. 2022,
VideoMAE, arXiv:2203.12602.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from .backbones import register_model

__all__: list[str] = []  # timm adds the models it registers

Sides = int | Sequence[int]


class _PatchEmbed(nn.Module):
    """A convolution of stride = kernel = patch: (B, C, *S) -> (B, L, E).

    img_size, patch_size: sides, one number meaning all of them.  The other arguments, and the
    attributes, are those of timm's PatchEmbed.
    Raises ValueError for a patch that does not divide the sides, and for inputs of other sides.
    """

    conv: type[nn.Module]
    dims: int

    def __init__(
        self,
        img_size: Sides,
        patch_size: Sides,
        in_chans: int = 3,
        embed_dim: int = 768,
        norm_layer: Callable[..., nn.Module] | None = None,
        bias: bool = True,
        **other: Any,
    ):
        super().__init__()
        placed = {k: other.pop(k, None) for k in ("device", "dtype")}
        if any(other.values()) and other != {"strict_img_size": True}:
            raise ValueError(f"{type(self).__name__} takes one size, in one layout, got {other}")
        self.img_size = _sides(img_size, self.dims, "img_size")
        self.patch_size = _sides(patch_size, self.dims, "patch_size")
        if any(s % p for s, p in zip(self.img_size, self.patch_size, strict=True)):
            got = f"{self.patch_size} and {self.img_size}"
            raise ValueError(f"patch_size must divide img_size, got {got}")
        self.grid_size = tuple(s // p for s, p in zip(self.img_size, self.patch_size, strict=True))
        self.num_patches = prod(self.grid_size)
        self.flatten, self.strict_img_size, self.dynamic_img_pad = True, True, False
        patch = self.patch_size
        self.proj = self.conv(in_chans, embed_dim, patch, stride=patch, bias=bias, **placed)
        self.norm = norm_layer(embed_dim, **placed) if norm_layer else nn.Identity()

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, ...]:
        return max(self.patch_size) if as_scalar else self.patch_size

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2:] != self.img_size:
            raise ValueError(f"want sides {self.img_size}, got {tuple(x.shape[2:])}")
        return self.norm(self.proj(x).flatten(2).transpose(1, 2))


class PatchEmbed1d(_PatchEmbed):
    """Patches of signals (B, C, W): timm's `PatchEmbed` along one side.

    >>> PatchEmbed1d(img_size=12, patch_size=4, in_chans=2, embed_dim=8)(torch.ones(5, 2, 12)).shape
    torch.Size([5, 3, 8])
    """

    conv, dims = nn.Conv1d, 1


class PatchEmbed3d(_PatchEmbed):
    """Tubelets of clips (B, C, T, H, W): timm's `PatchEmbed` over frames and pixels.

    >>> embed = PatchEmbed3d(img_size=(4, 8, 8), patch_size=(2, 4, 4), in_chans=1, embed_dim=8)
    >>> embed(torch.ones(5, 1, 4, 8, 8)).shape
    torch.Size([5, 8, 8])
    """

    conv, dims = nn.Conv3d, 3


def _sides(size: Sides, dims: int, name: str) -> tuple[int, ...]:
    sides = (size,) * dims if isinstance(size, int) else tuple(size)
    if len(sides) != dims or min(sides) < 1:
        raise ValueError(f"{name} must be {dims} sides of at least 1, got {size}")
    return sides


def sincos_positions(grid: Sequence[int], dim: int) -> Tensor:
    """Fixed positions of a grid: (L, dim) float32, row-major.

    Each of the n sides has dim / 2n frequencies w_i = 10000^(-i / (dim / 2n)) and as features the
    sines, then the cosines, of coordinate * w; sides follow one another.  What dim / 2n leaves
    over is 0.
    Raises ValueError for sides below 1 and a dim below 2n.
    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.5, a block of features a side as in
    He et al. 2022, MAE, arXiv:2111.06377.

    >>> sincos_positions((2, 3), 9)[5].tolist()[4:8]  # column 2: sin 2, sin 0.02, cos 2, cos 0.02
    [0.9092974066734314, 0.019998665899038315, -0.416146844625473, 0.9998000264167786]
    """
    n = dim // (2 * max(len(grid), 1))
    if not grid or min(grid) < 1 or n < 1:
        raise ValueError(f"want sides of at least 1 and dim >= 2 a side, got {grid} and {dim}")
    frequencies = 10000.0 ** (-torch.arange(n, dtype=torch.float64) / n)
    axes = [torch.arange(side, dtype=torch.float64) for side in grid]
    features = []
    for coordinate in torch.meshgrid(*axes, indexing="ij"):
        angles = coordinate.reshape(-1, 1) * frequencies
        features += [angles.sin(), angles.cos()]
    joined = torch.cat(features, 1)
    return nn.functional.pad(joined, (0, dim - joined.shape[1])).float()


def _transformer(embed: type[_PatchEmbed], pretrained: bool, positions: str, arguments: Any):
    """timm's VisionTransformer over `embed`, with learned or fixed positions."""
    if pretrained:
        raise ValueError("there are no pretrained weights of this model")
    if positions not in ("learned", "sincos"):
        raise ValueError(f"positions must be 'learned' or 'sincos', got {positions!r}")
    model = VisionTransformer(embed_layer=embed, **arguments)
    if positions == "sincos" and model.pos_embed is not None:
        model.pos_embed.requires_grad_(False).zero_()
        fixed = sincos_positions(model.patch_embed.grid_size, model.embed_dim)  # type: ignore
        model.pos_embed.data[0, -len(fixed) :] = fixed  # prefix tokens have none
    return model


@register_model(lambda shape: {"in_chans": shape[0], "img_size": shape[1:]})
def vit_video(
    pretrained: bool = False, positions: str = "sincos", tubelet: int = 2, **kwargs: Any
) -> VisionTransformer:
    """A ViT-S over tubelets of clips (B, C, T, H, W), as VideoMAE's encoder.

    img_size: (T, H, W), or (T, side).  patch_size: (t, h, w), or a side of pixels, then of
    `tubelet` frames.  positions: "sincos" (fixed) or "learned".  The rest: timm's
    VisionTransformer (embed_dim 384, depth 12, num_heads 6 if not given).
    Raises ValueError for patches that do not divide the clip, and pretrained.
    """
    size, patch = kwargs.pop("img_size", (16, 224)), kwargs.pop("patch_size", 16)
    size = (*size, size[-1]) if not isinstance(size, int) and len(size) == 2 else size
    patch = (tubelet, patch, patch) if isinstance(patch, int) else patch
    shape = {"img_size": size, "patch_size": patch, "embed_dim": 384, "depth": 12, "num_heads": 6}
    return _transformer(PatchEmbed3d, pretrained, positions, {**shape, **kwargs})


@register_model(lambda shape: {"in_chans": shape[0], "img_size": shape[1:]})
def vit_signal(
    pretrained: bool = False, positions: str = "sincos", **kwargs: Any
) -> VisionTransformer:
    """A ViT-Ti over patches of signals (B, C, W): sound, sensors, series.

    img_size: W, or (W,); patch_size: samples a patch (16 if not given).  positions: "sincos"
    (fixed) or "learned".  The rest: timm's VisionTransformer (embed_dim 192, depth 12, num_heads 3
    if not given).
    Raises ValueError for patches that do not divide the signal, and pretrained.
    """
    shape = {"img_size": 1024, "patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 3}
    return _transformer(PatchEmbed1d, pretrained, positions, {**shape, **kwargs})
