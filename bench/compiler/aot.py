"""Ahead-of-time proof: every Triton kernel in every configuration, compiled without a GPU.

    python -m fastssl.bench.aot                        everything, on sm_80, sm_90 and sm_100
    python -m fastssl.bench.aot --used                 a class on one chip in turn, as launched
    python -m fastssl.bench.aot --quick                one shape class a kernel, its safe one
    python -m fastssl.bench.aot --kernel 'pairwise*' --target sm_90 --json proofs.jsonl

Each registered kernel is compiled for each of its shape classes and configurations.  What it uses
is read from the machine code, with cuobjdump, and how it multiplies from its PTX (disassembling
would take as long again as compiling).  A configuration fails when

    it does not compile,
    it spills registers to local memory,
    it asks for more shared or tensor memory than a block may have on the chip, or
    it is said to multiply matrices (`Variant.product`) and has no matrix instruction; on sm_90
    that must be Hopper's wgmma, unless BLOCK_M is below its 64 rows: then mma will do.

The exit status is 1 when one failed, and 2 when the command could not be understood.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from fastssl.bench.record import conditions, write_line
from fastssl.bench.report.formatting import align
from fastssl.kernels.common import tuning
from fastssl.kernels.common.tuning import Config, Kernel, Variant

PROGRAM = "python -m fastssl.bench.aot"
KB = 1024
SHARED_BYTES = {"sm_80": 163 * KB, "sm_90": 227 * KB, "sm_100": 227 * KB}  # most, for a block
RESERVED = 1 * KB  # shared memory the system keeps for itself in every block
TENSOR_COLUMNS = 512  # of tensor memory, on one multiprocessor


@dataclass(frozen=True)
class Task:
    """One compilation, by names, so that it can be sent to another process."""

    kernel: str
    variant: str
    config: Config
    target: str

    def __str__(self) -> str:
        return f"{self.kernel}, {self.variant}, {label(self.config)}, {self.target}"


@dataclass(frozen=True)
class Facts:
    """What one compilation came to.

    registers       per thread
    spilled         bytes of local memory per thread: Triton has no other use for it
    shared          bytes per block, without the kilobyte that the system reserves in each
    tensor_columns  of tensor memory per block
    matrix          matrix instructions by name: mma, wgmma (Hopper), tcgen05 (Blackwell)
    """

    registers: int
    spilled: int
    shared: int
    tensor_columns: int
    matrix: dict[str, int]


@dataclass(frozen=True)
class Proof:
    """What came of a task: the facts, unless it did not compile, and what is wrong with it."""

    task: Task
    facts: Facts | None
    faults: tuple[str, ...]
    seconds: float


def label(config: Config) -> str:
    """A configuration in one line.

    >>> label(Config({"BLOCK_M": 128, "BLOCK_N": 64}, num_warps=8, num_stages=3))
    'M=128 N=64 warps=8 stages=3'
    """
    blocks = " ".join(f"{k.removeprefix('BLOCK_')}={v}" for k, v in config.blocks.items())
    return f"{blocks} warps={config.num_warps} stages={config.num_stages}".strip()


def configs(kernel: str, variant: Variant, target: str, used: bool = False) -> list[Config]:
    """The safe configuration, unless `used` the target's others, and what was tuned, each once."""
    tuned = tuning.table().get((kernel, target, variant.name), variant.safe)
    every = (variant.safe, *(() if used else variant.tried(target)), tuned)
    return [config for i, config in enumerate(every) if config not in every[:i]]


def plan(
    kernels: Iterable[Kernel], targets: Sequence[str], quick: bool = False, used: bool = False
) -> list[Task]:
    """All compilations; `quick`, `used`: as the options."""
    tasks = []
    for kernel in kernels:
        variants = list(kernel.variants.values())[: 1 if quick else None]
        taking_turns = used and len(variants) >= len(targets)
        variants = _in_turn(variants) if taking_turns else variants
        for turn, variant in enumerate(variants):
            # A step further each round, or every third variant would go to the same chip.
            lap = turn // len(targets)
            for at, target in enumerate(targets):
                chosen = configs(kernel.name, variant, target, used)
                if quick:
                    chosen = chosen[:1]
                elif taking_turns and at == (turn + lap) % len(targets):
                    chosen = (
                        chosen[:1] if lap % 2 else chosen[-1:]
                    )  # the safe and the tuned in turn
                elif taking_turns:
                    continue
                tasks += [Task(kernel.name, variant.name, config, target) for config in chosen]
    return tasks


