"""Files of pieces: a part of a tensor by its name, its field and where in the tensor it begins.

    encoder.blocks.0.attn.qkv.weight | parameter | 1536      -> elements 1536 ... of the flat weight

A file is a safetensors file, written a piece at a time, with a tree of plain values in its
metadata; what is read of many files are the ranges that are asked for, whoever wrote them.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from .tensor_files import DTYPE_NAMES, DTYPES, Kind, in_order, write_tensors

REST = "rest"  # the field of tensors that are no pieces: those of the tree

_MAPPED = 2**28  # bytes of files that are in memory at one time


def key_of(name: str, field: str, offset: int) -> str:
    return f"{name}|{field}|{offset}"


def write_shard(path: Path, tensors: Mapping[str, Tensor], tree: Any) -> None:
    """Write tensors, on whatever device, by their keys, holding one of them in memory at a time.

    tree: as `packed` gives it.  Raises OSError, and TypeError for a dtype that no file has.
    """
    kinds = {key: Kind(tuple(x.shape), x.dtype) for key, x in tensors.items()}
    some = (tensors[key] for key in in_order(kinds))
    write_tensors(path, kinds, some, {"tree": json.dumps(tree)})


def tree_of(path: Path) -> Any:
    """The tree in a file.  Raises what a file that is no such file brings about."""
    with safe_open(path, "pt") as file:
        return json.loads((file.metadata() or {}).get("tree", "null"))


class Shards:
    """The pieces in several files.  Raises ValueError for a key that is no piece's."""

    def __init__(self, paths: Iterable[Path]):
        self._pieces: dict[str, dict[str, list[tuple[int, int, Path, str]]]] = {}
        for path in paths:
            with safe_open(path, "pt") as file:
                for key in file.keys():
                    name, field, offset = key.rsplit("|", 2)
                    length = torch.Size(file.get_slice(key).get_shape()).numel()
                    places = self._pieces.setdefault(name, {}).setdefault(field, [])
                    places.append((int(offset), length, path, key))
        for fields in self._pieces.values():
            for places in fields.values():
                places.sort(key=lambda place: place[0])
        self._open = lru_cache(maxsize=8)(lambda path: safe_open(path, "pt"))
        self._read = 0  # bytes of files that are open, which stay mapped as long as they are

    def names(self, field: str) -> list[str]:
        """The tensors of which there is a field."""
        return [name for name, fields in self._pieces.items() if field in fields]

    def fields(self, name: str) -> list[str]:
        """What there is of a tensor."""
        return list(self._pieces.get(name, {}))

    def dtype(self, name: str, field: str) -> torch.dtype:
        """Of the first piece."""
        *_, path, key = self._pieces[name][field][0]
        return DTYPES[self._open(path).get_slice(key).get_dtype()]

    def tensor(self, name: str, field: str, offset: int = 0) -> Tensor:
        """What was written under a key, as it was."""
        found = [place for place in self._pieces[name][field] if place[0] == offset]
        *_, path, key = found[0]
        return self._open(path).get_tensor(key)

    def fill(self, into: Tensor, name: str, field: str, offset: int) -> None:
        """Into a flat tensor the elements of a tensor from offset on; in its dtype, rounded.

        Raises ValueError where they are not all there.
        """
        at, end = offset, offset + into.numel()
        for begin, length, path, key in self._pieces.get(name, {}).get(field, []):
            if begin <= at < min(begin + length, end):
                stop = min(begin + length, end)
                part = self._open(path).get_slice(key)[at - begin : stop - begin]
                into[at - offset : stop - offset].copy_(part)
                at, self._read = stop, self._read + part.nbytes
                del part
                if self._read > _MAPPED:
                    self._open.cache_clear()
                    self._read = 0
        if at < end:
            raise ValueError(f"{name}: no {field} of its elements {at} to {end}")


def packed(value: Any, keep: Callable[[Tensor], int]) -> Any:
    """A tree of tensors and plain values as JSON has it; tensors of one number stand in it.

    keep: takes a tensor, and gives the number under which `unpacked` will ask for it.
    Raises TypeError for other values.

    >>> unpacked(json.loads(json.dumps(packed({"a": (1, torch.tensor(2.5))}, id))), id)
    {'a': (1, tensor(2.5000))}
    """
    if isinstance(value, Tensor) and value.ndim == 0 and value.dtype in DTYPE_NAMES:
        return {"number": value.item(), "dtype": DTYPE_NAMES[value.dtype]}
    if isinstance(value, Tensor):
        return {"tensor": keep(value)}
    if isinstance(value, dict):
        return {"dict": [[packed(k, keep), packed(v, keep)] for k, v in value.items()]}
    if type(value) in (list, tuple):
        return {type(value).__name__: [packed(part, keep) for part in value]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a checkpoint keeps tensors and plain values, and no {type(value).__name__}")


def unpacked(tree: Any, kept: Callable[[int], Tensor]) -> Any:
    """What was packed; tensors of one number are on the CPU."""
    if not isinstance(tree, dict):
        return tree
    if "dtype" in tree:
        return torch.tensor(tree["number"], dtype=DTYPES[tree["dtype"]])
    ((kind, value),) = tree.items()
    if kind == "tensor":
        return kept(value)
    if kind == "dict":
        return {unpacked(k, kept): unpacked(v, kept) for k, v in value}
    parts = [unpacked(part, kept) for part in value]
    return tuple(parts) if kind == "tuple" else parts
