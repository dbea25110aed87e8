"""Each method computes its paper's loss on what its own parts produce."""

import copy
import math

import lightly.loss
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastssl.config import ConfigError
from fastssl.losses import GroCoLoss, NNCLRLoss, SSLEYLoss
from fastssl.losses.isogclr import isogclr_reference
from fastssl.losses.ntxent import ntxent_reference
from fastssl.losses.sie import SIELoss
from fastssl.methods import METHODS, SIE, build_method
from fastssl.methods.base import PARAMETERS
from fastssl.methods.clip import CLIPConfig
from fastssl.methods.sie import SIEConfig, relation
from fastssl.models import build_backbone
from fastssl.run.build import build, fitted
from fastssl.run.train import open_source
from fastssl.tree import cut
from tests.runs import DISTILL, OTHERS, VIT, tiny
from tests.runs import METHODS as OPTIONS


def method(name, tmp_path, **changes):
    cfg = tiny(name, tmp_path, **changes)
    torch.manual_seed(0)
    encoder = build_backbone(cfg.model.name, shape=(1, 16, 16), kwargs=cfg.model.kwargs)
    return build_method(encoder, cfg.method), cfg


def batch(views, n=6):
    torch.manual_seed(1)
    images = [torch.randn(n, 1, 16, 16) for _ in range(views)]
    each = torch.arange(n)
    return {"views": images, "index": each, "seeds": each + 11, "label": each % 4}


def least(method):
    """The fewest views that it reads."""
    return method.views if isinstance(method.views, int) else method.views[0]


TEACHERS = ("dino", "ibot", "dinov2", "dinov3")  # whose targets sharpen


def test_every_method_has_options_here():
    assert set(METHODS) == set(OPTIONS) | set(OTHERS) | set(DISTILL) | {"cmc"}  # has streams


def learns(method, batch):
    """Twelve bare steps on one batch: the loss falls."""
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], 3e-3)
    losses = []
    for step in range(12):
        out = method(batch)
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
        method.on_step(out.get("keep"), step / 12)
        losses.append(out["loss"].item())
    assert sum(losses[-3:]) < 0.97 * sum(losses[:3]), losses


@pytest.mark.parametrize("name", OPTIONS)
def test_a_few_steps_learn(name, tmp_path):
    ours, _ = method(name, tmp_path)
    if name in ("mochi", "mocov2", *TEACHERS):  # of one batch, what is to be found would move
        ours.on_step = lambda keep, progress: None
    params = torch.rand(2, 16, len(PARAMETERS), generator=torch.Generator().manual_seed(0)) + 0.5
    learns(ours, {**batch(least(ours), 16), "params": list(params)})


@pytest.mark.filterwarnings("ignore:To copy construct:UserWarning")  # lightly's own
@pytest.mark.parametrize(
    "name, rival",
    [
        ("simclr", lightly.loss.NTXentLoss(temperature=0.1)),
        ("barlow_twins", lightly.loss.BarlowTwinsLoss(lambda_param=5e-3)),
        ("vicreg", lightly.loss.VICRegLoss()),
        ("dcl", lightly.loss.DCLLoss(temperature=0.1)),
        ("dcl, weighted", lightly.loss.DCLWLoss(temperature=0.1)),
        ("groco", GroCoLoss(3)),
        ("ssl_ey", lambda *z: SSLEYLoss()(z)),
    ],
)
def test_joint_methods(name, rival, tmp_path):
    name, _, weighted = name.partition(", ")
    ours, _ = method(name, tmp_path, **({"method__weighted": True} if weighted else {}))
    data = batch(2)
    loss = ours(data)["loss"]
    z_0, z_1 = (ours.head(ours.encoder(view)) for view in data["views"])
    torch.testing.assert_close(loss, rival(z_0, z_1), rtol=1e-5, atol=1e-5)
    assert_gradients_reach(ours, loss)


def assert_gradients_reach(ours, loss):
    """All that is trained, and nothing else."""
    loss.backward()
    wrong = [n for n, p in ours.named_parameters() if (p.grad is None) == p.requires_grad]
    assert not wrong, f"trained without gradient, or the reverse: {wrong}"


