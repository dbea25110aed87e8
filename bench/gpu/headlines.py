"""What the first minutes on a GPU measure and tune; `tests/gpu/pack.py` packs the same."""

from __future__ import annotations

from typing import NamedTuple


class Headline(NamedTuple):
    """A case of the benchmark at one shape, in one dtype."""

    case: str
    shape: dict[str, int]
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        sides = "x".join(map(str, self.shape.values()))
        return f"{self.case} {sides} {self.dtype}"


# Beside ours and eager, where a case has them: what ours could do instead.
RIVALS = frozenset({"fastssl tiles", "fastssl products", "fastssl prefix by prefix"})

HEADLINES = (  # those people come for first: time may run out
    Headline("ntxent", {"B": 4096, "D": 128}),
    Headline("clip", {"B": 16384, "D": 768}),
    Headline("siglip", {"B": 16384, "D": 768}),
    Headline("barlow-twins", {"B": 2048, "D": 8192}),
    Headline("mae", {"B": 256, "S": 224, "P": 16}),
    Headline("ntxent", {"B": 32768, "D": 128}),
    Headline("pairwise-lse", {"M": 16384, "N": 16384, "D": 128}),
    Headline("vicreg", {"B": 2048, "D": 8192}),
    Headline("pairwise-topk", {"M": 8192, "N": 262144, "D": 384, "K": 20}),
    Headline("visible-tokens", {"B": 256, "S": 224, "P": 16, "D": 768}),
    Headline("ntxent", {"B": 512, "D": 128}),
    Headline("ntxent", {"B": 16384, "D": 1024}),
    Headline("pairwise-lse", {"M": 16384, "N": 16384, "D": 1024}),
    Headline("pairwise-lse", {"M": 16384, "N": 16384, "D": 256}),
    Headline("pairwise-lse", {"M": 16384, "N": 16384, "D": 512}),
    Headline("pairwise-lse", {"M": 1024, "N": 16384, "D": 128}),
    Headline("pairwise-lse-self", {"N": 32768, "D": 128}),
    Headline("pairwise-lse-self", {"N": 16384, "D": 512}),
    Headline("barlow-twins", {"B": 256, "D": 8192}),
    Headline("mixed-barlow-twins", {"B": 2048, "D": 8192}),
    Headline("standardise", {"N": 2048, "D": 8192}),
    Headline("clip", {"B": 4096, "D": 128}),
    Headline("siglip", {"B": 4096, "D": 128}),
    Headline("clip", {"B": 65536, "D": 768}),
    Headline("matryoshka", {"B": 16384, "D": 768}),
    Headline("siglip", {"B": 65536, "D": 768}),
    Headline("patch-mse", {"B": 1024, "S": 224, "P": 16}),
    Headline("gather-patches", {"B": 256, "S": 224, "P": 16}),
    Headline("restore-tokens", {"B": 256, "L": 196, "D": 512}),
    Headline("gather-tokens", {"B": 256, "L": 196, "D": 512}),
    Headline("gather-table", {"B": 256, "L": 196, "D": 512}),
    Headline("scatter-tokens", {"B": 256, "L": 196, "D": 512}),
    Headline("gather-packed", {"B": 256, "L": 196, "D": 512}),
    Headline("gather-bias", {"B": 256, "L": 196, "H": 12}),
    Headline("scaled-cosine", {"B": 256, "L": 196, "D": 512}),
    Headline("linear-soft-cross-entropy", {"R": 4096, "D": 256, "K": 65536}),
    Headline("chamfer", {"G": 4992, "N": 32}, "float32"),
    Headline("ntxent", {"B": 4096, "D": 128}, "float32"),
    Headline("pairwise-lse", {"M": 8192, "N": 8192, "D": 128}, "float32"),
)

# (kernel, class) of all that the headlines launch and that has a choice, the dearest first.
TUNED = (
    ("pairwise_lse_fwd", "bfloat16-D128-masked"),
    ("pairwise_lse_bwd", "bfloat16-D128-both"),
    ("pairwise_lse_half", "bfloat16-D128-half"),
    ("pairwise_weigh", "bfloat16-plain"),
    ("pairwise_summarize", "bfloat16-plain"),
    ("pairwise_sigmoid_weigh", "bfloat16-grad"),
    ("pairwise_nested_weigh", "bfloat16-both"),
    ("pairwise_nested_summarize", "bfloat16-both"),
    ("pairwise_nested_gather", "bfloat16"),
    ("correlation_tiles", "bfloat16-pair"),
    ("correlation_tiles", "bfloat16-one"),
    ("pairwise_lse_fwd", "bfloat16-D128-all"),
    ("pairwise_lse_bwd", "bfloat16-D128-rows"),
    ("pairwise_lse_bwd", "bfloat16-D128-cols"),
    ("pairwise_lse_bwd", "bfloat16-D128-full"),
    ("correlation_finish", "bfloat16-rows"),
    ("pairwise_topk", "bfloat16-n64"),
    ("patches_mse", "bfloat16-P1024"),
    ("patches_mse_grad", "bfloat16-wide"),
    ("patches_gather", "bfloat16-wide"),
    ("standardize_forward", "bfloat16-N2048"),
    ("standardize_backward", "bfloat16-whole"),
    ("standardize_backward", "bfloat16-sums"),
    ("pairwise_lse_fwd", "bfloat16-D256-all"),
    ("pairwise_lse_bwd", "bfloat16-D256-rows"),
    ("pairwise_lse_bwd", "bfloat16-D256-cols"),
    ("pairwise_sigmoid_tiles", "bfloat16-D128-rows"),
    ("pairwise_sigmoid_tiles", "bfloat16-D128-cols"),
    ("correlation_settle", "bfloat16-pair-mirror"),
    ("tokens_restore", "bfloat16-restore"),
    ("tokens_gather", "bfloat16-restore"),
    ("tokens_gather", "bfloat16-rows"),
    ("tokens_scatter", "bfloat16-rows"),
    ("tokens_scatter", "bfloat16-table"),
    ("tokens_gather", "bfloat16-packed"),
    ("standardize_forward", "bfloat16-N256"),
    ("standardize_backward", "bfloat16-N256"),
    ("scaled_cosine_forward", "bfloat16"),
    ("scaled_cosine_backward", "bfloat16"),
    ("bias_pick", "bfloat16"),
    ("bias_unpick", "bfloat16"),
    ("linear_forward", "bfloat16"),
    ("linear_backward", "bfloat16-rows"),
    ("linear_backward", "bfloat16-cols"),
    ("chamfer_nearest", "float32"),
    ("chamfer_pull", "float32"),
    ("pairwise_summarize", "float32-plain"),
    ("pairwise_weigh", "float32-plain"),
    ("pairwise_lse_fwd", "bfloat16-long-all"),
    ("pairwise_lse_fwd", "bfloat16-long-masked"),
    ("pairwise_lse_bwd", "bfloat16-long-both"),
    ("pairwise_lse_bwd", "bfloat16-long-rows"),
    ("pairwise_lse_bwd", "bfloat16-long-cols"),
    ("pairwise_lse_fwd", "float32-all"),
    ("pairwise_lse_bwd", "float32-rows"),
    ("pairwise_lse_bwd", "float32-cols"),
)
