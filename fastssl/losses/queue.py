"""A queue of past keys: the negatives, or the neighbors, that a batch alone does not have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.distributed import Group, all_gather_nograd, rank, require_even, world_size
from fastssl.losses._checks import check_counts
from fastssl.losses._unit import unit


class Queue(nn.Module):
    """The last `size` keys, normalized: first in, first out.

    size     how many keys; the oldest give way to new ones.
    dim      their width; None: that of the first keys the queue is fitted to.
    State    bank (size, dim) float32 and next, 0-d int64: the place of the oldest key, which the
             next one takes.  Both are in state_dict.  At first the bank is full of random
             directions, the same on every rank and in every run: it has a generator of its own.
    Memory   4 size dim bytes, and as much for each copy that `keys` makes.
    Raises   ValueError: size or dim below 1; keys that are not (B, dim) with B > 0; batches that
             differ between ranks (on every rank); keys asked of a queue that has no width yet.
    Ranks    push() gathers all ranks' keys first, in rank order, so that every rank holds the same
             queue, as one process with the joined batch would.
    Differs  from lightly's MemoryBankModule: a batch that reaches past the end goes on at the
             start, where lightly drops what is left over (equal when the batch divides the size);
             of a batch larger than the queue the last keys stay, there the first; keys are
             normalized here; always (size, dim), never (dim, size); the state is saved.
    Source   He et al. 2020, MoCo, arXiv:1911.05722, section 3.2.

    >>> queue = Queue(3, 2)
    >>> _ = queue.push(torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0], [0.0, 4.0]]))
    >>> queue.keys.tolist()
    [[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]
    """

    bank: Tensor
    next: Tensor

    def __init__(self, size: int, dim: int | None = None) -> None:
        super().__init__()
        check_counts(size=size, **({} if dim is None else {"dim": dim}))
        self.size = size
        self.register_buffer("bank", torch.empty(size, 0))
        self.register_buffer("next", torch.zeros((), dtype=torch.int64))
        if dim is not None:
            self._fill(dim)

    @property
    def dim(self) -> int | None:
        """The width of a key; None as long as the queue has seen none."""
        return self.bank.shape[1] or None

    @property
    def keys(self) -> Tensor:
        """A float32 copy of the bank, (size, dim), which later pushes do not change."""
        if self.dim is None:
            raise ValueError("this queue has no width yet: give it dim, or keys to fit or to push")
        return self.bank.to(torch.float32, copy=True)

    def fit(self, keys: Tensor) -> None:
        """Take the width, and the device, of keys (B, dim) if the queue has none yet.

        Raises ValueError for keys that are not (B, dim) with B > 0.
        """
        width = "dim" if self.dim is None else self.dim
        if keys.ndim != 2 or 0 in keys.shape or width not in ("dim", keys.shape[1]):
            raise ValueError(f"keys must be (B, {width}) with B > 0, got {tuple(keys.shape)}")
        if self.dim is None:
            self.bank, self.next = self.bank.to(keys.device), self.next.to(keys.device)
            self._fill(keys.shape[1])

    @torch.no_grad()
    def push(self, keys: Tensor, process_group: Group = None, *, check: bool = True) -> int:
        """Put every rank's keys (B, dim), any float dtype, normalized, in the oldest ones' place.

        Returns how many have been put.  check=False leaves out the comparison of shapes between
        ranks, for a caller that made it.
        """
        if check:
            require_even(keys, process_group, "keys")
        self.fit(keys)
        everyone = all_gather_nograd(keys, process_group, check=False)[-self.size :]
        places = (self.next + torch.arange(len(everyone), device=self.next.device)) % self.size
        self.bank.index_copy_(0, places, unit(everyone).to(self.bank))
        self.next.copy_((self.next + len(everyone)) % self.size)
        return len(everyone)

    def share(self, process_group: Group = None) -> Tensor:
        """Of `keys` every W-th, from this rank's number on: all ranks together have each once."""
        return self.keys[rank(process_group) :: world_size(process_group)]

    def extra_repr(self) -> str:
        return f"size={self.size}, dim={self.dim}"

    def _fill(self, dim: int) -> None:
        generator = torch.Generator("cpu").manual_seed(0)
        random = torch.randn(self.size, dim, generator=generator, device="cpu")
        self.bank = F.normalize(random).to(self.bank)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """A queue without width takes that of the saved one; lightly's `next` is bank_ptr (1,)."""
        if prefix + "bank_ptr" in state_dict:
            state_dict[prefix + "next"] = state_dict.pop(prefix + "bank_ptr")
        saved = state_dict.get(prefix + "bank")
        if self.dim is None and saved is not None:
            self.bank = self.bank.new_empty(self.size, saved.shape[1])
        super()._load_from_state_dict(state_dict, prefix, *rest)


def bank_of(memory_bank_size: int | Sequence[int]) -> Queue | None:
    """The queue of keys or (keys, D); None for 0 keys.  Anything else is a ValueError."""
    given = memory_bank_size
    size = (given,) if isinstance(given, int) else tuple(given)
    if len(size) not in (1, 2):
        raise ValueError(f"memory_bank_size must be keys or (keys, D), got {given}")
    return Queue(*size) if size[0] else None


class Banked(nn.Module):
    """What a loss with a memory_bank is: any state may be loaded, with a bank or without."""

    memory_bank: Queue | None

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """A state without a bank leaves the bank as it is; a bank without a place is dropped."""
        bank = prefix + "memory_bank."
        saved = [name for name in state_dict if name.startswith(bank)]
        if self.memory_bank is None:
            for name in saved:
                del state_dict[name]
        elif not saved:
            self.memory_bank.state_dict(destination=state_dict, prefix=bank)
        super()._load_from_state_dict(state_dict, prefix, *rest)
