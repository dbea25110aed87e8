"""The parts of a run, made from its configuration: the method, the data, the checks."""

from pathlib import Path
from typing import NamedTuple

import torch

from fastssl import distributed
from fastssl.config import ConfigError, RunConfig, load
from fastssl.config.schema import ModelConfig
from fastssl.data.batch.ops import check_batch_ops
from fastssl.data.loader import PretrainLoader
from fastssl.data.render.backend import Rendering, choose_backend
from fastssl.data.sources.base import Source, Split
from fastssl.data.streams import stream
from fastssl.data.views.image import Views
from fastssl.data.views.streams import StreamViews, of_stream
from fastssl.engine.checkpoint import CheckpointError, is_network
from fastssl.engine.config import EngineError
from fastssl.engine.encoders import encoder_weights
from fastssl.methods import Method, build_method
from fastssl.models import (
    build_backbone,
    check_features,
    check_sizes,
    load_weights,
    probe,
    read_weights,
    timm_weights,
)


class Given(NamedTuple):
    """What a run has of its caller, as objects: None where its configuration says it."""

    encoder: torch.nn.Module | None = None
    split: Split | None = None


NOTHING = Given()


def build(
    cfg: RunConfig,
    channels: int | dict[str, int],
    notes: list[str] | None = None,
    encoder: torch.nn.Module | None = None,
) -> Method:
    """The method of `cfg` over its encoder, initialized from the run's seed.

    channels: of the data, by stream where there are several: then each has an encoder of its own.
    encoder: the one that was given from Python, as it is.
    notes: receives what a user should know of model.weights; without it they are not loaded.
    Raises ConfigError for a model, weights or options that do not fit.
    """
    torch.manual_seed(cfg.seed)
    try:
        if isinstance(channels, dict):
            method = build_method(stream_encoders(cfg, channels, notes, encoder), cfg.method)
        else:
            shapes = of_stream(cfg.views()).shapes(channels)
            encoder = start_encoder(cfg, shapes, notes, encoder)
            for side in check_batch_ops(cfg.data.batch_ops, shapes):
                check_side(encoder, channels, side)
            method = build_method(encoder, cfg.method)
        check_networks(method)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if method.couples_batch and cfg.batch_size == cfg.engine.accumulation:
        raise ConfigError(
            f"engine.accumulation={cfg.engine.accumulation} cuts batch_size={cfg.batch_size} into "
            f"micro-batches of one image, and {cfg.method.name} needs two or more to compare"
        )
    return method


def start_encoder(
    cfg: RunConfig,
    shapes: list[tuple[int, ...]],
    notes: list[str] | None,
    given: torch.nn.Module | None,
) -> torch.nn.Module:
    """The encoder of views of these shapes, with the weights that it starts from."""
    if given is None:
        model = {"shape": shapes[0], "kwargs": cfg.model.kwargs, "others": shapes[1:]}
        encoder = build_backbone(cfg.model.name, **model)
    else:
        what = f"model={type(given).__name__}"
        check_features(given, shapes[0], what)
        check_sizes(given, shapes, what)
        encoder = given
    if notes is not None and cfg.model.weights != "none":
        weights, partial = read_start(cfg.model), cfg.model.partial
        notes.append(load_weights(encoder, weights, cfg.model.weights, partial=partial))
    return encoder


def stream_encoders(
    cfg: RunConfig,
    channels: dict[str, int],
    notes: list[str] | None,
    given: torch.nn.Module | None,
) -> dict[str, torch.nn.Module]:
    """An encoder for each stream, by name."""
    if given is not None:
        raise ValueError("model is one module, and each stream has an encoder: give a model's name")
    views = cfg.views()
    assert isinstance(views, StreamViews), "the source is opened with the configuration's streams"
    shapes = views.shapes(channels)
    return {name: start_encoder(cfg, made, notes, None) for name, made in shapes.items()}


def read_start(model: ModelConfig) -> dict[str, torch.Tensor]:
    """The weights that model.weights names.  Raises ValueError, naming it, where there are none."""
    if model.weights == "timm":
        return timm_weights(model.name)
    path, network = Path(model.weights).expanduser(), ""
    if not path.exists() and ":" in path.name:
        run, _, network = str(path).rpartition(":")
        path = Path(run)
    if not path.is_dir():
        return read_weights(Path(model.weights).expanduser())
    try:
        return encoder_weights(path, network)[0]
    except (CheckpointError, EngineError) as error:
        raise ValueError(f"model.weights={model.weights}: {error}") from error


