"""Collectives with exact gradients, and the few plain ones a run needs.

The contract every loss keeps.  Rank r returns l_r with mean_r l_r = L, the loss of the joined
batch.  Every rank calls backward on its own l_r, so autograd computes the gradient of sum_r l_r;
if each collective's backward is its true adjoint, a rank's gradient is then W * dL/d(its rows),
and the mean over ranks of the parameters' gradients (DDP, ZeRO, FSDP) is exactly dL/d(parameters).

    collective          forward                               backward (the true adjoint)
    all_gather_rows     (b, ...) -> (W * b, ...), rank order  reduce-scatter, sum
    all_reduce_sum      sum over ranks, on every rank         all-reduce, sum
    all_to_all_rows     (W * b, ...): block s goes to rank s  all-to-all

`group` is a process group, None (the world; one process when torch.distributed is not
initialized) or LOCAL (this rank alone, whatever runs beside it).  A group of one costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

LOCAL: Literal["local"] = "local"  # the group of this rank alone
Group = Any  # ProcessGroup | None | LOCAL; ProcessGroup is absent from builds without distributed
T = TypeVar("T")
_Exchange = Callable[[Tensor, Group], Tensor]

BUILT = dist.is_available()  # with torch; kept, as losses ask at every step
_host_groups: dict[Any, Any] = {}
_MOST_TENSORS = 127  # that one check compares
_alike: list[bool] = []  # see `all_alike`
_DTYPES = sorted({x for x in vars(torch).values() if isinstance(x, torch.dtype)}, key=str)


def _initialized(group: Group) -> bool:
    return group != LOCAL and BUILT and dist.is_initialized()


def world_size(group: Group = None) -> int:
    """Ranks in the group; 1 for LOCAL and when torch.distributed is not initialized.

    Raises ValueError when this rank does not belong to the group.

    >>> world_size(), world_size(LOCAL)
    (1, 1)
    """
    if not _initialized(group):
        return 1
    size = dist.get_world_size(group)
    if size < 1:
        raise ValueError(f"process_group {group} does not contain this rank")
    return size


def rank(group: Group = None) -> int:
    """This process's place in the group; 0 for LOCAL and without torch.distributed."""
    return dist.get_rank(group) if _initialized(group) else 0


def _host_group(group: Group) -> Any:
    """A group over the same ranks that moves CPU tensors, so that checks never wait for a device.

    An nccl group moves none: its gloo twin is made on first use, which every rank reaches at the
    same place.
    """
    group = dist.group.WORLD if group is None else group
    if "cpu" in dist.get_backend_config(group):
        return group
    if group not in _host_groups:
        ranks = dist.get_process_group_ranks(group)
        _host_groups[group] = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
    return _host_groups[group]


def require_even(x: Tensor, group: Group = None, name: str = "x") -> None:
    """Raise the same ValueError on every rank unless x has one shape and dtype on all of them.

    A collective over uneven rows, or rows of unequal size in memory, would hang or mix samples up.
    What is compared travels between hosts, so this never waits for a device.  Ask it before any
    test that one rank alone may fail.
    """
    require_all_even(group, **{name: x})


def require_all_even(group: Group = None, **tensors: Tensor | None) -> None:
    """`require_even` of several tensors by their names, in one message.

    None, an optional tensor that is left out, must be None on every rank.
    """
    if world_size(group) == 1 or _alike:
        return
    if len(tensors) > _MOST_TENSORS:
        raise ValueError(f"at most {_MOST_TENSORS} tensors can be compared, got {len(tensors)}")
    # Of one size whatever the ranks have: a collective of unequal ones would hang itself.
    mine = torch.full((_MOST_TENSORS + 1, 9), -1)
    mine[0, 0] = len(tensors)
    for i, x in enumerate(tensors.values(), 1):
        if x is not None:
            mine[i, :2] = torch.tensor([x.ndim, _DTYPES.index(x.dtype)])
            mine[i, 2 : 2 + x.ndim] = torch.tensor(x.shape[:7])
    ranks = [torch.empty_like(mine) for _ in range(world_size(group))]
    dist.all_gather(ranks, mine, group=_host_group(group))
    counts = [int(seen[0, 0]) for seen in ranks]
    if len(set(counts)) > 1:
        raise ValueError(f"every rank must give as many tensors, got {counts} by rank")
    for i, name in enumerate(tensors, 1):
        rows = [seen[i].tolist() for seen in ranks]
        shapes = [None if row[0] < 0 else tuple(row[2 : 2 + row[0]]) for row in rows]
        if any(row[0] > 7 for row in rows):
            raise ValueError(f"{name} must have at most 7 dimensions, got {shapes} ... by rank")
        if len(set(shapes)) > 1:
            raise ValueError(f"{name} must have the same shape on every rank, got {shapes} by rank")
        if len({row[1] for row in rows}) > 1:
            dtypes = ", ".join(str(_DTYPES[row[1]]) for row in rows)
            raise ValueError(f"{name} must have the same dtype on every rank, got {dtypes} by rank")


