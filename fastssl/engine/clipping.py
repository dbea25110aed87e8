"""Which gradients reach the optimizer, and how large: frozen groups, and clips of several kinds.

    s_p <- min(1, clip_each / |g_p|)               each parameter p by itself
    s_p <- s_p min(1, clip / |s g|)                |.| over all parameters whose rule has this clip
    s_p <- s_p min(1, optim.clip / |s g|)          |.| over all parameters

g: gradients averaged over ranks and micro-batches, whole, whatever ZeRO makes of them.  A group
that is frozen counts in no norm, and is not stepped at all: neither weight decay nor a moment
moves, and its state is as on the first step when it thaws (DINO's `grad = None`).  That holds at
every stage, since it is the optimizer that leaves the group out.

ZeRO 1 to 3 hand the optimizer one flat float32 tensor after another, cut anywhere, when it is too
late for a norm over several.  So `measure` takes the norms of the averaged pieces before
DeepSpeed's step, with one all-reduce for all parameters, and a hook in front of each of the
optimizer's steps multiplies what that is given.  At stage 0 the hook does both.  Nothing waits for
the device.  DeepSpeed's own clipping is off.
"""

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from .config import EngineConfig, offloads_optimizer
from .fragments import averaged, locate, slices
from .groups import own_rules
from .optim import OptimConfig

EPS = 1e-6  # as torch's clip_grad_norm_ adds to a norm


def restrains(cfg: OptimConfig) -> bool:
    """Whether anything here is asked for: else DeepSpeed clips."""
    return cfg.clip_each > 0 or any(rule.clip or rule.freeze_epochs for rule in cfg.groups)


def check_offload(cfg: OptimConfig, engine: EngineConfig) -> None:
    """Raise ValueError where gradients that are to be measured are taken off the device."""
    if restrains(cfg) and offloads_optimizer(engine):
        raise ValueError(
            "optim.clip_each, and optim.groups with clip or freeze_epochs, want gradients on the "
            "device: leave out engine.zero.offload_optimizer"
        )


