"""The engine's own promises, at every stage and precision, on two ranks."""

import json
import os
import sys
import time
from functools import partial
from itertools import product

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fastssl import distributed
from fastssl.engine import launch
from fastssl.engine.blocks import recompute
from fastssl.engine.config import EngineConfig, EngineError
from fastssl.engine.engine import Engine, set_tf32
from fastssl.engine.optim import OptimConfig
from fastssl.engine.verbs import Limits
from fastssl.engine.zero import ZeroConfig, deepspeed_keys, runtime_problem
from fastssl.methods import MAE, build_method
from fastssl.models import build_backbone
from fastssl.report import read_metrics
from fastssl.run.train import pretrain
from fastssl.schedules import cosine
from fastssl.tree import cut, join
from tests.engine import state_worker
from tests.ranks import run_ranks
from tests.runs import VIT, tiny, weights_of

KINDS = [(0, "fp32"), (1, "fp32"), (3, "fp32"), (0, "bf16"), (2, "bf16"), (3, "bf16")]


def method(tmp_path="."):
    torch.manual_seed(0)
    encoder = build_backbone("vit_tiny_patch16_224", shape=(1, 16, 16), kwargs=VIT)
    encoder.cls_token.requires_grad_(False)  # a frozen parameter has no master weights
    return build_method(encoder, tiny("mae", tmp_path).method)


def batch(rank=0, world=1, n=8):
    g = torch.Generator().manual_seed(5)
    images = torch.randn(n, 1, 16, 16, generator=g).chunk(world)[rank]
    index = torch.arange(n).chunk(world)[rank]
    return {"views": [images], "index": index, "seeds": index + 3}


def engine(stage, precision, **options):
    cfg = EngineConfig(
        zero_stage=stage,
        precision=precision,
        deepspeed={
            "zero_optimization": {"stage3_param_persistence_threshold": 0},
            "steps_per_print": 1000,
        },
        **options,
    )
    optim = OptimConfig(name="adamw", lr=1e-3, weight_decay=0.0)
    return Engine(method(), optim, cfg, device=torch.device("cpu"), batch_size=8)


