"""One loss over nested prefixes: in one sweep, and one prefix after another.

B pairs, D features, of which the prefixes are an eighth, a quarter, half and all.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.bench.cases.losses import clip_reference, pair_problem, pairs
from fastssl.bench.cases.rivals import beside, library, on_cuda
from fastssl.bench.registry import Problem, Shape, Sweep, case, grid, shapes_of
from fastssl.losses import CLIPLoss, MatryoshkaLoss

_TEMPERATURE = 0.07


@case(
    "matryoshka",
    test="tests/losses/test_matryoshka.py",
    shapes=shapes_of(
        "B D",
        quick=[(256, 256)],
        cpu=[(256, 512), (1024, 512), (4096, 512)],
        cuda=[(4096, 768), (16384, 768), (32768, 768)],
    )
    | {"grid": grid(4096)},
    sweeps={
        "cpu": [Sweep("B", (256, 512, 1024, 2048), {"D": 512})],
        "cuda": [Sweep("B", (1024, 4096, 16384, 32768), {"D": 768})],
    },
    gate_shape={"B": 333},
    gpu_gate_shape={"B": 9000},
)
def matryoshka(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    """CLIP's loss of four nested prefixes, each of length one; the scale is a constant.

    Ours makes the longest prefix's products once, on a CPU where all exponentials fit.
    """
    D = shape["D"]
    dims = [D // 8, D // 4, D // 2, D]
    ours = MatryoshkaLoss(CLIPLoss(), dims, normalize=True)
    singly = MatryoshkaLoss([CLIPLoss() for _ in dims], dims, normalize=True)
    rivals = beside(partial(_ours, ours), partial(matryoshka_reference, dims))
    rivals["fastssl prefix by prefix"] = partial(_ours, singly)
    rivals["memeff"] = on_cuda(
        device,
        library(
            "memeff",
            lambda m: m.MemoryEfficientMatryoshkaCLIPLoss(
                dims, temperature=_TEMPERATURE, stable=False
            ),
        ),
    )
    return pair_problem(shape, pairs(shape, dtype, device), rivals)


def _ours(loss: MatryoshkaLoss, image: Tensor, text: Tensor) -> Tensor:
    return loss(image, text, 1 / _TEMPERATURE)


def matryoshka_reference(dims: list[int], image: Tensor, text: Tensor) -> Tensor:
    """Kusupati et al. 2022, arXiv:2205.13147, eq. 1, of CLIP's loss and normalized prefixes."""
    scale = torch.tensor(1 / _TEMPERATURE, dtype=image.dtype, device=image.device).log()
    cut = [[F.normalize(x[:, :m], dim=1) for x in (image, text)] for m in dims]
    return torch.stack([clip_reference(*two, scale) for two in cut]).sum()
