"""The parts of a run, made from its configuration: the method, the data, the checks."""

from collections.abc import Mapping
from typing import NamedTuple

import torch

from fastssl import distributed
from fastssl.config import ConfigError, RunConfig, load
from fastssl.config.errors import about_stream
from fastssl.config.models import ModelConfig
from fastssl.data.batch.ops import check_batch_ops
from fastssl.data.loader import PretrainLoader
from fastssl.data.render.backend import Backend, Rendering, choose_backend
from fastssl.data.sources.base import Source, Split
from fastssl.data.streams import stream
from fastssl.data.views.image import Views
from fastssl.data.views.streams import StreamViews, of_stream
from fastssl.engine.config import EngineError
from fastssl.engine.large_batch import check_batch_norms
from fastssl.engine.networks import is_network
from fastssl.engine.optim import build_optimizer
from fastssl.export import start, teacher_model
from fastssl.methods import Method, build_method
from fastssl.models import build_backbone, check_features, check_sizes, freeze, load_method, probe
from fastssl.models.deferred import Deferred

Encoders = torch.nn.Module | Mapping[str, torch.nn.Module] | None


class Given(NamedTuple):
    """What a run has of its caller, as objects: None where its configuration says it.

    encoder: a module, or one for each stream by its name.
    """

    encoder: Encoders = None
    split: Split | None = None


NOTHING = Given()
LARGE = 300_000_000  # parameters of an encoder that is never whole in a process's memory


def begin(
    cfg: RunConfig,
    channels: int | dict[str, int],
    notes: list[str],
    encoder: Encoders = None,
    *,
    resumed: bool = False,
) -> tuple[Method, Deferred | None]:
    """The method of `cfg`, as of `build`; a large one without memory, and what makes its tensors.

    Constructors that need values at once have it built whole, as do weights that cannot be mapped.
    """
    if _is_large(cfg, channels, encoder):
        deferred, said = Deferred(), [*notes]
        try:
            with deferred:
                method = build(cfg, channels, said, resumed=resumed)
            deferred.check(method)
            notes[:] = said
            return method, deferred
        except Exception as error:  # NotDeferrable, and what a constructor makes of it
            if deferred.refused is None and isinstance(error, (ConfigError, EngineError)):
                raise
            why = deferred.refused or error
            notes.append(f"the model is built whole in each process: {why}")
    return build(cfg, channels, notes, encoder, resumed=resumed), None


def _is_large(cfg: RunConfig, channels: int | dict[str, int], encoder: Encoders) -> bool:
    """Whether the encoders that are to be built have more than LARGE parameters together."""
    by_stream = channels if isinstance(channels, dict) else {"": channels}
    models = {name: cfg.model_of(name or cfg.stream_of("")) for name in by_stream}
    if encoder is not None:
        return False
    count = 0
    for name, model in models.items():
        shape = of_stream(cfg.views(), name or None).shapes(by_stream[name])[0]
        try:
            with torch.device("meta"):
                built = build_backbone(model.name, shape=shape, kwargs=model.kwargs)
        except Exception:  # `build` tells what is wrong with it, or does without meta
            return False
        count += sum(p.numel() for p in built.parameters())
    return count > LARGE


def build(
    cfg: RunConfig,
    channels: int | dict[str, int],
    notes: list[str] | None = None,
    encoder: Encoders = None,
    *,
    resumed: bool = False,
) -> Method:
    """The method of `cfg` over its encoder, initialized from the run's seed.

    channels: of the data, by stream where there are several: then each has an encoder of its own.
    encoder: the one that was given from Python, as it is.
    notes: receives what a user should know of model.weights; without it they are not loaded.
    resumed: the weights are those of a checkpoint, which has none of a frozen network.
    Raises ConfigError for a model, weights or options that do not fit.
    """
    torch.manual_seed(cfg.seed)
    try:
        if isinstance(channels, dict):
            encoders = stream_encoders(cfg, channels, encoder, resumed, notes)
            method = build_method(encoders, cfg.method)
        else:
            if isinstance(encoder, Mapping):
                raise ValueError(
                    f"model has a module for each of {', '.join(encoder)}, and the data have one "
                    "stream: give one module"
                )
            shapes = of_stream(cfg.views()).shapes(channels)
            model = cfg.model_of(cfg.stream_of(""))
            begun = start_encoder(model, shapes, encoder, resumed, notes)
            for side in check_batch_ops(cfg.data.batch_ops, shapes):
                check_side(begun, channels, side)
            teacher = start_teacher(cfg, shapes, notes)
            method = build_method(begun, cfg.method, teacher)
        check_networks(method)
        if notes is not None and cfg.weights != "none" and not resumed:
            notes.append(load_method(method, method.networks(), cfg.weights, cfg.method.name))
        if not any(p.requires_grad for p in method.parameters()):
            raise ValueError(
                f"method.name={cfg.method.name} has nothing left to train: what it has is "
                "frozen, and it has no head"
            )
        groups = build_optimizer(method, cfg.optim).param_groups  # for what it refuses, as well
        if all(group["frozen_for"] >= cfg.epochs for group in groups):
            raise ValueError(
                f"optim.groups freeze every parameter for all of epochs={cfg.epochs}: give a "
                "smaller freeze_epochs"
            )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    check_batch_norms(method, cfg.engine, cfg.batch_size)
    alone = cfg.batch_size == cfg.engine.accumulation and cfg.engine.large_batch == "plain"
    if method.couples_batch and alone:
        raise ConfigError(
            f"engine.accumulation={cfg.engine.accumulation} cuts batch_size={cfg.batch_size} into "
            f"micro-batches of one image, and {cfg.method.name} needs two or more to compare"
        )
    return method


