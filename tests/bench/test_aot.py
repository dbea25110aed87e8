"""The ahead-of-time proof: what it lets pass, what it fails, and how it reads machine code."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastssl.bench.compiler import aot, sass
from fastssl.bench.compiler.sass import CHIPS, KB, Instruction, Occupancy
from fastssl.kernels._tuning import Config, Kernel, Variant

ROOT = Path(__file__).parents[2]
DEMO = "tests.bench.demo_kernels:register_all"

USAGE = """
Resource usage:
 Common:
  GLOBAL:11 CONSTANT[4]:8
 Function _lse:
  REG:108 STACK:1584 SHARED:1024 LOCAL:16 CONSTANT[0]:584 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
SASS = """
	code for sm_90a
		Function : _lse
	.headerflags	@"EF_CUDA_ACCELERATORS EF_CUDA_SM90 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM90)"
        /*0000*/                   LDC R1, c[0x0][0x28] ;               /* 0x00000a00ff017b82 */
                                                                        /* 0x000fe20000000800 */
        /*0010*/               @P0 STL.64 [R1+0x8], R4 ;                /* 0x000000080100b387 */
        /*0020*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT ;
        /*0030*/              @!P1 BRA 0x10 ;                           /* 0xffffffe00000994b */
        /*0040*/                   BRA.U UP0, 0x60 ;
        /*0050*/                   LDL R4, [R1] ;
        /*0060*/                   EXIT ;
        /*0070*/                   BRA 0x70;
"""


