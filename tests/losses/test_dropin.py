"""One line is changed, the import: what the libraries' users write, read and save."""

import inspect
import operator

import lightly.loss
import lightly.loss.hypersphere_loss
import lightly.loss.regularizer
import open_clip.loss
import pytest
import torch
import torch.nn.functional as F
from pytorch_metric_learning import losses as metric
from torch import nn

from fastssl import losses
from fastssl.losses.queue import Queue

OF_LIGHTLY = {
    "BarlowTwinsLoss": (5e-3, False),
    "VICRegLoss": (24.0, 26.0, 2.0, False, 1e-3),
    "TiCoLoss": (0.8, 7.0, False),
    "NTXentLoss": (0.3, 0, False),
    "DCLLoss": (0.2, None, False),
    "DCLWLoss": (0.2, 0.4, False),
    "MMCRLoss": (4e-3,),
    "DINOLoss": (8, 0.03, 0.05, 4, 0.2, 0.8, "mean"),
    "IBOTPatchLoss": (8, 0.05, 0.2, "mean", 0.8),
    "IBOTPlusPlusPatchLoss": (8, 0.05, 0.2, "mean", 0.8),
    "KoLeoLoss": (2, 1e-7),
    "SwaVLoss": (0.2, 2, 0.1, False),
    "MSNLoss": (0.3, 2, 0.7, False),
    "PMSNLoss": (0.3, 0, 0.7, 0.5, False),
    "PMSNCustomLoss": (lambda mean: torch.full_like(mean, 1 / len(mean)), 0.3, 2, 0.7, False),
    "NegativeCosineSimilarity": (1, 1e-7),
    "VICRegLLoss": (24.0, 26.0, 2.0, 0.6, False, 1e-3, (3, 2)),
    "DetConBLoss": (0.3, False),
    "DetConSLoss": (0.3, False),
    "DirectCLRLoss": (5, 0.3, 0, False),
    "EMPSSLLoss": (0.3, 150.0),
    "FroSSLLoss": (0.7,),
    "MACLLoss": (0.3, 0.6, 0.1),
    "Whitening2d": (8, 0.1, True, 0.2),
    "WMSELoss": (3, 0.1, 0.2, True, 2, 6),
    "HypersphereLoss": (2.0, 0.7, 1.5),
    "CO2Regularizer": (0.7, 0.2, 0),
    "CAPILoss": (0.1, 0.2, 2, False),
    "LeJEPALoss": (0.2, False, 5, 2.0, 30),
    "LeWMLoss": (0.2, True, False, 5, 2.0, 30),
    "PatchKernelAlignmentLoss": (3,),
    "SIGReg": {"knots": 5, "t_max": 2.0, "num_vectors": 30, "gather_distributed": False},
    "VISRegLoss": (0.8, 30, 0.5, 2.0, 0.7, False, 1e-3),
}
OF_OPEN_CLIP = {
    "ClipLoss": (False, False, False, 0, 1, False),
    "SigLipLoss": (False, 0, 1, None),
}


RIVALS = {
    **{name: lightly.loss for name in OF_LIGHTLY},
    **{name: open_clip.loss for name in OF_OPEN_CLIP},
    "HypersphereLoss": lightly.loss.hypersphere_loss,
    "CO2Regularizer": lightly.loss.regularizer,
}
# What has no default there, or one too large for a test; and a sign that lightly has turned round.
SMALL = {"target_distribution": OF_LIGHTLY["PMSNCustomLoss"][0], "output_dim": 8}
SMALL |= {"num_features": 8, "embedding_dim": 3, "w_size": 6}
OURS = {"EMPSSLLoss": {"tcr_coef": -1.0}}
LABELED = ("NTXentLoss", "SupConLoss")
FUNCTIONS = {"VISRegLossComponents"}  # and what else is no loss


def made_by_place(module, name, **more):
    """Of what is given by place, or by name where there are no places, and more."""
    given = (OF_LIGHTLY | OF_OPEN_CLIP)[name]
    kind = getattr(module, name)
    return kind(**given, **more) if isinstance(given, dict) else kind(*given, **more)


def call(loss, arguments):
    """By place, as far as there are places; what is drawn is the same for all."""
    torch.manual_seed(1)
    named = inspect.signature(loss.forward).parameters.values()
    if any(about.kind is about.KEYWORD_ONLY for about in named):
        return loss(**arguments)
    return loss(*arguments.values())


def views(n=12, d=8):
    torch.manual_seed(0)
    return [torch.randn(n, d) for _ in range(2)]