def info_nce(q, k, temperature):
    """The cross-entropy of each query with its own key, as MoCo v3's algorithm 1 has it."""
    logits = F.normalize(q, dim=1) @ F.normalize(k, dim=1).T / temperature
    return 2 * temperature * F.cross_entropy(logits, torch.arange(len(q)))


def test_mocov3_matches_queries_with_the_teachers_keys(tmp_path):
    ours, cfg = method("mocov3", tmp_path)
    with torch.no_grad():  # a teacher that has fallen behind
        for p in ours.student.parameters():
            p.add_(0.02 * torch.randn_like(p))
    data = batch(2)
    loss = ours(data)["loss"]
    q = [ours.predictor(ours.student(view)) for view in data["views"]]
    k = [ours.teacher.model(view) for view in data["views"]]
    t = cfg.method.temperature
    torch.testing.assert_close(loss, info_nce(q[0], k[1], t) + info_nce(q[1], k[0], t))
    assert_gradients_reach(ours, loss)
    assert ours.encoder is ours.student[0] and not any(p.requires_grad for p in k)
    assert all(not p.requires_grad for p in ours.teacher.parameters())


@pytest.mark.filterwarnings("ignore:To copy construct:UserWarning")  # lightly's own
def test_dino_is_lightlys_of_all_views_with_the_global_ones(tmp_path):
    big = {"method__teacher_temp": {"name": "linear", "start": 0.04, "end": 0.08, "until": 0.5}}
    cfg = tiny("dino", tmp_path, **big)
    torch.manual_seed(0)
    how = {"shape": (1, 16, 16), "others": [(1, 8, 8)], "kwargs": cfg.model.kwargs}
    ours = build_method(build_backbone(cfg.model.name, **how), cfg.method)
    with torch.no_grad():  # a teacher that has fallen behind
        for p in ours.student.parameters():
            p.add_(0.02 * torch.randn_like(p))
    data = batch(2)
    data["views"] += [view[..., 4:12, 4:12] for view in data["views"]]
    rival = lightly.loss.DINOLoss(output_dim=24)
    for temp in (0.04, 0.06):
        out = ours(data)
        student = [ours.student(view) for view in data["views"]]
        teacher = [ours.teacher.model(view) for view in data["views"][:2]]
        want = rival(teacher, student, teacher_temp=temp)
        torch.testing.assert_close(out["loss"], want, rtol=1e-5, atol=1e-5)
        assert_gradients_reach(ours, out["loss"])
        ours.zero_grad()
        ours.on_step(out["keep"], 0.25)  # half of the way to the last temperature
        torch.testing.assert_close(ours.assign.center, rival.center.flatten())
    view = data["views"][0]
    torch.testing.assert_close(ours.features(view), ours.teacher.model[0](view))
    assert [*ours.networks()] == ["teacher", "student"]


@pytest.mark.parametrize("progress, momentum", [(0.0, 0.8), (0.5, 0.9), (1.0, 1.0)])
def test_the_teachers_momentum_rises_to_1(progress, momentum, tmp_path):
    ours, _ = method("mocov3", tmp_path, method__momentum=0.8)
    before = {n: p.clone() for n, p in ours.teacher.model.named_parameters()}
    with torch.no_grad():
        for p in ours.student.parameters():
            p.add_(1.0)
    ours.on_step(None, progress)
    for name, p in ours.teacher.model.named_parameters():
        torch.testing.assert_close(p, before[name] + (1 - momentum), rtol=0, atol=1e-6)


def test_nnclr_contrasts_neighbors_with_predictions(tmp_path):
    ours, _ = method("nnclr", tmp_path)
    alone = NNCLRLoss(300, 16, temperature=0.1)
    queue = ours.criterion.queue
    assert torch.equal(queue.bank, alone.queue.bank)
    for filled in (6, 12):
        data = batch(2)
        out = ours(data)
        z = [ours.head(ours.encoder(view)) for view in data["views"]]
        want = alone(*z, *map(ours.predictor, z))
        torch.testing.assert_close(out["loss"], want)
        assert queue.next == filled - 6  # forward remembers nothing
        ours.on_step(out["keep"].detach(), 0.5)
        assert queue.next == filled  # once a step, by the second view's projections
        torch.testing.assert_close(queue.bank[filled - 6 : filled], F.normalize(z[1].detach()))
    assert_gradients_reach(ours, out["loss"])


