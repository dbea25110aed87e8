"""What a run shows for itself: evaluations, pictures, results.json and the report.

Three encoders stand side by side: the pretrained one, the same at random initialisation (measured
by the run before its first step), and the raw input (images averaged down to at most 32 x 32).
"""

import contextlib
import json
import platform
import resource
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastssl import distributed
from fastssl.config.schema import RunConfig
from fastssl.data.errors import BadItem, DataError
from fastssl.data.seeds import sample_seed
from fastssl.data.sources.base import Source, Split
from fastssl.data.views.spec import ViewSpec, apply
from fastssl.data.worker import mostly_bad
from fastssl.engine.engine import Engine
from fastssl.evaluate import Evaluation, evaluate_features
from fastssl.evaluate.embed import EmbedConfig, Embedded, Features, embed, raw_input, two_views
from fastssl.report import (
    PICTURED,
    plot_curves,
    plot_embedding,
    plot_reconstructions,
    plot_views,
    read_metrics,
    write_report,
)
from fastssl.run.log import LogError

if TYPE_CHECKING:
    from fastssl.run.train import Run

MEASURES = ("knn", "linear", "rankme", "uniformity", "alignment")
PACKAGES = ("fastssl", "torch", "deepspeed", "timm", "torchvision", "triton", "scikit-learn")


class EvaluationError(ValueError):
    """The features are of no use: not finite."""

    exit_code, on_every_rank = 3, True


class Evaluator:
    """Measures the engine's encoder on a run's data.  Every method is collective."""

    def __init__(self, cfg: RunConfig, split: Split, views: ViewSpec, engine: Engine):
        self.cfg, self.split, self.views, self.engine = cfg, split, views, engine
        self.test: Embedded | None = None
        self.bad: list[tuple[str, str]] = []

    def metrics(self) -> dict[str, float]:
        """The measures that the data allow, equal on every rank."""
        measured, parts = evaluate_on(self.cfg, self.split, self.views, self.engine.features)
        self.test, self.bad = parts.test, [*parts.train.bad, *parts.test.bad]
        return scores(measured)

    def pictures_before(self, directory: Path) -> None:
        """What the run trains on: a contact sheet of the first images and their views."""
        with first_rank_writes("views.png cannot be written"):
            sheet: list[Tensor] = []
            if distributed.rank() == 0:
                sheet = contact_sheet(self.split.train, self.views, self.cfg.seed)
            if sheet and self.views.kind in PICTURED:
                shown = [self.views.shown(view) for view in sheet]
                plot_views(shown, directory / "views.png", kind=self.views.kind)

    def pictures_after(self, directory: Path, baselines: list[dict[str, Any]]) -> None:
        """Curves, the map of the test images, and reconstructions where the method has them."""
        painted = self._reconstructions()
        if distributed.rank() > 0:
            return
        rows = read_metrics(directory / "metrics.jsonl")
        rows += [{"kind": "baseline", **row} for row in baselines]
        plot_curves(rows, directory / "curves.png")
        if painted is not None:
            path = directory / "reconstructions.png"
            plot_reconstructions(*painted, path, kind=self.views.kind)
        test, path = self.test, directory / "embedding.png"
        if test is not None and len(test.index) > 2:
            title = f"{len(test.index)} {self.views.kind}s, {self.cfg.method.name} features"
            classes = self.split.train.classes or ()
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
        seeds = torch.arange(len(images))
        method.eval()
        place = self.engine.device
        with self.engine.whole_parameters():
            masked, painted = method.reconstruct(images.to(place), seeds.to(place))
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
        k = cfg.evaluate.neighbours
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


def finish(run: "Run", command: str) -> dict[str, Any]:
    """Evaluate at the end if the loop did not, write results.json, the pictures and report.html."""
    rows = read_metrics(run.directory / "metrics.jsonl")
    evals = {row["step"]: row for row in rows if row["kind"] == "eval"}
    trained = evals.get(run.total)
    if trained is None or run.evaluator.test is None:
        trained = run.evaluator.metrics()
    raw, _ = evaluate_on(run.cfg, run.split, run.evaluator.views, raw_input)
    table = [("pretrained", trained), ("raw input", scores(raw))]
    if 0 in evals:  # a log that was deleted is no reason to fail
        table.insert(1, ("random initialisation", evals[0]))
    state = run.progress
    results = {
        "method": run.cfg.method.name,
        "source": run.cfg.data.source.name,
        "items": f"{run.evaluator.views.kind}s",
        "rows": [{"encoder": name, **_measures(row)} for name, row in table],
        "train": {
            "loss": state.last.get("loss"),
            "images_per_s": state.images / state.seconds if state.seconds else None,
            "data_wait": min(state.waited / state.seconds, 1.0) if state.seconds else None,
            "peak_memory_bytes": peak_memory(),
            "seconds": state.seconds,
            "steps": state.step,
            "epochs": run.cfg.epochs,
            "parameters": count_parameters(run.engine.method),
            "bad_images": len(run.log.bad),
        },
        "versions": versions(),
        "command": command,
    }
    with first_rank_writes("the run is complete and saved, but its report is not written"):
        if distributed.rank() == 0:
            aside = run.directory / ".results.partial"
            aside.write_text(json.dumps(results, indent=1))
            aside.replace(run.directory / "results.json")
        run.evaluator.pictures_after(run.directory, results["rows"][1:])
        if distributed.rank() == 0:
            write_report(run.directory)
    return results


@contextlib.contextmanager
def first_rank_writes(sentence: str) -> Iterator[None]:
    """A disk that refuses the first rank is a LogError on every rank, not a hang on the others."""
    problem = ""
    try:
        yield
    except OSError as error:
        problem = f"{sentence}: {error}"
    problem = distributed.broadcast_object(problem)
    if problem:
        raise LogError(problem)


def contact_sheet(source: Source, views: ViewSpec, seed: int, count: int = 8) -> list[Tensor]:
    """Every view of up to `count` readable items spread over the source, drawn as in training.

    One tensor (n, ...) a view, normalised; none where no item can be read.
    """
    drawn: list[list[Tensor]] = []
    for i in range(0, len(source), max(1, len(source) // (2 * count))):
        try:
            drawn.append(apply(views, source.item(i), sample_seed(seed, 0, i)))
        except BadItem:  # training counts and names it
            continue
        if len(drawn) == count:
            break
    return [torch.stack(view) for view in zip(*drawn, strict=True)]


def count_parameters(module: torch.nn.Module) -> int:
    """Parameters of the whole module, also while ZeRO-3 keeps only slices here."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters())


def peak_memory() -> int:
    """Bytes: the CUDA allocator's high-water mark, or the process's resident one on CPU."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _measures(row: dict[str, Any]) -> dict[str, float]:
    return {name: row[name] for name in MEASURES if name in row}
