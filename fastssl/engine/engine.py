"""The training engine: a method under DeepSpeed ZeRO, on CPU (gloo) or CUDA (nccl) alike.

It knows a method by what it is asked for, (batch) -> {"loss": ...} and on_step, and a batch as a
tree of rows; nothing of what a method does, and no key.  The learning rate is set from outside at
each step; gradients are averaged over ranks and micro-batches; a step whose loss or gradient is not
finite is never applied, at any stage, and leaves no trace in the method.
"""

import difflib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from fastssl import distributed, pieces
from fastssl.models import (
    Buffers,
    average_running_statistics,
    frozen_as,
    synchronize_batch_norms,
    widen_batch_norms,
)
from fastssl.models.deferred import Deferred
from fastssl.tree import count_rows, cut, join, map_leaves

from .blocks import blocks_of, compile_blocks, convolve_channels_last, fetched_as_one, recompute
from .breakdown import Breakdown
from .clipping import Clipping, restrains
from .config import EngineConfig, EngineError, fetches_blocks, offloads_optimizer
from .fragments import ZeroPieces, forget_order
from .large_batch import LargeBatch, check_batch_norms, check_deepspeed, is_exact
from .launch import deepspeed
from .materialize import materialize, trim
from .norms import norm_limited
from .optim import OptimConfig, after_initialize, build_optimizer, implementation_of
from .scalars import MONITORS
from .states import EncoderFile, States, check_offloaded
from .verbs import Limits, Step, Verbs
from .watchdog import heart
from .zero import deepspeed_keys, runtime_problem

_Done = tuple[dict[str, Tensor], Any, "torch.cuda.Event | None"]  # metrics, "keep", flags sent
NEVER = 2**62  # DeepSpeed's own progress lines: ours are better


