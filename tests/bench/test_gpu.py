"""The GPU's slices, without a GPU: times, names, command lines, verdicts and tables."""

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from argparse import ArgumentParser
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastssl.bench import __main__ as bench
from fastssl.bench import record
from fastssl.bench.cases import all_cases
from fastssl.bench.compiler import tune
from fastssl.bench.gpu import __main__ as gpu
from fastssl.bench.gpu import steps as stepping
from fastssl.bench.gpu.steps import CUT, FAILED, NOT_RUN, OK, Step, run_command, run_steps
from fastssl.bench.registry import OURS

from .sample import run as sample_run

ROOT = Path(__file__).parents[2]
LATE = 12345.0
MACHINE = {
    "gpu": "NVIDIA H200",
    "arch": "sm_90",
    "cuda": "13.0",
    "torch": "2.11.0",
    "triton": "3.6.0",
}


@pytest.fixture
def place(tmp_path):
    (tmp_path / "parts").mkdir()
    (tmp_path / "out").mkdir()
    return gpu.Place(
        MACHINE, tmp_path / "out", tmp_path / "parts", "2026-11-20", tuple(all_cases())
    )


@pytest.fixture
def machine(monkeypatch):
    monkeypatch.setattr(gpu, "probe", lambda rehearsal: dict(MACHINE))


class Clockwork:
    """Commands that take the seconds they are given, on a clock of their own."""

    def __init__(self, *seconds):
        self.now, self.seconds, self.asked = 0.0, list(seconds), []

    def clock(self):
        return self.now

    def run(self, argv, seconds, env):
        self.asked.append((argv[0], seconds))
        spent = self.seconds.pop(0)
        self.now += min(spent, seconds)
        return (None if spent > seconds else 0), [], min(spent, seconds)


def test_a_step_gets_its_own_time_or_what_is_left():
    work = Clockwork(50.0, 500.0, 1.0)
    steps = [Step(name, (name,), most) for name, most in (("a", 80), ("b", 900), ("c", 100))]
    done = run_steps(steps, 200.0, run=work.run, clock=work.clock)
    assert work.asked == [("a", 80), ("b", 200 - 50 - stepping.GRACE_S)]
    assert [o.status for o in done] == [OK, CUT, NOT_RUN]
    assert done[2].note == "no time left"


def test_what_cannot_run_takes_no_time_and_says_why():
    seen = []
    steps = [Step("a", ("a",), 50, missing="no such tool"), Step("b", ("b",), 50)]
    work = Clockwork(1.0)
    run_steps(steps, 200.0, run=work.run, clock=work.clock, after=seen.append)
    assert [(o.name, o.status, o.note) for o in seen] == [
        ("a", NOT_RUN, "no such tool"),
        ("b", OK, ""),
    ]


def test_a_command_passes_its_lines_on(capfd):
    code = "import sys; print('one'); print('two', file=sys.stderr); sys.exit(3)"
    ended, lines, seconds = run_command((sys.executable, "-c", code), 60, {})
    assert ended == 3 and sorted(lines) == ["one", "two"] and 0 < seconds < 60
    assert "one\n" in capfd.readouterr().out


def test_a_command_sees_its_environment():
    code = "import os; print(os.environ['FASTSSL_TEST'])"
    assert run_command((sys.executable, "-c", code), 60, {"FASTSSL_TEST": "7"})[1] == ["7"]


@pytest.fixture
def late(monkeypatch):
    """A time that is over as soon as the command has printed a line, however slow the machine."""
    said, pass_on = threading.Event(), stepping._pass_on

    def told(stream):
        for line in stream:
            yield line
            said.set()

    class Late(subprocess.Popen):
        def wait(self, timeout=None):
            if timeout != LATE:
                return super().wait(timeout)
            assert said.wait(200)
            raise subprocess.TimeoutExpired(self.args, timeout)

    monkeypatch.setattr(stepping, "_pass_on", lambda stream, lines: pass_on(told(stream), lines))
    monkeypatch.setattr(subprocess, "Popen", Late)
    return LATE


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN])
def test_a_late_command_is_interrupted_and_keeps_its_last_words(handler, late, monkeypatch):
    """Also where a shell started us in the background, which ignores interrupts."""
    monkeypatch.setattr(stepping, "GRACE_S", 50)
    code = (
        "import time\ntry:\n print('up'); time.sleep(60)\nexcept KeyboardInterrupt:\n print('bye')"
    )
    before = signal.signal(signal.SIGINT, handler)
    try:
        done = run_command((sys.executable, "-c", code), late, {})
    finally:
        signal.signal(signal.SIGINT, before)
    assert done[:2] == (None, ["up", "bye"])