def test_matryoshka_contrasts_prefixes_of_the_features(tmp_path):
    ours, cfg = method("matryoshka", tmp_path)
    data, told = batch(2), cfg.method
    features = (ours.features(view).double() for view in data["views"])
    f_0, f_1 = ((f - f.mean(0)) / (f.var(0, correction=0) + 1e-5).sqrt() for f in features)
    want = sum(
        w * ntxent_reference(f_0[:, :m], f_1[:, :m], told.temperature)
        for m, w in zip(told.dims, told.weights, strict=True)
    )
    loss = ours(data)["loss"]
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-5)
    assert_gradients_reach(ours, loss)
    plain, _ = method("matryoshka", tmp_path, method__dims=[], method__weights=[])
    assert plain.criterion.dims == (8, 16, 32) and plain.criterion.weights == [1, 1, 1]
    with pytest.raises(ValueError, match=r"method.dims=\(8, 33\) reach past .* 32 features"):
        method("matryoshka", tmp_path, method__dims=[8, 33], method__weights=[])


def test_isogclr_learns_a_temperature_for_each_sample(tmp_path):
    ours, cfg = method("isogclr", tmp_path)
    data, each, told = batch(2), ours.criterion.samples.values, cfg.method
    data["index"] = torch.tensor([7, 0, 129, 3, 5, 4])
    tau, u = torch.full((6,), told.temperature).double(), torch.zeros(6).double()
    for _ in range(2):  # the first visit, and one that remembers
        before, out = each.clone(), ours(data)
        z = [ours.head(ours.encoder(view)).double() for view in data["views"]]
        value, linear, u, slope = isogclr_reference(*z, tau, u, told.rho, 0.8)
        torch.testing.assert_close(out["loss"], value.float())
        wants, gots = (
            torch.autograd.grad(loss, list(ours.parameters()), retain_graph=True)
            for loss in (linear, out["loss"])
        )
        for want, got in zip(wants, gots, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)
        assert torch.equal(each, before)  # forward remembers nothing
        ours.on_step(out["keep"], 0.5)
        tau = tau - told.eta * 0.9 * slope if before.std(0)[0] == 0 else each[data["index"], 0]
        torch.testing.assert_close(each[data["index"], 0], tau.float())
        torch.testing.assert_close(each[data["index"], 1], u.log().float())
        others = [i for i in range(130) if i not in data["index"]]
        assert torch.equal(each[others], before[others])


def test_mochi_meets_the_queue_with_the_teachers_key(tmp_path):
    ours, cfg = method("mochi", tmp_path, method__synthetic=0, method__from_query=0)
    with torch.no_grad():  # a teacher that has fallen behind
        for p in ours.student.parameters():
            p.add_(0.02 * torch.randn_like(p))
    data, queue = batch(2), ours.criterion.queue
    before = {n: p.clone() for n, p in ours.teacher.model.named_parameters()}
    out = ours(data)
    q = F.normalize(ours.student(data["views"][0]), dim=1)
    key = ours.teacher.model(data["views"][1])
    logits = torch.cat([(q * F.normalize(key, dim=1)).sum(1, keepdim=True), q @ queue.keys.T], 1)
    want = F.cross_entropy(logits / cfg.method.temperature, torch.zeros(6, dtype=torch.int64))
    torch.testing.assert_close(out["loss"], want)
    assert_gradients_reach(ours, out["loss"])
    assert queue.next == 0 and ours.criterion.steps == 0
    ours.on_step(out["keep"], 0.5)
    torch.testing.assert_close(queue.keys[:6], F.normalize(key.detach(), dim=1))
    assert queue.next == 6 and ours.criterion.steps == 1
    for name, student in ours.student.named_parameters():
        now = dict(ours.teacher.model.named_parameters())[name]
        torch.testing.assert_close(now, before[name].lerp(student.detach(), 0.1))


