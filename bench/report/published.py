"""Figures of other people's: what cannot be run here is quoted, with its source.

They were made on other hardware and at other settings than a run of ours, so they stand beside it
and enter no ratio with it.  "Derived" is our arithmetic on what the source states.
"""

from __future__ import annotations

from collections.abc import Iterable

from fastssl.bench.record import Published

_INF_CL = "https://arxiv.org/abs/2410.17243"
_SIGLIP = "https://pypi.org/project/siglip-kernel/0.1.2/"
_STABLE = (
    "https://github.com/galilai-group/stable-pretraining/blob/main/benchmarks/imagenet10/RESULTS.md"
)
_DINOV2 = "https://github.com/facebookresearch/dinov2#training"
_DINOV3 = "https://github.com/facebookresearch/dinov3#training"
_MAE = "https://github.com/facebookresearch/mae/blob/main/PRETRAIN.md"
_SOLO = "https://github.com/vturrisi/solo-learn#training-efficiency-for-dali"


def quote(cases: Iterable[str] | None = None) -> list[Published]:
    """The figures that belong beside the given cases; all of them, without any.

    A figure belongs to every case of the same first word: those of "train-mae" stand beside
    "train-simclr" too.

    >>> {row.rival for row in quote(["siglip-sweep"])}
    {'siglip-kernel'}
    """
    if cases is None:
        return list(PUBLISHED)
    wanted = {_first_word(name) for name in cases}
    return [row for row in PUBLISHED if _first_word(row.case) in wanted]


def _first_word(case: str) -> str:
    return case.replace("_", "-").split("-")[0]


def _inf_cl(gpus: int, rival: str, figures: str) -> Published:
    """A line of Inf-CL's table 1: memory of the loss alone, at five global batch sizes."""
    shape = "ViT-L/14, global batch 32k / 64k / 128k / 256k / 1024k"
    figure = f"loss memory {figures} GB a GPU; -: does not fit"
    hardware = f"{gpus} A800 80 GB"
    return Published("clip", rival, hardware, shape, "float16 amp", figure, f"{_INF_CL} (table 1)")


def _siglip(shape: str, figure: str, hardware: str = "GH200/H100") -> Published:
    return Published("siglip", "siglip-kernel", hardware, shape, "bfloat16", figure, _SIGLIP)


def _training(
    case: str, rival: str, hardware: str, shape: str, figure: str, source: str, dtype: str = ""
) -> Published:
    return Published(case, rival, hardware, shape, dtype, figure, source)


PUBLISHED: tuple[Published, ...] = (
    _inf_cl(8, "CLIP's own loss", "16.67 / 66.11 / - / - / -"),
    _inf_cl(8, "OpenCLIP, local loss", "2.27 / 8.63 / 33.64 / - / -"),
    _inf_cl(8, "Inf-CL", "0.18 / 0.36 / 0.72 / 1.45 / -"),
    _inf_cl(8, "Inf-CL, data offloaded", "0.18 / 0.36 / 0.72 / 1.45 / 6.53"),
    _inf_cl(32, "CLIP's own loss", "16.66 / 66.11 / - / - / -"),
    _inf_cl(32, "OpenCLIP, local loss", "0.71 / 2.45 / 8.98 / 34.35 / -"),
    _inf_cl(32, "Inf-CL", "0.05 / 0.09 / 0.18 / 0.35 / 1.44"),
    Published(
        "clip",
        "Inf-CL",
        "8 A800 80 GB",
        "ViT-L/14, global batch 32k to 256k",
        "float16 amp",
        "about 59 h an epoch of 280 M pairs at every batch size, the whole training step",
        f"{_INF_CL} (figure 4)",
    ),
    _siglip("B=65,536", "48.8 ms forward + backward on 1.4 GB (eager: 102.0 ms, 33 GB)"),
    _siglip("B=65,536, chunk_size=1024", "54.3 ms forward + backward on 640 MB"),
    _siglip("B=262,144", "5.6 GB; both of its references run out of memory"),
    _siglip("B=65,536 D=768", "46.9 / 13.1 / 10.1 ms on 1 / 4 / 8 GPUs", "GH200"),
    _siglip("B=131,072 D=768", "193.4 / 31.5 ms on 1 / 8 GPUs", "GH200"),
    _training(
        "train-barlow",
        "stable-pretraining",
        "1 H200",
        "ViT-S/16, batch 256",
        "342 images/s augmenting on the CPU, 871 on the GPU (CPU shared: 514 alone, float16)",
        _STABLE,
        "bfloat16 amp",
    ),
    _training(
        "train-barlow",
        "stable-pretraining",
        "1 H200",
        "ViT-L/16, batch 384",
        "334 images/s augmenting on the CPU, 412 on the GPU, 511 with FP8 and torch.compile",
        _STABLE,
        "bfloat16 amp, FP8",
    ),
    _training(
        "train-dino",
        "DINOv2",
        "32 A100 80 GB",
        "ViT-L/16, batch 2048, 125,000 steps",
        "about 1 day; derived: 93 images/s a GPU",
        _DINOV2,
        "float16 amp",
    ),
    _training(
        "train-dino",
        "DINOv3",
        "32 H100 80 GB",
        "ViT-L/16, batch 2048, 125,000 steps",
        "about 14 h; derived: 159 images/s a GPU (112 by its configuration's 0.57 s a step)",
        _DINOV3,
        "bfloat16",
    ),
    _training(
        "train-mae",
        "MAE",
        "64 V100",
        "ViT-L/16, batch 4096, 800 epochs of ImageNet-1k",
        "about 42 h; derived: 106 images/s a GPU",
        _MAE,
    ),
    _training(
        "train-barlow",
        "solo-learn",
        "2 RTX 2080 Ti",
        "ResNet-18, 4 workers a GPU",
        "4 min 55 s an epoch without DALI, 2 min 10 s with it",
        _SOLO,
    ),
)