def test_a_deaf_command_is_killed_with_its_children(late, monkeypatch, tmp_path):
    monkeypatch.setattr(stepping, "GRACE_S", 0.1)
    held = tmp_path / "held"
    child = (
        f"import fcntl, time; f = open({str(held)!r}, 'w'); fcntl.flock(f, fcntl.LOCK_EX);"
        "print('up'); time.sleep(600)"
    )
    code = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN);"
        f"subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(600)"
    )
    assert run_command((sys.executable, "-c", code), late, {})[:2] == (None, ["up"])
    end = time.monotonic() + 100
    with held.open() as file:
        while True:  # the child's lock ends with the child
            try:
                return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                assert time.monotonic() < end
                time.sleep(0.05)


@pytest.mark.parametrize(
    "code, last, want",
    [
        (0, "556 passed in 7.56s", (OK, "556 passed in 7.56s")),
        (1, "== 2 failed, 5 passed in 9.1s ==", (FAILED, "2 failed, 5 passed in 9.1s")),
        (None, "3 passed in 120.02s (0:02:00)", (CUT, "3 passed in 120.02s (0:02:00)")),
        (4, "ERROR: file not found: tests/x", (FAILED, "exit code 4: ERROR: file not found")),
        (None, "", (CUT, "")),
    ],
)
def test_the_verdict_on_tests(code, last, want):
    status, note = stepping.judge_pytest(code, ["...", last])
    assert status == want[0] and note.startswith(want[1])


@pytest.mark.parametrize(
    "code, text, status",
    [
        (0, "========= ERROR SUMMARY: 0 errors", OK),
        (9, "========= Invalid __global__ read\n========= ERROR SUMMARY: 1 error", FAILED),
        (0, "========= ERROR SUMMARY: 12 errors", FAILED),
        (0, "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", OK),
        (9, "========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)", FAILED),
        (0, "========= ERROR SUMMARY: 1 error\n========= ERROR SUMMARY: 0 errors", FAILED),
        (0, "========= ERROR SUMMARY: in words of another version", FAILED),
        (0, "the script ran, unwatched", FAILED),
        (1, "========= Error: Device not supported. Please refer to", NOT_RUN),
        (None, "========= ERROR SUMMARY: 0 errors", CUT),
    ],
)
def test_the_verdict_of_the_sanitizer(code, text, status):
    assert stepping.judge_sanitizer(code, text.splitlines())[0] == status


def rows(path, *statuses, rival="fastssl"):
    record.write_line(path, "run", {"device": "x", "command": path.name})
    for status in statuses:
        record.write_line(
            path, "result", record.Result("clip", {}, "float32", rival, status, why="because")
        )
    fit = record.Fit("clip", "float32", rival, "B", {}, "ms", 2.0, 1.0, 5)
    record.write_line(path, "fit", fit)


@pytest.mark.parametrize(
    "statuses, code, want",
    [
        (["ok", "ok"], 0, (OK, "2 measured")),
        (["ok", "wrong"], 1, (FAILED, "1 measured, clip wrong")),
        (["ok"], None, (CUT, "1 measured")),
        (["absent", "absent"], 0, (NOT_RUN, "because")),
        ([], 1, (FAILED, "exit code 1: Segmentation fault")),
    ],
)
def test_the_verdict_on_a_benchmark(tmp_path, statuses, code, want):
    rows(tmp_path / "part", *statuses)
    assert gpu.judge_record(tmp_path / "part", code, ["Segmentation fault"]) == want


def test_a_benchmark_of_a_stand_in_says_so(tmp_path):
    """DALI is not installed: the other back end is measured."""
    rows(tmp_path / "part", "absent")
    rows(tmp_path / "part", "ok", rival="fastssl torchvision")
    said = "fastssl torchvision: 1 measured; fastssl: because"
    assert gpu.judge_record(tmp_path / "part", 0, []) == (OK, said)


def test_a_benchmark_that_wrote_nothing(tmp_path):
    assert gpu.judge_record(tmp_path / "part", 2, ["no case"]) == (FAILED, "exit code 2: no case")


def every_step(place):
    makers = (gpu.plan_test, gpu.plan_tune, gpu.plan_bench, gpu.plan_train)
    return [step for make in makers for step in make(place, time.monotonic() + 450)]


def test_no_two_steps_have_one_name(place):
    names = [step.name for step in every_step(place)]
    assert len(names) == len(set(names)) > 20


