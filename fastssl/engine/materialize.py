"""The tensors of a model that was built without memory, made one after another and cut at once."""

import ctypes
from typing import Any

import torch
from torch import Tensor, nn

from fastssl import distributed
from fastssl.models import fingerprint, frozen_as, frozen_in
from fastssl.models.deferred import Deferred, tensors_on_meta

from .launch import deepspeed

_LITTLE = 256 << 20  # bytes: what may stay with malloc, though it is free


def materialize(
    model: nn.Module,
    deferred: Deferred,
    device: torch.device,
    dtype: torch.dtype,
    zero: dict[str, Any] | None,
) -> None:
    """Give every parameter and buffer of `model` its memory, keeping the objects; collective.

    dtype: of the parameters.  zero: DeepSpeed's configuration where it is to cut them (stage 3),
    each as soon as it is there, so that none but the largest is ever whole.
    Rank 0 computes the parameters, and DeepSpeed gives them to the other ranks.
    """
    _take_fingerprints(model, deferred)
    cut: Any = None
    made = 0
    for _, tensor in [*tensors_on_meta(model)]:
        made += tensor.nbytes
        if made > _LITTLE:
            made = 0
            trim()
        if not isinstance(tensor, nn.Parameter):
            _become(tensor, deferred.value(tensor).to(device))
            continue
        like = torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device=device)
        if distributed.rank() == 0:
            like.copy_(deferred.value(tensor))
        _become(tensor, nn.Parameter(like, requires_grad=tensor.requires_grad))
        if zero is None:
            continue
        if cut is None:
            holder = nn.Module()
            holder.first = tensor
            deepspeed().zero.Init(module=holder, config_dict_or_path=zero)
            cut = tensor.convert_to_zero_parameters  # type: ignore[attr-defined]
        else:
            cut(param_list=[tensor])
    trim()


def trim() -> None:
    """Let glibc's malloc give back what is free between what is held: it keeps blocks of less than
    32 MB, and so as much as the whole model where each tensor was whole for a moment."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # there is glibc
        trim(0)


def _take_fingerprints(model: nn.Module, deferred: Deferred) -> None:
    """Of frozen networks whose tensors were not there when they were frozen; by rank 0."""

    def value(tensor: Tensor) -> Tensor:
        return deferred.value(tensor) if tensor.device.type == "meta" else tensor.detach()

    for network in frozen_in(model):
        if not frozen_as(network):
            found = fingerprint(network, value) if distributed.rank() == 0 else ""
            network.frozen_as = distributed.broadcast_object(found)  # type: ignore[assignment]


def _become(tensor: Tensor, real: Tensor) -> None:
    torch.utils.swap_tensors(tensor, real)
