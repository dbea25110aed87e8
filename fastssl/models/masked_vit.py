"""A timm vision transformer that embeds only the patches it is given.

    B samples   L patches, row-major over the grid   K visible ones   E width
    P prefix tokens (class, registers)   ids (B, K) int64: which patches, in the order wanted

Gathering comes before embedding: raw patches are read straight from pixels, so at a mask ratio of
75 % three quarters of the patch embedding are never computed.  Absolute positions and rotary
angles are gathered by the same ids.  The transformer's own parameters are used in place: a
checkpoint of `vit` is a plain timm checkpoint.  With `vit.dynamic_img_size` images may have any
sides that patches fill: positions are interpolated to their grid, as timm does it, then gathered.
Memory: the K patches and tokens; never all L of them.
Source: He et al. 2022, Masked Autoencoders Are Scalable Vision Learners, arXiv:2111.06377, part 3;
rotary positions, Heo et al. 2024, RoPE-ViT, arXiv:2403.13298.
"""

from math import prod
from typing import Any

import torch
from timm.layers import PatchEmbed, resample_abs_pos_embed
from timm.models import checkpoint, checkpoint_seq
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from fastssl.kernels import gather_patches, gather_tokens

from .patch_embed import PatchEmbed1d, PatchEmbed3d

_CONVOLUTIONS = {PatchEmbed: nn.Conv2d, PatchEmbed1d: nn.Conv1d, PatchEmbed3d: nn.Conv3d}


