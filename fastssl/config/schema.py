"""Every key of a run: described here, or in the file of the part that it configures."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, Field, model_validator

from fastssl.data.batch.ops import BATCH_OPS, AnyBatchOp
from fastssl.data.datasets import SOURCES, SourceConfig
from fastssl.data.render.backend import Backend
from fastssl.data.views.spec import VIEWS, ViewSpec, view_spec
from fastssl.data.views.streams import StreamViews
from fastssl.engine.clipping import check_offload
from fastssl.engine.config import CheckpointConfig, EngineConfig
from fastssl.engine.optim import OptimConfig, check_optimizer
from fastssl.engine.zero import SAME_NUMBERS
from fastssl.methods.configs import METHODS, AnyMethodConfig
from fastssl.registry import plugins_of
from fastssl.schedules.config import SCHEDULES, schedules_in
from fastssl.section import Section

from .models import ModelConfig, Models, TeacherConfig

if TYPE_CHECKING:
    from fastssl.methods import Method


class StreamConfig(Section):
    augment: str | None = Field(
        None, description="Augmentation preset of this stream; default: data.augment."
    )
    image_size: int | None = Field(
        None, ge=1, description="Side of this stream's views; default: data.image_size."
    )
    overrides: dict[str, Any] = Field(
        {}, description="Fields of this stream's views, over data.overrides."
    )
    shares: str | None = Field(
        None, description="The stream whose crop, flips, turn and move it has; its colors stay own."
    )


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
    streams: dict[str, StreamConfig] = Field(
        {}, description="Of a source with several streams: those to read, the primary one first."
    )
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
        description="An epoch's short batch: dropped, or read in full by pad and trained on as it "
        "is; of several ranks, what divides among them.",
    )
    changed: Literal["refuse", "allow"] = Field(
        "refuse", description="allow: resume although items were added, removed or renamed."
    )
    max_bad: float = Field(
        0.5, ge=0, le=1, description="Share of unreadable samples above which a run stops."
    )


class EvaluateConfig(Section):
    every: int = Field(0, ge=0, description="Evaluate every so many epochs; 0: at the end only.")
    neighbors: int = Field(20, ge=1, description="k of the nearest-neighbor classifier.")
    batch_size: int = Field(256, ge=1, description="Images a rank embeds at once.")
    max_images: int = Field(10_000, ge=2, description="Of each split, at most so many embedded.")


class LogConfig(Section):
    every: int = Field(10, ge=1, description="Steps between two rows of metrics.jsonl.")
    breakdown: bool = Field(
        False, description="Rows tell where a step's time goes: milliseconds a step, as time/loss."
    )
    profile: bool = Field(
        False,
        description="Record steps 4 to 6 by torch's profiler, on rank 0, into RUN/trace.json.",
    )
    tensorboard: bool = Field(True, description="Write TensorBoard events through DeepSpeed.")


class RunConfig(Section):
    """One pretraining run, complete.  Written to RUN/config.yaml, from which it reloads equal."""

    name: str = Field(description="Name of the run: its directory under `output`.", min_length=1)
    output: Path = Field(Path("runs"), description="Directory of all runs.")
    seed: int = Field(0, ge=0, lt=2**40, description="All randomness is a function of it.")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto: cuda if there is one."
    )
    resume: Literal["never", "auto", "extend"] = Field(
        "never",
        description="auto: continue from the newest intact checkpoint, if there is one; extend: "
        "and with other epochs or another schedule than before.",
    )
    overwrite: bool = Field(False, description="Replace a run of this name instead of refusing.")
    epochs: int = Field(100, ge=1, description="Passes over the training images.")
    batch_size: int = Field(256, ge=2, description="Images in an optimizer step, over all ranks.")
    plugins: tuple[str, ...] = Field(
        (), description="Modules imported first, whose methods, sources ... can then be named."
    )
    method: AnyMethodConfig = Field(description="The method and its options.")
    model: Models = Field(
        ModelConfig(),  # type: ignore[call-arg]
        description="The encoder; or one a stream by its name, the primary first.",
    )
    teacher: TeacherConfig = Field(
        TeacherConfig(),  # type: ignore[call-arg]
        description="The frozen network that a method of distillation learns from.",
    )
    weights: str = Field(
        "none",
        description="What the whole method starts from, heads and teacher too: none, or the file "
        "that `fastssl export RUN --with-heads` has written.",
    )
    data: DataConfig
    optim: OptimConfig = OptimConfig()  # type: ignore[call-arg]
    engine: EngineConfig = EngineConfig()  # type: ignore[call-arg]
    checkpoint: CheckpointConfig = CheckpointConfig()  # type: ignore[call-arg]
    evaluate: EvaluateConfig = EvaluateConfig()  # type: ignore[call-arg]
    log: LogConfig = LogConfig()  # type: ignore[call-arg]

    @property
    def directory(self) -> Path:
        return self.output.expanduser() / self.name

    @property
    def method_class(self) -> "type[Method]":
        return METHODS[self.method.name]  # imports timm, which takes seconds

    @property
    def models(self) -> dict[str, ModelConfig]:
        """The models by stream, the primary one first; of a single one the name is empty."""
        return {"": self.model} if isinstance(self.model, ModelConfig) else self.model

    def model_of(self, stream: str) -> ModelConfig:
        """What the encoder of a stream is."""
        return self.model if isinstance(self.model, ModelConfig) else self.model[stream]

    def begins_from_weights(self) -> bool:
        """Whether an encoder that is trained has weights to start from."""
        started = [m for m in self.models.values() if m.weights != "none" and not m.frozen]
        return bool(started) or self.weights != "none"

    def stream_of(self, network: str) -> str:
        """The stream that a network reads: STREAM, or STREAM_x; any other the primary one.

        Empty where the items have no streams.
        """
        streams = list(self.data.streams)
        own = [name for name in streams if network == name or network.startswith(f"{name}_")]
        return max(own, key=len) if own else next(iter(streams), "")

    def views(self) -> ViewSpec | StreamViews:
        """The augmentation: the method's preset or the one named, with the overrides; of several
        streams, each one's own."""
        data, streams = self.data, self.data.streams
        if not streams:
            return self._spec("data", data.augment, data.image_size, data.overrides)
        specs = {
            name: self._spec(
                f"data.streams.{name}",
                own.augment or data.augment,
                own.image_size or data.image_size,
                {**data.overrides, **own.overrides},
            )
            for name, own in streams.items()
        }
        shares = {name: own.shares for name, own in streams.items() if own.shares is not None}
        made = StreamViews(specs, shares)
        return made if len(specs) > 1 else made.stream(made.primary)

    def _spec(
        self, key: str, augment: str | None, size: int, overrides: dict[str, Any]
    ) -> ViewSpec:
        if "size" in overrides:
            raise ValueError(f"{key}.overrides has a size: give it as {key}.image_size")
        return view_spec(augment or self.method_class.preset, size, **overrides)

    def plugins_used(self) -> tuple[str, ...]:
        """The modules that a reader of this configuration must have, beside this package."""
        from fastssl.models import MODELS

        chosen = [(METHODS, self.method.name), (SOURCES, self.data.source.name)]
        chosen += [(SCHEDULES, name) for name in schedules_in(self)]
        chosen += [(MODELS, model.name) for model in self.models.values()]
        presets = [self.data.augment, *(own.augment for own in self.data.streams.values())]
        chosen += [(VIEWS, name or self.method_class.preset) for name in presets]
        chosen += [(BATCH_OPS, op.name) for op in self.data.batch_ops]
        return tuple(sorted({*self.plugins, *plugins_of(chosen)}))

    def notes(self) -> list[str]:
        """What a user might not expect of these keys, a sentence each."""
        made_for = self.optim.lr_batch
        if made_for in (None, self.batch_size):
            return []
        return [
            f"optim.lr={self.optim.lr} was chosen for batches of {made_for} and batch_size is "
            f"{self.batch_size}: the rate is not scaled (in proportion it would be "
            f"{self.optim.lr * self.batch_size / made_for:.3g})"
        ]

    @model_validator(mode="after")
    def _consistent(self) -> "RunConfig":
        check_optimizer(self.optim.name, self.engine.zero_stage)
        check_offload(self.optim, self.engine)
        self._check_streams()
        self._check_views()
        self._check_teacher()
        if self.batch_size % self.engine.accumulation:
            raise ValueError(
                f"batch_size={self.batch_size} is not a multiple of "
                f"engine.accumulation={self.engine.accumulation}"
            )
        for model in self.models.values() if self.weights != "none" else ():
            if model.weights != "none" and not model.frozen:
                raise ValueError(
                    f"weights={self.weights} has the encoder, and model.weights={model.weights} "
                    "another: give one of them"
                )
        if Path(self.name).name != self.name or self.name.startswith(".") or "\0" in self.name:
            raise ValueError(f"name={self.name!r} must be a plain directory name")
        return self

    def _check_teacher(self) -> None:
        """Raise ValueError where the method has a teacher and there is none, or the reverse."""
        given = self.teacher.weights != "none"
        if self.method_class.has_teacher and not given:
            raise ValueError(
                f"method.name={self.method.name} learns from a frozen teacher: give "
                "teacher.weights=timm, a file's path or a run's directory"
            )
        if given and not self.method_class.has_teacher:
            raise ValueError(
                f"teacher.weights={self.teacher.weights}, and method.name={self.method.name} "
                "learns from no frozen teacher: leave it out"
            )
        if self.teacher.name == "auto" and self.teacher.weights == "timm":
            raise ValueError("teacher.weights=timm are of a model: give teacher.name")

    def _check_views(self) -> None:
        """Raise ValueError for views that the method does not read."""
        wanted, name = self.method_class.views, self.method.name
        least, most = (wanted, wanted) if isinstance(wanted, int) else wanted
        every = self.views()
        alone = {self.stream_of(""): every}
        for stream, views in (every.streams if isinstance(every, StreamViews) else alone).items():
            if views.count < least or (most is not None and views.count > most):
                more = " or more" if most is None else "" if most == least else f" to {most}"
                key, own = "data", self.data.streams.get(stream)
                if own is not None and (own.augment or "count" in own.overrides):
                    key = f"data.streams.{stream}"
                named = own.augment if own is not None and own.augment else self.data.augment
                raise ValueError(
                    f"method.name={name} reads {least}{more} view(s) of an item, but "
                    f"{key}.augment={named or self.method_class.preset} makes {views.count}"
                )
            if self.method_class.needs_view_params and views.kind != "image":
                raise ValueError(f"method.name={name} is for images, got {views.kind}s")

    def _check_streams(self) -> None:
        """Raise ValueError where the method reads other streams than data.streams names."""
        names, wanted = tuple(self.data.streams), self.method_class.streams
        reads, got = f"method.name={self.method.name} reads", f"{', '.join(names) or 'none'}"
        if wanted == () and len(names) > 1:
            raise ValueError(f"{reads} one stream of an item, and data.streams are {got}: give one")
        if wanted and set(wanted) != set(names):
            raise ValueError(f"{reads} the streams {', '.join(wanted)}, and data.streams are {got}")
        if wanted and names[:1] != wanted[:1]:
            raise ValueError(
                f"{reads} {wanted[0]} first, and data.streams are {got}: name it first"
            )
        if wanted is None and len(names) < 2:
            raise ValueError(f"{reads} two streams or more, and data.streams are {got}")
        models = names if isinstance(self.model, ModelConfig) else tuple(self.model)
        if models[:1] != names[:1] or set(models) != set(names):
            raise ValueError(
                f"model has {', '.join(models)}, and data.streams are {got}: name the same "
                "streams, the primary one first"
            )
        if len(names) > 1 and self.data.batch_ops:
            raise ValueError(f"data.batch_ops are for one stream, and data.streams are {got}")


