import json
from dataclasses import replace
from functools import partial

import pytest
import torch

from fastssl.bench.compiler import tune
from fastssl.bench.compiler.tune import FAILED, LEFT, OK, SCARCE, WRONG
from fastssl.kernels.common import tuning as _tuning
from fastssl.kernels.common.tuning import Config, Kernel, Variant
from fastssl.kernels.correlation import configs as correlation_configs
from fastssl.kernels.correlation import moments_configs
from fastssl.kernels.distillation import linear_triton, soft_triton
from fastssl.kernels.pairwise import lse_configs as pairwise_configs
from fastssl.kernels.pairwise import lse_gemm as pairwise_products
from fastssl.kernels.pairwise import (
    nested_configs,
    sigmoid_configs,
    symmetric_configs,
    topk_configs,
)
from fastssl.kernels.patches import patches_configs
from fastssl.kernels.regression import chamfer_triton, cosine_triton
from fastssl.kernels.tokens import bias_triton, tokens_configs

CPU = torch.device("cpu")
SAFE, FAST, OFF, BROKEN, LARGE = (Config({"BLOCK_M": 2**i}) for i in range(5))
MS = {1: 2.0, 2: 1.0, 4: 0.1}  # by BLOCK_M


class Time:
    """A clock that each timing moves by the seconds it is given."""

    def __init__(self, seconds=0.0):
        self.at, self.seconds, self.timed = 0.0, seconds, []

    def now(self):
        return self.at

    def clock(self, launch):
        self.at += self.seconds
        self.timed.append(launch.args[0])
        return MS[launch.args[0].blocks["BLOCK_M"]]


def run(config):
    return [torch.ones(8), torch.full((8,), 3.001 if config is OFF else 3.0)]


def trial(config, device):
    from triton.runtime.errors import OutOfResources

    if config is LARGE:
        raise OutOfResources(300_000, 232_448, "shared memory")
    if config is BROKEN:
        raise RuntimeError("the compiler fell over\nat length")
    return partial(run, config)


ELSEWHERE = replace(FAST, blocks={"BLOCK_M": 32}, only="sm_90")


def kernel(name, *classes, configs=(SAFE, FAST, OFF, BROKEN, LARGE, ELSEWHERE), safe=SAFE):
    variants = {v: Variant(v, {}, {}, True, tuple(configs), safe, trial) for v in classes}
    return Kernel(name, None, variants)


def tuned(kernels, time, end=1e9):
    return list(tune.tune(kernels, tune.Bench(CPU, time.clock, 1, end, time.now)))


def test_each_candidate_ends_as_it_should():
    time = Time()
    found = tuned([kernel("k", "D64")], time)
    assert {t.config.blocks["BLOCK_M"]: (t.status, t.ms) for t in found} == {
        1: (OK, 2.0),
        2: (OK, 1.0),
        4: (WRONG, None),
        8: (FAILED, None),
        16: (SCARCE, None),
    }
    assert time.timed == [SAFE, FAST]
    why = {t.status: t.why for t in found}
    assert why[WRONG] == "output 1 is off by 1.00e-03 where the safe one has up to 3.00e+00"
    assert why[FAILED] == "RuntimeError: the compiler fell over"
    assert "shared memory" in why[SCARCE]


def test_without_a_safe_result_nothing_is_timed():
    time = Time()
    found = tuned([kernel("k", "D64", configs=(FAST, BROKEN), safe=BROKEN)], time)
    assert [t.status for t in found] == [FAILED, FAILED] and not time.timed
    assert "nothing to compare" in found[1].why


@pytest.mark.parametrize("end, reached", [(15.0, "A"), (19.0, "A"), (20.0, "AB"), (1e9, "ABC")])
def test_no_class_is_begun_that_may_not_end_in_time(end, reached):
    kernels = [
        kernel("k", "A", "B", configs=(SAFE, FAST, ELSEWHERE)),
        kernel("l", "C", configs=(SAFE,)),
    ]
    found = tuned(kernels, Time(seconds=5.0), end)
    assert "".join(t.variant for t in found) == "AABBC"
    assert {t.variant for t in found if t.status == OK} == set(reached)
    assert {t.variant for t in found if t.status == LEFT} == set("ABC") - set(reached)


