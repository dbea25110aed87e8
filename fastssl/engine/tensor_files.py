"""Safetensors files written a tensor at a time, and split as other libraries split large ones.

encoder.safetensors                                      up to LARGEST bytes; or else
encoder-00001-of-00002.safetensors ...                   each up to LARGEST bytes, and
encoder.safetensors.index.json                           {"weight_map": {tensor: file}, ...}
"""

import json
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

LARGEST = 5 * 10**9  # bytes of tensors in a file of several
DTYPE_NAMES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8"},
    **{torch.uint8: "U8", torch.bool: "BOOL"},
}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


class Kind(NamedTuple):
    """What a tensor is before it is there."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def in_order(kinds: Mapping[str, Kind]) -> list[str]:
    """The order in which tensors lie in a file: large elements first, so that all are aligned."""
    return sorted(kinds, key=lambda key: -kinds[key].dtype.itemsize)


def write_tensors(
    path: Path, kinds: Mapping[str, Kind], tensors: Iterable[Tensor], metadata: dict[str, str]
) -> None:
    """Write tensors as they come, on whatever device, `in_order`.

    Raises OSError, and TypeError for a dtype that no file has.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for key in in_order(kinds):
        shape, dtype = kinds[key]
        if dtype not in DTYPE_NAMES:
            raise TypeError(f"{key} is {dtype}, which a checkpoint does not keep")
        begin, end = end, end + kinds[key].nbytes
        name = DTYPE_NAMES[dtype]
        header[key] = {"dtype": name, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            file.write(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)


def write_split(
    path: Path,
    kinds: Mapping[str, Kind],
    tensors: Iterable[Tensor],
    metadata: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write tensors as they come, `in_order`, to `path`, or to several files and an index."""
    files: list[dict[str, Kind]] = [{}]
    for key in in_order(kinds):
        if files[-1] and sum(k.nbytes for k in (*files[-1].values(), kinds[key])) > LARGEST:
            files.append({})
        files[-1][key] = kinds[key]
    names = _parts(path.name, len(files)) if len(files) > 1 else [path.name]
    coming = iter(tensors)
    for name, own in zip(names, files, strict=True):
        some = (next(coming) for _ in own)
        write_tensors(path.with_name(name), own, some, {"format": "pt", **metadata})
    if len(files) > 1:
        total = sum(kind.nbytes for kind in kinds.values())
        where = {key: name for name, own in zip(names, files, strict=True) for key in own}
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=1)
        path.with_name(_index(path.name)).write_text(text)


def files_of(name: str, there: Collection[str]) -> list[str]:
    """The files of tensors of `name`, as found among the names of files that are there; it alone
    where there is no index of several."""
    if _index(name) not in there:
        return [name]
    stem = name.removesuffix(".safetensors")
    pattern = re.compile(rf"{re.escape(stem)}-\d{{5}}-of-(\d{{5}})\.safetensors")
    counts = [int(found[1]) for n in there if (found := pattern.fullmatch(n))]
    return _parts(name, max(counts, default=1))


def named(name: str, there: Collection[str]) -> list[str]:
    """`files_of`, and the index where there is one."""
    files = files_of(name, there)
    return files if files == [name] else [*files, _index(name)]


def _parts(name: str, count: int) -> list[str]:
    stem = name.removesuffix(".safetensors")
    return [f"{stem}-{n + 1:05d}-of-{count:05d}.safetensors" for n in range(count)]


def _index(name: str) -> str:
    return f"{name}.index.json"
