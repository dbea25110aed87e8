"""A pretraining run: data, method and engine from a configuration, and the loop.

    pretrain(resolve("simclr-digits"))

The run is a function of its configuration: data order, augmentations and masks depend on the seed
and the step alone, so that a run that was killed and resumed ends with the same numbers.
"""

import math
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any, NamedTuple

import torch
from pydantic import TypeAdapter

from fastssl import distributed
from fastssl.config import ConfigError, RunConfig
from fastssl.data.batch.ops import apply_batch_ops
from fastssl.data.datasets import fingerprint, open_source
from fastssl.data.loader import PretrainLoader
from fastssl.data.sources.base import Split
from fastssl.data.views.image import Views
from fastssl.engine import launch
from fastssl.engine.checkpoint import CheckpointError, Checkpoints
from fastssl.engine.engine import Engine
from fastssl.engine.scalars import Scalars
from fastssl.engine.verbs import Step, Verbs
from fastssl.engine.watchdog import DATA, SAVING, STEP, Stalled, heart
from fastssl.methods import Method
from fastssl.models.deferred import Deferred
from fastssl.run.build import (
    NOTHING,
    Given,
    begin,
    build_loader,
    check_steps,
    fitted,
    kept_backend,
    with_backend,
)
from fastssl.run.collapse import Collapse
from fastssl.run.directory import Place, extension, prepared
from fastssl.run.evaluation import Evaluator
from fastssl.run.log import LogError, RunLog, Silent, Watch, finite
from fastssl.run.rehearsal import rehearse
from fastssl.run.restarts import after_restart
from fastssl.run.spikes import Applied, Stretch, goes_until, in_a_row, is_left_out, stretch_of
from fastssl.run.summary import count_parameters, summarize, write_summary
from fastssl.run.trace import traced
from fastssl.tree import count_rows, map_leaves

LEAVE, SAVE, GO = range(3)  # votes before a step: no batch has come; save after it; neither


class NonFinite(RuntimeError):
    """The loss or a gradient was not finite: says where, on which images, what is still good."""

    exit_code, on_every_rank = 3, True


class FirstStepError(RuntimeError):
    """A run's first step failed, on this rank at least: nothing of the run is left."""

    exit_code, on_every_rank = 2, False


class Interrupted(RuntimeError):
    """The run was asked to stop; its state is saved."""

    exit_code, on_every_rank = 5, True


@dataclass
class Progress:
    """Where a run stands; saved with each checkpoint."""

    step: int = 0
    best: float | None = None
    epoch_losses: list[float] = field(default_factory=list)  # logged in the current epoch
    seconds: float = 0.0  # spent training, over all resumptions
    images: int = 0  # trained on in those seconds
    skipped: int = 0  # steps that were not finite, and not applied
    skipped_in_row: int = 0  # of those, the last ones
    waited: float = 0.0  # of those seconds, for data, on average over ranks
    last: dict[str, float | None] = field(default_factory=dict)  # None: was not finite
    applied: Applied = field(default_factory=Applied)
    collapse: Collapse = field(default_factory=Collapse)
    left_out: list[Stretch] = field(default_factory=list)  # steps, by going back


def pretrain(
    cfg: RunConfig, watch: Watch | None = None, command: str = "", given: Given = NOTHING
) -> dict[str, Any]:
    """Run `cfg` to its end and return its results (also RUN/results.json).

    given: the objects that stand behind a model or a source named "given".

    Raises ConfigError, DataError and EngineError for what a user can mend, NonFinite, Interrupted,
    Stalled where data do not come, and CheckpointError when the disk refuses: each leaves the last
    good checkpoint in place.
    """
    # A single process tells of a mistake before it loads DeepSpeed; several do it together.
    ready = None if launch.launched() else prepare(cfg, given)
    with launch.session(cfg.device) as device:
        cfg, split, method, deferred, goes_on, notes = ready or prepare(cfg, given)
        if watch is None or distributed.rank() > 0:
            watch = Silent()
        for said in notes:
            watch.say(said)
        loader = build_loader(cfg, split.train, device, parameters=method.needs_view_params)
        check_steps(cfg, loader)
        if not goes_on:
            rehearse(method, loader)
        with prepared(cfg, fingerprint(split)) as place:
            size = cfg.batch_size
            engine = Engine(
                method, cfg.optim, cfg.engine, device=device, batch_size=size, deferred=deferred
            )
            try:
                ready = deferred = None  # and what it has written down
                return Run(cfg, split, loader, engine, watch, place).go(command)
            finally:
                engine.close()


