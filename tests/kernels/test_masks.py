"""Pair masks: the rules, their ids, and how they join."""

import copy

import pytest
import torch
import triton
import triton.language as tl

from fastssl.kernels import (
    PairMask,
    different_group,
    exclude_self,
    exclude_self_and_pair,
    pairwise_lse,
    pairwise_sigmoid,
    same_group,
)
from fastssl.kernels.pairwise.lse import pairwise_lse_reference
from fastssl.kernels.pairwise.masks import as_masks, decode

HERE = torch.device("cpu")


@triton.jit
def _near(rows, cols):
    return tl.abs(rows - cols) <= 2


near = PairMask("near", lambda rows, cols: (rows - cols).abs() <= 2, symmetric=True, triton=_near)
eager = PairMask("eager", lambda rows, cols: rows > cols)


def kept(mask, M, N):
    return as_masks(mask).keep(M, N, HERE).nonzero().tolist()


def test_the_rules():
    labels = torch.tensor([0, 1, 0])
    assert kept(exclude_self, 2, 3) == [[0, 1], [0, 2], [1, 0], [1, 2]]
    assert kept(exclude_self_and_pair, 3, 3) == [[0, 2], [1, 2], [2, 0], [2, 1]]
    assert kept(same_group(labels), 3, 3) == [[0, 0], [0, 2], [1, 1], [2, 0], [2, 2]]
    assert kept(different_group(labels[:1], labels), 1, 3) == [[0, 1]]
    assert kept(exclude_self & same_group(labels), 3, 3) == [[0, 2], [2, 0]]
    assert kept(None, 1, 2) == [[0, 0], [0, 1]]


def test_joining_is_associative():
    labels = torch.tensor([0, 1, 0, 1])
    one, two = exclude_self & near, same_group(labels) & eager
    assert as_masks(one & two).key == as_masks((one & same_group(labels)) & eager).key
    assert kept(one & two, 4, 4) == [[2, 0], [3, 1]]


def test_ids_of_any_integer_type_are_stacked_in_their_order():
    mask = same_group(torch.tensor([1, 2], dtype=torch.int32)) & exclude_self
    mask = mask & different_group(torch.tensor([7, 8], dtype=torch.uint8), torch.tensor([5]))
    mask_rows = [part.rows for part in mask.parts]
    assert mask_rows[1] is None and all(r is None or r.dtype == torch.int64 for r in mask_rows)
    rules, places = decode(mask.key)
    assert rules == (same_group, exclude_self, different_group) and places == (0, -1, 1)


def test_symmetric_only_when_every_part_is():
    ids = torch.arange(3)
    assert as_masks(None).symmetric and (exclude_self & same_group(ids)).symmetric
    assert not (exclude_self & eager).symmetric
    assert not exclude_self(ids, ids + 1).symmetric


def test_your_own_rule(lse):
    torch.manual_seed(0)
    q, k = torch.randn(19, 4), torch.randn(37, 4)
    mask = near(torch.arange(19) * 2, torch.arange(37))
    torch.testing.assert_close(lse(q, k, 1.0, mask=mask), pairwise_lse_reference(q, k, 1.0, mask))


def test_a_rule_without_twin_runs_in_torch_alone():
    q = torch.randn(5, 3)
    mask = exclude_self & eager
    auto = pairwise_lse(q, q, 1.0, mask=mask)
    torch.testing.assert_close(auto, pairwise_lse_reference(q, q, 1.0, mask))
    with pytest.raises(ValueError, match="mask 'eager' has no Triton twin: give PairMask"):
        pairwise_lse(q, q, 1.0, mask=mask, impl="triton")


def test_rules_of_one_name_are_kept_apart(lse):
    other = PairMask("near", lambda rows, cols: rows != cols, triton=exclude_self.triton)
    z = torch.randn(5, 3)
    for mask in (other, near):
        torch.testing.assert_close(
            lse(z, z, 1.0, mask=mask), pairwise_lse_reference(z, z, 1.0, mask)
        )


def test_a_rule_can_be_copied():
    assert copy.deepcopy({"mask": exclude_self})["mask"] is exclude_self


def test_a_twin_must_be_a_triton_function():
    with pytest.raises(ValueError, match=r"@triton.jit function .* in mask 'x', got <function"):
        PairMask("x", torch.ne, triton=lambda rows, cols: rows != cols)


@pytest.mark.parametrize(
    "ids, got",
    [
        (torch.zeros(3), r"\(3,\) torch.float32"),
        (torch.zeros(3, dtype=torch.bool), r"\(3,\) torch.bool"),
        (torch.zeros(3, 1, dtype=torch.int64), r"\(3, 1\) torch.int64"),
        ([1, 2], "a list"),
    ],
)
def test_refuses_ids(ids, got):
    words = f"row_ids of mask 'same_group' must be one-dimensional integers, got {got}"
    with pytest.raises(ValueError, match=words):
        same_group(ids)
    with pytest.raises(ValueError, match="col_ids of mask 'same_group' must be"):
        same_group(torch.arange(3), ids)


@pytest.mark.parametrize("mask", [same_group, same_group(torch.arange(3)) & exclude_self])
def test_what_masks_cannot_do_is_said(mask):
    """Fault 27: `~` and `|` say what to write."""
    with pytest.raises(TypeError, match="cannot be negated with ~: take the opposite rule"):
        _ = ~mask
    with pytest.raises(TypeError, match=r"cannot be joined by \|, only by &"):
        _ = mask | exclude_self


def test_a_matrix_is_refused_as_a_mask_without_its_values():
    """Fault 27."""
    x, matrix = torch.ones(3, 2), torch.eye(3) > 0
    words = r"got a \(3, 3\) torch.bool tensor: a mask is a rule on ids, as same_group\(labels\)$"
    for call in (
        lambda: pairwise_lse(x, x, 1.0, mask=matrix),
        lambda: same_group & matrix,
        lambda: pairwise_sigmoid(x, x, 1.0, 0.0, positive=matrix),
    ):
        with pytest.raises(ValueError, match=words):
            call()
