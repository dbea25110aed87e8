"""What is tested on a GPU: every primitive and loss as (ours, the formula, inputs) at a shape.

`ours` takes the fused implementation where there is one.  Each formula is written anew, or is the
primitive's own reference, which tests/kernels holds to the formula.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl import kernels
from fastssl.kernels import exclude_self, same_group
from fastssl.kernels.common import dispatch as _dispatch
from fastssl.kernels.pairwise import pairwise_sigmoid, symmetric_triton
from fastssl.kernels.pairwise.nested import pairwise_lse_nested_reference
from fastssl.losses import BarlowTwinsLoss, MAELoss, MatryoshkaLoss, NTXentLoss
from fastssl.losses.matryoshka import matryoshka_reference
from fastssl.losses.ntxent import ntxent_reference
from fastssl.masking import random_masking
from tests.gpu.room import DEVICE, pick


class Trial(NamedTuple):
    """Two functions of the same inputs, each giving one tensor to differentiate."""

    ours: Callable[..., Tensor]
    eager: Callable[..., Tensor]
    inputs: list[Tensor]


@dataclass(frozen=True)
class Subject:
    """make(dtype, *shape) -> Trial.  gpu, tiny: shapes for the GPU and for its rehearsal.

    primitive: the name it is declared under; "" for a loss and for what has one implementation.
    """

    name: str
    make: Callable[..., Trial]
    gpu: tuple[tuple[int, ...], ...]
    tiny: tuple[int, ...]
    primitive: str = ""

    def __str__(self) -> str:
        return self.name

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Those to test here, the first being the usual one."""
        return pick(self.gpu, (self.tiny,))

    @property
    def fused(self) -> bool:
        """Whether Triton runs it."""
        return impl(self.primitive) == "triton"

    def trial(self, dtype: torch.dtype, shape: tuple[int, ...] | None = None) -> Trial:
        """The same inputs every time."""
        torch.manual_seed(sum(shape or self.shapes[0]))
        return self.make(dtype, *(shape or self.shapes[0]))


def impl(primitive: str) -> str:
    """The fused implementation where it is declared, on any device; else the chunked one."""
    declared = _dispatch._primitives.get(primitive)
    return "triton" if declared and "triton" in declared.implementations else "torch"


def rows(dtype: torch.dtype, *shape: int) -> Tensor:
    """Rows of length D^(1/4): their products have a deviation of 1 whatever D is."""
    return (torch.randn(shape, device=DEVICE) * shape[-1] ** -0.25).to(dtype)


def views(dtype: torch.dtype, B: int, D: int) -> list[Tensor]:
    """Two embeddings of the same images, alike as after some training."""
    z = torch.randn(B, D, device=DEVICE)
    return [(z + 0.5 * torch.randn_like(z)).to(dtype) for _ in range(2)]


def _lse_rows(dtype, M, N, D):
    scale = torch.tensor(1.5, dtype=dtype, device=DEVICE)
    call = partial(kernels.pairwise_lse, impl=impl("pairwise_lse"))
    return Trial(call, _formula_lse, [rows(dtype, M, D), rows(dtype, N, D), scale])


def _formula_lse(q, k, scale, bias=0.0, ids=None):
    s = scale * (q @ k.T) + bias
    if ids is not None:
        s = s.masked_fill(ids[: len(q), None] == ids[None, : len(k)], float("-inf"))
    return s.logsumexp(1)


def _lse_masked(dtype, M, N, D):
    ids = torch.arange(max(M, N), device=DEVICE) // 2
    options = {"mask": exclude_self(ids[:M], ids[:N]), "impl": impl("pairwise_lse")}
    return Trial(
        lambda q, k: kernels.pairwise_lse(q, k, 2.0, **options),
        lambda q, k: _formula_lse(q, k, 2.0, ids=ids),
        [rows(dtype, M, D), rows(dtype, N, D)],
    )