class Clipping:
    """The clips and frozen groups of `cfg` over a DeepSpeed engine; collective.

    groups: of the optimizer, with the model's parameters, as before DeepSpeed took it.
    norm: of the last step's gradients before they were clipped, those of frozen groups apart.
    """

    def __init__(self, ds_engine: Any, groups: list[dict[str, Any]], cfg: OptimConfig):
        self.ds, self.cfg, device = ds_engine, cfg, ds_engine.device
        ordered = [p for group in groups for p in group["params"]]
        self.lasts = [(group["frozen_for"], len(group["params"])) for group in groups]
        place = {id(p): i for i, p in enumerate(ordered)}
        owns = own_rules(ds_engine.module, cfg.groups)
        self.joint: list[tuple[float, Tensor]] = []
        for number, rule in enumerate(cfg.groups):
            members = [place[key] for key, own in owns.items() if own.clip == number]
            if rule.clip and members:
                self.joint.append((rule.clip, torch.tensor(members, device=device)))
        self.clips = bool(self.joint) or cfg.clip > 0 or cfg.clip_each > 0
        self.whole = ds_engine.zero_optimization_stage() == 0
        optimizer = ds_engine.basic_optimizer
        # Of each tensor of the optimizer: (start, length) and number of every parameter in it.
        self.spans: dict[Tensor, list[tuple[tuple[int, int], int]]] = {}
        if self.whole:
            given = [p for group in optimizer.param_groups for p in group["params"]]
            self.spans = {p: [((0, p.numel()), i)] for i, p in enumerate(given)}
        else:
            for flat, lie in locate(ds_engine, 0).items():
                numbers = [place[id(lie.params[owner])] for owner in lie.owners.tolist()]
                self.spans[flat] = sorted(zip(lie.spans, numbers, strict=True))
                self.process_group = lie.process_group
        self.frozen = torch.zeros(len(ordered), dtype=torch.bool, device=device)
        self.scales = self.norm = torch.ones((), device=device)
        self._numbers: dict[Tensor, Tensor] = {}
        self._given: tuple[list[int], Tensor] = [], self.norm  # at stage 0, and on the device
        self._all: list[dict[str, Any]] = []
        self._now: list[bool] = []
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)

    @property
    def counts(self) -> bool:
        """Whether this step's norm is found here: something may be clipped, or is frozen."""
        return self.clips or any(self._now)

    def begin(self, epoch: float | None) -> None:
        """Before a step: which groups are frozen, `epoch` epochs having been trained.

        Raises ValueError for groups that are frozen for some epochs, and no epoch.
        """
        if epoch is None and any(epochs for epochs, _ in self.lasts):
            raise ValueError("optim.groups have freeze_epochs: step wants the epoch")
        now = [epoch is not None and epoch < epochs for epochs, _ in self.lasts]
        for group, frozen in zip(self.ds.basic_optimizer.param_groups, now, strict=True):
            group["frozen"] = frozen
        if now != self._now:
            each = [now[i] for i, (_, count) in enumerate(self.lasts) for _ in range(count)]
            self.frozen, self._now = torch.tensor(each, device=self.frozen.device), now

    @torch.no_grad()
    def measure(self) -> None:
        """Between the last backward and DeepSpeed's step: what each gradient is multiplied by."""
        if self.whole or not self.counts:
            return
        squares = torch.zeros(self.frozen.shape, device=self.frozen.device)
        for (flat, spans), parts in zip(self.spans.items(), averaged(self.ds), strict=True):
            pieces = list(slices(parts, [span for span, _ in spans]))
            if pieces:
                if flat not in self._numbers:
                    numbers = [spans[number][1] for number, _ in pieces]
                    self._numbers[flat] = torch.tensor(numbers, device=squares.device)
                norms = torch._foreach_norm([piece for _, piece in pieces], dtype=torch.float32)
                squares.index_add_(0, self._numbers[flat], torch.stack(norms).square())
        if dist.get_world_size(self.process_group) > 1:
            dist.all_reduce(squares, group=self.process_group)
        self._settle(squares.sqrt())

    def _settle(self, norms: Tensor) -> None:
        norms = norms.masked_fill(self.frozen, 0.0)
        self.norm, scales = norms.norm(), torch.ones_like(norms)
        if self.cfg.clip_each > 0:
            scales = _factor(norms, self.cfg.clip_each)
        for clip, members in self.joint:
            theirs = scales[members]
            scales[members] = theirs * _factor((norms[members] * theirs).norm(), clip)
        if self.cfg.clip > 0:
            scales = scales * _factor((norms * scales).norm(), self.cfg.clip)
        self.scales = scales

    @torch.no_grad()
    def _before_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """Leave out frozen groups, and clip the gradients of the others."""
        self._all = optimizer.param_groups
        optimizer.param_groups = [group for group in self._all if not group["frozen"]]
        params = [p for group in optimizer.param_groups for p in group["params"]]
        params = [p for p in params if p.grad is not None]
        if not self.counts:
            return
        if self.whole:
            norms = torch.zeros(self.frozen.shape, device=self.frozen.device)
            if params:
                given = [self.spans[p][0][1] for p in params]
                if given != self._given[0]:  # a copy to the device would wait for it
                    self._given = given, torch.tensor(given, device=norms.device)
                found = torch._foreach_norm([p.grad for p in params], dtype=torch.float32)
                norms = norms.index_copy(0, self._given[1], torch.stack(found))
            self._settle(norms)
        pieces, numbers = [], []
        for p in params:
            flat = p.grad.view(-1) if not self.whole else p.grad
            for (start, length), number in self.spans[p]:
                pieces.append(flat if self.whole else flat.narrow(0, start, length))
                numbers.append(number)
        if pieces:
            scales = self.scales.unbind()
            torch._foreach_mul_(pieces, [scales[number] for number in numbers])

    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        optimizer.param_groups = self._all


def _factor(norm: Tensor, clip: float) -> Tensor:
    """What brings a norm down to `clip`; 1 where it is below."""
    return (clip / (norm + EPS)).clamp(max=1.0)
