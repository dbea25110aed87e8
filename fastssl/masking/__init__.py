"""Which patches a sample hides: pure functions of the sample's seed.

Each place has a hash of the seed (`random.py`), and a fixed number of places is visible whatever
the sample.  The same seed gives the same mask on every device and whatever the split over ranks,
and there is no state to checkpoint.
"""

from .blocks import Blocks, block_masking, multi_block_masking
from .corruption import corrupt
from .fields import connected_masking, noise_masking
from .places import (
    Masking,
    column_masking,
    grid_masking,
    random_masking,
    unit_masking,
    weighted_masking,
)
from .schedule import keep_at, keep_of, ratio_schedule
from .spans import span_masking, time_frequency_masking
from .video import Dual, dual_masking, running_cell_masking, tube_masking

__all__ = [
    "Blocks",
    "Dual",
    "Masking",
    "block_masking",
    "column_masking",
    "connected_masking",
    "corrupt",
    "dual_masking",
    "grid_masking",
    "keep_at",
    "keep_of",
    "multi_block_masking",
    "noise_masking",
    "random_masking",
    "ratio_schedule",
    "running_cell_masking",
    "span_masking",
    "time_frequency_masking",
    "tube_masking",
    "unit_masking",
    "weighted_masking",
]
