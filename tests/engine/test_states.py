"""A state is the same to the last bit wherever it is taken up."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastssl.engine import launch
from fastssl.engine.config import EngineConfig, EngineError
from fastssl.engine.shards import Shards, key_of, packed, tree_of, unpacked, write_shard
from fastssl.engine.states import check_offloaded
from fastssl.losses import TiCoLoss
from fastssl.losses.queue import Queue
from fastssl.models import DirectPred
from tests.engine import clip_worker
from tests.engine.move_worker import CHAINS, worker
from tests.ranks import run_ranks
from tests.runs import saved_state

WORLDS = (1, 2, 1)


@pytest.fixture(scope="module")
def moved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("moved")
    return folder, [run_ranks(worker, w, str(folder), leg) for leg, w in enumerate(WORLDS)]


@pytest.mark.parametrize("leg", [1, 2])
@pytest.mark.parametrize("number", range(len(CHAINS)), ids=lambda n: CHAINS[n][0][0])
def test_a_state_moves_between_world_sizes_stages_and_precisions(moved, number, leg):
    folder, legs = moved
    paths = [Path(folder) / f"left-{leg - 1}-{number}", Path(folder) / f"taken-{leg}-{number}"]
    before, after = map(saved_state, paths)
    masters = legs[leg - 1][0][number]["left"]
    for rank in legs[leg]:
        assert rank[number]["taken"].keys() == masters.keys()
        for name, master in masters.items():
            torch.testing.assert_close(rank[number]["taken"][name], master, rtol=0, atol=0)
            torch.testing.assert_close(before[f"{name}|parameter"], master.flatten())
        for name, weight in rank[number]["weights"].items():  # that the forward pass reads
            assert torch.equal(after[f"{name}|parameter"].to(weight), weight.flatten()), name
    assert before.keys() == after.keys() and any("|optimizer." in name for name in before)
    for name, value in before.items():
        of, _, field = name.partition("|")
        wide = of in masters or of.startswith("teacher.model") and field == "parameter"
        assert not wide or after[name].dtype == value.dtype == torch.float32
        # What has no master is rounded where its dtype is another one.
        assert torch.equal(after[name], value.to(after[name])), name
    trees = [tree_of(path / "state-0.safetensors") for path in paths]
    for tree in trees:
        tree["groups"] = [[sorted(names), options] for names, options in tree["groups"]]
        assert tree["counts"]["global_steps"] == 2 * leg
    assert trees[0] == trees[1]


@pytest.mark.parametrize(
    "zero, told",
    [
        ({"offload_optimizer": {"device": "nvme", "nvme_path": "/x"}}, "offload_optimizer.device"),
        ({"offload_param": {"device": "nvme", "nvme_path": "/x"}}, "offload_param.device='nvme'"),
        ({"offload_optimizer": {"device": "cpu", "ratio": 0.5}}, "offload_optimizer.ratio=0.5"),
        ({"offload_optimizer": {"device": "cpu", "super_offload": True}}, "super_offload=True"),
        ({"zenflow": {"topk_ratio": 0.1}}, "zenflow"),
    ],
)
def test_states_that_no_checkpoint_finds_are_refused(zero, told):
    with pytest.raises(EngineError, match=f"{told}.*where no checkpoint finds them"):
        check_offloaded(EngineConfig(deepspeed={"zero_optimization": zero}))


def test_ranges_are_read_from_many_files(tmp_path):
    x, kept = torch.randn(9), {}

    def keep(tensor):
        kept[len(kept)] = tensor
        return len(kept) - 1

    value = {"a": [(1, None), torch.ones(2, 3, dtype=torch.bool)], 3: torch.tensor(0.1), "b": "x"}
    tree = packed(value, keep)
    with pytest.raises(TypeError, match="keeps tensors and plain values, and no set"):
        packed([{1}], keep)
    parts = {f"{n}.safetensors": (begin, end) for n, (begin, end) in enumerate([(0, 4), (4, 9)])}
    for name, (begin, end) in parts.items():
        tensors = {key_of("x|y", "f", begin): x[begin:end], key_of("h", name, 0): x.bfloat16()}
        write_shard(tmp_path / name, tensors, tree)
    shards = Shards(tmp_path / name for name in parts)
    for begin, end in ((0, 9), (2, 6), (5, 9), (3, 3)):
        found = torch.full((end - begin,), 7.0)
        shards.fill(found, "x|y", "f", begin)
        assert torch.equal(found, x[begin:end])
    with pytest.raises(ValueError, match="x|y: no f of its elements 9 to 11"):
        shards.fill(torch.empty(4), "x|y", "f", 7)
    assert shards.dtype("h", "0.safetensors") == torch.bfloat16
    back = unpacked(tree_of(tmp_path / "1.safetensors"), kept.get)
    assert back["a"][0] == value["a"][0] and back["b"] == "x"
    torch.testing.assert_close([back["a"][1], back[3]], [value["a"][1], value[3]], rtol=0, atol=0)


def test_modules_that_look_into_a_state_see_its_buffers(tmp_path):
    """A queue and a covariance without a width until they are used, and steps that are counted."""
    with launch.session("cpu"):
        first, second = (clip_worker.engine("adamw", 0, "fp32", 1, groups=()) for _ in range(2))
        for e in (first, second):
            e.method.queue, e.method.loss_ = Queue(4), TiCoLoss()
            e.method.predictor = DirectPred(3)
        x = torch.randn(5, 3)
        first.method.queue.push(x)
        first.method.predictor.update(x)
        first.method.loss_(x, x)
        first.snapshot(copied=False)(tmp_path)
        second.load(tmp_path)
        y = torch.randn(5, 3)
        for e in (first, second):
            e.method.predictor.update(y)
        torch.testing.assert_close(
            dict(second.method.named_buffers()), dict(first.method.named_buffers())
        )


@pytest.mark.parametrize(
    "kept, buffer, told",
    [
        ({"seen": {3}}, torch.ones(1), r"Linear.get_extra_state\(\) of head: .* no set"),
        ([torch.ones(2, dtype=torch.complex64)], torch.ones(1), "of head: .* torch.complex64"),
        (None, torch.ones(2, dtype=torch.complex64), "the buffer body.0.b: .* torch.complex64"),
    ],
)
def test_what_no_file_takes_is_told_at_the_start(kept, buffer, told, monkeypatch):
    class Linear(torch.nn.Linear):
        def get_extra_state(self):
            return kept

    def linear(*sizes):
        made = Linear(*sizes) if sizes == (13, 3) else torch.nn.Linear(*sizes)
        made.register_buffer("b", buffer)
        return made

    monkeypatch.setattr(clip_worker, "nn", SimpleNamespace(**vars(torch.nn) | {"Linear": linear}))
    with launch.session("cpu"), pytest.raises(EngineError, match=told):
        clip_worker.engine("adamw", 0, "fp32", 1, groups=())


def test_a_state_of_another_model_or_optimizer_is_refused(tmp_path):
    with launch.session("cpu"):
        first = clip_worker.engine("adamw", 0, "fp32", 1, groups=())
        clip_worker.train(first, "adamw", 0, 1)
        first._states._optimizer.state[first.method.scale]["step"] += 1
        first.snapshot(copied=False)(tmp_path)
        with pytest.raises(
            ValueError, match="step of scale and of body.* differ.*engine.zero_stage=0"
        ):
            clip_worker.engine("adamw", 1, "fp32", 1, groups=()).load(tmp_path)
        with pytest.raises(ValueError, match="its 2 parameter groups are not the 6 of this run"):
            clip_worker.engine("adamw", 0, "fp32", 1).load(tmp_path)
        first.method.scale.data = torch.ones(3)
        with pytest.raises(ValueError, match=r"'scale' has shape \[1, 1\], and here \[3\]"):
            first.load(tmp_path)
        (tmp_path / "state-0.safetensors").unlink()
        (tmp_path / "state-0.safetensors").mkdir()
        with pytest.raises(Exception, match="Is a directory"):
            first.snapshot(copied=False)(tmp_path)