def test_a_class_that_takes_too_long_is_cut_short():
    found = tuned([kernel("k", "A", configs=(SAFE, FAST))], Time(seconds=9.0), 5.0)
    assert [t.status for t in found] == [OK, LEFT]


@pytest.mark.parametrize(
    "dtype, error, word",
    [
        (torch.bfloat16, 0.03, ""),
        (torch.bfloat16, 0.1, "off"),
        (torch.float32, 5e-5, ""),
        (torch.float32, 5e-4, "off"),
        (torch.float32, torch.nan, "off"),
    ],
)
def test_results_may_differ_by_the_order_of_sums_alone(dtype, error, word):
    expected = torch.tensor([0.0, 1.0], dtype=dtype)
    found = tune.difference([expected + torch.tensor([0.0, error])], [expected])
    assert word in found and bool(word) == bool(found)


def test_merging_leaves_what_was_not_tuned():
    old = {"k": {"sm_90": {"A": {"ms": 1}, "B": {"ms": 2}}, "sm_80": {"A": {"ms": 3}}}}
    new = {"k": {"sm_90": {"B": {"ms": 4}}}, "l": {"sm_90": {"C": {"ms": 5}}}}
    assert tune.merge(old, new) == {
        "k": {"sm_90": {"A": {"ms": 1}, "B": {"ms": 4}}, "sm_80": {"A": {"ms": 3}}},
        "l": {"sm_90": {"C": {"ms": 5}}},
    }
    assert json.loads(tune.text(old)) == old


@pytest.fixture
def one_kernel(monkeypatch, tmp_path):
    """The registry with a kernel of two classes, and a table of its own."""
    monkeypatch.setattr(_tuning, "_kernels", {"k": kernel("k", "A", "B")})
    monkeypatch.setattr(_tuning, "TABLE", tmp_path / "tuned.json")
    _tuning.TABLE.write_text('{"other": {"sm_90": {"D64": {"ms": null}}}}')
    return tmp_path


def test_the_command_prints_writes_and_merges(one_kernel, capsys):
    time, path = Time(), one_kernel / "tune.jsonl"
    assert tune.main(["--json", str(path), "--write"], CPU, time.clock, time.now) == 1
    printed = capsys.readouterr().out
    assert "* k A M=2 warps=4 stages=2 1.0000" in " ".join(printed.split())
    assert "wrong: output 1" in printed and "out of resources: out of resource" in printed
    table = json.loads(_tuning.TABLE.read_text())
    assert table["other"] == {"sm_90": {"D64": {"ms": None}}}
    entry = table["k"]["cpu"]["B"]
    assert Config.read(entry) == FAST and entry["ms"] == 1.0 and "triton 3" in entry["measured"]
    assert tune.text({"k": table["k"]}) in printed
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0]["kind"] == "run" and "--write" in lines[0]["command"]
    timings = [line for line in lines if line["kind"] == "timing"]
    assert len(timings) == 10 and timings[0]["config"]["blocks"] == {"BLOCK_M": 1}


def test_the_command_says_what_it_did_not_reach(one_kernel, capsys):
    time = Time(seconds=50.0)
    assert tune.main(["--minutes", "2"], CPU, time.clock, time.now) == 1
    assert "no time left for 1 classes: k B" in capsys.readouterr().out
    assert "sm_90" in _tuning.TABLE.read_text() and '"k"' not in _tuning.TABLE.read_text()


