"""ZeRO as users tune it: the keys of engine.zero, and what DeepSpeed is told of them.

Counts are of elements, not bytes.  What is left out is set to the model and the machine, as
`deepspeed_keys` says; what a stage has no use for is refused.
"""

from typing import Any, Literal

import torch
from pydantic import Field

from fastssl.section import Section

Device = Literal["none", "cpu"]  # not nvme: no checkpoint would find what is kept there
WHOLE_MODEL = 500_000_000  # a bucket of DeepSpeed's, which holds most models whole
OVERLAPPED = 25_000_000  # of those that travel while a backward goes on
STEPPED = 100_000_000  # of a rank's share of the parameters, by the optimizer at once


class ZeroConfig(Section):
    offload_optimizer: Device = Field(
        "none",
        description="Stages 1 to 3: the optimizer's state and step on the CPU.",
    )
    offload_parameters: Device = Field(
        "none", description="Stage 3: parameters off the device until they are used."
    )
    overlap_comm: bool | None = Field(
        None,
        description="Stages 1 to 3: reduce gradients while the backward goes on; default: on CUDA "
        "with several ranks.",
    )
    reduce_bucket: int | None = Field(
        None,
        ge=1,
        description="Stages 1 to 3: elements reduced at once; default: the trained parameters, at "
        "most 5e8, or 2.5e7 with overlap_comm.",
    )
    allgather_bucket: int | None = Field(
        None, ge=1, description="Stages 1 and 2: parameters gathered at once after a step (5e8)."
    )
    prefetch_bucket: int | None = Field(
        None, ge=0, description="Stage 3: parameters fetched ahead of their use (5e7)."
    )
    persistence_threshold: int | None = Field(
        None, ge=0, description="Stage 3: tensors of fewer elements stay whole everywhere (1e5)."
    )
    max_live_parameters: int | None = Field(
        None,
        ge=0,
        description="Stage 3: parameters that are whole on a device at one time, by being fetched "
        "ahead or kept for the backward (1e9).",
    )
    sub_group: int | None = Field(
        None,
        ge=1,
        description="Stage 3: elements of a rank's share that the optimizer steps at once, with a "
        "float32 gradient and temporaries for them alone (1e8).",
    )
    leaf_blocks: bool | None = Field(
        None,
        description="Stage 3: each block of an encoder or decoder is fetched as one (true): fewer "
        "steps of the host, and whole blocks can be compiled.",
    )
    partition_size: int | None = Field(
        None,
        ge=2,
        description="Stage 3: so many ranks hold a second copy among them and gather for the "
        "backward there (ZeRO++ hpZ): the ranks of a node.",
    )
    quantized_weights: bool = Field(
        False, description="Stage 3, CUDA: weights are gathered in 8 bits (ZeRO++ qwZ)."
    )
    quantized_gradients: bool = Field(
        False, description="Stage 3, CUDA: gradients are reduced in 4 bits (ZeRO++ qgZ)."
    )
    accumulation_dtype: Literal["fp32", "bf16"] | None = Field(
        None,
        description="With precision=bf16, stages 1 to 3: what gradients of micro-batches are added "
        "up in (bf16).",
    )
    bf16_masters: bool = Field(
        False,
        description="With precision=bf16, stages 1 to 3: masters, gradients and moments are "
        "bfloat16 too, 8 bytes a parameter: what a step adds is lost where it is below 1/256 of a "
        "weight.",
    )


_STAGES = {
    **dict.fromkeys(("offload_optimizer", "overlap_comm", "reduce_bucket"), (1, 2, 3)),
    **dict.fromkeys(("accumulation_dtype", "bf16_masters"), (1, 2, 3)),
    "allgather_bucket": (1, 2),
}
_ONLY_3 = (3,)
# Keys that a run may be resumed with others of: what it computes is the same to rounding, and so is
# what a checkpoint holds.
SAME_NUMBERS = (
    "offload_optimizer offload_parameters overlap_comm reduce_bucket allgather_bucket "
    "prefetch_bucket persistence_threshold max_live_parameters sub_group leaf_blocks "
    "partition_size accumulation_dtype"
).split()
# Where DeepSpeed's own configuration has what a key says.
_RAW = {
    "offload_optimizer": ("zero_optimization", "offload_optimizer", "cpu_offload"),
    "offload_parameters": ("zero_optimization", "offload_param", "cpu_offload_param"),
    "overlap_comm": ("zero_optimization", "overlap_comm"),
    "reduce_bucket": ("zero_optimization", "reduce_bucket_size"),
    "allgather_bucket": ("zero_optimization", "allgather_bucket_size"),
    "prefetch_bucket": ("zero_optimization", "stage3_prefetch_bucket_size"),
    "persistence_threshold": ("zero_optimization", "stage3_param_persistence_threshold"),
    # How many are fetched ahead, and within how many a parameter that comes again is kept.
    "max_live_parameters": (
        *("zero_optimization", "stage3_max_live_parameters", "stage3_max_reuse_distance"),
    ),
    "sub_group": ("zero_optimization", "sub_group_size"),
    "leaf_blocks": (
        *("zero_optimization", "leaf_module", "stage3_module_granularity_threshold"),
        "module_granularity_threshold",
    ),
    "partition_size": ("zero_optimization", "zero_hpz_partition_size"),
    "quantized_weights": ("zero_optimization", "zero_quantized_weights"),
    "quantized_gradients": ("zero_optimization", "zero_quantized_gradients"),
    "accumulation_dtype": ("data_types", "grad_accum_dtype"),
}


