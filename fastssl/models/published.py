"""The layouts in which encoders' weights are published, as timm's own conversion wants them.

    {"teacher": {"module.backbone.KEY"}}          DINO, iBOT; without module.: DINOv2 and DINOv3
    {"model": {"KEY", "decoder_blocks..."}}       MAE
    {"target_encoder": {"module.KEY"}}            I-JEPA
    {"teacher.backbone.KEY", "student..."}        DINOv2, a whole training state
    blocks.CHUNK.BLOCK.                           DINOv2 and DINOv3 trained by FSDP: blocks.BLOCK.

The keys within (register_tokens, storage_tokens, w12 and w3, ls1.gamma, qkv.bias with bias_mask,
the mask token, positions of another grid) are timm's to convert.  Of several networks the teacher
is taken.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

Weights = Mapping[str, Tensor]
_NETWORKS = ("teacher", "target_encoder", "model", "state_dict", "encoder")
_PREFIXES = ("module.", "_orig_mod.", "teacher.", "backbone.")
_CHUNK = re.compile(r"^blocks\.\d+\.(\d+)\.")
_TRAINING = re.compile(r"decoder_(embed|pos_embed|blocks|norm|pred)\b|mask_token$")  # MAE's rest


def network_in(found: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state_dict of one network in what a training has saved."""
    while not any(isinstance(value, Tensor) for value in found.values()):
        named = (name for name in _NETWORKS if isinstance(found.get(name), Mapping))
        name = next(named, None)
        if name is None:
            break
        found = found[name]
    return found


def backbone_in(weights: Weights, own: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of the encoder among those of a network, and the names of those left out: heads,
    a decoder, a mask token.  Names with which the model's `own` begin stay as they are."""
    kept, left = dict(weights), []
    while prefix := next((p for p in _PREFIXES if _stands(p, kept) and not _stands(p, own)), ""):
        left += [key for key in kept if not key.startswith(prefix)]
        kept = {k.removeprefix(prefix): v for k, v in kept.items() if k.startswith(prefix)}
    if not any(_CHUNK.match(key) for key in own):
        kept = {_CHUNK.sub(r"blocks.\1.", key): value for key, value in kept.items()}
    rest = [key for key in kept if _TRAINING.match(key) and key not in own]
    decoder = [key for key in rest if not key.startswith("mask_token")]  # by that timm knows DINOv2
    return {k: v for k, v in kept.items() if k not in decoder}, left + rest


def check_biases(weights: Weights, model: nn.Module) -> None:
    """Raise ValueError where DINOv3's biases would be lost: those of keys, which are masked in what
    was published, and all of them where the model has none."""
    if "storage_tokens" not in weights:
        return
    held = {name for name, _ in model.named_parameters()}
    for key in [key for key in weights if key.endswith("attn.qkv.bias")]:
        q, k, v = weights[key].chunk(3)
        stem = key.removesuffix("qkv.bias")
        if f"{stem}q_bias" not in held and (q.any() or v.any()):
            raise ValueError(
                f"{key} is not 0, and the model has none: take timm's model of this size whose "
                "name ends in _qkvb"
            )
        if f"{key}_mask" not in weights and k.any():
            raise ValueError(f"{key} has biases of keys, which timm's model has not")


def _stands(prefix: str, names: Mapping[str, Any]) -> bool:
    return any(name.startswith(prefix) for name in names)
