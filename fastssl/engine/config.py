"""What the engine and its checkpoints can be told."""

from typing import Any, Literal

from pydantic import Field

from fastssl.section import Section


class EngineError(ValueError):
    """This machine cannot run what was asked for.  The message says what to do."""

    exit_code, on_every_rank = 2, True


class EngineConfig(Section):
    zero_stage: Literal[0, 1, 2, 3] = Field(
        1,
        description="DeepSpeed ZeRO: 1 shards optimiser state, 2 gradients too, 3 parameters too.",
    )
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="bf16: parameters and activations bfloat16, float32 master weights."
    )
    accumulation: int = Field(1, ge=1, description="Micro-batches an optimiser step is split into.")
    on_nonfinite: Literal["stop", "skip"] = Field(
        "stop", description="A non-finite loss or gradient ends the run, or only skips its step."
    )
    activation_checkpointing: bool = Field(
        False, description="Recompute the backbone's blocks in backward: less memory, more time."
    )
    deepspeed: dict[str, Any] = Field(
        {}, description="Raw DeepSpeed keys, merged last (offload, bucket sizes ...)."
    )


class CheckpointConfig(Section):
    every: int = Field(1, ge=0, description="Epochs between two checkpoints; 0: at the end only.")
    every_steps: int = Field(
        0, ge=0, description="Steps between two checkpoints, besides; 0: none."
    )
    keep: int = Field(2, ge=1, description="Newest checkpoints kept; the best one is kept as well.")
    best: Literal["knn", "linear", "rankme", "loss"] = Field(
        "knn", description="What makes a checkpoint the best one."
    )