def inputs(name, rival=None):
    """What a rival's forward takes, by the names that it has there."""
    a, b = views()
    images = [(x, x.view(12, 2, 2, 2)) for x in (a, b)]
    grids = [x.view(12, 2, 2, 2) for x in (b, a)]
    known = {
        **dict.fromkeys(("out0", "z_a", "z0"), a),
        **dict.fromkeys(("out1", "z_b", "z1"), b),
        **dict.fromkeys(("view0", "pred_view0"), a.view(4, 3, 8)),
        **dict.fromkeys(("view1", "pred_view1"), b.view(4, 3, 8)),
        "target_view0": (a - b).view(4, 3, 8),
        "target_view1": (a + b).view(4, 3, 8),
        "mask_view0": torch.arange(12).view(4, 3) % 2,
        "mask_view1": torch.arange(12).view(4, 3) % 5,
        "z_views": [a, b, a + b],
        "input": torch.cat([a, b])[::2, :3],
        "online": a.unflatten(0, (6, 2)),
        "momentum": b.unflatten(0, (6, 2)),
        "teacher_out": [a, b],
        "student_out": [b, a, a + b],
        "teacher_temp": 0.03,
        "epoch": 2,
        "high_resolution_outputs": [a, b],
        "low_resolution_outputs": [a + b],
        "queue_outputs": [b, a],
        "x": a,
        "mask": torch.arange(16).view(2, 2, 4) % 4 > 0,
        "visible_loss_weight": 0.5,
        "anchors": torch.cat([a, b]),
        "targets": a + b,
        "prototypes": torch.cat([a, b])[3:10],
        "target_sharpen_temperature": 0.4,
        **dict(zip(("x0", "x1"), (a, b), strict=True)),
        "image_features": F.normalize(a),
        "text_features": F.normalize(b),
        "logit_scale": torch.tensor(5.0),
        "logit_bias": torch.tensor(-3.0),
        "output_dict": False,
        "update_covariance_matrix": True,
        "global_view_features": images,
        "global_view_grids": grids,
        "local_view_features": images[:1],
        "local_view_grids": grids[:1],
        "embeddings": a,
        "labels": torch.arange(12) % 5,
        "proj": a,
        "local_proj": a.view(3, 4, 8),
        "global_proj": b[:8].view(2, 4, 8),
        "predicted": a.view(3, 4, 8)[:, 1:],
        "target": b.view(3, 4, 8)[:, 1:],
        **dict.fromkeys(("teacher_logits", "teacher_features"), a.view(3, 4, 8)),
        **dict.fromkeys(("student_logits", "student_features"), b.view(3, 4, 8)),
        "teacher_index": torch.tensor([[3, 0, 1, 2], [0, 1, 2, 3], [1, 0, 3, 2]]),
    }
    if name == "LeWMLoss":
        known["embeddings"] = a.view(3, 4, 8)
    if name == "PatchKernelAlignmentLoss":
        known["mask"] = torch.arange(12).view(3, 4) == 5
    if name == "IBOTPatchLoss":
        known |= {"teacher_out": a, "student_out": b}
    if name == "IBOTPlusPlusPatchLoss":
        known |= {
            "teacher_out": a[:, None].expand(12, 8, 8)[:2],
            "student_out": b[:16, None].expand(12, 8, 8)[:2],
        }
    rival = rival or RIVALS[name]
    asked = inspect.signature(getattr(rival, name).forward).parameters
    left = {argument for argument in asked if argument not in ("self", *known)}
    assert left == ({"indices_tuple", "ref_emb", "ref_labels"} if rival is metric else set())
    assert all(argument in getattr(losses, name).__doc__ for argument in left)
    return {argument: known[argument] for argument in asked if argument in known}


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")  # lightly's DCLWLoss
@pytest.mark.parametrize("name", OF_LIGHTLY)
def test_arguments_by_place_are_lightlys(name):
    ours = made_by_place(losses, name, **OURS.get(name, {}))
    theirs = made_by_place(RIVALS[name], name)
    got, want = (call(loss, inputs(name)) for loss in (ours, theirs))
    torch.testing.assert_close(got, want.squeeze(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", OF_OPEN_CLIP)
def test_arguments_by_place_are_open_clips(name):
    ours, theirs = (getattr(m, name)(*OF_OPEN_CLIP[name]) for m in (losses, open_clip.loss))
    arguments = inputs(name).values()
    torch.testing.assert_close(ours(*arguments), theirs(*arguments))


@pytest.mark.parametrize("size, width", [(8, 8), ((8, 5), 5), (0, None), ((0, 5), None)])
def test_a_banks_width_may_be_that_of_the_first_batch(size, width):
    ours = losses.NTXentLoss(0.5, size)
    x, y = views(4, width or 8)
    loss = ours(x.requires_grad_(), y)
    bank = ours.memory_bank
    assert loss.isfinite() and (bank is None if width is None else bank.keys.shape == (8, width))
    again = losses.NTXentLoss(0.5, size)  # whether it has seen a batch or not
    again.load_state_dict(ours.state_dict())
    assert torch.equal(again(x, y), ours(x, y))


def test_horovod_is_refused():
    with pytest.raises(ValueError, match="use_horovod=True: ranks meet through torch.distributed"):
        losses.CLIPLoss(use_horovod=True)


def test_no_namesake_is_left_out():
    for module in (lightly.loss, open_clip.loss):
        assert {n for n in vars(losses) if n[0].isupper() and hasattr(module, n)} <= {
            *RIVALS
        } | FUNCTIONS


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")  # lightly's DCLWLoss
@pytest.mark.parametrize("name", RIVALS)
def test_arguments_by_name_are_the_rivals(name):
    ours, theirs = (getattr(m, name) for m in (losses, RIVALS[name]))
    asked = inspect.signature(theirs).parameters
    made = {argument: about.default for argument, about in asked.items()}
    made |= {argument: size for argument, size in SMALL.items() if argument in asked}
    given = inputs(name)
    values = []
    for kind, more in ((ours, OURS.get(name, {})), (theirs, {})):
        torch.manual_seed(1)
        values.append(kind(**made, **more)(**given).squeeze())
    torch.testing.assert_close(*values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("labels", [torch.arange(12) % 5, torch.arange(12) // 4 * 10**12])
@pytest.mark.parametrize("name", LABELED)
def test_labeled_embeddings_by_name_are_pytorch_metric_learnings(name, labels):
    embeddings = inputs(name, metric)["embeddings"].double()
    values = [getattr(m, name)(0.2)(embeddings=embeddings, labels=labels) for m in (losses, metric)]
    torch.testing.assert_close(*values)


def test_one_argument_by_two_names():
    z = views()[0]
    with pytest.raises(TypeError, match="given by two names, among embeddings, out0"):
        losses.NTXentLoss()(embeddings=z, out0=z)


def attributes(thing):
    """The public ones, without those that every module has."""
    return {n for n in {*vars(thing), *dir(thing)} - {*dir(nn.Module())} if not n.startswith("_")}


@pytest.mark.parametrize("name", RIVALS)
def test_what_a_rivals_instance_has_is_there_or_is_told(name):
    """The same value, or a line of the docstring that says that it is not there."""
    module = RIVALS[name]
    ours, theirs = (made_by_place(m, name) for m in (losses, module))
    differs = type(ours).__doc__.partition("Differs")[2]
    for attribute in attributes(theirs) | {*theirs._modules}:
        want = getattr(theirs, attribute)
        if hasattr(ours, attribute) and not isinstance(want, nn.Module) and not callable(want):
            same = torch.equal if isinstance(want, torch.Tensor) else operator.eq
            assert same(getattr(ours, attribute), want), attribute
        else:
            assert hasattr(ours, attribute) or attribute in differs, attribute


def test_a_flag_that_the_group_decides_may_be_set_to_what_it_is():
    loss = losses.DCLWLoss(gather_distributed=False)
    loss.gather_distributed = False
    with pytest.raises(ValueError, match="gather_distributed must be .*, False, got True"):
        loss.gather_distributed = True


class Model(nn.Module):
    """A loss is saved with the rest of a model."""

    def __init__(self, size):
        super().__init__()
        self.head, self.loss = nn.Linear(2, 2), losses.NTXentLoss(0.5, size)


@pytest.mark.parametrize("size", [(4, 8), 4])
def test_a_state_without_a_bank_leaves_the_bank_as_it_is(size):
    model, x = Model(size), views()[0]
    model.loss.memory_bank.push(x[:3])
    before = {name: kept.clone() for name, kept in model.loss.memory_bank.state_dict().items()}
    assert not any(model.load_state_dict(Model(0).state_dict()))  # no key missing, none left over
    after = model.loss.memory_bank.state_dict()
    assert all(torch.equal(before[name], kept) for name, kept in after.items())
    assert int(after["next"]) == 3


def test_a_saved_bank_is_dropped_where_there_is_none():
    state = Model((4, 8)).state_dict()
    names = set(state)
    model = Model(0)
    assert not any(model.load_state_dict(state))
    assert torch.equal(model.head.weight, state["head.weight"]) and set(state) == names
    with pytest.raises(RuntimeError, match='Missing key.*next"'):
        Model((4, 8)).load_state_dict({n: x for n, x in state.items() if "next" not in n})
    with pytest.raises(RuntimeError, match='Missing key.*"bank"'):  # a queue's loss needs its queue
        Queue(4, 8).load_state_dict({})


@pytest.mark.parametrize("size", [(4, 8), 4])
def test_lightlys_bank_is_taken(size):
    theirs = lightly.loss.NTXentLoss(0.5, (4, 8))
    x, y = views()
    theirs(x[:3].requires_grad_(), y[:3])
    assert not theirs.state_dict()  # it saves none: these are its names, as a user would save them
    ours = losses.NTXentLoss(0.5, size)
    ours.load_state_dict(dict(theirs.named_buffers()))
    torch.testing.assert_close(ours(x, y), theirs(x, y))
    assert int(ours.memory_bank.next) == 3 + 12 % 4
    ours.load_state_dict(theirs.state_dict())
