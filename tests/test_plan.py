"""The plan: against formulas by hand, against what autograd keeps, against a real step."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from fastssl.bench.measure.peaks import DATASHEETS
from fastssl.config import ConfigError, resolve
from fastssl.diagnose import hardware, replay
from fastssl.diagnose.counting import Blank, Call, Counts, Operator, Work, count
from fastssl.diagnose.hardware import GPUS, find, planned_on, with_rates
from fastssl.diagnose.memory import FIRST_STEP, Memory, Rule, Sizes, Zero, at_stage, memory
from fastssl.diagnose.plan import check_cluster, make_plan, remedies, weak_scaling
from fastssl.diagnose.speed import ALPHA, KERNEL, Cluster, speed, traffic, work_seconds
from fastssl.methods.base import PARAMETERS
from fastssl.run.build import build
from tests.runs import tiny
from tests.test_cli import call

H200 = GPUS["h200"]
ADAMW = Rule(states=8, one=8, many=12, whole=False, moved=84, calls=14)
MILLION = 10**6


def counted(cfg, world=1, **kind):
    with torch.device("meta"):
        method = build(cfg, 1)
    return count(method, cfg, 1, world, **kind)


@pytest.mark.parametrize("method", ["simclr", "mocov3", "mae", "gmml", "cropmae"])
def test_activations_are_what_autograd_keeps(method, tmp_path):
    cfg = tiny(method, tmp_path, batch_size=64, model__kwargs__depth=1)
    found = counted(cfg)
    real, kept, alive = build(cfg, 1), {}, []
    own = {p.untyped_storage().data_ptr() for p in real.parameters()}
    views = [torch.randn(64, 1, 16, 16) for _ in cfg.views().crops]
    own |= {view.untyped_storage().data_ptr() for view in views}

    def keep(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(x)
        return x

    each = torch.arange(64)
    batch = {"views": views, "index": each, "seeds": each, "label": each % 10}
    batch["params"] = [torch.ones(64, len(PARAMETERS)) for _ in views]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        real(real.prepare(batch), "encode")
    assert found.kept == pytest.approx(sum(kept.values()), rel=0.1)
    # All gradients are there at the end of backward, and before that what the encoder keeps.
    grads = 4 * sum(p.numel() for p in real.parameters() if p.requires_grad)
    assert max(found.kept, grads) <= found.backward <= 1.3 * found.kept + found.heads + grads


def test_operations_are_those_of_a_transformer_by_hand(tmp_path):
    """Two views of 12 images, 16 patches of 16 values and a class token, width 32, two blocks."""
    found = counted(tiny("simclr", tmp_path, batch_size=12))
    tokens, width, images = 17, 32, 2 * 12
    patches = 2 * 16 * 16 * width
    block = 2 * tokens * width * (3 * width + width + 2 * 4 * width) + 4 * tokens**2 * width
    assert found.encode.flops == images * (patches + 2 * block)
    # Backward: two products for each one, but for the pixels' gradient; attention five for two.
    attention = 4 * tokens**2 * width
    back = patches + 2 * (2 * (block - attention) + 2.5 * attention)
    assert found.encode_backward.flops == images * back


def test_the_loss_sees_the_rows_of_all_ranks(tmp_path):
    cfg = tiny("simclr", tmp_path, batch_size=96)
    alone, eight = counted(cfg.model_copy(update={"batch_size": 12})), counted(cfg, 8)
    assert alone.rows == eight.rows == 12 and alone.gathered == alone.loss.sent == 0
    # Both views' projections, 16 wide in float32, of 8 x 12 images
    assert eight.gathered >= 2 * 96 * 16 * 4 and eight.loss.collectives >= 1
    assert eight.loss.flops > alone.loss.flops and eight.encode.flops == alone.encode.flops


def test_of_an_exact_large_batch_the_loss_has_all_rows_and_the_encoder_a_micro_batch(tmp_path):
    cfg = tiny("simclr", tmp_path, batch_size=64, engine__accumulation=4)
    plan = make_plan(cfg, 1, Cluster(H200, 2, 1), images=1000)
    counts = plan.counts
    assert (counts.micro, counts.rows) == (8, 32)
    assert counts.rows_held == 2 * (2 * 32 * 32 * 4)  # rows and gradients, two views, 32 wide
    assert plan.speed.flops - plan.speed.useful == pytest.approx(3 * counts.encode.flops)
    plain = cfg.engine.model_copy(update={"large_batch": "plain"})
    other = make_plan(cfg.model_copy(update={"engine": plain}), 1, Cluster(H200, 2, 1), images=1)
    assert other.counts.rows == 8 and other.counts.rows_held == 0
    assert other.speed.flops == other.speed.useful and other.speed.replay == 0 < plan.speed.replay
    # Views wait on the host: those of 2,048 images would be more than all that the encoder keeps.
    many = tiny("simclr", tmp_path, batch_size=4096, engine__accumulation=512)
    kept = make_plan(many, 1, Cluster(H200, 2, 1), images=1).memory.parts["activations"][0]
    assert kept < 2 * 2048 * 16 * 16 * 4


def test_a_gpu_launches_kernels_where_a_processor_has_chunks(tmp_path):
    def calls(rows, on_gpu):
        cfg = tiny("mae", tmp_path, batch_size=rows, model__kwargs__depth=1)
        return len(counted(cfg, on_gpu=on_gpu).loss.calls)

    assert calls(64, True) == calls(4096, True) < calls(4096, False) / 2


def test_images_or_clips_need_not_be_there(tmp_path):
    words = ("--gpu", "h100", "--images", 2000)
    assert "2,000 training images" in call("plan", "videomae-clips", "batch_size=8", *words)
    with pytest.raises(ConfigError, match="--images 2000 is for plain images and clips"):
        call("plan", "signal-mae-signals", *words)


def test_what_an_optimizer_takes_is_measured(tmp_path):
    """Adam: two moments, and in the fused step nothing beside them."""
    optim = tiny("mae", tmp_path).optim
    adam = Rule.of(optim, on_cpu=True)
    assert (adam.states, adam.one, adam.whole) == (8, 0, False)
    assert Rule.of(optim, on_cpu=False).one == 0
    lars = Rule.of(optim.model_copy(update={"name": "lars", "betas": None}), on_cpu=True)
    assert lars.states == 4 and lars.whole


def by_hand(
    stage,
    *,
    world=4,
    device=H200,
    half=True,
    parts=1,
    offloads=False,
    cuts=False,
    bucket=10,
    stepped=100,
):
    """10 M parameters: 6 M trained, 3 M of a teacher, 1 M frozen; backward holds 50 MB."""
    sizes = Sizes(10 * MILLION, 6 * MILLION, MILLION, 2 * MILLION, 6 * MILLION, 30, 50)
    counts = Counts(8, 8, kept=40 * MILLION, heads=4 * MILLION, lean=45 * MILLION)
    counts.backward, counts.grads = 50 * MILLION, 2 * MILLION
    zero = Zero(stage, bucket * MILLION, stage == 3, 10**9, stepped * MILLION, offloads, cuts)
    kind = {"world": world, "half": half, "parts": parts, "inputs": MILLION, "process": 0}
    found = memory(sizes, counts, ADAMW, zero, device, **kind)
    return {name: tuple(n / MILLION for n in row) for name, row in found.parts.items()}


def test_bytes_by_hand():
    """MB on each of four ranks; buckets of 10 M elements, larger than what is trained."""
    one = by_hand(1)
    assert one["weights"][0] == 2 * 7 and one["EMA teacher"][0] == (2 + 4) * 3
    assert one["float32 masters"][0] == 4 * 6 / 4 and one["optimizer states"][0] == 8 * 6 / 4
    assert one["gradients"] == (2, 0, 0) and one["activations"] == (44, 0, 0)
    assert one["loss and gathered embeddings"] == (4, 0, 0)
    assert one["reduction buckets"] == (20, 20, 0)
    assert one["flat copy for the collective"] == (0, 12, 0)
    assert one["float32 gradient in the step"] == (0, 0, (2 + 4) * 1.5)
    assert one["optimizer's temporaries"] == (0, 0, 8 * 1.5)
    held = 14 + 18 + 6 + 12 + 1
    assert one["allocator's slack"][1] == pytest.approx(0.05 * (held + 20 + 12))

    assert by_hand(1, bucket=1)["flat copy for the collective"][1] == 2 * 2  # the largest tensor

    none = by_hand(0)
    assert none["float32 masters"][0] == 24 and none["optimizer states"][0] == 48
    assert none["gradients"] == (2, 12, 12) and "reduction buckets" not in none
    assert none["float32 gradient in the step"][2] == 24
    assert none["optimizer's temporaries"][2] == 12 * 2  # of the largest tensor
    assert by_hand(0, half=False)["weights"][0] == 4 * 7
    assert "float32 masters" not in by_hand(0, half=False)
    assert "flat copy for the collective" not in by_hand(0, world=1)

    three = by_hand(3, cuts=True)
    assert three["weights"][0] == 2 * 7 / 4 and three["EMA teacher"][0] == 6 * 3 / 4
    assert three["gathered parameters"] == (20, 20, 0)
    assert three["gradients, this rank's piece"][0] == 2 * 6 / 4
    assert three["activations"][0] == 45 - 4 and "gradients" not in three
    assert three["float32 gradient in the step"][2] == 4 * 1.5  # its flat copy is let go before
    parts = by_hand(3, cuts=True, stepped=0.5)  # and the piece of the largest tensor
    assert parts["float32 gradient in the step"][2] == 4
    assert parts["optimizer's temporaries"][2] == 8 * 1.0

    off = by_hand(1, offloads=True)
    assert "optimizer states" not in off and "optimizer's temporaries" not in off
    assert by_hand(1, parts=4)["gradients"][0] == 12  # of the micro-batches before
    cpu = by_hand(1, device=replace(H200, on_cpu=True))  # malloc keeps what is let go
    assert cpu["reduction buckets"][0] == 12 and cpu["activations"][1] == 41
    assert cpu["gradients"] == (12, 12, 12) and "CUDA and NCCL" not in cpu


def test_more_is_cut_at_each_stage(tmp_path):
    cfg = tiny("mocov3", tmp_path)
    plan = make_plan(cfg, 1, Cluster(H200, 4, 1), images=1000)
    big = replace(plan.sizes, parameters=3 * 10**9, trained=2 * 10**9, frozen=0, largest=10**7)
    kind = {"world": 8, "half": True, "parts": 1, "inputs": 0, "process": 0}
    peaks = [
        memory(big, plan.counts, ADAMW, at_stage(plan.zero, stage, False), H200, **kind).peak
        for stage in range(4)
    ]
    assert peaks == sorted(peaks, reverse=True) and peaks[3] < 0.5 * peaks[0]
    assert Memory({"a": (1, 5, 2), "b": (3, 1, 1)}).moment == "reduce"


def test_seconds_by_hand():
    device = with_rates(H200, 0.5, nic=25)
    work = Work([Call(989.5e9, 0), Call(0, 48 * 10**8), Call(1, 1)])
    assert work_seconds(work, device, "bf16") == pytest.approx(2e-3 + 2e-3 + KERNEL)
    assert work_seconds(work, device, "fp32") > 10 * 2e-3  # no TF32
    node, eight = Cluster(device, 8, 1), Cluster(device, 64, 8)
    assert node.bus == pytest.approx(0.8 * 450e9) and eight.bus == pytest.approx(0.8 * 200e9)
    assert Cluster(device, 8, 8).bus == pytest.approx(0.8 * 25e9)
    assert eight.seconds(64e9, 1) == pytest.approx(63e9 / 160e9 + 6 * ALPHA)
    assert Cluster(device, 1, 1).seconds(1e9, 5) == 0


def test_seconds_of_a_processor_are_those_measured():
    device = replace(H200, on_cpu=True, fp32=1e9, cached=1e9, efficiency=1, launch=1e-3)
    timed = Call(1e9, 0, seconds=5e-3), Call(1e9, 0, seconds=1e-4)  # and one that does nothing
    assert work_seconds(Work([*timed]), device, "fp32") == pytest.approx(5e-3 + 1e-3)
    assert work_seconds(Work([Call(2e6, 0)]), device, "fp32") == pytest.approx(2e-3 + 1e-3)


def test_each_kind_of_operator_is_run_once(monkeypatch):
    shapes = Blank((4, 3), (0, 1), torch.float32), Blank((2, 3), (3, 1), torch.bool)
    made = [replay._filled(blank) for blank in shapes]
    assert [Blank((*x.shape,), x.stride(), x.dtype) for x in made] == [*shapes]
    add, draw = (Operator(f, (made[0].dtype,), {}) for f in (torch.add, torch.multinomial))
    works = [Work([Call(1, 1, operator=add)] * 3), Work([Call(1, 1, operator=draw), Call(1, 1)])]
    seen = []
    monkeypatch.setattr(replay, "_known", {})
    monkeypatch.setattr(replay, "alone", lambda op: seen.append(op) or 7.0 * len(seen))
    replay.measure(works, lambda call: 1.0)
    assert seen == [add, draw] * 2  # the kind that takes most first, and the least of two passes
    assert [call.seconds for work in works for call in work.calls] == [7, 7, 7, 14, 0]
    monkeypatch.undo()
    ones = Blank((8,), (1,), torch.float32)
    assert replay.alone(Operator(torch.ops.aten.mul.Tensor, (ones, ones), {})) > 0
    assert replay.alone(Operator(torch.ops.aten.mm.default, (ones, ones), {})) == 0


def test_a_run_is_planned_where_it_would_be(monkeypatch):
    monkeypatch.setattr(hardware, "own", lambda *_: H200)
    monkeypatch.setattr(hardware, "find", lambda name, *_: name)
    assert planned_on(None, "auto", "fp32") is H200
    assert (planned_on(None, "cpu", "fp32"), planned_on("l4", "cpu", "fp32")) == ("cpu", "l4")


def test_traffic_and_overlap_by_hand():
    sizes = Sizes(5 * MILLION, 4 * MILLION, 0, MILLION, MILLION, 10, 20)
    work = Work([Call(1e12, 0)])
    counts = Counts(8, 8, encode=work, encode_backward=Work([Call(2e12, 0)]))
    kind = {"precision": "bf16", "parts": 2, "recompute": 0.0, "fresh": 0}
    cluster, seconds, moved = Cluster(H200, 8, 1), {}, {}
    for stage in range(4):
        zero = Zero(stage, MILLION, stage == 3, 10**9, 10**8, False, stage >= 2)
        moved[stage] = traffic(sizes, counts, zero, 8, 2, 2)
        seconds[stage] = speed(sizes, counts, ADAMW, zero, cluster, **kind)
    # MB: two passes over 8 MB of gradients; at stages 2 and 3 for each of two micro-batches
    assert [moved[s].gradients / MILLION for s in range(4)] == [16, 16, 32, 16]
    assert [moved[s].parameters / MILLION for s in range(4)] == [0, 8, 8, 2 * 2 * 10]
    assert moved[1].collectives == 4 + 2 and moved[2].collectives == 8 + 2
    one = seconds[1]
    assert one.compute == pytest.approx(2 * 3e12 / (0.5 * 989.5e12)) and one.hidden == 0
    assert one.reduce == pytest.approx(16e6 * 7 / 8 / 360e9 + 6 * 3 * ALPHA)
    assert one.step == pytest.approx(one.compute + one.reduce + one.gather + one.update)
    assert seconds[3].hidden == pytest.approx(seconds[3].reduce + seconds[3].gather)
    assert one.update == pytest.approx(((84 + 16) * 0.5e6 + 8 * 4e6) / (0.5 * 4.8e12))
    assert one.host == pytest.approx(20 * 8e-5 + (4 + 14) * H200.launch) and one.host < one.step
    assert replace(one, host=1.0).step == 1.0


def test_gpus_are_as_their_makers_state():
    """The benchmark's datasheets are read from the same sources."""
    for name, sheet in (("h200", "H200"), ("h100", "H100 80GB HBM3"), ("l40s", "L40S")):
        device, told = GPUS[name], DATASHEETS[sheet]
        assert device.hbm == pytest.approx(1e9 * told.gbs)
        assert device.bf16 == pytest.approx(1e12 * told.tflops["bfloat16"])
        assert device.tf32 == pytest.approx(1e12 * told.tflops["tf32"])
        assert device.fp32 == pytest.approx(1e12 * told.tflops["float32"])


