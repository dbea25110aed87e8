"""The blocks of a model: what is fetched, compiled or recomputed as one."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from .launch import deepspeed

# timm's transformers, and ours, decoders among them; its ResNets; its EfficientNets' stages of them
_CONTAINERS = re.compile(r"blocks|layer\d+")


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks of its encoders, decoders and teachers, each once; no block within a block.

    They are what stands in a Sequential or ModuleList called `blocks`, or `layer1` and so on.
    """
    found: dict[int, nn.Module] = {}
    waiting = [model]
    while waiting:
        for name, child in waiting.pop().named_children():
            container = isinstance(child, (nn.Sequential, nn.ModuleList))
            if container and _CONTAINERS.fullmatch(name):
                found |= {id(block): block for block in _members(child)}
            else:
                waiting.append(child)
    return [*found.values()]


def _members(container: nn.Module) -> list[nn.Module]:
    """Its blocks, those of the stages in it instead of the stages."""
    members: list[nn.Module] = []
    for child in container.children():
        nested = isinstance(child, (nn.Sequential, nn.ModuleList))
        members += _members(child) if nested else [child]
    return members


@contextmanager
def fetched_as_one(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Let stage 3, initialized inside, gather each of them as one: DeepSpeed's leaf modules.

    Their gradients are reduced as those of other parameters are, once each is whole.  DeepSpeed's
    own way, at the end of each backward through a leaf, keeps the last one's alone of a block that
    is called for several views.
    """
    if not blocks:
        yield
        return
    deepspeed()
    from deepspeed.runtime.zero import stage3
    from deepspeed.utils import set_z3_leaf_module

    for block in blocks:
        set_z3_leaf_module(block, True)
    is_leaf = stage3.z3_leaf_parameter
    stage3.z3_leaf_parameter = lambda parameter: False
    try:
        yield
    finally:
        stage3.z3_leaf_parameter = is_leaf
