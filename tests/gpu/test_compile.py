"""Under torch.compile, without a graph break, values and gradients stay those of the formula."""

import pytest
import torch

from tests.gpu.room import backend, pick
from tests.gpu.subjects import SUBJECTS
from tests.oracle import assert_no_worse


@pytest.mark.parametrize("subject", pick(SUBJECTS, SUBJECTS[::12]), ids=str)
def test_compiles_whole(subject):
    torch._dynamo.reset()
    trial = subject.trial(torch.bfloat16)
    compiled = torch.compile(trial.ours, fullgraph=True, backend=backend())
    assert_no_worse(compiled, trial.eager, trial.inputs, lambda out: out.float().square().sum())


@pytest.mark.parametrize("name", pick(["pairwise_lse", "ntxent"], ["ntxent"]))
def test_compiles_for_other_batch_sizes(name):
    torch._dynamo.reset()
    subject = next(s for s in SUBJECTS if s.name == name)
    B, *rest = subject.shapes[0]
    compiled = torch.compile(subject.trial(torch.float32).ours, fullgraph=True, backend=backend())
    for rows in (B, B // 2 + 1, B // 4 + 2):  # the last one meets what the second left open
        trial = subject.trial(torch.float32, (rows, *rest))
        assert_no_worse(compiled, trial.eager, trial.inputs)
