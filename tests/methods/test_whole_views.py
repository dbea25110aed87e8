"""Methods that compare whole views compute their papers' losses on what their parts produce."""

import copy

import pytest
import torch
import torch.nn.functional as F

from fastssl.losses import queue
from fastssl.methods import build_method
from fastssl.methods.views import by_size, encode_views, global_views
from fastssl.models import Prototypes, build_backbone
from tests.runs import VIT, tiny

MANY = (16, 8, 16, 8, 8)  # two global views and three local ones
QUERIES = [(v, g) for v in range(5) for g in (0, 2) if v != g]


def method(name, tmp_path, sizes=MANY, **changes):
    cfg = tiny(name, tmp_path, **{f"method__{key}": value for key, value in changes.items()})
    torch.manual_seed(0)
    shape, *others = ((1, side, side) for side in dict.fromkeys(sizes))
    encoder = build_backbone(cfg.model.name, shape=shape, others=others, kwargs=VIT)
    return build_method(encoder, cfg.method)


def batch(sizes=MANY, n=6, seed=1):
    g, each = torch.Generator().manual_seed(seed), torch.arange(n)
    images = [torch.randn(n, 1, side, side, generator=g) for side in sizes]
    return {"views": images, "index": each, "seeds": each + 11}


def left_behind(ours):
    """Its teacher no longer is its student; the teacher's parameters as they are."""
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in ours.student.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=g))
    return {name: p.clone() for name, p in ours.teacher.model.named_parameters()}


def assert_followed(ours, before, momentum):
    students = dict(ours.student.named_parameters())
    for name, p in ours.teacher.model.named_parameters():
        torch.testing.assert_close(p, before[name].lerp(students[name].detach(), 1 - momentum))


def assert_gradients_reach(ours, loss):
    """All that is trained, and nothing else."""
    loss.backward()
    wrong = [n for n, p in ours.named_parameters() if (p.grad is None) == p.requires_grad]
    assert not wrong, f"trained without gradient, or the reverse: {wrong}"


@pytest.mark.parametrize("sizes", [(16, 16), MANY], ids=len)
def test_byol_predicts_the_teachers_projections(sizes, tmp_path):
    ours, data = method("byol", tmp_path, sizes), batch(sizes)
    before = left_behind(ours)
    out = ours(data)
    p = [F.normalize(ours.predictor(ours.student(x)), dim=1) for x in data["views"]]
    with torch.no_grad():
        z = {g: ours.teacher.model(data["views"][g]) for g in global_views(data["views"])}
    pairs = QUERIES if sizes is MANY else [(0, 1), (1, 0)]
    terms = [(p[v] - F.normalize(z[g], dim=1)).square().sum(1).mean() for v, g in pairs]
    torch.testing.assert_close(out["loss"], 2 * sum(terms) / len(pairs))
    assert len(ours.targets(data)) == 2 and ours.encoder is ours.student[0]
    assert_gradients_reach(ours, out["loss"])
    ours.on_step(None, 0.5)
    assert_followed(ours, before, 0.998)  # half way from 0.996 to 1


def test_directpred_predicts_by_the_correlation_of_past_projections(tmp_path):
    ours = method("directpred", tmp_path, (16, 16), rho=0.5, eps=0.1)
    left_behind(ours)
    correlation = torch.zeros(16, 16)
    for step in range(2):  # at first the predictor is the identity
        data = batch((16, 16), seed=step)
        out = ours(data)
        z = [ours.student(x) for x in data["views"]]
        w = ours.predictor.weight.clone()
        p = [F.normalize(x @ w, dim=1) for x in z]
        aims = [F.normalize(ours.teacher.model(x), dim=1) for x in data["views"]]
        terms = [(p[v] - aims[1 - v]).square().sum(1).mean() for v in (0, 1)]
        torch.testing.assert_close(out["loss"], sum(terms))
        assert torch.equal(ours.predictor.weight, w)  # forward remembers nothing
        ours.on_step([x.detach() for x in out["keep"]], 0.5)
        rows = torch.cat(z).detach()
        now = rows.T @ rows / 12
        correlation = (correlation + now) / 2 if correlation.any() else now
        torch.testing.assert_close(ours.predictor.correlation, correlation)
        values, vectors = torch.linalg.eigh(correlation)
        want = (vectors * ((values.clamp(min=0) / values[-1]).sqrt() + 0.1)) @ vectors.T
        torch.testing.assert_close(ours.predictor.weight, want, rtol=1e-4, atol=1e-4)
    assert not [*ours.predictor.parameters()]
    again = method("directpred", tmp_path, (16, 16), rho=0.5, eps=0.1)
    for mine, theirs in zip(again.buffers(), ours.buffers(), strict=True):
        mine.copy_(theirs)  # as the engine restores them, beside the extra state
    again.set_extra_state(ours.get_extra_state())
    keep = [2 * torch.randn(6, 16), torch.randn(6, 16)]
    for each in (ours, again):
        each.on_step(keep, 0.5)
    assert torch.equal(again.predictor.correlation, ours.predictor.correlation)
    assert_gradients_reach(ours, ours(data)["loss"])


