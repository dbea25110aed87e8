"""Launches of kernels as operators of torch, which torch.compile keeps whole in its graph.

torch.library.custom_op says the same with more checks, at ten times the cost of an import.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch

Function = Callable[..., Any]

runs: dict[str, Function] = {}  # what each operator does, by its name

_LIBRARY = torch.library.Library("fastssl", "FRAGMENT")
_disabled = cache(torch.compiler.disable)  # a call imports torch._dynamo, unless it is there


def operator(name: str, run: Function, fake: Function, like: Function | None = None) -> Any:
    """torch.ops.fastssl.<name>, which runs `run` and knows no gradient.

    run: returns new tensors and writes none of its arguments; the compiler does not look inside.
    fake: of the same arguments, makes empty tensors like the results'.
    like: the function whose annotations are the operator's schema, if that is not `run`.
    """

    def outside_of_the_compiler(*arguments: Any) -> Any:
        here = _disabled(run) if "torch._dynamo" in sys.modules else run
        return here(*arguments)

    runs[name] = run
    schema = name + torch.library.infer_schema(like or run, mutates_args=())
    _LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
    _LIBRARY.impl(name, outside_of_the_compiler, "CompositeExplicitAutograd")
    _LIBRARY.impl(name, fake, "Meta")
    return getattr(torch.ops.fastssl, name).default


def seen_through(name: str, run: Function) -> Any:
    """torch.ops.fastssl.<name>, of a tensor, which `run` returns as it is.

    It stays in a graph that is run as it was traced (backend="eager"); a compiler that lowers the
    graph looks inside, and leaves it out.
    """
    _LIBRARY.define(f"{name}(Tensor(a) x) -> Tensor(a)", tags=torch.Tag.pt2_compliant_tag)
    _LIBRARY.impl(name, run, "CompositeImplicitAutograd")
    return getattr(torch.ops.fastssl, name).default


def launches(module: str, twin: Any, **fakes: Function) -> Any:
    """The functions of a *_triton.py as operators by name, as those of `twin` in torch.

    module: its name, "...tokens.tokens_triton"; it is imported by the first call that runs.
    fakes: see `operator`; one with annotations has them for its twin, where that has none like it.
    """
    family = module.rpartition(".")[2].removesuffix("_triton")

    def first_used(name: str) -> Function:
        return lambda *arguments: getattr(import_module(module), name)(*arguments)

    return SimpleNamespace(
        **{
            name: operator(
                f"{family}_{name}",
                first_used(name),
                fake,
                fake if fake.__annotations__ else getattr(twin, name),
            )
            for name, fake in fakes.items()
        }
    )