def _lse_self(dtype, N, D):
    ids = torch.arange(N, device=DEVICE)
    ours = partial(kernels.pairwise_lse, mask=exclude_self, impl=impl("pairwise_lse"))
    scale = torch.tensor(1.5, dtype=dtype, device=DEVICE)
    return Trial(
        lambda z, s: ours(z, z, s),
        lambda z, s: _formula_lse(z, z, s, ids=ids),
        [rows(dtype, N, D), scale],
    )


def _lse_half(dtype, N, D):
    """As many pairs as are there are enough for half the tiles."""
    made = _lse_self(dtype, N, D)

    def ours(*inputs):
        with patch.object(symmetric_triton, "HALF_FROM", 1):
            return made.ours(*inputs)

    return made._replace(ours=ours)


def _lse_both(dtype, M, N, D):
    """Rows and columns, a scale for each row and a bias for each column."""
    call = partial(kernels.pairwise_lse, both=True, impl=impl("pairwise_lse"))

    def eager(q, k, scale, bias):
        s = scale[:, None] * (q @ k.T) + bias
        return torch.cat([s.logsumexp(1), s.logsumexp(0)])

    inputs = [rows(dtype, M, D), rows(dtype, N, D)]
    inputs += [torch.rand(M, device=DEVICE).to(dtype), torch.rand(N, device=DEVICE).to(dtype)]
    return Trial(lambda q, k, s, b: torch.cat(call(q, k, s, bias=b)), eager, inputs)


