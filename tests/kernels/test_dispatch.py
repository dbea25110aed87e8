import pytest
import torch

from fastssl import kernels
from fastssl.kernels import implementations
from fastssl.kernels.common.dispatch import Primitive
from tests.interpreter import problem

PRIMITIVES = {
    "chamfer",
    "column_moments",
    "cross_diagonal",
    "frobenius_sq",
    "gather_bias",
    "gather_packed",
    "gather_patches",
    "gather_tokens",
    "gram_distance",
    "linear_soft_cross_entropy",
    "mixed_correlation",
    "pairwise_lse",
    "pairwise_lse_nested",
    "pairwise_sigmoid",
    "pairwise_topk",
    "patch_mse",
    "restore_tokens",
    "scaled_cosine_error",
    "scatter_tokens",
    "soft_cross_entropy",
    "standardize",
}


def test_an_interpreter_that_runs_nothing_says_so():
    """Where a GPU machine's versions rehearse."""
    assert "3.6.0 cannot interpret kernels with NumPy 2.5.2: pip" in problem("3.6.0", "2.5.2")
    assert problem("3.6.0", "2.4.9") == problem("3.9.0", "2.5.2") == ""


def test_every_primitive_reports_what_it_would_use():
    for device in ("cpu", "cuda"):
        assert implementations(device).keys() == PRIMITIVES
    assert set(implementations(torch.device("cpu")).values()) == {"torch"}


def test_auto_is_decided_by_the_device_alone():
    fused = Primitive("x", {"torch": str, "reference": str, "triton": str})
    plain = Primitive("y", {"torch": str, "reference": str})
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [fused.choose("auto", d) for d in (cpu, cuda)] == ["torch", "triton"]
    assert [plain.choose("auto", d) for d in (cpu, cuda)] == ["torch", "torch"]
    assert fused.choose("triton", cpu) == "triton"  # named, never replaced


def test_an_implementation_that_is_not_there_is_refused_with_those_that_are():
    plain = Primitive("y", {"torch": str, "reference": str})
    words = "impl must be one of auto, torch, reference for y, got 'triton'"
    with pytest.raises(ValueError, match=words):
        plain.choose("triton", torch.device("cuda"))


def test_names_of_before_give_the_new_with_a_warning():
    for old, new in {"standardise": "standardize", "Normalised": "Normalized"}.items():
        with pytest.warns(DeprecationWarning, match=f"{old} is now called {new}"):
            assert getattr(kernels, old) is getattr(kernels, new)
    with pytest.raises(AttributeError, match="has no attribute 'standardies'"):
        kernels.standardies  # noqa: B018
