"""The GPU's two commands, without a GPU: steps, names, verdicts, summaries, choices."""

import json
import os
import re
import subprocess
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import torch

from fastssl.bench import record
from fastssl.bench.cases import all_cases
from fastssl.bench.compiler.tune import OK
from fastssl.bench.gpu import __main__ as gpu
from fastssl.bench.gpu import carried, lines, steps, tuning
from fastssl.bench.gpu.children import Child, python
from fastssl.bench.gpu.headlines import HEADLINES, RIVALS, TUNED
from fastssl.bench.gpu.summary import MOST, summary
from fastssl.bench.gpu.watched import Watch
from fastssl.bench.gpu.watched import run as run_watched
from fastssl.kernels.common import tuning as _tuning
from fastssl.kernels.common.tuning import Config, Kernel, Variant
from tests.ranks import start

ROOT = Path(__file__).parents[2]
MACHINE = {
    "gpu": "NVIDIA H200",
    "arch": "sm_90",
    "cuda": "13.0",
    "torch": "2.11.0",
    "triton": "3.6.0",
    "cache": "adopted",
}


@pytest.fixture
def machine(monkeypatch):
    monkeypatch.setattr(gpu, "probe", lambda rehearsal: dict(MACHINE))


def every_phase(make=None):
    make = make or steps.Maker()
    return steps.first(make, Path("tuned.json")), steps.second(make)


def every_child(make=None):
    return [child for phases in every_phase(make) for phase in phases for child in phase.children]


def test_no_two_children_of_a_command_have_one_name_and_all_tests_are_there(monkeypatch):
    monkeypatch.chdir(ROOT)
    for phases in every_phase():
        names = [child.name for phase in phases for child in phase.children]
        assert len(names) == len(set(names)) >= 5
    words = " ".join(" ".join(child.argv) for child in every_child())
    paths = set(re.findall(r"tests/\S+", words))
    assert all((ROOT / path).exists() for path in paths)
    room = {f"tests/gpu/{path.name}" for path in (ROOT / "tests/gpu").glob("test_*.py")}
    assert room - paths == {"tests/gpu/test_sanitize.py"}  # which is of the script, not of a GPU


def test_what_comes_later_keeps_its_time():
    for phases in every_phase():
        left = [phase.leave for phase in phases]
        assert left == sorted(left, reverse=True) and left[0] > 0.4 and left[-1] < 0.05


def test_shares_make_a_whole(monkeypatch):
    monkeypatch.chdir(ROOT)
    launch = [child for child in every_child() if child.name.startswith("launch-")]
    assert [child.argv[-1] for child in launch] == ["0/4", "1/4", "2/4", "3/4"]
    assert not any(child.missing for child in launch)


