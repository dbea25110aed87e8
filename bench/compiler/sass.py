"""What a compiled kernel asks of a chip, read from the chip's own instructions (SASS).

    resources    registers, local memory (where spilled registers go) and static shared memory,
                 as `cuobjdump -res-usage` states them
    occupancy    how many blocks one multiprocessor holds, and what stops one more
    main loop    the innermost loop, found through backward branches
    cycles       least cycles one turn of that loop takes on each unit of a multiprocessor

`cycles` is an estimate, not a measurement: every instruction of the loop counted once, for every
warp, at the unit's documented rate.  It knows nothing of latency, bank conflicts, lanes that read
the same word, cache misses, branches not taken, subroutines, work that only some warps do, or the
operands that matrix instructions read from shared memory themselves.  The unit with the most
cycles is the one that binds if all else overlaps.

Sources of the figures: CUDA C++ Programming Guide, tables "Technical Specifications per Compute
Capability" and "Throughput of Native Arithmetic Instructions"; PTX ISA, "tcgen05 instruction
descriptor"; cuda_occupancy.h of the CUDA toolkit; A100, H100 SXM and B200 datasheets.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

KB = 1024
WARP = 32
REGISTERS = 65536  # of 4 bytes, on one multiprocessor; a warp takes them by 256
WARPS, BLOCKS = 64, 32  # at most, on one multiprocessor
RESERVED = 1 * KB  # shared memory the system keeps for itself in every block
TENSOR_COLUMNS = 512  # of tensor memory, on one multiprocessor of compute capability 10.0
L2_BYTES = 64  # per cycle: the port of one multiprocessor to the L2
WAIT = 8  # a loop of fewer instructions only waits for a barrier


@dataclass(frozen=True)
class Chip:
    """One multiprocessor: shared memory in bytes, rates per cycle.

    fp32    float32 multiply-adds.
    matrix  multiply-adds of matrix instructions, by width of the operands in bits (19: TF32).
    dram    bytes from memory: the datasheet's bandwidth over multiprocessors and clock.
    """

    shared_per_block: int
    shared_per_sm: int
    fp32: int
    matrix: Mapping[int, int]
    dram: float


CHIPS = {
    # A100: 312 TFLOP/s of bfloat16 = 108 multiprocessors * 1.41 GHz * 2 * 1024; 2.04 TB/s
    "sm_80": Chip(163 * KB, 164 * KB, 64, {8: 2048, 16: 1024, 19: 512, 64: 64}, 13.4),
    # H100 SXM: 989 TFLOP/s = 132 * 1.83 GHz * 2 * 2048; 3.35 TB/s
    "sm_90": Chip(227 * KB, 228 * KB, 128, {8: 4096, 16: 2048, 19: 1024, 64: 128}, 13.9),
    # B200: 2250 TFLOP/s = 148 * 1.85 GHz * 2 * 4096; 8 TB/s
    "sm_100": Chip(227 * KB, 228 * KB, 128, {8: 8192, 16: 4096, 19: 2048, 64: 64}, 29.2),
}


@dataclass(frozen=True)
class Usage:
    """Of one kernel: registers per thread, local bytes per thread, static shared bytes per block.

    local  the stack frame and the local variables: spilled registers, as Triton has no other use
           for either.
    """

    registers: int
    local: int
    shared: int


@dataclass(frozen=True)
class Instruction:
    """One line of SASS: "HMMA.16816.F32", its operands, whether a predicate guards it."""

    address: int
    op: str
    operands: str = ""
    guarded: bool = False

    @property
    def name(self) -> str:
        """The operation without its modifiers."""
        return self.op.partition(".")[0]

    @property
    def target(self) -> int | None:
        """Where a branch goes; None when that is in a register."""
        found = re.search(r"(?:^|, *|\s)0x([0-9a-f]+)$", self.operands.strip())
        return int(found[1], 16) if found else None


@dataclass(frozen=True)
class Occupancy:
    """Blocks one multiprocessor holds at once, and what stops one more."""

    blocks: int
    limit: str


def read_usage(text: str, function: str) -> Usage:
    """The resources of `function` in the output of `cuobjdump -res-usage`.

    The kilobyte that the system reserves in every block, which newer assemblers report as the
    kernel's own, is taken off.  Raises ValueError when the function is not in it.
    """
    found = re.search(rf"Function {re.escape(function)}:\s*\n\s*(.*)", text)
    if found is None:
        raise ValueError(f"cuobjdump -res-usage does not know a function {function!r}: {text!r}")
    figures = {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", found[1])}
    shared = figures["SHARED"]
    shared -= RESERVED if shared >= RESERVED else 0
    return Usage(figures["REG"], figures["STACK"] + figures["LOCAL"], shared)


_LINE = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(@!?\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")


def read_sass(text: str) -> dict[str, list[Instruction]]:
    """The instructions in the output of `cuobjdump -sass`, by function.

    >>> text = "Function : f" + chr(10) + "  /*0010*/   @!P0 BRA 0x20 ;  /* 0x01 */"
    >>> read_sass(text)
    {'f': [Instruction(address=16, op='BRA', operands='0x20', guarded=True)]}
    """
    functions: dict[str, list[Instruction]] = {}
    code: list[Instruction] = []
    constants: dict[str, str] = {}
    for line in text.splitlines():
        if "Function :" in line:
            code, constants = functions.setdefault(line.partition(":")[2].strip(), []), {}
        elif found := _LINE.match(line):
            address, guard, op, operands = found.groups()
            operands = _with_descriptor(op, operands.strip(), constants)
            code.append(Instruction(int(address, 16), op, operands, bool(guard)))
    return functions


def _with_descriptor(op: str, operands: str, constants: dict[str, str]) -> str:
    """The operands, idesc[UR4] as idesc[0x8200490] where UR4 was last set to that constant."""
    register, _, value = operands.partition(", ")
    if op == "UMOV" and re.fullmatch("0x[0-9a-f]+", value):
        constants[register] = value
    elif not op.startswith("UTC"):
        constants.pop(register, None)
    return re.sub(r"idesc\[(UR\d+)\]", lambda m: f"idesc[{constants.get(m[1], m[1])}]", operands)


def occupancy(
    chip: Chip, warps: int, registers: int, shared: int, tensor_columns: int = 0
) -> Occupancy:
    """Blocks of `warps` warps that one multiprocessor holds at once.

    registers per thread; shared: bytes per block, the reserved kilobyte not among them.

    >>> occupancy(CHIPS["sm_90"], warps=4, registers=64, shared=48 * KB)
    Occupancy(blocks=4, limit='shared memory')
    """
    per_warp = math.ceil(registers * WARP / 256) * 256
    by_registers = REGISTERS // 4 // per_warp * 4 // warps  # a quarter of the warps in each part
    allocated = math.ceil((shared + RESERVED) / 128) * 128
    bounds = {
        "warps": WARPS // warps,
        "registers": by_registers,
        "shared memory": chip.shared_per_sm // allocated,
        "blocks": BLOCKS,
    }
    if shared > chip.shared_per_block:
        bounds["shared memory"] = 0
    if tensor_columns:
        bounds["tensor memory"] = TENSOR_COLUMNS // tensor_columns
    limit = min(bounds, key=lambda name: bounds[name])
    return Occupancy(bounds[limit], limit)


def matrix_kinds(code: Iterable[Instruction]) -> Counter[str]:
    """Matrix instructions by name: HMMA, HGMMA (Hopper's), UTCHMMA (Blackwell's), IMMA ...

    >>> matrix_kinds([Instruction(0, "HMMA.16816.F32.BF16"), Instruction(16, "FFMA")])
    Counter({'HMMA': 1})
    """
    return Counter(i.name for i in code if re.fullmatch(r"(UTC)?[A-Z]G?MMA(\.\w+)*", i.op))


def local_accesses(code: Iterable[Instruction]) -> int:
    """Instructions that read or write local memory."""
    return sum(i.name in ("LDL", "STL") for i in code)


def main_loop(code: Sequence[Instruction]) -> list[Instruction]:
    """The innermost loop; of several the one with most matrix instructions, then instructions.

    Loops that only wait are not counted.  A kernel without a loop gives all its instructions.
    """
    found = [loop for loop in _natural_loops(code) if len(loop) >= WAIT]
    inner = [loop for loop in found if not any(other < loop for other in found)]
    if not inner:
        return list(code)
    loops = [[code[i] for i in sorted(loop)] for loop in inner]
    return max(loops, key=lambda loop: (matrix_kinds(loop).total(), len(loop)))


def _natural_loops(code: Sequence[Instruction]) -> list[set[int]]:
    """The loops of the control flow, each as the indices of its instructions.

    A loop is a jump back to a block that every path to the jump has passed, together with the
    blocks that lead to the jump.  A mere backward branch may be the way back from a wait that
    the compiler has put at the end of the code, and that is no loop.
    """
    blocks, successors = _flow(code)
    before: list[set[int]] = [set() for _ in blocks]
    for block, after in enumerate(successors):
        for other in after:
            before[other].add(block)
    passed = _dominators(successors, before)
    loops: dict[int, set[int]] = {}
    for end, after in enumerate(successors):
        for head in after & passed[end]:
            body, waiting = loops.setdefault(head, {head}), [end]
            while waiting:
                block = waiting.pop()
                if block not in body:
                    body.add(block)
                    waiting.extend(before[block])
    return [{i for block in body for i in blocks[block]} for body in loops.values()]


def _flow(code: Sequence[Instruction]) -> tuple[list[range], list[set[int]]]:
    """Basic blocks, as ranges of indices, and which blocks may follow each."""
    leaves = {"BRA", "JMP", "CALL", "EXIT", "RET", "BRX", "JMX"}
    index = {instruction.address: i for i, instruction in enumerate(code)}
    starts = {0}
    for i, instruction in enumerate(code):
        if instruction.name in leaves:
            starts |= {i + 1, index.get(_target(instruction), 0)}
    bounds = [*sorted(starts - {len(code)}), len(code)]
    blocks = [range(a, b) for a, b in zip(bounds, bounds[1:], strict=False)]
    number = {block.start: n for n, block in enumerate(blocks)}
    successors = []
    for n, block in enumerate(blocks):
        last = code[block[-1]]
        # "BRA.U UP0, 0x40" names its condition among the operands.
        returns = last.guarded or last.name == "CALL" or "," in last.operands
        after = {n + 1} if (returns or last.name not in leaves) and n + 1 < len(blocks) else set()
        if _target(last) in index:
            after.add(number[index[_target(last)]])
        successors.append(after)
    return blocks, successors


def _target(instruction: Instruction) -> int:
    jumps = instruction.name in ("BRA", "JMP", "CALL")
    target = instruction.target if jumps else None
    return -1 if target is None else target


def _dominators(successors: Sequence[set[int]], before: Sequence[set[int]]) -> list[set[int]]:
    """For each block those that every path to it passes; nothing for one that no path reaches."""
    reached, waiting = set(), [0] if successors else []
    while waiting:
        block = waiting.pop()
        if block not in reached:
            reached.add(block)
            waiting.extend(successors[block])
    passed = [
        {0} if b == 0 else set(reached) if b in reached else set() for b in range(len(before))
    ]
    changed = True
    while changed:
        changed = False
        for block in sorted(reached - {0}):
            common = set.intersection(*(passed[b] for b in before[block] & reached))
            if common | {block} != passed[block]:
                passed[block], changed = common | {block}, True
    return passed


def cycles(code: Sequence[Instruction], warps: int, chip: Chip) -> dict[str, float]:
    """Least cycles that one turn of `code` by a block takes on each unit of a multiprocessor.

    matrix   matrix instructions                  special  exponentials, logarithms, conversions
    float32  add, multiply, integer multiply      integer  integers, comparisons, selections
    shared   bytes to and from shared memory      memory   bytes to and from global memory
    issue    instructions, four a cycle

    Global memory: a loop with matrix instructions is taken to find its tiles in the L2, where
    other blocks have read them, one without to stream from memory.
    """
    rates = {"float32": chip.fp32, "integer": 64, "special": 16}
    units = ("matrix", "special", "float32", "integer", "shared", "memory", "issue")
    spent: dict[str, float] = dict.fromkeys(units, 0.0)
    spent["issue"] = len(code) * warps / 4
    reuse = bool(matrix_kinds(code))
    for instruction in code:
        spent["matrix"] += _matrix_cycles(instruction, warps, chip)
        unit, share = _UNITS.get(instruction.name, ("", 1.0))
        if instruction.name == "IMAD":
            share = chip.fp32 / 64  # half the lanes where float32 has 128
        if unit:
            spent[unit] += share * WARP * warps / rates[unit]
        shared, memory = _bytes(instruction)
        spent["shared"] += shared * warps / 128
        spent["memory"] += memory * warps / (L2_BYTES if reuse else chip.dram)
    return spent


_FLOAT32 = "FFMA FADD FMUL HFMA2 HADD2 HMUL2 IMAD"
_PACKED = "FFMA2 FADD2 FMUL2"  # two operations each
_SPECIAL = "MUFU F2F F2I I2F FRND POPC FLO"
_INTEGER = """FMNMX FMNMX3 FSETP FSET FSEL FCHK IADD3 IADD VIADD ISETP IMNMX VIMNMX LOP3 PLOP3 SEL
LEA SHF SGXT PRMT F2FP I2FP FMNMX2 VOTE"""
_UNITS = {
    **dict.fromkeys(_FLOAT32.split(), ("float32", 1.0)),
    **dict.fromkeys(_PACKED.split(), ("float32", 2.0)),
    **dict.fromkeys(_SPECIAL.split(), ("special", 1.0)),
    **dict.fromkeys(_INTEGER.split(), ("integer", 1.0)),
}
_SHARED = ("LDS", "STS", "ATOMS", "SHFL")
_GLOBAL = ("LDG", "STG", "LD", "ST", "RED", "REDG", "ATOM", "ATOMG")


def _bytes(instruction: Instruction) -> tuple[int, int]:
    """Bytes one warp moves through shared and through global memory."""
    name, modifiers = instruction.name, instruction.op.split(".")
    if name in ("LDSM", "STSM"):  # 8 x 8 matrices of 16 bits
        count = int(modifiers[-1]) if modifiers[-1] in ("2", "4") else 1
        return 128 * count, 0
    widths = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
    lane = next((widths[m] for m in modifiers if m in widths), 4)
    if name == "LDGSTS":  # from global memory straight to shared
        return lane * WARP, lane * WARP
    return lane * WARP * (name in _SHARED), lane * WARP * (name in _GLOBAL)


_MULTIPLY_ADDS = {"16816": 2048, "1688": 1024, "1684": 512, "16832": 4096, "8816": 1024, "884": 256}
_DESCRIPTOR = "0x8200490"  # of a 128 x 128 bfloat16 product, where the code does not show it


def _matrix_cycles(instruction: Instruction, warps: int, chip: Chip) -> float:
    """Cycles of one instruction for a block: none unless it is a matrix instruction.

    HMMA is one warp's product; HGMMA one of four warps; UTCHMMA is issued once for a block, its
    descriptor holds the rows / 16 from bit 24 and the columns / 8 from bit 17, and it multiplies
    32 bytes of each, in the same time for every type.
    """
    op = instruction.op
    if not matrix_kinds([instruction]):
        return 0.0
    if op.startswith("UTC"):
        found = re.search(r"idesc\[(0x\w+)\]", instruction.operands)
        descriptor = int(found[1] if found else _DESCRIPTOR, 16)
        area = (descriptor >> 24 & 31) * 16 * (descriptor >> 17 & 63) * 8
        return area * 16 / chip.matrix[16]
    bits = 19 if "TF32" in op else {"H": 16, "D": 64}.get(op[0], 8)
    if wide := re.search(r"\.(\d+)x(\d+)x(\d+)", op):
        return math.prod(map(int, wide.groups())) * warps / 4 / chip.matrix[bits]
    shape = re.search(r"\.(\d+)", op)
    return _MULTIPLY_ADDS.get(shape[1] if shape else "", 0) * warps / chip.matrix[bits]
