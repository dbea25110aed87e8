"""A model's buffers, to be put back as they were."""

import torch
from torch import nn


class Buffers:
    """The buffers of `model` as they are now, those that are None included."""

    def __init__(self, model: nn.Module) -> None:
        self._of = [(module, dict(module._buffers)) for module in model.modules()]
        self._values = [(buffer, buffer.clone()) for buffer in model.buffers()]

    @torch.no_grad()
    def restore(self) -> None:
        """Also where modules have been given others since, or more of them."""
        for buffer, value in self._values:
            buffer.copy_(value)
        for module, buffers in self._of:
            for name in module._buffers.keys() - buffers.keys():
                del module._buffers[name]
            module._buffers.update(buffers)