def test_away_from_the_source_tree_no_test_is_run(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    missing = {child.name: child.missing for child in every_child()}
    assert "root of the source tree" in missing["check-0"] and not missing["before"]


def test_a_rehearsal_is_told_to_its_children():
    for child in every_child(steps.Maker(rehearsal=True)):
        assert child.env["FASTSSL_GPU_REHEARSAL"] == child.env["TRITON_INTERPRET"] == "1"
    assert "FASTSSL_GPU_REHEARSAL" not in every_child()[0].env


@pytest.mark.parametrize(
    "code, said, verdict",
    [
        (0, "========= ERROR SUMMARY: 0 errors", True),
        (9, "========= Invalid __global__ read\n========= ERROR SUMMARY: 1 error", False),
        (0, "========= ERROR SUMMARY: 12 errors", False),
        (0, "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", True),
        (9, "========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)", False),
        (0, "========= ERROR SUMMARY: 1 error\n========= ERROR SUMMARY: 0 errors", False),
        (86, "========= ERROR SUMMARY: 0 errors", False),
        (0, "the script ran, unwatched", False),
        (1, "========= Error: Device not supported. Please refer to", None),
    ],
)
def test_the_verdict_of_the_sanitizer(code, said, verdict):
    found = steps.judge_sanitizer(said, code)
    assert found.get("ok") == verdict and ("refused" in found) == (verdict is None)
    assert ("why" in found) == (verdict is False)


def test_the_verdict_of_the_profiler():
    said = "  _forward (128, 1, 1)x(128, 1, 1), Context 1\n   Duration    us   1.2\n   Other  3\n"
    found = steps.judge_profiler(said, 0)
    assert found["metrics"] == ["_forward (128, 1, 1)x(128, 1, 1), Context 1", "Duration us 1.2"]
    said = "==PROF== x\n==ERROR== ERR_NVGPUCTRPERM: no permission\n"
    assert "ERR_NVGPUCTRPERM" in steps.judge_profiler(said, 1)["refused"]
    assert "exit code 1" in steps.judge_profiler("", 1)["refused"]


FAULTY = (*python(), str(Path(__file__).with_name("faulty.py")))


def small(monkeypatch, *cases):
    """The first command with light children, in two phases."""
    phases = [
        steps.Phase(
            (Child("check-0", (*FAULTY, *cases)), Child("check-1", (*FAULTY, "fine"))), 0.5
        ),
        steps.Phase((Child("before", (*FAULTY, "fine")),), 0.1),
    ]
    monkeypatch.setattr(gpu, "first", lambda make, table: phases)


def test_a_command_leaves_its_files_and_ends_with_its_summary(
    tmp_path, machine, monkeypatch, capsys
):
    small(monkeypatch, "lost", "fine")
    assert gpu.main(["first", "--out", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    stem = rf"{time.strftime('%Y')}-\d\d-\d\d-nvidia-h200-first"
    files = sorted(tmp_path.iterdir())
    assert [path.suffix for path in files] == [".jsonl", ".log", ".txt"]
    assert all(re.fullmatch(stem, path.stem) for path in files)
    assert said.endswith(files[2].read_text()) and "check         2 passed, 1 failed" in said
    first, *rest = lines.read(files[0])
    assert first["kind"] == "machine" and first["triton"] == "3.6.0"
    assert rest[-1]["child"] == "before" and rest[-1]["ok"]
    assert gpu.main(["summary", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out == files[2].read_text()


def test_a_pass_is_a_pass_and_a_test_without_time_is_none(tmp_path, machine, monkeypatch):
    small(monkeypatch, "fine")
    arguments = ["first", "--out", str(tmp_path)]
    assert gpu.main(arguments) == 0
    assert gpu.main([*arguments, "--began", str(time.time() - 470)]) == 1  # minutes are over
    (path,) = tmp_path.glob("*.jsonl")
    assert [x["child"] for x in lines.read(path) if x["kind"] == "left"] == [
        "check-0",
        "check-1",
        "before",
    ]
    assert gpu.main([*arguments, "--only", "before"]) == 0
    assert {x["child"] for x in lines.read(path)} == {"parent", "before"}


def test_results_go_where_out_says(monkeypatch):
    monkeypatch.setenv("OUT", "/somewhere")
    assert gpu._parser().parse_args(["all"]).out == Path("/somewhere")
    monkeypatch.setenv("OUT", "")
    assert gpu._parser().parse_args(["all"]).out == Path("bench/results")


@pytest.mark.parametrize(
    "code, out, err, words",
    [
        (1, "", "Traceback\nModuleNotFoundError: No module named 'triton'", "triton'"),
        (0, json.dumps(MACHINE | {"gpu": "", "cuda": ""}), "", "no GPU .* built for CUDA none"),
    ],
)
def test_a_machine_that_lacks_something_is_told_what(
    monkeypatch, capsys, tmp_path, code, out, err, words
):
    answer = subprocess.CompletedProcess([], code, out, err)
    monkeypatch.setattr(gpu.subprocess, "run", lambda *args, **kwargs: answer)
    assert gpu.main(["first", "--out", str(tmp_path)]) == 2
    assert re.search(words, capsys.readouterr().err) and not [*tmp_path.iterdir()]


def result(name, ms, **more):
    spread = {part: record.Spread(x, x, x) for part, x in ms.items()}
    row = record.Result("ntxent", {}, "bfloat16", name, ms=spread, **more)
    return {**asdict(row), "tflops": row.tflops, "gbs": row.gbs, "share": 0.5}


def test_a_summary_has_failures_then_times_and_fits(tmp_path):
    path = tmp_path / "x.jsonl"
    write = partial(lines.write, path, began=time.time())
    write("parent", "machine", **MACHINE)
    for n in range(300):
        write("check-1", "case", n=n, case=f"case {n}", ok=n < 100, s=1, why="x" * 400)
    write("check-1", "left", names=["a", "b"])
    write("memcheck-0", "note", refused="no such tool")
    flops = {"flops": {"fwd": 3e12}, "bytes_moved": {"fwd": 3e7}}
    moved = {"flops": {"run": 1e6}, "bytes_moved": {"run": 3e9}}
    ours = result("fastssl", {"fwd": 1.0, "step": 3.0, "enqueue": 0.25}, **flops)
    tiles = result("fastssl tiles", {"fwd": 1.5, "bwd": 2.5, "step": 4.0}, **flops)
    eager = result("reference", {"step": 9.0}, **flops)
    write("before", "case", n=0, case="big", ok=True, s=1, rows=[ours, tiles, eager])
    write(
        "before",
        "case",
        n=1,
        case="moves",
        ok=True,
        s=1,
        rows=[result("fastssl", {"run": 2.0}, **moved)],
    )
    write("after", "case", n=0, case="big", ok=True, s=1, rows=[result("fastssl", {"step": 2.5})])
    for n in range(60):
        write("after", "case", n=n, case=f"other {n}", ok=True, s=1, rows=[ours])
    said = summary(path).splitlines()
    assert len(said) <= 100 and len("\n".join(said)) <= MOST
    assert (
        said[0]
        == "gpu NVIDIA H200, arch sm_90, cuda 13.0, torch 2.11.0, triton 3.6.0, cache adopted"
    )
    assert said[1].startswith("check       100 passed, 200 failed, 2 not reached")
    assert "memcheck-0: not run: no such tool" in said
    failed = [i for i, line in enumerate(said) if line.startswith("FAILED check-1 case 1")]
    more = next(i for i, line in enumerate(said) if re.match(r"and \d+ more failures", line))
    assert len(failed) == more - failed[0] and f"and {200 - len(failed)} more" in said[more]
    table = {line.split()[0]: line.split()[1:] for line in said[more + 1 :]}
    assert table["big"] == "3.000 1.000 250 1000 TF/s 50% 9.000 2.500 tiles 1.500+2.500".split()
    assert table["moves"] == "2.000 - - 1500 GB/s 50% - -".split()


def test_headlines_are_cases_and_what_is_tuned_has_a_choice():
    known, cases = _tuning.kernels(), all_cases()
    for headline in HEADLINES:
        case = cases[headline.case]
        assert headline.dtype in case.dtypes and set(headline.shape) == set(case.shapes["cuda"][0])
    assert len(set(map(str, HEADLINES))) == len(HEADLINES) >= 30
    assert all(len(known[kernel].variants[name].candidates) > 1 for kernel, name in TUNED)
    assert len(set(TUNED)) == len(TUNED)
    assert RIVALS == {f"fastssl {name}" for name in ("tiles", "products", "prefix by prefix")}


SAFE, FAST, OFF, LARGE, SLOW = (Config({"BLOCK_M": 2**i}) for i in range(5))
MS = {1: 2.0, 2: 1.0, 4: 0.1, 16: 3.0}  # by BLOCK_M


def trial(config, device):
    from triton.runtime.errors import OutOfResources

    if config is LARGE:
        raise OutOfResources(300_000, 232_448, "shared memory")
    return lambda: torch.full((4,), 3.1 if config is OFF else 3.0)


def tuned(tmp_path, monkeypatch, configs, safe=SAFE, skip=0, made=trial):
    """The lines of a child that tunes one class, and which it chooses."""
    of_class = Variant("D64", {}, {}, True, tuple(configs), safe, made)
    monkeypatch.setattr(tuning, "TUNED", (("k", "D64"),))
    path = tmp_path / "x.jsonl"
    wanted = tuning.candidates({"k": Kernel("k", None, {"D64": of_class})}, "")
    timed = []

    def clock(launch):
        timed.append(wanted[len(lines.cases(lines.read(path)))][3])
        return MS[timed[-1].blocks["BLOCK_M"]]

    trials = tuning.Trials(torch.device("cpu"), clock, lines.cases(lines.read(path)))
    run_watched(trials.cases(wanted), Watch(path, "tune", time.time(), skip))
    found = lines.cases(lines.read(path))
    return found, [t.config for t in tuning.chosen(found)]


def test_the_fastest_right_candidate_is_chosen(tmp_path, monkeypatch):
    elsewhere = replace(OFF, blocks={"BLOCK_M": 32}, only="sm_90")
    found, best = tuned(tmp_path, monkeypatch, (OFF, FAST, SAFE, elsewhere, LARGE, SLOW))
    assert [line["safe"] for line in found] == [True, False, False, False, False]  # it comes first
    by_config = {line["config"]["blocks"]["BLOCK_M"]: line for line in found}
    assert best == [FAST] and by_config[1]["ms"] == 2.0
    assert not by_config[4]["ok"] and "output 0 is off" in by_config[4]["why"]
    assert by_config[8]["ok"] and by_config[8]["status"] == "out of resources"


def test_what_is_hardly_faster_is_not_chosen(tmp_path, monkeypatch):
    monkeypatch.setitem(MS, 2, 1.99)
    assert tuned(tmp_path, monkeypatch, (SAFE, FAST))[1] == [SAFE]


def test_without_a_safe_result_nothing_is_chosen(tmp_path, monkeypatch):
    def made(config, device):
        if config is SAFE:
            raise RuntimeError("the compiler fell over")
        return trial(config, device)

    found, best = tuned(tmp_path, monkeypatch, (SAFE, FAST), made=made)
    assert [line["ok"] for line in found] == [False, False] and best == []
    assert "nothing to compare" in found[1]["why"]


def test_only_what_passed_beside_a_safe_one_that_passed_is_chosen():
    def line(config, ms, safe, ok=True):
        about = {"ok": ok, "status": OK, "ms": ms, "safe": safe, "config": config.fields()}
        return {**about, "kernel": "k", "variant": "D64"}

    assert tuning.chosen([line(FAST, 1.0, False)]) == []
    both = [line(SAFE, 2.0, True), line(FAST, 1.0, False, ok=False)]
    assert [timing.config for timing in tuning.chosen(both)] == [SAFE]


def test_a_child_started_again_does_not_try_what_is_hopeless(tmp_path, monkeypatch):
    """The safe configuration lost the context: it would again, for every candidate."""
    lines.write(
        tmp_path / "x.jsonl", "tune", "case", 0.0, n=0, case="s", ok=False, kernel="k",
        variant="D64", safe=True, config=SAFE.fields(),
    )  # fmt: skip
    launched = []
    made = lambda config, device: launched.append(config) or trial(config, device)  # noqa: E731
    found, best = tuned(tmp_path, monkeypatch, (SAFE, FAST), skip=1, made=made)
    assert not launched and best == [] and "nothing to compare" in found[1]["why"]


def test_a_cache_is_taken_from_the_same_compiler_of_another_python(tmp_path, monkeypatch):
    from triton.runtime import cache

    here = {"version": "3.6.0", "key": "3.6.0-a-b", "sources": "s"}
    monkeypatch.setattr(carried, "compiler", lambda: here)
    monkeypatch.setattr(cache, "triton_key", lambda: "3.6.0-a-b")  # and put back afterwards
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert carried.adopt() == "none"
    for change, verdict in (
        ({}, "same"),
        ({"version": "3.7.0", "key": "k"}, "of triton 3.7.0: everything is compiled here"),
        ({"key": "k", "sources": "t"}, "of another build: everything is compiled here"),
    ):
        (tmp_path / carried.NOTE).write_text(json.dumps(here | change))
        assert carried.adopt() == verdict and cache.triton_key() == here["key"]
    (tmp_path / carried.NOTE).write_text(json.dumps(here | {"key": "3.6.0-a-c"}))
    assert carried.adopt() == "adopted" and cache.triton_key() == "3.6.0-a-c"


def rehearse(folder):
    """The children of the first and the second command, one after another in this process."""
    os.environ |= {"TRITON_INTERPRET": "1", "FASTSSL_GPU_REHEARSAL": "1"}
    os.environ[lines.PATH] = str(folder / "x.jsonl")
    os.chdir(folder)
    from fastssl.bench.gpu import times, train

    os.environ["FASTSSL_GPU_CHILD"] = "before"
    times.main(["before"])
    os.environ["FASTSSL_GPU_CHILD"] = "tune"
    tuning.main()
    os.environ["FASTSSL_GPU_CHILD"] = "after"
    times.main(["after", "--table", "tuned.json"])
    train.main()
    times.main(["profile"])


def test_the_children_rehearse(tmp_path):
    rehearsal = start(rehearse, tmp_path)
    rehearsal.join(400)
    found = lines.read(tmp_path / "x.jsonl")
    assert rehearsal.exitcode == 0 and all(line["ok"] for line in lines.cases(found)), found
    rows = [line["rows"] for line in lines.cases(found) if "rows" in line]
    assert len(rows) == 4 and all({r["rival"] for r in x} == {"fastssl", "reference"} for x in rows)
    table = json.loads((tmp_path / "tuned.json").read_text())
    assert table["scaled_cosine_forward"]["cpu"]["bfloat16"]["ms"] == 1.0
    assert set(table) > {"pairwise_lse_fwd"}  # what was not tuned stays
    trained = [line for line in lines.cases(found) if line["case"].startswith("train ")]
    assert len(trained) == 2 and all(0 < x["last_loss"] < x["first_loss"] for x in trained)
    assert "profiled pairwise-lse" in lines.cases(found)[-1]["case"]


@pytest.mark.parametrize("name", ["first", "second", "all"])
def test_make_has_a_target_for_each_command(name):
    words = ["make", "-n", "--no-print-directory", "gpu" if name == "all" else f"gpu-{name}"]
    words += ["GPU_PYTHON=py", "GPU_ARGS=--minutes 3", "GPU_WHEELS=none"]
    env = {k: v for k, v in os.environ.items() if not k.startswith("MAKE") and k != "MFLAGS"}
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True, env=env)
    said = done.stdout.strip().splitlines()
    assert "py -m pip install" in done.stdout and "--no-index --editable ." in done.stdout
    began = re.fullmatch(rf"py -m fastssl.bench.gpu {name} --began (\d+) --minutes 3", said[-1])
    assert began and abs(int(began[1]) - time.time()) < 600