def _lse_nested(dtype, M, N, D):
    """Rows and columns of three prefixes, of which none but the last may be a multiple of 16."""
    dims, ids = (D // 5 + 1, D // 2 + 1, D), torch.arange(max(M, N), device=DEVICE) // 2
    mask = exclude_self(ids[:M], ids[:N])
    options = {"normalize": True, "mask": mask, "both": True, "impl": impl("pairwise_lse_nested")}
    reference = partial(pairwise_lse_nested_reference, dims=dims, normalize=True, mask=mask)
    scale = torch.tensor(9.0, dtype=dtype, device=DEVICE)
    return Trial(
        lambda q, k, s: torch.cat(kernels.pairwise_lse_nested(q, k, s, dims, **options), 1),
        lambda q, k, s: torch.cat(reference(q, k, s), 1),
        [rows(dtype, M, D), rows(dtype, N, D), scale],
    )


def _matryoshka(dtype, B, D):
    """NT-Xent: symmetric scores."""
    dims = (D // 4, D // 2, D)
    loss, one = MatryoshkaLoss(NTXentLoss(0.1), dims), partial(ntxent_reference, temperature=0.1)
    eager = partial(matryoshka_reference, one, dims=dims, weights=(1.0, 1.0, 1.0))
    return Trial(loss, eager, views(dtype, B, D))


def _bent(x: Tensor) -> Tensor:
    """Its plain sum has gradient zero; this one's has not."""
    return x * x.detach().cos()


def _standardise(dtype, N, D):
    call = partial(kernels.standardize, eps=1e-3)
    return Trial(
        lambda z: _bent(call(z, impl=impl("standardize"))),
        lambda z: _bent((z - z.mean(0)) / (z.var(0, correction=0) + 1e-3).sqrt()),
        [rows(dtype, N, D)],
    )


def _moments(dtype, N, D):
    return Trial(
        lambda z: torch.stack(kernels.column_moments(z, impl=impl("column_moments"))),
        lambda z: torch.stack([z.mean(0), z.var(0, correction=0)]),
        [rows(dtype, N, D)],
    )


def _diagonal(dtype, N, D):
    eager = lambda a, b: (a * b).sum(0)  # noqa: E731
    ours = partial(kernels.cross_diagonal, impl=impl("cross_diagonal"))
    return Trial(ours, eager, [rows(dtype, N, D), rows(dtype, N, D)])


def _frobenius(dtype, N, D):
    inputs = [(torch.randn(N, D, device=DEVICE) * 40 / N / D**0.5).to(dtype) for _ in range(2)]
    return Trial(
        lambda a, b: kernels.frobenius_sq(a, b, impl=impl("frobenius_sq")),
        lambda a, b: (a.T @ b).square().sum(),
        inputs,
    )


def _frobenius_of_one(dtype, N, D):
    (a,) = _frobenius(dtype, N, D).inputs[:1]
    return Trial(
        lambda a: kernels.frobenius_sq(a, a, impl=impl("frobenius_sq")),
        lambda a: (a.T @ a).square().sum(),
        [a],
    )


def _mixed(dtype, N, D):
    """Scaled so that no term outweighs the others."""

    def eager(a, b, r):
        c = a.T @ b
        off = c.square().sum() - c.diagonal().square().sum()
        return off + (r.T @ a).square().sum() + (r.T @ b).square().sum()

    def ours(a, b, r):
        found = kernels.mixed_correlation(a, b, r, impl=impl("mixed_correlation"))
        return found.off_diagonal_sq + found.residual_sq

    return Trial(ours, eager, _frobenius(dtype, N, D).inputs + _frobenius(dtype, N, D).inputs[:1])


def _chosen(B, L, K):
    return random_masking(torch.arange(B, device=DEVICE), L, K)


def _patches(images: Tensor, ids: Tensor, side: int) -> Tensor:
    B, C, H, W = images.shape
    x = images.reshape(B, C, H // side, side, W // side, side)
    x = torch.einsum("nchpwq->nhwpqc", x).reshape(B, -1, side * side * C)
    return x.gather(1, ids[..., None].expand(-1, -1, x.shape[2]))


def _gather_patches(dtype, B, size, side):
    ids = _chosen(B, (size // side) ** 2, (size // side) ** 2 // 4).visible
    call = partial(kernels.gather_patches, impl=impl("gather_patches"))
    images = torch.randn(B, 3, size, size, device=DEVICE).to(dtype)
    return Trial(lambda x: call(x, ids, side), lambda x: _patches(x, ids, side), [images])


def _patch_mse(dtype, B, size, side):
    ids = _chosen(B, (size // side) ** 2, (size // side) ** 2 // 4).masked
    images = torch.randint(256, (B, 3, size, size), device=DEVICE, dtype=torch.uint8)
    pred = torch.randn(*ids.shape, 3 * side * side, device=DEVICE).to(dtype)
    call = partial(kernels.patch_mse, impl=impl("patch_mse"))
    return Trial(
        lambda p: call(p, images, ids, side), lambda p: _formula_mse(p, images, ids, side), [pred]
    )


def _clip_mse(dtype, B, frames, size, side):
    """Of normalized bytes, in patches of two frames."""
    ids = _chosen(B, frames // 2 * (size // side) ** 2, 1).masked
    clips = torch.randint(256, (B, 3, frames, size, size), device=DEVICE, dtype=torch.uint8)
    seen = kernels.Normalized(clips, *torch.rand(2, 3, device=DEVICE) + 0.5)
    pred = torch.randn(*ids.shape, 6 * side * side, device=DEVICE).to(dtype)
    call = partial(kernels.patch_mse, images=seen, ids=ids, patch=(2, side, side), kind="smooth_l1")
    return Trial(partial(call, impl=impl("patch_mse")), partial(call, impl="reference"), [pred])


def _formula_mse(pred, images, ids, side):
    y = _patches(images.to(pred.dtype), ids, side)
    y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, keepdim=True) + 1e-6).sqrt()
    return (pred - y).square().mean(-1)


def _restore(dtype, B, L, D):
    ids = _chosen(B, L, max(1, L // 4)).restore
    inputs = [rows(dtype, B, max(1, L // 4), D), rows(dtype, D), rows(dtype, L, D)]

    def eager(visible, token, pos):
        hidden = token.expand(B, L - visible.shape[1], D)
        order = ids[..., None].expand(B, L, D)
        return torch.cat([visible, hidden], 1).gather(1, order) + pos

    call = partial(kernels.restore_tokens, impl=impl("restore_tokens"))
    # In float32, as tests/kernels/test_tokens.py does: upstream sums have no part in it.
    return Trial(lambda v, t, p: call(v, ids, t, p).float(), lambda *x: _wide(eager(*x)), inputs)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _gather_tokens(dtype, B, L, D):
    ids, image = _chosen(B, L, max(1, L // 4)).visible, torch.arange(B, device=DEVICE)[:, None]
    tokens = rows(dtype, B, L, D)
    call = partial(kernels.gather_tokens, impl=impl("gather_tokens"))
    return Trial(lambda t: call(t, ids), lambda t: t[image, ids], [tokens])


def _gather_table(dtype, B, L, D):
    """A table that all sequences share: its gradient sums over them."""
    ids = _chosen(B, L, max(1, L // 4)).visible
    call = partial(kernels.gather_tokens, impl=impl("gather_tokens"))
    inputs = [rows(dtype, L, D)]
    return Trial(lambda t: call(t, ids).float(), lambda t: _wide(t)[ids], inputs)


def _scatter_tokens(dtype, B, L, D):
    """With repeats, as a product with a one-hot matrix."""
    ids = torch.randint(L, (B, max(1, L // 4)), device=DEVICE)
    call = partial(kernels.scatter_tokens, impl=impl("scatter_tokens"))
    hot = F.one_hot(ids, L).mT
    inputs = [rows(dtype, B, ids.shape[1], D)]
    return Trial(lambda t: call(t, ids, L), lambda t: hot.to(t) @ t, inputs)


def _gather_packed(dtype, B, L, D):
    """Sequences of none to L - 1 rows."""
    lengths = [b * 7 % L for b in range(B)]
    ids = torch.randint(L, (sum(lengths),), device=DEVICE)
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=DEVICE)
    owners = torch.tensor([b for b in range(B) for _ in range(lengths[b])], device=DEVICE)
    call = partial(kernels.gather_packed, impl=impl("gather_packed"))
    return Trial(lambda t: call(t, ids, ends), lambda t: t[owners, ids], [rows(dtype, B, L, D)])


def _gather_bias(dtype, B, L, H):
    ids = _chosen(B, L, max(1, L // 4)).visible
    call = partial(kernels.gather_bias, impl=impl("gather_bias"))
    eager = lambda x: _wide(x)[:, ids[:, :, None], ids[:, None]].movedim(0, 1)  # noqa: E731
    return Trial(lambda x: call(x, ids).float(), eager, [rows(dtype, H, L, L)])


def _scaled_cosine(dtype, B, L, D):
    ids = _chosen(B, L, max(1, L // 4)).masked

    def eager(pred, target):
        p, t = (x.gather(1, ids[..., None].expand(-1, -1, D)) for x in (pred, target))
        return (1 - (F.normalize(p, dim=-1) * F.normalize(t, dim=-1)).sum(-1)).pow(2)

    call = partial(kernels.scaled_cosine_error, impl=impl("scaled_cosine_error"))
    return Trial(lambda p, t: call(p, t, ids), eager, [rows(dtype, B, L, D) for _ in range(2)])


def _soft(dtype, V, R, K):
    T = min(V, 2)
    pairs = [[float(v != t or V == 1) for t in range(T)] for v in range(V)]
    teacher, center = rows(torch.float32, T, R, K), 0.1 * rows(torch.float32, K)

    def eager(student):
        q = ((teacher - center) / 0.04).softmax(-1).to(student.dtype)
        log_p = (student / 0.1).log_softmax(-1)
        weights = student.new_tensor(pairs, dtype=_wide(student).dtype)[..., None]
        each = torch.stack([-(q * log_p[v]).sum(-1) for v in range(V)]).to(weights.dtype)
        return (weights * each).sum(1)

    call = partial(kernels.soft_cross_entropy, impl=impl("soft_cross_entropy"))
    ours = lambda s: call(s, teacher, center=center, pairs=pairs)  # noqa: E731
    return Trial(ours, eager, [rows(dtype, V, R, K)])


def _linear_soft(dtype, R, K, D):
    """Unit rows and prototypes, the teacher's of another width."""
    unit = lambda n, d: F.normalize(rows(torch.float32, n, d), dim=-1).to(dtype)  # noqa: E731
    x, w, y, u = unit(R, D), unit(K, D), unit(R, D // 2 + 1), unit(K, D // 2 + 1)
    center = 0.1 * rows(torch.float32, K)

    def eager(x, w):
        q = ((y.to(x.dtype) @ u.to(x.dtype).T - center.to(x.dtype)) / 0.04).softmax(-1)
        return -(q * (x @ w.T / 0.1).log_softmax(-1)).sum(-1)

    call = partial(
        kernels.linear_soft_cross_entropy, assign=center, impl=impl("linear_soft_cross_entropy")
    )
    return Trial(lambda x, w: call(x, w, y, u), eager, [x, w])


def _chamfer(dtype, G, N, M):
    def eager(x, y):
        far = (_wide(x)[:, :, None] - _wide(y)[:, None]).square().sum(-1)
        return far.min(2).values.mean(1) + far.min(1).values.mean(1)

    call = partial(kernels.chamfer, impl=impl("chamfer"))
    return Trial(call, eager, [rows(dtype, G, n, 3) for n in (N, M)])


def _ntxent(dtype, B, D):
    def eager(z0, z1):
        z = F.normalize(torch.cat([z0, z1]))
        s = (z @ z.T / 0.1).fill_diagonal_(float("-inf"))
        twin = torch.arange(2 * B, device=DEVICE).roll(B)
        return F.cross_entropy(s, twin)

    return Trial(NTXentLoss(0.1), eager, views(dtype, B, D))


def _barlow(dtype, B, D):
    def eager(z_a, z_b):
        a, b = ((z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt() for z in (z_a, z_b))
        c = a.T @ b / B
        on = c.diagonal()
        return (1 - on).square().sum() + 5e-3 * (c.square().sum() - on.square().sum())

    return Trial(BarlowTwinsLoss(5e-3), eager, views(dtype, B, D))


def _mae(dtype, B, size, side):
    _, _, (pred,) = _patch_mse(dtype, B, size, side)
    ids = _chosen(B, (size // side) ** 2, (size // side) ** 2 // 4).masked
    images = torch.rand(B, 3, size, size, device=DEVICE).to(torch.bfloat16)
    loss = MAELoss(side)
    return Trial(
        lambda p: loss(p, images, ids), lambda p: _formula_mse(p, images, ids, side).mean(), [pred]
    )


def _sigmoid(dtype, M, N, D):
    """Summed over k and averaged over q: a sum over all pairs is beyond float16."""
    call = partial(pairwise_sigmoid, positive=same_group, impl=impl("pairwise_sigmoid"))

    def eager(q, k, scale, bias):
        s = scale * (q @ k.T) + bias
        y = 2 * torch.eye(M, N, dtype=s.dtype, device=DEVICE) - 1
        return -F.logsigmoid(y * s).mean() * N

    numbers = [torch.tensor(x, dtype=dtype, device=DEVICE) for x in (1.5, -2.0)]
    return Trial(lambda *x: call(*x) / M, eager, [rows(dtype, M, D), rows(dtype, N, D), *numbers])


# rows held in registers, in one pass of a slab, and split over rows
COLUMNS = ((4096, 2048), (50_000, 256), (37, 4099), (256, 8192), (2048, 8192), (8192, 8192))
SUBJECTS = [
    Subject(
        "pairwise_lse",
        _lse_rows,
        ((4096, 8192, 128), (1, 1, 1), (4099, 2051, 70), (1027, 3000, 768), (515, 700, 4096)),
        (21, 35, 19),
        "pairwise_lse",
    ),
    Subject(
        "pairwise_lse-masked",
        _lse_masked,
        ((2048, 4096, 128), (1030, 999, 33)),
        (19, 37, 8),
        "pairwise_lse",
    ),
    Subject(
        "pairwise_lse-self",
        _lse_self,
        ((8192, 128), (2, 3), (3001, 200), (1500, 1024)),
        (35, 20),
        "pairwise_lse",
    ),
    Subject(
        "pairwise_lse-half",
        _lse_half,
        ((3001, 128), (1500, 200), (999, 33)),
        (35, 20),
        "pairwise_lse",
    ),
    Subject(
        "pairwise_lse-both",
        _lse_both,
        ((2048, 4096, 128), (1030, 999, 33), (1027, 3000, 768)),
        (19, 37, 8),
        "pairwise_lse",
    ),
    Subject(
        "pairwise_lse_nested",
        _lse_nested,
        ((2048, 4096, 768), (1030, 999, 33), (4099, 2051, 135)),
        (19, 37, 18),
        "pairwise_lse_nested",
    ),
    Subject("matryoshka", _matryoshka, ((4096, 256), (1030, 100)), (19, 12)),
    Subject("standardize", _standardise, COLUMNS, (21, 7), "standardize"),
    Subject("column_moments", _moments, COLUMNS[:3], (21, 7), "column_moments"),
    Subject("cross_diagonal", _diagonal, COLUMNS[:3], (21, 7), "cross_diagonal"),
    Subject(
        "frobenius_sq",
        _frobenius,
        ((4096, 1024), (300, 4099), (2048, 8192)),
        (21, 7),
        "frobenius_sq",
    ),
    Subject(
        "frobenius_sq-one",
        _frobenius_of_one,
        ((4096, 1024), (8192, 4096), (2048, 4096)),
        (21, 7),
        "frobenius_sq",
    ),
    Subject(
        "mixed_correlation",
        _mixed,
        ((2048, 4096), (300, 1031)),
        (21, 7),
        "mixed_correlation",
    ),
    Subject("gather_patches", _gather_patches, ((64, 224, 16),), (3, 12, 4), "gather_patches"),
    Subject("patch_mse", _patch_mse, ((64, 224, 16), (9, 96, 8)), (3, 12, 4), "patch_mse"),
    Subject(
        "patch_mse-clip", _clip_mse, ((8, 16, 224, 16), (2, 4, 120, 40)), (2, 4, 8, 4), "patch_mse"
    ),
    Subject("restore_tokens", _restore, ((64, 196, 512), (7, 11, 33)), (3, 9, 5), "restore_tokens"),
    Subject("gather_tokens", _gather_tokens, ((64, 196, 768),), (3, 9, 5), "gather_tokens"),
    Subject(
        "gather_table", _gather_table, ((64, 196, 768), (300, 16, 33)), (3, 9, 5), "gather_tokens"
    ),
    Subject("scatter_tokens", _scatter_tokens, ((64, 196, 768),), (3, 9, 5), "scatter_tokens"),
    Subject("gather_packed", _gather_packed, ((64, 196, 768),), (3, 9, 5), "gather_packed"),
    Subject("gather_bias", _gather_bias, ((64, 196, 12), (9, 37, 3)), (3, 9, 2), "gather_bias"),
    Subject(
        "scaled_cosine_error",
        _scaled_cosine,
        ((64, 196, 768), (7, 11, 1031)),
        (3, 9, 5),
        "scaled_cosine_error",
    ),
    Subject(
        "soft_cross_entropy",
        _soft,
        ((10, 64, 8192), (1, 1031, 4099), (2, 3, 65536)),
        (3, 2, 37),
        "soft_cross_entropy",
    ),
    Subject(
        "linear_soft_cross_entropy",
        _linear_soft,
        ((1024, 8192, 256), (1031, 4099, 70), (3, 65536, 384)),
        (21, 35, 19),
        "linear_soft_cross_entropy",
    ),
    Subject("chamfer", _chamfer, ((512, 32, 32), (8, 1031, 700)), (3, 9, 5), "chamfer"),
    Subject("ntxent", _ntxent, ((2048, 128), (1000, 2048)), (9, 5)),
    Subject("barlow-twins", _barlow, ((2048, 1024), (256, 4096)), (12, 7)),
    Subject("mae", _mae, ((64, 224, 16),), (3, 12, 4)),
    Subject(
        "pairwise_sigmoid",
        _sigmoid,
        ((4096, 8192, 128), (1, 1, 1), (4099, 2051, 70), (1027, 3000, 768)),
        (21, 35, 19),
        "pairwise_sigmoid",
    ),
]
