"""A transformer over groups of a cloud's points: clouds (B, N, 3) -> features (B, 2 E).

    G centers, each the point farthest from those before it, the first farthest from the mean
    group_g = the k points nearest to center g, less the center          (B, G, k, 3)
    token_g = PointNet(group_g)         x = block(x + pos(center_g)) in every block, a final norm
    features = [mean_g x ; max_g x]

A point is in several groups or in none.  The embedding of a group, shared by its points, ends in a
maximum: f = MLP(point); token = max MLP([f ; max f]).  The order of points means nothing.
Where the paper's PointNet has batch norm, layer norm stands here: a sample's tokens do not depend
on its batch, on any number of ranks.  Distances are taken in float32 whatever the weights' dtype.
It is registered with timm as `point_transformer`.
Source: Pang et al. 2022, Point-MAE, arXiv:2203.06604, sections 3.1 and 3.2; features as in its
classification head.  Widths inside the PointNet are the paper's 128, 256, 512 at E = 384.
"""

from typing import Any, NamedTuple

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastssl.kernels import gather_tokens, restore_tokens
from fastssl.masking import Masking

from .backbones import register_model

__all__ = ["PointDecoder", "PointTransformer"]


class Groups(NamedTuple):
    """points (B, G, k, 3), less their center; centers (B, G, 3)."""

    points: Tensor
    centers: Tensor


def farthest_points(cloud: Tensor, count: int) -> Tensor:
    """Numbers (B, count) int64 of points spread over clouds (B, N, 3), farthest first.

    A loop over `count`, all clouds at once: O(N) each.
    Raises ValueError for count outside 1..N.

    >>> farthest_points(torch.tensor([[[0.0], [1.0], [9.0], [8.5]]]), 3).tolist()
    [[0, 2, 1]]
    """
    B, N, _ = cloud.shape
    if not 1 <= count <= N:
        raise ValueError(f"count must lie between 1 and {N} points, got {count}")
    nearest = (cloud - cloud.mean(1, keepdim=True)).square().sum(-1)
    chosen = [nearest.argmax(1)]
    for i in range(1, count):
        last = cloud.gather(1, chosen[-1][:, None, None].expand(B, 1, cloud.shape[2]))
        gap = (cloud - last).square().sum(-1)
        nearest = gap if i == 1 else torch.minimum(nearest, gap)
        chosen.append(nearest.argmax(1))
    return torch.stack(chosen, 1)


@torch.no_grad()
def grouped(cloud: Tensor, groups: int, size: int) -> Groups:
    """`groups` groups of the `size` nearest points of each cloud (B, N, 3), float32.

    Raises ValueError for more groups than points, or larger groups.
    """
    if not 1 <= size <= cloud.shape[1]:
        raise ValueError(f"size must lie between 1 and {cloud.shape[1]} points, got {size}")
    x = cloud.float()
    centers = gather_tokens(x, farthest_points(x, groups))
    gaps = (centers[:, :, None] - x[:, None]).square().sum(-1)
    near = gaps.topk(size, dim=2, largest=False).indices
    members = gather_tokens(x, near.flatten(1)).unflatten(1, (groups, size))
    return Groups(members - centers[:, :, None], centers)


