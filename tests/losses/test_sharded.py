"""Log-sum-exps over a batch that is spread over ranks: both strategies are one process's."""

import gc

import pytest
import torch
import torch.distributed as dist

from fastssl.kernels import exclude_self, same_group
from fastssl.kernels.pairwise import lse_torch as pairwise_torch
from fastssl.losses._sharded import Rule, check_strategy, sharded_lse
from tests.ranks import run_ranks

B, N, D = 5, 7, 4  # rows and keys of each rank


def data(rank):
    generator = torch.Generator().manual_seed(rank)
    q, k = (torch.randn(n, D, generator=generator, dtype=torch.float64) for n in (B, N))
    return {
        **{"q": q, "k": k, "images": torch.arange(B) // 2 + 3 * rank},
        **{"rows": torch.arange(B) % 3, "cols": torch.arange(N) % 3},
        **{"scales": torch.rand(B, generator=generator, dtype=torch.float64) + 0.5},
    }


def weights(x, shift):
    """Upstream gradients, no two alike."""
    return torch.cos(torch.arange(len(x), dtype=x.dtype) + shift)


def two(x, **options):
    return sharded_lse(x["q"], x["k"], x["scale"], **options)


def groups(x, **options):
    rule = Rule(same_group, x["rows"], x["cols"])
    return sharded_lse(x["q"], x["k"], x["scale"], rules=[rule], **options)


def each_its_scale(x, **options):
    return sharded_lse(x["q"], x["k"], x["scales"], **options)


def itself(x, **options):
    rule = Rule(exclude_self, x["images"], x["images"])
    return sharded_lse(x["q"], x["q"], x["scale"], rules=[rule], **options)


CASES = {"two": two, "groups": groups, "each its scale": each_its_scale, "itself": itself}
LEAVES = ("q", "k", "scale", "scales")


def step(case, x, both, shift, **options):
    """Values, and the gradient of a weighted sum of them to every leaf."""
    leaves = {key: x[key].clone().requires_grad_() for key in LEAVES}
    rows, cols = case({**x, **leaves}, both=both, **options)
    total = (rows * weights(rows, shift)).sum() + (cols * weights(cols, shift + 0.5)).sum()
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return rows.detach(), cols.detach(), dict(zip(LEAVES, found, strict=True))


def counted(rank, world):
    """The pairs of each call, as (rank, rank) of their blocks, and the most blocks of keys held."""
    calls, held, statistics = [], [], pairwise_torch.statistics
    x = torch.full((N + 4, D + 1), float(rank)) + 0.1

    def seen(pairs, both):
        calls.append((int(pairs.q[0, 0]), int(pairs.k[0, 0])))
        tensors = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.shape == x.shape]
        held.append(len({t.data_ptr() for t in tensors}))
        return statistics(pairs, both)

    pairwise_torch.statistics = seen
    found = {}
    for name in ("itself", "two"):
        keys = x if name == "itself" else x + 0
        calls.clear(), held.clear()
        sharded_lse(x, keys, 1.0, both=True, strategy="ring")
        found[name] = list(calls), max(held) - (1 if keys is x else 2)  # beside one's own
    pairwise_torch.statistics = statistics
    return found


def each_rank(rank, world):
    x, seen = {**data(rank), "scale": torch.tensor(1.5, dtype=torch.float64)}, {}
    for name, case in CASES.items():
        for both in (False, True):
            for strategy in ("gather", "ring"):
                key = f"{name} {strategy} {both}"
                seen[key] = step(case, x, both, 10.0 * rank, strategy=strategy)
    pair = dist.new_group([0, 1])
    if rank < 2:
        seen["pair"] = two(x, both=True, process_group=pair, strategy="ring")
    seen["counted"] = counted(rank, world)
    return seen


@pytest.fixture(scope="module", params=[3, 4], ids=lambda w: f"W={w}")
def ranks(request):
    return run_ranks(each_rank, request.param)


def joined(W):
    """The joined batch, ids told apart as the ranks have them."""
    parts = [data(r) for r in range(W)]
    both = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    return {**both, "scale": torch.tensor(1.5, dtype=torch.float64)}


def truth(case, W, both):
    """As each rank should see it."""
    x = joined(W)
    leaves = {key: x[key].clone().requires_grad_() for key in LEAVES}
    rows, cols = case({**x, **leaves}, both=both)
    total = rows.new_zeros(())
    for r, (mine, theirs) in enumerate(zip(rows.chunk(W), cols.chunk(W), strict=True)):
        total = total + (mine * weights(mine, 10.0 * r)).sum()
        total = total + (theirs * weights(theirs, 10.0 * r + 0.5)).sum()
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return rows.detach(), cols.detach(), dict(zip(LEAVES, found, strict=True))


@pytest.mark.parametrize("both", [False, True], ids=["rows", "both"])
@pytest.mark.parametrize("strategy", ["gather", "ring"])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_one_processs(ranks, name, strategy, both):
    W = len(ranks)
    rows, cols, grads = truth(CASES[name], W, both)
    seen = [each[f"{name} {strategy} {both}"] for each in ranks]
    torch.testing.assert_close(torch.cat([each[0] for each in seen]), rows)
    torch.testing.assert_close(torch.cat([each[1] for each in seen]), cols)
    for key, want in grads.items():
        found = [each[2][key] for each in seen]
        if want is None:
            assert all(g is None for g in found)
        elif key == "scale":
            torch.testing.assert_close(torch.stack(found).sum(), want)
        else:
            torch.testing.assert_close(torch.cat(found), want)


def test_a_ring_computes_every_unordered_pair_of_blocks_once(ranks):
    W = len(ranks)
    met = [tuple(sorted(pair)) for each in ranks for pair in each["counted"]["itself"][0]]
    assert sorted(met) == [(a, b) for a in range(W) for b in range(a, W)]
    met = [pair for each in ranks for pair in each["counted"]["two"][0]]
    assert sorted(met) == [(a, b) for a in range(W) for b in range(W)]


def test_a_ring_holds_two_blocks_of_others_keys_at_most(ranks):
    for each in ranks:
        for name in ("itself", "two"):
            assert each["counted"][name][1] <= 2, name


def test_a_group_has_its_own_ring(ranks):
    parts = [data(0), data(1)]
    q, k = (torch.cat([part[key] for part in parts]) for key in ("q", "k"))
    rows, cols = sharded_lse(q, k, 1.5, both=True)
    for r in range(2):
        torch.testing.assert_close(ranks[r]["pair"][0], rows.chunk(2)[r])
        torch.testing.assert_close(ranks[r]["pair"][1], cols.chunk(2)[r])


def test_refuses_a_strategy():
    with pytest.raises(ValueError, match="strategy must be one of gather, ring, got 'tree'"):
        check_strategy("tree")
