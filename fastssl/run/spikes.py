"""Steps out of line with those before them: what a loss and a gradient's norm may be.

    loss  <= median + engine.spike * max(1.4826 MAD, |median| / 100)
    norm  <= median * engine.spike_norm

over the last `engine.spike_window` steps that were applied, and without limits until there are as
many.  1.4826 MAD, the median distance from the median, is the standard deviation of what is
normally distributed, and a spike that was let through hardly moves it.  All ranks have the same
numbers, the loss being the mean over ranks, so they come to the same limits.

A stretch is the first and the last of steps that are left out, a spike and `engine.spike_back`
before it: they are counted, but their batches are not read.
"""

import math
from dataclasses import dataclass, field
from statistics import median

from fastssl.engine.config import EngineConfig
from fastssl.engine.verbs import Limits, Step

Stretch = tuple[int, int]


@dataclass
class Applied:
    """Of the last steps that were applied, the oldest first; saved with each checkpoint."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)

    def add(self, step: Step, cfg: EngineConfig) -> None:
        for kept, value in ((self.losses, step.loss), (self.norms, step.norm)):
            if value is None:  # nothing is watched: what was before is long past when it is again
                kept.clear()
                continue
            kept.append(value)
            del kept[: -cfg.spike_window]

    def limits(self, cfg: EngineConfig) -> Limits | None:
        """For the next step; None where nothing is watched."""
        if not cfg.spike and not cfg.spike_norm:
            return None
        loss = norm = math.inf
        if cfg.spike and len(self.losses) >= cfg.spike_window:
            middle = median(self.losses)
            spread = 1.4826 * median(abs(x - middle) for x in self.losses)
            loss = middle + cfg.spike * max(spread, abs(middle) / 100)
        if cfg.spike_norm and len(self.norms) >= cfg.spike_window:
            norm = cfg.spike_norm * median(self.norms)
        return Limits(loss, norm)


def stretch_of(spike: int, back: int) -> Stretch:
    """What is left out for a spike at step `spike`, the first step being 1.

    >>> stretch_of(9, 2), stretch_of(2, 5)
    ((7, 9), (1, 2))
    """
    return max(spike - back, 1), spike


def is_left_out(step: int, stretches: list[Stretch]) -> bool:
    return any(first <= step <= last for first, last in stretches)


def goes_until(step: int, total: int, stretches: list[Stretch]) -> int:
    """The last step that is read without a break from after `step` on.

    >>> goes_until(2, 10, [(7, 9), (5, 6)]), goes_until(9, 10, [(7, 9)])
    (4, 10)
    """
    return min([first - 1 for first, _ in stretches if first > step], default=total)


def in_a_row(stretches: list[Stretch]) -> int:
    """How many of the last stretches have no step between them.

    >>> in_a_row([(1, 3), (5, 6), (6, 8), (9, 11)])
    3
    """
    count = min(len(stretches), 1)
    while count < len(stretches) and stretches[-count - 1][1] >= stretches[-count][0] - 1:
        count += 1
    return count