OURS = {  # a class of each kernel
    "pairwise_lse_fwd": "float16-D64-full",
    "pairwise_lse_bwd": "float16-D64-both",
    "pairwise_lse_half": "float16-D64-half",
    "pairwise_nested_summarize": "float16-rows",
    "pairwise_nested_weigh": "float16-both",
    "pairwise_nested_gather": "float16",
    "pairwise_summarize": "float16-full",
    "pairwise_weigh": "float16-plain",
    "pairwise_sigmoid_tiles": "float16-D64-rows",
    "pairwise_sigmoid_weigh": "float16-grad",
    "pairwise_topk": "float16-n16",
    "standardize_forward": "float16-whole",
    "standardize_backward": "float16-sums",
    "standardize_join": "join",
    "correlation_tiles": "float16-pair",
    "correlation_settle": "float16-pair-mirror",
    "correlation_finish": "float16-rows",
    "patches_gather": "uint8-bfloat16-narrow",
    "patches_spread": "bfloat16-narrow",
    "patches_mse": "float32-P64",
    "patches_mse_long": "float32-long",
    "patches_mse_grad": "float32-narrow",
    "tokens_gather": "float16-restore",
    "tokens_restore": "float16-restore",
    "tokens_scatter": "float16-table",
    "bias_pick": "float16",
    "bias_unpick": "float16",
    "scaled_cosine_forward": "float16",
    "scaled_cosine_backward": "float16",
    "soft_forward": "float16-two-split",
    "soft_backward": "float16-two",
    "linear_forward": "float16",
    "linear_backward": "float16-cols",
    "chamfer_nearest": "float32",
    "chamfer_pull": "float32",
}


def test_every_kernel_has_a_class_here():
    assert set(_tuning.kernels()) == set(OURS)


@pytest.mark.parametrize("name, variant", OURS.items(), ids=OURS)
def test_our_kernels_go_the_whole_way(name, variant, monkeypatch, capsys):
    monkeypatch.setattr(nested_configs, "DIMS", (5, 12))
    for configs in (pairwise_configs, sigmoid_configs, symmetric_configs, nested_configs):
        monkeypatch.setattr(configs, "TRIAL_ROWS", 20)
    monkeypatch.setattr(sigmoid_configs, "TRIAL_BLOCK", (10, 20))
    monkeypatch.setattr(pairwise_products, "TRIAL", (20, 10))
    monkeypatch.setattr(topk_configs, "TRIAL", (5, 40))
    monkeypatch.setattr(moments_configs, "TRIAL", (40, 10))
    monkeypatch.setitem(correlation_configs.TRIAL_TILES, "pair", (70, 20))
    monkeypatch.setattr(correlation_configs, "TRIAL_STRIP", (10, 40))
    monkeypatch.setattr(patches_configs, "TRIAL", (2, 8))
    monkeypatch.setattr(tokens_configs, "TRIAL", (3, 9, 10))
    monkeypatch.setattr(bias_triton, "TRIAL", (3, 2, 9))
    monkeypatch.setattr(cosine_triton, "TRIAL", (2, 3, 10))
    monkeypatch.setattr(soft_triton, "PROTOTYPES", 70)
    monkeypatch.setattr(linear_triton, "TRIAL", (5, 70, 9))
    monkeypatch.setattr(chamfer_triton, "TRIAL", (2, 7, 3))
    known = _tuning.kernels()[name]
    whole = known.variants[variant]
    last = [config for config in whole.tried("") if config != whole.safe][-1:]
    some = {variant: replace(whole, candidates=(whole.safe, *last))}
    monkeypatch.setitem(_tuning._kernels, name, Kernel(name, known.fn, some))
    argv = ["--kernel", name, "--jobs", "1"]
    assert tune.main(argv, CPU, lambda launch: float(len(launch())), Time().now) == 0
    printed = capsys.readouterr().out
    assert printed.count(f"{name}  {variant}") == 1 + len(last)
    assert "wrong" not in printed and "failed" not in printed


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main([]) == 2
    assert "tuning needs a CUDA GPU, and torch sees none" in capsys.readouterr().err


def test_interpreted_kernels_are_not_timed(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert tune.main([]) == 2
    assert "unset it" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--kernel", "nosuch*"], "--kernel 'nosuch*' matches no kernel; there are: k"),
        (["--json", "/no/such/folder/x"], "there is no folder /no/such/folder"),
    ],
)
def test_refuses(one_kernel, argv, words, capsys):
    assert tune.main(argv, CPU) == 2
    assert words in capsys.readouterr().err
