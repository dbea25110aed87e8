"""What ZeRO has made of a model's parameters: pieces, and flat tensors for the optimizer.

All that is known here of DeepSpeed's layouts.  layerwise.py, clipping.py and states.py ask where
parameters lie in flat tensors; models ask for the pieces through fastssl.pieces.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from fastssl.pieces import Pieces


class ZeroPieces(Pieces):
    """The pieces of parameters at stage 3, each parameter telling of its own; of others, all."""

    def piece(self, parameter: Tensor) -> Tensor:
        return getattr(parameter, "ds_tensor", parameter).data

    def size(self, parameter: Tensor) -> int:
        return getattr(parameter, "ds_numel", parameter.numel())

    def renew(self, parameters: Sequence[Any]) -> None:
        """Gather anew the parameters that ZeRO-3 keeps whole beside their pieces.

        They must not be left cut: DeepSpeed has recorded in which order it fetches parameters, and
        raises an error where one that it takes for whole has to be fetched.
        """
        whole = [p for p in parameters if hasattr(p, "ds_numel") and p.numel() == p.ds_numel]
        for parameter in whole:
            parameter.partition()
        forget_copies(parameters)
        kept = [parameter for parameter in whole if parameter.ds_persist]
        if kept:
            kept[0].all_gather(kept)


def forget_copies(parameters: Sequence[Any]) -> None:
    """Let nothing be gathered from second copies (hpZ) of pieces that have been written.

    DeepSpeed forgets those of what it steps itself alone.  It makes them of whole parameters.
    """
    for parameter in parameters:
        if getattr(parameter, "ds_secondary_tensor", None) is not None:
            parameter.ds_secondary_tensor = None


@dataclass(frozen=True)
class Fragments:
    """The pieces of parameters that one flat tensor holds on this rank.

    params: the parameters cut into the flat tensor, over all ranks.
    spans: (start, length) of the pieces here that were asked for; padding is in none.
    owners: int64 (len(spans),), which of the parameters a piece belongs to.
    offsets: where in its parameter, flattened, each piece begins.
    group: of the optimizer's groups the one that they are in.
    process_group, device: the ranks that hold the other pieces, and where its collectives run
        (an offloaded flat tensor is elsewhere).
    """

    params: tuple[Tensor, ...]
    spans: tuple[tuple[int, int], ...]
    owners: Tensor
    offsets: tuple[int, ...]
    group: int
    process_group: Any
    device: torch.device

    def whole_norms(self, norms: Tensor) -> Tensor:
        """(2, pieces) norms of the pieces here -> (2, pieces) norms of their parameters."""
        squares = norms.new_zeros(2, len(self.params)).index_copy_(1, self.owners, norms.square())
        if dist.get_world_size(self.process_group) > 1:
            shared = squares.to(self.device)
            dist.all_reduce(shared, group=self.process_group)
            squares = shared.to(squares.device)
        return squares.index_select(1, self.owners).sqrt()


def locate(ds_engine: Any, least_dims: int = 2) -> dict[Tensor, Fragments]:
    """The flat tensors of a DeepSpeed engine at stage 1, 2 or 3, with what lies in them.

    least_dims: of parameters whose pieces are wanted.
    Collective.  Raises RuntimeError when the pieces of all ranks do not make up every parameter:
    a DeepSpeed that lays out its flat tensors in a way not known here.
    """
    layout = _sub_groups if ds_engine.zero_optimization_stage() == 3 else _flat_groups
    return {
        flat: _fragments(params, pieces, flat, (group, *where, ds_engine.device), least_dims)
        for flat, params, pieces, group, *where in layout(ds_engine.optimizer)
    }


def forget_order(ds_engine: Any) -> None:
    """Let stage 3 let go of each module's parameters after its forward.

    Once it knows the order of a step it keeps those that the backward will need, and would so
    gather the whole encoder, and leave it so, where there is no backward.
    """
    if ds_engine.zero_optimization_stage() == 3:
        coordinator = ds_engine.optimizer.parameter_offload.get_param_coordinator()
        if coordinator.is_complete_trace():
            coordinator._invalidate_trace()


def follow_masters(ds_engine: Any) -> None:
    """Let the weights that a forward pass reads be the optimizer's float32 ones; collective."""
    zero, stage = ds_engine.optimizer, ds_engine.zero_optimization_stage()
    if stage == 3:
        for index in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(index)
    elif stage > 0:
        zero.update_lp_params()
    for weight, master in stage_0_masters(ds_engine).items():
        if weight is not master:
            weight.data.copy_(master)


def stage_0_masters(ds_engine: Any) -> dict[Any, Tensor]:
    """The tensor that the optimizer has for each parameter, itself in float32, at stage 0."""
    zero, optimizer = ds_engine.optimizer, ds_engine.basic_optimizer
    if ds_engine.zero_optimization_stage() > 0:
        return {}
    masters = [group["params"] for group in optimizer.param_groups]
    weights = masters if zero is optimizer else zero.fp16_groups
    both = zip(weights, masters, strict=True)
    return {w: m for group in both for w, m in zip(*group, strict=True)}


