"""Models built without memory: their tensors are made later, one at a time, with the same values.

    with Deferred() as deferred:
        model = timm.create_model("vit_giant_patch14_dinov2")   # on meta
    deferred.value(model.blocks[0].attn.qkv.weight)             # float32, on the CPU

What a constructor does to tensors is written down instead of done: each operation, with where in a
storage it reads and writes and which draw of the generator it is.  A tensor is then what its own
operations make of it.  So a model takes the memory of its largest tensor, and every process that
asks has the bits that the constructor would have made.  Of a file of weights, likewise, is written
down where each tensor lies.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

# After these in-place operations nothing is left of what a tensor was.
_OVERWRITE = (
    "uniform_ normal_ zero_ fill_ copy_ exponential_ _no_grad_trunc_normal_"  # of torch.nn.init
).split()
_TRUNCATED = nn.init._no_grad_trunc_normal_
_LOAD, _LOAD_FILE = torch.load, safetensors.torch.load_file
_FROM_PYTHON = (torch.tensor, torch.as_tensor, torch.asarray)
_IS_META = Tensor.is_meta.__get__  # type: ignore[attr-defined]


class NotDeferrable(RuntimeError):
    """A constructor does what cannot be done later: the model is to be built in memory."""


class _Place(NamedTuple):
    """A tensor without memory: a view of a storage."""

    storage: int
    nbytes: int  # of the storage
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    def view(self, storage: torch.UntypedStorage) -> Tensor:
        empty = torch.empty(0, dtype=self.dtype, device="cpu")
        return empty.set_(storage, self.offset, self.size, self.stride)

    def fills(self) -> bool:
        """Whether it is all of its storage, each element once."""
        elements = torch.Size(self.size).numel()
        whole = elements * self.dtype.itemsize == self.nbytes
        return whole and torch.empty_strided(self.size, self.stride, device="meta").is_contiguous()


class _Operation(NamedTuple):
    function: Any
    given: list[Any]  # its arguments, flat; of a tensor without memory the _Place
    spec: Any
    changed: tuple[_Place, ...]
    made: tuple[tuple[int, _Place], ...]  # new tensors: their number among what it returned

    def run(self, given: list[Any]) -> list[Any]:
        args, kwargs = tree_unflatten(given, self.spec)
        return tree_flatten(self.function(*args, **kwargs))[0]

    def places(self) -> list[_Place]:
        return [x for x in self.given if isinstance(x, _Place)]

    def run_apart(self) -> None:
        """On memory of its own, for what it does to the generator."""
        storages = {x.storage: torch.UntypedStorage(x.nbytes) for x in self.places()}
        self.run([_real(x, storages) for x in self.given])

    def overwrites(self, storage: int) -> bool:
        """Whether nothing that the storage held before can be seen after it."""
        read = [x for x in self.places() if x.storage == storage]
        called = getattr(self.function, "overloadpacket", self.function)
        name = getattr(called, "__name__", "")
        return name in _OVERWRITE and len(read) == 1 and read[0] in self.changed and read[0].fills()


class _Constructing(TorchFunctionMode):
    """Data from Python have a value at once, and no constructor is told that it runs on meta."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _FROM_PYTHON and "device" not in (kwargs or {}) and not _on_meta(args[0]):
            return func(*args, **(kwargs or {}), device="cpu").to("meta")
        if func == _IS_META:  # where torch.nn.init asks it, nothing would be done
            return False
        return func(*args, **(kwargs or {}))