def check_zero(zero: ZeroConfig, stage: int, precision: str, raw: dict[str, Any]) -> None:
    """Raise ValueError for a key that the stage, the precision or engine.deepspeed speaks against.

    raw: engine.deepspeed.
    """
    given = _given(zero)
    for key, value in given.items():
        named, stages = f"engine.zero.{key}={value}", _STAGES.get(key, _ONLY_3)
        if stage not in stages:
            at = " or ".join(map(str, stages))
            raise ValueError(
                f"{named} means nothing at engine.zero_stage={stage}: leave it out, or take {at}"
            )
        if key in ("accumulation_dtype", "bf16_masters") and precision != "bf16":
            raise ValueError(f"{named} is for engine.precision=bf16, which is {precision}")
        section, *names = _RAW.get(key, ("",))
        for name in names:
            if name in raw.get(section, {}):
                both = f"engine.deepspeed.{section}.{name}={raw[section][name]!r}"
                raise ValueError(f"{named} and {both} are given: one of them")
    if zero.bf16_masters and zero.accumulation_dtype == "fp32":
        raise ValueError(
            "engine.zero.bf16_masters=True and engine.zero.accumulation_dtype=fp32 contradict each "
            "other: gradients are as their masters"
        )
    if zero.bf16_masters and zero.offload_optimizer != "none":
        raise ValueError(
            "engine.zero.bf16_masters=True and engine.zero.offload_optimizer="
            f"{zero.offload_optimizer} exclude each other: offloaded moments are float32"
        )


def runtime_problem(zero: ZeroConfig, device: torch.device, world: int) -> str:
    """What these ranks and this device cannot do of it, a sentence; or nothing."""
    if zero.partition_size is not None and world % zero.partition_size:
        return f"engine.zero.partition_size={zero.partition_size} does not divide {world} ranks"
    for key in ("quantized_weights", "quantized_gradients"):
        if getattr(zero, key) and device.type != "cuda":
            return f"engine.zero.{key}=True needs CUDA, and the run is on {device.type}"
    return ""


def deepspeed_keys(
    zero: ZeroConfig, stage: int, trained: int, *, cuda: bool, world: int, parts: int
) -> dict[str, dict[str, Any]]:
    """The sections of DeepSpeed's configuration that say it, engine.deepspeed left out.

    trained: elements of the parameters that are trained.  parts: micro-batches of a step, as far as
    DeepSpeed knows of them; of several, stage 1 reduces after the last one, since what that one
    does not reach would be lost while it goes on.
    """
    keys: dict[str, Any] = {"stage": stage}
    if stage == 0:
        return {"zero_optimization": keys}
    overlap = zero.overlap_comm
    if overlap is None:
        overlap = cuda and world > 1 and (stage > 1 or parts == 1)
    bucket = zero.reduce_bucket or min(trained, OVERLAPPED if overlap else WHOLE_MODEL)
    keys |= {"overlap_comm": overlap, "reduce_bucket_size": bucket}
    for key in ("offload_optimizer", "offload_parameters"):
        if getattr(zero, key) != "none":
            keys[_RAW[key][1]] = {"device": getattr(zero, key), "pin_memory": cuda}
    own = {"overlap_comm", "reduce_bucket", "leaf_blocks"}
    for key, value in _given(zero).items():
        section, *names = _RAW.get(key, ("",))
        if section == "zero_optimization" and names[0] not in keys and key not in own:
            keys[names[0]] = value
    if zero.max_live_parameters is not None:
        keys["stage3_max_reuse_distance"] = zero.max_live_parameters
    if stage == 3:
        # DeepSpeed's own linear rounds twice in bf16, once more after the bias: another loss.
        keys["memory_efficient_linear"] = False
        keys.setdefault("sub_group_size", STEPPED)
    sections: dict[str, dict[str, Any]] = {"zero_optimization": keys}
    if zero.accumulation_dtype is not None:
        sections["data_types"] = {"grad_accum_dtype": zero.accumulation_dtype}
    if zero.bf16_masters:
        sections["bf16"] = dict.fromkeys(
            ("bf16_master_weights_and_grads", "bf16_optimizer_states"), True
        )
    return sections


def _given(zero: ZeroConfig) -> dict[str, Any]:
    """The keys that do not have their defaults."""
    fields = type(zero).model_fields
    return {k: getattr(zero, k) for k, f in fields.items() if getattr(zero, k) != f.default}