def test_what_would_make_it_fit_and_weak_scaling(tmp_path):
    cfg = tiny("simclr", tmp_path, batch_size=64)
    small = replace(H200, memory=1.0)
    plan = make_plan(cfg, 1, Cluster(small, 8, 4), images=640)
    found = {remedy.keys: remedy for remedy in remedies(plan, 1)}
    assert not plan.fits and not any(remedy.fits for remedy in found.values())
    assert {"engine.precision=bf16", "engine.activation_checkpointing=true"} <= {*found}
    assert found["engine.accumulation=2"].saves > 0
    one, eight = weak_scaling(plan, 1, [1, 8])
    assert (one.cfg.batch_size, eight.cfg.batch_size) == (8, 64)
    assert (eight.cluster.nodes, one.cluster.nodes) == (4, 1)
    assert one.images_per_s > eight.images_per_s / 8


def test_the_command_and_its_file(tmp_path):
    file = tmp_path / "plan.json"
    words = ("--gpus", 4, "--nodes", 2, "--gpu", "a100-80", "--images", 50_000, "--json", file)
    out = call("plan", "mae-digits", "data.source.name=folder", "data.source.path=/none", *words)
    found = json.loads(file.read_text())
    assert "it fits" in out and "50,000 training images" in out and "4 x a100-80" in out
    memory, seconds = found["memory"], found["seconds"]
    totals = [sum(row[m] for row in memory["parts"].values()) for m in ("backward", "update")]
    assert max(totals) <= memory["peak"] and memory["capacity"] == 80e9
    batch = found["images_per_s"] * seconds["step"]
    assert found["gpu_hours"] == pytest.approx(found["steps"] * seconds["step"] * 4 / 3600)
    assert found["steps"] % (50_000 // round(batch)) == 0


@pytest.mark.parametrize(
    "words, said",
    [
        (["--gpu", "h20"], "--gpu h20 is not known"),
        (["--gpus", "6", "--nodes", "4"], "--gpus 6 does not divide among --nodes 4"),
        (["--gpus", "7"], "batch_size=128 does not divide into --gpus 7"),
        (["--gpus", "0"], "--gpus 0 must be at least 1"),
        (["--images", "100"], "--images 100 are fewer than batch_size=128"),
        (["--efficiency", "60"], "--efficiency 60.0 must lie in"),
        (["--nic", "0"], "--nic 0.0 must be more than 0"),
    ],
)
def test_refusals(words, said):
    with pytest.raises(ConfigError, match=said):
        call("plan", "mae-digits", "batch_size=128", "--gpu", "h100", *words)


def test_a_batch_that_micro_batches_do_not_divide(tmp_path):
    cfg = tiny("mae", tmp_path, batch_size=24, engine__accumulation=3)
    with pytest.raises(ConfigError, match=r"--gpus 3 x engine.accumulation=3"):
        check_cluster(cfg, Cluster(H200, 3, 1))


# fault 24
def test_a_real_step_takes_what_was_planned():
    """Of a ViT-S and one process: its peak beyond that process; and what it calls was timed."""
    keys = ["name=x", "device=cpu", "batch_size=8", "model.name=vit_small_patch16_224"]
    keys += ["model.kwargs={patch_size: 8}"]
    command = [sys.executable, "-m", "fastssl.diagnose.measured", "mae-digits", *keys]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = json.loads(run.stdout.splitlines()[-1])
    cfg = resolve("mae-digits", keys)
    plan = make_plan(cfg, 1, Cluster(find("cpu", "fp32", 1), 1, 1), images=1000)
    own = plan.memory.peak - plan.memory.parts["process"][0] + FIRST_STEP
    assert own == pytest.approx(found["peak"] - found["before"], rel=0.2)
    calls = [call for work in plan.counts.works for call in work.calls]
    assert sum(call.seconds > 0 for call in calls) > 0.95 * len(calls)