def steps(rank, world, folder):
    """For each kind: the encoder's weights before and after a step, features, and the flags.

    Besides, what state_worker finds out.
    """
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.update(LOCAL_WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    found = {}
    with launch.session("cpu"):
        for kind in KINDS:
            e = engine(*kind)
            before = weights_of(e)
            first = e.step(batch(rank, world), 1e-4, stop=rank == world - 1)
            mine = batch(rank, world)
            if rank == 0:  # one rank's images are not finite: no rank may step
                mine["views"][0][0, 0, 0, 0] = float("nan")
            after = weights_of(e)
            second = e.step(mine, 1e-4)
            features = e.features(batch()["views"][0])
            flags = [first.finite, first.applied, first.stop, second.finite, second.applied]
            norm = first.metrics["grad_norm"].float()
            found[str(kind)] = [before, after, weights_of(e), features, flags, norm]
        found["norms"] = state_worker.norms(rank, world)
        found["halves"] = state_worker.halves(rank, world)
        found["skipped"] = state_worker.skipped(rank, world)
        found["teachers"] = state_worker.teachers(rank, world)
        found["frozen"] = state_worker.frozen(rank, world, folder)
        found["at once"] = state_worker.at_once(rank, world) if world > 1 else []
        found["moved once"] = state_worker.moved_once(rank, world)
        for name in ("ijepa", "data2vec"):
            found[f"resumed {name}"] = state_worker.resumed(rank, world, folder, name)
        # Last: DeepSpeed keeps its second copies' groups for as long as the process lives.
        found["tuned"] = state_worker.tuned(rank, world) if world > 1 else []
    return found


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folders = [str(tmp_path_factory.mktemp(f"of-{world}")) for world in (1, 2)]
    return run_ranks(steps, 1, folders[0]), run_ranks(steps, 2, folders[1])


@pytest.mark.parametrize("kind", [str(kind) for kind in KINDS])
def test_two_ranks_step_as_one(ran, kind):
    (one,), two = ran
    exact = "fp32" in kind
    for mine in (one[kind], *(rank[kind] for rank in two)):
        before, after, then, features, flags, _ = mine
        assert before.keys() == method().encoder.state_dict().keys()
        assert flags == [True, True, True, False, False]
        for name, start in method().encoder.state_dict().items():
            assert before[name].dtype == torch.float32 and before[name].shape == start.shape
            # The float32 masters: a bfloat16 copy would be off by 4e-3 relative.
            torch.testing.assert_close(before[name], start, rtol=1e-6 if exact else 4e-3, atol=1e-7)
            moved = (after[name] - before[name]).abs().max()
            assert (moved > 5e-5) == (name != "cls_token"), name
            assert torch.equal(after[name], then[name]), "a step that was not finite was applied"
            # At lr 1e-4 bfloat16 weights near 1 would not move in steps of 1e-4 at all.
            close = dict(rtol=1e-5, atol=1e-6) if exact else dict(rtol=0.05, atol=2e-4)
            torch.testing.assert_close(after[name], one[kind][1][name], **close)
        close = dict(rtol=1e-4, atol=1e-4) if exact else dict(rtol=0.05, atol=0.05)
        torch.testing.assert_close(features, one["(0, 'fp32')"][3], **close)
    norms = [mine[kind][5] for mine in (one, *two)]
    torch.testing.assert_close(
        norms, [one["(0, 'fp32')"][5]] * 3, rtol=1e-4 if exact else 0.05, atol=0
    )


# fault 3
@pytest.mark.parametrize("kind", [str(kind) for kind in state_worker.NORMED])
def test_batch_norms_of_two_ranks_are_those_of_one(ran, kind):
    (one,), two = ran
    (whole, wanted, silent), (a, b) = one["norms"][kind], (rank["norms"][kind] for rank in two)
    assert torch.equal(a[1], b[1]), "features of one image differ between ranks"
    mean = (a[0] + b[0]) / 2
    exact = "fp32" in kind
    if kind.endswith("True)"):
        torch.testing.assert_close(mean, whole, rtol=2e-5 if exact else 0.02, atol=1e-4)
        if exact:  # two steps of AdamW make bfloat16's last bits large
            torch.testing.assert_close(a[1], wanted, rtol=2e-5, atol=1e-4)
        assert torch.cosine_similarity(a[1], wanted).min() > 0.98
        assert "batch norms share their statistics over 2 processes" in a[2][0]
    else:
        assert abs(mean - whole) > 1e-3 and "sync_batchnorm=false" in a[2][0]
    assert not silent


# fault 40
def test_a_skipped_step_changes_nothing(ran):
    assert [rank["skipped"] for ranks in ran for rank in ranks] == [[]] * 3


def test_micro_batches_make_the_step_of_the_whole_batch(ran):
    _, two = ran
    for rank in two:
        assert len(rank["at once"]) == len(state_worker.LARGE)
        for state, move in rank["at once"]:
            assert state < 1e-6 and move < 2e-6


def test_a_stage_that_is_tuned_makes_the_step_of_stage_0(ran):
    """Also of an encoder that is called twice, as DeepSpeed before 0.19.8 did not at stage 2."""
    _, two = ran
    for rank in two:
        *steps, teacher = rank["tuned"]
        assert teacher < 2e-6
        for apart, (_, precision, _) in zip(steps, state_worker.TUNED, strict=True):
            assert apart < (2e-6 if precision == "fp32" else 0.02), apart


def test_accumulation_moves_the_state_once(ran):
    assert [rank["moved once"] for ranks in ran for rank in ranks] == [[8, 1]] * 3


# fault 36
@pytest.mark.parametrize("name", ["ijepa", "data2vec"])
def test_a_teacher_whose_parameters_zero_3_keeps_whole_resumes(ran, name):
    for ranks in ran:
        for rank in ranks:
            whole, again = rank[f"resumed {name}"]
            assert whole == again and len(set(whole)) == 2


# fault 39
def test_stages_have_one_loss_in_bfloat16(ran):
    for ranks in ran:
        for rank in ranks:
            assert rank["halves"][0] == rank["halves"][1]


def test_a_batch_that_does_not_divide_is_refused():
    with launch.session("cpu"), pytest.raises(EngineError, match="batch_size=8.*accumulation=3"):
        engine(1, "fp32", accumulation=3)


def test_micro_batches_are_the_batch_and_labels_go_along():
    whole = {**batch(), "streams": {"text": [torch.arange(8) % 3]}}
    with launch.session("cpu"):
        own = engine(0, "fp32", accumulation=4)
        parts = cut(whole, own._sizes(whole))
        with pytest.raises(ValueError, match=r"batch\['label'\] has 7 rows, and .* has 8"):
            own.step({**whole, "label": torch.zeros(7)}, 1e-3)
    assert [len(part["index"]) for part in parts] == [2] * 4
    torch.testing.assert_close(join(parts), whole, rtol=0, atol=0)


@pytest.mark.parametrize("stage, precision", [(0, "fp32"), (3, "fp32"), (1, "bf16")])
def test_lower_layers_move_less(stage, precision):
    moved = []
    cut = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    cfg = EngineConfig(zero_stage=stage, precision=precision, deepspeed=cut)
    with launch.session("cpu"):
        for decay in (1.0, 0.5):
            optim = OptimConfig(name="momentum", momentum=0.0, weight_decay=0, layer_decay=decay)
            e = Engine(method(), optim, cfg, device=torch.device("cpu"), batch_size=8)
            before = weights_of(e)
            e.step(batch(), 1e-2)
            after = weights_of(e)
            moved.append({n: (after[n] - before[n]).norm() for n in before})
    for layer, scale in {
        "blocks.1.mlp.fc1": 1.0,
        "blocks.0.mlp.fc1": 0.5,
        "patch_embed.proj": 0.25,
    }.items():
        share = moved[1][f"{layer}.weight"] / moved[0][f"{layer}.weight"]
        torch.testing.assert_close(share.item(), scale, rtol=1e-3, atol=0)


def test_a_clip_is_the_same_at_every_stage():
    """At stage 0 in float32 it is ours; by half of the norm, which stays what it was."""
    found = []
    with launch.session("cpu"):
        for stage in (0, 1):
            optim = OptimConfig(name="momentum", momentum=0.0, weight_decay=0, clip=0.5)
            cfg = EngineConfig(zero_stage=stage)
            e = Engine(method(), optim, cfg, device=torch.device("cpu"), batch_size=8)
            before = torch.cat([p.flatten() for p in weights_of(e).values()])
            norm = e.step(batch(), 1.0).metrics["grad_norm"].float()
            after = torch.cat([p.flatten() for p in weights_of(e).values()])
            found.append([norm, after - before])
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)
    assert found[0][0] > 1


