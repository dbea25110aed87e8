"""The state of a DeepSpeed engine by parameter name, whatever ZeRO has made of it.

    state-0.safetensors ...    a file a rank: the pieces that it holds (see shards.py)

Fields of a parameter: `parameter`, its float32 master where it has one; `optimizer.NAME`, each
state of its size.  The first rank's file has buffers as well, and in its tree the shapes of the
parameters, the optimizer's other states and its groups' options, what modules keep besides
(`get_extra_state`), and DeepSpeed's counts.  So any world size, ZeRO stage and precision reads what
any other has written.  Nothing in these files is unpickled.

A module whose 16-bit parameters have float32 masters that are not the optimizer's gives them by
`float32_masters(begin=...)`: see fastssl.models.EMA.  Of them, too, the masters are what is kept.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from fastssl import distributed, pieces
from fastssl.models import set_aside

from .config import EngineConfig, EngineError
from .fragments import follow_masters, forget_copies, held_at, locate, shape_of, stage_0_masters
from .shards import REST, Shards, key_of, packed, tree_of, unpacked, write_shard
from .tensor_files import DTYPE_NAMES, Kind

# A full disk is an OSError to Python, and these to torch.save and safetensors.
WRITE_ERRORS = (OSError, RuntimeError, TypeError, ValueError, SafetensorError)
_COUNTS = ("global_steps", "global_samples", "skipped_steps")
# Options of a group that say how it is computed, on the device of now, and not what.
_HOW = ("params", "foreach", "fused", "capturable", "differentiable")


def state_file(rank: int | str) -> str:
    """The name of a rank's file."""
    return f"state-{rank}.safetensors"


def check_offloaded(cfg: EngineConfig) -> None:
    """Raise EngineError where DeepSpeed takes states to where no checkpoint finds them."""
    zero = cfg.deepspeed.get("zero_optimization", {})
    for part in ("offload_optimizer", "offload_param"):
        for key, sound in {"device": "nvme", "ratio": 1.0, "super_offload": False}.items():
            value = (zero.get(part) or {}).get(key, None)
            if value is not None and (value == sound) == (key == "device"):
                raise EngineError(
                    f"engine.deepspeed.zero_optimization.{part}.{key}={value!r} keeps states where "
                    "no checkpoint finds them: use device: cpu alone"
                )
    if zero.get("zenflow"):
        raise EngineError(
            "engine.deepspeed.zero_optimization.zenflow keeps states where no checkpoint finds them"
        )


class _Piece(NamedTuple):
    """Elements `offset` ... of a parameter, which are `start` ... of a tensor."""

    name: str
    offset: int
    start: int
    length: int


class _Held(NamedTuple):
    """A tensor of the optimizer: its group, the parameters in it over all ranks, pieces here."""

    tensor: Tensor
    group: int
    names: list[str]
    pieces: list[_Piece]


class EncoderFile(NamedTuple):
    """A state_dict whose tensors are read when they are asked for, float32 but for buffers."""

    kinds: dict[str, Kind]
    tensor: Callable[[str], Tensor]