def held_at(parameter: Any) -> tuple[int, int]:
    """Where in a flattened parameter this rank's piece begins, and its length without padding."""
    if not hasattr(parameter, "ds_tensor"):
        return 0, parameter.numel()
    size = parameter.partition_numel()
    start = min(dist.get_rank(parameter.ds_process_group) * size, parameter.ds_numel)
    return start, min(parameter.ds_numel - start, size)


def shape_of(parameter: Any) -> list[int]:
    """Of a whole parameter."""
    return list(getattr(parameter, "ds_shape", parameter.shape))


def averaged(ds_engine: Any) -> list[list[Tensor]]:
    """The gradient of each flat tensor of `locate`, averaged, in parts that lie end to end.

    They are there from the last backward of a step until DeepSpeed's step, where nothing is
    offloaded.
    """
    zero = ds_engine.optimizer
    if hasattr(zero, "bf16_groups"):  # stage 1 in bfloat16 whose gradients are float32
        return [[flat] for flat in zero.fp32_groups_gradient_flat_partition]
    groups = zero.fp16_groups if ds_engine.zero_optimization_stage() == 3 else zero.bit16_groups
    return [list(zero.averaged_gradients[index]) for index in range(len(groups))]


def slices(parts: list[Tensor], spans: Sequence[tuple[int, int]]) -> Iterator[tuple[int, Tensor]]:
    """Of parts that lie end to end what is in the spans, ascending: (span's number, its elements).

    A span that reaches over several parts comes in several slices.

    >>> parts = [torch.arange(4), torch.arange(4, 6)]
    >>> [(n, piece.tolist()) for n, piece in slices(parts, [(1, 2), (3, 3)])]
    [(0, [1, 2]), (1, [3]), (1, [4, 5])]
    """
    begin, number = 0, 0
    for part in parts:
        end = begin + part.numel()
        while number < len(spans) and spans[number][0] < end:
            start, length = spans[number]
            low, high = max(start, begin), min(start + length, end)
            if low < high:
                yield number, part.reshape(-1)[low - begin : high - begin]
            if start + length > end:
                break
            number += 1
        begin = end


# A piece is (parameter's index, start in the flat tensor, length, start in the parameter); a flat
# tensor comes with the parameters cut into it, the same list on every rank, the pieces that lie on
# this rank, the group's index and the ranks that hold the others.
_Piece = tuple[int, int, int, int]
_Layout = Iterator[tuple[Tensor, list[Tensor], list[_Piece], int, Any]]


def _flat_groups(zero: Any) -> _Layout:
    """Stages 1 and 2: a group's parameters end to end, the whole cut into equal partitions."""
    groups = zero.bf16_groups if hasattr(zero, "bf16_groups") else zero.bit16_groups
    for index, params in enumerate(groups):
        pieces = []
        for number, param in enumerate(params):
            if param._hp_mapping is not None:  # None: it lies on other ranks only
                address = param._hp_mapping.get_hp_fragment_address()
                offset = param._hp_mapping.lp_fragment_address.start
                pieces.append((number, address.start, address.numel, offset))
        flat = zero.optimizer.param_groups[index]["params"][0]
        yield flat, params, pieces, index, zero.real_dp_process_group[index]


def _sub_groups(zero: Any) -> _Layout:
    """Stage 3: every parameter cut into equal slices, the last one padded with anything."""
    for index, params in enumerate(zero.fp16_groups):
        process_group = zero.sub_group_process_groups[index]
        rank, start, pieces = dist.get_rank(process_group), 0, []
        for number, param in enumerate(params):
            size = param.partition_numel()
            length = min(max(param.ds_numel - rank * size, 0), size)
            if length:
                pieces.append((number, start, length, rank * size))
            start += size
        group = zero.sub_group_to_group_id[index]
        yield zero.fp32_partitioned_groups_flat[index], params, pieces, group, process_group


def _fragments(
    params: list[Any],
    pieces: list[_Piece],
    flat: Tensor,
    where: tuple[int, Any, torch.device],
    least_dims: int,
) -> Fragments:
    group, process_group, device = where
    shapes = [tuple(shape_of(p)) for p in params]  # stage 3 empties p itself
    wanted = torch.tensor([torch.Size(shape).numel() for shape in shapes], device=device)
    found = torch.zeros_like(wanted)
    for number, start, length, _ in pieces:
        found[number] += length if start + length <= flat.numel() else 0
    dist.all_reduce(found, group=process_group)
    if not torch.equal(found, wanted):
        raise RuntimeError(
            f"{int((found != wanted).sum())} of {len(params)} parameters are not where they "
            "are looked for in this DeepSpeed's flat tensors; use ZeRO stage 0"
        )
    chosen = [piece for piece in pieces if len(shapes[piece[0]]) >= least_dims]
    return Fragments(
        params=tuple(params),
        spans=tuple((start, length) for _, start, length, _ in chosen),
        owners=torch.tensor([n for n, *_ in chosen], dtype=torch.int64, device=flat.device),
        offsets=tuple(offset for *_, offset in chosen),
        group=group,
        process_group=process_group,
        device=device,
    )
