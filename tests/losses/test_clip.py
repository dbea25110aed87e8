import math

import open_clip.loss
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastssl.losses import CLIPLoss, MatryoshkaLoss
from fastssl.losses.clip import clip_reference
from tests.covering import pairwise
from tests.oracle import (
    DEVICE,
    UPSTREAM,
    assert_no_worse,
    grads,
    saved_elements,
)
from tests.ranks import run_ranks


def features(B, D, dtype=torch.float32):
    """Pairs of unit rows whose cosine is near 0.3, as after some training."""
    torch.manual_seed(B)
    z = torch.randn(B, D, device=DEVICE)
    return [F.normalize(z + 1.5 * torch.randn_like(z)).to(dtype) for _ in range(2)]


@pytest.mark.parametrize("B, D", [(1, 3), (7, 5), (23, 4)])
def test_the_papers_formula(B, D):
    inputs = [*(x.double() for x in features(B, D)), torch.tensor(9.0).double()]
    torch.testing.assert_close(grads(CLIPLoss(), inputs), grads(clip_reference, inputs))


@pytest.mark.parametrize("smoothing, tau_plus", [(0.2, 0), (0, 0.1), (0.2, 0.02)])
def test_smoothed_and_debiased_are_their_formulas(smoothing, tau_plus):
    """Of the 23 rows, the correction takes some to the least that is left of them."""
    inputs = [*(x.double() for x in features(23, 4)), torch.tensor(9.0).double()]
    ours = CLIPLoss(label_smoothing=smoothing, tau_plus=tau_plus)
    formula = lambda *x: clip_reference(*x, smoothing, tau_plus)  # noqa: E731
    torch.testing.assert_close(grads(ours, inputs), grads(formula, inputs))
    if tau_plus:
        with pytest.raises(ValueError, match="must have at least 2 images, got 1"):
            ours(*(x[:1] for x in inputs[:2]), 1.0)
        with pytest.raises(ValueError, match=r"tau_plus must be in \[0, 1\), got 1"):
            CLIPLoss(tau_plus=1)
        assert grads(ours, [x.float() for x in inputs])[0].isfinite()


@pytest.mark.parametrize(
    **pairwise(
        {"B, D": [(2, 3), (65, 16), (400, 32)], "scale": [1 / 0.07, 100.0], "reduce": UPSTREAM}
    )
)
def test_value_and_gradient_of_open_clip(B, D, scale, reduce):
    inputs = [*features(B, D), torch.tensor(scale)]
    assert_no_worse(CLIPLoss(), open_clip.loss.ClipLoss(), inputs, reduce, slack=4)


def test_the_scale_may_have_one_axis_and_the_bias_changes_nothing():
    x, t = features(9, 4)
    scale, bias = torch.tensor([5.0], requires_grad=True), torch.ones(1, requires_grad=True)
    loss = CLIPLoss()(x, t, scale, bias)
    loss.backward()
    assert loss.item() == CLIPLoss()(x, t, 5.0).item()
    assert scale.grad.shape == (1,) and scale.grad != 0 and bias.grad == 0
    out = CLIPLoss()(x, t, 5.0, output_dict=True)
    assert list(out) == ["contrastive_loss"] and out["contrastive_loss"].item() == loss.item()


def test_open_clips_arguments():
    loss = CLIPLoss(True, True, True, 1, 2)
    x, t = features(9, 4)
    assert loss(x, t, 5.0) == CLIPLoss()(image_features=x, text_features=t, logit_scale=5.0)
    assert repr(loss) == "CLIPLoss(strategy='gather')"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits_in_float32_out(dtype):
    inputs = [*features(65, 16, dtype), torch.tensor(20.0)]
    ours = grads(CLIPLoss(), inputs)
    truth = grads(CLIPLoss(), [x.double() for x in inputs])
    assert [x.dtype for x in ours] == [torch.float32, dtype, dtype, torch.float32]
    for got, want in zip(ours, truth, strict=True):
        eps = torch.finfo(got.dtype).eps
        torch.testing.assert_close(got.double(), want, rtol=4 * eps, atol=8 * eps * 1e-2)


def test_known_values_and_laws():
    same = torch.ones(50, 4, device=DEVICE) / 2
    assert math.isclose(CLIPLoss()(same, same, 3.0).item(), math.log(50), rel_tol=1e-6)
    one = torch.randn(1, 4, device=DEVICE)
    assert CLIPLoss()(one, one + 1, 3.0).item() == pytest.approx(0.0, abs=1e-6)
    x, t = features(40, 8)
    order = torch.randperm(40, device=DEVICE)
    value = CLIPLoss()(x, t, 7.0)
    torch.testing.assert_close(CLIPLoss()(t, x, 7.0), value)
    torch.testing.assert_close(CLIPLoss()(x[order], t[order], 7.0), value)
    assert CLIPLoss()(x, t[order], 7.0) > value > 0


