"""Frozen networks: in evaluation mode, in no optimizer, teacher or checkpoint.

What such a network holds is known from where it came from; its fingerprint says whether it is that.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn


def freeze(network: nn.Module) -> None:
    """Let a network stay as it is.  Its fingerprint is taken, on the meta device later."""
    network.requires_grad_(False).eval()
    tensors = [x for x in network.state_dict().values() if isinstance(x, Tensor)]
    later = any(x.device.type == "meta" for x in tensors)
    network.frozen_as = "" if later else fingerprint(network)  # type: ignore[assignment]


def frozen_as(network: nn.Module) -> str | None:
    """The fingerprint of a frozen network; None of another."""
    found = getattr(network, "frozen_as", None)
    return found if isinstance(found, str) else None


def frozen_in(model: nn.Module) -> list[nn.Module]:
    """The frozen networks in a model."""
    return [module for module in model.modules() if frozen_as(module) is not None]


def moving_in(model: nn.Module) -> list[nn.Module]:
    """The modules of a model that are in no frozen network."""
    still = {id(part) for network in frozen_in(model) for part in network.modules()}
    return [module for module in model.modules() if id(module) not in still]


def shared_copies(model: nn.Module) -> dict[int, object]:
    """The memo of a deep copy in which frozen networks stay the same ones."""
    networks = frozen_in(model)
    memo: dict[int, object] = {}
    for network in networks:
        for part in (*network.modules(), *network.parameters(), *network.buffers()):
            memo[id(part)] = part
    return memo


@contextlib.contextmanager
def set_aside(model: nn.Module) -> Iterator[None]:
    """Inside, the frozen networks of a model are empty: what is saved or loaded has none."""
    networks = frozen_in(model)
    parts = ("_parameters", "_buffers", "_modules")
    kept = [{part: network.__dict__[part] for part in parts} for network in networks]
    for network in networks:
        network.__dict__.update({part: {} for part in parts})
    try:
        yield
    finally:
        for network, whole in zip(networks, kept, strict=True):
            network.__dict__.update(whole)


def fingerprint(network: nn.Module, value: Callable[[Tensor], Tensor] = Tensor.detach) -> str:
    """The SHA-256 of a network's names and tensors, of these what `value` gives."""
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        if isinstance(tensor, Tensor):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            plain = value(tensor).cpu().contiguous().reshape(-1)
            digest.update(plain.view(torch.uint8).numpy().data)
    return digest.hexdigest()