@contextmanager
def all_alike() -> Iterator[None]:
    """Inside, nothing is compared: for ranks that are reckoned with, and are not there."""
    _alike.append(True)
    try:
        yield
    finally:
        _alike.pop()


class _Collective(torch.autograd.Function):
    """forward(x, group), with adjoint(gradient, group) as its gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, group: Group, forward: _Exchange, adjoint: _Exchange
    ) -> Tensor:
        ctx.group, ctx.adjoint = group, adjoint
        return forward(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # see `first_order`
            raise RuntimeError("what goes from rank to rank has no second derivative")
        return ctx.adjoint(grad, ctx.group), None, None, None


def _exchange(x: Tensor, group: Group) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    dist.all_to_all_single(out, x.contiguous(), group=group)
    return out


def _gather(x: Tensor, group: Group) -> Tensor:
    out = x.new_empty(world_size(group) * x.shape[0], *x.shape[1:])
    dist.all_gather_into_tensor(out, x.contiguous(), group=group)
    return out


def _scatter_sum(x: Tensor, group: Group) -> Tensor:
    """This rank's rows of the sum over ranks; 16-bit inputs are summed in float32."""
    total = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    mine = total.new_empty(x.shape[0] // world_size(group), *x.shape[1:])
    dist.reduce_scatter_tensor(mine, total.contiguous(), group=group)
    return mine.to(x.dtype)


def _reduce(x: Tensor, group: Group) -> Tensor:
    """The sum over ranks, in a new tensor; 16-bit inputs are summed in float32."""
    half = x.dtype in (torch.bfloat16, torch.float16)
    total = x.float() if half else x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total.to(x.dtype)


def all_gather_rows(x: Tensor, group: Group = None, *, check: bool = True) -> Tensor:
    """Every rank's rows, joined in rank order: (b, ...) -> (W * b, ...), same dtype.

    Backward: reduce-scatter with a sum (in float32 for 16-bit tensors): row i of rank r gets the
    sum of the gradients that all ranks have for it.  First order only.
    Raises ValueError, on every rank alike, when the ranks' shapes or dtypes differ; for a 0-d
    tensor.
    check=False leaves out the comparison of shapes, for a caller that has just made it.

    >>> all_gather_rows(torch.arange(3)).tolist()
    [0, 1, 2]
    """
    if check:
        require_even(x, group)
    if x.ndim == 0:
        raise ValueError("x must have rows to gather, got a 0-d tensor")
    if world_size(group) == 1:
        return x
    return _Collective.apply(x, group, _gather, _scatter_sum)  # pyright: ignore[reportReturnType]


def all_reduce_sum(x: Tensor, group: Group = None) -> Tensor:
    """The sum of x over ranks, on every rank, in a new tensor of x's dtype.

    Backward: all-reduce with a sum.  First order only.  Shapes must agree across ranks: they are
    not checked here, because what is reduced has a model's shape, not a batch's.
    """
    if world_size(group) == 1:
        return x
    return _Collective.apply(x, group, _reduce, _reduce)  # pyright: ignore[reportReturnType]


def all_to_all_rows(x: Tensor, group: Group = None) -> Tensor:
    """x (W * b, ...) in W blocks of rows: block s goes to rank s, and every rank's comes, in order.

    Backward: the same exchange.  First order only.  Shapes must agree across ranks, unchecked.
    Raises ValueError for rows that W does not divide.
    """
    if x.ndim == 0 or len(x) % world_size(group):
        raise ValueError(f"x must have rows that {world_size(group)} divides, got {tuple(x.shape)}")
    if world_size(group) == 1:
        return x
    return _Collective.apply(x, group, _exchange, _exchange)  # pyright: ignore[reportReturnType]


@torch.no_grad()
def all_gather_nograd(x: Tensor, group: Group = None, *, check: bool = True) -> Tensor:
    """`all_gather_rows` without a gradient, for statistics, features and labels.

    check=False leaves out the comparison of shapes, for a caller that has just made it.
    """
    if world_size(group) == 1:
        return x.detach()
    if check:
        require_even(x, group)
    return _gather(x, group)


def shift(tensors: Sequence[Tensor], by: int, group: Group = None) -> Callable[[], list[Tensor]]:
    """Start to send tensors `by` ranks on, round the ring, and to receive as many from behind.

    Returns a function that waits and gives what came: like the tensors sent, which must not be
    written before.  No gradient.  Shapes and dtypes must agree across ranks: they are not checked.
    """
    W, here = world_size(group), rank(group)
    if W == 1:
        return lambda: list(tensors)
    whole: Any = dist.group.WORLD if group is None else group
    ranks = [dist.get_global_rank(whole, (here + distance) % W) for distance in (by, -by)]
    sent = [x.detach().contiguous() for x in tensors]
    came = [torch.empty_like(x) for x in sent]
    ops = [dist.P2POp(dist.isend, x, ranks[0], group) for x in sent]
    ops += [dist.P2POp(dist.irecv, x, ranks[1], group) for x in came]
    works = dist.batch_isend_irecv(ops)

    def wait() -> list[Tensor]:
        for work in works:
            work.wait()
        sent.clear()  # kept until here: a send reads it
        return came

    return wait


def broadcast_object(obj: Any, src: int = 0) -> Any:
    """Rank src's picklable object, on every rank of the world."""
    if world_size() == 1:
        return obj
    box = [obj]
    dist.broadcast_object_list(box, src=src, group=_host_group(None))
    return box[0]


class ElsewhereError(ValueError):
    """Another rank has met a mistake that this one has not; it says which."""

    exit_code, on_every_rank = 2, True


def from_first(action: Callable[[], T]) -> T:
    """What `action` returns on the first rank, on every rank; or a ValueError where it raises one.

    A disk that several machines share may show them different things for a while.
    """
    made, error = None, None
    if rank() == 0:
        try:
            made = action()
        except ValueError as mistake:
            error = mistake
    made, said = broadcast_object((made, str(error) if error else None))
    if error is not None:
        raise error
    if said is not None:
        raise ElsewhereError(f"rank 0: {said}")
    return made


@contextmanager
def alike() -> Iterator[None]:
    """Inside, nothing collective: where a ValueError leaves it on some rank, it does on all."""
    error = None
    try:
        yield
    except ValueError as mistake:
        error = mistake
    said = gather_objects(str(error) if error else None)
    if error is not None:
        raise error
    for number, other in enumerate(said):
        if other is not None:
            raise ElsewhereError(f"on rank {number}: {other}")


def gather_objects(obj: Any, group: Group = None) -> list[Any]:
    """Every rank's picklable object in rank order, on every rank of the world.

    group: None, or that of `beside`.
    """
    box = [obj]
    if world_size() > 1:
        box = [None] * world_size()
        dist.all_gather_object(box, obj, group=_host_group(None) if group is None else group)
    return box


def beside() -> Group:
    """The world again, for collectives of another thread beside this one's; collective."""
    if world_size() == 1:
        return None
    key = ("beside", dist.group.WORLD)
    if key not in _host_groups:
        _host_groups[key] = dist.new_group(backend="gloo")
    return _host_groups[key]


def all_agree(flag: bool) -> bool:
    """True when the flag is true on every rank of the world."""
    return bool(least(int(flag)))


def least(vote: int) -> int:
    """The least of the votes of all ranks of the world, on every rank."""
    if world_size() == 1:
        return vote
    votes = torch.tensor(vote)
    dist.all_reduce(votes, op=dist.ReduceOp.MIN, group=_host_group(None))
    return int(votes.item())


def barrier() -> None:
    """Wait until every rank of the world is here."""
    if world_size() > 1:
        dist.barrier(group=_host_group(None))
