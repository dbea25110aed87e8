"""The dearest classes' configurations beside the safe one: a watched child, alone on the GPU.

    python -m fastssl.bench.gpu.tuning

A candidate is a case: one that loses the context or never ends costs itself and no other.  Where
its result is not that of the safe configuration it is wrong and has no time, and where the safe one
failed there is nothing to compare with: neither is ever chosen.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from fastssl.bench.compiler import tune
from fastssl.bench.compiler.aot import label
from fastssl.bench.compiler.tune import OK, SCARCE, Launched, Timing
from fastssl.bench.gpu import lines
from fastssl.bench.gpu.headlines import TUNED
from fastssl.bench.gpu.watched import Case, Watch, rehearsing, run
from fastssl.kernels.common import tuning
from fastssl.kernels.common.tuning import Clock, Config, Kernel, Variant

GAIN = 0.98  # of the safe one's time: what is not clearly faster is noise
REHEARSED = "scaled_cosine_forward"
Chosen = tuple[str, str, Variant, Config]


def candidates(kernels: Mapping[str, Kernel], arch: str) -> list[Chosen]:
    """(kernel, class, its variant, configuration) in TUNED's order, the safe one first."""
    found = []
    for kernel, name in TUNED:
        variant = kernels[kernel].variants[name]
        others = [config for config in variant.tried(arch) if config != variant.safe]
        found += [(kernel, name, variant, config) for config in (variant.safe, *others)]
    return found


def quick_ms(launch: Any) -> float:
    """The median of launches with a cold L2, in some 50 ms."""
    from triton.testing import do_bench

    return float(do_bench(launch, warmup=10, rep=40, return_mode="median"))  # pyright: ignore


class Trials:
    """The candidates as cases, which share the safe configuration's result of their class."""

    def __init__(self, device: torch.device, clock: Clock, done: Iterable[Mapping]) -> None:
        self.device, self.clock = device, clock
        self.known: tuple[Variant, Launched] | None = None
        self.hopeless = {(x["kernel"], x["variant"]) for x in done if _is_safe(x) and not x["ok"]}

    def cases(self, chosen: Iterable[Chosen]) -> list[Case]:
        """A case each."""
        return [(f"{one[0]} {one[1]} {label(one[3])}", partial(self.run, *one)) for one in chosen]

    def run(self, kernel: str, name: str, variant: Variant, config: Config) -> dict[str, Any]:
        """Launch one, compare it, and time it."""
        about = {"kernel": kernel, "variant": name, "config": asdict(config)}
        about["safe"] = config == variant.safe
        if (kernel, name) in self.hopeless:
            return {**about, "why": "the safe configuration failed: nothing to compare it with"}
        safe = self.safe(variant)
        mine = safe if about["safe"] else tune.launch_once(variant, config, self.device)
        wrong = "" if mine.status != OK else tune.difference(mine.result, safe.result)
        if mine.status == SCARCE and not about["safe"]:  # that is no fault of anybody's
            return {**about, "status": SCARCE}
        if safe.status != OK:
            self.hopeless.add((kernel, name))
        if mine.status != OK or wrong or safe.status != OK or mine.launch is None:
            return {**about, "why": wrong or f"{mine.status}: {mine.why}"}
        return {**about, "status": OK, "ms": self.clock(mine.launch)}

    def safe(self, variant: Variant) -> Launched:
        """The safe configuration's result, of one class at a time: they are large."""
        if self.known is None or self.known[0] is not variant:
            self.known = None
            self.known = variant, tune.launch_once(variant, variant.safe, self.device)
        return self.known[1]


def _is_safe(line: Mapping[str, Any]) -> bool:
    return bool(line.get("safe"))


def chosen(cases: Iterable[Mapping[str, Any]]) -> list[Timing]:
    """The fastest of each class whose safe configuration has a time that it clearly beats."""
    times: dict[tuple[str, str], dict[bool, list[Timing]]] = {}
    for line in cases:
        if line["ok"] and line.get("status") == OK and line.get("ms"):
            config = Config.read(line["config"])
            timing = Timing(line["kernel"], line["variant"], config, OK, line["ms"])
            of_class = times.setdefault((timing.kernel, timing.variant), {True: [], False: []})
            of_class[bool(line["safe"])].append(timing)
    best = []
    for of_class in times.values():
        if not of_class[True]:
            continue
        (safe, *_), others = of_class[True], of_class[False]
        fastest = min(others, key=lambda timing: timing.ms or 0.0, default=safe)
        best.append(fastest if (fastest.ms or 0.0) < GAIN * (safe.ms or 0.0) else safe)
    return best


def main() -> int:
    """The child: every candidate of TUNED; in a rehearsal of one small class."""
    watch = Watch.told()
    device = torch.device("cpu" if rehearsing() else "cuda:0")
    wanted = candidates(tuning.kernels(), tune.arch_of(device))
    clock: Clock = quick_ms
    if rehearsing():
        from fastssl.kernels.regression import cosine_triton

        cosine_triton.TRIAL = (2, 3, 10)
        wanted, clock = [one for one in wanted if one[0] == REHEARSED], lambda launch: 1.0
    return run(Trials(device, clock, lines.cases(lines.read(watch.path))).cases(wanted), watch)


if __name__ == "__main__":
    sys.exit(main())
