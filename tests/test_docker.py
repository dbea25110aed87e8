"""docker/ without a container engine: its install steps in a clean venv, its commands as processes.

A Python whose venvs see the packages of the one that runs the tests stands in for a base image with
a torch of its own.  Nothing is downloaded.
"""

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from torch.distributed.run import get_args_parser
from torch.distributed.run import main as torchrun

from fastssl.config import resolve
from tests.ranks import start
from tests.runs import few_digits

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"
IMAGES = ["Dockerfile", "Dockerfile.cpu"]
BASE = """#!/bin/sh -e
{python} "$@"
for venv; do :; done
case "$*" in *--system-site-packages*)
    echo {packages} > "$(echo "$venv"/lib/python3.*/site-packages)/base.pth"
esac
"""


def stages(name: str) -> dict[str, list[list[str]]]:
    """The words of each instruction of a Dockerfile, by stage; without the mounts of RUN."""
    text = re.sub(r"^#.*\n", "", (DOCKER / name).read_text(), flags=re.MULTILINE)
    found: dict[str, list[list[str]]] = {}
    for line in text.replace("\\\n", " ").splitlines():
        words = [w for w in line.split() if not w.startswith("--mount=")]
        if words[:1] == ["FROM"]:
            found[words[3]] = []
        if words and found:
            list(found.values())[-1].append(words)
    return found


def installs(name: str, stage: str) -> list[str]:
    """The arguments, after the venv, that a stage gives docker/install.sh."""
    (words,) = (w for w in stages(name)[stage] if w[:2] == ["RUN", "docker/install.sh"])
    assert words[2] == "/opt/venv"
    return words[3 : words.index("&&") if "&&" in words else None]


