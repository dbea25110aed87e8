"""What the engine and its checkpoints can be told."""

import difflib
from typing import Any, Literal

import torch
from pydantic import Field, field_validator, model_validator

from fastssl.section import Section

from .zero import ZeroConfig, check_zero

# What the run's own keys say, by the DeepSpeed key that would say it a second time.
_OWN_KEYS = {
    "train_batch_size": "batch_size",
    "train_micro_batch_size_per_gpu": "batch_size and engine.accumulation",
    "gradient_accumulation_steps": "engine.accumulation",
    "gradient_clipping": "optim.clip",
    "optimizer": "optim",
    "scheduler": "optim.schedule",
    **dict.fromkeys(("bf16", "bfloat16", "fp16", "amp", "torch_autocast"), "engine.precision"),
    "tensorboard": "log.tensorboard",
    "compile": "engine.compile (DeepCompile is not served)",
}
_SECTIONS = (
    "zero_optimization activation_checkpointing aio checkpoint comet comms_logger csv_monitor "
    "data_types flops_profiler timers wandb"
).split()
_VALUES = (
    "communication_data_type disable_allgather disable_python_gc dump_state gradient_allreduce_op "
    "gradient_predivide_factor log_level memory_breakdown prescale_gradients sparse_gradients "
    "steps_per_print use_node_local_storage wall_clock_breakdown"
).split()


class EngineError(ValueError):
    """This machine cannot run what was asked for.  The message says what to do."""

    exit_code, on_every_rank = 2, True


class EngineConfig(Section):
    zero_stage: Literal[0, 1, 2, 3] = Field(
        1,
        description="DeepSpeed ZeRO: 1 shards optimizer state, 2 gradients too, 3 parameters too.",
    )
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="bf16: parameters and activations bfloat16, float32 master weights."
    )
    accumulation: int = Field(
        1, ge=1, description="Micro-batches that a rank's share of a step is split into."
    )
    large_batch: Literal["exact", "plain"] = Field(
        "exact",
        description="The loss of micro-batches, for a method that compares images. exact: over the "
        "whole batch of all ranks, by encoding all but the last micro-batch twice; plain: the mean "
        "of each one's own loss, which is another loss.",
    )
    reduce_once: bool = Field(
        True,
        description="Of an exact large batch, stages 2 and 3 keep whole gradients and reduce them "
        "once a step; false: cut, after each micro-batch.",
    )
    micro_batchnorm: bool = Field(
        False,
        description="Accept that an encoder's batch norms normalize each micro-batch by itself.",
    )
    on_nonfinite: Literal["stop", "skip"] = Field(
        "stop", description="A non-finite loss or gradient ends the run, or only skips its step."
    )
    max_skipped: int = Field(
        10,
        ge=1,
        description="Steps skipped in a row, by on_nonfinite=skip or as spikes, that end the run.",
    )
    spike: float = Field(
        0,
        ge=0,
        description="A step whose loss is so many standard deviations above the median of the "
        "last spike_window steps is not applied; 0: every one is.",
    )
    spike_norm: float = Field(
        0,
        ge=0,
        description="Nor one whose gradient's norm is above so many times their median; 0: any.",
    )
    spike_window: int = Field(
        128, ge=4, description="Steps that spike and spike_norm look back on, and wait for."
    )
    spike_back: int = Field(
        0,
        ge=0,
        description="At a spike, go back to a checkpoint and leave out so many steps before it as "
        "well; max_skipped times in a row end the run. 0: leave out that step alone.",
    )
    watchdog: float = Field(
        600,
        ge=0,
        description="Seconds without a move of any rank, in a step or while waiting for data, "
        "after which the run says who hangs where, and ends with 6; 0: never.",
    )
    sync_batchnorm: bool = Field(
        True,
        description="The encoder's batch norms train on the joined batch of all ranks; false: each "
        "rank's on its own images, and their running statistics are averaged.",
    )
    activation_checkpointing: bool | Literal["selective"] = Field(
        False,
        description="Recompute the blocks of encoders and decoders in backward: less memory, more "
        "time. selective: but for their matrix products and attention.",
    )
    compile: bool = Field(
        False,
        description="torch.compile each block of encoders and decoders, in the first steps and at "
        "each new shape.",
    )
    channels_last: bool = Field(
        False,
        description="Convolutions work on images with channels innermost (NHWC), as tensor cores "
        "want them.",
    )
    tf32: bool | None = Field(
        None,
        description="On CUDA multiply float32 matrices in TF32, of 10 bits, or in full; default: "
        "as torch is set (products in full, convolutions in TF32).",
    )
    zero: ZeroConfig = ZeroConfig()  # type: ignore[call-arg]
    deepspeed: dict[str, Any] = Field(
        {}, description="Raw DeepSpeed keys, merged last: what engine.zero has not."
    )

    @field_validator("deepspeed")
    @classmethod
    def _known_keys(cls, given: dict[str, Any]) -> dict[str, Any]:
        for key, value in given.items():
            name = f"engine.deepspeed.{key}={value!r}"
            if key in _OWN_KEYS:
                raise ValueError(f"{name} is set by the run itself: use {_OWN_KEYS[key]}")
            if key not in _SECTIONS + _VALUES:
                close = difflib.get_close_matches(key, [*_SECTIONS, *_VALUES, *_OWN_KEYS], n=1)
                hint = f" (did you mean {close[0]}?)" if close else ""
                known = ", ".join(_SECTIONS + _VALUES)
                raise ValueError(f"{name} is no key of DeepSpeed's served here{hint}; use {known}")
            if key in _SECTIONS and not isinstance(value, dict):
                raise ValueError(f"{name} must be a section of keys, as engine.deepspeed.{key}.x=1")
        if "stage" in given.get("zero_optimization", {}):
            stage = given["zero_optimization"]["stage"]
            raise ValueError(
                f"engine.deepspeed.zero_optimization.stage={stage} is set by the run itself: use "
                f"engine.zero_stage"
            )
        return given

    @model_validator(mode="after")
    def _zero_fits_the_stage(self) -> "EngineConfig":
        check_zero(self.zero, self.zero_stage, self.precision, self.deepspeed)
        if self.spike_back and not self.spike and not self.spike_norm:
            raise ValueError(
                f"engine.spike_back={self.spike_back}, but no spike is looked for: give "
                "engine.spike or engine.spike_norm"
            )
        if self.compile and self.zero_stage == 3 and not fetches_blocks(self):
            raise ValueError(
                "engine.compile=True at engine.zero_stage=3 wants whole blocks: leave out "
                "engine.zero.leaf_blocks=False, and leaf_module of engine.deepspeed"
            )
        return self


