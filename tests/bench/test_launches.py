"""Launches seen without a GPU: told apart as Triton tells them apart, and wrong ones refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastssl.bench.compiler import launches
from fastssl.bench.compiler.recording import recorded

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What tests/bench/launched.py found, and the lines that the command printed."""
    folder = str(tmp_path_factory.mktemp("launched"))
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["FASTSSL_GPU_RECORDING"] = "1"
    command = [sys.executable, "-m", "tests.bench.launched", folder]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found, *lines = done.stdout.splitlines()
    return json.loads(found), lines


def test_dozens_of_launches_pass_the_front_end(seen):
    lines = seen[1]
    count, words = lines[-2].split(" ", 1)
    assert int(count) > 30 and words.startswith("launches, 0 failed") and lines[-1] == "0"
    assert "clip bfloat16 sm_90: 4 of _summarize, _weigh" in lines


def test_an_edited_rule_is_another_kernel(seen):
    """Else the cache on the disk would give the old one, and the loss of another mask."""
    assert seen[0]["edited"]


def test_a_launch_is_told_apart_by_what_it_is_specialized_for(seen):
    found = seen[0]
    assert len(found["same"]) == 1  # whatever its grid
    assert len({*found["same"], *(key for (key,) in found["others"])}) == 4


def test_what_no_gpu_can_run_is_refused(seen):
    kind, why = seen[0]["grid"]
    assert kind == "ValueError" and "_fill is launched with a grid of 1 x 65536 x 1" in why


def test_a_wait_for_the_gpu_is_seen(seen):
    assert seen[0]["waits"][0] == "DataDependentOutputException"


def test_what_a_gpu_will_launch_can_be_packed_for_it(seen):
    """A headline, whose backward is two launches; a candidate; a test's subject; a step."""
    assert seen[0]["packed"] == [3, 1, 3, 2]


def test_nothing_that_a_gpu_runs_is_left_out_of_the_pack(seen):
    assert seen[0]["left out"] == [True]


def test_sizes_of_one_compile(seen):
    assert seen[0]["joined once"] == [True]


def test_an_interpreter_has_nothing_to_record():
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET is set"):
        with recorded(launches.GPUS["sm_90"]):
            pass


@pytest.mark.parametrize("words, why", [(["clop"], "no case is called 'clop'"), ([], "TRITON_INT")])
def test_a_wrong_command_is_refused(words, why, monkeypatch, capsys):
    if words:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(SystemExit) as stop:
        launches.main(words)
    assert stop.value.code == 2 and why in capsys.readouterr().err
