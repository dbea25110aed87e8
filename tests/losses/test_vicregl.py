import lightly.loss
import pytest
import torch

from fastssl.losses.vicregl import VICRegLLoss
from tests.covering import pairwise
from tests.oracle import DEVICE, UPSTREAM, grads

B, D, E = 6, 7, 5
SIZES = [(4, 3), (4, 3), (2, 2), (2, 2), (3, 1)]  # two global views' places, then local ones'


def flat(sizes=SIZES, dtype=torch.float32):
    """[g, l, g, l ...] and the grids of views of these sizes; no two places equally far."""
    torch.manual_seed(0)
    features, grids = [], []
    for height, width in sizes:
        features += [torch.randn(B, D), torch.randn(B, height, width, E)]
        grids.append(torch.rand(B, height, width, 2, dtype=torch.float64).to(DEVICE))
    return [(0.6 * x).to(DEVICE, dtype) for x in features], grids


def call(loss, grids, G=2):
    def value(*features):
        views = list(zip(features[::2], features[1::2], strict=True))
        at = [grid.to(features[0].dtype) for grid in grids]
        local = (views[G:], at[G:]) if views[G:] else (None, None)
        return loss(views[:G], at[:G], *local).squeeze()

    return value


@pytest.mark.parametrize(
    **pairwise(
        {
            "matches": [(20, 4), (5, 3), (-1, None)],
            "sizes, G": [(SIZES, 2), (SIZES[:2], 2), (SIZES, 1), (SIZES[:3], 3)],
            "reduce": UPSTREAM,
        }
    )
)
def test_value_and_gradient_of_lightly(sizes, G, matches, reduce):
    features, grids = flat(sizes, torch.float64)
    ours = VICRegLLoss(10, 20, 3, 0.4, num_matches=matches)
    theirs = lightly.loss.VICRegLLoss(10, 20, 3, 0.4, num_matches=matches)
    got = grads(call(ours, grids, G), features, reduce)
    torch.testing.assert_close(got, grads(call(theirs, grids, G), features, reduce))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_narrow_in_float32_out(dtype):
    """The same matches as in float64, of the same numbers, and then VICReg's own accuracy."""
    features, grids = flat(dtype=dtype)
    ours = grads(call(VICRegLLoss(), grids), features)
    grids = [grid.to(dtype) for grid in grids]  # as `call` gave them
    truth = grads(call(VICRegLLoss(), grids), [x.double() for x in features])
    assert [x.dtype for x in ours] == [torch.float32, *[dtype] * len(features)]
    eps = max(torch.finfo(dtype).eps, 1e-6)
    for got, want in zip(ours, truth, strict=True):
        atol = 2 * eps * want.abs().max().item()
        torch.testing.assert_close(got.double(), want, rtol=2 * eps, atol=atol)


def test_matches_known():
    """Two places each, the far one of x left out: one match, by features and by grid alike."""
    x = torch.tensor([[0.0, 9.0], [0.0, 9.0]], device=DEVICE).view(2, 2, 1, 1)
    y = torch.tensor([[5.0, 1.0], [5.0, 2.0]], device=DEVICE).view(2, 2, 1, 1)
    g, grid = torch.zeros(2, 1, device=DEVICE), torch.zeros(2, 2, 1, 2, device=DEVICE)
    apart = grid.clone()
    apart[:, 1] = 3.0  # the grids say: place 0 with 0 and 1 with 1, first place 0
    loss = VICRegLLoss(1, 0, 0, 0, num_matches=(1, 1))
    by_features = (1 + 4) / 2  # 0 with 1, 0 with 2; either way round
    by_grid = 25.0  # 0 with 5
    for pair in (((g, x), (g, y)), ((g, y), (g, x))):
        nudged = apart.clone()
        nudged[:, 1] += 0.5
        assert loss(pair, (apart, nudged)).item() == pytest.approx(by_features + by_grid)


def test_laws():
    features, grids = flat()
    loss = VICRegLLoss()
    value = call(loss, grids)(*features)
    order = torch.randperm(B, device=DEVICE)
    permuted = call(loss, [grid[order] for grid in grids])(*(x[order] for x in features))
    torch.testing.assert_close(permuted, value)
    swapped = [*features[2:4], *features[:2], *features[4:]]
    torch.testing.assert_close(call(loss, [grids[1], grids[0], *grids[2:]])(*swapped), value)
    moved = call(loss, [3 * grid + 1 for grid in grids])(*features)
    torch.testing.assert_close(moved, value)
    whole, local = (VICRegLLoss(alpha=alpha) for alpha in (1.0, 0.0))
    mixed = 0.75 * call(whole, grids)(*features) + 0.25 * call(local, grids)(*features)
    torch.testing.assert_close(mixed, value)


def test_constant_features_are_finite_and_nan_is_handed_on():
    features, grids = flat()
    same = [torch.ones_like(x) for x in features]
    assert all(x.isfinite().all() for x in grads(call(VICRegLLoss(), grids), same))
    for i in (0, 1):
        bad = [x.clone() for x in features]
        bad[i].flatten()[0] = torch.nan
        assert call(VICRegLLoss(num_matches=(-1, -1)), grids)(*bad).isnan()


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"alpha": 1.5}, r"alpha must lie in \[0, 1\], got 1.5"),
        ({"num_matches": (0, 4)}, r"num_matches must be two counts, None or -1, got \(0, 4\)"),
        ({"num_matches": (4,)}, r"num_matches must be two counts, None or -1, got \(4,\)"),
    ],
)
def test_refuses_arguments(arguments, words):
    with pytest.raises(ValueError, match=words):
        VICRegLLoss(**arguments)


def view(b=4, width=3, height=2, features=5, dtype=torch.float32):
    return torch.zeros(b, width), torch.zeros(b, height, 2, features, dtype=dtype)


@pytest.mark.parametrize(
    "second, rows, words",
    [
        (view(width=2), 4, r"view 1 must have the rows and widths of view 0, got \(4, 2\), "),
        (view(features=4), 4, "view 1 must have the rows and widths of view 0"),
        (view(b=5), 5, "view 1 must have the rows and widths of view 0"),
        (view(), 3, r"view 1 must be .* got \(4, 3\), \(4, 2, 2, 5\) and \(3, 2, 2, 2\)"),
        (view(dtype=torch.float64), 4, "view 1 must have view 0's float dtypes and device, got "),
    ],
)
def test_refuses_views(second, rows, words):
    grids = [torch.zeros(4, 2, 2, 2), torch.zeros(rows, 2, 2, 2)]
    with pytest.raises(ValueError, match=words):
        VICRegLLoss()([view(), second], grids)


def test_refuses_counts():
    one, grid = view(), torch.zeros(4, 2, 2, 2)
    with pytest.raises(ValueError, match="every view must have a grid, got 1 of 2, 1 of 2 in all"):
        VICRegLLoss()([one, one], [grid])
    with pytest.raises(ValueError, match="every view must have a grid, got 2 of 2, 2 of 3 in all"):
        VICRegLLoss()([one, one], [grid] * 2, [one])
    with pytest.raises(ValueError, match="want a global view and another, got 1 of 1"):
        VICRegLLoss()([one], [grid])
    with pytest.raises(ValueError, match="the joined batch must have at least 2 images, got 1"):
        VICRegLLoss()([view(1)] * 2, [grid[:1]] * 2)


def test_prints_its_arguments():
    shown = "alpha=0.75, num_matches=(20, 4), nu_param=1.0"
    assert repr(VICRegLLoss()).startswith(f"VICRegLLoss(\n  {shown}\n  (vicreg_loss): VICRegLoss(")
