"""Children of the GPU's commands: each case has its line, whatever becomes of the others."""

import fcntl
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastssl.bench.gpu import children, lines
from fastssl.bench.gpu.children import Child, Record, run_children

FAULTY = (sys.executable, str(Path(__file__).with_name("faulty.py")))
FOREVER = 1e9


@pytest.fixture
def record(tmp_path):
    return Record(tmp_path / "x.jsonl", tmp_path / "x.log", time.time())


@pytest.fixture
def leap(monkeypatch):
    """A function that sets the parent's clock forward; nothing is asked of the real one."""
    ahead = [0.0]

    def forward(seconds):
        ahead[0] += seconds

    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + ahead[0], sleep=time.sleep)
    monkeypatch.setattr(children, "time", clock)
    return forward


def run(record, *some, end=FOREVER, show=lambda new: None):
    run_children(some, end, record, show)
    return lines.read(record.path)


def verdicts(record, child="c"):
    return {x["case"]: x["ok"] for x in lines.cases(lines.read(record.path)) if x["child"] == child}


def faulty(*cases, name="c", patience=FOREVER, **more):
    return Child(name, (*FAULTY, *cases), patience, **more)


def test_every_case_has_its_line_after_a_lost_context_and_after_a_death(record):
    cases = "fine lost fine dies wrong raises fine dies".split()
    found = run(record, faulty(*cases), faulty("dies", "fine", name="d"))
    named = [f"{n} {name}" for n, name in enumerate(cases)]
    assert list(verdicts(record)) == named
    assert [*verdicts(record).values()] == [name == "fine" for name in cases]
    assert verdicts(record, "d") == {"0 dies": False, "1 fine": True}
    why = {x["case"]: x.get("why") for x in lines.cases(found) if x["child"] == "c"}
    assert why["1 lost"] == (
        "RuntimeError: CUDA error: an illegal memory access was encountered | Compile with ..."
    )
    assert "signal SIGSEGV" in why["3 dies"] and "Fatal Python error" in why["3 dies"]
    assert why["4 wrong"] == "off by 2" and why["5 raises"] == "ValueError: first | second | third"
    assert [x["case"] for x in lines.cases(found) if x.get("lost")] == ["1 lost"]
    assert next(x for x in lines.cases(found) if x["case"] == "0 fine")["found"] == 7
    assert record.log.read_text().count("==== c: ") == 3  # one more for each context, and no more


def test_a_silent_child_is_killed_and_goes_on(record, leap):
    def show(new):
        if any("hanging" in line for line in new):
            leap(100)

    run(record, faulty("fine", "hangs", "fine", patience=99), show=show)
    assert verdicts(record) == {"0 fine": True, "1 hangs": False, "2 fine": True}


def test_at_the_end_all_are_killed_and_what_was_left_is_said(record, leap):
    def show(new):
        if any("hanging" in line for line in new):
            leap(2 * FOREVER)

    found = run(record, faulty("fine", "hangs", "fine"), show=show)
    assert verdicts(record) == {"0 fine": True}
    assert [x["names"] for x in found if x["kind"] == "left"] == [["1 hangs", "2 fine"]]


def test_nothing_is_begun_when_it_is_late(record):
    found = run(record, faulty("fine"), end=time.monotonic() + children.LEAST_S - 1)
    assert [(x["kind"], x["names"]) for x in found] == [("left", ["c"])]


def test_a_child_that_never_begins_is_tried_twice(record):
    found = run(record, faulty("never"))
    assert [x["ok"] for x in lines.cases(found)] == [False, False]
    assert "exit code 1" in found[0]["why"] and "No module named 'torch'" in found[0]["why"]
    assert record.log.read_text().count("==== c: ") == 2


def test_what_cannot_run_here_says_why(record):
    found = run(record, faulty("fine", missing="no such tool"), Child("d", ("/no/such/file",)))
    assert found[0]["refused"] == "no such tool" and found[0]["kind"] == "note"
    assert "No such file" in found[1]["why"] and not found[1]["ok"]


def test_a_judge_adds_its_line_and_may_refuse(record):
    judged = []

    def judge(said, code):
        judged.append((said.strip(), code))
        return {"refused": "not this GPU"} if len(judged) == 2 else {"case": "all", "ok": True}

    run(record, faulty("fine", judge=judge))
    run(record, faulty("never", name="d", judge=judge))
    assert verdicts(record) == {"0 fine": True, "all": True} and not verdicts(record, "d")
    assert [code for _, code in judged] == [0, 1] and "No module" in judged[1][0]


def test_what_a_child_has_started_ends_with_it(record, leap, tmp_path):
    held = tmp_path / "held"
    child = (
        f"import fcntl, time; f = open({str(held)!r}, 'w'); fcntl.flock(f, fcntl.LOCK_EX);"
        "from fastssl.bench.gpu.watched import Watch; Watch.told().plan(['x']); time.sleep(600)"
    )
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    leaps = lambda new: [leap(2 * FOREVER) for line in new if line["kind"] == "plan"]  # noqa: E731
    run(record, Child("c", (sys.executable, "-c", code), FOREVER), show=leaps)
    end = time.monotonic() + 60
    with held.open() as file:
        while True:  # the lock ends with who holds it
            try:
                return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                assert time.monotonic() < end
                time.sleep(0.05)


def test_pytest_is_a_child_like_any_other(record, tmp_path):
    """Fixtures that fail and what a teardown raises are a test's failures too."""
    path = tmp_path / "test_some.py"
    path.write_text(
        "import os, pytest, signal\n"
        "@pytest.fixture\n"
        "def late():\n    yield\n    raise OSError('late')\n"
        "def test_a(): pass\n"
        "def test_b(): raise RuntimeError('CUDA error: misaligned address')\n"
        "def test_c(): os.kill(os.getpid(), signal.SIGSEGV)\n"
        "def test_d(late): pass\n"
        "def test_e(): assert 1 == 2\n"
        "def test_f(): pass\n"
    )
    argv = (sys.executable, "-m", "pytest", "-p", "fastssl.bench.gpu.plugin", "-p")
    argv += ("no:cacheprovider", "--rootdir", str(tmp_path), "-c", "/dev/null", str(path))
    alone = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    part = Child("part", (*argv, "--share", "3/4"), FOREVER, alone)
    run(record, Child("c", argv, FOREVER, alone), part)
    names = [f"some {x}" for x in "abcdef"]
    assert list(verdicts(record)) == names
    assert [*verdicts(record).values()] == [True, False, False, False, False, True]
    assert list(verdicts(record, "part")) == names[3::4] == names[3:4]
    why = {x["case"]: x["why"] for x in lines.read(record.path) if x.get("why")}
    assert why["some d"] == "OSError: late" and "assert 1 == 2" in why["some e"]


def test_a_line_that_is_damaged_is_left_out_and_one_that_is_unfinished_comes_later(record):
    tail = lines.Tail(record.path)
    record.write("c", "note", words="one")
    with record.path.open("a") as file:
        file.write('{"child": "c", "kind": "ca\n[1]\n')
    record.write("c", "note", words="two")
    with record.path.open("a") as file:
        file.write('{"child": "c", "kind": "note", "words": "unfini')
    assert [line["words"] for line in tail.new()] == ["one", "two"]
    with record.path.open("a") as file:
        file.write('shed"}\n')
    assert [line["words"] for line in tail.new()] == ["unfinished"]
