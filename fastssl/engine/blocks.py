"""The blocks of a model: what is fetched, compiled or recomputed as one."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from .config import EngineConfig, EngineError
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


def recompute(method: nn.Module, cfg: EngineConfig) -> None:
    """Let backward recompute what is trained, as engine.activation_checkpointing says.

    The blocks of encoders and decoders; an encoder without any, or with batch norms in them, by
    its own set_grad_checkpointing.  Raises EngineError for one that has neither.
    """
    how = cfg.activation_checkpointing
    if not how:
        return
    trained = [block for block in blocks_of(method) if _is_trained(block)]
    ours = [block for block in trained if not _has_norms(block)]
    for block in ours:
        context = {"context_fn": _selected} if how == "selective" else {}
        again = partial(checkpoint, block.forward, use_reentrant=False, **context)
        block.forward = _unless_frozen(again, block.forward)
    done = {id(block) for block in ours}
    for network in method.networks().values():  # type: ignore[operator]
        if _is_trained(network) and not any(id(block) in done for block in network.modules()):
            _by_itself(network, how)


def compile_blocks(method: nn.Module) -> int:
    """Compile each block's forward by itself; how many."""
    blocks = blocks_of(method)
    for block in blocks:
        block.forward = torch.compile(block.forward)
    return len(blocks)


def convolve_channels_last(method: nn.Module) -> None:
    """Give convolutions their input with channels innermost, which what comes after them keeps.

    Weights stay as they are: ZeRO lays them into flat tensors.  Raises EngineError where each
    convolution only cuts patches.
    """
    convolutions = [part for part in method.modules() if isinstance(part, nn.Conv2d)]
    sizes = [zip(each.kernel_size, each.stride, strict=True) for each in convolutions]
    if not any(kernel > stride for pairs in sizes for kernel, stride in pairs):
        raise EngineError(
            "engine.channels_last=True is for encoders of convolutions, and there are none here "
            "but those that cut patches: leave it out"
        )
    for each in convolutions:
        each.register_forward_pre_hook(_channels_last)


def _channels_last(_: nn.Module, given: tuple[Tensor]) -> tuple[Tensor]:
    return (given[0].contiguous(memory_format=torch.channels_last),)


def _unless_frozen(again: Callable[..., Any], forward: Callable[..., Any]) -> Callable[..., Any]:
    """`again` where there is a backward to come, else `forward`."""

    def run(*args: Any, **kwargs: Any) -> Any:
        return (again if torch.is_grad_enabled() else forward)(*args, **kwargs)

    return run


def _selected() -> Any:
    """Contexts that keep what products and attention make, and recompute the rest."""
    return create_selective_checkpoint_contexts(_policy)


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = op in _KEPT
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


_aten = torch.ops.aten
_KEPT = {
    *(_aten.mm.default, _aten.addmm.default, _aten.bmm.default),
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
}


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _has_norms(module: nn.Module) -> bool:
    """Whether its statistics would move twice."""
    return any(isinstance(part, _BatchNorm) for part in module.modules())


def _by_itself(network: nn.Module, how: Any) -> None:
    name = type(network).__name__
    try:
        if how == "selective":
            raise AttributeError("set_grad_checkpointing recomputes all")
        network.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AssertionError, AttributeError) as error:
        raise EngineError(
            f"engine.activation_checkpointing={how}, which {name} does not offer"
        ) from error
