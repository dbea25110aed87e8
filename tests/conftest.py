"""Every test runs on the CPU or the GPU alike; without a GPU, Triton interprets its kernels."""

import os
import sys

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    # One thread here, in ranks and in programs started: with two, sums round otherwise.
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import fastssl.kernels  # noqa: E402  after the variable is set

# The doctests of kernels/ are collected by the folder's name.  Imported a second time under it, the
# operators would be registered twice, and the second would not know the masks of the first.
for name, module in list(sys.modules.items()):
    if name.startswith(fastssl.kernels.__name__):
        sys.modules[name.removeprefix("fastssl.")] = module
