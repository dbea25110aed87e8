"""Measures of an encoder on a run's data, during the run and after it, and pictures of both."""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastssl import distributed
from fastssl.config import RunConfig
from fastssl.data.errors import BadItem, DataError
from fastssl.data.render.streams import apply_streams
from fastssl.data.sources.base import Source, Split
from fastssl.data.streams import split_of_stream
from fastssl.data.views.spec import ViewSpec, apply
from fastssl.data.views.streams import AnyViews, StreamViews, of_stream
from fastssl.data.worker import mostly_bad
from fastssl.engine.verbs import Verbs
from fastssl.evaluate import Evaluation, evaluate_features
from fastssl.evaluate.embed import EmbedConfig, Embedded, Features, embed, raw_input, two_views
from fastssl.files import printable
from fastssl.random import sample_seed
from fastssl.report import (
    PICTURED,
    plot_curves,
    plot_embedding,
    plot_reconstructions,
    plot_views,
    read_metrics,
)
from fastssl.run.log import first_rank_writes

MEASURES = ("knn", "linear", "rankme", "uniformity", "alignment")


class EvaluationError(ValueError):
    """The features are of no use: not finite."""

    exit_code, on_every_rank = 3, True


class Evaluator:
    """Measures the engine's encoder on a run's data, of several streams on the primary one.  Every
    method is collective."""

    def __init__(self, cfg: RunConfig, split: Split, views: AnyViews, engine: Verbs):
        self.cfg, self.items, self.whole, self.engine = cfg, split.train, views, engine
        self.split, self.views = split_of_stream(split), of_stream(views)
        self.test: Embedded | None = None
        self.bad: list[tuple[str, str]] = []

    def metrics(self) -> dict[str, float]:
        """The measures that the data allow, equal on every rank."""
        measured, parts = evaluate_on(self.cfg, self.split, self.views, self.engine.features)
        self.test, self.bad = parts.test, [*parts.train.bad, *parts.test.bad]
        return scores(measured)

    def raw_metrics(self) -> dict[str, float]:
        """The same measures of the raw input: images averaged down to at most 32 x 32."""
        return scores(evaluate_on(self.cfg, self.split, self.views, raw_input)[0])

    def pictures_before(self, directory: Path) -> None:
        """What the run trains on: a contact sheet of the first images and their views."""
        with first_rank_writes("views.png cannot be written"):
            sheets: dict[str, list[Tensor]] = {}
            if distributed.rank() == 0:
                sheets = contact_sheets(self.items, self.whole, self.cfg.seed)
            for name, sheet in sheets.items():
                views = of_stream(self.whole, name or None)
                path = directory / (f"views-{name}.png" if name else "views.png")
                if sheet and views.kind in PICTURED:
                    plot_views([views.shown(view) for view in sheet], path, kind=views.kind)

    def pictures_after(self, directory: Path, baselines: list[dict[str, Any]]) -> None:
        """Curves, the map of the test images, and reconstructions where the method has them."""
        painted = self._reconstructions()
        if distributed.rank() > 0:
            return
        path = directory / "metrics.jsonl"  # a log that was deleted is no reason to fail
        rows = read_metrics(path) if path.is_file() else []
        rows += [{"kind": "baseline", **row} for row in baselines]
        plot_curves(rows, directory / "curves.png")
        if painted is not None:
            path = directory / "reconstructions.png"
            plot_reconstructions(*painted, path, kind=self.views.kind)
        test, path = self.test, directory / "embedding.png"
        if test is not None and len(test.index) > 2:
            title = f"{len(test.index)} {self.views.kind}s, {self.cfg.method.name} features"
            classes = tuple(map(printable, self.split.train.classes or ()))
            plot_embedding(test.features, test.labels, classes, path, title)

    def _reconstructions(self) -> tuple[Tensor, Tensor, Tensor] | None:
        method = self.engine.method
        if not hasattr(method, "reconstruct") or self.views.kind not in PICTURED:
            return None
        source = self.split.test if len(self.split.test) else self.split.train
        sheet = contact_sheet(source, self.views.evaluation(), self.cfg.seed)
        if not sheet:
            return None
        images = sheet[0]
        masked, painted = self.engine.reconstruct(images, torch.arange(len(images)))
        return tuple(  # type: ignore[return-value]
            self.views.shown(x.float().cpu()) for x in (images, masked, painted)
        )


