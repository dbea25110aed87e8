import json
import math
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Barrier
from types import SimpleNamespace

import pytest
import torch

from fastssl.kernels.common import gpu as _gpu
from fastssl.kernels.common import tuning as _tuning
from fastssl.kernels.common.tuning import Config, Kernel, Variant, config_for

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
SMALL, LARGE, HUGE = (Config({"BLOCK_M": size}, num_warps=8) for size in (16, 64, 256))
ELSEWHERE = Config({"BLOCK_M": 128}, num_warps=8, only="sm_100")  # of them the fastest


def launches(config, device):
    """A trial whose launch takes as many ms as its blocks are wide; the huge ones do not fit."""
    from triton.runtime.errors import OutOfResources

    if config == HUGE:
        raise OutOfResources(300_000, 232_448, "shared memory")
    return lambda: config.blocks["BLOCK_M"]


current = []  # the devices entered by torch.cuda.device


@contextmanager
def entered(device):
    current.append(device)
    yield
    current.pop()


def clock(launch):
    assert current == [GPU]  # else events and streams would be another GPU's
    return -float(launch())  # the wider the faster


def kernel(trial=launches, source="def f(): pass"):
    variant = Variant("D64", {}, {}, True, (SMALL, ELSEWHERE, LARGE, HUGE), SMALL, trial)
    return Kernel("k", SimpleNamespace(cache_key=source), {"D64": variant})