def test_a_near_perfect_match_keeps_its_digits():
    x = torch.eye(8, device=DEVICE)
    torch.testing.assert_close(
        CLIPLoss()(x, x, 40.0), torch.tensor(7.0 * math.exp(-40)), rtol=1e-4, atol=0
    )


def test_zero_rows_are_finite_and_nan_shows():
    x, t = features(5, 4)
    x[2] = 0
    assert all(g.isfinite().all() for g in grads(CLIPLoss(), [x, t, torch.tensor(100.0)]))
    x[2] = torch.nan
    assert CLIPLoss()(x, t, 100.0).isnan()
    assert CLIPLoss()(*features(5, 4), torch.tensor(torch.nan)).isnan()


def test_keeps_nothing_of_all_pairs():
    x, t = (z.requires_grad_() for z in features(300, 4))
    assert saved_elements(lambda: CLIPLoss()(x, t, 5.0)) < 20 * 1200


X = torch.zeros(4, 3)


@pytest.mark.parametrize(
    "args, words",
    [
        ((X, X[:3], 1.0), r"image_features and text_features must .* \(4, 3\) and \(3, 3\)"),
        ((X[0], X[0], 1.0), r"must both be \(B, D\)"),
        ((X[:0], X[:0], 1.0), "none of them empty"),
        ((X[:, :0], X[:, :0], 1.0), "none of them empty"),
        ((X.long(), X.long(), 1.0), "must be floating-point, got torch.int64"),
        ((X, X.double(), 1.0), "must share dtype and device"),
        ((X, X, torch.ones(4)), r"logit_scale must be one number, got \(4,\)"),
    ],
)
def test_refuses(args, words):
    with pytest.raises(ValueError, match=words):
        CLIPLoss()(*args)


def test_refuses_a_strategy():
    with pytest.raises(ValueError, match="strategy must be one of gather, ring, got 'tree'"):
        CLIPLoss(strategy="tree")


class Towers(nn.Module):
    """Two linear towers and a learned scale."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = nn.Linear(5, 4), nn.Linear(6, 4)
        self.log_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, image, text):
        x, t = F.normalize(self.image(image)), F.normalize(self.text(text))
        return x, t, self.log_scale.exp()


def data(rank, dtype=torch.float32):
    generator = torch.Generator().manual_seed(10 + rank)
    return [torch.randn(6, n, generator=generator).to(dtype) + 0.3 * rank for n in (5, 6)]


LOSSES = {
    "gather": lambda: CLIPLoss(),
    "ring": lambda: CLIPLoss(strategy="ring"),
    "smooth": lambda: CLIPLoss(label_smoothing=0.2, tau_plus=0.02),
    "smooth ring": lambda: CLIPLoss(label_smoothing=0.2, strategy="ring"),
    "nested": lambda: MatryoshkaLoss(CLIPLoss(), (1, 3), (1.0, 0.5), normalize=True),
}


def each_rank(rank, world):
    seen = {}
    for kind, make in LOSSES.items():
        for name, wrap in (("plain", lambda m: m), ("ddp", DistributedDataParallel)):
            model = wrap(Towers())
            loss = make()(*model(*data(rank)))
            loss.backward()
            seen[f"{kind} {name}"] = loss.detach(), [p.grad for p in model.parameters()]
    x = torch.ones(5 + (rank == 1), 4)
    try:
        CLIPLoss()(x, x, 1.0)
    except ValueError as error:
        seen["uneven"] = str(error)
    return seen


@pytest.mark.parametrize("world", [3])
def test_ranks_are_one_process(world):
    ranks = run_ranks(each_rank, world)
    joined = [
        torch.cat(parts)
        for parts in zip(*(data(r, torch.float64) for r in range(world)), strict=True)
    ]
    for kind, make in LOSSES.items():
        model = Towers().double()
        want = make()(*model(*joined))
        want.backward()
        values = torch.stack([seen[f"{kind} plain"][0] for seen in ranks])
        torch.testing.assert_close(values.mean().double(), want.detach(), rtol=1e-6, atol=1e-6)
        for i, p in enumerate(model.parameters()):
            plain = torch.stack([seen[f"{kind} plain"][1][i] for seen in ranks]).mean(0)
            torch.testing.assert_close(plain.double(), p.grad, rtol=1e-5, atol=2e-6)
            for seen in ranks:
                mine = seen[f"{kind} ddp"][1][i].double()
                torch.testing.assert_close(mine, p.grad, rtol=1e-5, atol=2e-6)
    for seen in ranks:
        assert "must have the same shape on every rank" in seen["uneven"]
