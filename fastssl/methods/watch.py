"""Numbers that tell of collapse, for a method's `loss` to log beside the loss.

    return {"loss": loss, **of_embeddings(*z), **of_teacher(logits, temperature, center)}

Each is a 0-d float32 tensor without gradient, made without waiting for the device, of this rank's
rows; what is logged is its mean over ranks.  Embeddings are the encoder's, before a head: one that
ends in a batch norm spreads whatever it gets.  `fastssl.run.collapse` reads the entries by their
names, also behind a prefix ("patch_teacher_entropy" belongs with "patch_chance"), and says what
they mean.

    embedding_std     sqrt(D) times the standard deviation over rows of x / |x|, averaged over the
                      D features: 1 spread over the sphere, 0 collapsed
    embedding_rank    (sum l)^2 / sum l^2 of the eigenvalues l of the covariance of x / |x|: how
                      many directions vary, 1 .. min(N - 1, D)
    chance            ln K nats: the cross-entropy of a student that knows nothing
    teacher_entropy   the mean entropy of the teacher's distribution of a row, 0 .. ln K nats
    center_kl         KL of the mean of these distributions to the uniform one, 0 .. ln K nats
    prototypes_used   prototypes that are the likeliest of some row, of the min(N, K) possible

chance - center_kl - teacher_entropy is what a row's distribution says of its image, in nats: 0
where all rows have the same one, whether that is flat or a single prototype.
Source: Chen & He 2021, SimSiam, arXiv:2011.10566, section 4.1 (spread); Caron et al. 2021, DINO,
arXiv:2104.14294, section 5.3 (entropy and KL).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 256  # rows whose directions are counted, and whose distributions are at one time in memory


@torch.no_grad()
def of_embeddings(*views: Tensor) -> dict[str, Tensor]:
    """embedding_std and embedding_rank of embeddings (N, D), any float; of several views the mean.

    The rank is that of the first 256 rows: at D = 8192 a product of 256 x 8192 with its transpose.
    """
    each = [_spread(x.detach()) for x in views]
    std, rank = torch.stack([torch.stack(pair) for pair in each]).mean(0).unbind()
    return {"embedding_std": std, "embedding_rank": rank}


def _spread(x: Tensor) -> tuple[Tensor, Tensor]:
    x = F.normalize(x.float(), dim=-1)
    std = x.std(0, correction=0).mean() * math.sqrt(x.shape[1])
    some = x[:ROWS]
    some = some - some.mean(0)
    gram = some @ some.T if len(some) < some.shape[1] else some.T @ some
    total, squares = gram.diagonal().sum(), gram.square().sum()
    return std, total.square() / squares.clamp_min(torch.finfo(torch.float32).tiny)


@torch.no_grad()
def of_teacher(
    logits: Tensor, temperature: float = 1.0, center: Tensor | None = None
) -> dict[str, Tensor]:
    """chance, teacher_entropy, center_kl and prototypes_used of softmax((logits - center) / t).

    logits (N, K), any float; center (K,), or (1, K).
    """
    rows = (logits.detach()[n : n + ROWS].float() for n in range(0, len(logits), ROWS))
    shifted = (part if center is None else part - center.detach().float() for part in rows)
    return _of_distributions(len(logits), [_sums((x / temperature).softmax(-1)) for x in shifted])


@torch.no_grad()
def of_assignments(q: Tensor) -> dict[str, Tensor]:
    """As `of_teacher`, of distributions that are there: q (N, K), rows that sum to 1 (Sinkhorn)."""
    parts = [_sums(q.detach()[n : n + ROWS].float()) for n in range(0, len(q), ROWS)]
    return _of_distributions(len(q), parts)


def _sums(p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of rows p (R, K): the sum of their entropies, their sum, which prototypes are likeliest."""
    used = torch.zeros_like(p[0]).index_fill(0, p.argmax(1), 1.0)
    return torch.special.entr(p).sum(), p.sum(0), used


def _of_distributions(N: int, parts: list[tuple[Tensor, Tensor, Tensor]]) -> dict[str, Tensor]:
    entropies, sums, used = (torch.stack(column) for column in zip(*parts, strict=True))
    mean, K = sums.sum(0) / N, sums.shape[1]
    chance = torch.full_like(mean[0], math.log(K))
    return {
        "chance": chance,
        "teacher_entropy": entropies.sum() / N,
        "center_kl": chance - torch.special.entr(mean).sum(),
        "prototypes_used": used.amax(0).sum() / min(N, K),
    }


def prefixed(prefix: str, entries: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same entries, of one of a method's several losses: PREFIX_teacher_entropy ..."""
    return {f"{prefix}_{name}": value for name, value in entries.items()}