class EmbeddedSplit(NamedTuple):
    train: Embedded
    test: Embedded


def evaluate_on(
    cfg: RunConfig, split: Split, views: ViewSpec, features: Features
) -> tuple[Evaluation | None, EmbeddedSplit]:
    """Measure `features` on a split; with what was embedded for it.  Collective.

    With fewer than 2 held-out images the training images stand in, without labels: no accuracy
    then.  None where fewer than 2 images can be read at all.
    Raises EvaluationError, on every rank, for features that are not finite.
    """
    how = EmbedConfig(
        views=views,
        batch_size=cfg.evaluate.batch_size,
        limit=cfg.evaluate.max_images,
        workers=cfg.data.workers if len(split.train) > 10_000 else 0,
    )
    train = embed(features, split.train, how)
    test = embed(features, split.test, how) if len(split.test) > 1 else train
    train_y, test_y = train.labels, test.labels
    if len(test.index) < 2 or test is train:
        test, train_y, test_y = replace(train, labels=None), None, None
    held = split.train if test.index is train.index else split.test
    pair = two_views(features, held, views, cfg.seed)
    measured, problem, unreadable = None, "", ""
    if distributed.rank() == 0 and len(train.index) > 1:
        k = cfg.evaluate.neighbors
        try:
            measured = evaluate_features(
                train.features, test.features, train_y, test_y, views=pair, k=k
            )
        except ValueError as error:
            problem = str(error)
            bad, read = [*train.bad, *test.bad], len(train.index) + len(test.index)
            if len(bad) > cfg.data.max_bad * (len(bad) + read):
                unreadable = str(mostly_bad(f"{len(bad)} of {len(bad) + read} items", bad))
    measured, problem, unreadable = distributed.broadcast_object((measured, problem, unreadable))
    if unreadable:
        raise DataError(unreadable)
    if problem:
        raise EvaluationError(f"the encoder cannot be evaluated: {problem}")
    return measured, EmbeddedSplit(train, test)


def scores(measured: Evaluation | None) -> dict[str, float]:
    """The measures that were taken, by name."""
    if measured is None:
        return {}
    return {name: v for name in MEASURES if (v := getattr(measured, name)) is not None}


def contact_sheet(source: Source, views: ViewSpec, seed: int) -> list[Tensor]:
    """Every view of up to 8 readable items spread over the source, drawn as in training.

    One tensor (n, ...) a view, normalized; none where no item can be read.
    """
    return contact_sheets(source, views, seed)[""]


def contact_sheets(
    source: Source, views: AnyViews, seed: int, count: int = 8
) -> dict[str, list[Tensor]]:
    """The contact sheet of each stream by name, of the primary one as ""."""
    drawn: list[dict[str, list[Tensor]]] = []
    for i in range(0, len(source), max(1, len(source) // (2 * count))):
        try:
            drawn.append(_by_stream(views, source.item(i), sample_seed(seed, 0, i)))
        except BadItem:  # training counts and names it
            continue
        if len(drawn) == count:
            break
    return {
        name: [torch.stack(view) for view in zip(*(made[name] for made in drawn), strict=True)]
        for name in (drawn[0] if drawn else [""])
    }


def _by_stream(views: AnyViews, item: Any, seed: int) -> dict[str, list[Tensor]]:
    if not isinstance(views, StreamViews):
        return {"": apply(views, item, seed)}
    made = apply_streams(views, item, seed)
    return {"" if name == views.primary else name: own for name, own in made.items()}
