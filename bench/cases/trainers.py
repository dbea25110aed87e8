"""Who takes the benchmark's training steps: a plain loop, or the engine; and MAE written out twice.

Both are called with a step's inputs (images of each view, then the samples' seeds), take one step
and return its loss; `steps` counts them, `start` and `weights()` are a few of the encoder's weights
before and now.
"""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.kernels import patch_mse, restore_tokens
from fastssl.masking import random_masking

Weights = dict[str, Tensor]


def copy_watched(state: Weights) -> Weights:
    """The first and the last weights of a ViT, as float64 copies."""
    last = max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    first = ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight")
    names = (*first, f"blocks.{last}.mlp.fc2.weight")
    return {name: state[name].detach().double().clone() for name in names}


def make_batch(inputs: tuple[Tensor, ...]) -> dict[str, Any]:
    """The batch that a method reads."""
    *views, seeds = inputs
    return {"views": views, "index": seeds, "seeds": seeds}


def _optimizer(model: nn.Module, options: dict[str, Any], dtype: torch.dtype) -> Any:
    """The engine's optimizer, and in float64, which its LARS has not, timm's of that name."""
    from fastssl.engine.optim import OptimConfig, build_optimizer, parameter_groups

    cfg = OptimConfig(**options)
    if dtype != torch.float64:
        return build_optimizer(model, cfg)
    from timm.optim import create_optimizer_v2

    groups = parameter_groups(model, cfg.weight_decay)
    return create_optimizer_v2(groups, cfg.name, lr=cfg.lr, **cfg.options())


class Loop:
    """The loop everybody writes: `forward(*inputs)` is the loss, under autocast in 16 bits."""

    def __init__(
        self,
        model: nn.Module,
        encoder: nn.Module,
        forward: Callable[..., Tensor],
        optim: dict[str, Any],
        dtype: torch.dtype,
    ) -> None:
        self.encoder, self.forward, self.dtype = encoder, forward, dtype
        self.optimizer, self.steps = _optimizer(model, optim, dtype), 0
        self.start = self.weights()

    def __call__(self, *inputs: Tensor) -> Tensor:
        half = self.dtype in (torch.bfloat16, torch.float16)
        with torch.autocast(inputs[0].device.type, self.dtype if half else None, enabled=half):
            loss = self.forward(*inputs)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.steps += 1
        return loss.detach()

    def weights(self) -> Weights:
        """The watched weights as they are now."""
        return copy_watched(self.encoder.state_dict())


class _World:
    """The process group of one that DeepSpeed wants, there as long as an engine is."""

    stack, users = ExitStack(), 0

    @classmethod
    def enter(cls, device: torch.device) -> None:
        from fastssl.engine.launch import session

        if cls.users == 0:
            cls.stack.enter_context(session(device.type))
        cls.users += 1

    @classmethod
    def leave(cls) -> None:
        cls.users -= 1
        if cls.users == 0:
            cls.stack.close()


class UnderEngine:
    """The method under fastssl's engine, DeepSpeed ZeRO stage 1, in a world of one."""

    def __init__(
        self, method: Any, optim: dict[str, Any], dtype: torch.dtype, batch_size: int
    ) -> None:
        from fastssl.engine.config import EngineConfig
        from fastssl.engine.engine import Engine
        from fastssl.engine.optim import OptimConfig

        device = next(method.parameters()).device
        _World.enter(device)
        self._end = weakref.finalize(self, _World.leave)
        precision = "bf16" if dtype == torch.bfloat16 else "fp32"
        cfg = EngineConfig.model_validate({"precision": precision})
        self.lr, self.steps = optim["lr"], 0
        chosen = OptimConfig(**optim)
        self.engine = Engine(method, chosen, cfg, device=device, batch_size=batch_size)
        self.start = self.weights()

    def __call__(self, *inputs: Tensor) -> Tensor:
        step = self.engine.step(make_batch(inputs), self.lr)
        self.steps += 1
        return step.metrics["loss"]

    def weights(self) -> Weights:
        """The watched weights' float32 masters as they are now."""
        with tempfile.TemporaryDirectory() as name:
            self.engine.snapshot(copied=False)(Path(name))
            file = self.engine.encoder_reader()(Path(name))
            return copy_watched({key: file.tensor(key) for key in file.kinds})