def _in_turn(variants: Iterable[Variant]) -> list[Variant]:
    """Of those that differ in their 16-bit dtype alone, one or the other."""
    alike: dict[str, list[Variant]] = {}
    for variant in variants:
        alike.setdefault(variant.name.replace("bfloat16", "float16"), []).append(variant)
    return [same[turn % len(same)] for turn, same in enumerate(alike.values())]


def prove(task: Task) -> Proof:
    """Compile, read the machine code, judge.  Triton's own cache is used; its code is read too.

    Raises OSError for a full disk and the like, which say nothing of the kernel.
    """
    kernel = tuning.kernels()[task.kernel]
    variant = next(v for v in kernel.variants.values() if v.name == task.variant)
    start = time.perf_counter()
    try:
        facts = read(compile_variant(kernel, variant, task.config, task.target))
    except OSError:
        raise
    except Exception as error:  # the compiler raises what it likes: all of it is a verdict
        lines = [line for line in str(error).splitlines() if line.strip()][-12:]
        wrong = "\n    ".join([f"does not compile: {type(error).__name__}", *lines])
        return Proof(task, None, (wrong,), time.perf_counter() - start)
    wrong = tuple(faults(facts, variant, task.config, task.target))
    return Proof(task, facts, wrong, time.perf_counter() - start)


def compile_variant(kernel: Kernel, variant: Variant, config: Config, target: str) -> Any:
    """What `triton.compile` returns, for a signature as a launch would have it.

    Raises ValueError for arguments that neither the variant nor the configuration gives, or that
    the kernel does not have, and whatever the compiler raises.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    fn = kernel.fn
    defaults = {p.name: p.default for p in fn.params if p.is_constexpr and p.has_default}
    constants = {**defaults, **variant.constexprs, **config.blocks}
    missing = [n for n in fn.arg_names if n not in constants and n not in variant.signature]
    unknown = [n for n in (*constants, *variant.signature) if n not in fn.arg_names]
    if missing or unknown:
        raise ValueError(
            f"{kernel.name}, {variant.name}: arguments without a type or value {missing}, "
            f"arguments the kernel does not have {unknown}: mend the variant or the configuration"
        )
    types = {n: "constexpr" if n in constants else variant.signature[n] for n in fn.arg_names}
    even = [i for i, name in enumerate(fn.arg_names) if types[name].endswith(":16")]
    attrs = {(i,): [["tt.divisibility", 16]] for i in even}
    plain = {name: kind.removesuffix(":16") for name, kind in types.items()}
    source = ASTSource(fn, plain, constants, attrs)
    chip = GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    return triton.compile(source, target=chip, options=config.options)


def read(kernel: Any) -> Facts:
    """The facts of what `triton.compile` returned."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    meta = kernel.metadata
    return facts_of(usage, kernel.asm["ptx"], meta.name, meta.shared, meta.tmem_size)


