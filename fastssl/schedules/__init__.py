"""Learning rate, momentum, temperature, mask ratio: pure functions of how far training has come.

`progress` is the fraction of training done.  It is clamped to [0, 1], so a run carried a step
past its end stays at its end value.  `infinite` has no end and takes a step count instead.
Values are in the unit of what is scheduled.  No state: a resumed run needs none restored.

    >>> [round(cosine(p, 0.996, 1.0), 4) for p in (0.0, 0.5, 1.0)]
    [0.996, 0.998, 1.0]
"""

import math


def linear(progress: float, start: float, end: float) -> float:
    """The straight line from `start` at progress 0 to `end` at progress 1."""
    p = _clamp(progress)
    return (1.0 - p) * start + p * end


def cosine(progress: float, start: float, end: float) -> float:
    """Half a cosine from `start` at progress 0 to `end` at progress 1, flat at both ends.

    Falling: a learning rate, arXiv:1608.03983 eq. 5.  Rising: the momentum of an EMA teacher,
    arXiv:2006.07733, implementation details.
    """
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * _clamp(progress)))


def infinite(
    step: float,
    peak: float,
    *,
    warmup: float,
    cooldown: float,
    constant: float,
    anneal: tuple[float, float, float] | None = None,
) -> float:
    """Training without a planned end: the value at `step`, counted from 0.

    A line from 0 to `peak` over `warmup` steps, half a cosine down to `constant` over the next
    `cooldown` steps, then `constant` for ever.  anneal = (start, steps, final), given only when
    a finished model is wanted: from step `start` on, exponentially from the value reached there
    down to `final`, reached `steps` later and kept.
    Raises ValueError for negative step counts, and for an annealing without steps or between
    values that are not positive, which no exponential joins.
    Source: arXiv:2503.02844, eq. 1.
    """
    if warmup < 0 or cooldown < 0:
        raise ValueError(f"warmup and cooldown count steps, got {warmup} and {cooldown}")
    if anneal is not None and step > anneal[0]:
        start, steps, final = anneal
        high = infinite(start, peak, warmup=warmup, cooldown=cooldown, constant=constant)
        if steps <= 0 or final <= 0 or high <= 0:
            raise ValueError(
                f"anneal=(start, steps, final) wants steps > 0 and final > 0, and a start past "
                f"step 0; got {anneal}"
            )
        return high * (final / high) ** _clamp((step - start) / steps)
    if step < warmup:
        return peak * max(step, 0.0) / warmup
    if step < warmup + cooldown:
        return cosine((step - warmup) / cooldown, peak, constant)
    return constant


def _clamp(progress: float) -> float:
    return min(max(progress, 0.0), 1.0)