@pytest.mark.parametrize("out", [{}, torch.zeros(()), {"loss": torch.zeros(3)}], ids=str)
def test_a_method_without_a_loss_is_named(out, monkeypatch):
    monkeypatch.setattr(MAE, "loss", lambda *args: out)
    with launch.session("cpu"), pytest.raises(EngineError, match="MAE.loss must return {'loss': "):
        engine(0, "fp32").step(batch(), 1e-3)


def test_activation_checkpointing_changes_nothing_but_memory():
    """Decoders among them; selective multiplies no matrix twice."""
    results = []
    with launch.session("cpu"):
        for how in (False, True, "selective"):
            e = engine(1, "fp32", activation_checkpointing=how)
            kept = []

            def keep(x, kept=kept):
                kept.append(x.nbytes)
                return x

            if how != "selective":  # which keeps its own apart
                with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
                    e.ds(batch())
            with FlopCounterMode(display=False) as counter:
                e.step(batch(), 1e-3)
            results.append((sum(kept), weights_of(e), counter.get_total_flops()))
    (plain, a, least), (lean, b, most), (_, c, again) = results
    for other in (b, c):
        torch.testing.assert_close(a, other, rtol=1e-5, atol=1e-6)
    assert lean < 0.45 * plain and least == again < most


def test_a_steps_time_is_told_by_part(monkeypatch):
    loss, on_step = MAE.loss, MAE.on_step
    monkeypatch.setattr(MAE, "loss", lambda *a: (time.sleep(0.2), loss(*a))[1])
    monkeypatch.setattr(MAE, "on_step", lambda *a: (time.sleep(0.1), on_step(*a))[1])
    with launch.session("cpu"):
        e = engine(1, "fp32")
        e.step(batch(), 1e-3)
        assert e.breakdown() == {}
        e.measure()
        since = time.perf_counter()
        e.step(batch(), 1e-3)
        spent, took = e.breakdown(), time.perf_counter() - since
        time.sleep(0.3)  # between two steps
        e.step(batch(), 1e-3)
        again = e.breakdown()
    parts = {"encode", "loss", "backward", "reduction", "optimizer", "on_step", "other"}
    assert spent.keys() == again.keys() == parts
    assert 0.9 * took < sum(spent.values()) <= took
    assert spent["loss"] > 0.2 and spent["on_step"] > 0.1 and min(spent.values()) > 0
    assert spent["other"] < 0.2 and again["other"] < 0.3


