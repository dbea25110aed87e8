"""Configuration: recipes resolve, reload equal, and refusals say what to do."""

import pytest

from fastssl.config.schema import (
    ConfigError,
    RunConfig,
    described,
    differences,
    dump,
    load,
    recipes,
    resolve,
)
from tests.runs import tiny


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_is_complete_and_described(name):
    cfg = resolve(
        name, ["data.source.path=/images"] if "???" in recipes()[name].read_text() else []
    )
    assert cfg.name == name
    first = recipes()[name].read_text().splitlines()[0]
    assert first.startswith("# ") and len(first) > 20


# fault 23
def test_a_rate_chosen_for_another_batch_size_is_said():
    path = "data.source.path=/images"
    (note,) = resolve("simclr-resnet50", [path, "batch_size=320"]).notes()
    assert "optim.lr=4.8 was chosen for batches of 4096 and batch_size is 320" in note
    assert "0.375" in note
    for chosen in ([], ["batch_size=320", "optim.lr=0.4"]):
        assert resolve("simclr-resnet50", [path, *chosen]).notes() == []


def test_a_recipe_says_what_it_leaves_to_the_user():
    with pytest.raises(ConfigError, match="mae-vitb16 leaves data.source.path to you: add data"):
        resolve("mae-vitb16")


def test_dump_reloads_to_the_same(tmp_path):
    cfg = tiny("mae", tmp_path, optim__betas=[0.9, 0.95], engine__deepspeed={"aio": {"b": 1}})
    cfg.directory.mkdir(parents=True)
    (cfg.directory / "config.yaml").write_text(dump(cfg))
    assert load(cfg.directory) == cfg


def test_the_described_configuration_is_the_same_yaml(tmp_path):
    for cfg in (tiny("mae", tmp_path, optim__betas=[0.9, 0.95]), resolve("simclr-digits")):
        (tmp_path / "described.yaml").write_text(described(cfg))
        assert resolve(str(tmp_path / "described.yaml")) == cfg
        assert "# Divides the cosine" in described(resolve("simclr-digits"))


def test_overrides_are_dotted_and_typed():
    cfg = resolve("simclr-digits", ["optim.lr=1e-4", "model.kwargs.depth=3", "data.workers=0"])
    assert cfg.optim.lr == 1e-4 and cfg.model.kwargs["depth"] == 3 and cfg.data.workers == 0


def test_texts_are_taken_as_they_are():
    cfg = resolve("simclr-digits", ["name=2024 #1", "output=/a b#c"])
    assert cfg.name == "2024 #1" and str(cfg.output) == "/a b#c"
    home = resolve("simclr-digits", ["output=~/runs"])
    assert "~" not in str(home.directory)


def test_another_choice_leaves_the_recipes_options_behind():
    cfg = resolve("simclr-digits", ["method.name=barlow_twins", "method.layers=2"])
    assert cfg.method.name == "barlow_twins" and cfg.method.layers == 2
    cfg = resolve("simclr-digits", ["optim.schedule.name=infinite"])
    assert cfg.optim.schedule.name == "infinite"
    cfg = resolve("mae-fractals", ["data.source.name=digits"])
    assert cfg.data.source.name == "digits"
    assert resolve("simclr-digits", ["method.name=simclr"]).method.hidden_dim == 256


def test_a_schedule_without_a_name_is_the_cosine():
    cfg = resolve("simclr-fractals", ["optim.schedule.warmup=0.25"])
    assert cfg.optim.schedule.name == "cosine" and cfg.optim.schedule.warmup == 0.25


