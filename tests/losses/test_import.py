"""The losses need torch alone, and cost little more than torch to import."""

import subprocess
import sys

HEAVY = "triton torch._dynamo torch._inductor timm torchvision deepspeed"
PROGRAM = """
import cProfile, sys, torch
profile = cProfile.Profile()
profile.runcall(__import__, "fastssl.losses")
print(sum(function.callcount for function in profile.getstats()))
print(*sorted(set(sys.argv[1:]) & set(sys.modules)))
"""


def test_importing_the_losses_imports_torch_and_little_else():  # fault 19
    """Calls tell the cost on any machine: torch.library.custom_op would make 25,000 more."""
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, *HEAVY.split()], capture_output=True, text=True, check=True
    )
    calls, *heavy = ran.stdout.split()
    assert heavy == [] and int(calls) < 45_000


WITHOUT = """
import torch.distributed
torch.distributed.is_available = lambda: False
from fastssl import losses
print(losses.NTXentLoss(), losses.VICRegLoss(), losses.KoLeoLoss())
losses.NTXentLoss(gather_distributed=True)
"""


def test_without_torch_distributed_only_who_asks_for_it_is_refused():
    ran = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True)
    assert ran.stdout.count("gather_distributed=False") == 2 and "KoLeoLoss" in ran.stdout
    want = "ValueError: gather_distributed must be False without torch.distributed, got True"
    assert ran.stderr.strip().endswith(want)