class Deferred(TorchDispatchMode):
    """Inside, tensors are made on meta, and what befalls them is written down.

    torch.load and safetensors.torch.load_file give tensors on meta too, each read from its file as
    it is made; the file must still be there then.
    Raises NotDeferrable, inside, where a value is needed at once, where torch's generator is seeded
    or used for what is not deferred, and for a pickle that can only be read whole.

    refused: the last of these, which a constructor may have caught, and gone another way.
    """

    def __init__(self) -> None:
        super().__init__()
        self.refused: NotDeferrable | None = None
        self._operations: list[_Operation] = []
        self._of: dict[int, list[int]] = defaultdict(list)  # storage -> its operations' numbers
        self._alive: list[Any] = []  # storages: the address of one that is gone may come again
        self._draws: dict[int, int] = {}  # operation -> how many draw before it
        self._states: list[Tensor] = []  # of the generator, before those of _draws, as far as known
        self._began = self._expected = torch.get_rng_state()
        self._inside = contextlib.ExitStack()

    def __enter__(self) -> Any:
        self._inside.enter_context(torch.device("meta"))
        self._inside.enter_context(_Constructing())
        for owner, name, mine in (
            (nn.init, "_no_grad_trunc_normal_", self._truncated),
            (torch, "load", self._load),
            (safetensors.torch, "load_file", self._load_file),
        ):
            self._inside.enter_context(_replaced(owner, name, mine))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._inside.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = tree_flatten((args, kwargs))[0]
        try:
            out = func(*args, **kwargs)
        except RuntimeError as error:  # of a value that is not there, as a rule
            raise self._refuse(str(error).splitlines()[0]) from error
        results = tree_flatten(out)[0]
        before = {_storage(x) for x in given if _on_meta(x)}
        made = [(n, x) for n, x in enumerate(results) if _on_meta(x) and _storage(x) not in before]
        changed = [x for x in _written(func, args, kwargs) if _on_meta(x)]
        self._alive += [x.untyped_storage() for x in (*given, *results) if _on_meta(x)]
        if made or changed:
            draws = torch.Tag.nondeterministic_seeded in func.tags
            self._note(func, args, kwargs, changed, made, draws=draws)
        return out

    def _truncated(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """torch's draws from a normal distribution without its tails, again until they fit: one
        operation here."""
        if not _on_meta(tensor):
            return _TRUNCATED(tensor, *args, **kwargs)
        self._note(_TRUNCATED, (tensor.detach(), *args), kwargs, [tensor], [], draws=True)
        return tensor

    def _load(self, f: Any, *args: Any, **kwargs: Any) -> Any:
        """What a pickle holds: it stays mapped into memory, which takes none."""
        try:
            found = _outside(_LOAD, f, *args, **kwargs | {"mmap": True})
        except (RuntimeError, ValueError) as error:
            if "mmap" in str(error):  # torch wrote it before 1.6, or it is no file
                raise self._refuse(f"{f} is a pickle that cannot be mapped into memory") from error
            raise
        return tree_map_only(Tensor, lambda x: self._later(x, x.detach), found)

    def _load_file(self, filename: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """What a safetensors file holds: it is opened anew for each tensor."""
        found = _outside(_LOAD_FILE, filename, *args, **kwargs)  # mapped, and let go
        return {key: self._later(x, partial(_of_file, filename, key)) for key, x in found.items()}

    def _later(self, like: Tensor, make: Callable[[], Tensor]) -> Tensor:
        """A tensor that `make` will make."""
        tensor = torch.empty(like.shape, dtype=like.dtype, device="meta")
        self._note(make, (), {}, [], [(0, tensor)], draws=False)
        return tensor

    def _note(
        self, func: Any, args: Any, kwargs: Any, changed: Any, made: Any, *, draws: bool
    ) -> None:
        given, spec = tree_flatten((args, kwargs))
        if any(isinstance(x, torch.Generator) for x in given):
            raise self._refuse("a constructor draws from a generator of its own")
        number = len(self._operations)
        if draws:
            self._note_draw(number)
        operation = _Operation(
            func,
            [_noted(x) for x in given],
            spec,
            tuple(_place(x) for x in changed),
            tuple((n, _place(x)) for n, x in made),
        )
        for storage in {place.storage for place in operation.changed} | {
            place.storage for _, place in operation.made
        }:
            self._of[storage].append(number)
        self._operations.append(operation)

    def value(self, tensor: Tensor) -> Tensor:
        """What a tensor made inside holds, on the CPU: of its shape, dtype and strides.

        Raises NotDeferrable for one that was made elsewhere, or in a way that cannot be done later.
        """
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            return self._replayed(_place(tensor), len(self._operations))

    def check(self, model: nn.Module) -> None:
        """Raise NotDeferrable where a model has a tensor on meta that cannot be made alone, and
        what was raised inside.  Of each kind of draw the smallest is tried."""
        if self.refused is not None:
            raise self.refused
        self._try_draws()
        names: dict[int, str] = {}
        for name, tensor in tensors_on_meta(model):
            storage = _storage(tensor)
            if storage in names:
                raise NotDeferrable(f"{name} and {names[storage]} share their memory")
            if storage not in self._of:
                raise NotDeferrable(f"{name} was made elsewhere")
            names[storage] = name
        for name, module in model.named_modules():
            own = (x for key, x in vars(module).items() if key not in _REGISTERED)
            if any(_on_meta(x) for x in tree_flatten(list(own))[0]):
                raise NotDeferrable(f"{name} has a tensor that is no parameter and no buffer")

    def _refuse(self, why: str) -> NotDeferrable:
        self.refused = NotDeferrable(why)
        return self.refused

    def _note_draw(self, number: int) -> None:
        """The generator must be where the draw before left it; it is moved on, so that a return to
        a state that it had is seen."""
        now = torch.get_rng_state()
        if not self._draws:
            self._began = self._expected = now
        if not torch.equal(now, self._expected):
            raise self._refuse("a constructor seeds torch's generator, or draws at once")
        torch.rand((), device="cpu")
        self._expected = torch.get_rng_state()
        self._draws[number] = len(self._draws)

    def _try_draws(self) -> None:
        """Whether each operation can draw by itself, and the smallest of each kind does."""
        smallest: dict[Any, tuple[int, _Operation]] = {}
        for number in self._draws:
            operation = self._operations[number]
            places = operation.places()
            if any(place not in operation.changed for place in places):
                raise NotDeferrable("a constructor draws from a distribution of tensors")
            kind = (operation.function, *(place.dtype for place in places))
            size = sum(place.nbytes for place in places)
            if kind not in smallest or size < smallest[kind][0]:
                smallest[kind] = size, operation
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            for _, operation in smallest.values():
                operation.run_apart()

    def _state_before(self, draw: int) -> Tensor:
        """Of the generator, before the draw of this number: found by those before it, once."""
        numbers = [*self._draws]
        self._states = self._states or [self._began]
        torch.set_rng_state(self._states[-1])
        while len(self._states) <= draw:
            self._operations[numbers[len(self._states) - 1]].run_apart()
            self._states.append(torch.get_rng_state())
        return self._states[draw]

    def _replayed(self, place: _Place, until: int) -> Tensor:
        """What `place` held before operation number `until`."""
        history = [n for n in self._of[place.storage] if n < until]
        storage = torch.UntypedStorage(place.nbytes)
        blind = [n for n in history[1:] if self._operations[n].overwrites(place.storage)]
        for number in [n for n in history if not blind or n >= blind[-1]]:
            operation = self._operations[number]
            given = []
            for leaf in operation.given:
                if isinstance(leaf, _Place) and leaf.storage != place.storage:
                    leaf = self._replayed(leaf, number)
                given.append(_real(leaf, {place.storage: storage}))
            if (draw := self._draws.get(number)) is not None:
                torch.set_rng_state(self._state_before(draw))
            out = operation.run(given)
            if draw is not None and draw + 1 == len(self._states):
                self._states.append(torch.get_rng_state())
            for n, made in operation.made:
                if made.storage == place.storage:
                    made.view(storage).copy_(out[n])
        return place.view(storage)


def tensors_on_meta(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters and buffers that have no memory yet, by name, each once."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if _on_meta(tensor):
            yield name, tensor


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _outside(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Of a function in a thread, where none of torch's modes is."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(function, *args, **kwargs).result()


def _of_file(filename: Any, key: str) -> Tensor:
    with safetensors.safe_open(filename, "pt") as file:
        return file.get_tensor(key)


_REGISTERED = ("_parameters", "_buffers", "_modules")


def _on_meta(x: Any) -> bool:
    return isinstance(x, Tensor) and x.device.type == "meta"


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _place(x: Tensor) -> _Place:
    nbytes = x.untyped_storage().nbytes()
    return _Place(
        _storage(x), nbytes, tuple(x.shape), tuple(x.stride()), int(x.storage_offset()), x.dtype
    )


def _noted(x: Any) -> Any:
    """An argument as it is kept: its value now, or where it will be."""
    if _on_meta(x):
        return _place(x)
    if isinstance(x, torch.device) and x.type == "meta":
        return torch.device("cpu")
    return x.detach().clone() if isinstance(x, Tensor) else x


def _real(leaf: Any, storages: dict[int, torch.UntypedStorage]) -> Any:
    return leaf.view(storages[leaf.storage]) if isinstance(leaf, _Place) else leaf


def _written(func: Any, args: Any, kwargs: Any) -> list[Any]:
    """The tensors among the arguments that an operation changes, by its schema."""
    schema = func._schema.arguments
    named = [(a, args[n]) for n, a in enumerate(schema) if n < len(args)]
    named += [(a, kwargs[a.name]) for a in schema if a.name in kwargs]
    written = [x for a, x in named if a.alias_info is not None and a.alias_info.is_write]
    return tree_flatten(written)[0]