class Waits(TorchDispatchMode):
    """Counts what would wait for a GPU: numbers read, shapes that depend on values."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        self.count += name in ("_local_scalar_dense", "nonzero", "masked_select", "equal")
        return func(*args, **(kwargs or {}))


def test_the_host_waits_once_a_step(monkeypatch):
    """For the norm of the gradients; in bfloat16 DeepSpeed asks more often."""
    found = {}
    with launch.session("cpu"):
        for stage, precision in product(range(4), ("fp32", "bf16")):
            e = engine(stage, precision)
            for _ in range(2):  # stage 3 learns in which order it fetches
                e.step(batch(), 1e-3)
            for module in [*sys.modules.values()]:  # checks that read values on a CPU alone
                if "can_read_values" in vars(module):
                    monkeypatch.setattr(module, "can_read_values", lambda *_: False)
            with Waits() as waits:
                step = e.step(batch(), 1e-3)
            assert step.applied and isinstance(step.metrics["grad_norm"], torch.Tensor)
            found[stage, precision] = waits.count
    assert [found[stage, "fp32"] for stage in range(4)] == [1, 1, 1, 1]
    assert [found[stage, "bf16"] for stage in range(4)] == [6, 2, 2, 1]


def test_what_cannot_be_recomputed_is_told():
    resnet = build_backbone("test_resnet", shape=(1, 32, 32), kwargs={})
    normed = build_method(resnet, tiny("simclr", ".").method)
    recompute(normed, EngineConfig(activation_checkpointing=True))  # as timm does
    assert resnet.grad_checkpointing
    with pytest.raises(EngineError, match="activation_checkpointing=selective, which ResNet does"):
        recompute(normed, EngineConfig(activation_checkpointing="selective"))


def test_channels_last_changes_no_number():
    images, found = state_worker.batch(0, 1, 2, 32), []
    with launch.session("cpu"):
        for stage, on in [(0, False), *((stage, True) for stage in range(4))]:
            cfg = {"zero_stage": stage, "channels_last": on, "deepspeed": state_worker.CUT}
            e = state_worker.engine("simclr", "test_resnet", 8, **cfg)
            norms = [m for m in e.method.encoder.modules() if "BatchNorm" in type(m).__name__]
            seen: list[torch.Tensor] = []
            for norm in norms[1:]:  # the first convolution's one channel lies both ways
                norm.register_forward_pre_hook(lambda _, given, seen=seen: seen.append(given[0]))
            losses = [e.step(images, 1e-2).metrics["loss"] for _ in range(2)]
            innermost = [x.stride(1) == 1 for x in seen if x.shape[-1] > 1]
            assert len(innermost) > 10 and set(innermost) == {on}
            found.append([*losses, *weights_of(e).values()])
        with pytest.raises(EngineError, match="there are none here but those that cut patches"):
            engine(1, "fp32", channels_last=True)
    for other in found[1:]:
        torch.testing.assert_close(found[0], other, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # dynamo looks at all of a tensor
@pytest.mark.parametrize("stage, again", [(1, False), (3, True)])
def test_blocks_compile_without_a_break_and_change_nothing(stage, again, monkeypatch):
    whole = partial(torch.compile, fullgraph=True, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", whole)
    states, notes = [], []
    with launch.session("cpu"):
        for on in (False, True):
            torch._dynamo.reset()
            e = engine(stage, "fp32", compile=on, activation_checkpointing=again)
            for _ in range(2):
                e.step(batch(), 1e-3)
            e.features(batch()["views"][0])
            states.append(weights_of(e))
            notes += [note for note in e.notes if "compile" in note]
    torch.testing.assert_close(states[0], states[1], rtol=1e-5, atol=1e-6)
    assert notes == ["engine.compile: 3 blocks, each by itself"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_parameters_that_deepspeed_joins_at_stage_0_are_refused(monkeypatch):
    monkeypatch.setattr("deepspeed.runtime.engine.FusedAdam", torch.optim.AdamW)
    with launch.session("cpu"), pytest.raises(EngineError, match="take engine.zero_stage=1"):
        engine(0, "bf16")


def test_compiled_blocks_of_stage_3_are_whole():
    with pytest.raises(ValueError, match="compile=True at engine.zero_stage=3 .*leaf_blocks=False"):
        EngineConfig(zero_stage=3, compile=True, zero={"leaf_blocks": False})


def test_tf32_is_set_where_there_is_any(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", torch.backends.cudnn.allow_tf32)
    set_to = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", set_to.append)
    for wanted in (True, False):
        set_tf32(wanted, torch.device("cuda"))
        assert torch.backends.cudnn.allow_tf32 is wanted
    set_tf32(None, torch.device("cpu"))
    assert set_to == ["high", "highest"]
    with pytest.raises(EngineError, match="engine.tf32=True is for CUDA, .* on cpu"):
        set_tf32(True, torch.device("cpu"))


def test_a_teacher_that_is_cut_is_read_whole(ran):
    (one,), (first, second) = ran
    torch.testing.assert_close(first["teachers"], one["teachers"], rtol=1e-4, atol=1e-6)
    before, teacher, student = first["teachers"]
    assert student.keys() == teacher.keys() == method().encoder.state_dict().keys()
    m = cosine(0.1, 0.99, 1.0)
    wanted = {k: m * before[k] + (1 - m) * student[k] for k in before}
    torch.testing.assert_close(teacher, wanted, rtol=1e-6, atol=1e-7)
    moved = [(teacher[k] - before[k]).abs().max() > 1e-5 for k in student]
    assert sum(moved) > len(moved) / 2
    torch.testing.assert_close(second["teachers"], first["teachers"], rtol=0, atol=0)


def test_a_frozen_encoder_moves_in_nothing_and_is_in_no_checkpoint(ran):
    for ranks in ran:
        for kind, (moved, files, saved, whole, parted) in ranks[0]["frozen"].items():
            assert (moved, files, saved) == ([], [], []), kind
            assert whole == parted and len(set(whole)) == 2, kind


def test_what_modules_share_has_both_names():
    """As the convolutions of timm's coat_tiny, whose runs could not be saved."""
    with launch.session("cpu"):
        e = engine(1, "fp32")
        encoder = e.method.encoder
        encoder.twin = next(m for m in encoder.modules() if isinstance(m, nn.Linear))
        assert weights_of(e).keys() == encoder.state_dict().keys()