def described(cfg: RunConfig) -> str:
    """The same YAML for a reader: each key with its description behind it."""
    return "\n".join(_described(cfg, ""))


def _described(section: BaseModel, indent: str) -> Iterator[str]:
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        own = value if isinstance(value, dict) else {}
        if isinstance(value, BaseModel):
            yield f"{indent}{name}:"
            yield from _described(value, indent + "  ")
        elif own and all(isinstance(part, BaseModel) for part in own.values()):
            yield f"{indent}{name}:"
            for key, part in own.items():
                yield f"{indent}  {json.dumps(key, ensure_ascii=False)}:"
                yield from _described(part, indent + "    ")
        else:
            plain = section.model_dump(mode="json", include={name})[name]
            note = f"  # {field.description}" if field.description else ""
            yield f"{indent}{name}: {json.dumps(plain, ensure_ascii=False)}{note}"


def differences(
    saved: RunConfig, now: RunConfig, *, same_data: bool = False, extends: bool = False
) -> list[str]:
    """Keys, as `a.b: old -> new`, whose change makes it another run.

    Where a run is kept, how often it speaks and who reads and makes its data do not count; nor,
    with same_data, where the data lie, and with extends its epochs and its schedule.
    """
    free = ("output", "device", "resume", "overwrite", "plugins", "checkpoint", "evaluate", "log")
    old, new = (_flatten(c.model_dump(mode="json", exclude=set(free))) for c in (saved, now))
    free_leaves = {
        *("data.workers", "data.readers", "data.backend", "data.dali_on", "data.max_bad"),
        "data.changed",
        "engine.activation_checkpointing",
        *("engine.compile", "engine.channels_last"),
        "engine.max_skipped",
        "engine.watchdog",
        *("engine.spike", "engine.spike_norm", "engine.spike_window", "engine.spike_back"),
        "engine.reduce_once",
        *("engine.zero_stage", "engine.precision"),
        *(f"engine.zero.{key}" for key in SAME_NUMBERS),
        "optim.lr_batch",
    }
    for prefix in ("zero_optimization", "data_types"):  # as the stage and the precision want them
        name = f"engine.deepspeed.{prefix}"
        free_leaves |= {key for key in old.keys() | new.keys() if f"{key}.".startswith(f"{name}.")}
    if all(c.engine.large_batch == "exact" and not c.engine.micro_batchnorm for c in (saved, now)):
        free_leaves.add("engine.accumulation")
    if same_data:
        free_leaves |= {f"data.source.{key}" for key in ("path", "val", "cache", "root")}
        if now.data.source.name == "arrays":  # where another says whether there are any
            free_leaves.add("data.source.labels")
    if now.optim.schedule.name == "infinite":  # made to be carried on, and annealed on demand
        free_leaves |= {"epochs", "optim.schedule.anneal_steps", "optim.schedule.end"}
    for flat, own in ((old, saved), (new, now)):  # the first is the primary one
        flat["data.streams"] = ", ".join(own.data.streams)
    if extends:
        every = old.keys() | new.keys()
        free_leaves |= {"epochs", *(key for key in every if key.startswith("optim.schedule."))}
    keys = sorted((old.keys() | new.keys()) - free_leaves)
    return [
        f"{k}: {old.get(k, 'absent')} -> {new.get(k, 'absent')}"
        for k in keys
        if old.get(k) != new.get(k)
    ]


def _flatten(mapping: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        name = f"{prefix}{key}"
        flat |= _flatten(value, name + ".") if isinstance(value, dict) else {name: value}
    return flat
