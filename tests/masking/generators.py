"""Every generator in one small setting, as (seeds) -> the places it names, joined."""

import torch

from fastssl import masking as m

GRID, CLIP = (6, 8), (4, 4, 6)


def weights(seeds):
    return ((seeds.flatten()[:, None] * 7 + torch.arange(48, device=seeds.device)) % 5).double()


MASKINGS = {
    "random": lambda s: m.random_masking(s, 48, 12),
    "column": lambda s: m.column_masking(s, 11, 4),
    "weighted": lambda s: m.weighted_masking(s, weights(s), 12),
    "grid": lambda s: m.grid_masking(s, GRID, (2, 4)),
    "units": lambda s: m.unit_masking(s, GRID, 2, 5),
    "block": lambda s: m.block_masking(s, GRID, 29, least=4, tries=6),
    "block, most hidden": lambda s: m.block_masking(s, GRID, 5, least=4, tries=3),
    "tube": lambda s: m.tube_masking(s, CLIP, 5),
    "dual": lambda s: m.dual_masking(s, CLIP, 5, 20).masking,
    "span": lambda s: m.span_masking(s, 40, 23, 5),
    "time and frequency": lambda s: m.time_frequency_masking(s, GRID, 3, 2, time_span=2),
    "noise, low": lambda s: m.noise_masking(s, GRID, 12, "low"),
    "noise, high": lambda s: m.noise_masking(s, (40,), 12, "blue"),
    "noise, band": lambda s: m.noise_masking(s, CLIP, 12, "green"),
    "noise, stop": lambda s: m.noise_masking(s, GRID, 12, "stop"),
    "connected": lambda s: m.connected_masking(s, GRID, 20, groups=3),
    "connected, clip": lambda s: m.connected_masking(s, CLIP, 20, groups=3),
}


def _multi_block(seeds):
    return m.multi_block_masking(seeds, GRID, context=14, target=8, blocks=4)


# What is named besides a Masking: name -> (generator, places, shape without the batch)
PLACES = {
    "I-JEPA context": (lambda s: _multi_block(s).context, 48, (14,)),
    "I-JEPA targets": (lambda s: _multi_block(s).targets, 48, (4, 8)),
    "running cell": (lambda s: m.running_cell_masking(s, CLIP, 48), 96, (48,)),
    "dual, decoded": (lambda s: m.dual_masking(s, CLIP, 5, 20).decoded, 96, (20,)),
}
SIZES = {  # name -> (places, visible ones)
    "random": (48, 12),
    "column": (11, 4),
    "weighted": (48, 12),
    "grid": (48, 6),
    "units": (48, 20),
    "block": (48, 29),
    "block, most hidden": (48, 5),
    "tube": (96, 20),
    "dual": (96, 20),
    "span": (40, 23),
    "time and frequency": (48, 20),
    "noise, low": (48, 12),
    "noise, high": (40, 12),
    "noise, band": (96, 12),
    "noise, stop": (48, 12),
    "connected": (48, 20),
    "connected, clip": (96, 20),
}


def shown(masking):
    """True at visible places: (B, L)."""
    return masking.restore < masking.visible.shape[1]


def marked(ids, length):
    """True at ids (B, K): (B, L)."""
    blank = torch.zeros(*ids.shape[:-1], length, dtype=torch.bool, device=ids.device)
    return blank.scatter(-1, ids, True)
