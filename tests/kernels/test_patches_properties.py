"""Patches of images of any rank, shape, dtype, layout and statistics: the formula, in float64."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastssl.kernels import Normalized, gather_patches, patch_mse
from tests.covering import examples
from tests.kernels.test_patches import IMPLS, Case, by_hand, channels, layouts, mae, patchify, pick
from tests.oracle import DEVICE, UPSTREAM, as_accurate_as_eager, grads

some = settings(max_examples=examples(25))
floats = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@st.composite
def problems(draw):
    """Images (B, C, *S) in one of many layouts, ids (B, K), a patch."""
    rank = draw(st.integers(1, 3))
    patch = tuple(draw(st.integers(1, 4)) for _ in range(rank))
    size = tuple(side * draw(st.integers(1, 3)) for side in patch)
    L = int(torch.tensor([s // p for s, p in zip(size, patch, strict=True)]).prod())
    case = Case(
        draw(st.integers(1, 3)), draw(st.integers(1, 4)), size, patch, draw(st.integers(0, L))
    )
    images, ids = case.problem()
    images = (
        (60 * images).abs().to(draw(st.sampled_from([torch.uint8, torch.float32, torch.bfloat16])))
    )
    found = [images, *layouts(images)]
    return case, found[draw(st.integers(0, len(found) - 1))], ids


@some
@given(problems(), st.sampled_from(IMPLS), st.booleans(), floats)
def test_gather(problem, impl, normalized, dtype):
    case, images, ids = problem
    got = gather_patches(images, ids, case.patch, impl=impl)
    assert torch.equal(got, pick(patchify(images, case.patch), ids))
    if normalized:
        seen = Normalized(images, *channels(case.C))
        got = gather_patches(seen, ids, case.patch, dtype=dtype, impl=impl)
        want = pick(patchify(by_hand(images), case.patch), ids)
        eager = pick(patchify(by_hand(images, torch.float32), case.patch), ids).to(dtype)
        as_accurate_as_eager(got, eager, want)


@some
@given(problems(), st.sampled_from(IMPLS), st.booleans(), floats, st.sampled_from(sorted(UPSTREAM)))
def test_error(problem, impl, norm_pix, dtype, layout):
    case, images, ids = problem
    norm_pix = norm_pix and case.values > 1 and case.K > 0  # else a variance of nothing
    pred = torch.randn(*ids.shape, case.values, device=DEVICE).to(dtype)

    def ours(p):
        return patch_mse(p, images, ids, case.patch, norm_pix=norm_pix, eps=1e-2, impl=impl)

    def formula(p):
        return mae(p, images, ids, case.patch, norm_pix, eps=1e-2)

    truth = grads(formula, [pred.double()], UPSTREAM[layout])
    eager = grads(lambda p: formula(p).float(), [pred], UPSTREAM[layout])
    for got, par, want in zip(grads(ours, [pred], UPSTREAM[layout]), eager, truth, strict=True):
        as_accurate_as_eager(got, par, want)