@pytest.mark.parametrize("sizes", [(16, 16), MANY], ids=len)
def test_simsiam_holds_projections_still(sizes, tmp_path):
    ours, data = method("simsiam", tmp_path, sizes), batch(sizes)
    out = ours(data)
    z = [ours.head(ours.encoder(x)) for x in data["views"]]
    p = [F.normalize(ours.predictor(x), dim=1) for x in z]
    pairs = QUERIES if sizes is MANY else [(0, 1), (1, 0)]
    terms = [-(p[v] * F.normalize(z[g].detach(), dim=1)).sum(1).mean() for v, g in pairs]
    want = sum(terms) / len(pairs)
    torch.testing.assert_close(out["loss"], want)
    trained = [*ours.parameters()]
    wants, gots = (torch.autograd.grad(x, trained, retain_graph=True) for x in (want, out["loss"]))
    torch.testing.assert_close(gots, wants, rtol=1e-4, atol=1e-6)
    last = F.normalize(z[2 if sizes is MANY else 1], dim=1)
    spread = (last - last.mean(0)).square().mean(0).sqrt().mean() * 32**0.5
    torch.testing.assert_close(out["spread"], spread.detach())
    assert_gradients_reach(ours, out["loss"])


def test_mocov2_meets_the_queue_with_the_teachers_key(tmp_path):
    ours, data = method("mocov2", tmp_path, (16, 16)), batch((16, 16))
    before, past = left_behind(ours), ours.criterion.queue
    out = ours(data)
    q = F.normalize(ours.student(data["views"][0]), dim=1)
    key = F.normalize(ours.teacher.model(data["views"][1]), dim=1)
    scores = torch.cat([(q * key).sum(1, keepdim=True), q @ past.keys.T], 1) / 0.2
    want = F.cross_entropy(scores, torch.zeros(6, dtype=torch.int64))
    torch.testing.assert_close(out["loss"], want)
    assert_gradients_reach(ours, out["loss"])
    assert past.next == 0
    ours.on_step(out["keep"], 0.5)
    torch.testing.assert_close(past.keys[:6], key)
    assert past.next == 6
    assert_followed(ours, before, 0.999)


def sinkhorn(scores, epsilon, iterations=3):
    """Algorithm 1's: rows are samples, each of which has one in all; prototypes are used alike."""
    q = (scores.double() / epsilon).exp()
    q = q / q.sum()
    for _ in range(iterations):
        q = q / q.sum(0) / q.shape[1]
        q = q / q.sum(1, keepdim=True) / q.shape[0]
    return (q * q.shape[0]).float()


def test_swav_predicts_the_assignments_of_other_views(tmp_path):
    ours = method("swav", tmp_path, queue_size=9, queue_from=0.4)
    c, past = F.normalize(ours.prototypes.weight, dim=1), []
    for step, progress in enumerate((0.3, 0.39, 0.5, 0.6)):  # full at step 2, to be used from 3 on
        data = batch(seed=step)
        out = ours(data)
        z = [F.normalize(ours.head(ours.encoder(x)), dim=1) for x in data["views"]]
        log_p = [(x @ c.T / 0.1).log_softmax(1) for x in z]
        terms = []
        for n, g in enumerate((0, 2)):
            older = [torch.cat([keys[n] for keys in past])[-9:]] if step == 3 else []
            q = sinkhorn(torch.cat([z[g], *older]).detach() @ c.detach().T, 0.05)[:6]
            terms += [-(q * log_p[v]).sum(1).mean() for v in range(5) if v != g]
        torch.testing.assert_close(out["loss"], sum(terms) / 8, rtol=1e-5, atol=1e-5)
        assert ours.past.queues[0].next == 6 * step % 9  # forward remembers nothing
        saved = copy.deepcopy(ours.state_dict())
        past.append([z[0].detach(), z[2].detach()])
        torch.testing.assert_close(out["keep"], [z[0], z[2]])
        ours.on_step(past[-1], progress)
    assert_gradients_reach(ours, out["loss"])
    again = method("swav", tmp_path, queue_size=9, queue_from=0.4)
    again.load_state_dict(saved)
    torch.testing.assert_close(again(data)["loss"], out["loss"])  # the queue counts from the start


def test_each_rank_brings_its_share_of_the_queue(tmp_path, monkeypatch):
    past = method("swav", tmp_path, queue_size=7).past
    keys, shares = [each.keys for each in past.queues], []
    monkeypatch.setattr(queue, "world_size", lambda group: 3)
    for rank in range(3):
        monkeypatch.setattr(queue, "rank", lambda group, rank=rank: rank)
        shares.append(past.share(2))
    for n in (0, 1):
        joined = torch.cat([share[n] for share in shares])
        assert sorted(joined.tolist()) == sorted(keys[n].tolist())


