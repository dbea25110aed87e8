"""Whole training steps: forward, backward and update of SimCLR, Barlow Twins and MAE.

B images of S pixels a side; a ViT of patches of P pixels, width W and depth L, with its method's
head or decoder (the paper's sizes from W = 384 on, smaller ones below).  Everybody has the same
modules, start and optimizer; they differ in the loss, in what becomes of hidden patches, and in who
runs the step:

    fastssl           the method in a plain loop; in 16 bits under autocast
    fastssl engine    the method under DeepSpeed, as `fastssl pretrain` trains it: in 16 bits with
                      bfloat16 parameters and float32 masters
    reference         the formula as written, in the same plain loop
    compile           the same, forward and backward compiled
    lightly           lightly's loss, or its masked autoencoder, in the same plain loop

Floors: the products of blocks, patch embedding and head, three times the forward's (twice for the
patch embedding, whose input needs no gradient), and the loss's; the images read, and every matrix
of the encoder with its optimizer's state read and written, in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from fastssl.bench.cases.correlation import barlow_reference
from fastssl.bench.cases.losses import ntxent_reference
from fastssl.bench.cases.rivals import Late, Rivals, compile_late, has_packages, library, nbytes
from fastssl.bench.cases.trainers import (
    Loop,
    MAELightly,
    UnderEngine,
    Weights,
    mae_reference,
    make_batch,
)
from fastssl.bench.measure.gate import SLACK_OURS
from fastssl.bench.registry import OURS, REFERENCE, Absent, Problem, Shape, case, shapes_of

_BIG = 384  # the width from which a model has its paper's head
_VISIBLE = 1 / 4
_SLACK_OTHERS = 4.0
_ROUNDING = 4 * torch.finfo(torch.float32).eps  # of the weights
_GATE = {"B": 16, "S": 32, "P": 8, "W": 64, "L": 2}
_SHAPES = shapes_of(
    "B S P W L",
    quick=[tuple(_GATE.values())],
    cpu=[(64, 32, 4, 192, 4)],
    cuda=[(256, 224, 16, 384, 12), (256, 224, 16, 768, 12)],
)
_LARGE = _SHAPES | shapes_of(
    # ViT-L/16 at 224 pixels, ViT-H/14 at 476 (1,156 patches), a billion parameters
    "B S P W L",
    cuda=[(512, 224, 16, 1024, 24), (64, 476, 14, 1280, 32), (256, 224, 14, 1408, 40)],
)
_register = partial(
    case, test="tests/methods/test_methods.py", dtypes=("float32", "bfloat16"), gate_shape=_GATE
)
_LARS = {"name": "lars", "lr": 0.3, "weight_decay": 1e-6, "momentum": 0.9}
_ADAMW = {"name": "adamw", "lr": 1.5e-4, "weight_decay": 0.05, "betas": (0.9, 0.95)}


@dataclass(frozen=True)
class _Recipe:
    """What tells the methods apart.

    config     the method's configuration, its name included.
    optim      options of OptimConfig.
    views      images of a sample in a step.
    flops      of a whole step.
    reference  method -> what gives the loss of a step's inputs by the formula as written.
    lightly    (module, what makes from it and the method (the model, what gives its loss)).
    """

    config: dict[str, Any]
    optim: dict[str, Any]
    views: int
    flops: float
    reference: Callable[[Any], Callable[..., Tensor]]
    lightly: tuple[str, Callable[[Any, Any], tuple[nn.Module, Callable[..., Tensor]]]]


def _problem(shape: Shape, dtype: torch.dtype, device: torch.device, recipe: _Recipe) -> Problem:
    size = (shape["B"], 3, shape["S"], shape["S"])
    base = torch.randn(size, device=device)
    views = [base + 0.5 * torch.randn_like(base) for _ in range(recipe.views)]
    inputs = (*views, torch.randint(1 << 62, (shape["B"],), device=device))
    rivals = _rivals(shape, dtype, device, recipe)
    matrices = (12 * shape["W"] * shape["L"] + 3 * shape["P"] ** 2) * shape["W"]
    state = 1 if recipe.optim["name"] == "lars" else 2
    return Problem(
        inputs=inputs,
        rivals=rivals,
        flops={"run": recipe.flops},
        bytes_moved={"run": nbytes(*views) + 8.0 * matrices * (1 + state)},
        items=(shape["B"], "images"),
        check=_same_step(
            rivals, lambda wide: _reference_loop(shape, wide, device, recipe), inputs, dtype
        ),
    )


def _rivals(shape: Shape, dtype: torch.dtype, device: torch.device, recipe: _Recipe) -> Rivals:
    if not has_packages("timm", "pydantic"):
        missing = Absent("pip install 'fastssl-torch[train]'")
        return dict.fromkeys((OURS, OURS + " engine", REFERENCE, "compile", "lightly"), missing)
    new = partial(_method, shape, recipe, device)

    def loop(forward: Callable[[Any], Callable[..., Any]]) -> Loop:
        method = new()
        return Loop(method, method.encoder, forward(method), recipe.optim, dtype)

    def ours(method: Any) -> Callable[..., Tensor]:
        return lambda *inputs: method(make_batch(inputs))["loss"]

    def lightly(module: Any) -> Loop:
        method = new()
        model, forward = recipe.lightly[1](module, method)
        return Loop(model, method.encoder, forward, recipe.optim, dtype)

    engine: Any = Absent("pip install 'fastssl-torch[train]'")
    if has_packages("deepspeed"):
        engine = Late(lambda: UnderEngine(new(), recipe.optim, dtype, shape["B"]))
    return {
        OURS: Late(lambda: loop(ours)),
        OURS + " engine": engine,
        REFERENCE: Late(lambda: _reference_loop(shape, dtype, device, recipe)),
        "compile": Late(lambda: loop(lambda method: compile_late(recipe.reference(method)))),
        "lightly": library(recipe.lightly[0], lightly),
    }


def _reference_loop(
    shape: Shape, dtype: torch.dtype, device: torch.device, recipe: _Recipe
) -> Loop:
    """The plain loop over the formula as written; in float64 all of it is."""
    method = _method(shape, recipe, device)
    method = method.double() if dtype == torch.float64 else method
    return Loop(method, method.encoder, recipe.reference(method), recipe.optim, dtype)


def _method(shape: Shape, recipe: _Recipe, device: torch.device) -> Any:
    """The method with its encoder, from the same start whoever asks."""
    from pydantic import TypeAdapter

    from fastssl.methods import AnyMethodConfig, build_method
    from fastssl.models import build_backbone

    config: Any = TypeAdapter(AnyMethodConfig)
    size = {"embed_dim": shape["W"], "depth": shape["L"], "num_heads": max(1, shape["W"] // 64)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = build_backbone(
            "vit_small_patch16_224",
            shape=(3, shape["S"], shape["S"]),
            kwargs={"patch_size": shape["P"], **size},
        )
        method = build_method(encoder, config.validate_python(recipe.config))
    return method.to(device)


def _same_step(
    rivals: Rivals,
    written: Callable[[torch.dtype], Loop],
    inputs: tuple[Tensor, ...],
    dtype: torch.dtype,
) -> Callable[[str, Sequence[Tensor]], str]:
    """The check: the loss, and how a few weights have moved, beside the formula in float64.

    A movement's error is the length of what it differs by.  Ours may err twice as much as the
    formula in the dtype measured, the others and the engine, which keeps activations in bfloat16
    too, four times; and by the rounding of the weights themselves.
    """

    @cache
    def after(steps: int, in_dtype: torch.dtype) -> tuple[Tensor, Weights, Weights]:
        loop, wide = written(in_dtype), in_dtype == torch.float64
        args = [x.to(in_dtype) if wide and x.is_floating_point() else x for x in inputs]
        loss = [loop(*args) for _ in range(steps)][-1]
        return loss, loop.start, loop.weights()

    def check(name: str, outputs: Sequence[Tensor]) -> str:
        late: Any = rivals[name]
        steps, slack = late.rival.steps, SLACK_OURS if name == OURS else _SLACK_OTHERS
        eager, truth = after(steps, dtype), after(steps, torch.float64)
        error, par = (abs(float(x) - float(truth[0])) for x in (outputs[0], eager[0]))
        bound = slack * par + 4 * torch.finfo(dtype).eps * abs(float(truth[0]))
        if not error <= bound:
            return f"loss is off by {error:.1e}, allowed {bound:.1e}"
        moves = [_moves(late.rival.start, late.rival.weights()), _moves(*eager[1:])]
        for weight, right in _moves(*truth[1:]).items():
            error, par = (float((move[weight] - right).norm()) for move in moves)
            bound = slack * par + _ROUNDING * float(truth[2][weight].norm())
            if not error <= bound:
                off, allowed = error / float(right.norm()), bound / float(right.norm())
                return f"{weight} moved {off:.1%} otherwise, allowed {allowed:.1%}"
        return ""

    return check


def _moves(start: Weights, now: Weights) -> Weights:
    """What was added to each weight."""
    return {name: (now[name] - start[name]).cpu() for name in start}


def _tokens(shape: Shape) -> int:
    return (shape["S"] // shape["P"]) ** 2


def _blocks(tokens: int, width: int, depth: int) -> float:
    """Flops of a transformer's blocks, forward, for one sample."""
    return depth * (24.0 * tokens * width**2 + 4.0 * tokens**2 * width)