def copy(source: str, target: Path) -> None:
    """As COPY does: a file goes into a folder, a folder's content becomes the target's."""
    if (ROOT / source).is_dir():
        shutil.copytree(ROOT / source, target, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        target.mkdir(exist_ok=True)
        shutil.copy(ROOT / source, target)


def context(target: Path) -> None:
    """As `COPY . .` does: what the .dockerignore lets through."""
    for line in (DOCKER / "Dockerfile.dockerignore").read_text().splitlines():
        for path in ROOT.glob(line[1:]) if line.startswith("!") else ():
            copy(path.name, target / path.name if path.is_dir() else target)


class Image:
    """A folder that stands for an image: /opt/venv, and a Python underneath that has torch."""

    def __init__(self, folder: Path):
        self.folder, self.venv, self.python = folder, folder / "venv", folder / "python3"
        packages = sysconfig.get_path("purelib")
        self.python.write_text(BASE.format(python=sys.executable, packages=packages))
        self.python.chmod(0o755)

    def install(self, tree: Path, extras: str, *pip: str) -> subprocess.CompletedProcess[str]:
        """docker/install.sh of a tree, without an index to download from."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PIP_")}
        environment |= {"PIP_NO_INDEX": "1", "PYTHON": str(self.python)}
        script = [tree / "docker/install.sh", self.venv, extras, "--no-build-isolation", *pip]
        return subprocess.run(script, env=environment, capture_output=True, text=True)

    def run(self, *words: str, cwd: Path | None = None) -> str:
        """What a command of the venv prints."""
        command = [self.venv / "bin" / words[0], *words[1:]]
        done = subprocess.run(command, cwd=cwd or self.folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """/opt/fastssl of the image: what the Dockerfile copies, and nothing else."""
    tree = tmp_path_factory.mktemp("opt")
    for words in stages("Dockerfile")["image"]:
        *sources, target = words[1:]
        for source in sources if words[0] == "COPY" else ():
            copy(source, tree / target)
    return tree


@pytest.fixture(scope="module")
def image(tree, tmp_path_factory):
    """The image, its install step done."""
    image = Image(tmp_path_factory.mktemp("image"))
    done = image.install(tree, *installs("Dockerfile", "image"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "satisfied: deepspeed" in done.stdout  # of the extra
    return image


def test_installs_beside_the_torch_that_is_there(image):
    where = "from importlib.util import find_spec as f; print(f('torch').origin)"
    where += "; print(f('fastssl.kernels').origin); print(f('fastssl.bench.__main__').origin)"
    found, *ours = image.run("python", "-c", where).split()
    assert found == torch.__file__
    assert all(Path(path).is_relative_to(image.venv) for path in ours)
    assert "deepspeed" in image.run("fastssl", "doctor")
    assert "simclr-digits" in image.run("fastssl", "recipes")


def test_the_check_runs_on_the_files_of_the_build(tmp_path):
    """The editable install of the stage that runs the tests, and some of them there."""
    files = tmp_path / "check"
    context(files)
    image = Image(tmp_path)
    done = image.install(files, *installs("Dockerfile", "check"))
    assert done.returncode == 0, done.stdout + done.stderr
    tests = ["-m", "pytest", "-p", "no:cacheprovider", "-v", "tests/kernels/test_dispatch.py"]
    assert "passed" in image.run("python", *tests, cwd=files)


def wheel(folder: Path, name: str, version: str, module: str, needs: str) -> None:
    """A wheel that holds one empty package."""
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as file:
        file.writestr(f"{module}/__init__.py", "")
        file.writestr(f"{info}/METADATA", f"{metadata}Requires-Dist: {needs}\n")
        tag = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        file.writestr(f"{info}/WHEEL", tag)
        file.writestr(f"{info}/RECORD", "")


def test_stops_where_another_torch_is_asked_for(tree, tmp_path):
    wheel(tmp_path, "hungry", "1.0", "hungry", needs="torch>=99")
    wheel(tmp_path, "torch", "99.0", "torch", needs="numpy")
    image = Image(tmp_path)
    done = image.install(tree, "train", "--find-links", str(tmp_path), "hungry")
    assert done.returncode != 0
    assert "constraint" in done.stdout + done.stderr
    assert not (image.venv / "bin/fastssl").exists()


def test_stops_where_another_package_hides_a_module(tree, tmp_path):
    wheel(tmp_path, "pytorch_triton_rival", "1.0", "triton", needs="numpy")
    links = ["--find-links", str(tmp_path), "pytorch_triton_rival"]
    done = Image(tmp_path).install(tree, "train", *links)
    assert done.returncode == 1
    assert re.search("were to stay.*\ntriton ", done.stderr)


@pytest.mark.parametrize("name", IMAGES)
def test_images_are_pinned_and_rootless_and_run_the_tests(name):
    built = stages(name)
    text = (DOCKER / name).read_text()
    for variable, value in re.findall(r"^ARG (\w+)=(\S+)", text, re.MULTILINE):
        text = text.replace(f"${{{variable}}}", value)
    bases = set(re.findall(r"^FROM (\S+)", text, re.MULTILINE)) - set(built)
    assert bases and all(re.search(r":\d+\.\d+", base) for base in bases)
    *_, last = built
    assert last == "checked" and built[last][0] == ["FROM", "image", "AS", "checked"]
    assert ["COPY", "--from=check", "/check/passed"] == built[last][1][:3]
    assert "RUN make test BIN=/opt/venv/bin && touch passed".split() in built["check"]
    for stage in ("check", "image"):
        users = [words[1] for words in built[stage] if words[0] == "USER"]
        assert users[-1] == "1000:1000"
    assert built["image"][-1][0] == "CMD"
    assert installs(name, "check")[0] == "train,dev" and installs(name, "check")[-1] == "--editable"


def test_the_checks_make_test_uses_the_images_python():
    """`make test BIN=...` makes no .venv and installs nothing: it tests the image's own torch."""
    make = ["make", "--dry-run", "--always-make", "test", "BIN=/opt/venv/bin"]
    planned = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "/opt/venv/bin/python -m pytest" in planned  # pytest itself may be the image's
    assert "pip" not in planned and ".venv" not in planned


def test_each_dockerfile_ignores_the_same():
    one, two = ((DOCKER / f"{name}.dockerignore").read_text() for name in IMAGES)
    assert one == two and "*" in one.splitlines()


def services(name: str) -> dict[str, dict]:
    return yaml.safe_load((DOCKER / name).read_text())["services"]


def interpolated(text: str, **given: str) -> str:
    """Compose's ${NAME:-default} and ${NAME:?what is missing}."""

    def value(match: re.Match[str]) -> str:
        name, kind, rest = match.groups()
        assert kind == "-" or name in given, rest
        return given.get(name) or rest

    text = re.sub(r"\$\{(\w+):([-?])([^}]*)\}", value, text)
    assert "$" not in text, "a variable without a default and without a word on it"
    return text


@pytest.mark.parametrize("name", ["compose.yaml", "compose.nodes.yaml", "compose.two.yaml"])
def test_commands_start_a_run(name):
    """torchrun and fastssl know their arguments; the Python is the one that sees fastssl."""
    for service in services(name).values():
        words = shlex.split(interpolated(service["command"], NODES="2", HEAD="node0"))
        assert words[:3] == ["python", "-m", "torch.distributed.run"]
        given = get_args_parser().parse_args(words[3:])
        assert given.module and given.training_script == "fastssl"
        command, recipe, *overrides = given.training_script_args
        assert command == "pretrain"
        assert resolve(recipe, overrides).output == Path("runs")  # under WORKDIR: the volume


def test_the_readme_knows_every_variable():
    used = set()
    for path in DOCKER.glob("compose*.yaml"):
        lines = re.sub(r"(^|\s)#.*", "", path.read_text(), flags=re.MULTILINE)
        assert "$" not in interpolated(lines, NODES="2", HEAD="node0")
        used |= set(re.findall(r"\$\{(\w+)", lines))
    rows = re.findall(r"^\| (`.*?) \|", (DOCKER / "README.md").read_text(), re.MULTILINE)
    assert {name for row in rows for name in re.findall("`([A-Z_]+)`", row)} == used


def test_runs_are_written_where_compose_mounts_them():
    for name in ("compose.yaml", "compose.two.yaml"):
        for service in services(name).values():
            dockerfile = Path(service["build"]["dockerfile"])
            built = stages(dockerfile.name)["image"]
            assert ["WORKDIR", "/workspace"] in built
            assert any("/workspace/runs" in words for words in built if words[0] == "RUN")
            mount = service["volumes"][0]
            target = mount["target"] if isinstance(mount, dict) else mount.split(":")[1]
            assert target == "/workspace/runs"


def agent_of(words, log, environment):
    """python -m torch.distributed.run WORDS beside the log, in a process of its own."""
    os.environ |= environment
    os.environ.pop("DS_ACCELERATOR")  # its worker may have a GPU
    os.chdir(log.parent)
    out = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(out, 1)
    os.dup2(out, 2)
    torchrun(words)


def test_two_nodes_train_together(tmp_path):
    """compose.two.yaml, its two containers as two agents of torchrun on this machine."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    small = "epochs=1 overwrite=true batch_size=64 model.kwargs.depth=1 evaluate.max_images=32"
    small += f" {' '.join(f'data.source.{k}={v}' for k, v in few_digits().items())}"
    nodes, logs = [], []
    for name, service in services("compose.two.yaml").items():
        command = interpolated(service["command"], OVERRIDES=small)
        module = "torch.distributed.run --local-addr 127.0.0.1"  # this host's name may lead nowhere
        command = command.replace("torch.distributed.run", module)
        command = command.replace("node0:29400", f"127.0.0.1:{port}")
        words = shlex.split(command)[3:]
        assert f"127.0.0.1:{port}" in words
        environment = {k: interpolated(v) for k, v in service["environment"].items()}
        logs.append(tmp_path / name)
        nodes.append(start(agent_of, words, logs[-1], environment, daemon=False))
    try:
        for node in nodes:
            node.join(300)
        codes = [node.exitcode for node in nodes]
    finally:
        for node in nodes:
            node.terminate()  # an agent ends its worker
        for node in nodes:
            node.join(60)
    said = [log.read_text() for log in logs]
    assert codes == [0, 0], "\n".join(said)
    assert sum("report:" in text for text in said) == 1  # of rank 0 alone
    (last,) = (tmp_path / "runs/simclr-digits/checkpoints").glob("step-*")
    assert (last / "rng-1.pt").is_file()  # which rank 1 wrote
