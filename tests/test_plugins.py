"""A package of somebody else's, beside this one, adds whatever a run is made of."""

import shutil
import sys
from pathlib import Path
from typing import Annotated, Literal

import pytest
import torch
from pydantic import TypeAdapter
from typer.testing import CliRunner

from fastssl import cli
from fastssl.config import ConfigError, load, resolve
from fastssl.data.batch.ops import BatchOp
from fastssl.data.datasets import SOURCES
from fastssl.data.views.spec import VIEWS
from fastssl.methods import METHODS
from fastssl.methods.configs import SimCLRConfig
from fastssl.models import MODELS
from fastssl.registry import PluginError, Registry, import_plugin
from fastssl.run.train import pretrain
from fastssl.schedules.config import SCHEDULES, CosineSchedule, ScheduleConfig, at

PACKAGE = Path(__file__).parent / "outside" / "dots_ssl.py"
RECIPE = """
name: dots
epochs: 2
batch_size: 32
method: {name: agree, pull: 10.0}
model: {name: dot_mlp, kwargs: {width: 12}}
data: {source: {name: dots, count: 160}, workers: 1, overrides: {noise: 0.2}}
optim: {lr: 1.0e-2, schedule: {name: halving}}
log: {every: 1, tensorboard: false}
checkpoint: {every: 1}
plugins: [dots_ssl]
"""


