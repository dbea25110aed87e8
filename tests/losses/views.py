"""Two views of made-up images, and the long way to their scores."""

import torch

from tests.oracle import DEVICE


def views(B, D, dtype=torch.float32):
    torch.manual_seed(B)
    z = torch.randn(B, D, device=DEVICE)
    return [(z + 0.5 * torch.randn_like(z)).to(dtype) for _ in range(2)]


def unit(z):
    return z / z.norm(dim=-1, keepdim=True)


def stacked(z0, z1):
    """All 2B normalised views, the first ones first, and which pairs are of different images."""
    z, image = unit(torch.cat([z0, z1])), torch.arange(len(z0), device=z0.device).repeat(2)
    return z, image[:, None] != image


def masked_lse(scores, keep):
    return scores.masked_fill(~keep, -torch.inf).logsumexp(1)
