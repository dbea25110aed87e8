"""A kernel's launch as an operator of torch, which torch.compile keeps whole in its graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def operator(name: str, launch: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """torch.ops.fastssl.<name>, which runs `launch` and knows no gradient.

    launch: its annotations are the operator's schema; it returns new tensors and writes none.
    fake: of the same arguments, makes empty tensors like the results'.
    """
    made = torch.library.custom_op(f"fastssl::{name}", launch, mutates_args=())
    made.register_fake(fake)
    return made
