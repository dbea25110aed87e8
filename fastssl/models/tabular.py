"""A transformer over the columns of a table: rows (B, F) -> features.

    token_j = x_j w_j + b_j           F columns, each with weights w_j and b_j (E,) of its own
    h = blocks([REG; token_1 .. token_F])      R regularization tokens [REG], then a final norm

The b_j tell columns apart, so there are no other positions, and any subset of the columns is read
by gathering theirs.  It is registered with timm as `table_transformer`.
Source: Thimonier et al. 2024, T-JEPA, arXiv:2410.05016 ([REG] tokens; features of all columns side
by side); the tokens of Gorishniy et al. 2021, FT-Transformer, arXiv:2106.11959, section 3.3.
"""

from typing import Any

import torch
from timm.models import checkpoint_seq
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from fastssl.kernels import gather_tokens

from .backbones import register_model

__all__ = ["TableTransformer"]

POOLS = ("flatten", "mean", "reg")


class TableTransformer(nn.Module):
    """forward(rows (B, F)) -> features (B, num_features), float rows of `columns` = F numbers.

    registers: R.  global_pool: "flatten", the columns' outputs side by side, F E features; "mean",
    their mean, or "reg", the mean of the [REG] tokens, E features.
    Raises ValueError for an unknown global_pool, "reg" without registers, num_classes other than 0.
    """

    def __init__(
        self,
        columns: int,
        embed_dim: int = 64,
        depth: int = 4,
        num_heads: int = 4,
        registers: int = 1,
        global_pool: str = "flatten",
        num_classes: int = 0,
    ):
        super().__init__()
        if global_pool not in POOLS or (global_pool == "reg" and registers < 1) or registers < 0:
            want = f"one of {POOLS}, 'reg' with registers >= 1"
            raise ValueError(f"global_pool must be {want}, got {global_pool!r} and {registers}")
        if num_classes or columns < 1:
            raise ValueError(f"want columns >= 1, num_classes=0, got {columns} and {num_classes}")
        self.columns, self.width, self.registers = columns, embed_dim, registers
        self.global_pool, self.grad_checkpointing = global_pool, False
        self.num_features = embed_dim * (columns if global_pool == "flatten" else 1)
        self.weight = nn.Parameter(torch.empty(columns, embed_dim))
        self.bias = nn.Parameter(torch.empty(columns, embed_dim))
        self.reg_token = nn.Parameter(torch.empty(registers, embed_dim))
        self.blocks = nn.Sequential(
            *(Block(embed_dim, num_heads, qkv_bias=True) for _ in range(depth))
        )
        self.norm = nn.LayerNorm(embed_dim)
        for parameter in (self.weight, self.bias, self.reg_token):
            nn.init.trunc_normal_(parameter, std=embed_dim**-0.5)

    def no_weight_decay(self) -> set[str]:
        return {"weight", "bias", "reg_token"}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def tokens(self, rows: Tensor, ids: Tensor | None = None) -> Tensor:
        """The chosen columns embedded: (B, K, E); ids (B, K) int64, None: all in order.

        Raises ValueError for rows of another number of columns.
        """
        if rows.ndim != 2 or rows.shape[1] != self.columns:
            raise ValueError(f"rows must be (B, {self.columns}), got {tuple(rows.shape)}")
        x = rows.to(self.weight.dtype)
        if ids is None:
            return x[..., None] * self.weight + self.bias
        chosen = x.gather(1, ids)[..., None]
        return chosen * gather_tokens(self.weight, ids) + gather_tokens(self.bias, ids)

    def encode(self, tokens: Tensor) -> Tensor:
        """[REG] and embedded columns through the blocks, normed: (B, R + K, E)."""
        x = torch.cat([self.reg_token.expand(len(tokens), -1, -1), tokens], 1)
        if self.grad_checkpointing:
            return self.norm(checkpoint_seq(self.blocks, x))
        return self.norm(self.blocks(x))

    def forward(self, rows: Tensor) -> Tensor:
        h = self.encode(self.tokens(rows))
        if self.global_pool == "reg":
            return h[:, : self.registers].mean(1)
        h = h[:, self.registers :]
        return h.mean(1) if self.global_pool == "mean" else h.flatten(1)


@register_model(lambda shape: {"columns": shape[0]})
def table_transformer(pretrained: bool = False, **kwargs: Any) -> TableTransformer:
    """A `TableTransformer`; columns must be given.  Raises ValueError for pretrained."""
    if pretrained:
        raise ValueError("there are no pretrained weights of table_transformer")
    return TableTransformer(**kwargs)
