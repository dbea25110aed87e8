"""Backbones from timm by name, without their classifier: images (B, C, H, W) -> features (B, F)."""

import difflib
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

# Norm before the mean over tokens, so that every layer of a pretrained encoder has been trained,
# whichever tokens the pretext task read.
_VIT_DEFAULTS = {"global_pool": "avg", "fc_norm": False}


def build_backbone(name: str, *, channels: int, image_size: int, kwargs: dict[str, Any]):
    """The timm model `name`, randomly initialised, `num_classes=0`.

    channels: of the images.  image_size: side in pixels, handed to models with positions.
    kwargs: anything the timm model takes (embed_dim, depth, patch_size, drop_path_rate ...).
    Raises ValueError for a name timm does not know (with the closest) and for arguments it refuses.
    """
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise ValueError(f"model.name={name!r} is not a timm model{hint}")
    arguments = backbone_arguments(name, channels, image_size, kwargs)
    try:
        model = timm.create_model(name, pretrained=False, **arguments)
        with torch.no_grad():  # a model of another image size is found out here, not in a worker
            model.eval()(torch.zeros(1, channels, image_size, image_size))
        return model.train()
    except (TypeError, AssertionError, RuntimeError, ValueError) as error:
        first = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{name} with model.kwargs={kwargs} does not take {image_size}-pixel images: {first}"
        ) from error


def backbone_arguments(name: str, channels: int, image_size: int, kwargs: dict[str, Any]):
    """What `timm.create_model` is given besides the name: our defaults, then `kwargs`."""
    family: dict[str, Any] = dict(_VIT_DEFAULTS) if is_vit(name) else {}
    fixed = getattr(timm.models.get_pretrained_cfg(name), "fixed_input_size", False)
    if fixed or is_vit(name):
        family["img_size"] = image_size
    return {"num_classes": 0, "in_chans": channels, **family, **kwargs}


def is_vit(name: str) -> bool:
    """Whether `name` is built by timm's VisionTransformer, the family `MaskedViT` wraps."""
    entry = timm.model_entrypoint(name)
    return entry.__annotations__.get("return") in (VisionTransformer, "VisionTransformer")


def feature_dim(backbone: nn.Module) -> int:
    """F, the width of the pooled features."""
    return int(getattr(backbone, "head_hidden_size", None) or backbone.num_features)  # type: ignore
