"""What would be launched on a GPU, seen without one.

    with recorded(Gpu("sm_90", 132)) as launches:
        loss(*inputs).backward()                      launches: {key: Launch}, as they come

Everything up to the driver is as on the GPU: the branches that depend on it, the configuration from
tuned.json, and Triton's own specialization of each argument (equal to 1, divisible by 16, None,
constant).  Tensors are torch's fake ones, which have shapes and no values, so that sizes cost
nothing, and what would read a value, and wait for the GPU, raises.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any
from unittest.mock import patch

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastssl.kernels.common import operators
from fastssl.kernels.common.gpu import Gpu, pretend

MOST_PROGRAMS = (2**31 - 1, 65535, 65535)  # of a grid
Grid = tuple[int, int, int]


@dataclass
class Launch:
    """A compiled kernel as it would be asked for: what is compiled, and the grids it had.

    source, options: what `triton.compile` takes.  key: of both, the cache's on the disk but for
    the compiler's version.
    """

    name: str
    source: Any
    options: Any
    grids: set[Grid] = field(default_factory=set)

    @property
    def key(self) -> str:
        return sha256(f"{self.source.hash()}-{self.options.hash()}".encode()).hexdigest()

    # What Triton asks of a compiled kernel.
    function, packed_metadata = None, None

    def launch_metadata(self, grid: Any, stream: Any, *arguments: Any) -> None:
        """Nobody looks at it."""

    def run(self, x: int, y: int, z: int, *arguments: Any) -> None:
        """Note the grid.  Raises ValueError where no GPU takes it."""
        if any(size > most for size, most in zip((x, y, z), MOST_PROGRAMS, strict=True)):
            raise ValueError(f"{self.name} is launched with a grid of {x} x {y} x {z} programs")
        self.grids.add((x, y, z))
        if _launches is not None:
            _launches[self.key] = self


_launches: dict[str, Launch] | None = None  # of the recording that is going on


@contextmanager
def recorded(gpu: Gpu) -> Iterator[dict[str, Launch]]:
    """Inside, tensors are fake and their kernels' launches are noted, by `Launch.key`.

    Raises RuntimeError where kernels are interpreted, which knows no specialization.
    """
    global _launches
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from fastssl.kernels.common.triton import INTERPRETED

    if INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET is set, and kernels are then interpreted: unset it")
    run, before = JITFunction.run, (driver._active, _launches)

    def on_pointers(self: Any, *arguments: Any, **named: Any) -> Any:
        named = {name: _pointer(x) for name, x in named.items()}
        return run(self, *map(_pointer, arguments), **named)

    with ExitStack() as stack:
        stack.enter_context(patch.object(JITFunction, "run", on_pointers))
        stack.enter_context(patch.object(JITFunction, "_do_compile", _take))
        for context in (pretend(gpu), FakeTensorMode(allow_non_fake_inputs=True), _Operators()):
            stack.enter_context(context)
        driver.set_active(_Driver(gpu))  # pyright: ignore[reportArgumentType]
        _launches = {}
        try:
            yield _launches
        finally:
            driver._active, _launches = before


class _Driver:
    """What a launch asks of the driver.  A device for each architecture: Triton caches by it."""

    def __init__(self, gpu: Gpu) -> None:
        self.capability = int(gpu.arch.removeprefix("sm_"))

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)


def _take(
    fn: Any, key: Any, signature: Any, device: Any, constants: Any, options: Any, attrs: Any,
    warmup: bool,
) -> Launch:  # fmt: skip
    """In the place of JITFunction._do_compile: cached as what it would have compiled."""
    from triton.compiler import ASTSource

    launch = Launch(fn.__name__, ASTSource(fn, signature, constants, attrs), options)
    fn.device_caches[device][0][key] = launch
    return launch


class _Pointer:
    """A tensor as Triton's specialization sees it: memory as it comes from torch's allocator."""

    def __init__(self, x: Tensor) -> None:
        self.dtype, self.offset = x.dtype, x.storage_offset() * x.element_size()

    def data_ptr(self) -> int:
        return 512 + int(self.offset)


def _pointer(x: Any) -> Any:
    return _Pointer(x) if isinstance(x, Tensor) else x


class _Operators(TorchDispatchMode):
    """Our operators do what they do, where fake tensors would only be given the results' shapes."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        known: Mapping[str, Any] = operators.runs if func.namespace == "fastssl" else {}
        run = known.get(func.__name__.partition(".")[0])
        return run(*args) if run else func(*args, **(kwargs or {}))


def lower(launch: Launch, gpu: Gpu) -> str:
    """The Triton IR: the kernel is type-checked with these arguments, and not yet optimized."""
    from triton._C.libtriton import ir
    from triton.compiler import make_backend

    target = _Driver(gpu).get_current_target()
    context = ir.context()
    backend: Any = make_backend(target)
    ir.load_dialects(context)
    backend.load_dialects(context)
    generators = backend.get_codegen_implementation(launch.options)
    module = launch.source.make_ir(
        target, launch.options, generators, backend.get_module_map(), context
    )
    return str(module)


def compile_launch(launch: Launch, gpu: Gpu) -> Any:
    """What `triton.compile` returns; into Triton's cache, under the key the GPU's machine asks."""
    import triton

    target = _Driver(gpu).get_current_target()
    return triton.compile(launch.source, target=target, options=launch.options.__dict__)
