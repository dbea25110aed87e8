"""Tokens in and out of a sequence in Triton, by the functions that tokens_torch has.

    gather    out_r = pos_(r % n) + (source_(b, ids_r)  if ids_r < limit,  else token)
    restore   d_visible_(b, ids_bl) = g_bl    pos_l = sum_b g_bl    token = sum_(b, hidden l) g_bl
    scatter   out_l = sum of the rows k with ids_k = l, which a sorted order lists

A program has a block of rows and of features.  Rows are read in whole runs of features, so the ids
in between cost nothing: each byte is read once, written once.  Memory-bound.  Sums over sequences
are taken in float32 by shares of the batch, as many as fill the GPU, and the shares' sums are added
by one launch more: no atomics, the same bits each run.  `restore` writes d_visible by the ids
themselves, each place being there exactly once.  `scatter` walks the rows of a place in ascending
order; without repeats that is one row or none.  What an addition rounds off is carried to the next
(Kahan), which costs no time here and keeps long sums as accurate as pairwise ones.
In place: nothing.
Letters: b of B sequences, n rows each; r a row of all; l of L places; d of D features.  Capitals
are pointers; x_b, x_r, x_d the strides of a tensor by sequence, row and feature.
Source: He et al. 2021, MAE, arXiv:2111.06377, section 3 "Simple implementation"; Kahan 1965,
"Further remarks on reducing truncation errors".
"""

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.launch import kernel_by_part, launcher
from ..common.triton import sm_count
from ..common.tuning import Config, Kernel, config_for
from . import tokens_configs as configs


