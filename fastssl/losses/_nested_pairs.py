"""NT-Xent and CLIP of all nested prefixes by one sweep over the pairs: on a GPU, and over ranks.

    loss = sum over prefixes of its weight times the mean InfoNCE of its positives and its others
    others_pi    the log-sum-exp of prefix p: `pairwise_lse_nested`, which on a GPU multiplies each
                 feature once for the scores of all prefixes, and once for each side's gradient

The ranks' rows are gathered once, as they are, for all prefixes; their lengths come with the sweep.
By "ring" the prefixes are taken one after another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastssl.distributed import (
    Group,
    all_gather_nograd,
    all_gather_rows,
    all_to_all_rows,
    world_size,
)
from fastssl.kernels import exclude_self
from fastssl.kernels.common import accumulator
from fastssl.kernels.pairwise import (
    as_number,
    nested_matches,
    pairwise_lse_nested,
    takes_nested,
)
from fastssl.losses._checks import check_batch
from fastssl.losses._contrastive import info_nce, joined_ids, twice
from fastssl.losses.clip import CLIPLoss
from fastssl.losses.ntxent import NTXentLoss


class Prefixes:
    """Which prefixes there are, what their losses weigh, and whether they are made one long."""

    def __init__(self, dims: Sequence[int], weights: Sequence[float], normalize: bool) -> None:
        self.dims, self.weights, self.normalize = list(dims), list(weights), normalize

    def others(
        self,
        q: Tensor,
        k: Tensor,
        scale: float | Tensor,
        ids: Tensor,
        group: Group,
        both: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Log-sum-exps (P, b) of this rank's rows over every rank's keys of other ids.

        With `both` also (P, n) of this rank's keys over every rank's rows; k may be q itself.
        """
        W = world_size(group)
        theirs = all_gather_nograd(ids, group, check=False)
        mask = exclude_self(ids) if W == 1 else exclude_self(ids, theirs)
        keys = all_gather_rows(k, group, check=False)
        options: Any = {"normalize": self.normalize, "mask": mask, "both": both}
        rows, cols = pairwise_lse_nested(q, keys, scale, self.dims, **options)
        if W > 1 and both:
            parts = all_to_all_rows(cols.T.contiguous(), group)
            cols = parts.unflatten(0, (W, -1)).logsumexp(0).T
        return rows, cols

    def mean(self, each: Tensor) -> Tensor:
        """The weighted sum of the means of losses (P, ...)."""
        means = each.flatten(1).mean(1)
        return torch.stack([w * m for w, m in zip(self.weights, means, strict=True)]).sum()


def fits_pairs(loss: NTXentLoss | CLIPLoss, x: Tensor, y: Tensor) -> bool:
    """Whether the loss of these embeddings, or of images and texts, is one of prefixes' pairs."""
    if x.ndim != 2 or y.ndim != 2 or not (x.is_floating_point() and y.is_floating_point()):
        return False
    W = world_size(loss.process_group)
    return W > 1 and loss.strategy == "gather" or W == 1 and takes_nested(x)


def nt_xent(loss: NTXentLoss, prefixes: Prefixes, out0: Tensor, out1: Tensor) -> Tensor:
    group, scale = loss.process_group, 1 / loss.temperature
    check_batch(group, out0=out0, out1=out1)
    # In the dtype of sums, so that the positives' gradient and the others' are added there.
    z = torch.stack([out0, out1], 1).flatten(0, 1).to(accumulator(out0.dtype))
    ids = twice(joined_ids(len(out0), group, z.device))
    rows = z.to(out0.dtype)
    others, _ = prefixes.others(rows, rows, scale, ids, group)
    own = nested_matches(z[::2], z[1::2], prefixes.dims, normalize=True) * scale
    return prefixes.mean(info_nce(own.unsqueeze(2), others.unflatten(1, (-1, 2))))


def clip(
    loss: CLIPLoss, prefixes: Prefixes, x: Tensor, t: Tensor, logit_scale: float | Tensor
) -> Tensor:
    group, scale = loss.process_group, as_number("logit_scale", logit_scale, x)
    check_batch(group, image_features=x, text_features=t)
    ids, acc = joined_ids(len(x), group, x.device), accumulator(x.dtype)
    images, texts = x.to(acc), t.to(acc)
    given = images.to(x.dtype), texts.to(t.dtype)
    rows, cols = prefixes.others(*given, scale, ids, group, both=True)
    own = nested_matches(images, texts, prefixes.dims, prefixes.normalize) * scale
    return prefixes.mean(torch.stack([info_nce(own, rows), info_nce(own, cols)], 1))