def mae_reference(method: Any, images: Tensor, seeds: Tensor) -> Tensor:
    """MAE as its authors wrote it: every patch embedded, every token predicted, then chosen from.

    Source: He et al. 2022, arXiv:2111.06377, section 3, "Simple implementation".
    """
    masking = random_masking(seeds, method.masked.num_patches, method.visible)
    vit, decoder = method.encoder, method.decoder
    prefix = vit.num_prefix_tokens
    tokens = vit.patch_embed(method.cast(images)) + vit.pos_embed[:, prefix:]
    tokens = tokens.gather(1, _wide(masking.visible, tokens))
    cls = (vit.cls_token + vit.pos_embed[:, :prefix]).expand(len(tokens), -1, -1)
    tokens = decoder.embed(vit.norm(vit.blocks(torch.cat([cls, tokens], 1))))
    order, mask, pos = masking.restore, decoder.mask_token, decoder.pos_embed
    full = restore_tokens(tokens[:, prefix:], order, mask, pos, impl="reference")
    full = torch.cat([tokens[:, :prefix], full], 1)
    for block in decoder.blocks:
        full = block(full)
    pixels = decoder.head(decoder.norm(full))[:, prefix:]
    pixels = pixels.gather(1, _wide(masking.masked, pixels))
    patch = method.masked.patch
    return patch_mse(pixels, images, masking.masked, patch, impl="reference").mean()


def _wide(ids: Tensor, tokens: Tensor) -> Tensor:
    return ids[..., None].expand(-1, -1, tokens.shape[-1])


class MAELightly(nn.Module):
    """MAE of lightly's parts, as its example has it, around the modules of our `method`.

    Its masked ViT and decoder keep their own ways with hidden patches; their blocks are ours.
    """

    def __init__(self, lightly: Any, method: Any) -> None:
        super().__init__()
        ours, vit = method.decoder, method.encoder
        modules, self.utils = lightly.models.modules, lightly.models.utils
        prefix, (L, width) = vit.num_prefix_tokens, ours.pos_embed.shape
        self.patch, self.visible, self.prefix = method.masked.patch[0], method.visible, prefix
        self.places = L
        self.backbone = modules.MaskedVisionTransformerTIMM(
            vit, weight_initialization="skip", pos_embed_initialization="skip"
        )
        self.embed, self.head = ours.embed, ours.head
        self.decoder = modules.MaskedVisionTransformerDecoderTIMM(
            L, width, depth=0, num_heads=1, num_prefix_tokens=prefix, initialize_weights=False
        )
        self.decoder.blocks, self.decoder.norm = nn.Sequential(*ours.blocks), ours.norm
        positions = torch.cat([torch.zeros_like(ours.pos_embed[:prefix]), ours.pos_embed])
        self.decoder.pos_embed = nn.Parameter(positions.detach()[None])
        self.decoder.mask_token = nn.Parameter(ours.mask_token.detach()[None, None].clone())

    def forward(self, images: Tensor, seeds: Tensor) -> Tensor:
        utils, B = self.utils, len(images)
        chosen = random_masking(seeds, self.places, self.visible)
        kept = F.pad(chosen.visible + self.prefix, (self.prefix, 0))  # the class token is place 0
        hidden = chosen.masked + self.prefix
        tokens = self.embed(self.backbone.encode(images, idx_keep=kept))
        masks = utils.repeat_token(self.decoder.mask_token, (B, self.decoder.sequence_length))
        full = utils.set_at_index(masks.to(tokens.dtype), kept, tokens)
        decoded = self.decoder(full)
        pred = self.head(utils.get_at_index(decoded, hidden))
        target = utils.get_at_index(utils.patchify(images, self.patch), chosen.masked)
        return F.mse_loss(pred, utils.normalize_mean_var(target))