@pytest.mark.parametrize(
    "override, sentence",
    [
        ("optim.lrr=1", r"unknown key optim.lrr=1 \(did you mean lr\?\); there are: name, lr"),
        ("epoch=1", r"unknown key epoch=1 \(did you mean epochs\?\)"),
        ("method.temprature=1", r"unknown key method.temprature=1 \(did you mean temperature\?\)"),
        ("optim.schedule.warmpu=1", r"unknown key optim.schedule.warmpu=1 \(did you mean warmup"),
        ("data.source.path=x", r"unknown key data.source.path='x'; there are: test_fraction, name"),
        ("epochs=0", "epochs=0 is refused: input should be greater than or equal to 1"),
        ("epochs=ten", "epochs='ten' is refused: input should be a valid integer"),
        ("optim.lr=-1", "optim.lr=-1 is refused: input should be greater than 0"),
        ("engine.zero_stage=4", "engine.zero_stage=4 is refused: input should be 0, 1, 2 or 3"),
        ("method.name=simclir", "method.name='simclir' is not one of 'simclr', 'dcl'"),
        ("data.source.name=digit", "data.source.name='digit' is not one of 'digits'"),
        ("data.overrides.flipp=1", "unknown override of preset 'simclr' 'flipp'.*'flip'"),
        ("data.augment=simcler", "unknown preset 'simcler'.*'simclr'"),
        ("data.augment=mae", r"method.name=simclr reads 2 view\(s\).*data.augment=mae makes 1"),
        ("optim.name=adamz", "optim.name=adamz is no optimizer.*did you mean adam"),
        ("optim.name=muon", "optim.name=muon needs whole tensors, and ZeRO stage 1"),
        ("engine.accumulation=3", "batch_size=256 is not a multiple of engine.accumulation=3"),
        ("name=..", "name='..' must be a plain directory name"),
        ("seed=99999999999999999999", "seed=99999999999999999999 is refused"),
        ("name=a/b", "name='a/b' must be a plain directory name"),
        ("data.source=digits", "data.source='digits' is refused"),
        ("optim", "override 'optim' is not of the form key=value"),
        ("=3", "override '=3' is not of the form key=value"),
    ],
)
def test_refusals_are_one_sentence(override, sentence):
    with pytest.raises(ConfigError, match=f"^{sentence}") as caught:
        resolve("simclr-digits", [override])
    assert "\n" not in str(caught.value)


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(
        ConfigError, match=r"no recipe or file 'simclr-digit' \(did you mean simclr"
    ):
        resolve("simclr-digit")
    (tmp_path / "a.yaml").write_text("name: [")
    with pytest.raises(ConfigError, match="does not read as YAML"):
        resolve(str(tmp_path / "a.yaml"))
    (tmp_path / "b.yaml").write_text("- 1")
    with pytest.raises(ConfigError, match="not a mapping"):
        resolve(str(tmp_path / "b.yaml"))
    (tmp_path / "c.yaml").write_text("name: x\ndata: {source: {name: digits}}")
    with pytest.raises(ConfigError, match="^method is required and missing"):
        resolve(str(tmp_path / "c.yaml"))
    with pytest.raises(ConfigError, match="holds no run"):
        load(tmp_path)


def test_differences_name_what_makes_another_run(tmp_path):
    one = tiny("simclr", tmp_path)
    same = one.model_copy(update={"resume": "auto", "device": "auto"})
    assert differences(one, same) == []
    other = tiny("simclr", tmp_path, optim__lr=0.5, data__workers=3)
    assert differences(one, other) == ["optim.lr: 0.001 -> 0.5"]


def test_an_infinite_schedule_may_be_carried_on_and_annealed(tmp_path):
    infinite = {"name": "infinite", "warmup_steps": 1, "cooldown_steps": 2}
    one = tiny("mae", tmp_path, optim__schedule=infinite)
    on = tiny("mae", tmp_path, epochs=9, optim__schedule=infinite | {"anneal_steps": 4})
    assert differences(one, on) == []
    assert differences(tiny("mae", tmp_path), tiny("mae", tmp_path, epochs=9))


def test_every_key_is_described():
    def walk(model, path=""):
        for name, field in model.model_fields.items():
            nested = getattr(field.annotation, "model_fields", None)
            if nested is not None:
                walk(field.annotation, f"{path}{name}.")
            elif name not in ("name", "method", "schedule"):
                assert field.description, f"{path}{name} has no description"

    walk(RunConfig)
