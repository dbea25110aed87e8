"""Two views of made-up images, and the long way to their scores."""

import torch

from tests.oracle import DEVICE, as_accurate_as_eager, grads


def views(B, D, dtype=torch.float32):
    torch.manual_seed(B)
    z = torch.randn(B, D, device=DEVICE)
    return [(z + 0.5 * torch.randn_like(z)).to(dtype) for _ in range(2)]


def unit(z):
    return z / z.norm(dim=-1, keepdim=True)


def stacked(z0, z1):
    """All 2B normalized views, the first ones first, and which pairs are of different images."""
    z, image = unit(torch.cat([z0, z1])), torch.arange(len(z0), device=z0.device).repeat(2)
    return z, image[:, None] != image


def masked_lse(scores, keep):
    return scores.masked_fill(~keep, -torch.inf).logsumexp(1)


def assert_as_good(ours, eager, inputs, reduce, score, slack=2.0):
    """`assert_no_worse` of the gradients; of the value, one number in which eager may be lucky, to
    a float32 rounding of the largest score, on top of eager's error."""
    truth = grads(eager, [z.double() for z in inputs], reduce)
    mine, par = grads(ours, inputs, reduce), grads(eager, inputs, reduce)
    error, eagers = ((x[0].double() - truth[0]).abs().item() for x in (mine, par))
    assert error <= eagers + torch.finfo(torch.float32).eps * max(score, truth[0].abs().item())
    for a, e, t in zip(mine[1:], par[1:], truth[1:], strict=True):
        as_accurate_as_eager(a, e, t, slack)