def check_networks(method: Method) -> None:
    """Raise ValueError where the method's networks cannot be kept by their names."""
    networks = method.networks()
    if not networks or not all(map(is_network, networks)):
        what = f"{type(method).__name__}.networks()"
        raise ValueError(f"{what} must be modules by name, as 'teacher': got {list(networks)}")


def check_side(encoder: torch.nn.Module, channels: int, side: int) -> None:
    """Raise ValueError where the encoder does not take images of the side that batch_ops make."""
    try:
        probe(encoder, (channels, side, side))
    except (TypeError, AssertionError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"data.batch_ops make images of {side} pixels, which the model does not take: choose a "
            "convolutional one, or for a timm ViT model.kwargs.dynamic_img_size=true"
        ) from error


def with_backend(cfg: RunConfig, source: Source) -> tuple[RunConfig, str]:
    """`cfg` with data.backend settled, and what a user should know of that.

    A run that is taken up keeps the back end that it began with, unless another is asked for.
    Raises DataError for DALI where it cannot serve.
    """
    asked, before = cfg.data.backend, "auto"
    if cfg.resume == "auto" and (cfg.directory / "config.yaml").is_file():
        before = load(cfg.directory).data.backend
    backend, note = choose_backend(before if asked == "auto" else asked, cfg.views(), source)
    if before not in ("auto", backend):
        note = f"views are made by {backend} from here on, and were by {before}: near, not the same"
    data = cfg.data.model_copy(update={"backend": backend})
    return cfg.model_copy(update={"data": data}), note


def build_loader(
    cfg: RunConfig, source: Source, device: torch.device, *, parameters: bool = False
) -> PretrainLoader:
    """The batches that this rank trains on, of a configuration whose back end is settled."""
    data, cuda = cfg.data, device.type == "cuda"
    rendering = Rendering(
        device=device if data.dali_on == "auto" else torch.device("cpu"),
        threads=max(data.workers, 1),
        readers=data.readers,
        half=cuda and cfg.engine.precision == "bf16",  # float16 is nearer than bfloat16, as small
        channels_last=data.channels_last,
    )
    return PretrainLoader(
        source,
        cfg.views(),
        batch_size=cfg.batch_size,
        seed=cfg.seed,
        rank=distributed.rank(),
        world=distributed.world_size(),
        workers=data.workers,
        parameters=parameters,
        last=data.last,
        rendering=rendering if data.backend == "dali" else None,
        max_bad=data.max_bad,
    )


def fitted(cfg: RunConfig, source: Source) -> RunConfig:
    """`cfg` with what its method leaves to the training data of `source`.

    Raises ConfigError where the method, or the views, need other data.
    """
    names = source.classes if source.labels is not None else None
    views = cfg.views()
    by_stream = views.streams if isinstance(views, StreamViews) else {"": views}
    try:
        for name, own in by_stream.items():
            part = stream(source, name) if name else source
            if isinstance(own, Views):
                check_images(own, part, f"data.streams.{name}" if name else "data")
        method = cfg.method.fitted(len(source), None if names is None else len(names))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return cfg.model_copy(update={"method": method})


def check_images(views: Views, source: Source, key: str) -> None:
    """Raise ValueError, naming `key`, where these views are not for the images of `source`."""
    try:
        views.check(source.channels, floats=getattr(source, "floats", False))
    except ValueError as error:
        raise ValueError(f"{key}.overrides: {error}") from error


def check_steps(cfg: RunConfig, loader: PretrainLoader) -> None:
    """Raise ConfigError for a schedule that does not fit the run's number of steps, and for a short
    batch of which a micro-batch would have too little."""
    rows, parts = loader.even_rows(loader.steps_per_epoch - 1), cfg.engine.accumulation
    least = 2 if cfg.method_class.couples_batch else 1
    if loader.last == "pad" and rows < least * parts:
        raise ConfigError(
            f"data.last=pad: an epoch's last batch has {len(loader.source) % loader.batch_size} of "
            f"{loader.batch_size} samples, fewer than {least} for each of {loader.world} ranks x "
            f"engine.accumulation={parts}: give data.last=drop, or another batch_size"
        )
    try:
        cfg.optim.schedule.factor(0, cfg.epochs * loader.steps_per_epoch)
    except ValueError as error:
        raise ConfigError(f"optim.{error}") from error