def named_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Its parameters and buffers by all their names: what two modules share has both."""
    every: dict[str, Any] = {"remove_duplicate": False}
    return dict([*network.named_buffers(**every), *network.named_parameters(**every)])


class States:
    """What a DeepSpeed engine has to keep; collective, once it is initialized.

    Raises RuntimeError as `locate` does.
    """

    def __init__(self, ds: Any):
        self.ds, self._optimizer = ds, ds.basic_optimizer
        self._names = {p: name for name, p in ds.module.named_parameters()}
        self._held = list(self._held_here())
        self._groups: list[list[str]] = [[] for _ in self._optimizer.param_groups]
        for held in self._held:
            self._groups[held.group] += held.names
        stepped = {name for names in self._groups for name in names}
        with set_aside(ds.module):
            every = [p for p in ds.module.parameters() if self._names[p] not in stepped]
        self._others = every  # frozen ones, and teachers'
        self._copies: dict[str, Tensor] = {}  # of the last snapshot

    def _held_here(self) -> Iterator[_Held]:
        if self.ds.zero_optimization_stage() == 0:
            masters = stage_0_masters(self.ds)
            groups = self._optimizer.param_groups
            group_of = {p: number for number, group in enumerate(groups) for p in group["params"]}
            for weight, master in masters.items():
                name = self._names[weight]
                whole = _Piece(name, 0, 0, master.numel())
                yield _Held(master, group_of[master], [name], [whole])
            return
        for flat, lie in locate(self.ds, 0).items():
            names = [self._names[p] for p in lie.params]
            parts = zip(lie.owners.tolist(), lie.offsets, lie.spans, strict=True)
            here = [_Piece(names[owner], offset, *span) for owner, offset, span in parts]
            yield _Held(flat, lie.group, names, here)

    def check(self) -> None:
        """Raise EngineError, naming it, for what a module keeps and no file takes."""
        with set_aside(self.ds.module):
            for name, module in _keepers(self.ds.module).items():
                what = f"{type(module).__name__}.get_extra_state() of {name or 'the method'}"
                _check_kept(module.get_extra_state(), what)
            for name, buffer in _buffers(self.ds.module).items():
                _check_kept(buffer, f"the buffer {name}")

    def snapshot(self, *, copied: bool) -> Callable[[Path], None]:
        """What writes this rank's file into a folder; collective.  What cannot be kept is told as
        it is written, so that no rank waits for another."""
        name = state_file(distributed.rank())
        try:
            with set_aside(self.ds.module):
                keepers = _keepers(self.ds.module).items()
                extra = {name: module.get_extra_state() for name, module in keepers}  # of all ranks
                tensors, rest = self._kept(extra)
        except WRITE_ERRORS as error:
            reason = error

            def fail(folder: Path) -> None:
                raise reason

            return fail
        if copied:
            tensors = self._copied(tensors)
        return lambda folder: write_shard(folder / name, tensors, rest)

    def _copied(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copies in the host's memory, the same as of the last snapshot: a page that is there
        already is copied to in a fifth of the time."""
        for key, x in tensors.items():
            mine = self._copies.get(key)
            if mine is None or (mine.shape, mine.dtype) != (x.shape, x.dtype):
                mine = torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=x.is_cuda)
                self._copies[key] = mine
            mine.copy_(x.detach(), non_blocking=True)
        if any(x.is_cuda for x in tensors.values()):
            torch.cuda.synchronize()
        return {key: self._copies[key] for key in tensors}

    def _kept(self, extra: dict[str, Any]) -> tuple[dict[str, Tensor], Any]:
        """The tensors of this rank's file, by key, and the tree."""
        tensors = dict(self._pieces())
        if distributed.rank() > 0:
            return tensors, None
        tensors |= {key_of(n, "buffer", 0): b for n, b in _buffers(self.ds.module).items()}

        def keep(tensor: Tensor) -> int:
            tensors[key_of("", REST, len(tensors))] = tensor
            return len(tensors) - 1

        rest = self._rest(keep) | {"extra": {n: packed(v, keep) for n, v in extra.items()}}
        return tensors, rest

    def reader_of(self, network: nn.Module) -> Callable[[Path], EncoderFile]:
        """What reads a network's state_dict out of the files of all ranks."""
        buffers = {id(buffer): name for name, buffer in _buffers(self.ds.module).items()}
        places: dict[str, tuple[str, str]] = {}
        kinds: dict[str, Kind] = {}
        tensors = named_tensors(network)
        for key in network.state_dict():
            tensor = tensors[key]
            if isinstance(tensor, nn.Parameter):
                places[key] = (self._names[tensor], "parameter")
                kinds[key] = Kind(tuple(shape_of(tensor)), torch.float32)
            else:
                places[key] = (buffers[id(tensor)], "buffer")
                kinds[key] = Kind(tuple(tensor.shape), tensor.dtype)

        def read(folder: Path) -> EncoderFile:
            shards = Shards(sorted(folder.glob(state_file("*"))))

            def tensor(key: str) -> Tensor:
                name, field = places[key]
                if field == "buffer":
                    return shards.tensor(name, field)
                flat = torch.empty(torch.Size(kinds[key].shape).numel())
                shards.fill(flat, name, field, 0)
                return flat.view(kinds[key].shape)

            return EncoderFile(kinds, tensor)

        return read

    def _pieces(self) -> Iterator[tuple[str, Tensor]]:
        """This rank's share of all pieces, by key: of what every rank has whole, a part."""
        fields, whole = self._fields(), self.ds.zero_optimization_stage() == 0
        for held in self._held:
            state = self._optimizer.state.get(held.tensor, {})
            found = {"parameter": held.tensor}
            found |= {f"optimizer.{name}": state[name] for name in fields if name in state}
            for piece in map(_share, held.pieces) if whole else held.pieces:
                for field, tensor in found.items() if piece.length else ():
                    yield key_of(piece.name, field, piece.offset), _cut(tensor, piece)
        masters = _masters(self.ds.module)
        for parameter in self._others:
            offset, length = held_at(parameter)
            piece = _Piece(self._names[parameter], offset, 0, length)
            piece = piece if hasattr(parameter, "ds_tensor") else _share(piece)
            value = masters.get(parameter, pieces.piece(parameter))
            if piece.length:
                yield key_of(piece.name, "parameter", piece.offset), _cut(value, piece)

    def _fields(self) -> set[str]:
        """The optimizer's states that have their tensor's shape, by name."""
        return {
            name
            for held in self._held
            for name, value in self._optimizer.state.get(held.tensor, {}).items()
            if held.tensor.ndim and isinstance(value, Tensor) and value.shape == held.tensor.shape
        }

    def _rest(self, keep: Callable[[Tensor], int]) -> dict[str, Any]:
        """What the first rank keeps beside pieces and buffers."""
        fields = self._fields()
        states: dict[str, Any] = {}
        for held in self._held:
            state = self._optimizer.state.get(held.tensor, {})
            other = {n: packed(v, keep) for n, v in state.items() if n not in fields}
            states |= {name: other for name in held.names if other}
        options = [
            {n: packed(v, keep) for n, v in group.items() if n not in _HOW and _is_plain(v)}
            for group in self._optimizer.param_groups
        ]
        return {
            "shapes": self._shapes(),
            "groups": [list(pair) for pair in zip(self._groups, options, strict=True)],
            "states": states,
            "counts": {name: getattr(self.ds, name) for name in _COUNTS},
        }

    def _shapes(self) -> dict[str, list[int]]:
        """Of all parameters that are kept."""
        stepped = {name for names in self._groups for name in names}
        others = set(self._others)
        return {n: shape_of(p) for p, n in self._names.items() if n in stepped or p in others}

    @torch.no_grad()
    def read(self, folder: Path) -> None:
        """Take the state in a folder, whatever number of ranks wrote it; collective.

        Raises ValueError where it is of another model or optimizer, naming what differs.
        """
        shards = Shards(sorted(folder.glob(state_file("*"))))
        rest = tree_of(folder / state_file(0))

        def kept(number: int) -> Tensor:
            return shards.tensor("", REST, number)

        _same("parameter", rest["shapes"], self._shapes())
        zero = self.ds.optimizer
        if hasattr(zero, "checkpoint_event_prologue"):
            zero.checkpoint_event_prologue()  # what stage 3 keeps whole is cut
        with set_aside(self.ds.module):
            for held in self._held:
                _fill(held.tensor, shards, "parameter", held.pieces)
                self._read_states(held, shards, rest["states"], kept)
            self._read_groups(rest["groups"], kept)
            self._read_others(shards)
            saved = {name: shards.tensor(name, "buffer") for name in shards.names("buffer")}
            _told(self.ds.module, dict(saved))
            buffers = _buffers(self.ds.module)
            two = ({n: list(b.shape) for n, b in one.items()} for one in (saved, buffers))
            _same("buffer", *two)
            for name, buffer in buffers.items():
                buffer.copy_(saved[name])
            keepers = _keepers(self.ds.module)
            _same("extra state", dict.fromkeys(rest["extra"]), dict.fromkeys(keepers))
            for name, module in keepers.items():
                module.set_extra_state(unpacked(rest["extra"][name], kept))
            follow_masters(self.ds)
        if hasattr(zero, "checkpoint_event_epilogue"):
            zero.checkpoint_event_epilogue()
        for name in _COUNTS:
            setattr(self.ds, name, rest["counts"][name])

    def _read_states(
        self, held: _Held, shards: Shards, states: dict[str, Any], kept: Callable[[int], Tensor]
    ) -> None:
        group = self._optimizer.param_groups[held.group]
        now: dict[str, Any] = {}
        fields = {f: name for name in held.names for f in shards.fields(name)}
        for field, name in fields.items():
            if field.startswith("optimizer."):
                now[field.partition(".")[2]] = tensor = torch.zeros_like(
                    held.tensor, dtype=shards.dtype(name, field), requires_grad=False
                )
                there = [piece for piece in held.pieces if field in shards.fields(piece.name)]
                _fill(tensor, shards, field, there)
        first: dict[str, str] = {}
        for name in held.names:
            for field, value in states.get(name, {}).items():
                other = first.setdefault(field, name)
                if value != states[other][field]:
                    raise ValueError(
                        f"the optimizer's {field} of {other} and of {name} differ, and this ZeRO "
                        "stage steps them as one: resume with engine.zero_stage=0"
                    )
        for field, name in first.items():
            value = unpacked(states[name][field], kept)
            on_device = group.get("capturable") or group.get("fused")
            if isinstance(value, Tensor) and (value.ndim or on_device):
                value = value.to(held.tensor.device)
            now[field] = value
        self._optimizer.state.pop(held.tensor, None)
        if now:
            self._optimizer.state[held.tensor] = now

    def _read_groups(self, groups: list[Any], kept: Callable[[int], Tensor]) -> None:
        saved = [sorted(names) for names, _ in groups]
        if saved != [sorted(names) for names in self._groups]:
            raise ValueError(
                f"its {len(saved)} parameter groups are not the {len(self._groups)} of this run"
            )
        for group, (_, options) in zip(self._optimizer.param_groups, groups, strict=True):
            group.update({name: unpacked(value, kept) for name, value in options.items()})

    def _read_others(self, shards: Shards) -> None:
        masters = _masters(self.ds.module, begin=True)
        for parameter in self._others:
            offset, length = held_at(parameter)
            whole, here = pieces.piece(parameter), _Piece(self._names[parameter], offset, 0, length)
            master = masters.get(parameter, whole)
            _fill(master, shards, "parameter", [here])
            if master is not whole:
                whole.copy_(master)
        forget_copies(self._others)


