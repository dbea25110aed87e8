"""Numbers that move over a run, by name in the configuration.

    optim.schedule: {name: cosine, warmup: 0.1}                          in units of optim.lr
    optim.weight_decay: {name: cosine, start: 0.04, end: 0.4}
    method.momentum: {name: linear, start: 0.9998, end: 0.99999, until: 0.3}

One kind of schedule serves both: `at(progress)` is its value once that share of training is done.
A learning rate is its peak times the value at the middle of the step, so that no step has rate 0;
one that counts steps, and so has no planned end, writes `factor` in the place of `at`, and serves
rates alone, since a method knows no steps.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, Field, GetCoreSchemaHandler, model_validator
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from fastssl.registry import OneOf, Registry
from fastssl.section import Section

from . import cosine, infinite, linear


class ScheduleConfig(Section):
    """Base of the schedules.  A subclass has `name`, a Literal with itself as default."""

    if TYPE_CHECKING:
        name: Any

    def at(self, progress: float) -> float:
        """The value once the share `progress` in [0, 1] of training is done."""
        raise TypeError(f"{type(self).__name__} does not define at(progress)")

    def factor(self, step: int, total_steps: int) -> float:
        """What multiplies the peak rate at update number `step` of `total_steps`, from 0.

        Raises ValueError for options that do not fit a run of so many steps.
        """
        return self.at((step + 0.5) / total_steps)

    @property
    def counts_steps(self) -> bool:
        """Whether it serves learning rates alone."""
        return type(self).at is ScheduleConfig.at


S = TypeVar("S", bound=type[ScheduleConfig])
SCHEDULES: Registry[type[ScheduleConfig]] = Registry("schedule", "optim.schedule.name")


def register_schedule(schedule: S) -> S:
    """A class decorator: a `ScheduleConfig` that optim.schedule.name, and every number that moves,
    can ask for.

    Raises PluginError where there is a schedule of that name.
    """
    SCHEDULES.add(schedule.model_fields["name"].default, schedule, schedule)
    return schedule


class _Warmed(ScheduleConfig):
    start: float = Field(default=1.0, description="Value at first, or where the warm-up ends.")
    warmup: float = Field(
        default=0.0, ge=0, lt=1, description="Share of training that rises to it from 0."
    )

    def at(self, progress: float) -> float:
        if progress < self.warmup:
            return self.start * max(progress, 0.0) / self.warmup
        return self.after(progress)

    def after(self, progress: float) -> float:
        """The value past the warm-up."""
        return self.start


@register_schedule
class ConstantSchedule(_Warmed):
    """One value, after a warm-up."""

    name: Literal["constant"] = "constant"


class _Moving(_Warmed):
    end: float = Field(default=0.0, description="Value at the end.")
    until: float = Field(
        default=1.0, gt=0, le=1, description="Share of training at which the end is reached."
    )

    @model_validator(mode="after")
    def _warms_before_it_ends(self) -> "_Moving":
        if self.warmup >= self.until:
            raise ValueError(f"warmup={self.warmup} is not before until={self.until}")
        return self

    def share(self, progress: float) -> float:
        """Of the way from start to end."""
        return (progress - self.warmup) / (self.until - self.warmup)


@register_schedule
class LinearSchedule(_Moving):
    """A straight line."""

    name: Literal["linear"] = "linear"
    stages: int | None = Field(
        default=None, ge=2, description="In so many equal stages of one value each; null: smooth."
    )

    def after(self, progress: float) -> float:
        share = min(self.share(progress), 1.0)
        if self.stages is not None:
            share = min(int(share * self.stages), self.stages - 1) / (self.stages - 1)
        return linear(share, self.start, self.end)


@register_schedule
class CosineSchedule(_Moving):
    """Half a cosine, flat at both ends."""

    name: Literal["cosine"] = "cosine"

    def after(self, progress: float) -> float:
        return cosine(self.share(progress), self.start, self.end)


@register_schedule
class InfiniteSchedule(ScheduleConfig):
    """No planned end: warm-up, cool-down, constant; annealed only when a finished model is due."""

    name: Literal["infinite"] = "infinite"
    warmup_steps: int = Field(default=1000, ge=0, description="Steps of linear warm-up.")
    cooldown_steps: int = Field(
        default=10000, ge=0, description="Steps of cosine cool-down after it."
    )
    constant: float = Field(
        default=0.25, gt=0, le=1, description="Rate kept, as a fraction of the peak."
    )
    anneal_steps: int = Field(
        default=0, ge=0, description="Last steps of this run that anneal exponentially; 0: none."
    )
    end: float = Field(
        default=0.01, gt=0, le=1, description="Annealed rate, as a fraction of the peak."
    )

    def factor(self, step: int, total_steps: int) -> float:
        """What multiplies the peak rate at update number `step`, counted from 0.

        total_steps: where this run ends; it matters to the annealing alone.  Raises ValueError
        when the annealing would be the whole run.
        """
        if self.anneal_steps and self.anneal_steps >= total_steps:
            raise ValueError(
                f"schedule.anneal_steps={self.anneal_steps} leaves nothing to anneal from in a "
                f"run of {total_steps} steps"
            )
        anneal = (total_steps - self.anneal_steps, self.anneal_steps, self.end)
        return infinite(
            step + 0.5,
            1.0,
            warmup=self.warmup_steps,
            cooldown=self.cooldown_steps,
            constant=self.constant,
            anneal=anneal if self.anneal_steps else None,
        )


Schedule = Annotated[ScheduleConfig, OneOf(SCHEDULES)]
Moving = float | ScheduleConfig


def at(value: Moving, progress: float) -> float:
    """A number that may move, once the share `progress` of training is done."""
    return value.at(progress) if isinstance(value, ScheduleConfig) else value


@dataclass(frozen=True)
class Within:
    """Of a pydantic field: a number, or a schedule of one, that stays in [least, most].

        momentum: Annotated[Moving, Within(0, 1)]

    A pair [a, b] is the linear schedule from a to b.
    """

    least: float | None = None
    most: float | None = None
    registry: Registry[Any] = SCHEDULES

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        dump = core_schema.plain_serializer_function_ser_schema(_dump, info_arg=True)
        return core_schema.no_info_plain_validator_function(self.validate, serialization=dump)

    def validate(self, value: Any) -> Moving:
        if isinstance(value, list | tuple) and len(value) == 2:
            value = {"name": "linear", "start": value[0], "end": value[1]}
        if isinstance(value, int | float) and not isinstance(value, bool):
            self._check(value, "it")
            return float(value)
        if isinstance(value, Mapping):
            value = self._complete(value)
        if not isinstance(value, ScheduleConfig):
            raise _wrong("a number is wanted, a pair of numbers, or a schedule: {name: ..., ...}")
        if value.counts_steps:
            raise _wrong(f"schedule {value.name!r} counts steps and is for optim.schedule alone")
        for hundredth in range(101):
            where = f"at {hundredth} % of the run it is {value.at(hundredth / 100):g}, and"
            self._check(value.at(hundredth / 100), where)
        return value

    def _complete(self, value: Mapping[str, Any]) -> Any:
        if "name" in value and value["name"] not in SCHEDULES:
            said = SCHEDULES.unknown(value["name"]).removeprefix(f"{SCHEDULES.key}=")
            raise _wrong(f"its name {said}")
        schedule: Any = OneOf(SCHEDULES).validate(value)
        lacks = [key for key in ("start", "end") if key in type(schedule).model_fields]
        lacks = [key for key in lacks if key not in value]
        if lacks and not schedule.counts_steps:
            raise _wrong(f"its {lacks[0]} is missing")
        return schedule

    def _check(self, number: float, said: str) -> None:
        if not float("-inf") < number < float("inf"):
            raise _wrong(f"{said} must be a finite number")
        if self.least is not None and number < self.least:
            raise _wrong(f"{said} must be at least {self.least:g}")
        if self.most is not None and number > self.most:
            raise _wrong(f"{said} must be at most {self.most:g}")


def _wrong(message: str) -> PydanticCustomError:
    return PydanticCustomError("value_error", "{message}", {"message": message})


def _dump(value: Moving, info: core_schema.SerializationInfo) -> Any:
    return value.model_dump(mode=info.mode) if isinstance(value, ScheduleConfig) else value


class Moves(Section):
    """A section with numbers that move: what is left out of one is as in the key's default.

    A number alone is the default's start.  A mapping without a name, or of the default's name, has
    the default's other keys; of another name its start and end.
    """

    @model_validator(mode="before")
    @classmethod
    def _as_by_default(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        filled = dict(values)
        for name, field in cls.model_fields.items():
            if name in filled and any(_is_schedule(note) for note in field.metadata):
                filled[name] = _filled(filled[name], field.default)
        return filled


def _is_schedule(note: Any) -> bool:
    return getattr(note, "registry", None) is SCHEDULES


def _filled(value: Any, default: Any) -> Any:
    moves = isinstance(default, ScheduleConfig)
    if moves and isinstance(value, int | float) and not isinstance(value, bool):
        value = {"start": value}
    if not isinstance(value, Mapping):
        return value
    whole = default.model_dump() if moves else {} if default is None else {"start": default}
    name = value.get("name", whole.get("name"))
    if name != whole.get("name"):
        keys = SCHEDULES.config(name).model_fields if name in SCHEDULES else {}  # type: ignore
        whole = {k: whole[k] for k in ("start", "end") if k in whole and "start" in keys}
        whole = {key: number for key, number in whole.items() if key in keys}
    return {**whole, **value}


def schedules_in(section: BaseModel) -> Iterator[str]:
    """The names of all schedules in a section and those below it."""
    if isinstance(section, ScheduleConfig):
        yield section.name
    for name in type(section).model_fields:
        value = getattr(section, name)
        for part in value if isinstance(value, tuple) else [value]:
            if isinstance(part, BaseModel):
                yield from schedules_in(part)