def test_raw_deepspeed_keys_are_merged_last():
    with launch.session("cpu"):
        config = [engine(stage, "fp32").ds.config for stage in (2, 3)]
        assert config[0]["steps_per_print"] == 1000  # in the place of the engine's own
        zero = [c["zero_optimization"] for c in config]
        raw = {"stage3_param_persistence_threshold": 0}
        trained = sum(p.numel() for p in method().parameters() if p.requires_grad)
        own = {"overlap_comm": False, "reduce_bucket_size": trained}
        assert zero[0] == {"stage": 2, **own, **raw}
        own |= {"memory_efficient_linear": False, "sub_group_size": 10**8}  # fault 39
        assert zero[1] == {"stage": 3, **own, **raw}


# fault 40
def test_a_skipped_step_of_one_process_changes_no_buffer():
    with launch.session("cpu"):
        assert state_worker.skipped(0, 1) == []


# fault 3
def test_micro_batches_of_one_image_need_joined_norms(monkeypatch):
    class Stub:
        cfg, notes = EngineConfig(sync_batchnorm=False), []

    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    normed = build_method(
        build_backbone("test_resnet", shape=(1, 32, 32), kwargs={}), tiny("simclr", ".").method
    )
    with pytest.raises(EngineError, match="sync_batchnorm=false, but .*micro-batches of one"):
        Engine._join_batch_norms(Stub, normed, 1)
    Engine._join_batch_norms(Stub, normed, 2)
    Engine._join_batch_norms(Stub, method(), 1)
    assert len(Stub.notes) == 1 and "each of 2 processes" in Stub.notes[0]