def saved_tensors(folder: Path) -> EncoderFile:
    """The parameters and buffers that the files of all ranks hold, by the method's names."""
    shards = Shards(sorted(folder.glob(state_file("*"))))
    shapes = tree_of(folder / state_file(0))["shapes"]
    kinds = {name: Kind(tuple(shape), torch.float32) for name, shape in shapes.items()}
    for name in shards.names("buffer"):
        buffer = shards.tensor(name, "buffer")
        kinds[name] = Kind(tuple(buffer.shape), buffer.dtype)

    def tensor(name: str) -> Tensor:
        if name not in shapes:
            return shards.tensor(name, "buffer")
        flat = torch.empty(torch.Size(shapes[name]).numel())
        shards.fill(flat, name, "parameter", 0)
        return flat.view(shapes[name])

    return EncoderFile(kinds, tensor)


def readable(path: Path) -> None:
    """Raise what a file that holds no pieces brings about."""
    Shards([path])
    if path.name == state_file(0):
        dict(tree_of(path))


def attempt(errors: list[str], action: Callable[[], Any]) -> None:
    """Do it, and write down why it could not be written."""
    try:
        action()
    except WRITE_ERRORS as error:
        errors.append(str(error).strip().splitlines()[0] if str(error) else type(error).__name__)


