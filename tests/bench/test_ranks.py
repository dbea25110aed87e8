"""The pool of ranks and the cases it runs: exact across ranks, or no time."""

import time
from functools import partial

import pytest
import torch

from fastssl.bench.cases.ranks import barlow_ranks, ntxent_ranks
from fastssl.bench.measure import rank_pool
from fastssl.bench.measure.gate import judge
from fastssl.bench.measure.rank_pool import RankPool
from fastssl.bench.registry import Absent
from fastssl.losses import NTXentLoss

CPU = torch.device("cpu")
ROWS = [[torch.randn(3, 4) for _ in range(2)] for _ in range(2)]


def fails():
    raise OSError("no license")


def hangs():
    time.sleep(1000)


def test_a_pool_computes_the_joined_batch():
    pool = RankPool(partial(NTXentLoss, 0.5), ROWS, CPU)
    joined = [torch.cat(part).requires_grad_() for part in ROWS]
    value = NTXentLoss(0.5)(*joined)
    torch.testing.assert_close(pool.step().float(), value.detach())
    wanted = torch.autograd.grad(value, joined)
    torch.testing.assert_close(pool.gradients(), list(wanted))
    pool.close()
    with pytest.raises(OSError):
        pool.step()


def test_a_rank_that_fails_is_named():
    with pytest.raises(RuntimeError, match=r"(?s)rank 0 of 2: .*no license"):
        RankPool(fails, ROWS, CPU)


def test_a_rank_that_hangs_is_named(monkeypatch):
    monkeypatch.setattr(rank_pool, "PATIENCE_S", 0.0)
    with pytest.raises(RuntimeError, match="rank 0 of 2: it did not answer"):
        RankPool(hangs, ROWS, CPU)


def test_the_gate_is_the_contract():
    problem = ntxent_ranks({"W": 2, "B": 6, "D": 5}, torch.float32, CPU)
    verdicts = {name: ask() for name, ask in judge(problem).items()}
    assert verdicts == {"fastssl": "", "lightly": "", "reference": ""}


def test_a_loss_whose_ranks_disagree_with_the_joined_batch_is_wrong():
    problem = barlow_ranks({"W": 2, "B": 6, "D": 5}, torch.float32, CPU)
    verdicts = {name: ask() for name, ask in judge(problem).items()}
    assert verdicts["fastssl"] == verdicts["reference"] == ""
    assert verdicts["lightly"].startswith("value is off by")  # it standardises rank by rank


def test_more_ranks_than_gpus_are_absent(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    problem = ntxent_ranks({"W": 2, "B": 6, "D": 5}, torch.float32, torch.device("cuda"))
    assert problem.rivals["fastssl"] == Absent("needs 2 GPUs, there are 1")
