"""SIE: half of the features forget how a view was made, the other half can be steered by it.

A predictor, told how the second view lies to the first, must turn the first view's equivariant
embedding into the second's.  It is linear, and its weights are written by that relation alone, so
it can only succeed where the relation acts on the features as it acts on the image.
Source: Garrido et al. 2023, SIE, arXiv:2302.10283, section 4: features split, a projector for each
part, regularized together; one direction, from the first view to the second.
"""

import torch
from torch import Tensor, nn

from fastssl.losses import SIELoss
from fastssl.models import HypernetworkPredictor, feature_dim, projection_head

from .base import PARAMETERS, Batch, Method
from .configs import SIEConfig

_AT = {name: i for i, name in enumerate(PARAMETERS)}


def frame_change(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """M (B, 2, 2) and d (B, 2): a point at v in the first view is at M v + d in the second.

    first, second (B, P): the views' parameters.  v = (x, y) is measured from a view's center, in
    shares of its size.  A view takes the image's point q to

        T (q - c) / s + t     crop's center c and size s, T = turn after flip, shift t

    so that M = T_2 (s_1 / s_2) T_1^T.  It composes: from a to b, then to c, is from a to c.
    """
    turn_1, turn_2 = _turn(first), _turn(second)
    size_1, size_2 = (_columns(p, "width", "height") for p in (first, second))
    corner_1, corner_2 = (_columns(p, "left", "top") for p in (first, second))
    t_1, t_2 = (_columns(p, "shift_x", "shift_y") for p in (first, second))
    M = turn_2 * (size_1 / size_2).unsqueeze(1) @ turn_1.mT
    apart = (corner_1 + size_1 / 2 - corner_2 - size_2 / 2) / size_2
    d = (turn_2 @ apart.unsqueeze(2) - M @ t_1.unsqueeze(2)).squeeze(2) + t_2
    return M, d


def _columns(p: Tensor, *names: str) -> Tensor:
    return p[:, [_AT[name] for name in names]]


def _turn(p: Tensor) -> Tensor:
    """(B, 2, 2): the flip, then the turn (clockwise, as y points down)."""
    cos, sin, flip = (p[:, _AT[name]] for name in ("cos", "sin", "flip"))
    mirror = 1 - 2 * flip
    return torch.stack([cos * mirror, -sin, sin * mirror, cos], 1).unflatten(1, (2, 2))


def relation(first: Tensor, second: Tensor, *kinds: str) -> Tensor:
    """(B, C): how the second view lies to the first, the numbers of each kind side by side.

    "rotation", 4: T_2 T_1^T, the turn or, where one view is flipped, the reflection
    "geometry", 6: M and d of `frame_change`, which have crops and shifts in them as well
    "color", 7: the differences of the columns from brightness to solarize
    """
    M, d = frame_change(first, second)
    numbers = {
        "rotation": (_turn(second) @ _turn(first).mT).flatten(1),
        "geometry": torch.cat([M.flatten(1), d], 1),
        "color": (second - first)[:, _AT["brightness"] :],
    }
    return torch.cat([numbers[kind] for kind in kinds], 1)


_NUMBERS = {"rotation": 4, "geometry": 6, "color": 7}


class SIE(Method):
    """features(): the first `split` are the invariant ones, the others the equivariant ones."""

    preset, views, couples_batch, needs_view_params = "simclr", 2, True, True

    def __init__(self, encoder: nn.Module, cfg: SIEConfig):
        super().__init__()
        self.cfg, self.encoder = cfg, encoder
        widths = (feature_dim(encoder), cfg.hidden_dim, cfg.projection_dim)
        equi = [max(1, round(cfg.share * width)) for width in widths]
        inv = [width - part for width, part in zip(widths, equi, strict=True)]
        if min(inv) < 1:
            raise ValueError(f"method.share={cfg.share} leaves no invariant part of {widths}")
        self.split = inv[0]
        self.invariant, self.equivariant = (
            projection_head(dim, hidden, out, cfg.layers, final_norm=False)
            for dim, hidden, out in (inv, equi)
        )
        conditions = sum(_NUMBERS[kind] for kind in cfg.follows)
        self.predictor = HypernetworkPredictor(equi[2], conditions, hidden=cfg.reader)
        self.criterion = SIELoss(cfg.lambda_inv, cfg.lambda_equi, cfg.lambda_var, cfg.lambda_cov)

    def loss(self, encoded: list[Tensor], batch: Batch) -> dict[str, Tensor]:
        """Beside the loss: its `invariance` and `equivariance` errors."""
        parts = [self.project(features) for features in encoded]
        moved = self.predictor(parts[0][1], relation(*batch["params"], *self.cfg.follows))
        z_a, z_b = (torch.cat(pair, 1) for pair in parts)
        terms = self.criterion.terms(z_a, z_b, moved)
        return {
            "loss": self.criterion.weigh(terms),
            "invariance": terms.invariance.detach(),
            "equivariance": terms.equivariance.detach(),
        }

    def project(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """The invariant and the equivariant embedding of features (B, F)."""
        inv, equi = features[:, : self.split], features[:, self.split :]
        return self.invariant(inv), self.equivariant(equi)
