"""CLIP's loss: each image finds its text among all, and each text its image."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.distributed import Group, all_gather_rows, all_reduce_sum, world_size
from fastssl.kernels.common import accumulator, full_precision
from fastssl.kernels.pairwise import as_number
from fastssl.losses import _ahead
from fastssl.losses._checks import check_batch, check_not_negative, check_within
from fastssl.losses._contrastive import info_nce, lse_of_others
from fastssl.losses._open_clip import ImageTextLoss, logits
from fastssl.losses.hcl import debiased


class CLIPLoss(ImageTextLoss):
    """The mean of two cross-entropies, of images over all texts and of texts over all images.

    The formula is `clip_reference`, in nats.  A pair's own score is left out of both sums
    and comes back as -log sigmoid(own - others), which keeps its digits where the match is near
    perfect.  One pass over the pairs gives both sums.

    Shapes   image_features, text_features (B, D): a pair in each row, any float dtype, used as they
             are: normalize them first.  logit_scale: a number or a tensor of one element, with
             gradient, as it multiplies (the model learns its logarithm, and caps it by a clamp of
             the parameter after the step, as `fastssl.methods.clip` does, not by one in the
             forward).  logit_bias: as open_clip takes it; a shift of all scores, which changes
             nothing: its gradient is zero.
             label_smoothing: the share of the target that is spread over all pairs.  tau_plus: the
             share of matches among what counts as others, for which their sum is corrected.  With a
             locked image tower (LiT) image_features ask for no gradient, and none is made.
    Returns  scalar float32 (float64 for float64); with output_dict=True as "contrastive_loss" of a
             dict.  0 <= loss; ln(W B) on W ranks where all embeddings agree.
    Raises   ValueError: other shapes, dtypes or devices, or other ones on another rank; other
             strategies; use_horovod; a label_smoothing outside [0, 1], a tau_plus outside [0, 1),
             or with one pair alone.  A non-finite input is no error: it gives a non-finite loss.
    Ranks    the mean over ranks of value and gradient is the joined batch's, the scale's included.
             "gather": the texts are gathered once, in their own dtype, and this rank's images meet
             them all.  "ring": the texts go round, and no rank holds them all.
             process_group=LOCAL contrasts within each rank's batch.
    On a CPU in one process the gradient is made with the loss, and backward only multiplies.
    Source   Radford et al. 2021, CLIP, arXiv:2103.00020, figure 3.  Smoothing: Szegedy et al. 2016,
             arXiv:1512.00567, section 7.  Correction: Chuang et al. 2020, Debiased Contrastive
             Learning, arXiv:2007.00224, eq. 8, for either direction.  LiT: Zhai et al. 2022,
             arXiv:2111.07991.
    Differs  from open_clip.loss.ClipLoss, whose value and gradient it has in one process: exact
             across ranks whatever local_loss and gather_with_grad say, where open_clip's default
             has 1 / W of the gradient; the group tells rank and world_size, whatever is given for
             them; labels are not cached, so that there are no labels and prev_num_logits; holds no
             (B, B) logits; sums in float32 whatever the dtype.  get_logits and get_ground_truth,
             for a subclass with a forward of its own, give open_clip's values, and hold them.

    >>> x = torch.eye(2)
    >>> round(CLIPLoss()(x, x, 10.0).item(), 6)  # log1p(e^-10)
    4.5e-05
    """

    use_horovod = False

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        strategy: str = "gather",
        label_smoothing: float = 0.0,
        tau_plus: float = 0.0,
        process_group: Group = None,
    ) -> None:
        if use_horovod:
            raise ValueError("use_horovod=True: ranks meet through torch.distributed alone")
        super().__init__(cache_labels, strategy, process_group)
        check_within(0, 1, label_smoothing=label_smoothing)
        check_not_negative(tau_plus=tau_plus)
        if tau_plus >= 1:
            raise ValueError(f"tau_plus must be in [0, 1), got {tau_plus}")
        self.label_smoothing, self.tau_plus = label_smoothing, tau_plus
        self.local_loss, self.gather_with_grad = local_loss, gather_with_grad

    def get_logits(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """All scores of images (rows) with texts, and of texts with images.

        Of W ranks' pairs (W B, W B); with local_loss this rank's rows alone, (B, W B).  Averaged
        over ranks, the gradients are exact.
        """
        x, t = image_features, text_features
        images, texts = (all_gather_rows(z, self.process_group) for z in (x, t))
        if not self.local_loss:
            x, t = images, texts
        numbers = logit_scale, logit_bias
        return logits(x, texts, *numbers), logits(t, images, *numbers)

    def get_ground_truth(self, device: torch.device | str, num_logits: int) -> Tensor:
        """The column of its match for each of `num_logits` rows of `get_logits`, int64."""
        own = torch.arange(num_logits, device=device)
        return own + num_logits * self.rank if self.local_loss else own

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        x, t, group = image_features, text_features, self.process_group
        ahead, scale = not self.tau_plus and _ahead.fits(group, x, t), logit_scale
        if not ahead:
            least = 2 if self.tau_plus else 1
            check_batch(group, image_features=x, text_features=t, least=least)
        if isinstance(scale, Tensor) and scale.ndim:  # some models learn one of shape (1,)
            if scale.numel() != 1:
                raise ValueError(f"logit_scale must be one number, got {tuple(scale.shape)}")
            scale = scale.reshape(())
        if ahead:
            loss = _ahead.clip(x, t, as_number("logit_scale", scale, x))
        else:
            loss = self._loss(x, t, scale)
        if self.label_smoothing:
            loss = loss + self.label_smoothing * self._below_own(x, t, scale)
        if isinstance(logit_bias, Tensor):
            loss = loss + 0 * logit_bias.sum()  # no parameter is left without a gradient
        return {"contrastive_loss": loss} if output_dict else loss

    def _loss(self, x: Tensor, t: Tensor, scale: float | Tensor) -> Tensor:
        acc, group = accumulator(x.dtype), self.process_group
        own = (x.to(acc) * t.to(acc)).sum(1) * scale
        rows, cols = lse_of_others(x, t, scale, group, self.strategy, both=True)
        if self.tau_plus:
            log_n = math.log(len(x) * world_size(group) - 1)
            rows, cols = (
                log_n + debiased(lse - log_n, own, self.tau_plus, -scale) for lse in (rows, cols)
            )
        return (info_nce(own, rows) + info_nce(own, cols)).mean() / 2

    def _below_own(self, x: Tensor, t: Tensor, scale: float | Tensor) -> Tensor:
        """How far the mean of all scores is below that of the pairs': no scores are made for it."""
        acc, group = accumulator(x.dtype), self.process_group
        with full_precision(x.device):
            wide, texts = x.to(acc), t.to(acc)
            mean = all_reduce_sum(texts.mean(0), group) / world_size(group)
            return scale * (wide * (texts - mean)).sum(1).mean()


def clip_reference(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    label_smoothing: float = 0.0,
    tau_plus: float = 0.0,
) -> Tensor:
    """The formula, all (B, B) scores at once, in one process."""
    scores = logit_scale * image_features @ text_features.T
    n, pair = len(scores) - 1, torch.arange(len(scores), device=scores.device)
    smooth = label_smoothing
    if not tau_plus:
        sides = [F.cross_entropy(s, pair, label_smoothing=smooth) for s in (scores, scores.T)]
        return (sides[0] + sides[1]) / 2
    own, value = scores.diagonal().exp(), 0 * scores.sum()
    for s in (scores, scores.T):
        mean = (s.exp().sum(1) - own) / n
        mass = ((mean - tau_plus * own) / (1 - tau_plus)).clamp(min=(-logit_scale).exp())
        value = value - (own / (own + n * mass)).log().mean() / 2
        value = value + smooth * (own.log().mean() - s.mean()) / 2
    return value
