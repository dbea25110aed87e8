"""MAE on signals: spans of a waveform or a series are hidden, and predicted from the rest.

    L patches of p samples; L - K of them hidden, in runs of `span` neighbors
    loss = mean over hidden patches of the squared error of their samples

Neighboring patches of a signal nearly tell one another: a run of them must be understood to be
filled, single ones need only be joined up.
Source: He et al. 2022, MAE, arXiv:2111.06377; hidden runs of frames as in Liu et al. 2020, TERA,
arXiv:2007.06028, section 3.2; MAE on sound, Huang et al. 2022, arXiv:2207.06405, which reads
spectrograms where this reads the waveform.
"""

from torch import Tensor, nn

from fastssl.masking import Masking, span_masking

from .configs import SignalMAEConfig
from .mae import MAE


class SignalMAE(MAE):
    preset, views, couples_batch = "signals", 1, False
    cfg: SignalMAEConfig

    def __init__(self, encoder: nn.Module, cfg: SignalMAEConfig):
        super().__init__(encoder, cfg)
        if len(self.masked.grid) != 1:
            got = self.masked.grid
            raise ValueError(f"method.name=signal_mae reads signals, with a vit_signal; got {got}")

    def mask(self, seeds: Tensor, keep: int) -> Masking:
        return span_masking(seeds, self.masked.num_patches, keep, self.cfg.span)
