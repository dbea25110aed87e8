"""The gradient of a loss over a whole batch, in the memory of one micro-batch's graph.

    encode every micro-batch, keeping no graph but the last one's
    the loss over all rows of all ranks at once: its gradient at the heads, and at those rows
    encode each micro-batch again, as it was drawn, and send its rows' gradient back

Value and gradient are those of the whole batch in one graph, to rounding, whatever the loss does
with the rows.  Of a sample its encoded row is kept, and what the heads keep of it.
Source: Gao et al. 2021, arXiv:2101.06983 (gradient cache).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastssl.models import moving_in
from fastssl.tree import cut, join, leaves, map_leaves

from .config import EngineConfig, EngineError


def is_exact(method: Any, cfg: EngineConfig) -> bool:
    """Whether the loss is taken over the whole batch though micro-batches are encoded."""
    return cfg.accumulation > 1 and cfg.large_batch == "exact" and method.couples_batch


def check_deepspeed(cfg: EngineConfig) -> None:
    """Raise EngineError for what keeps of an exact large batch a part of the gradient only.

    DeepSpeed loses there what it has of parameters that a step's last backward does not reach.
    """
    zero, types = (cfg.deepspeed.get(key, {}) for key in ("zero_optimization", "data_types"))
    named = f"engine.large_batch=exact at engine.zero_stage={cfg.zero_stage}"
    if cfg.zero_stage > 1 and not cfg.reduce_once and "offload_optimizer" in zero:
        raise EngineError(
            f"{named} takes no optimizer that is offloaded "
            "(engine.deepspeed.zero_optimization.offload_optimizer) with engine.reduce_once=false"
        )
    wide = types.get("grad_accum_dtype") in ("fp32", "float32")
    if cfg.zero_stage < 2 and cfg.precision == "bf16" and wide:
        raise EngineError(
            f"{named} takes no engine.deepspeed.data_types.grad_accum_dtype="
            f"{types['grad_accum_dtype']!r}: use engine.zero_stage=2"
        )


def check_batch_norms(method: Any, cfg: EngineConfig, batch_size: int) -> None:
    """Raise EngineError where micro-batches are no batch: an encoder normalizes each by itself."""
    if cfg.accumulation == 1 or cfg.large_batch == "plain" or cfg.micro_batchnorm:
        return
    modules = {id(m): m for network in method.networks().values() for m in moving_in(network)}
    if norms := sum(isinstance(module, _BatchNorm) for module in modules.values()):
        raise EngineError(
            f"engine.accumulation={cfg.accumulation}: the {norms} batch norms of the encoder would "
            f"normalize each micro-batch by itself, and not batch_size={batch_size} images: accept "
            "that by engine.micro_batchnorm=true, or take an encoder without batch norms"
        )


class LargeBatch:
    """This rank's batch, in micro-batches of `sizes` rows, under the DeepSpeed engine `ds`.

    move: takes a tree of rows to `device`, each micro-batch in its turn.
    """

    def __init__(
        self,
        ds: Any,
        batch: dict[str, Any],
        sizes: Sequence[int],
        move: Callable[[Any], Any],
        device: torch.device,
    ):
        self._ds, self._move, self._device, self._sizes = ds, move, device, list(sizes)
        self._batch = ds.module.prepare(move(batch)) if ds.module.prepares else batch
        self._micros = cut(self._batch, self._sizes)
        self._draws: list[_Draws] = []
        self._rows: Any = None  # of all micro-batches but the last one, whose graph is kept

    def compare(self) -> dict[str, Any]:
        """What the method's loss makes of all rows; its backward is to come before `replay`.

        Of the views it gets the shapes alone, unless it says that it reads their values: they are
        the bulk of a batch.  Raises EngineError for one that reads them and does not say so.
        """
        method, batch = self._ds.module, self._batch
        encoded, targets = self._encode()
        whole = method.loss_reads_views
        seen = {key: self._move(part) for key, part in batch.items() if whole or key != "views"}
        if "views" in batch and not whole:
            seen["views"] = map_leaves(lambda view: view.to("meta"), batch["views"])
        if targets:
            seen["targets"] = join(targets)
        try:
            out = self._ds(seen, "loss", encoded)
            if any(getattr(value, "is_meta", False) for value in leaves(out)):
                raise RuntimeError("values on the meta device")
        except RuntimeError as error:
            if whole or "meta" not in str(error):
                raise
            name = type(method).__name__
            raise EngineError(
                f"{name}.loss reads the values of batch['views'], which engine.large_batch=exact "
                "does not keep: let encode or targets give what it needs, or set "
                f"{name}.loss_reads_views = True"
            ) from error
        return out

    def _encode(self) -> tuple[Any, list[Any]]:
        """All rows, and the targets of each micro-batch, if there are any."""
        rows, targets = [], []
        for n, micro in enumerate(self._micros):
            there, last = self._move(micro), n == len(self._micros) - 1
            self._draws.append(_Draws(self._device))
            with torch.set_grad_enabled(last):
                rows.append(self._ds(there, "encode"))
            if self._ds.module.has_targets:
                targets.append(map_leaves(Tensor.detach, self._ds(there, "targets")))
        *others, graph = rows
        self._rows = join([map_leaves(Tensor.detach, other) for other in others])
        for row, made in zip(leaves(self._rows), leaves(graph), strict=True):
            row.requires_grad_(made.requires_grad)
        return join([self._rows, graph]), targets

    @property
    def replays(self) -> int:
        """How many scalars `replay` gives: none where no gradient flows into what is encoded."""
        some = any(row.requires_grad for row in leaves(self._rows))
        return len(self._micros) - 1 if some else 0

    def replay(self) -> Iterator[Tensor]:
        """For each micro-batch but the last a scalar whose gradient is the loss's."""
        if not self.replays:
            return
        grads = [row.grad for row in leaves(self._rows)]
        sizes, after = self._sizes[:-1], _Draws(self._device)
        parts = zip(
            *([None] * len(sizes) if g is None else g.split(sizes) for g in grads), strict=True
        )
        for micro, drawn, part in zip(self._micros[:-1], self._draws[:-1], parts, strict=True):
            drawn.again()
            with still_norms(self._ds.module):
                graph = leaves(self._ds(self._move(micro), "encode"))
                pairs = [(y, g) for y, g in zip(graph, part, strict=True) if g is not None]
                yield torch.stack([(y.float() * g.float()).sum() for y, g in pairs]).sum()
        after.again()


class _Draws:
    """The state of the generators that modules on `device` draw from, as it is now."""

    def __init__(self, device: torch.device):
        self._host, self._device = torch.get_rng_state(), device
        self._own = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def again(self) -> None:
        """From here on draw what was drawn from there on."""
        torch.set_rng_state(self._host)
        if self._own is not None:
            torch.cuda.set_rng_state(self._own, self._device)


@contextmanager
def still_norms(model: nn.Module) -> Iterator[None]:
    """Once it is over, the running statistics of batch norms are what they were before.

    A backward of what was normalized inside belongs inside as well: it holds on to them.
    """
    norms = [module for module in moving_in(model) if isinstance(module, _BatchNorm)]
    before = [(b, b.clone()) for norm in norms for b in norm.buffers(recurse=False)]
    try:
        yield
    finally:
        for buffer, value in before:
            buffer.copy_(value)
