"""What is installed from the built wheel works with torch alone, away from the source tree."""

import re
import shutil
import subprocess
import sys
import venv
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest

import fastssl

ROOT = Path(__file__).parents[1]
TORCH_ONLY = ["fastssl", "fastssl.kernels", "fastssl.losses", "fastssl.distributed"]
TORCH_ONLY += [
    "fastssl.masking",
    "fastssl.schedules",
    "fastssl.bench.__main__",
    "fastssl.bench.cases",
]
TRY = """
import torch, fastssl, fastssl.kernels, fastssl.losses
{imports}
z = torch.randn(6, 4)
assert fastssl.losses.NTXentLoss()(z, z).item() > 0
print(fastssl.__file__)
for name in ("deepspeed", "timm", "pydantic", "numpy"):
    try:
        __import__(name)
    except ImportError:
        continue
    raise SystemExit(name + " is here: this venv proves nothing")
"""


def needed(name: str, seen: set[str]) -> set[str]:
    """Distributions that `name` cannot do without, itself included."""
    seen.add(name)
    for requirement in distribution(name).requires or []:
        if "extra ==" in requirement:
            continue
        other = re.match(r"[\w.-]+", requirement)
        assert other is not None
        try:
            distribution(other[0])
        except ModuleNotFoundError:  # for another platform
            continue
        if other[0] not in seen:
            needed(other[0], seen)
    return seen


@pytest.fixture(scope="module")
def torch_and_its_needs(tmp_path_factory):
    """A folder with links to torch and what torch needs, and nothing else."""
    folder = tmp_path_factory.mktemp("torch")
    for name in needed("torch", set()) - {"setuptools"}:
        dist = distribution(name)
        for top in {file.parts[0] for file in dist.files or [] if file.parts[0] != ".."}:
            link = folder / top
            if not link.exists() and top != "__pycache__":
                link.symlink_to(Path(str(dist.locate_file(top))).resolve())
    return folder


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    # A copy is built: two processes of tests would write into one build/ of the tree.
    left = shutil.ignore_patterns(".*", "build", "runs", "dist", "*.egg-info", "__pycache__")
    source = shutil.copytree(ROOT, out / "source", ignore=left)
    subprocess.run([*build, "--wheel-dir", str(out), str(source)], check=True, cwd=out)
    (found,) = out.glob("fastssl_torch-*.whl")
    return found


def test_the_wheel_holds_every_module_and_recipe(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for top, inside in (
        ("fastssl", "fastssl"),
        ("kernels", "fastssl/kernels"),
        ("bench", "fastssl/bench"),
    ):
        for path in (ROOT / top).rglob("*"):
            if path.suffix in (".py", ".yaml", ".typed", ".j2"):
                assert f"{inside}/{path.relative_to(ROOT / top)}" in names
    assert not [name for name in names if name.startswith(("kernels/", "bench/", "tests/"))]


def test_the_wheel_says_what_it_is(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
    said = zipfile.ZipFile(wheel).read(metadata).decode()
    want = ("Name: fastssl-torch", f"Version: {fastssl.__version__}", "License-File: LICENSE")
    want += ("License-Expression: Apache-2.0", "Author: the fastssl authors")
    for line in (*want, 'Requires-Dist: deepspeed>=0.19.8; extra == "train"'):
        assert f"{line}\n" in said
    assert metadata.replace("METADATA", "licenses/LICENSE") in names
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"version: {fastssl.__version__}\n" in citation and "license: Apache-2.0\n" in citation


def test_nobody_is_sent_to_another_package():
    """fastssl on PyPI is an SDK for SSL certificates; ours is fastssl-torch."""
    wrong = re.compile(r"pip install[^\n;`]*\bfastssl(?!-torch)\b")
    tops = ("fastssl", "kernels", "bench", "tests", "docs", "docker", "*.md", "Makefile", "*.toml")
    files = [
        f for top in tops for p in ROOT.glob(top) for f in ([p] if p.is_file() else p.rglob("*"))
    ]
    texts = (".py", ".md", ".sh", ".yaml", ".toml", ".cpu", ".html", "")
    found = [
        f"{file.relative_to(ROOT)}: {match[0]}"
        for file in files
        if file.is_file() and file.suffix in texts
        for match in wrong.finditer(file.read_text(errors="replace"))
    ]
    assert not found


def test_the_wheel_works_with_torch_alone(wheel, torch_and_its_needs, tmp_path):
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv/bin/python"
    site = next((tmp_path / "venv/lib").glob("python*")) / "site-packages"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*install, "--target", str(site), str(wheel)], check=True)
    code = TRY.format(imports="\n".join(f"import {name}" for name in TORCH_ONLY))
    run = subprocess.run(
        [str(python), "-c", code],
        env={"PYTHONPATH": str(torch_and_its_needs), "PATH": "/usr/bin:/bin"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert str(site) in run.stdout


def test_editable_without_network(tmp_path):
    """What `pip install --no-deps --no-build-isolation -e .` gives, seen from another folder."""
    target = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    install += ["--no-build-isolation", "--target", str(target), "-e", str(ROOT)]
    subprocess.run(install, check=True, cwd=tmp_path)
    code = (
        f"import site; site.addsitedir({str(target)!r}); import fastssl.kernels.pairwise.lse as m;"
    )
    code += "import fastssl.bench; print(m.__file__)"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert Path(run.stdout.strip()) == ROOT / "kernels/pairwise/lse.py", run.stderr
