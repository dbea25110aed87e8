"""What families of kernels share: their shape classes, and how the tuner runs one of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .tuning import Config, Kernel, Variant, config_for, forced, register

FLOATS = ("bfloat16", "float16", "float32")
POINTERS = {"bfloat16": "*bf16:16", "float16": "*fp16:16", "float32": "*fp32:16", "uint8": "*u8:16"}
POINTERS["tf32"] = POINTERS["float32"]
ROWS = ":rows"  # in a signature: a pointer to the inputs' dtype

SCALES = ("FP16_SCALE", "A_SCALE", "B_SCALE")  # that float16 alone is given

Trial = Callable[..., Callable[[], Any]]  # of a class's dtype and part, a config and a device


class Part(NamedTuple):
    """What classes are made of: constants (None: not given), candidates, and types that differ."""

    constants: Mapping[str, Any]
    candidates: tuple[Config, ...]
    types: Mapping[str, str] = {}


def named(kind: str, names: str) -> dict[str, str]:
    """The types of arguments that are all of one kind.

    >>> named("i32", "M N")
    {'M': 'i32', 'N': 'i32'}
    """
    return {name: kind for name in names.split()}


def configs(blocks: str, table: Iterable[Sequence[int]], only: str = "") -> tuple[Config, ...]:
    """Configurations from rows of sizes of the `blocks`, by name, then warps and stages.

    >>> configs("BLOCK_M BLOCK_N", [(64, 32, 4, 2)])[0].arguments["num_warps"]
    4
    """
    names = blocks.split()
    return tuple(
        Config(dict(zip(names, sizes, strict=True)), warps, stages, only)
        for *sizes, warps, stages in table
    )


def variant(
    name: str,
    fn: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    candidates: tuple[Config, ...],
    trial: Trial,
    product: bool = False,
) -> Variant:
    """The class of that name, which begins with a dtype; the first candidate is the safe one.

    types: of every argument that some class is given; ROWS for a pointer to that dtype.
    constants: values that a class is compiled for; those of arguments that fn has not do not count.
    """
    constants = {n: value for n, value in constants.items() if n in fn.arg_names}
    given = (n for n in fn.arg_names if n not in constants and n not in candidates[0].blocks)
    pointer = POINTERS.get(name.split("-")[0], "")
    signature = {n: pointer if types[n] == ROWS else types[n] for n in given}
    return Variant(name, signature, constants, product, candidates, candidates[0], trial)


def kernel_by_part(
    name: str,
    fn: Any,
    types: Mapping[str, str],
    parts: Mapping[str, Part],
    trial: Trial,
    dtypes: Sequence[str] = FLOATS,
    halved: str = "",
    product: bool = False,
) -> Kernel:
    """Register a kernel with a class for each dtype and part, of which "" may be the only one.

    halved: a block of half as many numbers of 32 bits, so that its rows have as many bytes.
    """
    classes = {}
    for dtype, (part, (constants, candidates, own)) in itertools.product(dtypes, parts.items()):
        if dtype != "float16":
            constants = {**constants, **dict.fromkeys(SCALES)}
        if dtype == "float32" and halved:
            sizes = ({**c.blocks, halved: c.blocks[halved] // 2} for c in candidates)
            candidates = tuple(replace(c, blocks=b) for c, b in zip(candidates, sizes, strict=True))
        run, known = partial(trial, dtype, part), {**types, **own}
        each = f"{dtype}-{part}".rstrip("-")
        classes[each] = variant(each, fn, known, constants, candidates, run, product)
    return register(Kernel(name, fn, classes))


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


def random(dtype: str, device: torch.device, *shape: int, seed: int = 0, unit: bool = False):
    """Normal numbers for a trial, or unit rows of them, the same at each call."""
    x = torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device)
    x = torch.nn.functional.normalize(x, dim=-1) if unit else x
    return x.to(getattr(torch, dtype, torch.float32))
