"""A timm VisionTransformer that embeds only the patches it is given.

    B images   L patches of p x p pixels   K visible ones   P prefix tokens (class, registers)
    E width    ids (B, K) int64: which patches are visible, in the order their tokens are wanted

Gathering comes before embedding: raw patches are read straight from pixels, so at a mask ratio of
75 % three quarters of the patch embedding are never computed.  The transformer's own parameters
are used in place: a checkpoint of `vit` is a plain timm checkpoint.
Source: He et al. 2022, Masked Autoencoders Are Scalable Vision Learners, arXiv:2111.06377, part 3.
"""

import torch
from timm.layers import PatchEmbed
from timm.models import checkpoint_seq
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from fastssl.kernels import gather_patches, gather_tokens


class MaskedViT(nn.Module):
    """Wraps `vit`; `forward(images, ids)` gives the normed tokens (B, P + K, E) of those patches.

    Exact: equal to embedding every patch, adding positions, then dropping the hidden ones.
    Raises ValueError for a model that is not a timm VisionTransformer with learned positions, a
    plain convolution as patch embedding and no tokens but class and registers, and for an image
    size that its patches do not fill.
    """

    def __init__(self, vit: nn.Module):
        super().__init__()
        if not isinstance(vit, VisionTransformer):
            raise ValueError(
                f"masked modelling needs a timm VisionTransformer (vit_* or deit*), "
                f"got {type(vit).__name__}"
            )
        if vit.pos_embed is None or vit.dynamic_img_size:
            raise ValueError("MaskedViT needs learned positions of a fixed image size")
        _check_embedding(vit)
        self.vit = vit

    @property
    def patch(self) -> tuple[int, int]:
        return self.vit.patch_embed.patch_size  # type: ignore[return-value]

    @property
    def num_patches(self) -> int:
        return self.vit.patch_embed.num_patches  # type: ignore[return-value]

    def forward(self, images: Tensor, ids: Tensor) -> Tensor:
        vit = self.vit
        x = self._embed(gather_patches(images, ids, self.patch))
        P = vit.num_prefix_tokens
        assert vit.pos_embed is not None
        pos = vit.pos_embed[0]
        prefix_pos, patch_pos = (None, pos) if vit.no_embed_class else (pos[:P], pos[P:])
        x = x + gather_tokens(patch_pos, ids)
        prefix: list[Tensor] = [t for t in (vit.cls_token, vit.reg_token) if t is not None]
        if prefix:
            tokens = torch.cat(prefix, 1)
            tokens = tokens if prefix_pos is None else tokens + prefix_pos
            x = torch.cat([tokens.expand(len(x), -1, -1), x], 1)
        x = vit.norm_pre(vit.pos_drop(x))
        if vit.grad_checkpointing:
            return vit.norm(checkpoint_seq(vit.blocks, x))
        return vit.norm(vit.blocks(x))

    def _embed(self, patches: Tensor) -> Tensor:
        """The convolution of `patch_embed` as a matrix: patches are in (h, w, c) order."""
        conv = self.vit.patch_embed.proj
        weight = conv.weight.permute(0, 2, 3, 1).flatten(1)  # type: ignore[union-attr, operator]
        x = nn.functional.linear(patches.to(weight.dtype), weight, conv.bias)  # type: ignore
        return self.vit.patch_embed.norm(x)  # type: ignore[operator]


def _check_embedding(vit: VisionTransformer) -> None:
    """Refuse patches and prefix tokens that `MaskedViT` would embed otherwise than `vit` does."""
    embed = vit.patch_embed
    prefix = sum(t.shape[1] for t in (vit.cls_token, vit.reg_token) if t is not None)
    if not isinstance(embed, PatchEmbed) or prefix != vit.num_prefix_tokens:
        raise ValueError(
            "MaskedViT needs a convolution as patch embedding and no tokens but class and "
            f"registers, got {type(vit).__name__} with {type(embed).__name__} and "
            f"{vit.num_prefix_tokens} prefix tokens, {prefix} of them class and registers"
        )
    size, patch = embed.img_size, embed.patch_size
    whole = tuple(g * p for g, p in zip(embed.grid_size or (), patch, strict=True))
    if size != whole:
        raise ValueError(f"patch size must divide the image size, got {patch} and {size}")