def facts_of(
    usage: str, ptx: str, function: str, shared: int = 0, tensor_columns: int = 0
) -> Facts:
    """The facts of `function` in its PTX and in what `cuobjdump -res-usage` printed.

    shared: bytes that the launch asks for, beside the static ones.  Raises ValueError when the
    function is not in `usage`.
    """
    line = re.search(rf"Function {re.escape(function)}:\s*\n\s*(.*)", usage)
    if line is None:
        raise ValueError(f"cuobjdump -res-usage does not know a function {function!r}: {usage!r}")
    figures = {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", line[1])}
    static = figures["SHARED"]
    static -= RESERVED if static >= RESERVED else 0  # newer assemblers report it as the kernel's
    matrix = re.findall(r"\b(?:(mma)\.sync|(wgmma)\.mma_async|(tcgen05)\.mma)\b", ptx)
    return Facts(
        registers=figures["REG"],
        spilled=figures["STACK"] + figures["LOCAL"],
        shared=shared + static,
        tensor_columns=tensor_columns,
        matrix=dict(Counter("".join(names) for names in matrix)),
    )


def faults(facts: Facts, variant: Variant, config: Config, target: str) -> Iterator[str]:
    """What is wrong with a configuration, each with what to do."""
    yield from scarcities(facts, target)
    if variant.product and not facts.matrix:
        yield (
            "multiplies without matrix instructions; use tl.dot on bfloat16, float16 or TF32, "
            "or register the variant with product=False"
        )
    elif variant.product and target == "sm_90" and config.blocks.get("BLOCK_M", 64) >= 64:
        if "wgmma" not in facts.matrix:
            yield (
                f"multiplies with {', '.join(facts.matrix)}, not with Hopper's wgmma; take 4 or 8 "
                "warps, and operands that lie along the product's inner side"
            )


def scarcities(facts: Facts, target: str, spare: int = 0) -> Iterator[str]:
    """What it asks for that the chip has not, each with what to do.  spare: bytes it may spill."""
    if facts.spilled > spare:
        yield (
            f"spills registers: {facts.spilled} bytes of local memory a thread; "
            "take smaller blocks or more warps"
        )
    asks = "asks for {} {} memory a block, {} has {}; take fewer stages or smaller blocks".format
    limit = SHARED_BYTES[target]
    if facts.shared > limit:
        yield asks(facts.shared, "bytes of shared", target, limit)
    if facts.tensor_columns > TENSOR_COLUMNS:
        yield asks(facts.tensor_columns, "columns of tensor", target, TENSOR_COLUMNS)


def run_all(tasks: Sequence[Task], modules: Sequence[str], jobs: int) -> Iterator[Proof]:
    """The proofs as they are done: here for one job, else in that many processes.

    When the compiler takes its process down, the tasks that were lost with it are done again, each
    in a process of its own.
    """
    if jobs == 1:
        yield from map(prove, tasks)
        return
    lost: list[Task] = []
    for task, proof in _in_processes(tasks, modules, jobs):
        lost += [] if proof else [task]
        if proof:
            yield proof
    for task in lost:
        for _, proof in _in_processes([task], modules, 1):
            yield proof or Proof(task, None, ("does not compile: the compiler crashed",), 0.0)


def _in_processes(
    tasks: Sequence[Task], modules: Sequence[str], jobs: int
) -> Iterator[tuple[Task, Proof | None]]:
    spawn = get_context("spawn")  # a fork of a process that has imported torch may hang
    with ProcessPoolExecutor(jobs, spawn, load, (tuple(modules),)) as pool:
        futures = {pool.submit(prove, task): task for task in tasks}
        try:
            for future in as_completed(futures):
                crashed = isinstance(future.exception(), BrokenProcessPool)
                yield futures[future], None if crashed else future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def load(modules: Iterable[str]) -> None:
    """Import modules that register kernels; "package.module:function" also calls the function.

    Raises ValueError naming the module that cannot be imported or lacks the function.
    """
    for name in modules:
        module, _, function = name.partition(":")
        try:
            imported = importlib.import_module(module)
            register: Callable[[], Any] = getattr(imported, function) if function else lambda: None
        except (ImportError, AttributeError) as error:
            raise ValueError(f"--module {name}: {error}") from error
        register()


COLUMNS = "kernel variant config target registers spilled shared matrix".split()


def table(proofs: Sequence[Proof]) -> str:
    """One line a proof.  spilled: bytes a thread; shared: bytes a block."""
    return "\n".join(align([COLUMNS, *(_cells(proof) for proof in proofs)]))


def _cells(proof: Proof) -> list[str]:
    task, facts = proof.task, proof.facts
    names = [task.kernel, task.variant, label(task.config), task.target]
    if facts is None:
        return [*names, *"----"]
    matrix = " ".join(f"{count} {name}" for name, count in facts.matrix.items())
    figures = facts.registers, facts.spilled, facts.shared, matrix or "none"
    return [*names, *map(str, figures)]


def write(path: Path, proofs: Iterable[Proof], argv: Sequence[str]) -> None:
    """JSON lines: the conditions (kind "aot"), then a line a proof (kind "proof")."""
    from triton import knobs

    path.unlink(missing_ok=True)
    ptxas = {"sm_80": knobs.nvidia.ptxas.version, "newest": knobs.nvidia.ptxas_blackwell.version}
    here = conditions(torch.device("cpu"), [*PROGRAM.split(), *argv])
    write_line(path, "aot", here | {"ptxas": ptxas})
    for proof in proofs:
        facts = asdict(proof.facts) if proof.facts else {}
        judged = {"faults": proof.faults, "seconds": round(proof.seconds, 2)}
        write_line(path, "proof", asdict(proof.task) | facts | judged)


def _parser() -> argparse.ArgumentParser:
    first, _, rest = (__doc__ or "").partition("\n\n")
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(PROGRAM, None, first, rest, formatter_class=plain)
    known, add = list(SHARED_BYTES), parser.add_argument
    add("--kernel", default="*", metavar="PATTERN", help="which kernels, by name")
    add("--target", nargs="+", choices=known, default=known, help="chips")
    add("--quick", action="store_true", help="one shape class a kernel, its safe configuration")
    add("--used", action="store_true", help="each class on a chip and in a 16-bit dtype in turn")
    add("--json", type=Path, metavar="FILE", help="also write the table there, as JSON lines")
    more = "import it, and call the function, to register more kernels"
    add("--module", action="append", default=[], metavar="MODULE[:FUNCTION]", help=more)
    add("--jobs", type=int, choices=(1, 2, 4, 8, 16), help="processes (2; with --quick 1)")
    return parser


def choose_kernels(
    pattern: str, json: Path | None, program: str, *, interpreted: bool = False
) -> list[Kernel]:
    """The registered kernels of these names, for a command that is to write its table to `json`.

    Raises ValueError where it cannot do its work, and unless `interpreted` where nothing compiles.
    """
    if importlib.util.find_spec("triton") is None:
        raise ValueError("Triton is not installed: pip install triton")
    from triton import __version__, knobs

    if tuple(int(part) for part in __version__.split(".")[:2]) < (3, 6):
        raise ValueError(f"Triton {__version__} is too old: 3.6 or newer is needed")
    if knobs.runtime.interpret and not interpreted:
        raise ValueError(
            "TRITON_INTERPRET is set, and kernels are then interpreted, not compiled: "
            f"unset it (env -u TRITON_INTERPRET {program} ...)"
        )
    if json and not json.parent.is_dir():
        raise ValueError(f"--json {json}: there is no folder {json.parent}")
    known = tuning.kernels()
    chosen = [kernel for name, kernel in known.items() if fnmatchcase(name, pattern)]
    if not chosen:
        names = ", ".join(known) or "none is registered"
        raise ValueError(f"--kernel {pattern!r} matches no kernel; there are: {names}")
    return chosen


def _tasks(args: argparse.Namespace) -> list[Task]:
    load(args.module)
    chosen = choose_kernels(args.kernel, args.json, PROGRAM)
    return plan(chosen, args.target, args.quick, args.used)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        tasks = _tasks(args)
    except ValueError as error:
        parser.error(str(error))
    proofs: list[Proof] = []
    start = time.perf_counter()
    try:
        for proof in run_all(tasks, args.module, args.jobs or (1 if args.quick else 2)):
            proofs.append(proof)
            verdict = "FAILED" if proof.faults else "ok"
            words = f"[{len(proofs)}/{len(tasks)}] {proof.task} {verdict} {proof.seconds:.1f} s"
            print(words, file=sys.stderr, flush=True)
    except OSError as error:
        parser.exit(2, f"stopped after {len(proofs)} of {len(tasks)} compilations: {error}\n")
    proofs.sort(key=lambda proof: tasks.index(proof.task))
    print(table(proofs))
    failed = [proof for proof in proofs if proof.faults]
    for proof in failed:
        print(*(f"FAILED {proof.task}: {fault}" for fault in proof.faults), sep="\n")
    if args.json:
        write(args.json, proofs, argv)
    done = sum(proof.facts is not None for proof in proofs)
    print(f"{done} compiled, {len(failed)} failed, {time.perf_counter() - start:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
