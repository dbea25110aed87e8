"""A run's configuration: the whole schema, YAML recipes, dotted overrides, and clear refusals.

    resolve("simclr-digits", ["optim.lr=1e-3", "epochs=5"]) -> RunConfig

Every key is described here or in the file of the part it configures; unknown keys are refused.
"""

import difflib
import json
import re
import types
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from yaml import YAMLError

from fastssl.data.batch.ops import AnyBatchOp
from fastssl.data.datasets import SourceConfig
from fastssl.data.render.backend import Backend
from fastssl.data.views.spec import ViewSpec, view_spec
from fastssl.engine.config import CheckpointConfig, EngineConfig
from fastssl.engine.optim import OptimConfig, check_optimizer
from fastssl.methods import METHODS, AnyMethodConfig

SWITCHED = ("method", "model", "data.source", "optim.schedule")
_SOURCE = tuple(f"data.source.{key}" for key in ("path", "val", "cache", "image", "label"))
VERBATIM = ("name", "output", "model.name", *_SOURCE)


class ConfigError(ValueError):
    """A configuration to be mended: one sentence naming the key, the value and what is allowed."""

    exit_code, on_every_rank = 2, True


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelConfig(Section):
    name: str = Field(
        "vit_small_patch16_224", description="Any timm model; masked methods need a vit_*."
    )
    kwargs: dict[str, Any] = Field({}, description="Arguments of the timm model (depth=4 ...).")


class DataConfig(Section):
    source: SourceConfig = Field(
        description="Where the data come from: digits, fractals, folder ..."
    )
    image_size: int = Field(
        224,
        ge=1,
        description="Side of views in pixels; of signals the samples, of clouds the points.",
    )
    augment: str | None = Field(None, description="Augmentation preset; default: the method's own.")
    overrides: dict[str, Any] = Field({}, description="Fields of every view, over the preset's.")
    batch_ops: tuple[AnyBatchOp, ...] = Field(
        (), description="Done to a batch of views, in order: mixup, noise, style, fields ..."
    )
    workers: int = Field(
        4, ge=0, description="Loader processes a rank, 0: in the main process; DALI's threads."
    )
    backend: Backend = Field(
        "auto", description="Who makes views: torch (torchvision), dali, or auto: dali if it can."
    )
    readers: int = Field(
        1, ge=0, description="With DALI: processes a rank that read files; 0: the main process."
    )
    dali_on: Literal["auto", "cpu"] = Field(
        "auto", description="Where DALI decodes and augments; auto: where the model is."
    )
    channels_last: bool = Field(False, description="With DALI: batches in that memory format.")
    last: Literal["drop", "pad"] = Field(
        "drop",
        description="An epoch's short batch: dropped, or filled with marked samples of its own, "
        "which no method leaves out yet: pad wants a batch_size that divides the data.",
    )
    changed: Literal["refuse", "allow"] = Field(
        "refuse", description="allow: resume although items were added, removed or renamed."
    )
    max_bad: float = Field(
        0.5, ge=0, le=1, description="Share of unreadable samples above which a run stops."
    )


class EvaluateConfig(Section):
    every: int = Field(0, ge=0, description="Evaluate every so many epochs; 0: at the end only.")
    neighbours: int = Field(20, ge=1, description="k of the nearest-neighbour classifier.")
    batch_size: int = Field(256, ge=1, description="Images a rank embeds at once.")
    max_images: int = Field(10_000, ge=2, description="Of each split, at most so many embedded.")


class LogConfig(Section):
    every: int = Field(10, ge=1, description="Steps between two rows of metrics.jsonl.")
    tensorboard: bool = Field(True, description="Write TensorBoard events through DeepSpeed.")


