"""Similarities of all pairs, streamed over tiles: log-sum-exp, sigmoid, top n, masks."""

from .lse import as_number, blockwise, check_pairs, pairwise_lse, pairwise_lse_reference
from .lse_torch import SAFE, Pairs
from .lse_torch import ahead as lse_ahead
from .masks import (
    Masks,
    PairMask,
    as_masks,
    different_group,
    exclude_self,
    exclude_self_and_pair,
    same_group,
)
from .nested import nested_matches, pairwise_lse_nested, takes_nested
from .sigmoid import pairwise_sigmoid, pairwise_sigmoid_grads
from .sigmoid_torch import LINEAR
from .sigmoid_torch import Need as SigmoidNeed
from .sigmoid_torch import Results as SigmoidResults
from .topk import pairwise_topk

__all__ = [
    "LINEAR",
    "SAFE",
    "Masks",
    "PairMask",
    "Pairs",
    "SigmoidNeed",
    "SigmoidResults",
    "as_masks",
    "as_number",
    "blockwise",
    "check_pairs",
    "different_group",
    "exclude_self",
    "exclude_self_and_pair",
    "lse_ahead",
    "nested_matches",
    "pairwise_lse",
    "pairwise_lse_nested",
    "pairwise_lse_reference",
    "pairwise_sigmoid",
    "pairwise_sigmoid_grads",
    "pairwise_topk",
    "same_group",
    "takes_nested",
]