class _PointNet(nn.Module):
    """Groups (B, K, k, 3) -> tokens (B, K, E), whatever the order of a group's points."""

    def __init__(self, dim: int):
        super().__init__()
        narrow, middle, wide = (max(4, dim * n // 3) for n in (1, 2, 4))
        self.point = nn.Sequential(
            *(nn.Linear(3, narrow), nn.LayerNorm(narrow), nn.GELU(), nn.Linear(narrow, middle))
        )
        self.group = nn.Sequential(
            *(nn.Linear(2 * middle, wide), nn.LayerNorm(wide), nn.GELU(), nn.Linear(wide, dim))
        )

    def forward(self, groups: Tensor) -> Tensor:
        f = self.point(groups)
        whole = f.amax(2, keepdim=True).expand_as(f)
        return self.group(torch.cat([f, whole], -1)).amax(2)


def _position(dim: int) -> nn.Module:
    """Centers (B, K, 3) -> (B, K, dim)."""
    hidden = max(4, dim // 3)
    return nn.Sequential(nn.Linear(3, hidden), nn.GELU(), nn.Linear(hidden, dim))


class _Blocks(nn.Module):
    """x = block(x + position(center)) for each block: positions enter every one."""

    def __init__(self, dim: int, depth: int, heads: int):
        super().__init__()
        self.position = _position(dim)
        self.blocks = nn.ModuleList(Block(dim, heads, qkv_bias=True) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.grad_checkpointing = False

    def forward(self, x: Tensor, centers: Tensor) -> Tensor:
        pos = self.position(centers.to(x.dtype))
        for block in self.blocks:
            if self.grad_checkpointing:
                x = checkpoint(block, x + pos, use_reentrant=False)  # type: ignore[assignment]
            else:
                x = block(x + pos)
        return self.norm(x)


class PointTransformer(nn.Module):
    """forward(clouds (B, N, 3)) -> features (B, 2 E), float32 coordinates.

    groups, group_size: G and k, both at most N.
    Raises ValueError for other clouds, more groups or larger ones than points, num_classes not 0.
    """

    def __init__(
        self,
        groups: int = 64,
        group_size: int = 32,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        num_classes: int = 0,
    ):
        super().__init__()
        if num_classes or min(groups, group_size) < 1:
            got = f"{groups}, {group_size} and {num_classes}"
            raise ValueError(f"want groups and group_size >= 1 and num_classes=0, got {got}")
        self.groups, self.group_size, self.width = groups, group_size, embed_dim
        self.num_features = 2 * embed_dim
        self.embed = _PointNet(embed_dim)
        self.blocks = _Blocks(embed_dim, depth, num_heads)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.blocks.grad_checkpointing = enable

    def group(self, clouds: Tensor) -> Groups:
        """The groups of clouds (B, N, 3)."""
        if clouds.ndim != 3 or clouds.shape[2] != 3:
            raise ValueError(f"clouds must be (B, N, 3), got {tuple(clouds.shape)}")
        return grouped(clouds, self.groups, self.group_size)

    def tokens(self, points: Tensor) -> Tensor:
        """Groups' points (B, K, k, 3) embedded: (B, K, E), in the weights' dtype."""
        return self.embed(points.to(next(self.embed.parameters()).dtype))

    def encode(self, tokens: Tensor, centers: Tensor) -> Tensor:
        """Tokens (B, K, E) of groups at centers (B, K, 3) through the blocks, normed."""
        return self.blocks(tokens, centers)

    def forward(self, clouds: Tensor) -> Tensor:
        points, centers = self.group(clouds)
        x = self.encode(self.tokens(points), centers)
        return torch.cat([x.mean(1), x.amax(1)], -1)


class PointDecoder(nn.Module):
    """Predicts the points of hidden groups from the encoder's tokens of the visible ones.

    tokens (B, K, dim), all centers (B, G, 3), masking of G groups -> (B, G - K, size, 3), less the
    centers, in the order of `masking.masked`; and (B, G, width), what is read as points, of every
    group in its place.  width: the decoder's own; heads divide it.
    Source: arXiv:2203.06604, section 3.2: positions of its own in every block, one linear layer
    to the points.  There the decoder is as wide as the encoder.
    """

    def __init__(self, dim: int, *, width: int, depth: int, heads: int, size: int):
        super().__init__()
        if width % heads:
            raise ValueError(f"decoder_dim={width} is not a multiple of decoder_heads={heads}")
        self.embed = nn.Linear(dim, width)
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.blocks = _Blocks(width, depth, heads)
        self.head = nn.Linear(width, 3 * size)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def no_weight_decay(self) -> set[str]:
        return {"mask_token"}

    def forward(self, tokens: Tensor, centers: Tensor, masking: Masking) -> tuple[Tensor, Tensor]:
        x = restore_tokens(self.embed(tokens), masking.restore, self.mask_token)
        x = self.blocks(x, centers)
        return self.head(gather_tokens(x, masking.masked)).unflatten(-1, (-1, 3)), x


@register_model(lambda shape: {})
def point_transformer(pretrained: bool = False, **kwargs: Any) -> PointTransformer:
    """A `PointTransformer`.  Raises ValueError for pretrained."""
    if pretrained:
        raise ValueError("there are no pretrained weights of point_transformer")
    return PointTransformer(**kwargs)