class MaskedViT(nn.Module):
    """Wraps `vit`; `forward(images, ids)` gives the normed tokens (B, P + K, E) of those patches.

    vit: timm's VisionTransformer (vit_*, deit*, this package's vit_video and vit_signal) or Eva
    (eva*, vit_*_rope_*, vit_*_dinov3), of images, clips or signals.
    Exact: equal to embedding every patch, adding positions, then dropping the hidden ones, under
    the norm that ends `vit.forward_features` (none where a model norms after pooling).  Noise of
    timm's own in training (dropout, drop path, jittered rotary coordinates) stays as timm draws it.
    Raises ValueError for a model that would not be exact: other classes, no positions, an
    embedding that is not one plain convolution, tokens but class and registers, patches dropped by
    the model itself, and an image size that its patches do not fill.
    """

    def __init__(self, vit: nn.Module):
        super().__init__()
        if not isinstance(vit, VisionTransformer | Eva):
            raise ValueError(
                f"masked modeling needs a timm VisionTransformer (vit_* or deit*) or Eva, "
                f"got {type(vit).__name__}"
            )
        if vit.pos_embed is None and getattr(vit, "rope", None) is None:
            raise ValueError("MaskedViT needs learned positions, or rotary")
        _check_embedding(vit)
        self.vit = vit

    @property
    def patch(self) -> tuple[int, ...]:
        """Sides of a patch: (h, w), (t, h, w) or (w,)."""
        return self.vit.patch_embed.patch_size  # type: ignore[return-value]

    @property
    def grid(self) -> tuple[int, ...]:
        """How many patches along each side, of the images it was made for."""
        return self.vit.patch_embed.grid_size  # type: ignore[return-value]

    def grid_of(self, images: Tensor) -> tuple[int, ...]:
        """How many patches of images (B, C, *S) lie along each side.

        Raises ValueError for images of other channels or sides than the model's.
        """
        embed: Any = self.vit.patch_embed
        channels, sides = embed.proj.in_channels, tuple(images.shape[2:])
        if self.vit.dynamic_img_size:
            whole = all(s and s % p == 0 for s, p in zip(sides, self.patch, strict=False))
            fits = whole and len(sides) == len(self.patch)
            want = f"(B, {channels}, h, w) with multiples of {self.patch}"
        else:
            fits = sides == embed.img_size
            want = f"(B, {', '.join(map(str, (channels, *embed.img_size)))})"
        if images.shape[1] != channels or not fits:
            raise ValueError(f"images must be {want}, got {tuple(images.shape)}")
        return tuple(s // p for s, p in zip(sides, self.patch, strict=True))

    @property
    def num_patches(self) -> int:
        """L."""
        return self.vit.patch_embed.num_patches  # type: ignore[return-value]

    @property
    def width(self) -> int:
        """E."""
        return self.vit.embed_dim  # type: ignore[return-value]

    @property
    def prefix(self) -> int:
        """P."""
        return self.vit.num_prefix_tokens  # type: ignore[return-value]

    def forward(self, images: Tensor, ids: Tensor | None = None) -> Tensor:
        """`encode(tokens(images, ids), ids)` of the images' grid: (B, P + K, E)."""
        grid = self.grid_of(_pixels(images))
        return self.encode(self.tokens(images, ids), ids, grid)

    def tokens(self, images: Tensor, ids: Tensor | None = None) -> Tensor:
        """The chosen patches embedded, without positions: (B, K, E), in the weights' dtype.

        images (B, C, *S), any strides, float or integer, or `Normalized`; ids None: all patches.
        Raises ValueError for images of other channels or sides than the model's, and bad ids.
        """
        pixels = _pixels(images)
        embed: Any = self.vit.patch_embed
        conv, grid = embed.proj, self.grid_of(pixels)
        if ids is None:
            ids = torch.arange(prod(grid), device=pixels.device).expand(len(pixels), -1)
        # As a matrix, the convolution reads patches in their order: sides, then channel.
        weight = conv.weight.movedim(1, -1).flatten(1)
        patches = gather_patches(images, ids, self.patch, dtype=weight.dtype)
        x = nn.functional.linear(patches, weight, conv.bias)
        return embed.norm(x)

    def encode(
        self, tokens: Tensor, ids: Tensor | None = None, grid: tuple[int, ...] | None = None
    ) -> Tensor:
        """The transformer on embedded patches: positions, prefix tokens, blocks, final norm.

        tokens (B, K, E) of the places ids (B, K), or of all L in order with ids None; they need
        not be `tokens`' own (mask tokens, say).  grid: in which the places lie (`grid_of`); None:
        the model's own.  Returns (B, P + K, E).
        Raises ValueError for tokens without ids that are not L, and for another grid than the
        model's where its positions are not to be interpolated.
        """
        vit: Any = self.vit
        grid = self.grid if grid is None else grid
        if grid != self.grid and not vit.dynamic_img_size:
            raise ValueError(f"positions are of a grid {self.grid}, got {grid}: dynamic_img_size")
        if ids is None and tokens.shape[1] != prod(grid):
            raise ValueError(f"want {prod(grid)} tokens without ids, got {tokens.shape[1]}")
        x = vit.norm_pre(vit.pos_drop(self._with_prefix(tokens, ids, grid)))
        if isinstance(vit, Eva):
            x = self._rotary_blocks(x, ids, grid)
        elif vit.grad_checkpointing:
            x = checkpoint_seq(vit.blocks, x)
        else:
            x = vit.blocks(x)
        return vit.norm(x)

    def _with_prefix(self, x: Tensor, ids: Tensor | None, grid: tuple[int, ...]) -> Tensor:
        """Tokens with their positions, behind class token and registers with theirs."""
        vit: Any = self.vit
        P, pos = self.prefix, vit.pos_embed
        if pos is not None and grid != self.grid:
            kept = 0 if vit.no_embed_class else P
            pos = resample_abs_pos_embed(pos, list(grid), list(self.grid), num_prefix_tokens=kept)
        pos = None if pos is None else pos[0]
        own = None if pos is None or vit.no_embed_class else pos[:P]
        if pos is not None:
            places = pos if own is None else pos[P:]
            x = x + (places if ids is None else gather_tokens(places, ids))
        prefix = [t for t in (vit.cls_token, vit.reg_token) if t is not None]
        if not prefix:
            return x
        first = torch.cat(prefix, 1)
        first = first if own is None else first + own
        return torch.cat([first.expand(len(x), -1, -1), x], 1)

    def _rotary_blocks(self, x: Tensor, ids: Tensor | None, grid: tuple[int, ...]) -> Tensor:
        """Eva's blocks, each with its rotary angles of the chosen places."""
        vit: Any = self.vit
        rope = vit.rope
        angles: Any = None
        if rope is not None:
            # timm's rule: those of one size keep their angles, others are asked for a grid
            kept = hasattr(rope, "feat_shape") and not vit.dynamic_img_size
            angles = rope.get_embed() if kept else rope.get_embed(shape=grid)
            if not vit.rope_mixed:
                angles = _gathered(angles, ids)
        for i, block in enumerate(vit.blocks):
            turn = _gathered(angles[i], ids) if vit.rope_mixed else angles
            x = checkpoint(block, x, rope=turn) if vit.grad_checkpointing else block(x, rope=turn)
        return x


def _pixels(images: Any) -> Tensor:
    return images if isinstance(images, Tensor) else images.images  # of `Normalized`


def _gathered(angles: Tensor, ids: Tensor | None) -> Tensor:
    """Angles (L, D), or (heads, L, D), of chosen places: (B, 1 or heads, K, D)."""
    if ids is None:
        return angles
    if angles.ndim == 2:
        return gather_tokens(angles, ids)[:, None]
    by_place = gather_tokens(angles.transpose(0, 1).flatten(1), ids)
    return by_place.unflatten(2, (len(angles), -1)).transpose(1, 2)


def _check_embedding(vit: VisionTransformer | Eva) -> None:
    """Refuse patches and prefix tokens that `MaskedViT` would embed otherwise than `vit` does."""
    embed: Any = vit.patch_embed
    prefix = sum(t.shape[1] for t in (vit.cls_token, vit.reg_token) if t is not None)
    if type(embed) not in _CONVOLUTIONS or prefix != vit.num_prefix_tokens:
        raise ValueError(
            "MaskedViT needs a convolution as patch embedding and no tokens but class and "
            f"registers, got {type(vit).__name__} with {type(embed).__name__} and "
            f"{vit.num_prefix_tokens} prefix tokens, {prefix} of them class and registers"
        )
    size, patch = embed.img_size, tuple(embed.patch_size)
    conv, kind = embed.proj, _CONVOLUTIONS[type(embed)]
    still = dict(kernel_size=patch, stride=patch, groups=1, dilation=(1,) * len(patch))
    padded = any(conv.padding) if isinstance(conv.padding, tuple) else conv.padding != "valid"
    if type(conv) is not kind or padded or any(getattr(conv, k) != v for k, v in still.items()):
        raise ValueError(f"MaskedViT needs a convolution of stride and kernel {patch}, got {conv}")
    if not isinstance(vit.patch_drop, nn.Identity | None):
        raise ValueError("MaskedViT chooses the patches: patch_drop_rate must be 0")
    whole = tuple(g * p for g, p in zip(embed.grid_size or (), patch, strict=True))
    if size != whole:
        raise ValueError(f"patch size must divide the image size, got {patch} and {size}")
