"""Losses in torch.func's transforms, differentiated twice, and traced: right, or told what is."""

import re

import pytest
import torch
from torch import nn

from fastssl import losses
from tests.losses.test_edges import LOSSES
from tests.oracle import DEVICE

WORDS = "take impl='reference' of the primitive, or the *_reference that stands beside the loss"


def grad(f, a, b):
    return torch.func.grad(lambda a, b: f(a, b).sum(), argnums=(0, 1))(a, b)


def vmap(f, a, b):
    pairs = torch.stack([a, a.flip(0)]), torch.stack([b, a * b])
    return torch.func.vmap(f, randomness="same")(*pairs)


def twice(f, a, b):
    a = a.clone().requires_grad_()
    (first,) = torch.autograd.grad(f(a, b).sum(), a, create_graph=True)
    return torch.autograd.grad(first.sin().sum(), a)[0]


def plain_grad(f, a, b):
    a, b = (z.clone().requires_grad_() for z in (a, b))
    found = torch.autograd.grad(f(a, b).sum(), (a, b), allow_unused=True, materialize_grads=True)
    return found


def plain_vmap(f, a, b):
    return torch.stack([f(a, b), f(a.flip(0), a * b)])


WAYS = {"grad": (grad, plain_grad), "vmap": (vmap, plain_vmap), "twice": (twice, twice)}


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch's, of vmap
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", LOSSES)
def test_right_or_told_what_is(name, way):
    (ours, reference, _), (transform, plain) = LOSSES[name], WAYS[way]
    torch.manual_seed(0)
    inputs = list(torch.randn(2, 6, 4, device=DEVICE, dtype=torch.float64))
    want = plain(reference, *inputs)
    try:
        got = transform(ours, *inputs)
    except RuntimeError as error:
        assert str(error).endswith(WORDS)
        got = transform(reference, *inputs)
    torch.testing.assert_close(got, want, check_dtype=False, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["ntxent", "siglip"])  # of two results, and of one
def test_of_a_graph_that_is_only_traced_a_second_derivative_is_refused(name):
    """Compilers that lower the graph have none of anything, and say so."""
    ours, reference, _ = LOSSES[name]
    torch._dynamo.reset()
    traced = torch.compile(ours, backend="eager")
    inputs = list(torch.randn(2, 6, 4, device=DEVICE, dtype=torch.float64))
    got, want = (plain_grad(f, *inputs) for f in (traced, reference))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    with pytest.raises(
        RuntimeError, match=f"compiled, has no second derivative: {re.escape(WORDS)}"
    ):
        twice(traced, *inputs)


def every_loss():
    return [x for n, x in vars(losses).items() if n.endswith("Loss") and issubclass(x, nn.Module)]


@pytest.mark.filterwarnings("ignore:.torch.jit.trace. is deprecated")
def test_a_trace_of_one_batch_is_refused():
    assert len(every_loss()) > 25
    assert all(x._slow_forward is losses.NTXentLoss._slow_forward for x in every_loss())
    views = torch.randn(2, 4, 3, device=DEVICE)
    with pytest.raises(RuntimeError, match="torch.jit.trace would .* by torch.compile"):
        torch.jit.trace(lambda a, b: losses.BarlowTwinsLoss()(a, b), tuple(views))
