"""What small kernels share: shape classes, one a dtype, and how the tuner runs one of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .tuning import Config, Kernel, Variant, config_for, forced, register

POINTERS = {"bfloat16": "*bf16:16", "float16": "*fp16:16", "float32": "*fp32:16"}
ROWS = ":rows"  # in a signature: a pointer to the inputs' dtype

Trial = Callable[[str, Config, torch.device], Callable[[], Any]]  # of a dtype's name


def kernel_by_dtype(
    name: str,
    fn: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    configs: Sequence[Config],
    trial: Trial,
) -> Kernel:
    """Register a kernel with one class for each dtype; the first config is the safe one."""
    variants = {}
    for dtype, pointer in POINTERS.items():
        signature = {n: pointer if t == ROWS else t for n, t in types.items()}
        variants[dtype] = Variant(
            dtype, signature, constants, False, tuple(configs), configs[0], partial(trial, dtype)
        )
    return register(Kernel(name, fn, variants))


def config_by_dtype(kernel: Kernel, x: Tensor) -> Config:
    """The configuration to launch the class of x's dtype with."""
    return config_for(kernel, dtype_name(x), x.device)


def dtype_name(x: Tensor) -> str:
    """The name of x's dtype: "bfloat16"."""
    return str(x.dtype).removeprefix("torch.")


def launcher(
    kernel: str, config: Config, launch: Callable[..., Any], *args: Any
) -> Callable[[], Any]:
    """What a tuner times: launch(*args) with this configuration of the kernel of that name."""

    def run() -> Any:
        with forced(kernel, config):
            return launch(*args)

    return run
