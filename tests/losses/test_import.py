"""The losses need torch alone, and cost little more than torch to import."""

import subprocess
import sys

HEAVY = "triton torch._dynamo torch._inductor timm torchvision deepspeed"


def test_importing_the_losses_imports_torch_and_little_else():  # fault 19
    program = "import sys, fastssl.losses; print(*sorted(set(sys.argv[1:]) & set(sys.modules)))"
    ran = subprocess.run(
        [sys.executable, "-c", program, *HEAVY.split()], capture_output=True, text=True, check=True
    )
    assert ran.stdout.split() == []
