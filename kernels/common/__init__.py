"""What all families share: the choice of an implementation, checks, chunks, tuning, launches."""

from .autograd import accumulator, finished, first_order, full_precision
from .checks import can_read_values, check_ids, require_float
from .dispatch import HAS_TRITON, implementations

__all__ = [
    "HAS_TRITON",
    "accumulator",
    "can_read_values",
    "check_ids",
    "finished",
    "first_order",
    "full_precision",
    "implementations",
    "require_float",
]
