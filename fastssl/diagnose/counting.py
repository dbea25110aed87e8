"""What a step does and holds, counted on fake tensors: they have shapes, and no memory.

The method runs once, forward and backward, at the rows that a rank will have, among as many ranks
as there will be: their process group is a fake one, whose collectives give empty tensors of the
right shape.  Every operator is seen on its way: what it allocates and when that is let go, the
bytes that it reads and writes, its operations, and what it sends to other ranks.
"""

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from fastssl import distributed
from fastssl.config import RunConfig
from fastssl.engine.large_batch import is_exact
from fastssl.kernels.common.gpu import Gpu, pretend
from fastssl.methods.base import PARAMETERS
from fastssl.tree import leaves, map_leaves

Channels = int | dict[str, int]
LARGE = 32 << 20  # bytes: glibc's malloc gives a block of more back as it is freed
_SOME_GPU = Gpu("sm_90", 132)  # whichever: nothing is launched


@dataclass(frozen=True)
class Blank:
    """A tensor without its numbers."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class Operator(NamedTuple):
    """What was called, with `Blank`s for tensors."""

    func: Any
    args: Any
    kwargs: Any


class Call(NamedTuple):
    """One operator: operations; bytes that it reads and writes; of these in blocks so large that
    a processor's system hands them out anew each time; whether it is attention; what it is, and
    its seconds where they were measured."""

    flops: float
    moved: int
    fresh: int = 0
    attends: bool = False
    operator: Operator | None = None
    seconds: float = 0.0


@dataclass
class Work:
    """Operators one after another, and the bytes that a rank gives to its collectives.

    sent: the whole of what a collective works on, once for each of its passes over the ring: an
    all-reduce has two.  collectives: how many.
    """

    calls: list[Call] = field(default_factory=list)
    sent: int = 0
    collectives: int = 0

    @property
    def flops(self) -> float:
        return sum(call.flops for call in self.calls)

    @property
    def moved(self) -> int:
        return sum(call.moved for call in self.calls)


@dataclass
class Counts:
    """Of one rank's step; bytes unless said otherwise.

    micro, rows: samples of a micro-batch, and of the loss: of an exact large batch all of the rank.
    inputs: views of a micro-batch.  kept: what the encoder keeps for backward.
    heads: what the loss adds to that, at its fullest, gathered embeddings and workspace included.
    gathered: of these, what came from other ranks.  rows_held: of an exact large batch all encoded
    rows and their gradient.
    backward: held at the fullest moment of forward and backward beyond parameters, with the
    gradients that are made until then, of which that moment has `grads`; lean: at the fullest
    without gradients, as where they are cut as they come.
    encode, targets, encode_backward: of a micro-batch.  loss: forward and backward.
    """

    micro: int
    rows: int
    inputs: int = 0
    kept: int = 0
    heads: int = 0
    gathered: int = 0
    rows_held: int = 0
    backward: int = 0
    grads: int = 0
    lean: int = 0
    encode: Work = field(default_factory=Work)
    targets: Work = field(default_factory=Work)
    loss: Work = field(default_factory=Work)
    encode_backward: Work = field(default_factory=Work)

    @property
    def collectives(self) -> int:
        """Of a micro-batch and the loss."""
        return sum(work.collectives for work in self.works)

    @property
    def works(self) -> tuple[Work, ...]:
        return self.encode, self.targets, self.loss, self.encode_backward


@contextmanager
def ranks(world: int) -> Iterator[None]:
    """Inside, this process is the first of `world`, and the others are made up.

    Raises RuntimeError where there is a process group already.
    """
    import torch.distributed as dist

    if world == 1:
        yield
        return
    if dist.is_initialized():
        raise RuntimeError("a plan is made in a process that belongs to no process group")
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        with distributed.all_alike():
            yield
    finally:
        dist.destroy_process_group()


def count(
    method: nn.Module, cfg: RunConfig, channels: Channels, world: int, *, on_gpu: bool = False
) -> Counts:
    """What a step of `method`, on the meta device, does on each of `world` ranks.

    on_gpu: with the kernels that a GPU launches, each as one operator, where Triton is installed.
    """
    rows = cfg.batch_size // world
    micro = rows // cfg.engine.accumulation
    exact = is_exact(method, cfg.engine)
    found = Counts(micro, rows if exact else micro)
    launched = pretend(_SOME_GPU) if on_gpu else nullcontext()
    gc.freeze()  # what is there already is not looked through again: a third of the time
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), ranks(world), launched:
            method.to_empty(device="cpu").train()
            _run(method, cfg, channels, found)
    finally:
        gc.unfreeze()
    return found


def _run(method: Any, cfg: RunConfig, channels: Channels, found: Counts) -> None:
    own = [*method.parameters(), *method.buffers()]
    meter = Meter(own)
    # A gradient leaves the tensor as it is made: `Meter` keeps the account.
    hooks = [p.register_post_accumulate_grad_hook(meter.take) for p in own if p.requires_grad]
    batch = _batch(cfg, channels, found.micro)
    found.inputs = sum(view.nbytes for view in leaves(batch["views"]))
    meter.ignore([*leaves(batch)])
    with meter:
        batch = method.prepare(batch)
        with meter.into(found.encode):
            encoded = method(batch, "encode")
        found.kept = meter.live
        if method.has_targets:
            with meter.into(found.targets):
                batch["targets"] = method(batch, "targets")
        if found.rows != found.micro:
            batch = _grown(batch, found.rows, reads_views=method.loss_reads_views)
        joined = map_leaves(lambda leaf: _joined(leaf, found), encoded)
        found.rows_held = sum(2 * row.nbytes for row in leaves(joined) if row.requires_grad)
        if found.rows == found.micro:
            found.rows_held = 0
        before, meter.peak = meter.live, meter.live
        with meter.into(found.loss):
            out = method(batch, "loss", joined)
            forward = meter.live
            out["loss"].backward()
        found.heads = max(meter.peak - before, forward - before)
        found.gathered = meter.gathered
        rest = [row for row in leaves(joined) if row.grad is not None]
        made = [leaf for leaf in leaves(encoded) if leaf.requires_grad]
        grads = [row.grad[: found.micro] for row in rest]
        with meter.into(found.encode_backward):
            if rest:
                torch.autograd.backward(made, grads)
    for hook in hooks:
        hook.remove()
    found.backward, found.grads, found.lean = meter.fullest, meter.then, meter.leanest


def _joined(leaf: Tensor, found: Counts) -> Tensor:
    """A leaf of the encoded rows as the loss gets it, whose gradient ends here."""
    if found.rows == found.micro:
        row = leaf.detach()
    else:
        row = leaf.new_empty(found.rows, *leaf.shape[1:])
    return row.requires_grad_(leaf.requires_grad)


def _grown(batch: dict[str, Any], rows: int, *, reads_views: bool) -> dict[str, Any]:
    """The rank's whole batch, as the loss gets it: of views that it does not read the shapes."""

    def whole(leaf: Tensor) -> Tensor:
        return leaf.new_empty(rows, *leaf.shape[1:])

    def shape(leaf: Tensor) -> Tensor:
        return leaf.new_empty(1).expand(rows, *leaf.shape[1:])

    as_shape = {"views"} if not reads_views else set()
    parts = batch.items()
    return {key: map_leaves(shape if key in as_shape else whole, part) for key, part in parts}


