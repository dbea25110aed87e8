"""Small whole runs for tests: a tiny ViT on 130 digits, about a second each."""

import copy
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fastssl.config import RunConfig, from_mapping

VIT = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
_DECODER = {"decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2}
_SCORES = {"prototypes": 24, "hidden_dim": 32, "bottleneck_dim": 16, "layers": 2}
METHODS: dict[str, dict[str, Any]] = {
    "simclr": {"name": "simclr", "hidden_dim": 32, "projection_dim": 16},
    "dcl": {"name": "dcl", "hidden_dim": 32, "projection_dim": 16},
    "mocov3": {"name": "mocov3", "hidden_dim": 32, "projection_dim": 16, "layers": 2},
    "byol": {"name": "byol", "hidden_dim": 32, "projection_dim": 16},
    "directpred": {"name": "directpred", "hidden_dim": 32, "projection_dim": 16},
    "simsiam": {"name": "simsiam", "projection_dim": 32, "prediction_hidden_dim": 16},
    "mocov2": {"name": "mocov2", "hidden_dim": 32, "projection_dim": 16, "queue_size": 64},
    "swav": {
        **{"name": "swav", "hidden_dim": 32, "projection_dim": 16},
        **{"prototypes": 20, "queue_size": 8},
    },
    "msn": {
        **{"name": "msn", "hidden_dim": 32, "projection_dim": 16, "layers": 2},
        **{"prototypes": 20, "mask_ratio": 0.25},
    },
    "nnclr": {
        **{"name": "nnclr", "hidden_dim": 32, "projection_dim": 16, "layers": 2},
        **{"prediction_hidden_dim": 32, "queue_size": 300},
    },
    "clip": {"name": "clip", "hidden_dim": 32, "projection_dim": 16},
    "sla": {"name": "sla", "distill": True},
    "barlow_twins": {"name": "barlow_twins", "hidden_dim": 32, "projection_dim": 48, "layers": 2},
    "mixed_barlow_twins": {
        **{"name": "mixed_barlow_twins", "hidden_dim": 32, "projection_dim": 48, "layers": 2},
    },
    "vicreg": {"name": "vicreg", "hidden_dim": 32, "projection_dim": 48, "layers": 2},
    "ssl_ey": {"name": "ssl_ey", "hidden_dim": 32, "projection_dim": 16, "layers": 2},
    "groco": {"name": "groco", "hidden_dim": 32, "projection_dim": 16, "negatives": 3},
    "isogclr": {"name": "isogclr", "hidden_dim": 32, "projection_dim": 16, "size": 130},
    "matryoshka": {"name": "matryoshka", "dims": [4, 16, 32], "weights": [1.0, 0.5, 2.0]},
    "mochi": {
        **{"name": "mochi", "hidden_dim": 32, "projection_dim": 16, "queue_size": 64},
        **{"top_n": 8, "synthetic": 6, "from_query": 3, "momentum": 0.9},
    },
    "dino": {"name": "dino", **_SCORES},
    "ibot": {"name": "ibot", **_SCORES},
    "dinov2": {"name": "dinov2", "assignment": "sinkhorn", "patch_prototypes": 20, **_SCORES},
    "dinov3": {"name": "dinov3", **_SCORES, "patch_prototypes": 20},
    "global_local": {
        **{"name": "global_local", "hidden_dim": 32, "projection_dim": 16},
        **{"upsampled": 1, "local_dim": 8},
    },
    "sie": {"name": "sie", "hidden_dim": 32, "projection_dim": 48, "layers": 2},
    "mae": {"name": "mae", **_DECODER},
    "simmim": {"name": "simmim", "mask_ratio": 0.5},
    "gmml": {"name": "gmml"},
    "sit": {"name": "sit", "projection_dim": 16},
    "cae": {"name": "cae", "regressor_depth": 1, **_DECODER},
    "selfie": {"name": "selfie", "hidden_dim": 32},
    "cropmae": {"name": "cropmae", "mask_ratio": 0.9, **_DECODER},
    "ijepa": {"name": "ijepa", "target": 0.2, "blocks": 3, **_DECODER},
    "data2vec": {"name": "data2vec", "layers": 2, "masks": 2, "mask_ratio": 0.75, **_DECODER},
}
OF_TOKENS = ("ibot", "dinov2", "dinov3")  # that train class tokens
# Methods that learn from a frozen teacher: what they are told besides teacher.weights.
DISTILL: dict[str, dict[str, Any]] = {
    "distill": {"name": "distill"},
    "seed": {"name": "seed", "hidden_dim": 32, "queue_size": 60, "teacher_temperature": 0.1},
    "mask_distill": {"name": "mask_distill", "masks": 2, "layers": 2, **_DECODER},
}
BASE: dict[str, Any] = {
    "name": "run",
    "seed": 3,
    "device": "cpu",
    "epochs": 2,
    "batch_size": 24,
    "model": {"name": "vit_tiny_patch16_224", "kwargs": VIT},
    "data": {
        "image_size": 16,
        "workers": 0,
        "overrides": {"crop_scale": [0.6, 1.0], "flip": 0.0, "jitter": 0.0},
    },
    "optim": {"lr": 1e-3, "clip": 1.0},
    "evaluate": {"max_images": 128},
    "log": {"every": 1, "tensorboard": False},
}

_BLOCKS = {"embed_dim": 32, "depth": 2, "num_heads": 2}
# Methods that read no images: their options, and the model, source and size of their runs.
OTHERS: dict[str, dict[str, Any]] = {
    "videomae": {
        "method": {"name": "videomae", "mask_ratio": 0.75, **_DECODER},
        "model": {"name": "vit_video", "kwargs": VIT},
        "source": {"name": "clips", "classes": 4, "per_class": 50, "frames": 4, "size": 16},
        "image_size": 16,
        "overrides": {"frames": 4},
    },
    "signal_mae": {
        "method": {"name": "signal_mae", "span": 2, **_DECODER},
        "model": {"name": "vit_signal", "kwargs": {**_BLOCKS, "patch_size": 8}},
        "source": {"name": "signals", "classes": 4, "per_class": 50, "length": 160},
        "image_size": 128,
    },
    "tjepa": {
        "method": {"name": "tjepa", **_DECODER},
        "model": {"name": "table_transformer", "kwargs": _BLOCKS},
        "source": {"name": "table", "dataset": "wine"},
    },
    "point_mae": {
        "method": {"name": "point_mae", **_DECODER},
        "model": {"name": "point_transformer", "kwargs": {**_BLOCKS, "groups": 8, "group_size": 6}},
        "source": {"name": "clouds", "classes": 4, "per_class": 50, "points": 64},
        "image_size": 48,
    },
}
OTHERS["point_cmae"] = {**OTHERS["point_mae"], "method": {"name": "point_cmae", **_DECODER}}


def few_digits(count: int = 140) -> dict[str, Any]:
    """A source of the first `count` of scikit-learn's digits, a tenth of them held out."""
    path = Path(tempfile.gettempdir()) / f"fastssl-{count}-digits-{os.getuid()}.npz"
    if not path.is_file():
        from fastssl.data.sources.digits import DigitsSource

        (digits,) = DigitsSource().open()
        aside = path.with_suffix(f".{os.getpid()}.npz")  # processes make it side by side
        np.savez(aside, images=digits.pixels[:count].numpy(), labels=digits.labels[:count].numpy())
        aside.replace(path)
    return {"name": "arrays", "path": str(path), "test_fraction": 0.1}


def _base(method: str) -> dict[str, Any]:
    """The run's mapping but for its output."""
    base = copy.deepcopy(BASE)
    if method in METHODS or method in DISTILL:
        base["data"]["source"] = few_digits()  # 5 batches, and some
        if method in OF_TOKENS:
            base["model"]["kwargs"]["global_pool"] = "token"
        return base | {"method": dict((METHODS | DISTILL)[method])}
    own = copy.deepcopy(OTHERS[method])
    data = {k: own[k] for k in ("source", "image_size", "overrides") if k in own}
    whole = {"method": own["method"], "model": own["model"], "data": {**data, "workers": 0}}
    return base | whole | {"batch_size": 40}


def tiny(method: str, output: Path, **changes: Any) -> RunConfig:
    """A run of `method` in `output`; changes are dotted keys with `__` for the dot."""
    mapping = _base(method) | {"output": str(output)}
    for key, value in changes.items():
        *sections, last = key.split("__")
        place = mapping
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return from_mapping(mapping)


def losses(cfg: RunConfig) -> list[float]:
    """The loss curve a run has logged."""
    from fastssl.report import read_metrics

    rows = read_metrics(cfg.directory / "metrics.jsonl")
    return [row["loss"] for row in rows if row["kind"] == "train"]


def final(cfg: RunConfig) -> list[dict[str, Any]]:
    """What a run ends with, less what depends on the clock."""
    from fastssl.report import read_metrics

    rows = read_metrics(cfg.directory / "metrics.jsonl")
    kept = [row for row in rows if row["kind"] != "event"]
    clocked = ("images_per_s", "data_wait")
    return [{k: v for k, v in row.items() if k not in clocked} for row in kept]


def saved_state(checkpoint: Path) -> dict[str, Tensor]:
    """All pieces in a checkpoint, put together: flat tensors by "NAME|FIELD"."""
    pieces: dict[str, dict[int, Tensor]] = {}
    for path in checkpoint.glob("state-*.safetensors"):
        for key, piece in load_file(path).items():
            name, _, offset = key.rpartition("|")
            assert int(offset) not in pieces.setdefault(name, {}), key
            pieces[name][int(offset)] = piece.reshape(-1)
    whole = {}
    for name, parts in pieces.items():
        end = 0
        for offset in sorted(parts):
            assert name == "|rest" or offset == end, f"{name} has a gap or an overlap"
            end += parts[offset].numel()
        whole[name] = torch.cat([parts[offset] for offset in sorted(parts)])
    return whole


def without_pictures(setattr: Callable[[Any, str, Any], None] = setattr) -> None:
    """Runs draw no plots and cut probes short, from now on or while a monkeypatch's setattr holds.

    Both are half of a small run's time.
    """
    from fastssl import evaluate
    from fastssl.run import evaluation

    whole = evaluate.fit_probe
    setattr(evaluate, "fit_probe", lambda *data, l2, max_iter: whole(*data, l2=l2, max_iter=5))

    for name in ("plot_views", "plot_curves", "plot_embedding", "plot_reconstructions"):
        assert hasattr(evaluation, name)
        setattr(evaluation, name, lambda *args, **kwargs: None)


def weights_of(engine: Any, name: str = "") -> dict[str, Tensor]:
    """A network's state_dict, whole and of the float32 masters, past what checkpoints are made of;
    collective.

    name: among the method's networks; the first of them by default.
    """
    networks = engine.method.networks()
    network = networks[name or next(iter(networks))]
    every = [*network.named_buffers(remove_duplicate=False)]
    tensors = dict([*every, *network.named_parameters(remove_duplicate=False)])
    return {key: whole(engine, tensors[key]).cpu().clone() for key in network.state_dict()}


def whole(engine: Any, tensor: Tensor) -> Tensor:
    """A parameter in full and float32, wherever ZeRO keeps it; a buffer as it is; collective."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    if not isinstance(tensor, nn.Parameter):
        return tensor.detach()
    master = safe_get_full_fp32_param(tensor)
    if master is not None:
        return master.float().reshape(getattr(tensor, "ds_shape", tensor.shape))
    if hasattr(tensor, "ds_id"):  # frozen at stage 3: cut, and without a master
        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().float().clone()
    optimizer = engine.ds.optimizer
    groups = zip(
        getattr(optimizer, "fp16_groups", []), getattr(optimizer, "fp32_groups", []), strict=True
    )
    for halves, masters in groups:  # bfloat16 at stage 0
        for half, wide in zip(halves, masters, strict=True):
            if half is tensor:
                return wide.detach()
    return tensor.detach().float()
