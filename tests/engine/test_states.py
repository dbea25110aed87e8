"""A state is the same to the last bit wherever it is taken up."""

from pathlib import Path

import pytest
import torch

from fastssl.engine.config import EngineConfig, EngineError
from fastssl.engine.shards import tree_of
from fastssl.engine.states import check_offloaded
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
