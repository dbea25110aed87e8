"""An encoder's map: the features of each place of an image, beside those of the whole."""

from math import isqrt
from typing import Any

from torch import Tensor, nn


def features_and_map(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """One pass of a timm model: features (B, F), and the map (B, E, h, w) that they are pooled of.

    images: (B, C, H, W), square where the model has tokens, and so are its patches.
    Raises ValueError for tokens that make no square.
    """
    timms: Any = model
    x = timms.forward_features(images)
    pooled = timms.forward_head(x)
    if x.ndim == 3:
        x = x[:, getattr(timms, "num_prefix_tokens", 0) :].transpose(1, 2)
        side = isqrt(x.shape[2])
        if side * side != x.shape[2]:
            raise ValueError(f"places must make a square, and the model has {x.shape[2]} tokens")
        return pooled, x.unflatten(2, (side, side))
    return pooled, x.movedim(-1, 1) if getattr(timms, "output_fmt", "NCHW") == "NHWC" else x


def map_decoder(model: nn.Module, dim: int, out: int, doublings: int) -> nn.Sequential:
    """From a model's map (B, E, h, w) to (B, out, h 2^doublings, w 2^doublings).

    A doubling is a bilinear resize, a convolution of 3 x 3, a norm of each image by itself and a
    ReLU; then a convolution of 1 x 1, a ReLU and another.
    Raises ValueError for a model that gives no map.
    """
    if not hasattr(model, "forward_features") or not hasattr(model, "forward_head"):
        got = type(model).__name__
        raise ValueError(f"features of places want one of timm's models, got {got}")
    width: Any = model.num_features
    layers: list[nn.Module] = []
    for _ in range(doublings):
        layers += [nn.Upsample(scale_factor=2, mode="bilinear")]
        layers += [nn.Conv2d(width, dim, 3, padding=1), nn.GroupNorm(1, dim), nn.ReLU()]
        width = dim
    layers += [nn.Conv2d(width, dim, 1), nn.ReLU(), nn.Conv2d(dim, out, 1)]
    return nn.Sequential(*layers)
