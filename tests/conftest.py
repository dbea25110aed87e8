"""Every test runs on the CPU or the GPU alike; without a GPU, Triton interprets its kernels."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
