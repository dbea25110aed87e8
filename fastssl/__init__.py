"""fastssl: fast self-supervised pretraining in PyTorch.

fastssl.losses     drop-in losses, memory-lean and exact across ranks (torch alone)
fastssl.kernels    the primitives they are made of
fastssl pretrain   the engine, from the command line
"""

__version__ = "0.1.0"
