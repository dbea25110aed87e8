"""Similarities of all pairs, streamed over tiles: log-sum-exp, sigmoid, top n, masks."""

from .lse import as_number, blockwise, check_pairs, pairwise_lse, pairwise_lse_reference
from .lse_torch import Pairs
from .masks import Masks, PairMask, different_group, exclude_self, exclude_self_and_pair, same_group
from .sigmoid import pairwise_sigmoid, pairwise_sigmoid_grads
from .sigmoid_torch import Need as SigmoidNeed
from .sigmoid_torch import Results as SigmoidResults
from .topk import pairwise_topk

__all__ = [
    "Masks",
    "PairMask",
    "Pairs",
    "SigmoidNeed",
    "SigmoidResults",
    "as_number",
    "blockwise",
    "check_pairs",
    "different_group",
    "exclude_self",
    "exclude_self_and_pair",
    "pairwise_lse",
    "pairwise_lse_reference",
    "pairwise_sigmoid",
    "pairwise_sigmoid_grads",
    "pairwise_topk",
    "same_group",
]
