"""Triton's interpreter in half of its time.

It looks up the same things at each operation and each call: which members of triton.language to
replace, and which of numpy's dtypes stands for a type.  And it checks each sum of integers for
overflow, in 64 bits, which no chip does.  What kernels compute stays the same.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from functools import cache
from typing import Any


def quicken() -> None:
    """Call it once, before a kernel runs."""
    from triton.runtime import interpreter

    @cache
    def builtins(place: Any) -> list[tuple[str, Any, Any]]:
        """Names and members as they are, and as they are while a kernel runs."""
        found = inspect.getmembers(place, interpreter.tl.core.is_builtin)
        return [(name, member, _interpreted(member)) for name, member in found]

    def _interpreted(member: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            options["_semantic"] = interpreter.interpreter_semantic
            return member(*args, **options)

        return call

    def patch(place: Any, builder: Any, scope: Any) -> None:
        for name, member, new in builtins(place):
            if getattr(place, name) is member:  # in a kernel called by a kernel it is replaced
                scope.set_attr(place, name, new)

    slow, known = interpreter._get_np_dtype, {}

    def np_dtype(type_: Any) -> Any:
        name = type_.scalar.name
        if name not in known:
            known[name] = slow(type_)
        return known[name]

    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)
    interpreter._patch_builtin, interpreter._get_np_dtype = patch, np_dtype
