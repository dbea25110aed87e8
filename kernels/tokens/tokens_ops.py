"""The Triton kernels of tokens as operators of torch: what `tokens.py` builds on.

They are the functions of `tokens_torch`, by the same names; torch.compile keeps each whole in its
graph.  They know no gradient: `tokens.py` has it.  Rows are in float32, bfloat16 or float16, in any
layout; ids are int64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from ..common.tuning import Config, Kernel, config_for, forced, register
from ..correlation.moments_ops import processors
from . import tokens_configs as configs
from . import tokens_triton as fused

operator = torch.library.custom_op


class _Launch:
    """A launch of a kernel's class for x, over blocks of rows and of D features."""

    def __init__(self, kernel: Kernel, x: Tensor, part: str, rows: int, D: int) -> None:
        name = configs.shape_class(x, part)
        self.fn, self.x = kernel.fn, x
        absent = kernel.variants[name].constexprs
        self.absent = {n: None for n, value in absent.items() if value is None}
        config = config_for(kernel, name, x.device)
        self.options = {**config.blocks, **config.options}
        self.rows = triton.cdiv(rows, config.blocks["BLOCK_R"])
        self.columns = triton.cdiv(D, config.blocks["BLOCK_D"])

    def shares(self, B: int) -> tuple[int, int]:
        """In how many shares the batch fills the device, and how many sequences each has."""
        most = max(1, 4 * processors(self.x.device) // (self.rows * self.columns))
        share = triton.cdiv(B, min(most, B)) if B else 1
        return triton.cdiv(B, share), share

    def __call__(self, shares: int | None = None, **given: Any) -> None:
        grid = (self.rows, self.columns) if shares is None else (shares, self.rows, self.columns)
        if 0 in grid:
            return
        with torch.cuda.device_of(self.x):
            self.fn[grid](**{**self.absent, **given}, **self.options)


def _strides(letter: str, x: Tensor) -> dict[str, int]:
    return {f"{letter}_{axis}": stride for axis, stride in zip("brd", x.stride(), strict=True)}


def _gather(part: str, source: Tensor, ids: Tensor, **given: Any) -> Tensor:
    """Rows of source (B, S, D), B = 1 where it is shared, as ids (..., n) has them: (..., n, D)."""
    S, D = source.shape[1:]
    out = source.new_empty(*ids.shape, D)
    launch, R = _Launch(GATHER, source, part, ids.numel(), D), ids.numel()
    strides = _strides("s", source) | ({"s_b": 0} if len(source) == 1 else {})
    launch(
        SOURCE=source, IDS=ids.contiguous(), OUT=out, R=R, n=ids.shape[-1], D=D, limit=S, **strides,
        **given,
    )  # fmt: skip
    return out


@operator("fastssl::tokens_gathered", mutates_args=())
def gathered(source: Tensor, ids: Tensor) -> Tensor:
    """source_(b, ids_bk): (B, K, D), of source (B, L, D) or (1, L, D) for all."""
    return _gather("rows", source, ids)


@operator("fastssl::tokens_restored", mutates_args=())
def restored(visible: Tensor, ids: Tensor, token: Tensor, pos: Tensor | None) -> Tensor:
    """pos_l + (visible_(b, ids_bl) if ids_bl < K, else token): (B, L, D)."""
    pos = None if pos is None else pos.contiguous()
    return _gather("restore", visible, ids, TOKEN=token.contiguous(), POS=pos)


@operator("fastssl::tokens_packed", mutates_args=())
def packed(tokens: Tensor, ids: Tensor, owners: Tensor) -> Tensor:
    """tokens_(owners_t, ids_t): (T, D)."""
    return _gather("packed", tokens, ids, OWNERS=owners.contiguous())


@operator("fastssl::tokens_unrestored", mutates_args=())
def unrestored(
    grad: Tensor, ids: Tensor, visible: int, need_visible: bool, need_token: bool, need_pos: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `restored`: (B, K, D) as grad, (D,), (L, D) float32; empty if unneeded."""
    B, L, D = grad.shape
    launch = _Launch(RESTORE, grad, "restore", L, D)
    shares, share = launch.shares(B) if need_token or need_pos else (B, 1)
    d_visible = grad.new_empty(B, visible, D) if need_visible else None
    tokens = _floats(grad, shares, launch.rows, D) if need_token else None
    pos = _floats(grad, shares, L, D) if need_pos else None
    launch(
        shares, G=grad, IDS=ids.contiguous(), VISIBLE=d_visible, TOKENS=tokens, POS=pos,
        B=B, L=L, K=visible, D=D, share=share, **_strides("g", grad),
    )  # fmt: skip
    empty = _floats(grad, 0)
    return (
        grad.new_empty(0) if d_visible is None else d_visible,
        empty if tokens is None else tokens.sum((0, 1)),
        empty.clone() if pos is None else pos.sum(0),
    )


def _floats(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


def _listed(ids: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Places of ids (B, n) in ascending order of id, then place; where those of an id begin."""
    values, order = ids.sort(dim=1, stable=True)
    places = torch.arange(length + 1, device=ids.device).expand(len(ids), -1).contiguous()
    return order, torch.searchsorted(values, places)


@operator("fastssl::tokens_scattered", mutates_args=())
def scattered(x: Tensor, ids: Tensor, length: int) -> Tensor:
    """sum of the x_bk with ids_bk = l: (B, length, D) as x."""
    B, n, D = x.shape
    order, starts = _listed(ids, length)
    launch, out = _Launch(SCATTER, x, "rows", length, D), x.new_empty(B, length, D)
    launch(
        B, X=x, ORDER=order, STARTS=starts, OUT=out, B=B, L=length, D=D, n=n, share=1,
        start_b=length + 1, **_strides("x", x),
    )  # fmt: skip
    return out


@operator("fastssl::tokens_tabled", mutates_args=())
def tabled(x: Tensor, ids: Tensor, length: int) -> Tensor:
    """sum of all the x_bk with ids_bk = l: (length, D) float32."""
    B, n, D = x.shape
    order, starts = _listed(ids, length)
    launch = _Launch(SCATTER, x, "table", length, D)
    shares, share = launch.shares(B)
    parts = _floats(x, shares, length, D)
    launch(
        shares, X=x, ORDER=order, STARTS=starts, OUT=parts, B=B, L=length, D=D, n=n, share=share,
        start_b=length + 1, **_strides("x", x),
    )  # fmt: skip
    return parts.sum(0)


@operator("fastssl::tokens_unpacked", mutates_args=())
def unpacked(x: Tensor, ids: Tensor, owners: Tensor, sequences: int, length: int) -> Tensor:
    """sum of the x_t with owners_t = b and ids_t = l: (B, length, D) as x (T, D)."""
    D = x.shape[1]
    order, starts = _listed((owners.long() * length + ids)[None], sequences * length)
    launch = _Launch(SCATTER, x, "rows", length, D)
    out = x.new_empty(sequences, length, D)
    launch(
        sequences, X=x, ORDER=order, STARTS=starts, OUT=out, B=sequences, L=length, D=D, n=0,
        share=1, start_b=length, **_strides("x", x[None]) | {"x_b": 0},
    )  # fmt: skip
    return out


@gathered.register_fake
def _(source, ids):
    return source.new_empty(*ids.shape, source.shape[2])


@restored.register_fake
def _(visible, ids, token, pos):
    return visible.new_empty(*ids.shape, visible.shape[2])


@packed.register_fake
def _(tokens, ids, owners):
    return tokens.new_empty(*ids.shape, tokens.shape[2])


@unrestored.register_fake
def _(grad, ids, visible, need_visible, need_token, need_pos):
    B, L, D = grad.shape
    return (
        grad.new_empty(B, visible, D) if need_visible else grad.new_empty(0),
        grad.new_empty(D if need_token else 0, dtype=torch.float32),
        grad.new_empty((L, D) if need_pos else (0,), dtype=torch.float32),
    )


@scattered.register_fake
def _(x, ids, length):
    return x.new_empty(x.shape[0], length, x.shape[2])


@tabled.register_fake
def _(x, ids, length):
    return x.new_empty(length, x.shape[2], dtype=torch.float32)


@unpacked.register_fake
def _(x, ids, owners, sequences, length):
    return x.new_empty(sequences, length, x.shape[1])


Launch = Callable[[], Any]


def _try_gather(dtype: str, part: str, config: Config, device: torch.device) -> Launch:
    x, ids, K = configs.trial_tokens(dtype, device)
    owners = torch.arange(len(x), device=device, dtype=torch.int32).repeat_interleave(K)

    def run() -> Any:
        with forced(GATHER.name, config):
            if part == "restore":
                return restored(x[:, :K], ids, x[0, 0], x[1])
            if part == "packed":
                return packed(x, ids[:, :K].reshape(-1), owners)
            return gathered(x, ids[:, :K])

    return run


def _try_restore(dtype: str, part: str, config: Config, device: torch.device) -> Launch:
    x, ids, K = configs.trial_tokens(dtype, device)

    def run() -> Any:
        with forced(RESTORE.name, config):
            return unrestored(x, ids, K, True, True, True)

    return run


def _try_scatter(dtype: str, part: str, config: Config, device: torch.device) -> Launch:
    x, ids, K = configs.trial_tokens(dtype, device)

    def run() -> Any:
        with forced(SCATTER.name, config):
            add = scattered if part == "rows" else tabled
            return add(x[:, :K], ids[:, :K], x.shape[1])

    return run


def _registered(fn: Any, parts: Any, table: Any, trial: configs.Trial) -> Kernel:
    name = f"tokens_{fn.fn.__name__}"
    return register(Kernel(name, fn, configs.variants(fn, parts, table, trial)))


GATHER = _registered(fused.gather, configs.GATHER, configs.MOVES, _try_gather)
RESTORE = _registered(fused.restore, configs.RESTORE, configs.SUMS, _try_restore)
SCATTER = _registered(fused.scatter, configs.SCATTER, configs.SUMS, _try_scatter)
