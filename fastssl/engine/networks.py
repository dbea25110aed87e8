"""The networks in a checkpoint: a safetensors file each, and of a frozen one its fingerprint alone.

trainer.json has {"networks": {"encoder": "", "teacher": ""}}, the primary one first, each with its
fingerprint where it is frozen.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from fastssl.models import frozen_as


def networks_of(trainer: dict[str, Any]) -> dict[str, str]:
    """The networks of a checkpoint, as its trainer.json has them.

    Raises ValueError for what are no names: files are opened by them.
    """
    found = trainer.get("networks", {"encoder": ""})  # of before there were several
    if not isinstance(found, dict) or not found or not all(map(is_network, found)):
        raise ValueError(f"networks {found!r}")
    return {name: str(frozen) for name, frozen in found.items()}


def described(networks: Mapping[str, nn.Module]) -> dict[str, str]:
    """What trainer.json has of a method's networks."""
    return {name: frozen_as(network) or "" for name, network in networks.items()}


def is_network(name: object) -> bool:
    """Whether a network can be kept by that name."""
    return isinstance(name, str) and name.isidentifier() and name.isascii()


def encoder_files(networks: Mapping[str, str]) -> dict[str, str]:
    """The file of each network that is not frozen, by name."""
    first = next(iter(networks))
    moving = [name for name, frozen in networks.items() if not frozen]
    return {n: f"encoder{'' if n == first else f'-{n}'}.safetensors" for n in moving}


def other_frozen(saved: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    """A network that is not frozen as it was, or with other weights; None where all are."""
    return next((name for name in saved if now.get(name, saved[name]) != saved[name]), None)