def test_clip_matches_images_with_their_captions(tmp_path):
    ours, cfg = method("clip", tmp_path)
    assert ours.log_scale.shape == (1,)  # ZeRO cannot send a parameter without dimensions
    data = batch(1)
    out = ours(data)
    x = F.normalize(ours.image_head(ours.encoder(data["views"][0])), dim=1)
    captions = F.normalize(ours.text(torch.arange(10)), dim=1)
    logits = x @ captions[data["label"]].T / cfg.method.temperature
    own = torch.arange(6)
    want = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    torch.testing.assert_close(out["loss"], want)
    hits = [(x[i] @ captions.T).argmax() == data["label"][i] for i in range(6)]
    assert out["accuracy"] == sum(hits) / 6
    torch.testing.assert_close(out["scale"], torch.tensor(1 / cfg.method.temperature))
    assert_gradients_reach(ours, out["loss"])


def test_clips_scale_stops_at_100_and_comes_down_again(tmp_path):  # fault 6
    ours, _ = method("clip", tmp_path)
    with torch.no_grad():
        ours.log_scale.fill_(math.log(300))
    out = ours(batch(1))
    torch.testing.assert_close(out["scale"], torch.tensor(100.0))
    out["loss"].backward()
    assert ours.log_scale.grad.item() != 0
    ours.on_step(None, 0.5)
    torch.testing.assert_close(ours.log_scale.exp().item(), 100.0)


def test_isogclr_has_its_size_from_the_training_data(tmp_path):
    source = open_source(tiny("isogclr", tmp_path).data.source, 3).train
    waits = tiny("isogclr", tmp_path, method__size=None)
    with pytest.raises(ConfigError, match="method.size=null waits"):
        build(waits, 1)
    told = fitted(waits, source)
    assert told.method.size == len(source) and fitted(told, source) == told
    assert build(told, 1).criterion.size == len(source)
    with pytest.raises(ConfigError, match=r"method.size=9 leaves some of the \d+ training"):
        fitted(tiny("isogclr", tmp_path, method__size=9), source)


def test_clip_asks_for_a_caption_for_every_class():
    ten = CLIPConfig(captions=10)
    assert ten.fitted(9, 10) is ten
    with pytest.raises(ValueError, match="no labels"):
        ten.fitted(9, None)
    with pytest.raises(ValueError, match=r"method.captions=10 .* 11 classes"):
        ten.fitted(9, 11)


