"""A run's encoder for use elsewhere: loaded from safetensors, never from a pickle."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastssl import config
from fastssl.config import ConfigError, RunConfig
from fastssl.config.schema import ModelConfig
from fastssl.data.datasets import (
    DigitsSource,
    FolderSource,
    FractalsSource,
    SourceConfig,
    open_source,
)
from fastssl.data.errors import DataError
from fastssl.data.streams import split_of_stream
from fastssl.data.views.image import Views
from fastssl.data.views.spec import ViewSpec
from fastssl.data.views.streams import of_stream
from fastssl.engine.checkpoint import CheckpointError
from fastssl.engine.config import EngineError
from fastssl.engine.encoders import moving_networks, saved_encoder, saved_method
from fastssl.engine.states import EncoderFile
from fastssl.engine.tensor_files import in_order, write_split
from fastssl.evaluate.embed import EmbedConfig, embed
from fastssl.files import write_atomically
from fastssl.models import (
    MODELS,
    backbone_arguments,
    build_backbone,
    channels_of,
    feature_dim,
    fingerprint,
    load_weights,
    read_weights,
    timm_weights,
)

METHOD = "method.safetensors"  # beside an encoder's export: heads and teacher too


class Encoder(nn.Module):
    """A pretrained encoder alone: normalized images (B, C, H, W) -> features (B, F) float32."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        device = next(self.parameters()).device
        return self.backbone(images.to(device)).float()


def load_encoder(
    run: Path, name: str = "", *, device: str = "auto"
) -> tuple[Encoder, RunConfig, int]:
    """An encoder of a run's newest intact checkpoint, its configuration, and its channels.

    name: of one of the method's networks, such as "teacher"; the primary one by default.
    Raises ConfigError when `run` is none, EngineError when it has no encoder of that name,
    CheckpointError when it has no intact checkpoint, or a single tensor is missing or does not fit.
    """
    cfg, saved = config.load(run), saved_encoder(run, name)
    stream = cfg.stream_of(saved.name)
    views, channels = of_stream(cfg.views(), stream), saved.channels_of(stream)
    try:
        model = _model_of(cfg, saved.name)
        if channels is None:  # of a run before it was written down
            weights, of = saved.weights(), views.shapes
            channels = channels_of(model.name, model.kwargs, weights, lambda c: of(c)[0])
        shape = views.shapes(channels)[0]
        backbone = build_backbone(model.name, shape=shape, kwargs=model.kwargs)
        if saved.frozen:
            start(backbone, model)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    try:
        if not saved.frozen:
            backbone.load_state_dict(saved.weights(), strict=True)
        elif fingerprint(backbone) != saved.frozen:
            raise CheckpointError(
                f"model.weights={model.weights} are not those with which {run} had "
                f"{saved.name} frozen"
            )
    except RuntimeError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"the weights of {run} are not of its model: {error}") from error
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return Encoder(backbone.eval().to(device)), cfg, channels


def teacher_model(cfg: RunConfig) -> ModelConfig:
    """What the configuration's teacher is: with teacher.name=auto as the run that it is of has it.

    Raises ValueError where that is no run.
    """
    teacher = cfg.teacher
    model = {"name": teacher.name, "kwargs": teacher.kwargs}
    if teacher.name == "auto":
        path, network = Path(teacher.weights).expanduser(), ""
        if not path.exists() and ":" in path.name:
            run, _, network = str(path).rpartition(":")
            path = Path(run)
        try:
            its = config.load(path)
            own = _model_of(its, network)
        except ConfigError as error:
            raise ValueError(f"teacher.name=auto of teacher.weights={path}: {error}") from error
        model = {"name": own.name, "kwargs": {**own.kwargs, **teacher.kwargs}}
    return ModelConfig(**model, weights=teacher.weights, frozen=True)  # type: ignore[call-arg]


def _model_of(cfg: RunConfig, network: str) -> ModelConfig:
    """What one of a run's networks is."""
    if network == "teacher" and cfg.method_class.has_teacher:
        return teacher_model(cfg)
    return cfg.model_of(cfg.stream_of(network))


def start(encoder: nn.Module, model: ModelConfig) -> str:
    """Fill an encoder with model.weights, and return a sentence that says what became of them.

    Raises ValueError, naming them, where there are none or they do not fit.
    """
    return load_weights(encoder, _read(model), model.weights, partial=model.partial)