class RunConfig(Section):
    """One pretraining run, complete.  Written to RUN/config.yaml, from which it reloads equal."""

    name: str = Field(description="Name of the run: its directory under `output`.", min_length=1)
    output: Path = Field(Path("runs"), description="Directory of all runs.")
    seed: int = Field(0, ge=0, lt=2**40, description="All randomness is a function of it.")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto: cuda if there is one."
    )
    resume: Literal["never", "auto"] = Field(
        "never", description="auto: continue from the newest intact checkpoint, if there is one."
    )
    overwrite: bool = Field(False, description="Replace a run of this name instead of refusing.")
    epochs: int = Field(100, ge=1, description="Passes over the training images.")
    batch_size: int = Field(256, ge=2, description="Images in an optimiser step, over all ranks.")
    method: AnyMethodConfig = Field(description="The method and its options.")
    model: ModelConfig = ModelConfig()  # type: ignore[call-arg]
    data: DataConfig
    optim: OptimConfig = OptimConfig()  # type: ignore[call-arg]
    engine: EngineConfig = EngineConfig()  # type: ignore[call-arg]
    checkpoint: CheckpointConfig = CheckpointConfig()  # type: ignore[call-arg]
    evaluate: EvaluateConfig = EvaluateConfig()  # type: ignore[call-arg]
    log: LogConfig = LogConfig()  # type: ignore[call-arg]

    @property
    def directory(self) -> Path:
        return self.output.expanduser() / self.name

    def views(self) -> ViewSpec:
        """The augmentation: the method's preset or the one named, with the overrides."""
        name = self.data.augment or METHODS[self.method.name].preset
        if "size" in self.data.overrides:
            raise ValueError("data.overrides has a size: give it as data.image_size")
        return view_spec(name, self.data.image_size, **self.data.overrides)

    @model_validator(mode="after")
    def _consistent(self) -> "RunConfig":
        check_optimizer(self.optim.name, self.engine.zero_stage)
        views, wanted = self.views(), METHODS[self.method.name].views
        if views.count != wanted:
            raise ValueError(
                f"method.name={self.method.name} reads {wanted} view(s) of an item, but "
                f"data.augment={self.data.augment} makes {views.count}"
            )
        if METHODS[self.method.name].told_parameters and views.kind != "image":
            raise ValueError(f"method.name={self.method.name} is for images, got {views.kind}s")
        if self.batch_size % self.engine.accumulation:
            raise ValueError(
                f"batch_size={self.batch_size} is not a multiple of "
                f"engine.accumulation={self.engine.accumulation}"
            )
        if Path(self.name).name != self.name or self.name.startswith(".") or "\0" in self.name:
            raise ValueError(f"name={self.name!r} must be a plain directory name")
        return self


