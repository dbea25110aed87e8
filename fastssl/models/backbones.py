"""Backbones from timm by name, without their classifier: views (B, ...) -> features (B, F).

timm's own read images (B, C, H, W); those that this package registers with timm read clips,
signals, clouds of points or rows of a table.
"""

import difflib
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

import timm
import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from fastssl.registry import PluginError, Registry

# Norm before the mean over tokens, so that every layer of a pretrained encoder has been trained,
# whichever tokens the pretext task read.
_VIT_DEFAULTS = {"global_pool": "avg", "fc_norm": False}

# Classes of timm's whose positions are interpolated to the size of an image, if they are told so.
_INTERPOLATING = ("VisionTransformer", "VisionTransformerDistilled", "Eva")

Arguments = Callable[[tuple[int, ...]], dict[str, Any]]
GIVEN = "given"  # the name of a module from Python
# The models that are not timm's own: from the shape of what they read, their arguments.
MODELS: Registry[Arguments] = Registry("model", "model.name")


def register_model(arguments: Arguments) -> Callable[[Callable[..., nn.Module]], Any]:
    """A decorator: what function(pretrained=False, num_classes=0, **kwargs) builds is a model of
    the function's name, of timm's registry and for model.name.

    arguments: of the function, from the shape of one view without the batch, (C, H, W) of images;
    those of model.kwargs come over them.  The module maps views (B, ...) to features (B, F).
    Raises PluginError where timm, or another module, has a model of that name.
    """

    def add(made: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        name, module = made.__name__, made.__module__
        if timm.is_model(name) and timm.model_entrypoint(name).__module__ != module:
            of = timm.model_entrypoint(name).__module__
            raise PluginError(f"two models are named {name!r}, of {of} and of {module}: rename one")
        MODELS.add(name, arguments, module=module)

        @wraps(made)
        def entry(pretrained: bool = False, **kwargs: Any) -> nn.Module:
            own = {key: value for key, value in kwargs.items() if key not in _OF_TIMMS_FACTORY}
            return made(pretrained=pretrained, **own)

        return timm.models.register_model(entry)

    return add


_OF_TIMMS_FACTORY = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")

# Arguments of timm.create_model that are not the user's to give, and why.
_REFUSED = {
    **dict.fromkeys(
        ("checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"),
        "a run starts from random weights",
    ),
    "num_classes": "the encoder has no classifier",
    **dict.fromkeys(("features_only", "out_indices"), "the encoder gives pooled features"),
}


def build_backbone(
    name: str,
    *,
    shape: tuple[int, ...],
    kwargs: dict[str, Any],
    others: Iterable[tuple[int, ...]] = (),
):
    """The timm model `name`, randomly initialized, `num_classes=0`.

    shape: of what it reads, without the batch: (C, H, W) of images, which are square.
    kwargs: anything the timm model takes (embed_dim, depth, patch_size, drop_path_rate ...).
    others: what else it is to read.  A ViT has its parameters for `shape`, and interpolates its
    positions for other sizes.
    Raises ValueError for a name timm does not know (with the closest), for arguments it refuses,
    for patches that leave a part of each view unread, and for a model of one size alone.
    """
    if name not in (*MODELS, GIVEN) and not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise ValueError(f"model.name={name!r} is not a timm model{hint}")
    for key, value in kwargs.items():
        if key in _REFUSED and value not in (False, None, *([0] if key == "num_classes" else [])):
            raise ValueError(f"model.kwargs.{key}={value!r}: {_REFUSED[key]}, leave {key} out")
    if name == GIVEN:
        raise ValueError(
            "model.name=given stands for a module that was given from Python: give it again, to "
            "fastssl.pretrain; its weights are in the run's checkpoints/*/encoder.safetensors"
        )
    what = f"{name} with model.kwargs={kwargs}"
    arguments = backbone_arguments(name, shape, kwargs)
    shapes = list(dict.fromkeys([shape, *others]))
    if len(shapes) > 1 and name not in MODELS and _returns(name) in _INTERPOLATING:
        arguments = {"dynamic_img_size": True, **arguments}
    try:
        model = timm.create_model(name, pretrained=False, **arguments)
    except (TypeError, AssertionError, RuntimeError, ValueError, LookupError, OSError) as error:
        raise _not_taken(what, shape, error) from error
    check_features(model, shape, what)
    check_sizes(model, shapes, what)
    return model


def check_features(model: nn.Module, shape: tuple[int, ...], what: str) -> None:
    """Raise ValueError for a model that does not make features (B, F) of views of that shape.

    what: it is called in sentences.  F is written down as timm's models have it, `num_features`.
    """
    try:
        features = probe(model, shape)  # another image size is found out here, not in a worker
    except (TypeError, AssertionError, RuntimeError, ValueError, LookupError, OSError) as error:
        raise _not_taken(what, shape, error) from error
    if not isinstance(features, torch.Tensor) or features.ndim != 2:
        got = f"{tuple(features.shape)}" if isinstance(features, torch.Tensor) else "a list"
        raise ValueError(
            f"{what} gives {got} for one view, not pooled features (1, F): leave global_pool and "
            "the like as they are"
        )
    if not hasattr(model, "num_features"):  # as timm's models say it
        model.num_features = features.shape[1]  # type: ignore[assignment]


def check_sizes(model: nn.Module, shapes: Iterable[tuple[int, ...]], what: str) -> None:
    """Raise ValueError for a model that takes the first of these shapes, but not all of them."""
    first, *others = dict.fromkeys(shapes)
    for shape in others:
        try:
            check_features(model, shape, what)
        except ValueError as error:
            sides = f"{first[-1]} and {shape[-1]}"
            raise ValueError(
                f"views have sizes of {sides}, and {error}: take a convolutional network or a timm "
                "ViT, or views of other sizes"
            ) from error


def _not_taken(what: str, shape: tuple[int, ...], error: Exception) -> ValueError:
    first = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
    read = f"{shape[-1]}-pixel images" if len(shape) == 3 else f"a view of shape {shape}"
    return ValueError(f"{what} does not take {read}: {first}")


def probe(model: nn.Module, shape: tuple[int, ...]) -> Any:
    """What the model makes of a view of zeros.

    Raises ValueError for an image size that patches do not fill (timm drops the rest in silence),
    and whatever the model raises for a shape that it does not take.
    """
    embed = getattr(model, "patch_embed", None)
    if isinstance(embed, PatchEmbed) and not embed.dynamic_img_pad:
        side, patch = shape[-1], int(max(embed.patch_size))
        if side % patch:
            fits = max(side // patch, 1) * patch
            raise ValueError(
                f"{side} is not a multiple of the patches' {patch}, and {side % patch} pixels of "
                f"each side would never be read: give {fits} (data.image_size, or of local views "
                "data.overrides.local_size) or model.kwargs.dynamic_img_pad=true"
            )
    training = model.training
    with torch.no_grad():
        features = model.eval()(torch.zeros(1, *shape))
    model.train(training)
    return features


def backbone_arguments(name: str, shape: tuple[int, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What `timm.create_model` is given besides the name: our defaults, then `kwargs`."""
    asked = {k: v for k, v in kwargs.items() if k not in _REFUSED}
    family: dict[str, Any] = dict(_VIT_DEFAULTS) if is_vit(name) else {}
    if name in MODELS:
        return {"num_classes": 0, **family, **MODELS[name](shape), **asked}
    fixed = getattr(timm.models.get_pretrained_cfg(name), "fixed_input_size", False)
    if fixed or is_vit(name) or asked.get("dynamic_img_size") is False:
        family["img_size"] = shape[-1]
    return {"num_classes": 0, "in_chans": shape[0], **family, **asked}


def channels_of(
    name: str,
    kwargs: dict[str, Any],
    weights: dict[str, torch.Tensor],
    shape_of: Callable[[int], tuple[int, ...]],
) -> int:
    """How many channels (a table's columns) a backbone of these weights reads: those with which
    every tensor has its shape.  For runs that have not written it down.

    shape_of(channels): of what it reads.  Raises ValueError where none fits.
    """
    if name == "table_transformer":
        return len(weights["weight"])
    shapes = {key: value.shape for key, value in weights.items()}
    for channels in (3, 1, 2, *range(4, 33)):
        with torch.device("meta"):
            arguments = backbone_arguments(name, shape_of(channels), kwargs)
            model = timm.create_model(name, pretrained=False, **arguments)
        if {key: value.shape for key, value in model.state_dict().items()} == shapes:
            return channels
    raise ValueError(
        f"the weights are of no {name} with model.kwargs={kwargs} and 1 to 32 channels"
    )


def is_vit(name: str) -> bool:
    """Whether `name` is built by timm's VisionTransformer, the family `MaskedViT` wraps."""
    return _returns(name) == VisionTransformer.__name__


def _returns(name: str) -> str:
    """The class of what timm builds under that name."""
    made = timm.model_entrypoint(name).__annotations__.get("return")
    return getattr(made, "__name__", str(made))


def feature_dim(backbone: nn.Module) -> int:
    """F, the width of the pooled features."""
    return int(getattr(backbone, "head_hidden_size", None) or backbone.num_features)  # type: ignore