def _share(piece: _Piece) -> _Piece:
    """This rank's part of what every rank has whole."""
    size = -(-piece.length // distributed.world_size())
    start = min(distributed.rank() * size, piece.length)
    return _Piece(piece.name, start, start, min(size, piece.length - start))


def _cut(tensor: Tensor, piece: _Piece) -> Tensor:
    return tensor.detach().reshape(-1).narrow(0, piece.start, piece.length)


def _fill(tensor: Tensor, shards: Shards, field: str, parts: list[_Piece]) -> None:
    """Into a tensor its pieces."""
    whole = tensor.detach()
    flat = whole.reshape(-1)  # a copy where it is not contiguous
    for piece in parts:
        shards.fill(flat.narrow(0, piece.start, piece.length), piece.name, field, piece.offset)
    if flat.data_ptr() != whole.data_ptr():
        whole.copy_(flat.view(whole.shape))


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    """What a state_dict has of a model's buffers."""
    return {
        f"{prefix}.{name}" if prefix else name: buffer
        for prefix, module in model.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    }


def _told(model: nn.Module, saved: dict[str, Tensor]) -> None:
    """Modules that look into a state_dict themselves see what of it there is, the buffers: a queue
    takes its width from there, a predictor the steps that it has made."""
    for name, module in model.named_modules():
        if type(module)._load_from_state_dict is not nn.Module._load_from_state_dict:
            prefix = f"{name}." if name else ""
            module._load_from_state_dict(saved, prefix, {}, False, [], [], [])


def _masters(model: nn.Module, *, begin: bool = False) -> dict[Any, Tensor]:
    """Masters that modules keep of 16-bit parameters, by parameter."""
    found = [m.float32_masters(begin=begin) for m in model.modules() if _has_masters(m)]  # type: ignore
    return {parameter: master for masters in found for parameter, master in masters.items()}


def _has_masters(module: nn.Module) -> bool:
    return callable(getattr(type(module), "float32_masters", None))


def _keepers(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that keep more than parameters, their masters and buffers."""
    base = nn.Module.get_extra_state
    return {
        name: module
        for name, module in model.named_modules()
        if type(module).get_extra_state is not base and not _has_masters(module)
    }


def _check_kept(value: Any, what: str) -> None:
    def keep(tensor: Tensor) -> int:
        if tensor.dtype not in DTYPE_NAMES:
            raise TypeError(f"a checkpoint keeps no tensors of {tensor.dtype}")
        return 0

    try:
        packed(value, keep)
    except TypeError as error:
        raise EngineError(f"{what}: {error}") from error


def _is_plain(value: Any) -> bool:
    """Whether a group's option is kept: what is not comes from the configuration alone."""
    try:
        packed(value, lambda tensor: 0)
    except TypeError:
        return False
    return True


def _same(what: str, saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise ValueError for the first name that is not the same in both."""
    for name in sorted(saved.keys() | now.keys()):
        if name not in saved or name not in now:
            where = "it" if name in saved else "this run"
            raise ValueError(f"the {what} {name!r} is in {where} only")
        if saved[name] != now[name]:
            raise ValueError(f"the {what} {name!r} has shape {saved[name]}, and here {now[name]}")
