"""The gradient of a loss over a whole batch, in the memory of one micro-batch's graph.

    encode every micro-batch, keeping no graph but the last one's
    the loss over all rows of all ranks at once: its gradient at the heads, and at those rows
    encode each of the others again, as it was drawn, and send its rows' gradient back

Value and gradient are those of the whole batch in one graph, to rounding, whatever the loss does
with the rows.  Of a sample its encoded row is kept, and what the heads keep of it.
Source: Gao et al. 2021, arXiv:2101.06983 (gradient cache).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastssl.models import moving_in
from fastssl.tree import count_rows, cut, join, leaves, map_leaves

from .config import EngineConfig, EngineError, accumulates_in, offloads_optimizer
from .watchdog import heart


def is_exact(method: Any, cfg: EngineConfig) -> bool:
    """Whether the loss is taken over the whole batch though micro-batches are encoded."""
    return cfg.accumulation > 1 and cfg.large_batch == "exact" and method.couples_batch


def check_deepspeed(cfg: EngineConfig) -> None:
    """Raise EngineError for what keeps of an exact large batch a part of the gradient only.

    DeepSpeed loses there what it has of parameters that a step's last backward does not reach.
    """
    key, dtype = accumulates_in(cfg)
    named = f"engine.large_batch=exact at engine.zero_stage={cfg.zero_stage}"
    if cfg.zero_stage > 1 and not cfg.reduce_once and offloads_optimizer(cfg):
        raise EngineError(
            f"{named} takes no optimizer that is offloaded with engine.reduce_once=false"
        )
    wide = str(dtype) in ("fp32", "float32", "float", "torch.float32")
    if cfg.zero_stage < 2 and cfg.precision == "bf16" and wide:
        raise EngineError(f"{named} takes no {key}={dtype!r}: use engine.zero_stage=2")


def check_batch_norms(method: Any, cfg: EngineConfig, batch_size: int) -> None:
    """Raise EngineError where micro-batches are no batch: an encoder normalizes each by itself."""
    if cfg.accumulation == 1 or cfg.large_batch == "plain":
        return
    modules = {id(m): m for network in method.networks().values() for m in moving_in(network)}
    norms = sum(isinstance(module, _BatchNorm) for module in modules.values())
    if norms and not cfg.micro_batchnorm:
        raise EngineError(
            f"engine.accumulation={cfg.accumulation}: the {norms} batch norms of the encoder would "
            f"normalize each micro-batch by itself, and not batch_size={batch_size} images: accept "
            "that by engine.micro_batchnorm=true, or take an encoder without batch norms"
        )
    if norms and batch_size < 2 * cfg.accumulation:
        raise EngineError(
            f"engine.accumulation={cfg.accumulation} cuts batch_size={batch_size} into "
            f"micro-batches of one image, of which the encoder's {norms} batch norms make nothing"
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
        the bulk of a batch.  Raises EngineError for one that reads them and does not say so, and
        for encoded rows or targets that are not one for each sample.
        """
        method, batch = self._ds.module, self._batch
        encoded, targets = self._encode()
        whole, name = method.loss_reads_views, type(method).__name__
        seen = {key: self._move(part) for key, part in batch.items() if whole or key != "views"}
        if "views" in batch and not whole:
            shape = partial(Shape.of, device=self._device, reader=name)
            seen["views"] = map_leaves(shape, batch["views"])
        if targets is not None:
            seen["targets"] = targets
        return self._ds(seen, "loss", encoded)

    def _encode(self) -> tuple[Any, Any]:
        """All rows, and all targets, if there are any."""
        rows, targets, method = [], [], self._ds.module
        for n, (micro, size) in enumerate(zip(self._micros, self._sizes, strict=True)):
            there, last = self._move(micro), n == len(self._micros) - 1
            self._draws.append(_Draws(self._device))
            with torch.set_grad_enabled(last):
                rows.append(self._ds(there, "encode"))
            check_rows(method, "encode", rows[-1], size)
            heart.beat()
            target = self._ds(there, "targets") if method.has_targets else None
            if target is not None:
                check_rows(method, "targets", target, size)
                targets.append(map_leaves(Tensor.detach, target))
        *others, graph = rows
        self._rows = join([map_leaves(Tensor.detach, other) for other in others])
        for row, made in zip(leaves(self._rows), leaves(graph), strict=True):
            if made.is_complex():
                raise EngineError(
                    f"{type(method).__name__}.encode(batch) has complex numbers, which "
                    "engine.large_batch=exact does not take"
                )
            row.requires_grad_(made.requires_grad)
        return join([self._rows, graph]), join(targets) if targets else None

    @property
    def replays(self) -> int:
        """How many scalars `replay` gives: none where no gradient flows into what is encoded."""
        some = any(row.requires_grad for row in leaves(self._rows))
        return len(self._micros) - 1 if some else 0

    def replay(self) -> Iterator[Tensor]:
        """For each micro-batch but the last a scalar whose gradient is the loss's."""
        if not self.replays:
            return
        asked = [n for n, row in enumerate(leaves(self._rows)) if row.requires_grad]
        rows = [leaves(self._rows)[n] for n in asked]
        grads = [torch.zeros_like(row) if row.grad is None else row.grad for row in rows]
        parts = zip(*(grad.split(self._sizes[:-1]) for grad in grads), strict=True)
        after = _Draws(self._device)
        with still_buffers(self._ds.module):
            for micro, drawn, part in zip(self._micros[:-1], self._draws[:-1], parts, strict=True):
                drawn.again()
                graph = leaves(self._ds(self._move(micro), "encode"))
                pairs = zip((graph[n] for n in asked), part, strict=True)
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
def still_buffers(model: nn.Module) -> Iterator[None]:
    """Once it is over, buffers such as running statistics are what they were before.

    A backward of what was normalized inside belongs inside as well: it holds on to them.
    """
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)


def check_rows(method: Any, half: str, tree: Any, rows: int) -> None:
    """Raise EngineError where what a method's half gives has not a row for each sample."""
    name = f"{type(method).__name__}.{half}(batch)"
    try:
        found = count_rows(tree, name)
    except ValueError as error:
        raise EngineError(f"{error}: every leaf has a row for each sample") from error
    if found != rows:
        raise EngineError(f"{name} has {found} rows for {rows} samples: give one for each")


class Shape(Tensor):
    """A tensor's shape, dtype and device, without its values: whoever asks for those is told."""

    reader: str

    @staticmethod
    def of(tensor: Tensor, device: torch.device, reader: str) -> "Shape":
        """reader: the method whose loss gets it."""
        kind = {"dtype": tensor.dtype, "device": device}
        made = Tensor._make_wrapper_subclass(Shape, tensor.shape, **kind)  # type: ignore[attr-defined]
        made.reader = reader
        return made

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> "Shape":
        read = next(leaf for leaf in leaves([args, kwargs or {}]) if isinstance(leaf, Shape))
        if func in _OF_SHAPES:
            there = torch.empty(read.shape, dtype=read.dtype, device="meta")
            return cls.of(func(there, *args[1:], **(kwargs or {})), read.device, read.reader)
        name = read.reader
        raise EngineError(
            f"{name}.loss reads the values of batch['views'], which engine.large_batch=exact does "
            f"not keep: let encode or targets give what it needs, or set {name}.loss_reads_views "
            "= True"
        )


_aten = torch.ops.aten
_OF_SHAPES = (_aten.select.int, _aten.slice.Tensor, _aten.detach.default, _aten.alias.default)