def measured(place, theme):
    steps = [*gpu.plan_bench(place, 0.0), *gpu.plan_train(place, 0.0)]
    parser: ArgumentParser = bench._parser()
    found = [parser.parse_args(s.argv[3:]) for s in steps if s.name.startswith(theme)]
    for args in found:
        assert args.size == "cuda" and args.json.name.startswith(theme)
        assert theme.endswith(*args.dtype)
    return found


def test_the_first_cases_come_first_in_both_dtypes_and_all_come(place):
    apart = {name for name in place.cases if gpu._is(name, gpu.APART)}
    for theme in ("bench-bfloat16", "bench-float32"):
        cases = [args.cases for args in measured(place, theme)]
        assert [c[0] for c in cases[:4]] == [*gpu.FIRST]
        joined = [name for some in cases for name in some]
        optim = {name for name in apart if name.startswith("optim-") and "float32" in theme}
        data = set(gpu.DATA) if "float32" in theme else set()
        assert sorted(joined) == sorted(set(place.cases) - apart | optim | data)
    assert [a.sweep for a in measured(place, "bench-sweep-bfloat16")] == 4 * [True]
    assert [a.rival for a in measured(place, "bench-compile-bfloat16")] == 4 * [["compile"]]


def test_the_rivals_have_the_names_that_cases_give_them():
    known = "".join(path.read_text() for path in (ROOT / "bench/cases").glob("*.py"))
    ours = f"{OURS} torch"  # from bench/cases/rivals.py
    assert all(f'rivals["{name}"]' in known for name in gpu.RIVALS if name != ours)
    assert ours in gpu.RIVALS and " torch" in (ROOT / "bench/cases/rivals.py").read_text()
    data = all_cases()["data-jpeg-simclr"]
    made = data.make(dict(data.shapes["quick"][0]), torch.float32, torch.device("cuda"))
    assert set(gpu.FEEDERS) <= set(made.rivals) and set(gpu.DATA) <= set(all_cases())


def test_a_rehearsal_is_small_and_on_the_cpu(place):
    for step in gpu.plan_bench(replace(place, rehearsal=True), 0.0):
        args = bench._parser().parse_args(step.argv[3:])
        assert (args.size, args.device, args.no_memory) == ("quick", "cpu", True)


def test_every_method_is_trained(place):
    trained = [name for args in measured(place, "train-bfloat16") for name in args.cases]
    assert trained == [name for name in place.cases if name.startswith("train-")] != []


def test_the_tuner_is_told_where_and_how_long(place):
    (step,) = gpu.plan_tune(place, time.monotonic() + 450)
    assert step.argv[:3] == (sys.executable, "-m", "fastssl.bench.tune")
    args = tune._parser().parse_args(step.argv[3:])
    assert args.json == place.out / "2026-11-20-nvidia-h200-tune.jsonl"
    assert args.minutes == 7.0 and step.most == pytest.approx(440, abs=1)
    record.write_line(args.json, "run", {})
    for status in (tune.OK, tune.OK, tune.WRONG):
        record.write_line(args.json, "timing", {"status": status})
    assert step.judge(1, ["}"]) == (FAILED, "2 ok, 1 wrong")
    args.json.unlink()
    assert step.judge(2, ["no GPU"]) == (FAILED, "exit code 2: no GPU")


def test_the_tests_that_are_run_are_there(place, monkeypatch):
    monkeypatch.chdir(ROOT)
    steps = {step.name: step for step in gpu.plan_test(place, 0.0)}
    paths = [w for s in steps.values() for w in s.argv if w.startswith("tests/")]
    assert len(paths) >= 6 and all((ROOT / path).exists() for path in paths)
    room = {p.name for p in (ROOT / "tests/gpu").glob("test_*.py")}
    assert room <= {Path(path).name for path in paths}
    assert steps["memcheck"].env == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    assert steps["racecheck"].argv[1:3] == ("--tool", "racecheck")
    assert " -W default " in " ".join(steps["kernels"].argv)  # warnings are no failures there


