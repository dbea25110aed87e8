"""Triton's cache, compiled elsewhere and carried along: is it of use here?

Triton finds a compiled kernel by a key that has the whole of the compiler in it, its library
included, and that differs between Pythons: a cache made under Python 3.11 is never found by 3.12,
although the same version compiles the same.  `note` leaves beside the cache whose it is; `adopt`
makes this process ask under that name, where version and sources of the compiler are the same.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any
from unittest.mock import patch

NOTE = "fastssl-compiler.json"
LIBRARY = "_C"  # the folder of the compiled part


def compiler() -> dict[str, str]:
    """This process's compiler: version, Triton's key, and a hash of it but for the library."""
    import triton
    from triton.runtime import cache

    key: str = cache.triton_key()
    return {"version": triton.__version__, "key": key, "sources": _sources(key)}


def _sources(key: str) -> str:
    """Triton's key is its version and hashes joined by dashes; without the library's, a hash."""
    from triton.runtime import cache

    folder = Path(cache.__file__).parents[1] / LIBRARY
    libraries = {sha256(path.read_bytes()).hexdigest() for path in folder.glob("libtriton*.so")}
    return sha256("-".join(x for x in key.split("-") if x not in libraries).encode()).hexdigest()


def note(folder: Path) -> None:
    """Leave beside a cache by which compiler it was made."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / NOTE).write_text(json.dumps(compiler()), encoding="utf-8")


def judge(carried: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """In a word: "same", "adopted" (the same but for the library), or why it is of no use."""
    if carried["key"] == here["key"]:
        return "same"
    if carried["version"] == here["version"] and carried["sources"] == here["sources"]:
        return "adopted"
    if carried["version"] != here["version"]:
        return f"of triton {carried['version']}: everything is compiled here"
    return "of another build: everything is compiled here"


def adopt() -> str:
    """Take the cache in TRITON_CACHE_DIR for this process; what `judge` says, or "none".

    Never raises: without it everything is compiled here, which takes time and is as right.
    """
    path = Path(os.environ.get("TRITON_CACHE_DIR") or "/nonexistent") / NOTE
    if not path.is_file():
        return "none"
    try:
        carried = json.loads(path.read_text(encoding="utf-8"))
        verdict = judge(carried, compiler())
        if verdict == "adopted":
            from triton.runtime import cache

            patch.object(cache, "triton_key", lambda: carried["key"]).start()
    except Exception as error:  # of a compiler that nobody has met yet
        return f"not read: {type(error).__name__}: {error}"
    return verdict