def start_encoder(
    model: ModelConfig,
    shapes: list[tuple[int, ...]],
    given: torch.nn.Module | None,
    resumed: bool,
    notes: list[str] | None,
) -> torch.nn.Module:
    """The encoder of views of these shapes, with the weights that it starts from, and frozen if it
    is to be.

    given: the module itself, where it is not to be built.
    """
    if given is None:
        how = {"shape": shapes[0], "kwargs": model.kwargs, "others": shapes[1:]}
        encoder = build_backbone(model.name, **how)
    else:
        what = f"model={type(given).__name__}"
        check_features(given, shapes[0], what)
        check_sizes(given, shapes, what)
        encoder = given
    if notes is not None and model.weights != "none" and (model.frozen or not resumed):
        notes.append(start(encoder, model))
    if model.frozen:
        freeze(encoder)
        count = sum(p.numel() for p in encoder.parameters())
        if notes is not None:
            notes.append(f"model.frozen=true: its {count:,} parameters stay as they are")
    return encoder


def start_teacher(
    cfg: RunConfig, shapes: list[tuple[int, ...]], notes: list[str] | None
) -> torch.nn.Module | None:
    """The frozen network that the method learns from, where it has one; also of a resumed run.

    Raises ValueError for a model or weights that do not fit, by the keys of teacher.
    """
    if not cfg.method_class.has_teacher:
        return None
    said: list[str] | None = None if notes is None else []
    try:
        teacher = start_encoder(teacher_model(cfg), shapes, None, True, said)
    except ValueError as error:
        raise ValueError(str(error).replace("model.", "teacher.")) from error
    if notes is not None:
        notes += [note.replace("model.", "teacher.") for note in said or []]
    return teacher


def stream_encoders(
    cfg: RunConfig,
    channels: dict[str, int],
    given: Encoders,
    resumed: bool,
    notes: list[str] | None,
) -> dict[str, torch.nn.Module]:
    """An encoder for each stream, by name."""
    views = cfg.views()
    assert isinstance(views, StreamViews), "the source is opened with the configuration's streams"
    if given is not None and not isinstance(given, Mapping):
        raise ValueError(
            f"model is one module, and each of the streams {', '.join(channels)} has an encoder: "
            "give a dictionary of modules by stream, or a model's name"
        )
    found: dict[str, torch.nn.Module] = {}
    several = not isinstance(cfg.model, ModelConfig)
    for name, made in views.shapes(channels).items():
        if not is_network(name) or hasattr(torch.nn.ModuleDict(), name):
            raise ValueError(f"a stream cannot be named {name!r}: give it another name")
        own = None if given is None else given.get(name)
        said: list[str] | None = None if notes is None else []
        try:
            found[name] = start_encoder(cfg.model_of(name), made, own, resumed, said)
        except ValueError as error:
            raise ValueError(
                f"the encoder of {name}: {about_stream(str(error), name) if several else error}"
            ) from error
        if notes is not None and said:
            notes += [
                f"the encoder of {name}: {about_stream(sentence, name) if several else sentence}"
                for sentence in said
            ]
    return found


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


def kept_backend(cfg: RunConfig) -> Backend:
    """That of the run which `cfg` takes up; "auto" where there is none."""
    if cfg.resume != "never" and (cfg.directory / "config.yaml").is_file():
        return load(cfg.directory).data.backend
    return "auto"


def with_backend(cfg: RunConfig, source: Source, before: Backend) -> tuple[RunConfig, str]:
    """`cfg` with data.backend settled, and what a user should know of that.

    before: `kept_backend`, with which a run that is taken up goes on unless another is asked for.
    Raises DataError for DALI where it cannot serve.
    """
    asked = cfg.data.backend
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
    couples = cfg.method_class.couples_batch
    alone = couples and cfg.engine.large_batch == "plain"
    least = max(2 if couples else 1, parts * (2 if alone or cfg.engine.micro_batchnorm else 1))
    if loader.last == "pad" and rows < least:
        raise ConfigError(
            f"data.last=pad: an epoch's last batch has {len(loader.source) % loader.batch_size} of "
            f"{loader.batch_size} samples, fewer than {least} for each of {loader.world} ranks "
            f"(engine.accumulation={parts}): give data.last=drop, or another batch_size"
        )
    try:
        cfg.optim.schedule.factor(0, cfg.epochs * loader.steps_per_epoch)
    except ValueError as error:
        raise ConfigError(f"optim.{error}") from error
