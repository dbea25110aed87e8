"""What all families share: the choice of an implementation, checks, chunks, tuning, launches."""

from .autograd import (
    FirstOrder,
    accumulator,
    ahead,
    finished,
    first_order,
    full_precision,
    refuse_torch_func,
)
from .checks import can_read_values, check_ids, require_float
from .chunks import spans, square_tile, tile_shape
from .dispatch import HAS_TRITON, implementations

__all__ = [
    "FirstOrder",
    "HAS_TRITON",
    "accumulator",
    "ahead",
    "can_read_values",
    "check_ids",
    "finished",
    "first_order",
    "full_precision",
    "implementations",
    "refuse_torch_func",
    "require_float",
    "spans",
    "square_tile",
    "tile_shape",
]
