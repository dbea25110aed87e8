"""The gate: what it lets through and what it stops, and why."""

import pytest
import torch

from fastssl.bench.measure.gate import glance, judge, step, why_wrong
from fastssl.bench.registry import OURS, REFERENCE, Absent, Problem

from .problems import CPU, make, square


def problem(rival, **others):
    x = torch.randn(9).requires_grad_()
    return Problem((x,), {OURS: rival, REFERENCE: square, **others})


@pytest.mark.parametrize(
    ("rival", "reason"),
    [
        (lambda x: 1.001 * square(x), "value is off by"),
        (lambda x: x.detach().square().sum() + 0 * x.sum(), "gradient 1 is off by"),
        (lambda x: square(x) / 0, "value is not finite"),
        (lambda x: square(x)[None], "value has shape (1,), not ()"),
    ],
)
def test_what_is_wrong_is_said(rival, reason):
    verdicts = {name: ask() for name, ask in judge(problem(rival)).items()}
    assert verdicts[OURS].startswith(reason) and verdicts[REFERENCE] == ""


def test_absent_rivals_are_not_asked():
    assert set(judge(problem(square, gone=Absent("pip install gone")))) == {OURS, REFERENCE}


def test_what_a_rival_raises_goes_through():
    def explode(x):
        raise KeyError("x")

    asked = judge(problem(explode))
    with pytest.raises(KeyError):
        asked[OURS]()


def test_ours_is_held_to_a_tighter_bound():
    truth, eager = [torch.ones((), dtype=torch.float64)], [torch.tensor(1.01)]
    assert why_wrong([torch.tensor(1.05)], eager, truth, slack=10) == ""
    assert why_wrong([torch.tensor(1.05)], eager, truth, slack=2).startswith("value is off")

    def sloppy(x):  # off by three times what the reference is off by
        wide = x.double().square().sum()
        error = square(x).double() - wide
        return (wide + 3 * error).float() if x.dtype == torch.bfloat16 else square(x)

    torch.manual_seed(1)
    x = torch.randn(1000).bfloat16().requires_grad_()
    verdicts = judge(Problem((x,), {OURS: sloppy, "other": sloppy, REFERENCE: square}))
    assert verdicts["other"]() == "" and verdicts[OURS]().startswith("value is off")


def test_integers_must_be_equal_and_counts_must_agree():
    a, b = torch.tensor([1, 2, 3]), torch.tensor([1, 5, 4])
    assert why_wrong([a], [b], [b], slack=2) == "value differs in 2 of 3 places"
    assert why_wrong([b], [b], [b], slack=2) == ""
    assert why_wrong([b, b], [b], [b], slack=2) == "2 tensors came out, not 1"


def test_a_check_of_its_own_replaces_the_triangle():
    x = torch.randn(4)
    made = Problem((x,), {OURS: torch.sort}, check=lambda name, out: f"{name} made {len(out)}")
    assert judge(made)[OURS]() == "fastssl made 2"


def test_without_a_reference_there_is_no_gate():
    with pytest.raises(ValueError, match="needs a rival called 'reference'"):
        judge(Problem((torch.randn(3),), {OURS: torch.sort}))


def test_a_step_is_value_and_gradients():
    made = make({"N": 5}, torch.float32, CPU)
    value, gradient = step(square, made.inputs)
    torch.testing.assert_close(value, made.inputs[0].detach().square().sum())
    torch.testing.assert_close(gradient, 2 * made.inputs[0].detach())
    assert not value.requires_grad


def test_a_glance_sees_one_row():
    reference = torch.randn(3, 700, 16)
    ours = reference.clone()
    assert glance([ours.sum(), ours], [reference.sum(), reference]) == ""
    ours[1, 600] = ours[1, 601]  # a block's edge: the norm of it all is as it was
    assert "reference's away from it in row 1, 600 at" in glance([ours], [reference])


def test_a_glance_is_as_exact_as_the_coarser_of_the_two():
    """A loss in float32 beside a reference in bfloat16, which rounds it to 8 bits."""
    ours, off = torch.tensor(1.8038), torch.tensor(1.7969)
    assert glance([ours], [off.bfloat16()]) == ""
    assert "value is 0.0038 of the reference's away from it at this shape" in glance([ours], [off])
    assert "gradient" not in glance([ours, ours], [ours, off])  # one number may cancel
