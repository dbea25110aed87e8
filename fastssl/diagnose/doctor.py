"""What is installed, what each primitive will run on, and what to install for what is missing."""

import importlib.util
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch

from fastssl.kernels import implementations

TRAIN, DALI = "pip install 'fastssl-torch[train]'", "pip install 'fastssl-torch[dali]'"
FORMATS = "pip install 'fastssl-torch[formats]'"
# distribution, module that proves it, what it is for, how to get it
PARTS = [
    (
        "triton",
        "triton",
        "fused kernels on CUDA",
        "comes with torch's CUDA build: pip install torch",
    ),
    ("deepspeed", "deepspeed", "the training engine", TRAIN),
    ("timm", "timm", "backbones and optimizers", TRAIN),
    ("torchvision", "torchvision", "augmentation on the CPU", TRAIN),
    ("scikit-learn", "sklearn", "digits, linear probe", TRAIN),
    ("nvidia-dali-cuda130", "nvidia.dali", "augmentation pipelines, GPU or CPU (optional)", DALI),
    ("lmdb", "lmdb", "images in LMDB (optional)", FORMATS),
    ("datasets", "datasets", "Hugging Face data sets on disk (optional)", FORMATS),
    ("fsspec", "fsspec", "shards at s3://, gs://, https:// (optional)", FORMATS),
    # `apex` on PyPI is an unrelated package: NVIDIA's has apex.optimizers
    (
        "apex",
        "apex.optimizers",
        "fused optimizers (optional)",
        "build github.com/NVIDIA/apex, or docker/",
    ),
]


@dataclass(frozen=True)
class Finding:
    """name and state of a part; `remedy` is empty where there is nothing to do."""

    name: str
    state: str
    purpose: str
    remedy: str = ""


def findings() -> list[Finding]:
    """The machine, then each part."""
    found = [
        Finding("python", platform.python_version(), platform.platform(terse=True)),
        Finding("torch", torch.__version__, f"{torch.get_num_threads()} threads"),
        _gpu(),
    ]
    return found + [_part(*part) for part in PARTS]


def primitives() -> dict[str, str]:
    """Which implementation each primitive will use on this machine's device."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return implementations(device)


def _gpu() -> Finding:
    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
        state = f"{torch.cuda.device_count()} x {', '.join(sorted(names))}"
        return Finding("GPU", state, f"CUDA {torch.version.cuda}, driver {_driver()}")
    if torch.version.cuda is None:
        return Finding(
            "GPU", "none", "torch was built without CUDA", "pip install torch (CUDA build)"
        )
    return Finding("GPU", "none", f"torch has CUDA {torch.version.cuda}, but sees no device")


def _driver() -> str:
    try:
        with open("/proc/driver/nvidia/version") as file:
            return file.readline().split("Kernel Module")[-1].split()[0]
    except (OSError, IndexError):
        return "unknown"


def _part(distribution: str, module: str, purpose: str, remedy: str) -> Finding:
    try:
        present = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        present = False
    if not present:
        return Finding(distribution, "missing", purpose, remedy)
    try:
        return Finding(distribution, version(distribution), purpose)
    except PackageNotFoundError:
        return Finding(distribution, "present", purpose)
