"""The record of a command on a GPU: JSON lines, on the disk at once, by whoever has one to add.

Every line has `child`, who wrote it, and `t`, seconds since the command began.  Kinds:

    machine   what it runs on
    plan      names: what a child is going to do, in order
    case      n: its number in the plan; case: its name; ok; s: seconds it took; `why` it failed;
              lost: whether the GPU's context is gone; and whatever the case found
    left      names: what there was no time for
    note      words
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PATH, BEGAN = "FASTSSL_GPU_LINES", "FASTSSL_GPU_BEGAN"  # told to children; BEGAN: time.time()


def write(path: Path, child: str, kind: str, began: float, **fields: Any) -> None:
    """Append a line, in one write, so that no two of them mix."""
    line = {"child": child, "kind": kind, "t": round(time.time() - began, 1), **fields}
    text = json.dumps(line, default=str) + "\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


def read(path: Path) -> list[dict[str, Any]]:
    """Every whole line; one that a full disk or a kill has damaged is left out."""
    return Tail(path).new()


class Tail:
    """What comes to a file, as it comes."""

    def __init__(self, path: Path) -> None:
        self.path, self.at = path, 0

    def new(self) -> list[dict[str, Any]]:
        """The whole lines since the last call."""
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(self.at)
            text = file.read()
        text = text[: text.rfind(b"\n") + 1]
        self.at += len(text)
        found = []
        for line in text.splitlines():
            try:
                made = json.loads(line)
            except ValueError:
                continue
            if isinstance(made, dict) and "child" in made and "kind" in made:
                found.append(made)
        return found


def cases(lines: list[dict[str, Any]]) -> list[Mapping[str, Any]]:
    """Those of the kind `case`."""
    return [line for line in lines if line["kind"] == "case"]
