"""A processor's operators by themselves, each on tensors of its own shapes, here and now.

No rate of a processor holds for all of them: attention over few tokens, or narrow products in
bfloat16, take many times what its rates say.  So of the operators that were counted each kind is
run a few times on tensors of the same shapes; what costs most first, and for BUDGET seconds.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from .counting import Blank, Call, Meter, Operator, Work

BUDGET = 30.0  # seconds
MOST = 1 << 30  # bytes that an operator reads and writes: larger ones are left to the rates
_LEAST = 5e-3  # seconds for an operator
_OTHERS = 8 << 20  # bytes that are looked at in between: more than a core's own caches

_known: dict[tuple[str, int], float] = {}  # by operator and threads; 0: it cannot be run like this


def seconds(call: Callable[[], object], least: float = 0.02, rounds: int = 5) -> float:
    """Of one call, the least of so many rounds: a processor that is shared is slow at times.

    The processor's own time, for others may be at work here; of several threads by the clock.
    """
    now = _clock()
    call()
    found = []
    for _ in range(rounds):
        calls, since = 0, now()
        while not calls or now() - since < least:
            call()
            calls += 1
        found.append((now() - since) / calls)
    return min(found)


def _clock() -> Callable[[], float]:
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def measure(works: Iterable[Work], guess: Callable[[Call], float]) -> None:
    """Say of each call what it takes here by itself.  guess: what it takes by the rates."""
    threads, until = torch.get_num_threads(), time.perf_counter() + BUDGET
    alike: dict[str, list[tuple[Work, int]]] = defaultdict(list)
    for work in works:
        for n, call in enumerate(work.calls):
            if call.operator is not None and call.moved <= MOST:
                alike[repr(call.operator)].append((work, n))

    def cost(key: str) -> float:
        work, n = alike[key][0]
        return len(alike[key]) * guess(work.calls[n])

    new = [key for key in alike if (key, threads) not in _known]
    new.sort(key=cost, reverse=True)
    for _ in range(2):  # what disturbs an operator seldom disturbs it twice
        for key in new:
            work, n = alike[key][0]
            if time.perf_counter() < until:
                found = alone(work.calls[n].operator)
                _known[key, threads] = min(found, _known.get((key, threads), found))
    for key, places in alike.items():
        for work, n in places:
            found = _known.get((key, threads), 0.0)
            work.calls[n] = work.calls[n]._replace(seconds=found)


def alone(operator: Operator | None) -> float:
    """Seconds of it; 0 where numbers made up for it are none that it takes."""
    if operator is None:
        return 0.0
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            args, kwargs = tree_map_only(Blank, _filled, (operator.args, operator.kwargs))
            return _cold(lambda: operator.func(*args, **kwargs))
        except (RuntimeError, ValueError, IndexError):
            return 0.0


def _cold(call: Callable[[], object], before: Callable[[], object] = lambda: None) -> float:
    """Seconds of one call, the least of several, where a processor's own caches hold nothing of it,
    as between the many tensors of a step."""
    now, least, spent, calls = _clock(), float("inf"), 0.0, 0
    other = torch.zeros(_OTHERS // 4)
    while calls < 3 or (spent < _LEAST and calls < 5):
        before()
        other.add_(1.0)
        since = now()
        call()
        least, spent, calls = min(least, now() - since), spent + now() - since, calls + 1
    return least


def _filled(blank: Blank) -> Tensor:
    reach = 1 + sum((n - 1) * step for n, step in zip(blank.shape, blank.stride, strict=True))
    flat = torch.zeros(reach if 0 not in blank.shape else 0, dtype=blank.dtype)
    if blank.dtype.is_floating_point:
        flat.normal_()
    return flat.as_strided(blank.shape, blank.stride)


def host() -> float:
    """Seconds that a transformer takes for each of its operators where these have nothing to do:
    its modules, views, autograd's nodes, gradients."""
    from fastssl.models.decoders import MAEDecoder  # takes seconds

    blocks = MAEDecoder(16, width=16, depth=4, heads=2, patches=4, values=4).blocks
    network = nn.Sequential(*blocks)
    x = torch.randn(2, 4, 16)

    def step() -> None:
        network(x).sum().backward()

    meter, work = Meter([*network.parameters(), x]), Work()
    with meter, meter.into(work):
        step()
    return _cold(step, network.zero_grad) / len(work.calls)