# fault 12
@pytest.mark.parametrize(
    "given, refusal",
    [
        ({"gradient_accumulation_steps": 2}, "use engine.accumulation"),
        ({"fp16": {"enabled": True}}, "use engine.precision"),
        ({"optimizer": {"type": "Adam"}}, "use optim"),
        ({"scheduler": {"type": "WarmupLR"}}, "use optim.schedule"),
        ({"train_micro_batch_size_per_gpu": 2}, "use batch_size"),
        ({"compile": {"deepcompile": True}}, "use engine.compile .DeepCompile is not served"),
        ({"zero_optimizaton": {}}, "did you mean zero_optimization"),
        ({"zero_optimization": 3}, "must be a section"),
        ({"zero_optimization": {"stage": 2}}, "use engine.zero_stage"),
    ],
)
def test_deepspeed_keys_of_the_runs_own_or_unknown_are_refused(given, refusal):
    with pytest.raises(ValueError, match=f"engine.deepspeed.{next(iter(given))}.*{refusal}"):
        EngineConfig(deepspeed=given)


# fault 12
def test_a_misspelt_key_within_a_deepspeed_section_is_refused():
    cfg = EngineConfig(deepspeed={"zero_optimization": {"overlap_com": True}})
    with launch.session("cpu"), pytest.raises(EngineError, match="did you mean overlap_comm"):
        Engine(method(), OptimConfig(), cfg, device=torch.device("cpu"), batch_size=8)


def keys(zero, stage=3, **how):
    how = {"cuda": False, "world": 1, "parts": 1, **how}
    return deepspeed_keys(ZeroConfig(**zero), stage, 10**8, **how)


