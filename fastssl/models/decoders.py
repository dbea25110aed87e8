"""Light transformers between an encoder's tokens and a pretext task.

    B images   L places of the patch grid   K tokens given, T places asked for   P prefix tokens
    dim the encoder's width, width the network's own, W for short
    x = [embed(token_k) + pos_k ; mask + pos_t]     blocks(x), normed, through a linear head

`MAEDecoder` puts all L places in order; `LatentPredictor` takes only the K given and the T asked
for, and asks several groups of places of one context; `CrossDecoder` also reads the tokens of
another image; `LatentRegressor` asks for hidden places and leaves the context as it is, and
`PlaceDecoder` reads tokens of some places and no others.  Positions are learned.
"""

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from fastssl.kernels import gather_tokens, restore_tokens
from fastssl.masking import Masking


class _Decoder(nn.Module):
    """What they share: the embedding, the mask token, positions, blocks and the head."""

    def __init__(self, dim: int, *, width: int, depth: int, heads: int, patches: int, values: int):
        super().__init__()
        if width % heads:
            raise ValueError(f"decoder_dim={width} is not a multiple of decoder_heads={heads}")
        self.embed = nn.Linear(dim, width)
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.pos_embed = nn.Parameter(torch.zeros(patches, width))
        self.blocks = nn.ModuleList(self.block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, values)
        for parameter in (self.mask_token, self.pos_embed):
            nn.init.trunc_normal_(parameter, std=0.02)

    def block(self, width: int, heads: int) -> nn.Module:
        return Block(width, heads, qkv_bias=True)

    def no_weight_decay(self) -> set[str]:
        return {"mask_token", "pos_embed"}

    def _restored(self, tokens: Tensor, masking: Masking) -> tuple[Tensor, int]:
        """(B, P + L, W): prefix tokens, then every place in order; and P."""
        x = self.embed(tokens)
        P = x.shape[1] - masking.visible.shape[1]
        full = restore_tokens(x[:, P:], masking.restore, self.mask_token, self.pos_embed)
        return torch.cat([x[:, :P], full], 1), P


class MAEDecoder(_Decoder):
    """Predicts what stands at hidden patches from the encoder's tokens of the visible ones.

    tokens (B, P + K, dim), masking of L patches -> (B, L - K, values): hidden patches only, in the
    order of `masking.masked`; pixels in the (..., c) order of `gather_patches`.
    Raises ValueError for a width that is no multiple of the heads, as the others here do.
    Source: He et al. 2022, arXiv:2111.06377, section 3 (MAE decoder); positions are learned.
    """

    def forward(self, tokens: Tensor, masking: Masking) -> Tensor:
        x, P = self._restored(tokens, masking)
        for block in self.blocks:
            x = block(x)
        return self.head(gather_tokens(self.norm(x)[:, P:], masking.masked))


class LatentPredictor(_Decoder):
    """Predicts groups of places from one context, each group on its own.

    tokens (B, P + K, dim) at the places ids (B, K), targets (B, M, T) -> (B, M, T, values).  The M
    groups of an image do not see each other.  Prefix tokens, where there are any, have no position.
    A sequence has P + K + T tokens, not L; the context is embedded once for all groups.
    Source: Assran et al. 2023, I-JEPA, arXiv:2301.08243, section 3 (Prediction).
    """

    def forward(self, tokens: Tensor, ids: Tensor, targets: Tensor) -> Tensor:
        M, T = targets.shape[1:]
        P = tokens.shape[1] - ids.shape[1]
        x = self.embed(tokens)
        x = torch.cat([x[:, :P], x[:, P:] + gather_tokens(self.pos_embed, ids)], 1)
        asked = self.mask_token + gather_tokens(self.pos_embed, targets.flatten(0, 1))
        x = torch.cat([x.repeat_interleave(M, 0), asked.to(x.dtype)], 1)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, -T:])).unflatten(0, (-1, M))


class CrossDecoder(_Decoder):
    """Predicts the hidden patches of one image with another, whole one at hand.

    tokens (B, P + K, dim) of the image and its masking, reference (B, P + L, dim), the other's
    tokens -> (B, L - K, values), as `MAEDecoder`.  Each block attends to the reference, then among
    the image's own places.
    Source: Eymael et al. 2024, CropMAE, arXiv:2403.17823, section 3; Gupta et al. 2023, SiamMAE,
    arXiv:2305.14344, section 3 (the cross-self decoder).  Pre-norm, and the reference has
    positions of its own here: the encoder's tokens need not tell where they stood.
    """

    def block(self, width: int, heads: int) -> nn.Module:
        return CrossBlock(width, heads)

    def forward(self, tokens: Tensor, masking: Masking, reference: Tensor) -> Tensor:
        x, P = self._restored(tokens, masking)
        y = self.embed(reference)
        y = torch.cat([y[:, :P], y[:, P:] + self.pos_embed], 1)
        for block in self.blocks:
            x = block(x, y)
        return self.head(gather_tokens(self.norm(x)[:, P:], masking.masked))


class LatentRegressor(_Decoder):
    """Predicts latents of hidden patches, by queries that look at the visible ones' over and over.

    tokens (B, P + K, dim) of the visible patches, masking of L -> (B, L - K, values), in the order
    of `masking.masked`.  Each block attends to the embedded tokens, which no block changes, then
    among the queries.
    Source: Chen et al. 2022, Context Autoencoder, arXiv:2202.03026, section 3 (latent contextual
    regressor).
    """

    def block(self, width: int, heads: int) -> nn.Module:
        return CrossBlock(width, heads)

    def forward(self, tokens: Tensor, masking: Masking) -> Tensor:
        P, y = tokens.shape[1] - masking.visible.shape[1], self.embed(tokens)
        y = torch.cat([y[:, :P], y[:, P:] + gather_tokens(self.pos_embed, masking.visible)], 1)
        x = (self.mask_token + gather_tokens(self.pos_embed, masking.masked)).to(y.dtype)
        for block in self.blocks:
            x = block(x, y)
        return self.head(self.norm(x))


class PlaceDecoder(_Decoder):
    """tokens (B, T, dim) of the places ids (B, T), which see one another only: (B, T, values).

    Source: Chen et al. 2022, Context Autoencoder, arXiv:2202.03026, section 3 (decoder).
    """

    def __init__(self, dim: int, **sizes: int):
        super().__init__(dim, **sizes)
        del self.mask_token  # it asks for nothing

    def forward(self, tokens: Tensor, ids: Tensor) -> Tensor:
        x = self.embed(tokens) + gather_tokens(self.pos_embed, ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class CrossBlock(nn.Module):
    """x (B, N, W) attends to y (B, M, W), then a transformer block among itself: (B, N, W)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm, self.norm_y = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.proj = nn.Linear(width, width), nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.own = Block(width, heads, qkv_bias=True)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        q = self._split(self.query(self.norm(x)))
        k, v = (self._split(part) for part in self.key_value(self.norm_y(y)).chunk(2, -1))
        seen = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.own(x + self.proj(seen))

    def _split(self, x: Tensor) -> Tensor:
        """(B, N, W) -> (B, heads, N, W / heads)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