def _batch(cfg: RunConfig, channels: Channels, n: int) -> dict[str, Any]:
    shapes = cfg.views().shapes(channels)  # type: ignore[arg-type]
    index = torch.zeros(n, dtype=torch.int64)
    batch: dict[str, Any] = {"index": index, "seeds": index, "label": index}
    batch["views"] = _each(shapes, lambda shape: torch.empty(n, *shape))
    batch["params"] = _each(shapes, lambda _: torch.ones(n, len(PARAMETERS)))
    return batch


def _each(shapes: Any, made: Callable[[tuple[int, ...]], Tensor]) -> Any:
    """A tensor each view; by stream where the shapes are."""
    if isinstance(shapes, dict):
        return {name: _each(own, made) for name, own in shapes.items()}
    return [made(shape) for shape in shapes]


class Meter(TorchDispatchMode):
    """Counts what the operators inside of it allocate and do; `known` tensors were there before.

    live, peak: bytes held now, and at most since `peak` was last set.  fullest, leanest: at most
    with and without the gradients that were made, the former with `then` of gradients.
    """

    def __init__(self, known: list[Tensor]):
        super().__init__()
        self.live = self.peak = self.fullest = self.leanest = 0
        self.gradients = self.then = self.gathered = 0
        self._seen: set[int] = set()
        self._alive: list[Any] = []  # storages of others: an address is not used twice meanwhile
        self._work: Work | None = None
        self.ignore(known)

    def ignore(self, tensors: list[Any]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._seen.add(storage._cdata)
            self._alive.append(storage)

    @contextmanager
    def into(self, work: Work) -> Iterator[None]:
        """Inside, operators are added to `work`."""
        self._work = work
        try:
            yield
        finally:
            self._work = None

    def take(self, parameter: Tensor) -> None:
        """A parameter's gradient is whole: it is held from here on."""
        assert parameter.grad is not None
        self.gradients += parameter.grad.nbytes
        parameter.grad = None
        self._note()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        for tensor in made:
            self._hold(tensor.untyped_storage())
        self._note()
        if self._work is not None and (made or func._schema.is_mutable):
            self._add(self._work, func, args, kwargs, out, made)
        return out

    def _hold(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.live += size
        weakref.finalize(storage, self._let_go, key, size)

    def _let_go(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size

    def _note(self) -> None:
        self.peak = max(self.peak, self.live)
        self.leanest = max(self.leanest, self.live)
        if self.live + self.gradients > self.fullest:
            self.fullest, self.then = self.live + self.gradients, self.gradients

    def _add(self, work: Work, func: Any, args: Any, kwargs: Any, out: Any, made: Any) -> None:
        read = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if func.namespace == "c10d":
            work.collectives += 1
            passes = 2 if "allreduce" in func._schema.name else 1
            work.sent += passes * max(x.nbytes for x in (*made, *read))
            if "gather" in func._schema.name:
                self.gathered += max(x.nbytes for x in (*made, *read))
            return
        sources = {x.untyped_storage()._cdata for x in read}
        is_view = all(x.untyped_storage()._cdata in sources for x in made)
        if is_view and not func._schema.is_mutable:
            return
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            flops = formula(*args, **kwargs, out_val=out)
        else:
            flops = _OWN.get(func._overloadpacket.__name__, lambda *_: 0)(read)
        moved = sum(x.nbytes for x in (*read, *made))
        fresh = [x.untyped_storage() for x in made]
        large = {s._cdata: s.nbytes() for s in fresh if s.nbytes() > LARGE}
        new = sum(size for key, size in large.items() if key not in sources)
        blank = tree_map_only(Tensor, _blank, (args, kwargs))
        attends = "attention" in func._schema.name
        work.calls.append(Call(flops, moved, new, attends, Operator(func, *blank)))


def _blank(tensor: Tensor) -> Blank:
    return Blank((*tensor.shape,), (*tensor.stride(),), tensor.dtype)


def _pairs(products: int) -> Callable[[list[Tensor]], int]:
    """Operations of so many products of the first two matrices' rows."""

    def flops(read: list[Tensor]) -> int:
        rows = [x for x in read if x.ndim == 2]
        queries, keys = rows[0], rows[1] if len(rows) > 1 else rows[0]
        return products * 2 * len(queries) * len(keys) * queries.shape[1]

    return flops


# Products that our own operators make: of their forms the plainest, whatever a kernel saves.
_OWN = {
    "pairwise_stats": _pairs(1),
    "pairwise_grads": _pairs(3),
    "pairwise_nested_stats": _pairs(1),
    "pairwise_nested_grads": _pairs(3),
    "pairwise_sigmoid": _pairs(3),
    "pairwise_topk": _pairs(1),
    "correlation_covariance": lambda read: 2 * len(read[0]) * read[0].shape[1] * read[-1].shape[1],
}