def test_prototypes_have_length_1_whatever_a_step_does():
    prototypes = Prototypes(5, 3)
    torch.testing.assert_close(prototypes.weight.norm(dim=1), torch.ones(5))
    with torch.no_grad():
        prototypes.weight.mul_(torch.tensor([[0.1], [1], [7], [2], [3]]))
    torch.testing.assert_close(prototypes(), F.normalize(prototypes.weight, dim=1))
    assert prototypes.to(torch.bfloat16)().dtype == torch.float32
    with pytest.raises(ValueError, match="count and dim must be at least 1, got 0 and 3"):
        Prototypes(0, 3)


@pytest.mark.parametrize("sizes", [(16, 16), MANY], ids=len)
def test_msn_assigns_masked_views_as_the_whole_one(sizes, tmp_path):
    ours, data = method("msn", tmp_path, sizes, regularization=0.5), batch(sizes)
    before, c = left_behind(ours), F.normalize(ours.prototypes.weight, dim=1)
    out, encoder = ours(data), ours.encoder
    seen = []
    hook = ours.masked.register_forward_hook(lambda module, given, made: seen.append(given))
    ours.encode(data)
    hook.remove()
    (images, ids), *focal = seen
    masked = 2 if sizes is MANY else 1
    assert torch.equal(images, data["views"][masked]) and ids.shape == (6, 12)  # of 16 patches
    assert [(len(x), i) for x, i in focal] == ([(18, None)] if sizes is MANY else [])
    tokens = encoder.norm(encoder.blocks(with_positions(encoder, images, ids)))
    features = {masked: tokens[:, 1:].mean(1)}
    features |= {v: encoder(data["views"][v]) for v in range(1, len(sizes)) if v != masked}
    anchors = [F.normalize(ours.student[1](features[v]), dim=1) for v in sorted(features)]
    whole = ours.teacher.model[0].vit(data["views"][0])
    target = F.normalize(ours.teacher.model[1](whole), dim=1)
    q = sinkhorn((target @ c.detach().T / 0.1 / 0.25).log_softmax(1), 1.0)  # sharpened, then even
    p = [(a @ c.T / 0.1).softmax(1) for a in anchors]
    mean = torch.cat(p).mean(0)
    cross = sum(-(q * x.log()).sum(1).mean() for x in p) / len(p)
    want = cross + 0.5 * ((mean * mean.log()).sum() + torch.tensor(20.0).log())
    torch.testing.assert_close(out["loss"], want, rtol=1e-5, atol=1e-5)
    assert_gradients_reach(ours, out["loss"])
    ours.on_step(None, 0.5)
    assert_followed(ours, before, 0.998)


def with_positions(encoder, images, ids):
    """timm's embedding of all patches, and of these the ones asked for, after the class token."""
    x = encoder._pos_embed(encoder.patch_embed(images))
    chosen = torch.cat([torch.zeros(len(ids), 1, dtype=torch.int64), ids + 1], 1)
    return x.gather(1, chosen[..., None].expand(-1, -1, x.shape[2]))


def test_msn_masks_each_sample_by_its_seed_and_none_where_none_is_asked(tmp_path):
    ours, data = method("msn", tmp_path, (16, 16, 16)), batch((16, 16, 16))
    whole = ours.encode(data)
    part = {"views": [x[2:4] for x in data["views"]], "seeds": data["seeds"][2:4]}
    for a, b in zip(whole, ours.encode(part), strict=True):
        torch.testing.assert_close(a[2:4], b)
    same = {**data, "views": data["views"][:1] * 3}
    assert not torch.allclose(*ours.encode(same))  # each view has a mask of its own
    plain = method("msn", tmp_path, (16, 16, 16), mask_ratio=0.0)
    for view, made in zip(data["views"][1:], plain.encode(data), strict=True):
        torch.testing.assert_close(made, plain.encoder(view))
    with pytest.raises(ValueError, match="method.mask_ratio=0.99 leaves 0 of 16"):
        method("msn", tmp_path, mask_ratio=0.99)


def test_views_of_one_size_are_encoded_at_once_unless_a_batch_norm_would_see_them(tmp_path):
    images, ours = batch()["views"], method("simsiam", tmp_path)
    assert by_size(images) == [[0, 2], [1, 3, 4]]
    calls = []
    ours.encoder.register_forward_hook(lambda module, given, made: calls.append(len(made)))
    made = encode_views(ours.encoder, images)
    assert calls == [12, 18]
    for image, features in zip(images, made, strict=True):
        torch.testing.assert_close(features, ours.encoder(image))
    normed = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyBatchNorm1d())
    two = [images[0], images[2] * 3]
    for image, features in zip(two, encode_views(normed, two), strict=True):
        torch.testing.assert_close(features, normed(image))


@pytest.mark.parametrize("name", ["byol", "directpred", "simsiam", "mocov2", "swav", "msn"])
def test_a_single_view_is_refused(name, tmp_path):
    with pytest.raises(ValueError, match="views must be 2 or more|must have another crop, got 1"):
        method(name, tmp_path)(batch((16,)))
