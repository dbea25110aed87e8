"""The projection head, and batch normalization over the joined batch of two ranks."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastssl.models import BatchNorm1d, DINOHead, average_running_statistics, projection_head
from tests.ranks import run_ranks


@pytest.mark.parametrize("layers, final_norm", [(1, False), (2, True), (3, False)])
def test_shape_of_the_head(layers, final_norm):
    head = projection_head(6, 8, 5, layers, final_norm=final_norm)
    assert head(torch.randn(4, 6)).shape == (4, 5)
    linear = [m for m in head if isinstance(m, nn.Linear)]
    norms = [m for m in head if isinstance(m, BatchNorm1d)]
    assert len(linear) == layers and len(norms) == layers - (not final_norm)
    assert isinstance(head[-1], BatchNorm1d if final_norm else nn.Linear)
    assert [m.affine for m in norms] == [True] * (layers - 1) + [False] * final_norm
    with pytest.raises(ValueError, match="layers=0"):
        projection_head(6, 8, 5, 0, final_norm=True)


def data():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(12, 7, generator=g, dtype=torch.float64) * 3 + 100
    return x, torch.randn(12, 7, generator=g, dtype=torch.float64)


def normalize(rank, world):
    """Two training steps and one in evaluation mode on this rank's rows."""
    x, upstream = (t.chunk(world)[rank] for t in data())
    norm = BatchNorm1d(7).double()
    nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(1))
    x = x.clone().requires_grad_()
    for _ in range(2):
        out = norm(x)
    out.backward(upstream)
    state = [norm.running_mean, norm.running_var, norm.num_batches_tracked]
    grads = [x.grad, norm.weight.grad, norm.bias.grad]
    return [t.detach() for t in (out, *grads, *state, norm.eval()(x))]


def halves(rank, world):
    """A bfloat16 head on this rank's rows, as under the engine's bf16."""
    torch.manual_seed(0)
    head = projection_head(7, 8, 5, 2, final_norm=True).bfloat16()
    x = data()[1].chunk(world)[rank].bfloat16()
    return head(x).detach()


def test_bfloat16_stays_bfloat16_across_ranks():
    (one,), two = run_ranks(halves, 1), run_ranks(halves, 2)
    assert all(part.dtype == torch.bfloat16 for part in two)
    torch.testing.assert_close(torch.cat(two), one, rtol=0.05, atol=0.1)


def refusal(call, *arguments):
    """The words of the RuntimeError."""
    with pytest.raises(RuntimeError) as error:
        call(*arguments)
    return str(error.value)


def told(rank, world):
    norm, x = BatchNorm1d(7).double(), data()[0].chunk(world)[rank].requires_grad_()
    twice = partial(torch.autograd.grad, create_graph=True)
    return [refusal(twice, norm(x).sum(), x), refusal(torch.func.vmap(norm), x[None])]


def test_a_derivative_that_is_not_there_is_refused_in_words():
    whose, instead = "a batch norm over all ranks", "take torch's own, of each rank's rows alone"
    words = [f"{whose} has no second derivative: {instead}"]
    words += [f"torch.func cannot transform {whose}: {instead}"]
    assert run_ranks(told, 2) == [words, words]


def averaged(rank, world):
    norm = nn.BatchNorm2d(2)
    norm.running_mean.fill_(rank)
    average_running_statistics(norm)
    return [norm.running_mean, norm.running_var]


def test_statistics_kept_apart_are_averaged():
    for mean, var in run_ranks(averaged, 2):
        assert mean.tolist() == [0.5, 0.5] and var.tolist() == [1, 1]


def test_two_ranks_normalize_as_one():
    """The oracle is torch's own batch norm, which one process runs."""
    one = normalize(0, 1)
    two = run_ranks(normalize, 2)
    out, dx, dw, db, mean, var, count, evaluated = (list(pair) for pair in zip(*two, strict=True))
    close = dict(rtol=1e-9, atol=1e-9)
    for joined, whole in ((out, one[0]), (dx, one[1]), (evaluated, one[7])):
        torch.testing.assert_close(torch.cat(joined), whole, **close)
    for summed, whole in ((dw, one[2]), (db, one[3])):
        torch.testing.assert_close(sum(summed), whole, **close)
    for same, whole in ((mean, one[4]), (var, one[5]), (count, one[6])):
        for mine in same:
            torch.testing.assert_close(mine, whole, **close)


@pytest.mark.parametrize("last", ["normed", "scaled", "plain"])
def test_dinos_head_scores_points_on_a_sphere(last):
    torch.manual_seed(0)
    head = DINOHead(6, 9, hidden=5, bottleneck=4, layers=2, last=last).double()
    x, (first, second) = torch.randn(3, 6).double(), (head.mlp[0], head.mlp[2])
    assert abs(head.mlp[0].weight).max() < 0.2 and not head.mlp[0].bias.any()
    with torch.no_grad():
        for p in head.parameters():
            p.add_(0.1 * torch.randn_like(p))
    z = F.gelu(x @ first.weight.T + first.bias) @ second.weight.T + second.bias
    rows = head.last.weight_v
    rows = rows if last == "plain" else rows / rows.norm(dim=1, keepdim=True)
    rows = rows * head.last.weight_g if last == "scaled" else rows
    want = z / z.norm(dim=1, keepdim=True) @ rows.T
    torch.testing.assert_close(head(x), want)
    assert [*head.last.state_dict()] == ["weight_v", "weight_g"][: 1 + (last == "scaled")]
    with pytest.raises(ValueError, match="at least 1 layer, got layers=0"):
        DINOHead(6, 9, layers=0)
