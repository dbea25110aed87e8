"""The ahead-of-time proof: what it lets pass, what it fails, and how it reads machine code."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastssl.bench.compiler import aot
from fastssl.bench.compiler.aot import KB
from fastssl.kernels.common.tuning import Config, Kernel, Variant

ROOT = Path(__file__).parents[2]
DEMO = "tests.bench.demo_kernels:register_all"

USAGE = """
Resource usage:
 Common:
  GLOBAL:11 CONSTANT[4]:8
 Function _lse:
  REG:108 STACK:1584 SHARED:1024 LOCAL:16 CONSTANT[0]:584 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
PTX = """
	.reg .b32 %r<9>; // mma.sync_is_not_one
	wgmma.fence.sync.aligned;
	@%p1 wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%f1}, %rd1, %rd2, 1, 1, 1, 0, 1;
	wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%f1}, %rd1, %rd2, 1, 1, 1, 0, 1;
	wgmma.wait_group.sync.aligned 0;
"""


# Importing torch and Triton takes longer than compiling: both commands in one process.
BOTH = """
import sys
from fastssl.bench.compiler.aot import main
words = ["--module", sys.argv[1], "--kernel", "proof_good", "--jobs", "1", "--json", sys.argv[2]]
print("code", main(words), flush=True)
words = ["--module", "json", "--kernel", "proof_[!g]*", "--target", "sm_90", "--jobs", "1"]
print("code", main([*words, "--json", sys.argv[3]]))
"""


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """What was printed and the exit code, of a good kernel and of all others; both records."""
    folder = tmp_path_factory.mktemp("aot")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(folder / "cache")
    paths = [folder / "good.jsonl", folder / "others.jsonl"]
    command = [sys.executable, "-c", BOTH, DEMO, *map(str, paths)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    parts = re.split(r"code (\d)\n", done.stdout)
    assert len(parts) == 5, done.stdout + done.stderr
    records = [[json.loads(x) for x in path.read_text().splitlines()] for path in paths]
    return (parts[0], int(parts[1])), (parts[2], int(parts[3])), records


def test_good_kernels_pass(compiled):
    printed, code = compiled[0]
    assert code == 0, printed
    assert printed.splitlines()[-1].startswith("3 compiled, 0 failed") and "FAILED" not in printed


def test_json_holds_conditions_and_facts(compiled):
    (head, *good), (_, *others) = compiled[2]
    assert head["kind"] == "aot" and head["versions"]["triton"] and set(head["ptxas"]) > {"sm_80"}
    assert "--kernel proof_good" in head["command"] and head["time"].startswith("20")
    assert {row["kind"] for row in good} == {"proof"}
    instructions = {row["target"]: set(row["matrix"]) for row in good}
    assert instructions == {"sm_80": {"mma"}, "sm_90": {"wgmma"}, "sm_100": {"tcgen05"}}
    assert [row["tensor_columns"] for row in good] == [0, 0, 64]
    assert good[1]["config"]["blocks"] == {"BLOCK_M": 64, "BLOCK_N": 64}
    by = {row["kernel"]: row for row in others}
    assert set(by["proof_narrow"]["matrix"]) == {"mma"}  # too small a tile for wgmma
    assert by["proof_scale"]["matrix"] == {} and by["proof_scale"]["faults"] == []


@pytest.mark.parametrize(
    "name, why",
    [
        ("proof_bad_spill", "spills registers"),
        ("proof_bad_shared", "bytes of shared memory a block, sm_90 has 232448"),
        ("proof_bad_product", "without matrix instructions"),
        ("proof_bad_warps", "not with Hopper's wgmma"),
        ("proof_bad_shape", "does not compile: CompilationError"),
        ("proof_bad_signature", "does not compile: ValueError"),
    ],
)
def test_each_fault_is_named_with_what_to_do(compiled, name, why):
    printed, code = compiled[1]
    heads = [line for line in printed.splitlines() if line.startswith(f"FAILED {name}, D64")]
    assert code == 1 and any(why in line and ", sm_90: " in line for line in heads), printed


def test_faults_are_counted(compiled):
    printed, _ = compiled[1]
    assert printed.splitlines()[-1].startswith("6 compiled, 6 failed")
    assert "['OUT', 'N', 'FACTOR']" in printed and "the kernel does not have ['n']" in printed


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
    wide = Config({"BLOCK_M": 512}, num_warps=8, only="sm_100")
    tried = other, safe, other, wide
    return Variant(name, {}, {}, product, tried, safe, lambda config, device: print)


def test_plan_holds_every_variant_configuration_and_target_once():
    kernel = Kernel("k", None, {name: variant(name) for name in ("first", "second")})
    whole = aot.plan([kernel], ["sm_80", "sm_90"])
    assert len(whole) == len({str(task) for task in whole}) == 2 * 2 * 2
    alone = [t.target for t in aot.plan([kernel], ["sm_90", "sm_100"]) if "M=512" in str(t)]
    assert alone == ["sm_100"] * 2  # that of one chip
    quick = aot.plan([kernel], ["sm_80", "sm_90"], quick=True)
    names = [str(task) for task in quick]
    assert names == [f"k, first, M=64 warps=4 stages=2, {t}" for t in ("sm_80", "sm_90")]


def test_what_is_used_is_compiled_for_one_chip_in_turn(monkeypatch):
    tuned = {("k", "sm_80", name): Config({"BLOCK_M": 256}) for name in "abcdefghi"}
    monkeypatch.setattr(aot.tuning, "table", lambda: tuned)
    kernel = Kernel("k", None, {name: variant(name) for name in "abcdefghi"})
    tasks = aot.plan([kernel], ["sm_80", "sm_90", "sm_100"], used=True)
    assert "".join(task.variant for task in tasks) == "abcdefghi"
    assert [task.target[3:] for task in tasks] == "80 90 100 90 100 80 100 80 90".split()
    assert [task.config.blocks["BLOCK_M"] for task in tasks if task.target == "sm_80"] == [
        *(256, 64, 256)  # the tuned and the safe in turn
    ]
    assert len(aot.plan([kernel], ["sm_80", "sm_90", "sm_100"], used=True, quick=True)) == 3
    few = Kernel("k", None, {name: variant(name) for name in "xy"})  # not all chips in turn
    assert len(aot.plan([few], ["sm_80", "sm_90", "sm_100"], used=True)) == 6


def test_of_two_16_bit_dtypes_one_is_compiled_in_turn():
    names = ["bfloat16-a", "bfloat16-b", "float32-a", "float16-a", "float16-b", "uint8-bfloat16"]
    tasks = aot.plan([Kernel("k", None, {n: variant(n) for n in names})], ["sm_80"], used=True)
    assert [t.variant for t in tasks] == ["bfloat16-a", "float16-b", "float32-a", "uint8-bfloat16"]


def test_what_was_tuned_on_a_target_is_compiled_for_it(monkeypatch):
    tuned = Config({"BLOCK_M": 256}, num_warps=8)
    monkeypatch.setattr(aot.tuning, "table", lambda: {("k", "sm_90", "v"): tuned})
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
        aot.tuning, "kernels", lambda: {"k": Kernel("k", None, {"v": variant("v")})}
    )
    monkeypatch.setattr(aot, "compile_variant", full)
    with pytest.raises(SystemExit) as stop:
        aot.main(["--jobs", "1"])
    assert stop.value.code == 2
    assert "stopped after 0 of 1 compilations: [Errno 28]" in capsys.readouterr().err