class Engine(Verbs):
    """`method` on `device` under ZeRO `cfg.zero_stage`, stepped by `optim`.

    batch_size: images in an optimizer step over all ranks and micro-batches.
    deferred: what makes the tensors of a method that was built without memory.
    Raises EngineError when the batch does not divide among ranks and micro-batches, for batch
    norms that would take micro-batches for batches, for activation checkpointing of an encoder
    without it, and for what DeepSpeed refuses.
    """

    def __init__(
        self,
        method: nn.Module,
        optim: OptimConfig,
        cfg: EngineConfig,
        *,
        device: torch.device,
        batch_size: int,
        deferred: Deferred | None = None,
    ):
        self.cfg, self.optim, self.device = cfg, optim, device
        shares = distributed.world_size() * cfg.accumulation
        self._exact = is_exact(method, cfg)
        # Whole gradients until a step's end, as stage 1 has them anyway.
        held = cfg.reduce_once or cfg.zero_stage == 1
        self._held = self._exact and cfg.zero_stage > 0 and held
        if batch_size % shares:
            raise EngineError(
                f"batch_size={batch_size} does not divide into {distributed.world_size()} ranks x "
                f"engine.accumulation={cfg.accumulation}"
            )
        check_batch_norms(method, cfg, batch_size)
        if self._exact:
            check_deepspeed(cfg)
        for name, parameter in method.named_parameters() if cfg.zero_stage == 3 else ():
            if parameter.ndim == 0:
                raise EngineError(
                    f"engine.zero_stage=3 cannot cut {name}, a parameter without dimensions: give "
                    "it the shape (1,), or take stage 2"
                )
        check_offloaded(cfg)
        if problem := runtime_problem(cfg.zero, device, distributed.world_size()):
            raise EngineError(problem)
        self.notes: list[str] = []
        if distributed.world_size() > 1:
            self._join_batch_norms(method, batch_size // shares)
        if cfg.precision == "bf16":
            widen_batch_norms(method)
        set_tf32(cfg.tf32, device)
        if cfg.channels_last:
            convolve_channels_last(method)
        if cfg.compile:
            self.notes.append(f"engine.compile: {compile_blocks(method)} blocks, each by itself")
        recompute(method, cfg)
        self._parameters = list(method.parameters())  # to walk through a model takes its time
        # Nothing in DeepSpeed looks at these gradients before they are applied.
        self._plain = cfg.zero_stage == 0 and cfg.precision == "fp32"
        leaves = blocks_of(method) if fetches_blocks(cfg) else []
        try:
            optimizer = build_optimizer(
                method, optim, device=device, offloaded=offloads_optimizer(cfg)
            )
            self.notes.append(f"optimizer: {implementation_of(optimizer)}")
            groups = [{**group, "params": [*group["params"]]} for group in optimizer.param_groups]
            clip = 0.0 if restrains(optim) or self._plain else optim.clip
            config = self._deepspeed_config(clip, batch_size)
            if deferred is not None:
                dtype = torch.bfloat16 if cfg.precision == "bf16" else torch.float32
                zero = config if cfg.zero_stage == 3 else None
                materialize(method, deferred, device, dtype, zero)
            with fetched_as_one(leaves):
                self.ds, *_ = deepspeed().initialize(
                    model=method, optimizer=optimizer, config=config, dist_init_required=False
                )
            if deferred is not None:
                trim()  # pieces, which DeepSpeed has joined
        except ValidationError as error:
            raise EngineError(_refusal(error)) from error
        except (AssertionError, ValueError, TypeError, KeyError) as error:
            raise EngineError(f"DeepSpeed or the optimizer refuses this: {error}") from error
        if cfg.zero_stage == 0 and hasattr(self.ds.optimizer, "fp32_groups_flat"):
            raise EngineError(
                f"optim.implementation={optim.implementation} at engine.zero_stage=0 with "
                "engine.precision=bf16 has DeepSpeed join parameters where no checkpoint finds "
                "them: take engine.zero_stage=1, or optim.implementation=torch"
            )
        after_initialize(self.ds)
        self.clipping = Clipping(self.ds, groups, optim) if restrains(optim) else None
        pieces.cut_by(ZeroPieces())
        self._states = States(self.ds)
        self._states.check()
        self._times: Breakdown | None = None
        self._flags = torch.empty(4, pin_memory=device.type == "cuda")
        self._limits: Limits | None = None  # of the step under way

    def close(self) -> None:
        """Autograd holds DeepSpeed's hooks, and they all that there is: else it stays for ever.

        At stage 3 it does: there a module that was given is whole by these hooks alone.
        """
        if self.cfg.zero_stage < 3:
            self.ds.destroy()

    def measure(self) -> None:
        if self._times is None:
            self._times = Breakdown(self.method, self.ds, self.device)

    def breakdown(self) -> dict[str, float]:
        return {} if self._times is None else self._times.read()

    @property
    def method(self) -> Any:
        return self.ds.module

    def step(
        self,
        batch: dict[str, Any],
        lr: float,
        *,
        progress: float = 0.0,
        epoch: float | None = None,
        stop: bool = False,
        limits: Limits | None = None,
    ) -> Step:
        self._limits = limits
        if self._times is None:
            return self._step(batch, lr, progress, epoch, stop)
        self._times.begin()
        with self._times.part("other"):
            return self._step(batch, lr, progress, epoch, stop)

    def _step(
        self, batch: dict[str, Any], lr: float, progress: float, epoch: float | None, stop: bool
    ) -> Step:
        self.optim.set_rates(self.ds.optimizer.param_groups, lr, progress)
        if self.clipping is not None:
            self.clipping.begin(epoch)
        if not self.method.training:
            self.method.train()
        undo = self.cfg.on_nonfinite == "skip" or self._limits is not None
        before = Buffers(self.method) if undo else None
        backward = self._backward_whole if self._exact else self._backward_each
        sums, kept, event = backward(batch, stop)
        step = self._finish(sums, event)
        if step.applied:
            average_running_statistics(self.method)
            self.method.on_step(kept, progress)
        elif before is not None:
            before.restore()
        return step

    def _backward_each(self, batch: dict[str, Any], stop: bool) -> _Done:
        """The gradient of the mean of the micro-batches' losses."""
        finite = torch.ones((), device=self.device, dtype=torch.bool)
        mean: Any = 0.0  # of the losses, under limits
        sums: dict[str, Tensor] = {}
        kept: list[Any] = []
        event = None
        prepared = self.method.prepares and not self.method.couples_batch
        if prepared:
            batch = self.method.prepare(self._move(batch))
        sizes = self._sizes(batch)
        for i, (size, micro) in enumerate(zip(sizes, cut(batch, sizes), strict=True)):
            out = self.ds(self._move(micro), "prepared" if prepared else "all")
            loss, share = loss_of(self.method, out), size / sum(sizes)
            if "keep" in out:
                kept.append(map_leaves(Tensor.detach, out.pop("keep")))
            finite = finite & torch.isfinite(loss.detach())
            if self._limits is not None:
                mean = mean + loss.detach().float() * share
            heart.beat()
            last = i == len(sizes) - 1
            if last:
                finite, event = self._agree(finite, stop, mean)
            # A loss of infinity may have finite gradients: make sure that the step is refused.
            weight = torch.where(finite, share * self.cfg.accumulation, float("nan"))
            self.ds.backward(loss * weight)
            heart.beat()
            for key, value in out.items():
                part = value.detach().float() * share
                sums[key] = sums[key] + part if key in sums else part
            if not last:
                self.ds.step()
        return sums, join(kept) if kept else None, event

    def _backward_whole(self, batch: dict[str, Any], stop: bool) -> _Done:
        """The gradient of the loss over the whole batch: see LargeBatch."""
        large = LargeBatch(self.ds, batch, self._sizes(batch), self._move, self.device)
        out = large.compare()
        loss, kept = loss_of(self.method, out), out.pop("keep", None)
        finite = torch.isfinite(loss.detach())
        finite, event = self._agree(finite, stop, loss.detach().float())
        scale = self.ds.gradient_accumulation_steps()  # DeepSpeed divides by it
        for _ in range(scale - 1 - large.replays):  # backward passes that there will not be
            self.ds.step()
        with self.ds.coalesce_grad_reduction() if self._held else nullcontext():
            self.ds.backward(loss * torch.where(finite, scale, float("nan")))
            for part in large.replay():
                if not self._held:
                    self.ds.step()
                self.ds.backward(part * scale)
                heart.beat()
        sums = {key: value.detach().float() for key, value in out.items()}
        return sums, None if kept is None else map_leaves(Tensor.detach, kept), event

    def features(self, images: Tensor) -> Tensor:
        self.method.eval()
        forget_order(self.ds)
        with torch.no_grad():
            return self.method.features(images.to(self.device, non_blocking=True))

    def reconstruct(self, images: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor]:
        self.method.eval()
        forget_order(self.ds)
        blocks = {id(p) for block in blocks_of(self.method) for p in block.parameters()}
        others = [p for p in self.method.parameters() if id(p) not in blocks]
        with torch.no_grad(), self._whole_ones(others):  # ZeRO-3 gathers blocks one by one
            return self.method.reconstruct(images.to(self.device), seeds.to(self.device))

    def snapshot(self, *, copied: bool) -> Callable[[Path], None]:
        return self._states.snapshot(copied=copied)

    def load(self, folder: Path) -> None:
        self._states.read(folder)

    def whole_parameters(self) -> AbstractContextManager[Any]:
        return self._whole_ones([*self.method.parameters()])

    def _whole_ones(self, parameters: list[nn.Parameter]) -> AbstractContextManager[Any]:
        cut = self.cfg.zero_stage == 3
        return deepspeed().zero.GatheredParameters(parameters, enabled=cut)

    def encoder_reader(self, name: str = "") -> Callable[[Path], EncoderFile]:
        return self._states.reader_of(self._network(name))

    def _network(self, name: str) -> nn.Module:
        networks = self.method.networks()
        return networks[name or next(iter(networks))]

    def _join_batch_norms(self, method: nn.Module, micro: int) -> None:
        W = distributed.world_size()
        if self.cfg.sync_batchnorm:
            if count := synchronize_batch_norms(method):
                self.notes.append(f"{count} batch norms share their statistics over {W} processes")
            return
        networks = method.networks().values()  # type: ignore[operator]
        moving = [network for network in networks if frozen_as(network) is None]
        names = [name for network in moving for name, _ in network.named_buffers()]
        if any(name.endswith("running_mean") for name in names):
            if micro < 2:
                raise EngineError(
                    "engine.sync_batchnorm=false, but a process has micro-batches of one image to "
                    "normalize: give a larger batch_size, or engine.sync_batchnorm=true"
                )
            self.notes.append(
                f"engine.sync_batchnorm=false: each of {W} processes normalizes with the "
                "statistics of its own images; the running ones are averaged"
            )

    def _deepspeed_config(self, clip: float, batch_size: int) -> dict[str, Any]:
        parts = 1 if self._held else self.cfg.accumulation
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": batch_size // (distributed.world_size() * parts),
            "gradient_accumulation_steps": parts,
            "gradient_clipping": clip,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": self.cfg.precision == "bf16"},
            "steps_per_print": NEVER,
        }
        trained = sum(p.numel() for p in self._parameters if p.requires_grad)
        where = {"cuda": self.device.type == "cuda", "world": distributed.world_size()}
        stage = self.cfg.zero_stage
        keys = deepspeed_keys(self.cfg.zero, stage, trained, parts=parts, **where)
        given = {k: v for k, v in self.cfg.deepspeed.items() if k not in MONITORS}
        return _merge(_merge(config, keys), given)

    def _sizes(self, batch: dict[str, Any]) -> list[int]:
        """The rows of `accumulation` micro-batches: equal, or one row apart."""
        n, rows = self.cfg.accumulation, count_rows(batch)
        if rows < n:
            raise ValueError(f"a batch of {rows} rows does not cut into engine.accumulation={n}")
        return [rows // n + (i < rows % n) for i in range(n)]

    def _move(self, tree: Any) -> Any:
        return map_leaves(lambda leaf: leaf.to(self.device, non_blocking=True), tree)

    def _agree(
        self, finite: Tensor, stop: bool, loss: Any
    ) -> "tuple[Tensor, torch.cuda.Event | None]":
        """Send [any rank not finite, any rank to stop] to the host, without waiting for it; under
        limits [the mean loss, whether that is above its limit] as well.

        Returns whether this rank's step may be applied, as far as is known.
        """
        bad = (~finite).float()
        flags = torch.stack([bad, torch.full_like(bad, float(stop))])
        if self._limits is not None:
            flags = torch.cat([flags, (loss / distributed.world_size()).reshape(1)])
        if distributed.world_size() > 1:
            torch.distributed.all_reduce(flags)
        if self._limits is not None:
            spike = flags[2] > self._limits.loss
            finite, flags = finite & ~spike, torch.cat([flags, spike.float().reshape(1)])
        self._flags[: len(flags)].copy_(flags, non_blocking=True)
        if self.device.type != "cuda":
            return finite, None
        event = torch.cuda.Event()
        event.record()
        return finite, event

    def _finish(self, metrics: dict[str, Tensor], event: "torch.cuda.Event | None") -> Step:
        """Apply the step unless something is not finite, or above its limit.

        The host waits for the forward pass, whose answer is under way, and for the gradients' norm:
        here at stage 0 in float32, elsewhere in DeepSpeed's step.
        """
        if event is not None:
            event.synchronize()
        bad, stop, loss, above = self._flags.tolist()
        finite = bad == 0
        step = Step(metrics, applied=False, finite=finite, stop=stop > 0)
        limits = self._limits
        if limits is not None:
            step.loss, step.spike = loss, finite and above > 0
        if self._plain:
            trained = [p for p in self._parameters if p.grad is not None]
            norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
            metrics["grad_norm"] = norm
            if limits is not None and not step.spike:
                step.norm = float(norm)
                step.spike = limits.norm < step.norm < float("inf")
            if not step.spike:
                step.finite = finite and bool(torch.isfinite(norm))
            if step.spike or not step.finite:
                self.ds.zero_grad()
                self.ds.micro_steps += 1
                self.ds.skipped_steps += 1
                return step
            if self.clipping is None and self.optim.clip > 0:
                torch.nn.utils.clip_grads_with_norm_(trained, self.optim.clip, norm)
        if self.clipping is not None:
            self.clipping.measure()
        with nullcontext() if limits is None else norm_limited(self.ds, limits.norm) as norms:
            self.ds.step()
        step.applied = bool(self.ds.was_step_applied())
        if norms == [] and step.applied and not self._plain:
            raise EngineError("engine.spike: this engine of DeepSpeed tells no gradient's norm")
        if norms and not step.spike:
            step.norm = norms[-1]
            step.spike = limits is not None and limits.norm < step.norm < float("inf")
        step.finite = finite and (step.applied or step.spike)
        norm = self.ds.get_global_grad_norm()
        if self.clipping is not None and self.clipping.counts and step.applied:
            metrics["grad_norm"] = self.clipping.norm
        elif step.norm is not None:
            metrics["grad_norm"] = torch.full((), step.norm, device=self.device)
        elif norm is not None and "grad_norm" not in metrics:
            known = isinstance(norm, Tensor)  # a number is filled in: a copy would wait
            metrics["grad_norm"] = norm if known else torch.full((), norm, device=self.device)
        return step


def loss_of(method: nn.Module, out: Any) -> Tensor:
    """The loss in what a method's `loss` returned.

    Raises EngineError where there is none to train by, and for an entry that cannot be logged.
    """
    name = f"{type(method).__name__}.loss"
    loss = out.get("loss") if isinstance(out, dict) else None
    if not isinstance(loss, Tensor) or loss.ndim:
        raise EngineError(f"{name} must return {{'loss': a 0-d tensor, ...}}")
    if not loss.requires_grad:
        raise EngineError(f"{name}: its 'loss' depends on no parameter that is trained")
    for key, value in out.items():
        if key != "keep" and (not isinstance(value, Tensor) or value.ndim):
            raise EngineError(f"{name}: {key!r} must be a 0-d tensor, to be logged")
    return loss


def set_tf32(wanted: bool | None, device: torch.device) -> None:
    """Of this process from here on.  Raises EngineError for TF32 without CUDA."""
    if wanted is None:
        return
    if device.type != "cuda":
        raise EngineError(f"engine.tf32={wanted} is for CUDA, and the run is on {device.type}")
    torch.set_float32_matmul_precision("high" if wanted else "highest")
    torch.backends.cudnn.allow_tf32 = wanted


def _refusal(error: ValidationError) -> str:
    """DeepSpeed's refusal of a section of engine.deepspeed, as one sentence."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    close = difflib.get_close_matches(key, DeepSpeedZeroConfig.model_fields, n=1)
    if first["type"] == "extra_forbidden":
        hint = f" (did you mean {close[0]}?)" if close else ""
        return f"engine.deepspeed: {error.title} has no key {key}={first['input']!r}{hint}"
    return f"engine.deepspeed: {error.title} refuses {key}={first['input']!r}: {first['msg']}"


def _merge(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in extra.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged
