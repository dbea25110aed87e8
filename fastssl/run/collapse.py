"""What a run's logged numbers say of collapse, in words, and what usually cures it.

The entries are those of fastssl.methods.watch, `target_std` (the spread over samples of targets
that are layer-normed) and an evaluation's `rankme`.  A symptom is told once a run: when every row
logged over a tenth of its steps, or 20,000 of them, has shown it, and five rows at least.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

ROWS, SHARE, STEPS = 5, 0.1, 20_000  # rows that show a symptom, over what part of the run, at most
STD, RANK = 0.02, 1.1  # spreads and directions below these are a collapse
NEAR = 0.01  # of ln K: how near to chance a loss stays, and how little a teacher says of an image
Row = Mapping[str, Any]

_STEADY = "a lower optim.lr or a longer warm-up (optim.schedule.warmup)"
_NORMS = "batch norms that see all ranks' samples (engine.sync_batchnorm=true) and a larger batch"
_CURES = {
    "target_std": f"a teacher that moves more slowly (method.momentum nearer to 1), {_STEADY}, "
    "and larger or fewer visible parts",
    "embedding_std": f"{_STEADY}, a teacher that moves more slowly (method.momentum) where there "
    f"is one, {_NORMS}",
    "embedding_rank": "a term that spreads the embeddings (variance and covariance, KoLeo), a "
    "wider projection head, stronger augmentation, a lower temperature",
    "flat": "a lower teacher temperature, with a warm-up of it that ends lower, and a center that "
    f"moves more slowly; then {_STEADY}",
    "single": "a higher teacher temperature, a center that follows faster (a lower momentum of it) "
    "or Sinkhorn assignments; where each rank has a small batch, a center over all ranks",
    "alike": f"a teacher that moves more slowly (method.momentum nearer to 1), {_STEADY}",
    "loss": "a lower teacher temperature, the last layer frozen for the first epoch, "
    f"{_STEADY}; if gradients are near 0 (grad_norm), a higher one",
    "rankme": f"{_STEADY}, and the cures of the method's own loss: its temperature, its teacher's "
    "momentum, its variance term",
}


def symptoms(row: Row) -> Iterator[tuple[str, str]]:
    """What a row of metrics shows: a key for each symptom, and a sentence with its cures."""
    number = {k: v for k, v in row.items() if isinstance(v, float | int) and math.isfinite(v)}
    for name, value in number.items():
        prefix, key = _parted(name)
        if key in ("embedding_std", "target_std") and value < STD:
            what = "embeddings" if key == "embedding_std" else "teacher's targets"
            yield name, _said(f"the {what} hardly differ from sample to sample", name, value, key)
        elif key == "embedding_rank" and value < RANK:
            if number.get(f"{prefix}embedding_std", 1.0) >= STD:  # else it is of rounding
                what = "the embeddings vary along one direction alone"
                yield name, _said(what, name, value, key)
        elif key == "teacher_entropy" and f"{prefix}chance" in number:
            yield from _teacher(prefix, number)
        elif key == "chance" and f"{prefix}loss" in number:
            loss = f"{prefix}loss"
            if value > 0 and abs(number[loss] - value) <= NEAR * value:
                what = f"the loss stays at chance ({loss}={number[loss]:.4g}, ln K={value:.4g})"
                yield loss, f"{what}: nothing is learned. Usual cures: {_CURES['loss']}"
    if number.get("rankme", math.inf) < 1 + NEAR and row.get("kind") == "eval":
        what = "the features of all images are one point, or lie along one line"
        yield "rankme", _said(what, "RankMe", number["rankme"], "rankme")


def _teacher(prefix: str, number: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    chance, entropy = number[f"{prefix}chance"], number[f"{prefix}teacher_entropy"]
    kl = number.get(f"{prefix}center_kl", 0.0)
    if chance <= 0 or chance - kl - entropy > NEAR * chance:
        return
    kind, what = "alike", "the same distribution"
    if entropy > (1 - NEAR) * chance:
        kind, what = "flat", "a flat distribution"
    elif entropy < NEAR * chance:
        kind, what = "single", "one and the same prototype"
    name = f"{prefix}teacher_entropy"
    facts = f"{name}={entropy:.4g} of ln K={chance:.4g}, {prefix}center_kl={kl:.4g}"
    yield name, f"the teacher gives every sample {what} ({facts}): collapse. {_usual(kind)}"


def _parted(name: str) -> tuple[str, str]:
    """A name's prefix, and the entry that it is of."""
    known = ("embedding_std", "embedding_rank", "target_std", "teacher_entropy", "chance")
    for key in known:
        if name == key or name.endswith(f"_{key}"):
            return name.removesuffix(key), key
    return "", name


def _said(what: str, name: str, value: float, kind: str) -> str:
    return f"{what} ({name}={value:.2g}): collapse. {_usual(kind)}"


def _usual(kind: str) -> str:
    return f"Usual cures: {_CURES[kind]}"


@dataclass
class Collapse:
    """Which symptoms the last rows have shown; saved with each checkpoint."""

    since: dict[str, int] = field(default_factory=dict)  # the first step of an unbroken series
    rows: dict[str, int] = field(default_factory=dict)  # logged in it
    said: list[str] = field(default_factory=list)

    def read(self, row: Row, step: int, total: int) -> list[str]:
        """What is to be said after a row of training at `step` of `total`, each thing once."""
        shown = dict(symptoms(row))
        self.since = {key: self.since.get(key, step) for key in shown}
        self.rows = {key: self.rows.get(key, 0) + 1 for key in shown}
        return self._new(
            {key: text for key, text in shown.items() if self._lasts(key, step, total)}
        )

    def evaluated(self, row: Row) -> list[str]:
        """What is to be said after an evaluation of trained features."""
        return self._new(dict(symptoms(row)))

    def _lasts(self, key: str, step: int, total: int) -> bool:
        return self.rows[key] >= ROWS and step - self.since[key] >= min(SHARE * total, STEPS)

    def _new(self, texts: dict[str, str]) -> list[str]:
        fresh = {key: text for key, text in texts.items() if key not in self.said}
        self.said += fresh
        return [*fresh.values()]