def accumulates_in(cfg: EngineConfig) -> tuple[str, Any]:
    """The key that says what gradients are added up in, and its value; None where none does."""
    if cfg.zero.accumulation_dtype is not None:
        return "engine.zero.accumulation_dtype", cfg.zero.accumulation_dtype
    given = cfg.deepspeed.get("data_types", {}).get("grad_accum_dtype")
    return "engine.deepspeed.data_types.grad_accum_dtype", given


def offloads_optimizer(cfg: EngineConfig) -> bool:
    """Whether DeepSpeed keeps the optimizer's state off the device."""
    if cfg.zero.offload_optimizer != "none":
        return True
    zero = cfg.deepspeed.get("zero_optimization", {})
    offload = zero.get("offload_optimizer") or {}
    return offload.get("device", "none") != "none" or bool(zero.get("cpu_offload"))


def fetches_blocks(cfg: EngineConfig) -> bool:
    """Whether blocks are ZeRO-3's leaves: unless engine.deepspeed says in its own way what is."""
    named = cfg.deepspeed.get("zero_optimization", {})
    own = any("leaf" in key or "granularity" in key for key in named)
    return cfg.zero_stage == 3 and cfg.zero.leaf_blocks is not False and not own


class CheckpointConfig(Section):
    every: int = Field(1, ge=0, description="Epochs between two checkpoints; 0: at the end only.")
    every_steps: int = Field(
        0, ge=0, description="Steps between two checkpoints, besides; 0: none."
    )
    every_minutes: float = Field(
        0, ge=0, description="Minutes between two checkpoints, by the first rank's clock; 0: none."
    )
    asynchronous: bool | None = Field(
        None,
        description="Copy the state into the host's memory and write it while training goes on; "
        "default: on CUDA.",
    )
    keep: int = Field(2, ge=1, description="Newest checkpoints kept; the best one is kept as well.")
    best: Literal["knn", "linear", "rankme", "loss"] = Field(
        "knn", description="What makes a checkpoint the best one."
    )

    def writes_aside(self, device: torch.device) -> bool:
        """Whether checkpoints are written while training goes on."""
        return device.type == "cuda" if self.asynchronous is None else self.asynchronous