class Ready(NamedTuple):
    """What a run is made of, before there is an engine; goes_on: there is a run to take up."""

    cfg: RunConfig
    split: Split
    method: Method
    deferred: Deferred | None
    goes_on: bool
    notes: list[str]


def prepare(cfg: RunConfig, given: Given = NOTHING) -> Ready:
    """Open the data and build the method.  Collective: what the disk holds the first rank says, as
    a file system may show it to others later; a mistake that one rank meets all of them raise."""
    cfg, notes = after_restart(cfg), []
    goes_on, backend = distributed.from_first(
        lambda: (
            cfg.resume != "never"
            and Checkpoints(cfg.directory, cfg.checkpoint).latest() is not None,
            kept_backend(cfg),
        )
    )
    with distributed.alike():
        split = given.split or open_source(cfg.data.source, cfg.seed, cfg.data.streams)
        cfg, note = with_backend(fitted(cfg, split.train), split.train, backend)
        channels = split.train.channels
        method, deferred = begin(cfg, channels, notes, given.encoder, resumed=goes_on)
        return Ready(cfg, split, method, deferred, goes_on, [note, *notes] if note else notes)


class Run:
    """One run's parts, and the loop over them."""

    def __init__(
        self,
        cfg: RunConfig,
        split: Split,
        loader: PretrainLoader,
        engine: Verbs,
        watch: Watch,
        place: Place,
    ):
        self.cfg, self.split, self.loader, self.engine = cfg, split, loader, engine
        self.watch, self.place, self.directory = watch, place, cfg.directory
        board = self.directory / "tensorboard" if cfg.log.tensorboard else None
        self.scalars = Scalars(board, cfg.engine.deepspeed)
        self.log = RunLog(self.directory, watch, writing=distributed.rank() == 0)
        self.checkpoints = Checkpoints(self.directory, cfg.checkpoint, cfg.engine.spike_back)
        if cfg.log.breakdown:
            engine.measure()
        self.evaluator = Evaluator(cfg, split, loader.views, engine)
        self.progress, self.waits = Progress(), _Waits(iter(()))
        views, channels = self.evaluator.views, self.evaluator.split.train.channels
        self.norm = views.normalization(channels) if isinstance(views, Views) else None
        self.steps_per_epoch = loader.steps_per_epoch
        self.total = cfg.epochs * self.steps_per_epoch
        self.asked_to_stop, self.saved_step = False, 0
        self.taken_up = False  # from a checkpoint
        self.readers, self.items_begun = loader.new_readers(), 0
        self.saved_at, self.save_after = time.monotonic(), False
        self.stalled, self.warm = "", False  # why no data come; a step is done in this process
        self.bad: list[tuple[str, str]] = []  # unreadable images not yet logged
        torch.manual_seed((cfg.seed << 20) + distributed.rank())  # each rank its own dropout

    def go(self, command: str) -> dict[str, Any]:
        self.resume()
        self.warn()
        if not self.taken_up:
            self.evaluator.pictures_before(self.directory)
            self.evaluate(self.progress.step)
            if self.cfg.engine.spike_back:  # its first steps may be gone back from
                self.save(best=False, begun=False)
        self.watch.begin(self.total, self.progress.step)
        try:
            with _Signals(self), heart.watched(self.cfg.engine.watchdog):
                try:
                    self.train()
                except KeyboardInterrupt:
                    if self.checkpoints.writing():
                        self.watch.say("a checkpoint is being written: once more leaves it")
                    raise
                finally:
                    heart.at(SAVING, self.progress.step)
                    self.checkpoints.wait()
        except OSError as error:  # of TensorBoard, which opens its file anew each time
            if self.directory.is_dir():
                raise
            raise LogError(f"{self.directory} has gone while the run went on: {error}") from error
        finally:
            self.watch.end()
        return self.finish(command)

    def train(self) -> None:
        """The loop.  Steps are timed from report to report, as the device runs behind the host."""
        engine = self.engine
        self.pass_over()
        images, since = 0, time.perf_counter()
        batches = self.waits = _Waits(self.stream())
        first = distributed.rank() == 0
        trace = self.directory / "trace.json" if self.cfg.log.profile and first else None
        for batch in traced(self.agreed(batches), trace):
            state = self.progress
            lr = self.cfg.optim.lr * self.cfg.optim.schedule.factor(state.step, self.total)
            at = state.step / self.total
            self.bad += batch.pop("bad")
            batch = self.without_padding(batch)
            batch = apply_batch_ops(self.cfg.data.batch_ops, batch, at, self.norm, engine.device)
            done = (state.step + 1) / self.total
            step = self.step(batch, lr, done)
            state.step += 1
            self.place.begin()
            images += count_rows(batch) * distributed.world_size()
            if step.finite and not step.spike:
                state.skipped_in_row = 0
                state.applied.add(step, self.cfg.engine)
            elif self.refuse(batch, self.spike(step) if step.spike else ""):
                if step.stop:
                    raise self.interrupted()
                images, since, batches.seconds = 0, time.perf_counter(), 0.0
                continue
            ends_epoch = state.step % self.steps_per_epoch == 0
            row = None
            if state.step % self.cfg.log.every == 0 or ends_epoch or step.stop:
                row = self.report(step, lr, images, since)
                self.log_bad()
            self.watch.advance(state.step, row)
            with heart.paused():
                self.after(ends_epoch, step.stop)
                passed = self.pass_over()
            if passed:
                batches.follow(self.stream())
            if row is not None or passed:
                images, since, batches.seconds = 0, time.perf_counter(), 0.0

    def stream(self) -> Iterator[dict[str, Any]]:
        """The batches from where the run stands to the next steps that are left out."""
        start = self.progress.step
        end = goes_until(start, self.total, self.progress.left_out)
        return self.loader.stream(start, end, self.should_stop, self.readers)

    def pass_over(self) -> bool:
        """Count the next steps where they are left out, and do what is due after them."""
        state, passed = self.progress, False
        while state.step < self.total and is_left_out(state.step + 1, state.left_out):
            state.step, state.skipped, passed = state.step + 1, state.skipped + 1, True
            self.watch.advance(state.step, None)
            self.after(state.step % self.steps_per_epoch == 0, stop=False)
        return passed

    def step(self, batch: dict[str, Any], lr: float, done: float) -> Step:
        """One step of the engine; in a run's first one what fails is told in a sentence."""
        try:
            epoch, stop = self.progress.step / self.steps_per_epoch, self.asked_to_stop
            with nullcontext() if self.warm else heart.paused():  # what it compiles takes its time
                limits = self.progress.applied.limits(self.cfg.engine)
                rest: dict[str, Any] = {"progress": done, "epoch": epoch, "stop": stop}
                step = self.engine.step(batch, lr, **rest, limits=limits)
            self.warm = True
            return step
        except Exception as error:
            if self.progress.step or hasattr(error, "exit_code"):
                raise
            name, said = type(self.engine.method).__name__, str(error).strip().splitlines()
            what = f"{type(error).__name__}: {said[0]}" if said else type(error).__name__
            raise FirstStepError(f"{name} fails in the run's first step: {what}") from error

    def agreed(self, batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The batches, until some rank has none, as it was asked to stop or its data do not come:
        then all save and leave."""
        while self.progress.step < self.total:
            heart.at(DATA, self.progress.step + 1)
            batch = next(batches, None)
            heart.at(STEP, self.progress.step + 1)
            ready = SAVE if self.time_to_save() else GO
            vote = self.engine.agree(LEAVE if batch is None else ready)
            if vote == LEAVE:
                raise self.leave()
            assert batch is not None
            self.save_after = vote == SAVE
            yield batch
        next(batches, None)  # the stream ends, and its workers with it

    def time_to_save(self) -> bool:
        """Whether checkpoint.every_minutes are over: the first rank says so, after this step."""
        minutes = self.cfg.checkpoint.every_minutes
        late = time.monotonic() - self.saved_at > 60 * minutes
        return minutes > 0 and late and distributed.rank() == 0

    def should_stop(self) -> bool:
        """Asked while a batch is waited for: whether to leave without it."""
        if self.readers.count() != self.items_begun:
            self.items_begun = self.readers.count()
            heart.beat()
        if heart.starved() and not self.stalled:
            name = self.loader.source.name
            at = [f"process {p} hangs in item {i} ({name(i)})" for p, i in self.readers.busy()]
            who = f"rank {distributed.rank()} on {socket.gethostname()}"
            self.stalled = (
                f"{who} has waited {heart.limit:g} s for a batch (engine.watchdog): "
                f"{'; '.join(at) or 'no reader is at an item'}"
            )
            self.readers.show()
        return self.asked_to_stop or heart.asked_to_stop or bool(self.stalled)

    def leave(self) -> Exception:
        """Save the last finished step, as all ranks can; what to raise then."""
        stalled = [rank for rank in distributed.gather_objects(self.stalled) if rank]
        heart.at(SAVING, self.progress.step)
        with nullcontext() if stalled else heart.paused():
            self.save(best=False)
        return Stalled(f"{'; '.join(stalled)}; {self.stopped()}") if stalled else self.interrupted()

    def without_padding(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The samples of a batch that are there to be trained on, as many on every rank."""
        if batch.pop("padding", None) is None:
            return batch
        rows = self.loader.even_rows(self.progress.step)
        return map_leaves(lambda leaf: leaf[:rows], batch)

    def report(self, step: Step, lr: float, images: int, since: float) -> dict[str, Any]:
        """Averages over ranks of the step's metrics, logged; the only wait for the device."""
        state = self.progress
        names = sorted(step.metrics)
        values = torch.stack([step.metrics[name].float().reshape(()) for name in names])
        values = torch.cat([values, values.new_tensor([self.waits.seconds])])
        *values, waited = (distributed.all_reduce_sum(values) / distributed.world_size()).tolist()
        seconds = time.perf_counter() - since
        state.waited += waited
        state.images, state.seconds = state.images + images, state.seconds + seconds
        metrics = dict(zip(names, values, strict=True))
        state.last = finite(metrics)
        if math.isfinite(metrics["loss"]) and not step.spike:
            state.epoch_losses.append(metrics["loss"])
        row = {**metrics, "lr": lr, "images_per_s": images / seconds}
        row["data_wait"] = min(waited / seconds, 1.0)
        steps = round(images / self.cfg.batch_size) or 1
        if parts := self.engine.breakdown():
            parts = {"data": waited, **parts}
            row |= {f"time/{name}": round(1e3 * spent / steps, 3) for name, spent in parts.items()}
        epoch = state.step / self.steps_per_epoch
        self.scalars.write({f"train/{k}": v for k, v in row.items()}, state.step)
        row = self.log.row("train", state.step, epoch=round(epoch, 4), **row)
        for said in state.collapse.read(row, state.step, self.total):
            self.log.event(state.step, "collapse", said)
        return row

    def after(self, ends_epoch: bool, stop: bool) -> None:
        """Evaluate and save where they are due; leave when asked to."""
        state, cfg = self.progress, self.cfg
        epoch, last = state.step // self.steps_per_epoch, state.step == self.total
        metrics: dict[str, float] = {}
        if ends_epoch and state.epoch_losses:
            metrics["loss"] = fmean(state.epoch_losses)
            state.epoch_losses = []
        if ends_epoch and (last or _due(epoch, cfg.evaluate.every)):
            metrics |= self.evaluate(state.step)
        best = self.improves(metrics)
        due = ends_epoch and (last or _due(epoch, cfg.checkpoint.every))
        due = due or self.save_after or _due(state.step, cfg.checkpoint.every_steps)
        if stop or due or best:
            self.save(best=best)
        if stop and not last:
            raise self.interrupted()

    def save(self, *, best: bool, begun: bool = True) -> None:
        """Write a checkpoint of the last finished step, unless there is one; the log before it.

        begun: false to write one of a run without any.
        """
        step = self.progress.step
        self.log_bad()
        self.log.sync(step)
        if best or step > self.saved_step or not begun:
            known = {**asdict(self.progress), "channels": self.split.train.channels}
            self.checkpoints.save(self.engine, step, known, best=best)
            self.saved_step, self.saved_at = step, time.monotonic()

    def interrupted(self) -> Interrupted:
        code = " (torchrun itself ends with code 1)" if "TORCHELASTIC_RUN_ID" in os.environ else ""
        return Interrupted(self.stopped() + code)

    def stopped(self) -> str:
        step, folder = self.progress.step, self.checkpoints.folder
        saved = f"the state is saved in {folder}: resume=auto continues" if step else "nothing done"
        return f"stopped at step {step} of {self.total}; {saved}"

    def log_bad(self) -> None:
        self.log.bad_images(self.progress.step, self.bad)
        self.bad = []

    def improves(self, metrics: dict[str, float]) -> bool:
        """Whether this is the best state so far, by checkpoint.best, where that was measured."""
        name = self.cfg.checkpoint.best
        if name not in metrics or not math.isfinite(metrics[name]):
            return False
        value = -metrics[name] if name == "loss" else metrics[name]
        if self.progress.best is not None and value <= self.progress.best:
            return False
        self.progress.best = value
        return True

    def evaluate(self, step: int) -> dict[str, float]:
        metrics = self.evaluator.metrics()
        self.log.bad_images(step, self.evaluator.bad)
        epoch = round(step / self.steps_per_epoch, 4)
        row = self.log.row("eval", step, epoch=epoch, **metrics)
        self.scalars.write({f"eval/{k}": v for k, v in metrics.items()}, step)
        for said in self.progress.collapse.evaluated(row) if step else []:
            self.log.event(step, "collapse", said)
        return metrics

    def spike(self, step: Step) -> str:
        """Which step was out of line with those before it, and how far."""
        limits = self.progress.applied.limits(self.cfg.engine)
        assert limits is not None and step.loss is not None
        what, was, limit, key = "loss", step.loss, limits.loss, "spike"
        if step.norm is not None:
            what, was, limit, key = "gradient's norm", step.norm, limits.norm, "spike_norm"
        where = f"at step {self.progress.step} is above {limit:.4g} (engine.{key})"
        return f"the {what} {was:.4g} {where}"

    def refuse(self, batch: dict[str, Any], spike: str = "") -> bool:
        """A step that was not finite, or a spike: skip it by leave of the configuration, or end
        the run.  Whether the run has gone back, to leave out more steps."""
        state, cfg = self.progress, self.cfg.engine
        indices = [i for part in distributed.gather_objects(batch["index"].tolist()) for i in part]
        where = spike or f"the loss or a gradient was not finite at step {state.step}"
        some = f"images {indices[:16]}"
        if len(indices) > 16:
            some += f" and {len(indices) - 16} more, all in metrics.jsonl"
        most, returns = min(cfg.max_skipped, self.total), 0
        if spike and cfg.spike_back:
            stretches = [*state.left_out, stretch_of(state.step, cfg.spike_back)]
            returns = in_a_row(stretches)
            if returns < most and self.go_back(stretches, f"{where}; {some}", indices):
                return True
        what = "spike" if spike else "nonfinite"
        self.log.row("event", state.step, what=what, detail=where, images=indices)
        if spike or cfg.on_nonfinite == "skip":
            state.skipped, state.skipped_in_row = state.skipped + 1, state.skipped_in_row + 1
            self.watch.say(f"{where}: step skipped ({some})")
            if max(state.skipped_in_row, returns) < most:
                return False
            many = f"{returns} stretches" if returns >= most else f"{state.skipped_in_row} steps"
            where += f", as in {many} in a row (engine.max_skipped)"
        self.checkpoints.wait()
        last = self.checkpoints.latest()
        good = self.checkpoints.folder / last if last else "none yet"
        raise NonFinite(f"{where}; {some}; last good checkpoint: {good}")

    def go_back(self, stretches: list[Stretch], why: str, images: list[int]) -> bool:
        """Take up the newest checkpoint before the last of the stretches, and leave all of them
        out; false, and nothing done, where there is none."""
        first, last = stretches[-1]
        with heart.paused():
            self.checkpoints.wait()
            notes: list[str] = []
            saved = self.checkpoints.load(
                self.engine, notes, _parsed, seed=self.cfg.seed, until=first - 1
            )
            if saved is None:
                self.watch.say(f"no checkpoint before step {first} to go back to (spike_back)")
                return False
            self.checkpoints.forget(saved.step)
            self.bad, self.save_after = [], False
            self.take_up(saved, notes)
            self.progress.left_out = stretches
            said = f"{why}: gone back to step {saved.step}, steps {first} to {last} are left out"
            self.log.row("event", saved.step, what="returned", detail=said, images=images)
            self.watch.say(said)
            self.pass_over()
            self.waits.follow(self.stream())
        return True

    def warn(self) -> None:
        """Say what a user might not expect of this configuration."""
        cfg, method = self.cfg, self.cfg.method.name
        parts = cfg.engine.accumulation
        plain = self.cfg.engine.large_batch == "plain"
        if plain and parts > 1 and self.engine.method.couples_batch:
            self.watch.say(
                f"engine.large_batch=plain: {method} compares or mixes images of one "
                f"micro-batch ({cfg.batch_size // parts}) only, so this is not a batch of "
                f"{cfg.batch_size}"
            )
        for note in [*self.engine.notes, *cfg.notes()]:
            self.watch.say(note)

    def finish(self, command: str) -> dict[str, Any]:
        """Evaluate at the end if the loop did not, and write what the run shows for itself."""
        rows = distributed.from_first(self.log.rows)
        evals = {row["step"]: row for row in rows if row["kind"] == "eval"}
        trained = evals.get(self.total)
        if trained is None or self.evaluator.test is None:
            trained = self.evaluator.metrics()
        encoders = {"pretrained": trained}
        if 0 in evals:  # a log that was deleted is no reason to fail
            encoders["random initialization"] = evals[0]
        results = summarize(
            self.cfg,
            encoders | {"raw input": self.evaluator.raw_metrics()},
            vars(self.progress),
            items=f"{self.evaluator.views.kind}s",
            parameters=count_parameters(self.engine.method),
            bad_images=len(self.log.bad),
            command=command,
        )
        write_summary(self.directory, results, self.evaluator.pictures_after)
        return results

    def resume(self) -> None:
        """Take up the newest intact checkpoint, if the configuration says so and there is one."""
        if self.cfg.resume == "never":
            return
        notes: list[str] = []
        saved = self.checkpoints.load(self.engine, notes, _parsed, seed=self.cfg.seed)
        if saved is None and notes and self.cfg.begins_from_weights():
            raise CheckpointError(
                f"no checkpoint in {self.checkpoints.folder} is intact ({notes[0]}), and the model "
                "was built to take one up, without model.weights: resume=auto begins anew with them"
            )
        if saved is None:
            self.log.cut(-1)  # of a run that died before its first checkpoint
            for note in notes:
                self.log.event(0, "damaged", note)
            return
        if saved.step > self.total:
            raise ConfigError(
                f"epochs={self.cfg.epochs} is {self.total} steps, and the run is at step "
                f"{saved.step} already: give more epochs"
            )
        self.place.begin()
        self.taken_up = True
        self.take_up(saved, notes)
        said = [f"resumed at step {self.progress.step}", *self.checkpoints.notes]
        self.log.event(self.progress.step, "resumed", ", ".join(said))
        if self.place.before is not None:
            longer = extension(
                self.place.before, self.cfg, self.progress.step, self.steps_per_epoch
            )
            if longer:
                self.log.event(self.progress.step, "extended", longer)

    def take_up(self, saved: Progress, notes: list[str]) -> None:
        """Stand where a checkpoint does."""
        self.progress, self.saved_step = saved, saved.step
        if not distributed.from_first(self.checkpoints.has_best):
            saved.best = None
        self.log.cut(saved.step)
        for note in notes:
            self.log.event(saved.step, "damaged", note)


_parsed = TypeAdapter(Progress).validate_python


class _Waits:
    """Batches, and how many seconds the loop waited for them since `seconds` was last set."""

    def __init__(self, batches: Iterator[dict[str, Any]]):
        self.batches, self.seconds = batches, 0.0

    def __iter__(self) -> "_Waits":
        return self

    def follow(self, batches: Iterator[dict[str, Any]]) -> None:
        """Go on with other ones: the readers of those before end."""
        self.batches = batches

    def __next__(self) -> dict[str, Any]:
        since = time.perf_counter()
        try:
            return next(self.batches)
        finally:
            self.seconds += time.perf_counter() - since


class _Signals:
    """While training, these signals and the first Ctrl-C end the step, save, and leave.

    SIGHUP that is ignored, as by nohup, stays so.  In a thread other than the main one, which gets
    no signals, this does nothing.
    """

    def __init__(self, run: Run):
        self.run, self.before = run, {}

    def __enter__(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self.before[number] = signal.signal(number, self.ask)

    def ask(self, number: int, frame: object) -> None:
        self.run.asked_to_stop = heart.asked_to_stop = True
        signal.signal(signal.SIGINT, self.before[signal.SIGINT])

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def _due(count: int, every: int) -> bool:
    return every > 0 and count % every == 0
