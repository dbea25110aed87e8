"""A launcher that starts a run again: it is taken up, whatever was asked for at first.

RUN/launch.json says which launches began the run or took it up: torchrun's agents, which start
ranks again (--max-restarts), and a job of Slurm's, which counts how often it was (--requeue).  A
later start of one of these goes on with the run, where resume=never would refuse it and
overwrite=true delete it; any other launch does not, nor the same process a second time.
"""

import json
import os
import socket
from pathlib import Path
from typing import Any

from fastssl import distributed
from fastssl.config import RunConfig
from fastssl.files import write_atomically

FILE = "launch.json"


def after_restart(cfg: RunConfig) -> RunConfig:
    """`cfg`, or where this launch is at work on the run already, the same with resume=auto.

    Collective: the first rank looks.
    """
    if not distributed.broadcast_object(_is_restart(cfg.directory, launches())):
        return cfg
    resume = "auto" if cfg.resume == "never" else cfg.resume
    return cfg.model_copy(update={"resume": resume, "overwrite": False})


def launches() -> dict[str, Any]:
    """Of all ranks: the agents of torchrun that started them, and the job and how often it was
    begun again; and the first rank's process.  Collective."""
    env, host = os.environ, socket.gethostname()
    agent = f"{host} {_begun(os.getppid())}" if "TORCHELASTIC_RUN_ID" in env else None
    agents = sorted({name for name in distributed.gather_objects(agent) if name})
    job = [env.get("SLURM_CLUSTER_NAME", ""), env.get("SLURM_JOB_ID", "")]
    restarts = int(env.get("SLURM_RESTART_COUNT") or 0)
    process = f"{host} {_begun(os.getpid())}"
    return {"process": process, "agents": agents, "job": job, "restarts": restarts}


def sign(directory: Path, now: dict[str, Any]) -> None:
    """Write down in a run's directory which launch is at work on it."""
    write_atomically(directory / FILE, json.dumps(now))


def _is_restart(directory: Path, now: dict[str, Any]) -> bool:
    try:
        saved = dict(json.loads((directory / FILE).read_text()))
        if saved["process"] == now["process"]:
            return False
        again = bool(now["job"][1]) and saved["job"] == now["job"]
        return bool({*saved["agents"]} & {*now["agents"]}) or (
            again and saved["restarts"] < now["restarts"]
        )
    except (OSError, ValueError, TypeError, KeyError):
        return False


def _begun(process: int) -> str:
    """A process, and when it began: its number comes again."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # of another system than Linux
        return str(process)
    return f"{process} {fields[19]}"