@triton.jit
def _gather_rows(
    SOURCE, IDS, OWNERS, TOKEN, POS, OUT, R, n, D, limit, s_b, s_r, s_d,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Ids and OUT are contiguous.  OWNERS: each row's sequence; None: every sequence has n rows."""
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    row, column = r < R, (d < D)[None, :]
    if OWNERS is None:
        b = r // n
    else:
        b = tl.load(OWNERS + r, row, 0).to(tl.int64)
    ids = tl.load(IDS + r, row, -1)
    shown = (ids >= 0) & (ids < limit)
    at = (b * s_b + tl.where(shown, ids, 0) * s_r)[:, None] + d.to(tl.int64)[None, :] * s_d
    x = tl.load(SOURCE + at, shown[:, None] & column, 0.0).to(tl.float32)
    if TOKEN is not None:
        token = tl.load(TOKEN + d, d < D, 0.0).to(tl.float32)
        x = tl.where(shown[:, None], x, token[None, :])
    here = row[:, None] & column
    if POS is not None:
        x += tl.load(POS + (r % n)[:, None] * D + d[None, :], here, 0.0).to(tl.float32)
    tl.store(OUT + r[:, None] * D + d[None, :], x.to(OUT.dtype.element_ty), here)


@triton.jit
def _added(total, lost, x):
    """total + x - lost, and what of that was lost to rounding."""
    x -= lost
    after = total + x
    return after, (after - total) - x


@triton.jit
def _shown(VISIBLE, g, ids, b, row, d, K, D):
    """Write what of g is the gradient of visible tokens."""
    if VISIBLE is not None:
        at = (b * K + ids)[:, None] * D + d[None, :]
        tl.store(VISIBLE + at, g, (row & (ids >= 0) & (ids < K))[:, None] & (d < D)[None, :])


@triton.jit
def _restore_rows(
    G, IDS, VISIBLE, TOKENS, POS, B, L, K, D, share, g_b, g_r, g_d,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """VISIBLE (B, K, D); TOKENS (shares, blocks of L, D) and POS (shares, L, D) float32."""
    l = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)  # noqa: E741
    d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    row, column = l < L, (d < D)[None, :]
    place = l.to(tl.int64)[:, None] * g_r + d.to(tl.int64)[None, :] * g_d
    first = tl.program_id(0).to(tl.int64) * share
    total = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    hidden, lost, lost_hidden = total, total, total
    end = tl.minimum(B, first + share)
    for b in range(first, end, 2):  # two at a time are under way
        second = l < tl.where(b + 1 < end, L, 0)
        ids = tl.load(IDS + b * L + l, row, 0)
        ids_2 = tl.load(IDS + (b + 1) * L + l, second, 0)
        g = tl.load(G + b * g_b + place, row[:, None] & column, 0.0)
        g_2 = tl.load(G + (b + 1) * g_b + place, second[:, None] & column, 0.0)
        _shown(VISIBLE, g, ids, b, row, d, K, D)
        _shown(VISIBLE, g_2, ids_2, b + 1, second, d, K, D)
        g, g_2 = g.to(tl.float32), g_2.to(tl.float32)
        if POS is not None:
            total, lost = _added(total, lost, g)
            total, lost = _added(total, lost, g_2)
        if TOKENS is not None:
            hidden, lost_hidden = _added(hidden, lost_hidden, tl.where((ids >= K)[:, None], g, 0.0))
            g_2 = tl.where((ids_2 >= K)[:, None], g_2, 0.0)
            hidden, lost_hidden = _added(hidden, lost_hidden, g_2)
    part = tl.program_id(0).to(tl.int64)
    if POS is not None:
        tl.store(POS + (part * L + l)[:, None] * D + d[None, :], total, row[:, None] & column)
    if TOKENS is not None:
        TOKENS += (part * tl.num_programs(1) + tl.program_id(1)) * D
        tl.store(TOKENS + d, tl.sum(hidden, 0), d < D)


@triton.jit
def _scatter_rows(
    X, ORDER, STARTS, OUT, B, L, D, n, share, start_b, x_b, x_r, x_d,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """OUT (shares, L, D).  Place l of sequence b has the rows ORDER[b * n + STARTS[b, l]], ..."""
    l = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)  # noqa: E741
    d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    row, column = l < L, (d < D)[None, :]
    run = d.to(tl.int64)[None, :] * x_d
    first = tl.program_id(0).to(tl.int64) * share
    total = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    lost = total
    for i in range(0, tl.minimum(B - first, share)):
        b = first + i
        start = tl.load(STARTS + b * start_b + l, row, 0)
        stop = tl.load(STARTS + b * start_b + l + 1, row, 0)
        for j in range(0, tl.max(stop - start, 0)):
            more = start + j < stop
            k = tl.load(ORDER + b * n + start + j, more, 0)
            at = (b * x_b + k * x_r)[:, None] + run
            x = tl.load(X + at, more[:, None] & column, 0.0).to(tl.float32)
            total, lost = _added(total, lost, x)
    at = (tl.program_id(0).to(tl.int64) * L + l)[:, None] * D + d[None, :]
    tl.store(OUT + at, total.to(OUT.dtype.element_ty), row[:, None] & column)


PROGRAMS = (
    8  # of a processor at once: fewer have not enough bytes under way to fill its share of HBM
)


class _Launch:
    """How a kernel's class for x is launched, over blocks of rows and of D features."""

    def __init__(self, kernel: Kernel, x: Tensor, part: str, rows: int, D: int) -> None:
        self.config = config_for(kernel, configs.shape_class(x, part), x.device)
        self.rows = triton.cdiv(rows, self.config.blocks["BLOCK_R"])
        self.columns = triton.cdiv(D, self.config.blocks["BLOCK_D"])
        self.most = max(1, PROGRAMS * sm_count(x.device) // max(1, self.rows * self.columns))

    def shares(self, B: int) -> tuple[int, int]:
        """In how many shares the batch fills the device, and how many sequences each has."""
        share = triton.cdiv(B, min(self.most, B)) if B else 1
        return triton.cdiv(B, share), share


def _gather(
    part: str,
    source: Tensor,
    ids: Tensor,
    owners: Tensor | None = None,
    token: Tensor | None = None,
    pos: Tensor | None = None,
) -> Tensor:
    """Rows of source (B, S, D), B = 1 where it is shared, as ids (..., n) has them: (..., n, D)."""
    (B, S, D), R = source.shape, ids.numel()
    out, launch = source.new_empty(*ids.shape, D), _Launch(GATHER, source, part, R, D)
    s_b, s_r, s_d = source.stride()
    if out.numel():
        with torch.cuda.device_of(source):
            _gather_rows[launch.rows, launch.columns](
                source, ids.contiguous(), owners, token, pos, out, R, ids.shape[-1], D, S,
                0 if B == 1 else s_b, s_r, s_d, **launch.config.arguments,
            )  # fmt: skip
    return out


def gather(source: Tensor, ids: Tensor) -> Tensor:
    """source_(b, ids_bk): (B, K, D), of source (B, L, D) or (1, L, D) for all."""
    return _gather("rows", source, ids)


def restore(visible: Tensor, ids: Tensor, token: Tensor, pos: Tensor | None) -> Tensor:
    """pos_l + (visible_(b, ids_bl) if ids_bl < K, else token): (B, L, D)."""
    pos = None if pos is None else pos.contiguous()
    return _gather("restore", visible, ids, token=token.contiguous(), pos=pos)


def pack(tokens: Tensor, ids: Tensor, owners: Tensor) -> Tensor:
    """tokens_(owners_t, ids_t): (T, D)."""
    return _gather("packed", tokens, ids, owners.contiguous())


def restore_grads(
    grad: Tensor, ids: Tensor, visible: int, need_visible: bool, need_token: bool, need_pos: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `restore`: (B, K, D) as grad, (D,), (L, D) float32; empty if unneeded."""
    B, L, D = grad.shape
    launch = _Launch(RESTORE, grad, "restore", L, D)
    shares, share = launch.shares(B) if need_token or need_pos else (B, 1)
    d_visible = grad.new_empty(B, visible, D) if need_visible else None
    tokens = _floats(grad, shares, launch.rows, D) if need_token else None
    pos = _floats(grad, shares, L, D) if need_pos else None
    if grad.numel():
        with torch.cuda.device_of(grad):
            _restore_rows[shares, launch.rows, launch.columns](
                grad, ids.contiguous(), d_visible, tokens, pos, B, L, visible, D, share,
                *grad.stride(), **launch.config.arguments,
            )  # fmt: skip
    empty = _floats(grad, 0)
    return (
        grad.new_empty(0) if d_visible is None else d_visible,
        empty if tokens is None else tokens.sum((0, 1)),
        empty.clone() if pos is None else pos.sum(0),
    )


def _floats(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


def _sorted_places(ids: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Places of ids (B, n) in ascending order of id, then place; where those of an id begin.

    Sorted, not inverted as in bias_triton.py: `gather_tokens` and `scatter_tokens` take ids that
    repeat, and whether these do the device alone knows.
    """
    values, order = ids.sort(dim=1, stable=True)
    places = torch.arange(length + 1, device=ids.device).expand(len(ids), -1).contiguous()
    return order, torch.searchsorted(values, places)


def _scatter(launch: _Launch, shares: int, x: Tensor, *arguments: Any) -> None:
    """arguments: the kernel's from ORDER to x_b."""
    if 0 not in (shares, launch.rows, launch.columns):
        with torch.cuda.device_of(x):
            _scatter_rows[shares, launch.rows, launch.columns](
                x, *arguments, *x.stride()[-2:], **launch.config.arguments
            )


def scatter(x: Tensor, ids: Tensor, length: int) -> Tensor:
    """sum of the x_bk with ids_bk = l: (B, length, D) as x."""
    (B, n, D), (order, starts) = x.shape, _sorted_places(ids, length)
    launch, out = _Launch(SCATTER, x, "rows", length, D), x.new_empty(B, length, D)
    sizes = B, length, D, n, 1, length + 1
    _scatter(launch, B, x, order, starts, out, *sizes, x.stride(0))
    return out


def scatter_table(x: Tensor, ids: Tensor, length: int) -> Tensor:
    """sum of all the x_bk with ids_bk = l: (length, D) float32."""
    (B, n, D), (order, starts) = x.shape, _sorted_places(ids, length)
    launch = _Launch(SCATTER, x, "table", length, D)
    shares, share = launch.shares(B)
    parts, sizes = _floats(x, shares, length, D), (B, length, D, n, share, length + 1)
    _scatter(launch, shares, x, order, starts, parts, *sizes, x.stride(0))
    return parts.sum(0)


def unpack(x: Tensor, ids: Tensor, owners: Tensor, sequences: int, length: int) -> Tensor:
    """sum of the x_t with owners_t = b and ids_t = l: (B, length, D) as x (T, D)."""
    D = x.shape[1]
    order, starts = _sorted_places((owners.long() * length + ids)[None], sequences * length)
    launch, out = _Launch(SCATTER, x, "rows", length, D), x.new_empty(sequences, length, D)
    sizes = sequences, length, D, 0, 1, length
    _scatter(launch, sequences, x, order, starts, out, *sizes, 0)
    return out


def _try_gather(dtype: str, part: str, config: Config, device: torch.device) -> Any:
    x, ids, K = configs.trial_tokens(dtype, device)
    run = partial(launcher, GATHER.name, config)
    if part == "restore":
        return run(restore, x[:, :K], ids, x[0, 0], x[1])
    if part == "packed":
        owners = torch.arange(len(x), device=device, dtype=torch.int32).repeat_interleave(K)
        return run(pack, x, ids[:, :K].reshape(-1), owners)
    return run(gather, x, ids[:, :K])


def _try_restore(dtype: str, part: str, config: Config, device: torch.device) -> Any:
    x, ids, K = configs.trial_tokens(dtype, device)
    return launcher(RESTORE.name, config, restore_grads, x, ids, K, True, True, True)


def _try_scatter(dtype: str, part: str, config: Config, device: torch.device) -> Any:
    x, ids, K = configs.trial_tokens(dtype, device)
    add = scatter if part == "rows" else scatter_table
    return launcher(SCATTER.name, config, add, x[:, :K], ids[:, :K], x.shape[1])


GATHER, RESTORE, SCATTER = (
    kernel_by_part(f"tokens_{name}", fn, configs.TYPES, parts, trial, halved="BLOCK_D")
    for name, fn, parts, trial in (
        ("gather", _gather_rows, configs.GATHER, _try_gather),
        ("restore", _restore_rows, configs.RESTORE, _try_restore),
        ("scatter", _scatter_rows, configs.SCATTER, _try_scatter),
    )
)
