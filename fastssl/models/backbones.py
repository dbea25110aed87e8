"""Backbones from timm by name, without their classifier: views (B, ...) -> features (B, F).

timm's own read images (B, C, H, W); those that this package registers with timm read clips,
signals, clouds of points or rows of a table.
"""

import difflib
from collections.abc import Callable
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

# Norm before the mean over tokens, so that every layer of a pretrained encoder has been trained,
# whichever tokens the pretext task read.
_VIT_DEFAULTS = {"global_pool": "avg", "fc_norm": False}

# The models registered here: from the shape of what they read, their arguments.
OWN: dict[str, Callable[[tuple[int, ...]], dict[str, Any]]] = {
    "vit_video": lambda shape: {"in_chans": shape[0], "img_size": shape[1:]},
    "vit_signal": lambda shape: {"in_chans": shape[0], "img_size": shape[1:]},
    "table_transformer": lambda shape: {"columns": shape[0]},
    "point_transformer": lambda shape: {},
}


def build_backbone(name: str, *, shape: tuple[int, ...], kwargs: dict[str, Any]):
    """The timm model `name`, randomly initialised, `num_classes=0`.

    shape: of what it reads, without the batch: (C, H, W) of images, which are square.
    kwargs: anything the timm model takes (embed_dim, depth, patch_size, drop_path_rate ...).
    Raises ValueError for a name timm does not know (with the closest) and for arguments it refuses.
    """
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise ValueError(f"model.name={name!r} is not a timm model{hint}")
    arguments = backbone_arguments(name, shape, kwargs)
    try:
        model = timm.create_model(name, pretrained=False, **arguments)
        with torch.no_grad():  # a model of another image size is found out here, not in a worker
            model.eval()(torch.zeros(1, *shape))
        return model.train()
    except (TypeError, AssertionError, RuntimeError, ValueError) as error:
        first = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
        read = f"{shape[-1]}-pixel images" if len(shape) == 3 else f"a view of shape {shape}"
        raise ValueError(
            f"{name} with model.kwargs={kwargs} does not take {read}: {first}"
        ) from error


def backbone_arguments(name: str, shape: tuple[int, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What `timm.create_model` is given besides the name: our defaults, then `kwargs`."""
    family: dict[str, Any] = dict(_VIT_DEFAULTS) if is_vit(name) else {}
    if name in OWN:
        return {"num_classes": 0, **family, **OWN[name](shape), **kwargs}
    fixed = getattr(timm.models.get_pretrained_cfg(name), "fixed_input_size", False)
    if fixed or is_vit(name):
        family["img_size"] = shape[-1]
    return {"num_classes": 0, "in_chans": shape[0], **family, **kwargs}


def channels_of(weights: dict[str, torch.Tensor]) -> int:
    """How many channels a backbone of these weights reads: those of its first convolution, or the
    columns of a table; 3 of a cloud's points."""
    if "weight" in weights:  # one row a column
        return len(weights["weight"])
    patches = weights.get("patch_embed.proj.weight")
    first = next((w for w in weights.values() if w.ndim == 4), None) if patches is None else patches
    return 3 if first is None or first.ndim < 3 else int(first.shape[1])


def is_vit(name: str) -> bool:
    """Whether `name` is built by timm's VisionTransformer, the family `MaskedViT` wraps."""
    entry = timm.model_entrypoint(name)
    return entry.__annotations__.get("return") in (VisionTransformer, "VisionTransformer")


def feature_dim(backbone: nn.Module) -> int:
    """F, the width of the pooled features."""
    return int(getattr(backbone, "head_hidden_size", None) or backbone.num_features)  # type: ignore