def run(tmp_path, *words):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    command = [sys.executable, "-m", "fastssl.bench.aot", "--module", DEMO, *words]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    done = run(folder, "--kernel", "demo*", "--json", str(folder / "proofs.jsonl"))
    lines = (folder / "proofs.jsonl").read_text().splitlines()
    return done, [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    words = ["--kernel", "bad*", "--target", "sm_90", "--jobs", "1"]
    return run(tmp_path_factory.mktemp("bad"), *words)


def test_good_kernels_pass(good):
    done, _ = good
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("9 compiled, 0 failed")
    assert "FAILED" not in done.stdout + done.stderr


def test_json_holds_conditions_and_facts(good):
    head, *rows = good[1]
    assert head["kind"] == "aot" and head["versions"]["triton"] and set(head["ptxas"]) > {"sm_80"}
    assert "--kernel 'demo*'" in head["command"] and head["time"].startswith("20")
    by = {(row["kernel"], row["target"]): row for row in rows}
    assert len(by) == 9 and {row["kind"] for row in rows} == {"proof"}
    assert set(by["demo_good", "sm_80"]["matrix"]) == {"HMMA"}
    assert set(by["demo_good", "sm_90"]["matrix"]) == {"HGMMA"}
    assert set(by["demo_good", "sm_100"]["matrix"]) == {"UTCHMMA"}
    assert set(by["demo_narrow", "sm_90"]["matrix"]) == {"HMMA"}  # too small a tile for HGMMA
    assert by["demo_good", "sm_90"]["config"]["blocks"] == {"BLOCK_M": 64, "BLOCK_N": 64}


def test_the_work_of_a_tile_is_found_in_the_main_loop(good):
    # 64 x 64 x 64 multiply-adds over the chip's rate, 64 * 64 exponentials at 16 a cycle; and no
    # loop but a stream of 1024 floats in and out.
    for row in good[1][1:]:
        cycles, chip = row["cycles"], CHIPS[row["target"]]
        if row["kernel"] == "demo_good":
            assert cycles["matrix"] == 64**3 / chip.matrix[16]
            assert 64 * 64 / 16 <= cycles["special"] < 1.2 * 64 * 64 / 16
            columns = 64 if row["target"] == "sm_100" else 0
            assert row["tensor_columns"] == columns and row["blocks"] * columns <= 512
        if row["kernel"] == "demo_scale":
            assert cycles["memory"] == pytest.approx(8 * KB / chip.dram, rel=1e-3)
            assert next(iter(cycles)) == "memory" and row["matrix"] == {}


@pytest.mark.parametrize(
    "name, why",
    [
        ("bad_spill", "spills registers"),
        ("bad_shared", "bytes of shared memory a block, sm_90 has 232448"),
        ("bad_product", "without matrix instructions"),
        ("bad_warps", "not with Hopper's HGMMA"),
        ("bad_shape", "does not compile: CompilationError"),
        ("bad_signature", "does not compile: ValueError"),
    ],
)
def test_each_fault_is_named_with_what_to_do(bad, name, why):
    assert bad.returncode == 1, bad.stderr
    heads = [line for line in bad.stdout.splitlines() if line.startswith(f"FAILED {name}, D64")]
    assert any(why in line and ", sm_90: " in line for line in heads), bad.stdout


def test_faults_are_counted(bad):
    assert bad.stdout.splitlines()[-1].startswith("4 compiled, 6 failed")
    assert "['OUT', 'N', 'FACTOR']" in bad.stdout and "the kernel does not have ['n']" in bad.stdout


@pytest.mark.parametrize(
    "words, why",
    [
        (["--target", "sm_70"], "choose from 'sm_80', 'sm_90', 'sm_100'"),
        (["--kernel", "none*"], "--kernel 'none*' matches no kernel; there are: "),
        (["--json", "/no/such/folder/x"], "there is no folder /no/such/folder"),
        (["--module", "no_such_module"], "--module no_such_module: No module named"),
        (["--module", "json:nothing"], "--module json:nothing: "),
    ],
)
def test_a_wrong_command_is_refused(monkeypatch, capsys, words, why):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(SystemExit) as stop:
        aot.main(words)
    assert stop.value.code == 2
    assert why in capsys.readouterr().err


def test_interpreted_kernels_are_refused(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit) as stop:
        aot.main([])
    assert stop.value.code == 2
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err


def variant(name, product=True, blocks=64):
    safe, other = Config({"BLOCK_M": blocks}), Config({"BLOCK_M": 128}, num_warps=8)
    return Variant(name, {}, {}, product, (other, safe, other), safe, lambda config, device: print)


def test_plan_holds_every_variant_configuration_and_target_once():
    kernel = Kernel("k", None, {name: variant(name) for name in ("first", "second")})
    whole = aot.plan([kernel], ["sm_80", "sm_90"])
    assert len(whole) == len({str(task) for task in whole}) == 2 * 2 * 2
    quick = aot.plan([kernel], ["sm_80", "sm_90"], quick=True)
    names = [str(task) for task in quick]
    assert names == [f"k, first, M=64 warps=4 stages=2, {t}" for t in ("sm_80", "sm_90")]


def test_what_is_used_is_compiled_for_one_chip_in_turn():
    kernel = Kernel("k", None, {name: variant(name) for name in ("a", "b", "c", "d")})
    tasks = aot.plan([kernel], ["sm_80", "sm_90", "sm_100"], used=True)
    assert [(task.variant, task.target) for task in tasks] == [
        *(("a", "sm_80"), ("b", "sm_90"), ("c", "sm_100"), ("d", "sm_80"))
    ]
    assert len(aot.plan([kernel], ["sm_80", "sm_90", "sm_100"], used=True, quick=True)) == 3
    few = Kernel("k", None, {name: variant(name) for name in ("a", "b")})  # not all chips in turn
    assert len(aot.plan([few], ["sm_80", "sm_90", "sm_100"], used=True)) == 6


def test_what_was_tuned_on_a_target_is_compiled_for_it(monkeypatch):
    tuned = Config({"BLOCK_M": 256}, num_warps=8)
    monkeypatch.setattr(aot._tuning, "table", lambda: {("k", "sm_90", "v"): tuned})
    kernels = [Kernel("k", None, {"v": variant("v")})]
    for used, count in ((False, 2 + 3), (True, 1 + 2)):  # the candidate left out on both
        tasks = aot.plan(kernels, ["sm_80", "sm_90"], used=used)
        assert [task.target for task in tasks if task.config == tuned] == ["sm_90"]
        assert len(tasks) == count


def test_tasks_lost_with_a_crashed_process_are_done_again(monkeypatch):
    tasks = aot.plan([Kernel("k", None, {"v": variant("v")})], ["sm_80", "sm_90"], quick=True)
    calls = []

    def crashing(tasks, modules, jobs):
        calls.append((len(tasks), jobs))
        for task in tasks:  # sm_80 takes its process down each time, and the first time all
            found = jobs == 1 and task.target == "sm_90"
            yield task, aot.Proof(task, None, (), 1.0) if found else None

    monkeypatch.setattr(aot, "_in_processes", crashing)
    proofs = {proof.task.target: proof for proof in aot.run_all(tasks, (), 2)}
    assert calls == [(2, 2), (1, 1), (1, 1)]
    assert proofs["sm_90"].faults == ()
    assert "compiler crashed" in proofs["sm_80"].faults[0]


def test_a_full_disk_is_no_verdict(monkeypatch, capsys):
    def full(*words):
        raise OSError(28, "No space left on device")

    tasks = [aot.Task("k", "v", Config({}), "sm_80")]
    monkeypatch.setattr(aot, "_tasks", lambda args: tasks)
    monkeypatch.setattr(
        aot._tuning, "kernels", lambda: {"k": Kernel("k", None, {"v": variant("v")})}
    )
    monkeypatch.setattr(aot, "compiled", full)
    with pytest.raises(SystemExit) as stop:
        aot.main(["--jobs", "1"])
    assert stop.value.code == 2
    assert "stopped after 0 of 1 compilations: [Errno 28]" in capsys.readouterr().err


def facts(**changes):
    found = dict(registers=64, spilled=0, local_accesses=0, shared=0, tensor_columns=0, matrix={})
    found |= dict(blocks=1, warps=4, limit="warps", loop=10, cycles={"issue": 1.0})
    return aot.Facts(**(found | changes))


@pytest.mark.parametrize(
    "changes, target, blocks, why",
    [
        ({"matrix": {"HGMMA": 4}}, "sm_90", 64, ""),
        ({"matrix": {"HMMA": 4}}, "sm_90", 32, ""),
        ({"matrix": {"HMMA": 4}}, "sm_90", 64, "HGMMA"),
        ({"matrix": {"HMMA": 4}}, "sm_80", 64, ""),
        ({"matrix": {}}, "sm_100", 16, "without matrix instructions"),
        ({"matrix": {"HMMA": 1}, "shared": 163 * KB}, "sm_80", 64, ""),
        ({"matrix": {"HMMA": 1}, "shared": 163 * KB + 1}, "sm_80", 64, "shared memory"),
        ({"matrix": {"HMMA": 1}, "local_accesses": 1}, "sm_80", 64, "spills"),
        ({"matrix": {"HMMA": 1}, "spilled": 8}, "sm_80", 64, "spills"),
        ({"matrix": {"UTCHMMA": 1}, "tensor_columns": 512}, "sm_100", 64, ""),
        ({"matrix": {"UTCHMMA": 1}, "tensor_columns": 513}, "sm_100", 64, "tensor memory"),
    ],
)
def test_the_verdicts(changes, target, blocks, why):
    config = Config({"BLOCK_M": blocks})
    found = list(aot.faults(facts(**changes), variant("v"), config, target))
    assert len(found) == bool(why) and why in "".join(found)


def test_no_product_needs_no_matrix_instruction():
    found = aot.faults(facts(), variant("v", product=False), Config({}), "sm_90")
    assert list(found) == []


def test_resource_usage_is_read():
    assert sass.read_usage(USAGE, "_lse") == sass.Usage(registers=108, local=1600, shared=0)
    own = USAGE.replace("SHARED:1024", "SHARED:1280")
    assert sass.read_usage(own, "_lse").shared == 256
    with pytest.raises(ValueError, match="does not know a function 'other'"):
        sass.read_usage(USAGE, "other")


def test_sass_is_read():
    (code,) = sass.read_sass(SASS).values()
    assert [i.address for i in code] == list(range(0, 0x80, 0x10))
    assert code[1] == Instruction(0x10, "STL.64", "[R1+0x8], R4", guarded=True)
    assert [i.target for i in code] == [None, None, None, 0x10, 0x60, None, None, 0x70]
    assert sass.local_accesses(code) == 2
    assert sass.matrix_kinds(code) == {"HGMMA": 1}


def assembled(text):
    """Instructions from lines of text, an optional "name:" first, 16 bytes apart."""
    lines = [line.split(": ") for line in text.strip().splitlines()]
    where = {line[0].strip(): f"{16 * i:#x}" for i, line in enumerate(lines) if len(line) == 2}
    out = ["Function : f"]
    for i, line in enumerate(lines):
        words = [where.get(word, word) for word in line[-1].split()]
        out.append(f"    /*{16 * i:04x}*/  {' '.join(words)} ;")
    return sass.read_sass("\n".join(out))["f"]


WAITING = """
    MOV R0, R1
    outer: IADD3 R0, R0, 0x1, RZ
    inner: SYNCS.PHASECHK.TRANS64.TRYWAIT P2, [UR9], R10
    @!P2 BRA wait
    back: FFMA R1, R1, R1, R1
    FMUL R1, R1, R1
    BRA.U UP0, skip
    UTCHMMA gdesc[UR4], gdesc[UR10], tmem[UR8], tmem[UR26], idesc[UR27], UPT
    skip: MUFU.EX2 R1, R1
    FADD R1, R1, R1
    FADD R1, R1, R1
    @!P3 BRA inner
    STG.E [R2.64], R1
    @!P4 BRA outer
    EXIT
    wait: SYNCS.PHASECHK.TRANS64.TRYWAIT P2, [UR9], R10
    @!P2 BRA wait
    BRA back
    end: BRA end
"""


def test_the_main_loop_is_the_innermost_one_that_does_not_only_wait():
    loop = sass.main_loop(assembled(WAITING))
    # From `inner` to its branch, with the way to the wait and back; nothing of the outer loop.
    assert [i.address >> 4 for i in loop] == [*range(2, 12), 15, 16, 17]


def test_of_two_loops_the_one_with_products_counts():
    filler = "\n".join(["FADD R1, R1, R1"] * 20)
    code = assembled(
        f"a: FADD R1, R1, R1\n{filler}\n@P0 BRA a\n"
        f"b: HMMA.16816.F32.BF16 R4, R4, R8, R4\n{filler[: 16 * 8 - 1]}\n@P0 BRA b\nEXIT"
    )
    assert sass.main_loop(code)[0].op == "HMMA.16816.F32.BF16"


def test_a_loop_may_be_left_in_its_middle():
    body = "\n".join(["FADD R1, R1, R1"] * 4)
    code = assembled(
        f"MOV R0, R1\na: {body}\nBRA.U UP0, out\n{body}\n@P0 BRA a\nout: EXIT\nend: BRA end"
    )
    assert sass.main_loop(code) == code[1:11]


def test_code_without_a_loop_counts_whole():
    code = assembled("MOV R0, R1\nBRA out\nMUFU.EX2 R1, R1\nout: EXIT\nend: BRA end")
    assert sass.main_loop(code) == code


@pytest.mark.parametrize(
    "line, target, warps, unit, cycles",
    [
        ("HMMA.16816.F32.BF16 R4, R4, R8, R4", "sm_80", 4, "matrix", 4 * 16 * 8 * 16 / 1024),
        ("HMMA.1688.F32.TF32 R4, R4, R8, R4", "sm_90", 4, "matrix", 4 * 16 * 8 * 8 / 1024),
        ("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24", "sm_90", 8, "matrix", 128),
        ("HGMMA.64x64x8.F32.TF32 R24, gdesc[UR8], R24", "sm_90", 4, "matrix", 32),
        ("UTCHMMA idesc[0x8200490], UPT", "sm_100", 8, "matrix", 128 * 128 * 16 / 4096),
        ("UTCHMMA idesc[0x4100490], UPT", "sm_100", 4, "matrix", 64 * 64 * 16 / 4096),
        ("UTCHMMA idesc[0x8100910], UPT", "sm_100", 4, "matrix", 128 * 64 * 8 / 2048),
        ("MUFU.EX2 R1, R1", "sm_90", 4, "special", 8),
        ("FFMA R1, R1, R1, R1", "sm_80", 4, "float32", 2),
        ("FFMA R1, R1, R1, R1", "sm_90", 4, "float32", 1),
        ("FADD2 R2, R2.F32x2.HI_LO, R4", "sm_100", 4, "float32", 2),
        ("IMAD.WIDE R2, R2, 0x80, RZ", "sm_80", 4, "float32", 2),
        ("IMAD.WIDE R2, R2, 0x80, RZ", "sm_90", 4, "float32", 2),
        ("FSEL R1, R1, -INF, P0", "sm_90", 4, "integer", 2),
        ("LDS.64 R2, [R3]", "sm_90", 4, "shared", 4 * 32 * 8 / 128),
        ("LDSM.16.M88.4 R20, [R3+0xc000]", "sm_80", 4, "shared", 4 * 512 / 128),
        ("LDGSTS.E.BYPASS.128 [R0], [R14.64], P4", "sm_80", 4, "shared", 4 * 32 * 16 / 128),
        ("LDG.E.128.CONSTANT R4, [R2.64]", "sm_80", 4, "memory", 4 * 32 * 16 / 13.4),
        ("STG.E.U16 [R2.64], R4", "sm_90", 4, "memory", 4 * 32 * 2 / 13.9),
        ("UMOV UR4, 0x400", "sm_90", 4, "issue", 1),
    ],
)
def test_cycles_of_an_instruction(line, target, warps, unit, cycles):
    spent = sass.cycles(assembled(line), warps, CHIPS[target])
    assert spent[unit] == pytest.approx(cycles)
    others = {name for name, value in spent.items() if value} - {unit, "issue"}
    assert others == ({"memory"} if "LDGSTS" in line else set())


def test_tiles_of_a_product_are_found_in_the_l2():
    code = assembled("LDG.E.128 R4, [R2.64]\nHMMA.16816.F32.BF16 R4, R4, R8, R4")
    assert sass.cycles(code, 4, CHIPS["sm_90"])["memory"] == 4 * 512 / 64


def test_a_descriptor_is_what_its_register_last_was():
    code = assembled(
        """
        UMOV UR27, 0x8200490
        ULEA UR29, UR4, UR5, 0x18
        UTCHMMA tmem[UR26], idesc[UR27], UPT
        UMOV UR29, 0x4100490
        UTCHMMA tmem[UR26], idesc[UR29], UPT
        ULEA UR27, UR4, UR5, 0x18
        UTCHMMA tmem[UR26], idesc[UR27], UPT
        """
    )
    found = [i.operands.split(", ")[1] for i in code if i.name == "UTCHMMA"]
    assert found == ["idesc[0x8200490]", "idesc[0x4100490]", "idesc[UR27]"]


@pytest.mark.parametrize(
    "target, warps, registers, shared, columns, expected",
    [
        # 228 // (48 + 1) = 4; registers would allow 8
        ("sm_90", 4, 64, 48 * KB, 0, Occupancy(4, "shared memory")),
        ("sm_90", 4, 128, 0, 0, Occupancy(4, "registers")),  # 4096 a warp, 16 warps
        ("sm_90", 4, 32, 0, 0, Occupancy(16, "warps")),  # 64 warps
        ("sm_90", 1, 16, 0, 0, Occupancy(32, "blocks")),
        ("sm_80", 8, 255, 0, 0, Occupancy(1, "registers")),  # 8160 -> 8192 a warp, 8 warps
        ("sm_80", 2, 200, 0, 0, Occupancy(4, "registers")),  # 2 warps in a quarter of the file
        ("sm_80", 4, 33, 0, 0, Occupancy(12, "registers")),  # 1056 -> 1280 a warp, 12 a quarter
        ("sm_80", 4, 64, 81 * KB, 0, Occupancy(2, "shared memory")),  # 164 // 82
        ("sm_80", 4, 64, 81 * KB + 1, 0, Occupancy(1, "shared memory")),
        ("sm_90", 4, 64, 227 * KB, 0, Occupancy(1, "shared memory")),
        ("sm_90", 4, 64, 227 * KB + 1, 0, Occupancy(0, "shared memory")),
        ("sm_100", 4, 32, 0, 128, Occupancy(4, "tensor memory")),
    ],
)
def test_occupancy_by_hand(target, warps, registers, shared, columns, expected):
    assert sass.occupancy(CHIPS[target], warps, registers, shared, columns) == expected


DATASHEETS = {
    "sm_80": (312e12, 108, 1.41e9),
    "sm_90": (989e12, 132, 1.83e9),
    "sm_100": (2.25e15, 148, 1.85e9),
}


@pytest.mark.parametrize("target", CHIPS)
def test_rates_agree_with_the_datasheets(target):
    rate, multiprocessors, clock = DATASHEETS[target]
    found = CHIPS[target].matrix[16] * 2 * multiprocessors * clock
    assert found == pytest.approx(rate, rel=0.01)