def recipes() -> dict[str, Path]:
    """The recipes that ship with the package, by name."""
    folder = Path(str(files("fastssl") / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def resolve(recipe: str, overrides: list[str] | None = None) -> RunConfig:
    """A recipe's name or a YAML file, with `key=value` overrides, checked.

    Raises ConfigError, one sentence: an unknown recipe or key (with the closest valid one), a value
    of the wrong type or out of range, a combination that cannot run.
    """
    known = recipes()
    path = known.get(recipe, Path(recipe))
    if not path.is_file():
        hint = _closest(recipe, known)
        raise ConfigError(f"no recipe or file {recipe!r}{hint}; there are: {', '.join(known)}")
    return from_mapping(_merge(path, overrides or []))


def load(run: Path) -> RunConfig:
    """The configuration a run was made with."""
    path = Path(run) / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{run} holds no run: there is no {path}")
    return from_mapping(_merge(path, []))


def from_mapping(mapping: dict[str, Any]) -> RunConfig:
    try:
        return RunConfig.model_validate(mapping)
    except ValidationError as error:
        raise ConfigError(_sentence(error)) from None


def dump(cfg: RunConfig) -> str:
    """YAML that `load` reads back to the same configuration."""
    return OmegaConf.to_yaml(OmegaConf.create(cfg.model_dump(mode="json")))


def described(cfg: RunConfig) -> str:
    """The same YAML for a reader: each key with its description behind it."""
    return "\n".join(_described(cfg, ""))


def _described(section: BaseModel, indent: str) -> Iterator[str]:
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield f"{indent}{name}:"
            yield from _described(value, indent + "  ")
        else:
            plain = section.model_dump(mode="json", include={name})[name]
            note = f"  # {field.description}" if field.description else ""
            yield f"{indent}{name}: {json.dumps(plain, ensure_ascii=False)}{note}"


def differences(saved: RunConfig, now: RunConfig, *, same_data: bool = False) -> list[str]:
    """Keys, as `a.b: old -> new`, whose change makes it another run.

    Where a run is kept, how often it speaks and who reads and makes its data do not count; nor,
    with same_data, where the data lie.
    """
    free = ("output", "device", "resume", "overwrite", "checkpoint", "evaluate", "log")
    old, new = (_flatten(c.model_dump(mode="json", exclude=set(free))) for c in (saved, now))
    free_leaves = {
        *("data.workers", "data.readers", "data.backend", "data.dali_on", "data.max_bad"),
        "data.changed",
        "engine.activation_checkpointing",
    }
    if same_data:
        free_leaves |= {f"data.source.{key}" for key in ("path", "val", "cache")}
        if now.data.source.name == "arrays":  # where another says whether there are any
            free_leaves.add("data.source.labels")
    if now.optim.schedule.name == "infinite":  # made to be carried on, and annealed on demand
        free_leaves |= {"epochs", "optim.schedule.anneal_steps", "optim.schedule.final"}
    keys = sorted((old.keys() | new.keys()) - free_leaves)
    return [
        f"{k}: {old.get(k, 'absent')} -> {new.get(k, 'absent')}"
        for k in keys
        if old.get(k) != new.get(k)
    ]


def _merge(path: Path, overrides: list[str]) -> dict[str, Any]:
    for text in overrides:
        if "=" not in text or not text.split("=", 1)[0]:
            raise ConfigError(f"override {text!r} is not of the form key=value")
    try:
        read = OmegaConf.load(path)
        if not isinstance(read, DictConfig):
            raise ConfigError(f"{path} holds {type(read).__name__}, not a mapping of keys")
        chosen = _dotted(overrides)
        for section in SWITCHED:  # another method, source ... has nothing of the recipe's options
            name = OmegaConf.select(chosen, f"{section}.name")
            if name is not None and name != OmegaConf.select(read, f"{section}.name"):
                OmegaConf.update(read, section, {}, merge=False)
        merged = OmegaConf.merge(read, chosen)
        unset = sorted(OmegaConf.missing_keys(merged))
        if unset:
            raise ConfigError(f"{path.stem} leaves {unset[0]} to you: add {unset[0]}=...")
        return OmegaConf.to_container(merged, resolve=True)  # type: ignore[return-value]
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError) as error:
        first = str(error).strip().splitlines()[0]
        raise ConfigError(f"{path} with {overrides} does not read as YAML: {first}") from None


def _dotted(overrides: list[str]) -> DictConfig:
    """The overrides as a tree.  A value is YAML, but for the texts in VERBATIM, where a `#` or a
    number is what it looks like."""
    tree = OmegaConf.create({})
    for text in overrides:
        key, value = text.split("=", 1)
        if key in VERBATIM:
            OmegaConf.update(tree, key, value)
        else:
            tree = OmegaConf.merge(tree, OmegaConf.from_dotlist([text]))
    return tree  # type: ignore[return-value]


def _sentence(error: ValidationError) -> str:
    """The first refusal of a validation, as one sentence a user can act on."""
    first = error.errors()[0]
    model, key = _locate(first["loc"])
    message = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "value_error" and (not key or re.match(r"[\w.]+=", message)):
        return message
    if first["type"] == "extra_forbidden":
        name = str(first["loc"][-1])
        names = list(model.model_fields) if model else []
        hint = f"{_closest(name, names)}; there are: {', '.join(names)}"
        return f"unknown key {key}={first['input']!r}{hint}"
    if first["type"] == "missing":
        return f"{key} is required and missing"
    if first["type"] == "union_tag_invalid":
        context = first.get("ctx", {})
        return f"{key}.name={context.get('tag')!r} is not one of {context.get('expected_tags')}"
    if first["type"] == "union_tag_not_found":
        return f"{key}.name is required and missing: it says which {key} is meant"
    return f"{key}={first['input']!r} is refused: {message[0].lower()}{message[1:]}"


def _locate(loc: tuple) -> tuple[type[BaseModel] | None, str]:
    """The model that holds a refused key, and the key as a user writes it (union tags left out)."""
    model: type[BaseModel] | None = RunConfig
    parts: list[str] = []
    for part in loc:
        tagged = next((m for m in _members(model) if _tag(m) == part), None)
        if tagged is not None:
            model = tagged
            continue
        parts.append(str(part))
        if isinstance(part, int) and get_origin(model) is tuple:
            model = get_args(model)[0]
            continue
        field = model.model_fields.get(str(part)) if _is_model(model) else None  # type: ignore
        if field is not None:
            model = field.annotation  # type: ignore[assignment]
    return (model if _is_model(model) else None), ".".join(parts)  # type: ignore[return-value]


def _members(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    return list(get_args(annotation)) if get_origin(annotation) in (Union, types.UnionType) else []


def _tag(model: Any) -> Any:
    return (
        model.model_fields["name"].default
        if _is_model(model) and "name" in model.model_fields
        else None
    )


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _closest(name: str, names) -> str:
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""


def _flatten(mapping: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        name = f"{prefix}{key}"
        flat |= _flatten(value, name + ".") if isinstance(value, dict) else {name: value}
    return flat