def test_what_zero_is_told_reaches_deepspeed():
    """As DeepSpeed itself reads it."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    given = {"offload_optimizer": "cpu", "offload_parameters": "cpu"}
    given |= {"overlap_comm": True, "reduce_bucket": 11, "prefetch_bucket": 12, "partition_size": 2}
    given |= {"persistence_threshold": 13, "max_live_parameters": 14}
    given |= {"quantized_weights": True, "quantized_gradients": True}
    made = DeepSpeedZeroConfig(**keys(given)["zero_optimization"])
    assert (made.offload_optimizer.device, made.offload_param.device) == ("cpu", "cpu")
    assert made.overlap_comm and made.zero_quantized_weights and made.zero_quantized_gradients
    numbers = made.reduce_bucket_size, made.prefetch_bucket_size, made.param_persistence_threshold
    numbers += made.max_live_parameters, made.max_reuse_distance, made.zero_hpz_partition_size
    assert numbers == (11, 12, 13, 14, 14, 2)
    assert "stage3_max_reuse_distance" not in keys({})["zero_optimization"]
    bf16 = keys({"bf16_masters": True, "allgather_bucket": 15, "accumulation_dtype": "bf16"}, 2)
    assert DeepSpeedZeroConfig(**bf16["zero_optimization"]).allgather_bucket_size == 15
    assert bf16["bf16"] == {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    assert bf16["data_types"] == {"grad_accum_dtype": "bf16"}


@pytest.mark.parametrize(
    "stage, how, overlap, bucket",
    [
        (1, {}, False, 10**8),
        (2, {"cuda": True}, False, 10**8),
        (1, {"cuda": True, "world": 2}, True, 25_000_000),
        (1, {"cuda": True, "world": 2, "parts": 2}, False, 10**8),
        (2, {"cuda": True, "world": 2, "parts": 2}, True, 25_000_000),
    ],
)
def test_buckets_fit_the_model(stage, how, overlap, bucket):
    zero = keys({}, stage, **how)["zero_optimization"]
    assert (zero["overlap_comm"], zero["reduce_bucket_size"]) == (overlap, bucket)


@pytest.mark.parametrize(
    "given, refusal",
    [
        ({"zero": {"offload_parameters": "cpu"}}, "parameters=cpu means nothing at .*=1: .* 3"),
        ({"zero_stage": 3, "zero": {"allgather_bucket": 5}}, "bucket=5 .*=3: leave .* 1 or 2"),
        ({"zero_stage": 0, "zero": {"overlap_comm": False}}, "overlap_comm=False .*=0"),
        ({"zero": {"bf16_masters": True}}, "bf16_masters=True is for engine.precision=bf16"),
        (
            {"zero": {"bf16_masters": True, "accumulation_dtype": "fp32"}, "precision": "bf16"},
            "accumulation_dtype=fp32 contradict",
        ),
        (
            {"zero": {"bf16_masters": True, "offload_optimizer": "cpu"}, "precision": "bf16"},
            "offload_optimizer=cpu exclude",
        ),
        (
            {
                "zero": {"reduce_bucket": 5},
                "deepspeed": {"zero_optimization": {"reduce_bucket_size": 6}},
            },
            "reduce_bucket=5 and engine.deepspeed.zero_optimization.reduce_bucket_size=6 are given",
        ),
    ],
)
def test_keys_of_zero_without_a_use_are_refused(given, refusal):
    with pytest.raises(ValueError, match=f"engine.zero.*{refusal}"):
        EngineConfig(**given)


@pytest.mark.parametrize("given", [{"quantized_weights": True}, {"partition_size": 2}])
def test_what_the_machine_cannot_do_is_told(given):
    key, value = next(iter(given.items()))
    problem = runtime_problem(ZeroConfig(**given), torch.device("cpu"), 3)
    assert problem.startswith(f"engine.zero.{key}={value} ")
    assert not runtime_problem(ZeroConfig(**given), torch.device("cuda"), 4)


def test_a_deepspeed_with_wrong_gradients_is_refused():
    launch.check_version("0.20.0+cu130")
    with pytest.raises(EngineError, match="deepspeed 0.19.7 .*pip install 'deepspeed>=0.19.8'"):
        launch.check_version("0.19.7")


# fault 17
@pytest.mark.parametrize("key", ["lr", "weight_decay", "clip", "eps", "betas"])
def test_numbers_that_are_not_finite_are_refused(key):
    value = (0.9, float("nan")) if key == "betas" else float("inf")
    with pytest.raises(ValueError, match="finite"):
        OptimConfig(**{key: value})


def test_half_of_a_launchers_environment_is_refused(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_PORT", raising=False)
    refusal = "RANK is set, but .*MASTER_PORT not: start with torchrun"
    with pytest.raises(EngineError, match=refusal), launch.session("cpu"):
        pass


@pytest.mark.parametrize("name", ["SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"])
def test_tasks_that_know_nothing_of_each_other_are_refused(name, monkeypatch):
    """Fault 23: two tasks of Slurm trained the same run twice."""
    monkeypatch.setenv(name, "2")
    with pytest.raises(EngineError, match=f"{name}=2, but .* torchrun"), launch.session("cpu"):
        pass


@pytest.mark.parametrize("kind", [(0, "fp32"), (1, "fp32"), (0, "bf16")])
def test_what_is_not_finite_moves_nothing(kind, monkeypatch):
    """An infinite loss of finite gradients, and a finite loss of infinite ones."""
    plain, spoil = MAE.loss, [lambda x: x + torch.inf, lambda x: x + (x - x.detach()).sqrt()]

    def loss(self, *args):
        self.register_buffer("queue", torch.ones(2))  # which was not there
        self.seen, self.kept = torch.ones(3), self.kept.add_(1)
        return {"loss": spoil[0](plain(self, *args)["loss"])}

    monkeypatch.setattr(MAE, "loss", loss)
    with launch.session("cpu"):
        e = engine(*kind, on_nonfinite="skip")
        e.method.register_buffer("seen", None)
        e.method.register_buffer("kept", torch.zeros(1))
        before = weights_of(e)
        while spoil:
            step = e.step(batch(), 1e-3)
            assert (step.finite, step.applied) == (False, False)
            torch.testing.assert_close(weights_of(e), before, rtol=0, atol=0)
            assert not hasattr(e.method, "queue") and e.method.seen is None and e.method.kept == 0
            del spoil[0]


def test_to_evaluate_gathers_a_block_at_a_time():
    with launch.session("cpu"):
        one, cut = (engine(stage, "fp32") for stage in (0, 3))
        for _ in range(3):  # then DeepSpeed knows the order of a step
            one.step(batch(), 1e-3), cut.step(batch(), 1e-3)
        first, *_, last = cut.method.encoder.blocks
        held: list[int] = []
        last.register_forward_hook(
            lambda *_: held.append(sum(p.numel() for p in first.parameters()))
        )
        (images,), seeds = batch()["views"], batch()["seeds"]
        torch.testing.assert_close(cut.features(images), one.features(images))
        torch.testing.assert_close(cut.reconstruct(images, seeds), one.reconstruct(images, seeds))
        assert held == [0, 0] and not any(p.numel() for p in cut.method.parameters())


@pytest.mark.parametrize("kind", [(0, "fp32"), (1, "fp32"), (3, "fp32"), (0, "bf16"), (2, "bf16")])
def test_what_is_above_a_limit_moves_nothing(kind):
    none = Limits(float("inf"), float("inf"))
    with launch.session("cpu"):
        e = engine(*kind)
        first = e.step(batch(), 0.0, limits=none)
        before = weights_of(e)
        for limits in (
            none._replace(loss=first.loss * 0.99),
            none._replace(norm=first.norm * 0.99),
        ):
            step = e.step(batch(), 1e-3, limits=limits)
            assert (step.finite, step.spike, step.applied) == (True, True, False)
            assert step.loss == pytest.approx(first.loss)
            assert (step.norm is None) == (limits.norm == none.norm)
            torch.testing.assert_close(weights_of(e), before, rtol=0, atol=0)
        step = e.step(batch(), 1e-3, limits=Limits(first.loss * 1.01, first.norm * 1.01))
        assert (step.finite, step.spike, step.applied) == (True, False, True)
        assert step.norm == pytest.approx(first.norm, rel=0.01)
        assert not weights_of(e)["patch_embed.proj.weight"].equal(before["patch_embed.proj.weight"])


def test_rows_have_the_breakdown_and_steps_a_trace_where_it_is_asked_for(tmp_path):
    log = {"every": 2, "tensorboard": False, "breakdown": True, "profile": True}
    cfg = tiny("mae", tmp_path, epochs=2, log=log)
    pretrain(cfg)
    events = json.loads((cfg.directory / "trace.json").read_text())["traceEvents"]
    steps = {event["name"] for event in events if event["name"].startswith("ProfilerStep")}
    assert steps == {f"ProfilerStep#{n}" for n in (3, 4, 5)}
    assert any(event["name"] == "aten::addmm" for event in events)
    rows = [row for row in read_metrics(cfg.directory / "metrics.jsonl") if row["kind"] == "train"]
    for row in rows:
        parts = {key: value for key, value in row.items() if key.startswith("time/")}
        assert len(parts) == 8 and parts["time/data"] >= 0
        step = 1e3 * cfg.batch_size / row["images_per_s"]
        assert 0.3 * step < sum(parts.values()) < 1.1 * step