def _read(model: ModelConfig) -> dict[str, Tensor]:
    if model.weights == "timm":
        return timm_weights(model.name)
    path, network = Path(model.weights).expanduser(), ""
    if not path.exists() and ":" in path.name:
        run, _, network = str(path).rpartition(":")
        path = Path(run)
    if not path.is_dir():
        return read_weights(Path(model.weights).expanduser())
    try:
        saved = saved_encoder(path, network)
        if saved.frozen:  # it has its weights from elsewhere
            return load_encoder(path, network, device="cpu")[0].backbone.state_dict()
        return saved.weights()
    except (CheckpointError, EngineError, ConfigError) as error:
        raise ValueError(f"model.weights={model.weights}: {error}") from error


def export(run: Path, out: Path, fmt: str, name: str = "") -> Path:
    """Write an encoder to `out` and read it back: every tensor must be there and equal.

    fmt "safetensors": one file.  fmt "timm": a directory that
    `timm.create_model("local-dir:OUT", pretrained=True)` loads, with timm's own key names; with
    num_classes=10 it gets a fresh classifier, and in_chans=4 adapts what reads 3 channels.
    name: of the encoder, as `load_encoder` takes it.
    Raises ConfigError for another fmt, "timm" of a model that timm has not, or an `out` that exists
    and is something else.
    """
    if fmt not in ("timm", "safetensors"):
        raise ConfigError(f"--format {fmt!r} is not one of timm, safetensors")
    if out.is_dir() if fmt == "safetensors" else out.is_file():
        wanted = "file" if fmt == "safetensors" else "directory"
        raise ConfigError(f"--out {out} is there and no {wanted}, which {fmt} wants")
    encoder, cfg, channels = load_encoder(run, name, device="cpu")
    stream = cfg.stream_of(name)
    model = _model_of(cfg, name)
    if fmt == "timm" and model.name in MODELS:
        raise ConfigError(f"--format timm is for timm's models, not {model.name}: safetensors")
    backbone = encoder.backbone
    # Apart, what two modules share too: safetensors refuses it otherwise.
    apart = {"memory_format": torch.contiguous_format}
    weights = {k: v.clone(**apart) for k, v in backbone.state_dict().items()}
    facts = {"format": "pt", "architecture": model.name, "method": cfg.method.name}
    with _writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        if fmt == "safetensors":
            save_file(weights, out, metadata=facts)
            back = load_file(out)
        else:
            out.mkdir(exist_ok=True)
            save_file(weights, out / "model.safetensors", metadata=facts)
            text = json.dumps(
                _timm_config(model, of_stream(cfg.views(), stream), backbone, channels), indent=1
            )
            write_atomically(out / "config.json", text)
            back = timm.create_model(f"local-dir:{out}", pretrained=True).state_dict()
    different = [k for k in weights.keys() | back.keys() if not _equal(weights, back, k)]
    if different:
        raise ValueError(f"the export of {run} does not read back equal: {sorted(different)[:5]}")
    return out


def export_method(run: Path, out: Path) -> Path:
    """Write the whole method, heads and teacher too, beside the encoder that `export` has written
    to `out`: what the key `weights` of another run takes; read back, and every tensor equal.

    One safetensors file, or several and an index: parameters in float32, and buffers, by the names
    that the method has for them ("student.1.0.weight", "teacher.model.0.cls_token").  Its metadata
    say which of these names' beginnings are networks: {"networks": '{"encoder": "student.0."}'}.
    Of a frozen network there is nothing.  Returns the file to give: the index where there is one.
    Raises ConfigError where it cannot be written, CheckpointError for a run without a checkpoint.
    """
    path = out / METHOD if out.suffix != ".safetensors" else out.with_suffix(f".{METHOD}")
    cfg, saved = config.load(run), saved_method(run)
    networks = {name: _prefix(run, name, saved) for name in moving_networks(run)}
    facts = {"method": cfg.method.name, "networks": json.dumps(networks)}
    with _writing(out):
        index = path.with_name(f"{path.name}.index.json")
        index.unlink(missing_ok=True)
        write_split(path, saved.kinds, map(saved.tensor, in_order(saved.kinds)), facts)
        path = index if index.is_file() else path
        back = read_weights(path)
    different = [
        k
        for k in saved.kinds.keys() | back.keys()
        if k not in saved.kinds or not _equal({k: saved.tensor(k)}, back, k)
    ]
    if different:
        raise ValueError(f"the export of {run} does not read back equal: {sorted(different)[:5]}")
    return path


