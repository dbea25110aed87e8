"""What methods log of collapse: against the formulas as written, and at both ends."""

import math

import pytest
import torch
import torch.nn.functional as F

from fastssl.methods import watch


def test_embeddings_on_a_sphere_have_spread_1_and_their_rank():
    torch.manual_seed(0)
    x = torch.randn(4000, 3) @ torch.linalg.qr(torch.randn(64, 64))[0][:3]
    out = watch.of_embeddings(7 * x, x.bfloat16())
    values = torch.linalg.eigvalsh(torch.cov(F.normalize(x[:256]).T, correction=0))
    rank = values.sum() ** 2 / values.square().sum()
    assert out["embedding_rank"] == pytest.approx(rank.item(), 1e-2)
    assert 2.8 < out["embedding_rank"] < 3.001
    spread = F.normalize(x).std(0, correction=0).mean() * 8
    assert out["embedding_std"] == pytest.approx(spread.item(), 1e-2)
    wide = torch.randn(40, 4096, requires_grad=True)
    out = watch.of_embeddings(wide)
    assert out["embedding_std"] == pytest.approx(1, abs=0.05) and 30 < out["embedding_rank"] <= 39
    assert not out["embedding_std"].requires_grad
    out = watch.of_embeddings(torch.ones(10, 4).expand(-1, 4))
    assert (out["embedding_std"], out["embedding_rank"]) == (0, 0)


def test_a_teachers_numbers_are_those_of_its_distributions():
    """More rows than are at one time in memory."""
    torch.manual_seed(0)
    logits, center, K = torch.randn(300, 12), torch.randn(12), 12
    p = ((logits - center) / 0.3).softmax(1)
    entropy, mean = -(p * p.log()).sum(1).mean(), p.mean(0)
    kl = (mean * (mean * K).log()).sum()
    for out in (watch.of_teacher(logits, 0.3, center[None]), watch.of_assignments(p)):
        assert out["chance"] == pytest.approx(math.log(K))
        torch.testing.assert_close(out["teacher_entropy"], entropy)
        torch.testing.assert_close(out["center_kl"], kl, atol=1e-5, rtol=1e-5)
        assert out["prototypes_used"] == len(p.argmax(1).unique()) / K
    same = torch.zeros(5, 12).index_fill(1, torch.tensor([3]), 1e4)
    out = watch.prefixed("patch", watch.of_teacher(same))
    assert out["patch_teacher_entropy"] == 0
    assert out["patch_center_kl"] == pytest.approx(math.log(K))
    assert out["patch_prototypes_used"] == pytest.approx(1 / 5)
