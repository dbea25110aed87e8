"""Two hosts train as one, by the commands that we give for it; each ends when the other is gone.

Where the machine gives no network namespaces the hosts are two loopback addresses: the tests' ids
say which it was.
"""

import os
import re
import shlex
import signal
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from torch.distributed.launcher.api import elastic_launch
from torch.distributed.run import config_from_args, parse_args

from fastssl.config import dump
from fastssl.engine import launch
from tests.engine.hosts import ADDRESSES, APART, NAMES, Hosts, within, worker
from tests.ranks import start
from tests.runs import losses, tiny

ROOT = Path(__file__).parents[2]
PLACE = "namespaces" if APART else "loopback"
MAE = {"engine__zero_stage": 3, "evaluate__max_images": 8, "epochs": 1}


def recipe(folder, **changes):
    """Of a run in `folder`, which the ranks read there."""
    cut = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    cfg = tiny("mae", folder / "runs", engine__deepspeed=cut, **(MAE | changes))
    (folder / "recipe.yaml").write_text(dump(cfg))
    return cfg


@pytest.fixture
def port():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return str(free.getsockname()[1])


def composed(n, port):
    """torchrun's words of compose.nodes.yaml, the second node being the head."""
    file = ROOT / "docker/compose.nodes.yaml"
    command = yaml.safe_load(file.read_text())["services"]["pretrain"]["command"]
    head = NAMES[1] if APART else ADDRESSES[0]
    given = {"NODES": "2", "HEAD": head, "PORT": port, "RUN_ID": "two"}
    command = re.sub(r"\$\{(\w+)[^}]*\}", lambda m: given.get(m[1], ""), command)
    words = shlex.split(command.partition(" -m fastssl")[0])[3:]
    assert words[words.index("--nproc-per-node") + 1] == "gpu"
    words[words.index("--nproc-per-node") + 1] = "1"
    return [*words, *([] if APART else ["--local-addr", ADDRESSES[n]])]


def documented(n, port):
    """torchrun's words of docs/run.md."""
    page = (ROOT / "docs/run.md").read_text()
    (line,) = re.findall(r"^    torchrun (.*--node-rank.*)$", page, re.MULTILINE)
    line = line.replace("$NODE", str(n)).replace("node0", ADDRESSES[0]).replace("29500", port)
    words = shlex.split(line.partition(" -m fastssl")[0])
    return [w.replace("nproc-per-node=8", "nproc-per-node=1") for w in words]


def on_one_host(folder):
    words = ["--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "none"]
    config, *_ = config_from_args(parse_args(words))
    config.start_method = "fork"
    elastic_launch(config, worker)(folder, "")


@pytest.mark.parametrize("place", [PLACE])
def test_two_hosts_train_as_two_processes_of_one(place, port, tmp_path):
    one, two = (tmp_path / name for name in ("one", "two"))
    for folder in (one, two):
        folder.mkdir()
    cfg, reference = recipe(two), recipe(one)
    codes, said = Hosts(two, [composed(0, port), composed(1, port)], "").end(120)
    assert codes == [0, 0], "\n".join(said)
    alone = start(on_one_host, one, daemon=False)
    alone.join(120)
    assert alone.exitcode == 0
    assert len(losses(cfg)) == 5
    torch.testing.assert_close(losses(cfg), losses(reference), rtol=1e-6, atol=1e-6)
    assert [path.name for path in cfg.output.iterdir()] == ["run"]
    (last,) = cfg.directory.glob("checkpoints/step-*")
    assert (last / "state-1.safetensors").is_file()
    assert sorted("report:" in text for text in said) == [False, True]  # of one rank


@pytest.mark.parametrize("place", [PLACE])
def test_a_host_that_is_gone_ends_the_other_one(place, port, tmp_path):
    """Its cable is pulled; where there is none, its rank is killed."""
    cfg = recipe(tmp_path, epochs=400)
    hosts = Hosts(tmp_path, [documented(0, port), documented(1, port)], "")
    try:
        log = cfg.directory / "metrics.jsonl"
        within(100, lambda: log.is_file() and len(losses(cfg)) > 2)
        if APART:
            hosts.cut()
        else:
            os.kill(int((tmp_path / "pid-1").read_text()), signal.SIGKILL)
    finally:
        codes, said = hosts.end(60)
    why = r"cannot be reached any more \(.+\)" if APART else "has ended"
    end = "and the others with it: resume=auto takes the run up again"
    assert re.search(f"rank 1 on {NAMES[1]} {why}, {end}", said[0]), said[0]
    assert codes == [1, 1], "\n".join(said)
    if APART:  # the second host's rank is alone as well
        assert re.search(f"rank 0 on {NAMES[0]} {why}, {end}", said[1]), said[1]


@pytest.mark.parametrize("place", [PLACE])
def test_a_rank_that_fails_in_its_step_is_named_by_the_other(place, port, tmp_path):
    """Started as DeepSpeed's launcher does it."""
    recipe(tmp_path, engine__zero_stage=1)
    words = {"MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": port, "WORLD_SIZE": "2"}
    words |= {"LOCAL_SIZE": "1", "LOCAL_RANK": "0"}
    hosts = Hosts(tmp_path, [words | {"RANK": str(n)} for n in (0, 1)], "fails")
    codes, said = hosts.end(60)
    assert codes == [1, 1], "\n".join(said)
    why = f"rank 1 on {NAMES[1]} has ended (ArithmeticError: of this rank alone), and the others"
    assert why in said[0], said[0]


@pytest.mark.parametrize(
    "known, others, interface",
    [
        ("10.0.0.1", {}, "eth1"),
        ("127.0.1.1", {2: "127.0.0.1", 1: "10.0.0.2"}, "eth1"),  # by the master's own name
        ("127.0.0.1", {2: "127.0.0.1", 1: "127.0.0.1", 0: "127.0.0.1"}, "lo"),  # all on one
        *((known, {}, "eth2") for known in ("fd00::5", "fe80::2")),
        ("10.9.9.9", {}, None),
    ],
)
def test_gloo_is_given_the_interface_that_leads_to_the_others(
    known, others, interface, monkeypatch
):
    addresses = {"lo": ["127.0.0.1"], "eth0": ["192.168.0.3"], "eth1": ["10.0.0.1"]}
    addresses["eth2"] = ["fe80::2%eth2", "fd00::5"]
    found = {k: [SimpleNamespace(address=a) for a in v] for k, v in addresses.items()}
    monkeypatch.setattr("psutil.net_if_addrs", lambda: found)
    ways = {"node0": known, "10.0.0.2": "10.0.0.1"}
    monkeypatch.setattr(launch, "_address_towards", ways.__getitem__)
    for name, value in {"MASTER_ADDR": "node0", "RANK": "0", "WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    told = {f"fastssl/address/{rank}": other for rank, other in others.items()}
    store = SimpleNamespace(set=told.__setitem__, get=lambda key: told[key].encode())
    assert launch._interface(store) == interface
    assert told["fastssl/address/0"] == known