def _prefix(run: Path, name: str, saved: EncoderFile) -> str:
    """What the method puts before the names of a network's tensors."""
    weights = saved_encoder(run, name).weights()
    first = next(iter(weights))
    for prefix in (key.removesuffix(first) for key in saved.kinds if key.endswith(first)):
        if all(prefix + k in saved.kinds for k in weights):
            if all(torch.equal(saved.tensor(prefix + k), x) for k, x in weights.items()):
                return prefix
    return ""  # of tensors that are not the method's alone


@contextlib.contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"--out {out} cannot be written: {error}") from error


def embed_to_file(
    run: Path, data: str, out: Path, name: str = ""
) -> tuple[int, list[tuple[str, str]]]:
    """Features of every item of `data`, to `out`; how many, and the ones that could not be read.

    data: digits, fractals, a folder (class folders or flat), or the name of the run's own source.
    name: of the encoder, as `load_encoder` takes it.
    The .npz holds features (N, F) float32, names (N,), split (N,) "train" or "test" as a run with
    this seed splits them, and where there are labels: labels (N,) int64 and classes.
    Raises DataError for data that cannot be used, and where its images have other channels.
    """
    encoder, cfg, channels = load_encoder(run, name)
    stream = cfg.stream_of(name)
    views = of_stream(cfg.views(), stream)
    how = EmbedConfig(views=views, batch_size=cfg.evaluate.batch_size, workers=cfg.data.workers)
    source = _source(data, cfg)
    own = source is cfg.data.source
    opened = open_source(source, cfg.seed, cfg.data.streams if own else ())
    split = split_of_stream(opened, stream)
    if split.train.channels != channels:
        raise DataError(
            f"the encoder of {run} reads {channels} channels; {data} has {split.train.channels}"
        )
    parts = [(which, part) for which, part in zip(split._fields, split, strict=True) if len(part)]
    done = [(which, part, embed(encoder, part, how)) for which, part in parts]
    columns = {
        "features": np.concatenate([e.features.numpy() for _, _, e in done]),
        "names": np.array([part.name(i) for _, part, e in done for i in e.index.tolist()]),
        "split": np.concatenate([np.full(len(e.index), which) for which, _, e in done]),
    }
    if all(e.labels is not None for _, _, e in done):
        columns["labels"] = np.concatenate([e.labels.numpy() for _, _, e in done])  # type: ignore
        columns["classes"] = np.array(split.train.classes)
    aside = out.with_name(f".{out.name}.partial.npz")
    with _writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        np.savez(aside, **columns)  # type: ignore[arg-type]
        aside.replace(out)
    return len(columns["names"]), [entry for _, _, e in done for entry in e.bad]


def _source(data: str, cfg: RunConfig) -> SourceConfig:
    if data == cfg.data.source.name and data != "fractals":
        return cfg.data.source
    if data == "digits":
        return DigitsSource()
    if data == "fractals":
        return FractalsSource(size=cfg.data.image_size)
    return FolderSource(path=Path(data))


def _timm_config(model: ModelConfig, views: ViewSpec, backbone: nn.Module, channels: int) -> dict:
    """The config.json beside timm's weights: how to build the model, how to prepare its images."""
    shape = views.shapes(channels)[0]
    known = timm.models.get_pretrained_cfg(model.name)
    prepared: dict[str, Any] = {"num_classes": 0, "input_size": list(shape)}
    for fact in ("classifier", "first_conv"):  # what timm replaces and adapts for fine-tuning
        prepared[fact] = getattr(known, fact, None)
    if isinstance(views, Views):
        mean, std = views.normalization(channels)
        prepared |= {"mean": list(mean), "std": list(std)}
        prepared |= {"interpolation": "bilinear", "crop_pct": 1.0}
    return {
        "architecture": model.name,
        "num_classes": 0,
        "num_features": feature_dim(backbone),
        "model_args": backbone_arguments(model.name, shape, model.kwargs),
        "pretrained_cfg": prepared,
    }


def _equal(a: dict[str, Tensor], b: dict[str, Tensor], key: str) -> bool:
    if key not in a or key not in b:
        return False
    return torch.allclose(a[key], b[key], rtol=0, atol=0, equal_nan=True)
