"""What small Triton kernels share: their shape classes, one a dtype, and their launch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .tuning import Config, Kernel, Variant, config_for

POINTERS = {"bfloat16": "*bf16:16", "float16": "*fp16:16", "float32": "*fp32:16"}
ROWS = ":rows"  # in a signature: a pointer to the inputs' dtype

Grid = Callable[[Mapping[str, int]], tuple[int, ...]]  # of the blocks


def kernel(
    name: str,
    fn: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    configs: Sequence[Config],
    trial: Callable[[str, Config, torch.device], Callable[[], Any]],
) -> Kernel:
    """A kernel with one class for each dtype.  trial: of a dtype's name, a config and a device."""
    variants = {}
    for dtype, pointer in POINTERS.items():
        signature = {n: pointer if t == ROWS else t for n, t in types.items()}
        variants[dtype] = Variant(
            dtype, signature, constants, False, tuple(configs), configs[0], partial(trial, dtype)
        )
    return Kernel(name, fn, variants)


def launch(kernel: Kernel, x: Tensor, grid: Grid, **given: Any) -> None:
    """Launch the kernel's class of x's dtype, unless the grid is empty."""
    config = config_for(kernel, str(x.dtype).removeprefix("torch."), x.device)
    places = grid(config.blocks)
    if 0 not in places:
        with torch.cuda.device_of(x):
            kernel.fn[places](**given, **config.blocks, **config.options)
