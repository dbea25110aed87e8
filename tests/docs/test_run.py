"""The script for Slurm in docs/run.md, with commands that stand in for Slurm's and for the run."""

import os
import re
import subprocess
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs/run.md").read_text()
COMMANDS = {
    "scontrol": """if [ "$1" = show ]; then printf 'one\\ntwo\\n'; else echo "$@" >> queue; fi""",
    "srun": """while [ "$1" != bash ]; do shift; done; SLURM_PROCID=3 SLURM_LOCALID=1 "$@" """,
    "fastssl": """echo "$@ $RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE" \\
    "$MASTER_ADDR:$MASTER_PORT" > said; exit $CODE""",
}


@pytest.mark.parametrize(
    "code, restarts, queued",
    [
        *((code, "3", False) for code in (0, 2, 3, 4)),
        *((code, "3", True) for code in (1, 5, 6, 137)),
        *((1, "20", False), (5, "20", True), (6, "", True)),
    ],
)
def test_a_job_is_queued_again_where_that_helps(code, restarts, queued, tmp_path):
    (script,) = re.findall(r"```bash\n(#!/bin/bash.*?)```", PAGE, re.DOTALL)
    for name, does in COMMANDS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{does}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "41007", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NTASKS": "4"}
    job |= {"SLURM_NTASKS_PER_NODE": "2", "SLURM_RESTART_COUNT": restarts, "CODE": str(code)}
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], env=path | job, cwd=tmp_path, timeout=60)
    assert done.returncode == code
    said = (tmp_path / "said").read_text()
    assert said.startswith("pretrain ") and said.endswith("resume=auto 3 1 4 2 one:21007\n")
    queue = tmp_path / "queue"
    assert (queue.exists() and queue.read_text() == "requeue 41007\n") == queued
