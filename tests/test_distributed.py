from functools import partial

import pytest
import torch
import torch.distributed as dist

from fastssl import distributed as D
from fastssl.kernels import column_moments, frobenius_sq, standardize
from tests.oracle import grads
from tests.ranks import run_ranks

B = 3  # rows on a rank


def rows(rank, *shape, dtype=torch.float32):
    """Different on every rank."""
    generator = torch.Generator().manual_seed(100 + rank)
    return torch.randn(B, *shape, generator=generator).to(dtype)


def upstream(rank, like):
    """This rank's weight for each element of a collective's result."""
    generator = torch.Generator().manual_seed(200 + rank)
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.dtype)


def refusal(call):
    try:
        call()
    except (ValueError, RuntimeError) as error:
        return str(error)
    return "not refused"


def twice(x):
    """The sum's gradient alone: as a constant it has no second derivative that is not zero."""
    return torch.autograd.grad(D.all_reduce_sum(x).sum(), x, create_graph=True)


def without_cpu_backend(rank):
    """The checks of a group that moves no CPU tensors: they go by a gloo twin, made once."""
    real, dist.get_backend_config = dist.get_backend_config, lambda group: "cuda:nccl"
    try:
        votes = [D.all_agree(True), D.all_agree(rank != 1)]
        words = refusal(lambda: D.require_even(torch.zeros(B + rank)))
    finally:
        dist.get_backend_config = real
    return {"votes": votes, "words": words, "groups": len(D._host_groups)}


def mistaken(rank, where, *, first):
    """A mistake that rank `where` meets: in what only the first does, or in what each does."""

    def mend():
        if rank == where:
            raise ValueError("no such folder")
        return rank

    if first:
        return D.from_first(mend)
    with D.alike():
        return mend()


def each_rank(rank, world):
    """Everything in one start of the ranks: it costs seconds."""
    seen = {"size": (D.world_size(), D.rank(), D.world_size(D.LOCAL), D.rank(D.LOCAL))}

    def value_and_grad(fn, *inputs):
        return grads(fn, inputs, lambda out: (out * upstream(rank, out)).sum())

    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x = rows(rank, 2, 5, dtype=dtype)
        seen[f"gather {dtype}"] = value_and_grad(D.all_gather_rows, x)
        seen[f"reduce {dtype}"] = value_and_grad(D.all_reduce_sum, x)
    for where in (0, 1):
        calls = [partial(mistaken, rank, where, first=first) for first in (True, False)]
        seen[f"mistake {where}"] = [refusal(call) for call in calls]
    seen["first"] = mistaken(rank, -1, first=True)
    x = rows(rank, 4)
    seen["gather expanded"] = grads(D.all_gather_rows, [x.T.contiguous().T], lambda out: out.sum())
    seen["plain"] = [
        D.all_gather_nograd(torch.tensor([rank], dtype=dtype))
        for dtype in (torch.int64, torch.bool, torch.uint8, torch.bfloat16)
    ]
    seen["nograd"] = D.all_gather_nograd(x.requires_grad_()).requires_grad
    seen["twice"] = refusal(lambda: twice(x))
    seen["object"] = D.broadcast_object({"from": rank}, src=1)
    one = torch.ones(world, dtype=torch.bfloat16)
    one[rank] = 256  # and 257 is none
    seen["halves"] = D.all_reduce_sum(one).tolist()
    seen["agree"] = [D.all_agree(True), D.all_agree(rank != 1), D.all_agree(False)]
    D.barrier()
    seen["twin"] = without_cpu_backend(rank)
    far = rows(rank, 5) + 1000 + 10 * rank
    for name, unbiased in (("biased", False), ("unbiased", True)):
        fn = lambda z: standardize(z, eps=1e-3, unbiased=unbiased)  # noqa: B023, E731
        seen[f"standardize {name}"] = value_and_grad(fn, far)
        fn = lambda z: torch.stack(column_moments(z, unbiased=unbiased))  # noqa: B023, E731
        seen[f"moments {name}"] = value_and_grad(fn, far)
        options = {"eps": 1e-3, "unbiased": unbiased, "impl": "reference"}
        fn = lambda z: standardize(z, **options)  # noqa: B023, E731
        seen[f"standardize {name} reference"] = value_and_grad(fn, far.double())
    for width in (2, 40):  # by covariance, by Gram
        for impl in ("torch", "reference"):
            fn = lambda a, b: frobenius_sq(a, b, impl=impl)  # noqa: B023, E731
            a, b = rows(rank, width), rows(rank + 50, width)
            seen[f"frobenius {width} {impl}"] = value_and_grad(fn, a, b)
    local = lambda z: standardize(z, eps=1e-3, process_group=D.LOCAL)  # noqa: E731
    seen["local"] = value_and_grad(local, far)
    pair = dist.new_group([0, 1])
    if rank < 2:
        seen["pair"] = value_and_grad(lambda z: D.all_gather_rows(z, pair), x)
    else:
        seen["outside"] = refusal(lambda: D.world_size(pair))
    uneven = torch.zeros(B + (rank == 1), 4)
    calls = [D.all_gather_rows, D.all_gather_nograd, lambda z: frobenius_sq(z, z)]
    calls += [lambda z: standardize(z, eps=0.1), column_moments]
    seen["uneven"] = [refusal(lambda: call(uneven)) for call in calls]  # noqa: B023
    seen["flat"] = [refusal(lambda: call(x[0] if rank == 1 else x)) for call in calls]  # noqa: B023
    scalar = torch.tensor(1.0) if rank == 1 else x
    seen["flat"].append(refusal(lambda: D.all_gather_rows(scalar)))
    deep = torch.zeros([1] * (8 if rank == 1 else 2))
    seen["deep"] = refusal(lambda: D.require_even(deep))
    mixed = x.double() if rank == 1 else x
    seen["mixed"] = [refusal(lambda: call(mixed)) for call in calls]  # noqa: B023
    optional = {"labels": None if rank == 1 else torch.arange(B)}
    seen["optional"] = refusal(lambda: D.require_all_even(z=x, **optional))
    views = {f"views[{i}]": x for i in range(2 + (rank == 1))}
    seen["views"] = refusal(lambda: D.require_all_even(**views))
    D.require_all_even(z=x, labels=None)
    return seen