def facts(**changes):
    found = dict(registers=64, spilled=0, shared=0, tensor_columns=0, matrix={})
    return aot.Facts(**(found | changes))


@pytest.mark.parametrize(
    "changes, target, blocks, why",
    [
        ({"matrix": {"wgmma": 4}}, "sm_90", 64, ""),
        ({"matrix": {"mma": 4}}, "sm_90", 32, ""),
        ({"matrix": {"mma": 4}}, "sm_90", 64, "wgmma"),
        ({"matrix": {"mma": 4}}, "sm_80", 64, ""),
        ({"matrix": {}}, "sm_100", 16, "without matrix instructions"),
        ({"matrix": {"mma": 1}, "shared": 163 * KB}, "sm_80", 64, ""),
        ({"matrix": {"mma": 1}, "shared": 163 * KB + 1}, "sm_80", 64, "shared memory"),
        ({"matrix": {"mma": 1}, "spilled": 8}, "sm_80", 64, "spills"),
        ({"matrix": {"tcgen05": 1}, "tensor_columns": 512}, "sm_100", 64, ""),
        ({"matrix": {"tcgen05": 1}, "tensor_columns": 513}, "sm_100", 64, "tensor memory"),
    ],
)
def test_the_verdicts(changes, target, blocks, why):
    config = Config({"BLOCK_M": blocks})
    found = list(aot.faults(facts(**changes), variant("v"), config, target))
    assert len(found) == bool(why) and why in "".join(found)


def test_no_product_needs_no_matrix_instruction():
    found = aot.faults(facts(), variant("v", product=False), Config({}), "sm_90")
    assert list(found) == []


def test_facts_are_read():
    found = aot.facts_of(USAGE, PTX, "_lse", shared=512, tensor_columns=64)
    assert found == aot.Facts(108, 1600, 512, 64, {"wgmma": 2})
    own = USAGE.replace("SHARED:1024", "SHARED:1280")  # more than the system's kilobyte
    assert aot.facts_of(own, PTX, "_lse").shared == 256
    assert aot.facts_of(USAGE.replace("SHARED:1024", "SHARED:8"), "", "_lse").shared == 8
    with pytest.raises(ValueError, match="does not know a function 'other'"):
        aot.facts_of(USAGE, PTX, "other")