def _encoder(shape: Shape, tokens: int) -> float:
    """Flops of a step through the ViT, for one image with that many patches and a class token."""
    embed = 2.0 * tokens * 3 * shape["P"] ** 2 * shape["W"]
    return 3 * _blocks(tokens + 1, shape["W"], shape["L"]) + 2 * embed


def _joint_reference(
    loss: Callable[[Tensor, Tensor], Tensor], method: Any
) -> Callable[..., Tensor]:
    """The loss of two views' embeddings, a step's inputs given."""
    return lambda a, b, seeds: loss(*(method.head(method.encoder(method.cast(x))) for x in (a, b)))


def _joint_lightly(name: str, value: float, module: Any, method: Any) -> tuple[nn.Module, Any]:
    return method, _joint_reference(getattr(module, name)(value), method)


@_register("train-simclr", shapes=_SHAPES)
def simclr(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    """A training step of SimCLR, two views of each image, LARS."""
    hidden, out = simclr_head(shape)
    recipe = _Recipe(
        config=dict(name="simclr", temperature=0.5, hidden_dim=hidden, projection_dim=out),
        optim=_LARS,
        views=2,
        flops=simclr_flops(shape),
        reference=partial(_joint_reference, ntxent_reference),
        lightly=("lightly.loss", partial(_joint_lightly, "NTXentLoss", 0.5)),
    )
    return _problem(shape, dtype, device, recipe)


def simclr_head(shape: Shape) -> tuple[int, int]:
    """The width inside SimCLR's head, and that of its embeddings."""
    W = shape["W"]
    return (2048, 128) if W >= _BIG else (4 * W, W)


def simclr_flops(shape: Shape) -> float:
    """Of a step of SimCLR, two views of each image."""
    B, W = shape["B"], shape["W"]
    hidden, out = simclr_head(shape)
    head = 6.0 * (W * hidden + hidden * out)
    return 2 * B * (_encoder(shape, _tokens(shape)) + head) + 3.0 * (2 * B) ** 2 * out


@_register("train-barlow-twins", shapes=_SHAPES)
def barlow_twins(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    """A training step of Barlow Twins, two views of each image, LARS."""
    B, W = shape["B"], shape["W"]
    out = 8192 if W >= _BIG else 4 * W
    head = 6.0 * (W * out + 2 * out * out)
    recipe = _Recipe(
        config=dict(name="barlow_twins", hidden_dim=out, projection_dim=out),
        optim=_LARS,
        views=2,
        flops=2 * B * (_encoder(shape, _tokens(shape)) + head) + 6.0 * B * out * min(B, out),
        reference=partial(_joint_reference, barlow_reference),
        lightly=("lightly.loss", partial(_joint_lightly, "BarlowTwinsLoss", 5e-3)),
    )
    return _problem(shape, dtype, device, recipe)


@_register("train-mae", shapes=_SHAPES)
def mae(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    """A training step of MAE, a quarter of the patches visible, AdamW."""
    return _problem(shape, dtype, device, _mae(shape))


@_register("train-mae-large", shapes=_LARGE)
def mae_large(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    """A training step of MAE as in train-mae, of large models; nobody's step is compiled."""
    problem = _problem(shape, dtype, device, _mae(shape))
    return replace(problem, rivals={k: v for k, v in problem.rivals.items() if k != "compile"})


def _mae(shape: Shape) -> _Recipe:
    width, depth = mae_decoder(shape)
    return _Recipe(
        config=dict(name="mae", decoder_dim=width, decoder_depth=depth, decoder_heads=width // 32),
        optim=_ADAMW,
        views=1,
        flops=mae_flops(shape),
        reference=lambda method: partial(mae_reference, method),
        lightly=("lightly", _mae_lightly),
    )


def mae_decoder(shape: Shape) -> tuple[int, int]:
    """The width and the depth of MAE's decoder."""
    return min(512, shape["W"]), min(8, shape["L"])


def mae_flops(shape: Shape) -> float:
    """Of a step of MAE, a quarter of the patches visible."""
    tokens, (width, depth) = _tokens(shape), mae_decoder(shape)
    visible = round(_VISIBLE * tokens)
    decoder = _blocks(tokens + 1, width, depth) + 2.0 * (visible + 1) * shape["W"] * width
    decoder += 2.0 * (tokens - visible) * width * 3 * shape["P"] ** 2
    return shape["B"] * (_encoder(shape, visible) + 3 * decoder)


def _mae_lightly(_: Any, method: Any) -> tuple[nn.Module, Any]:
    import lightly.models.modules
    import lightly.models.utils

    model = MAELightly(lightly, method)
    return model, model