@pytest.fixture(autouse=True)
def h200(monkeypatch, tmp_path):
    """A machine with a GPU that nothing is launched on, and a cache of its own."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("FASTSSL_AUTOTUNE", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "device", entered)
    monkeypatch.setattr(_gpu, "_read", lambda device: _gpu.Gpu("sm_90", 132))
    monkeypatch.setattr(_tuning, "_timed", {})
    monkeypatch.setattr(_tuning, "TABLE", tmp_path / "tuned.json")
    _tuning.TABLE.write_text("{}")
    _tuning.table.cache_clear()
    yield
    _tuning.table.cache_clear()


def write_table(arch, config):
    entry = {**config.fields(), "ms": None, "measured": "not measured: chosen ahead of time"}
    _tuning.TABLE.write_text(json.dumps({"k": {arch: {"D64": entry}}}))


def autotune(k, timer=clock):
    _tuning._timed.clear()
    return _tuning.autotuned(k, k.variants["D64"], GPU, timer)


def test_a_cpu_takes_the_safe_configuration():
    write_table("sm_90", LARGE)
    assert config_for(kernel(), "D64", CPU) == SMALL


def test_a_gpu_in_the_table_takes_what_was_tuned_for_it():
    write_table("sm_90", LARGE)
    assert config_for(kernel(), "D64", GPU) == LARGE


@pytest.mark.parametrize("arch, name", [("sm_100", "k"), ("sm_90", "another")])
def test_what_is_not_in_the_table_takes_the_safe_configuration(arch, name):
    write_table(arch, LARGE)
    found = kernel()
    assert config_for(Kernel(name, found.fn, found.variants), "D64", GPU) == SMALL


def test_forced_configurations_hold_inside_alone():
    with _tuning.forced("k", HUGE):
        with _tuning.forced("k", LARGE), _tuning.forced("j", SMALL):
            assert config_for(kernel(), "D64", GPU) == LARGE
        assert config_for(kernel(), "D64", CPU) == HUGE
    assert config_for(kernel(), "D64", CPU) == SMALL


def test_threads_force_configurations_apart():
    """The tuner launches the candidates of a class from several at once."""
    meet = Barrier(2, timeout=60)

    def launched(config):
        with _tuning.forced("k", config):
            meet.wait()
            found = config_for(kernel(), "D64", GPU)
            meet.wait()
            # A backward's launches come from here too, and not from autograd's own thread.
            return found, torch.autograd.is_multithreading_enabled()

    with ThreadPoolExecutor(2) as pool:
        assert [*pool.map(launched, (LARGE, HUGE))] == [(LARGE, False), (HUGE, False)]


def test_autotune_takes_the_fastest_that_fits_and_times_it_once(monkeypatch):
    monkeypatch.setenv("FASTSSL_AUTOTUNE", "1")
    timed = []
    monkeypatch.setattr(_tuning, "median_ms", lambda launch: timed.append(launch) or clock(launch))
    write_table("sm_90", SMALL)
    assert [config_for(kernel(), "D64", GPU) for _ in range(2)] == [LARGE, LARGE]
    assert len(timed) == 2
    assert config_for(kernel(), "D64", CPU) == SMALL


def test_autotune_reads_what_another_process_timed():
    assert autotune(kernel()) == LARGE
    never = lambda launch: pytest.fail("timed again")  # noqa: E731
    assert autotune(kernel(), never) == LARGE


def test_autotune_times_again_when_the_kernel_has_changed():
    autotune(kernel())
    again = lambda launch: float(launch())  # noqa: E731
    assert autotune(kernel(), again) == LARGE
    assert autotune(kernel(source="def f(): return 1"), again) == SMALL


def test_each_kernel_keeps_its_own_answer(tmp_path):
    autotune(kernel())
    autotune(kernel(source="another"))
    assert len([*tmp_path.glob(f"*/{_tuning.KEPT}")]) == 2


@pytest.mark.parametrize("content", ["{", "[]", '{"k": 1}', '{"blocks": {}}'])
def test_a_damaged_cache_is_said_and_written_anew(content, tmp_path):
    autotune(kernel())
    (path,) = tmp_path.glob(f"*/{_tuning.KEPT}")
    path.write_text(content)
    with pytest.warns(UserWarning, match="fastssl-tuned.json is damaged and will be overwritten"):
        assert autotune(kernel()) == LARGE
    assert json.loads(path.read_text())["blocks"] == LARGE.blocks


def test_a_cache_that_cannot_be_read_or_written_costs_no_run(tmp_path):
    autotune(kernel())
    (path,) = tmp_path.glob(f"*/{_tuning.KEPT}")
    path.unlink()
    path.mkdir()
    with pytest.warns(UserWarning) as said:
        assert autotune(kernel()) == LARGE
    damaged, lost = (str(one.message) for one in said)
    assert "is damaged and" in damaged and lost.startswith("the tuning is not kept: ")


def test_a_cached_answer_that_is_no_candidate_is_not_taken(tmp_path):
    autotune(kernel())
    (path,) = tmp_path.glob(f"*/{_tuning.KEPT}")
    path.write_text(path.read_text().replace('"BLOCK_M": 64', '"BLOCK_M": 4096'))
    assert autotune(kernel()) == LARGE


def test_nothing_that_fits_leaves_the_safe_configuration_and_no_trace(tmp_path):
    def too_large(config, device):
        return launches(HUGE, device)

    assert autotune(kernel(too_large)) == SMALL
    assert not [*tmp_path.glob(f"*/{_tuning.KEPT}")]


def test_a_trial_that_fails_otherwise_is_not_hidden():
    def broken(config, device):
        raise RuntimeError("illegal memory access")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        autotune(kernel(broken))


def shipped():
    path = _tuning.Path(_tuning.__file__).with_name("tuned.json")
    return json.loads(path.read_text(encoding="utf-8"))


def test_the_shipped_table_names_candidates_and_their_origin():
    known = _tuning.kernels()
    rows = [
        (kernel, arch, variant, entry)
        for kernel, archs in shipped().items()
        for arch, variants in archs.items()
        for variant, entry in variants.items()
    ]
    assert rows
    for kernel, arch, variant, entry in rows:
        assert arch.startswith("sm_")
        assert Config.read(entry) in known[kernel].variants[variant].tried(arch)
        measured = entry["measured"] != "not measured: chosen ahead of time"
        assert measured == (entry["ms"] is not None)
        assert entry["ms"] is None or 0 < entry["ms"] < math.inf


def test_every_kernel_has_safe_candidates():
    assert _tuning.kernels()
    for kernel in _tuning.kernels().values():
        for name, variant in kernel.variants.items():
            assert name == variant.name and variant.safe in variant.tried("")
            assert len(variant.candidates) == len({str(c) for c in variant.candidates})