@pytest.fixture(scope="module", params=[4], ids=lambda w: f"W={w}")
def ranks(request):
    return run_ranks(each_rank, request.param)


def joined(ranks, fn, inputs, dtype=torch.float64):
    """fn of the joined batch in one process, and the gradient of the sum of all ranks' losses.

    fn returns what each rank sees; each rank weights it by its own upstream.
    """
    leaves = [
        torch.cat([make(r) for r in range(len(ranks))]).to(dtype).requires_grad_()
        for make in inputs
    ]
    outs = fn(*leaves)
    total = sum((out * upstream(r, out)).sum() for r, out in enumerate(outs))
    return outs, [g.chunk(len(ranks)) for g in torch.autograd.grad(total, leaves)]


def check(ranks, key, fn, *inputs, rtol=2e-5, atol=2e-5):
    outs, leaves = joined(ranks, fn, inputs)
    for r, seen in enumerate(ranks):
        want = [outs[r], *(parts[r] for parts in leaves)]
        for got, truth in zip(seen[key], want, strict=True):
            torch.testing.assert_close(got.double(), truth, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_gather_and_reduce_have_their_true_adjoints(ranks, dtype):
    W = len(ranks)
    tolerance = {"rtol": 0.02, "atol": 0.04} if dtype == torch.bfloat16 else {}
    make = lambda r: rows(r, 2, 5, dtype=dtype)  # noqa: E731
    check(ranks, f"gather {dtype}", lambda x: [x] * W, make, **tolerance)
    every_sum = lambda x: [x.unflatten(0, (W, B)).sum(0)] * W  # noqa: E731
    check(ranks, f"reduce {dtype}", every_sum, make, **tolerance)
    assert {
        seen[f"{kind} {dtype}"][0].dtype for seen in ranks for kind in ("gather", "reduce")
    } == {dtype}


def test_gradient_of_an_expanded_upstream(ranks):
    every = torch.cat([rows(r, 4) for r in range(len(ranks))])
    for seen in ranks:
        value, grad = seen["gather expanded"]
        assert torch.equal(value, every) and (grad == len(ranks)).all()


def test_plain_helpers(ranks):
    W = len(ranks)
    for r, seen in enumerate(ranks):
        assert seen["size"] == (W, r, 1, 0)
        assert seen["plain"][0].tolist() == list(range(W))
        assert seen["plain"][1].tolist() == [bool(i) for i in range(W)]
        assert [x.tolist() for x in seen["plain"][2:]] == [list(range(W))] * 2
        assert seen["nograd"] is False
        assert seen["twice"] == "what goes from rank to rank has no second derivative"
        assert seen["object"] == {"from": 1}
        assert seen["halves"] == torch.full((W,), 255.0 + W).bfloat16().tolist()
        assert seen["agree"] == [True, False, False]


@pytest.mark.parametrize("where", [0, 1])
def test_a_mistake_of_one_rank_is_that_of_all(ranks, where):
    """And who has met it says so in its own words."""
    for r, seen in enumerate(ranks):
        wrong = "no such folder" if r == where else f"on rank {where}: no such folder"
        assert seen[f"mistake {where}"][1] == wrong
        first = "no such folder" if r == 0 else "rank 0: no such folder"
        assert seen[f"mistake {where}"][0] == (first if where == 0 else "not refused")
        assert seen["first"] == 0


@pytest.mark.parametrize("unbiased", [False, True], ids=["biased", "unbiased"])
def test_statistics_of_the_joined_batch(ranks, unbiased):
    W, name = len(ranks), "unbiased" if unbiased else "biased"
    make = lambda r: rows(r, 5) + 1000 + 10 * r  # noqa: E731

    def moments(z):
        return [torch.stack([z.mean(0), z.var(0, correction=int(unbiased))])] * W

    def standardized(z):
        mean, var = moments(z)[0]
        return ((z - mean) / (var + 1e-3).sqrt()).chunk(W)

    check(ranks, f"moments {name}", moments, make)
    check(ranks, f"standardize {name}", standardized, make)
    check(ranks, f"standardize {name} reference", standardized, make)
    assert all(
        torch.equal(seen[f"moments {name}"][0], ranks[0][f"moments {name}"][0]) for seen in ranks
    )


@pytest.mark.parametrize("width", [2, 40], ids=["covariance", "gram"])
@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_frobenius_of_the_joined_batch(ranks, width, impl):
    make_a, make_b = lambda r: rows(r, width), lambda r: rows(r + 50, width)
    fn = lambda a, b: [(a.T @ b).square().sum()] * len(ranks)  # noqa: E731
    check(ranks, f"frobenius {width} {impl}", fn, make_a, make_b, atol=1e-2)


def test_local_means_this_rank_alone(ranks):
    for r, seen in enumerate(ranks):
        z = rows(r, 5) + 1000 + 10 * r
        want = grads(
            lambda z: standardize(z, eps=1e-3),
            [z],
            lambda out, r=r: (out * upstream(r, out)).sum(),
        )
        assert all(torch.equal(a, b) for a, b in zip(seen["local"], want, strict=True))


def test_a_group_of_some_ranks(ranks):
    every = torch.cat([rows(r, 4) for r in range(2)])
    total = upstream(0, every) + upstream(1, every)
    for r in range(2):
        value, grad = ranks[r]["pair"]
        assert torch.equal(value, every)
        torch.testing.assert_close(grad, total[r * B : (r + 1) * B])
    assert all("does not contain this rank" in seen["outside"] for seen in ranks[2:])


def test_uneven_ranks_are_refused_on_every_rank(ranks):
    shapes = [(B + (r == 1), 4) for r in range(len(ranks))]
    for seen in ranks:
        for words in seen["uneven"]:
            assert f"must have the same shape on every rank, got {shapes} by rank" in words


def test_other_numbers_of_dimensions_are_refused_on_every_rank(ranks):
    for seen in ranks:
        assert len(seen["flat"]) == 6
        assert all("must have the same shape on every rank" in words for words in seen["flat"])
        assert "x must have at most 7 dimensions" in seen["deep"]


def test_dtypes_options_and_counts_that_differ_are_refused_on_every_rank(ranks):  # fault 35
    dtypes = ["torch.float32"] * len(ranks)
    dtypes[1] = "torch.float64"
    for seen in ranks:
        for words in seen["mixed"]:
            assert f"the same dtype on every rank, got {', '.join(dtypes)} by rank" in words
        assert "labels must have the same shape on every rank, got [(3,), None" in seen["optional"]
        assert "every rank must give as many tensors, got [2, 3" in seen["views"]


def test_checks_of_a_group_without_a_cpu_backend(ranks):
    shapes = [(B + r,) for r in range(len(ranks))]
    for seen in ranks:
        assert seen["twin"]["votes"] == [True, False] and seen["twin"]["groups"] == 1
        assert f"got {shapes} by rank" in seen["twin"]["words"]


def one_rank_fails(rank, world):
    if rank == 1:
        raise ArithmeticError("rank one's own words")
    D.barrier()


def test_a_failing_rank_is_heard():
    with pytest.raises(RuntimeError, match="rank one's own words"):
        run_ranks(one_rank_fails, 2)


def test_one_process_needs_no_group():
    x = torch.randn(3, 2, requires_grad=True)
    assert D.all_gather_rows(x) is x and D.all_reduce_sum(x) is x
    assert not D.all_gather_nograd(x).requires_grad
    assert D.broadcast_object("x") == "x" and D.all_agree(True) and not D.all_agree(False)
    D.barrier()
    with pytest.raises(ValueError, match="x must have rows to gather, got a 0-d tensor"):
        D.all_gather_rows(torch.tensor(1.0))
