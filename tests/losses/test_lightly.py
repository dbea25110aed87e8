"""Every class that lightly exports is here: its constructor, its value and its gradient."""

import inspect
import warnings

import lightly.loss
import lightly.loss.hypersphere_loss
import lightly.loss.regularizer
import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from fastssl import losses
from tests.losses.test_dropin import FUNCTIONS, OURS, SMALL, inputs

MODULES = lightly.loss, lightly.loss.regularizer, lightly.loss.hypersphere_loss
THEIRS = {
    name: thing
    for module in MODULES
    for name in getattr(module, "__all__", vars(module))
    if isinstance(thing := getattr(module, name), type)
    and thing.__module__.startswith("lightly.loss")
}
NAMES = sorted(THEIRS)
# Whose gradient lightly computes, though a target has none in the paper.
TARGETS = {"teacher_out", "targets", "queue_outputs"}
ELSEWHERE = {"DSERegularizer"}  # compared in test_relations.py, of the same clusters
WITHOUT = {"CO2Regularizer"}  # lightly's has none at all


def test_none_is_left_out():
    assert len(NAMES) > 33
    assert [name for name in NAMES if not hasattr(losses, name)] == []


def told(name, argument):
    """Whether a default that differs is one of those that the docstring tells of."""
    kind = getattr(losses, name)
    doc = "".join(base.__doc__ or "" for base in kind.__mro__ if base.__module__ in kind.__module__)
    return argument == "gather_distributed" and "athers by default" in " ".join(doc.split())


@pytest.mark.parametrize("name", NAMES)
def test_the_constructor_is_lightlys(name):
    ours, theirs = (
        [p for p in inspect.signature(kind).parameters.values()]
        for kind in (getattr(losses, name), THEIRS[name])
    )
    mine = {p.name: p for p in ours}
    assert [p.name for p in ours[: len(theirs)]] == [p.name for p in theirs]
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[len(theirs) :])
    for p in theirs:
        one, other = (getattr(x, "__name__", x) for x in (p.default, mine[p.name].default))
        assert one == other or told(name, p.name), p.name


def leaf(x):
    learns = isinstance(x, Tensor) and x.is_floating_point()
    return x.clone().requires_grad_() if learns else x


def step(kind, made, given):
    """What comes out, and the gradients of its sum, weighed by place, for each argument."""
    leaves = tree_map(leaf, given)
    torch.manual_seed(0)
    out = kind(**made)(**leaves).squeeze()
    if not out.requires_grad:
        return out, {}
    (out * torch.linspace(0.5, 1, out.numel()).view_as(out)).sum().backward()
    learned = {
        name: [x for x in tree_leaves(tree) if isinstance(x, Tensor) and x.requires_grad]
        for name, tree in leaves.items()
    }
    none = torch.zeros_like
    return out.detach(), {
        name: [none(x) if x.grad is None else x.grad for x in those]
        for name, those in learned.items()
    }


@pytest.mark.parametrize("name", [n for n in NAMES if n not in {*FUNCTIONS, *ELSEWHERE}])
def test_value_and_gradient_are_lightlys(name):
    asked = inspect.signature(THEIRS[name]).parameters
    made = {argument: about.default for argument, about in asked.items()}
    made |= {argument: size for argument, size in SMALL.items() if argument in asked}
    made = {a: x for a, x in made.items() if x is not inspect.Parameter.empty}
    made |= {"gather_distributed": False} if "gather_distributed" in asked else {}
    given = inputs(name)
    assert {*made} >= {a for a, p in asked.items() if p.default is p.empty}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lightly's copies of tensors
        want, theirs = step(THEIRS[name], made, given)
    got, ours = step(getattr(losses, name), made | OURS.get(name, {}), given)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert (theirs == {}) == (name in WITHOUT) and any(g.any() for gs in ours.values() for g in gs)
    for argument in theirs.keys() - TARGETS:
        torch.testing.assert_close(ours[argument], theirs[argument], rtol=1e-3, atol=1e-5)