def test_mae_is_the_mean_error_over_hidden_patches(tmp_path):
    ours, _ = method("mae", tmp_path, method__norm_pix=True)
    data = batch(1)
    loss = ours(data)["loss"]
    (images,) = data["views"]
    prediction, masking = ours.predict(images, data["seeds"])
    assert masking.visible.shape == (6, 4) and prediction.shape == (6, 12, 16)
    grid = images.reshape(6, 1, 4, 4, 4, 4).permute(0, 2, 4, 3, 5, 1).reshape(6, 16, 16)
    truth = grid.gather(1, masking.masked[..., None].expand(-1, -1, 16))
    truth = (truth - truth.mean(-1, keepdim=True)) / (truth.var(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(loss, (prediction - truth).square().mean())
    assert_gradients_reach(ours, loss)


def test_mae_hides_the_same_patches_whatever_the_batch(tmp_path):
    ours, _ = method("mae", tmp_path)
    data = batch(1)
    _, whole = ours.predict(data["views"][0], data["seeds"])
    _, part = ours.predict(data["views"][0][2:4], data["seeds"][2:4])
    assert torch.equal(part.visible, whole.visible[2:4])


@pytest.mark.parametrize("norm_pix", [True, False])
def test_mae_paints_hidden_patches_only(norm_pix, tmp_path):
    ours, _ = method("mae", tmp_path, method__norm_pix=norm_pix)
    data = batch(1)
    (images,) = data["views"]
    prediction, masking = ours.predict(images, data["seeds"])
    masked, painted = ours.reconstruct(images, data["seeds"])
    patches = [
        x.unfold(2, 4, 4).unfold(3, 4, 4).reshape(6, 16, 16) for x in (images, masked, painted)
    ]
    hidden = torch.zeros(6, 16, dtype=torch.bool).scatter_(1, masking.masked, True)
    assert torch.equal(patches[1][~hidden], patches[0][~hidden])
    assert torch.equal(patches[2][~hidden], patches[0][~hidden])
    assert (patches[1][hidden] == 0).all()
    row = patches[2].gather(1, masking.masked[..., None].expand(-1, -1, 16))
    if norm_pix:  # the patch's own mean and deviation are put back
        truth = patches[0].gather(1, masking.masked[..., None].expand(-1, -1, 16))
        row = (row - truth.mean(-1, keepdim=True)) / (truth.var(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(row, prediction, rtol=1e-4, atol=1e-4)


def test_features_are_the_plain_encoders(tmp_path):
    ours, _ = method("mae", tmp_path)
    images = torch.randn(3, 1, 16, 16)
    features = ours.to(torch.bfloat16).features(images)
    assert features.dtype == torch.float32 and features.shape == (3, 32)


def test_a_mask_that_leaves_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="mask_ratio=0.99 leaves 0 of 16"):
        method("mae", tmp_path, method__mask_ratio=0.99)


class Tiny(nn.Module):
    """An encoder of 16 x 16 images."""

    num_features = 24

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Flatten(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, self.num_features))
        )

    def forward(self, images):
        return self.layers(images)


def tiny_sie(**changes):
    torch.manual_seed(0)
    cfg = {"hidden_dim": 32, "projection_dim": 20, "layers": 2, **changes}
    return SIE(Tiny(), SIEConfig.model_validate(cfg))


@pytest.mark.parametrize("follows", [["rotation"], ["color", "geometry"]], ids=str)
@pytest.mark.parametrize("share, split", [(0.5, 12), (0.25, 18)])
def test_the_loss_is_that_of_the_split_embeddings(follows, share, split):
    ours = tiny_sie(follows=follows, share=share, reader=[5])
    data = batch(2)
    images = data["views"]
    p = torch.rand(2, 6, len(PARAMETERS)) + 0.5
    out = ours({**data, "params": list(p)})
    assert ours.split == split
    features = [ours.encoder(view) for view in images]
    i_a, i_b = (ours.invariant(f[:, :split]) for f in features)
    e_a, e_b = (ours.equivariant(f[:, split:]) for f in features)
    assert e_a.shape == (6, round(20 * share)) and i_a.shape == (6, 20 - round(20 * share))
    moved = ours.predictor(e_a, relation(*p, *follows))
    want = SIELoss()(torch.cat([i_a, e_a], 1), torch.cat([i_b, e_b], 1), moved)
    torch.testing.assert_close(out["loss"], want)
    torch.testing.assert_close(out["invariance"], F.mse_loss(i_a, i_b))
    torch.testing.assert_close(out["equivariance"], F.mse_loss(moved, e_b))
    out["loss"].backward()
    assert all(parameter.grad is not None for parameter in ours.parameters())


# fault 38
@pytest.mark.parametrize("name", [*OPTIONS, "gmml of zeros", "gmml of swap"])
def test_the_flag_says_whether_accumulation_changes_the_loss(name, tmp_path):
    name, _, corruption = name.partition(" of ")
    cfg = tiny(name, tmp_path, **({"method__corruption": corruption} if corruption else {}))
    method, g = build(cfg, 1), torch.Generator().manual_seed(0)
    each = torch.arange(8)
    data = {"views": [torch.randn(8, 1, 16, 16, generator=g) for _ in range(least(method))]}
    data |= {"params": [torch.rand(8, len(PARAMETERS), generator=g) for _ in data["views"]]}
    data |= {"index": each, "seeds": each, "label": each}
    whole = method.prepare(data)

    def losses(sizes):
        for part in cut(data if method.couples_batch else whole, sizes):
            yield copy.deepcopy(method)(part, "all" if method.couples_batch else "prepared")[
                "loss"
            ].item()

    apart = abs(sum(losses([4, 4])) / 2 - sum(losses([8])))
    assert apart > 1e-4 if method.couples_batch else apart < 1e-5


@pytest.mark.parametrize("name", ["cropmae", "ijepa", "data2vec"])
def test_masks_of_one_size_want_views_of_one_size(name, tmp_path):
    views = {"data__augment": "crop_mae", "data__overrides": {"view1": {"size": 8}}}
    views = views if name == "cropmae" else {"model__kwargs": {**VIT, "dynamic_img_size": True}}
    with pytest.raises(ConfigError, match=f"method.name={name} hides .* fixed image size"):
        build(tiny(name, tmp_path, **views), 1)


# fault 14
def test_micro_batches_of_one_image_are_refused_where_images_are_compared(tmp_path):
    one_each = {"batch_size": 8, "engine__accumulation": 8, "engine__large_batch": "plain"}
    with pytest.raises(ConfigError, match="engine.accumulation=8 cuts batch_size=8 into.*simclr"):
        build(tiny("simclr", tmp_path, **one_each), 1)
    build(tiny("mae", tmp_path, **one_each), 1)


def test_who_asks_for_the_parameters():
    asked = [name for name, method in METHODS.items() if method.needs_view_params]
    assert asked == ["sie", "global_local"]


def test_a_share_that_leaves_no_part_is_refused():
    with pytest.raises(ValueError, match="share=0.99 leaves no invariant part"):
        tiny_sie(share=0.99)
    with pytest.raises(ValueError, match="follows"):
        SIEConfig.model_validate({"follows": []})


def blobs(kind, angle):
    """Images (B, 1, 16, 16) of two spots: `kind` is their distance, `angle` where they lie."""
    at = (torch.arange(16) - 7.5) / 8
    x, y = at.expand(16, 16), at[:, None].expand(16, 16)
    image = torch.zeros(len(kind), 16, 16)
    for reach, light in ((0.15 + 0.1 * kind, 1.0), (-0.6 + 0 * kind, 0.7)):
        dx = x - (reach * angle.cos())[:, None, None]
        dy = y - (reach * angle.sin())[:, None, None]
        image += light * (-(dx.square() + dy.square()) / 0.03).exp()
    return image.unsqueeze(1)


def turned(count, seed):
    """Two views of `count` images with their parameters, and the angles between them."""
    g = torch.Generator().manual_seed(seed)
    kind = torch.randint(0, 4, (count,), generator=g)
    own, *angles = 6.2832 * torch.rand(3, count, generator=g)
    p = torch.zeros(2, count, len(PARAMETERS))
    for row, angle in zip(p, angles, strict=True):
        row[:, 2:4] = 1
        row[:, 5], row[:, 6] = angle.cos(), angle.sin()
    images = [blobs(kind, own + angle) for angle in angles]
    return {"views": images, "params": list(p)}, angles[1] - angles[0]


def explained(parts, target):
    """R^2, on the second half of the rows, of a ridge regression fitted to the first.

    It reads the products of the two views' parts: the turn is bilinear in what each says of its
    own angle.
    """
    a, b = (F.pad((x - x.mean(0)) / (x.std(0) + 1e-6), (0, 1), value=1.0) for x in parts)
    x, x_new = (a.unsqueeze(2) * b.unsqueeze(1)).flatten(1).double().chunk(2)
    y, y_new = target.double().chunk(2)
    gram = x.T @ x + 0.01 * len(x) * torch.eye(x.shape[1], dtype=torch.double)
    error = x_new @ torch.linalg.solve(gram, x.T @ y) - y_new
    return 1 - (error.square().sum() / (y_new - y.mean(0)).square().sum()).item()


def test_the_equivariant_part_knows_the_turn_and_the_invariant_part_does_not():
    ours = tiny_sie(hidden_dim=128, projection_dim=64)
    optimizer = torch.optim.AdamW(ours.parameters(), 2e-3)
    for step in range(100):
        data, _ = turned(256, step)
        loss = ours(data)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    data, angle = turned(2000, 10_000)
    with torch.no_grad():
        features = [ours.features(view) for view in data["views"]]
    target = torch.stack([angle.cos(), angle.sin()], 1)
    invariant = explained([f[:, : ours.split] for f in features], target)
    equivariant = explained([f[:, ours.split :] for f in features], target)
    assert equivariant > 0.8 and invariant < 0.3, (equivariant, invariant)