@pytest.fixture(autouse=True, scope="module")
def nothing_is_left():
    """What is added here is gone afterwards."""
    registries = (METHODS, SOURCES, SCHEDULES, VIEWS, MODELS)
    before = [dict(registry.entries) for registry in registries]
    yield
    for registry, entries in zip(registries, before, strict=True):
        registry.entries = entries
    for name in ("dots_ssl", "installed_ssl"):
        sys.modules.pop(name, None)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder on the path with the package, and a recipe beside it."""
    shutil.copy(PACKAGE, tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "dots.yaml").write_text(RECIPE)
    return tmp_path


def call(*words):
    result = CliRunner().invoke(cli.app, [str(word) for word in words])
    return result.exit_code, result.output + str(result.exception or "")


def test_a_package_adds_all_that_a_run_is_made_of(folder):
    recipe, output = folder / "dots.yaml", f"output={folder}"
    code, out = call("pretrain", recipe, output)
    assert code == 0, out
    run = folder / "dots"
    cfg = load(run)
    assert cfg.plugins == ("dots_ssl",) and cfg.method.pull == 10.0
    longer = resolve(str(recipe), [output, "epochs=3", "resume=auto", "optim.schedule.name=cosine"])
    with pytest.raises(ConfigError, match="optim.schedule.name: halving -> cosine"):
        pretrain(longer)
    first, last = sorted((run / "checkpoints").glob("step-*"))
    shutil.rmtree(last)
    results = pretrain(resolve(str(recipe), [output, "resume=auto"]))
    assert results["rows"][0]["knn"] > 0.9 and last.is_dir()
    for words in (["eval", run], ["embed", run, "dots", "--out", folder / "dots.npz"]):
        code, out = call(*words)
        assert code == 0, out
    code, out = call("export", run, "--format", "safetensors")
    assert code == 0, out


def test_a_plugins_keys_are_checked_and_described_like_ours(folder):
    recipe = str(folder / "dots.yaml")
    for override, refusal in {
        "method.pul=2": "unknown key method.pul=2 .did you mean pull",
        "method.pull=-1": "method.pull=-1 is refused: input should be greater than 0",
        "method.name=agre": "'agre' is not one of .*'agree'.*did you mean agree",
        "data.source.name=dot": "data.source.name='dot' is not one of",
        "data.overrides.nois=1": "'nois'.*did you mean 'noise'",
        "model.name=dot_mpl": "'dot_mpl' is not a timm model",
        "plugins=[no_such_ssl]": "there is no plugin no_such_ssl: pip install its package, or put",
        "plugins=no_such_ssl": "plugins='no_such_ssl' must be a list",
        "plugins=[../evil]": "'../evil' is not a module's name",
        "plugins=[my-ssl]": "'my-ssl' is not a module's name",
    }.items():
        with pytest.raises(ConfigError, match=refusal):
            resolve(recipe, [override])
    code, out = call("pretrain", recipe, "--dry-run", "--plugin", "dots_ssl")
    assert code == 0 and "pull: 10.0  # Weight of the views' agreement." in out, out


def test_a_plugin_that_fails_or_is_gone_is_named(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "broken_ssl.py").write_text("1 / 0")
    (tmp_path / "wanting_ssl.py").write_text("import no_such_library")
    for name, refusal in {
        "broken_ssl": "plugin broken_ssl cannot be imported: ZeroDivisionError: division by zero",
        "wanting_ssl": "plugin wanting_ssl cannot be imported: No module named 'no_such_library'",
        "wanting_ssl.part": "plugin wanting_ssl.part cannot be imported: No module named 'no_s",
    }.items():
        with pytest.raises(PluginError, match=refusal):
            import_plugin(name)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(RECIPE.replace("dots_ssl", "gone_ssl"))
    with pytest.raises(ConfigError, match="config.yaml: there is no plugin gone_ssl"):
        load(run)
    for words in (["doctor"], ["doctor", "mae-digits"], ["pack", "mae-digits", tmp_path / "x"]):
        code, out = call(*words, "--plugin", "gone_ssl")
        assert code == 1 and "there is no plugin gone_ssl" in out, out


def test_two_of_one_name_are_refused():
    registry = Registry("method", "method.name")
    registry.add("mine", "here:Mine")
    registry.add("mine", "here:Anew")  # a module that is read again
    with pytest.raises(PluginError, match="two methods are named 'mine', of here and of there"):
        registry.add("mine", "there:Mine")
    from fastssl.registry import OneOf

    schedules = TypeAdapter(Annotated[ScheduleConfig, OneOf(SCHEDULES)])
    assert schedules.validate_python(CosineSchedule()) == CosineSchedule()
    with pytest.raises(ValueError, match="it must be a schedule's section"):
        schedules.validate_python(SimCLRConfig())
    import fastssl

    def resnet18():
        return torch.nn.Identity()

    with pytest.raises(PluginError, match="two models are named 'resnet18', of timm.models.resnet"):
        fastssl.register_model(lambda shape: {})(resnet18)

    class Mine(BatchOp):
        name: Literal["mixup"] = "mixup"

    with pytest.raises(PluginError, match="two batch_ops are named 'mixup', of fastssl.data"):
        fastssl.register_batch_op(Mine)
    with pytest.raises(PluginError, match="names views 'simclr', as a preset of images is"):
        fastssl.register_views("simclr")(resnet18)


def test_an_installed_package_needs_no_mention(tmp_path, monkeypatch):
    """By its entry points; the run that it made says that it needs it."""
    (tmp_path / "installed_ssl.py").write_text(
        "from typing import Literal\n"
        "import fastssl\n"
        "from fastssl.schedules.config import ScheduleConfig\n"
        "@fastssl.register_schedule\n"
        "class Flat(ScheduleConfig):\n"
        "    name: Literal['flat'] = 'flat'\n"
        "    def at(self, progress):\n"
        "        return 0.5 + 0.0 * progress\n"
    )
    info = tmp_path / "installed_ssl-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: installed-ssl\nVersion: 1.0\n")
    points = "[fastssl.schedules]\nflat = installed_ssl:Flat\nlost = installed_ssl:Lost\n"
    (info / "entry_points.txt").write_text(points)
    monkeypatch.syspath_prepend(str(tmp_path))
    cfg = resolve("simclr-digits", ["optim.schedule.name=flat"])
    assert cfg.optim.schedule.factor(3, 7) == 0.5 and cfg.plugins == ("installed_ssl",)
    cfg = resolve("mocov3-digits", ["method.momentum.name=flat"])
    assert at(cfg.method.momentum, 0.3) == 0.5 and cfg.plugins == ("installed_ssl",)
    with pytest.raises(ConfigError, match="entry point fastssl.schedules: lost = .* adds no sched"):
        resolve("simclr-digits", ["optim.schedule.name=lost"])
    with pytest.raises(ConfigError, match="'flta' is not one of .*'lost'.*did you mean flat"):
        resolve("simclr-digits", ["optim.schedule.name=flta"])
