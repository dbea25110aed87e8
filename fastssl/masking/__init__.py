"""Which patches a sample hides: pure functions of the sample's seed.

Each place has a hash of the seed (`random.py`), and a fixed number of places is visible whatever
the sample.  The same seed gives the same mask on every device and whatever the split over ranks,
and there is no state to checkpoint.
"""

from .blocks import Blocks as Blocks
from .blocks import block_masking as block_masking
from .blocks import multi_block_masking as multi_block_masking
from .blocks import some_blocks as some_blocks
from .corruption import corrupt as corrupt
from .fields import connected_masking as connected_masking
from .fields import noise_masking as noise_masking
from .places import Masking as Masking
from .places import column_masking as column_masking
from .places import grid_masking as grid_masking
from .places import random_masking as random_masking
from .places import unit_masking as unit_masking
from .places import weighted_masking as weighted_masking
from .share import keep_of as keep_of
from .spans import span_masking as span_masking
from .spans import time_frequency_masking as time_frequency_masking
from .video import Dual as Dual
from .video import dual_masking as dual_masking
from .video import running_cell_masking as running_cell_masking
from .video import tube_masking as tube_masking