def test_away_from_the_source_tree_no_test_is_run(place, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert all("root of the source tree" in s.missing for s in gpu.plan_test(place, 0.0)[:2])


def test_parts_are_joined_to_one_record_for_each_theme(place):
    whole = sample_run()
    for number, results in enumerate((whole.results[:5], whole.results[5:])):
        some = record.Run(whole.conditions, whole.ceilings, results, published=whole.published)
        part = place.parts / f"bench-bfloat16.{number:02}.x"
        record.write(part, some)
    with part.open("a") as cut:
        cut.write('{"kind": "result", "case": "half a li')
    gpu.gather(place)
    gpu.gather(place)  # after each step again
    path = place.out / "2026-11-20-nvidia-h200-bench-bfloat16.jsonl"
    assert [*place.out.iterdir()] == [path]
    joined = record.read(path)
    assert joined.results == whole.results and joined.ceilings == whole.ceilings
    assert joined.published == whole.published and joined.seconds is None


def test_an_ended_record_has_the_seconds_of_its_parts(place):
    for number in (1, 2):
        part = place.parts / f"bench-float32.{number:02}.x"
        some = record.Run({"command": f"c{number} --json {part}"}, seconds=10.0 * number)
        record.write(part, some)
    gpu.gather(place)
    joined = record.read(place.file("bench-float32.jsonl"))
    assert joined.seconds == 30.0 and joined.conditions["command"] == (
        "c1 --json bench-float32.01.x && c2 --json bench-float32.02.x"
    )


def test_headlines_hold_ours_beside_the_best_rival(tmp_path):
    record.write(tmp_path / "x.jsonl", sample_run())
    lines = gpu.headlines(tmp_path / "x.jsonl")
    assert re.fullmatch(r"ntxent +N=8192 D=128 +2\.00 ms  lightly x 4\.50 +80 % of floor", lines[0])
    assert "open_clip x 1.01 (tie)" in lines[1]
    assert "open_clip x 0.500" in lines[2]  # what we lose is said as well
    assert lines[3].endswith("wrong: value is off by 1e-2")
    assert "no rival has a time" in lines[4] and len(lines) == 6  # no line for a sweep


def scripted(calls, code=0):
    def run(argv, seconds, env):
        calls.append(argv)
        if "--json" in argv:
            path = Path(argv[argv.index("--json") + 1])
            rows(path, "ok") if "fastssl.bench" in argv else path.touch()
        return code, ["1 passed in 0.1s"], 1.0

    return run


def test_all_slices_leave_few_flat_files(tmp_path, machine, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    calls = []
    assert gpu.main(["all", "--out", str(tmp_path), "--minutes", "9"], scripted(calls)) == 0
    files = sorted(tmp_path.iterdir())
    assert len(files) == 7 and all(f.is_file() for f in files)
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d-nvidia-h200-[a-z0-9.-]+", f.name) for f in files)
    said = capsys.readouterr().out
    assert said.index("\ntest\n") < said.index("\ntune\n") < said.index("\nbench\n")
    (notes,) = (json.loads(f.read_text()) for f in files if f.name.endswith("-gpu.json"))
    assert notes["machine"] == MACHINE and [*notes][1:] == [*gpu.SLICES]
    assert len(calls) == sum(o["status"] != NOT_RUN for name in gpu.SLICES for o in notes[name])
    assert gpu.main(["summary", "--out", str(tmp_path)]) == 0
    assert said.endswith(capsys.readouterr().out)


def test_a_failed_step_fails_the_run_and_says_how(tmp_path, machine, capsys):
    arguments = ["tune", "--out", str(tmp_path)]
    assert gpu.main(arguments, scripted([])) == 0
    assert gpu.main(arguments, scripted([], code=1)) == 1
    assert re.search(r"\ntune  failed +1\.0 s  exit code 1: 1 passed", capsys.readouterr().out)


def test_a_test_that_was_cut_short_has_not_passed_but_a_benchmark_may(
    tmp_path, machine, monkeypatch
):
    monkeypatch.chdir(ROOT)
    for name, code in (("test", 1), ("bench", 0)):
        arguments = [name, "--out", str(tmp_path / name)]
        assert gpu.main(arguments, scripted([], code=None)) == code


def test_one_step_alone(tmp_path, machine, monkeypatch):
    monkeypatch.chdir(ROOT)
    calls = []
    gpu.main(["test", "--out", str(tmp_path), "--only", "kern*"], scripted(calls))
    assert [argv[-1] for argv in calls] == ["tests/kernels"]


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
    assert gpu.main(["bench", "--out", str(tmp_path)]) == 2
    assert re.search(words, capsys.readouterr().err) and not [*tmp_path.iterdir()]


@pytest.mark.parametrize("name", ["", *gpu.SLICES])
def test_make_has_a_target_for_each_slice(name):
    target = f"gpu-{name}" if name else "gpu"
    words = [
        "make",
        "-n",
        "--no-print-directory",
        target,
        "GPU_PYTHON=py",
        "GPU_ARGS=--minutes 3",
        "GPU_WHEELS=none",
    ]
    env = {k: v for k, v in os.environ.items() if not k.startswith("MAKE") and k != "MFLAGS"}
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True, env=env)
    install, run = done.stdout.strip().splitlines()
    assert install.startswith("py -m pip install") and "--no-index --editable ." in install
    assert run == f"py -m fastssl.bench.gpu {name or 'all'} --minutes 3"
