"""Configuration: recipes resolve, reload equal, and refusals say what to do."""

import importlib
import re

import pytest

from fastssl.config import (
    ConfigError,
    RunConfig,
    described,
    differences,
    dump,
    load,
    recipes,
    resolve,
)
from fastssl.config.keys import known_keys, names_of
from fastssl.data.views.spec import view_spec
from fastssl.schedules.config import at
from tests.runs import tiny


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_is_complete_and_described(name):
    text = recipes()[name].read_text()
    key = "teacher.weights" if 'weights: "???"' in text else "data.source.path"
    cfg = resolve(name, [f"{key}=/here"] if "???" in text else [])
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
        ("optim.weight_decay={name: [a]}", r"optim.weight_decay.name=.*'a'.* is not one of"),
        ("method.name=[a]", r"method.name=.*'a'.* is not one of"),
        ("data.source.path=x", r"unknown key data.source.path='x'; there are: test_fraction, name"),
        ("epochs=0", "epochs=0 is refused: input should be greater than or equal to 1"),
        ("epochs=ten", "epochs='ten' is refused: input should be a valid integer"),
        ("optim.lr=.inf", "optim.lr=inf is refused: input should be a finite number"),  # fault 17
        ("evaluate.every=yes", "evaluate.every=True is refused: a number is wanted, not yes or"),
        ("optim.betas=[on, 0.9]", "optim.betas=.True, 0.9. is refused: a number is wanted"),
        ("model.name=resnet8", "model.name='resnet8' is not a timm model; did you mean resnet18"),
        ("data.batch_ops=[{name: mixup, alhpa: 1}]", r"unknown key data.batch_ops.0.alhpa=1 \(did"),
        ("optim.lr=-1", "optim.lr=-1 is refused: input should be greater than 0"),
        ("engine.zero_stage=4", "engine.zero_stage=4 is refused: input should be 0, 1, 2 or 3"),
        ("method.name=simclir", "method.name='simclir' is not one of 'simclr', 'dcl'"),
        ("data.source.name=digit", "data.source.name='digit' is not one of 'digits'"),
        ("data.overrides.flipp=1", "unknown override of preset 'simclr' 'flipp'.*'flip'"),
        ("data.augment=simcler", "unknown preset 'simcler'.*'simclr'"),
        ("data.augment=mae", r"method.name=simclr reads 2 or more view\(s\).*=mae makes 1"),
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


BOMB = "a0: &a0 [1, 1]\n" + "".join(f"a{i + 1}: &a{i + 1} [*a{i}, *a{i}]\n" for i in range(24))


# fault 30, and of fault 44 that the file is named
@pytest.mark.parametrize(
    "text, sentence",
    [
        (BOMB, "config.yaml .*does not read as YAML: aliases are not read"),
        ("a: " + "[" * 600 + "]" * 600, "config.yaml .*does not read as YAML"),
        ("", "config.yaml holds NoneType, not a mapping"),
        ("epochs: 3", "config.yaml: .* is required and missing"),
    ],
)
def test_a_runs_configuration_that_is_damaged_or_hostile(text, sentence, tmp_path):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=sentence):
        load(tmp_path)


def test_no_configuration_reads_the_environment(tmp_path, monkeypatch):
    """Fault 31, and of fault 17 the braces in a path: a file's and an override's are text."""
    monkeypatch.setenv("SECRET", "of mine")
    for path in ("http:/x/${oc.env:SECRET}", "/data/${x", "/data/${x}", "/data/$SECRET"):
        cfg = resolve("simclr-digits", [f"output={path}"])
        (tmp_path / "config.yaml").write_text(dump(cfg))
        assert str(load(tmp_path).output) == str(cfg.output) == path


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


def test_more_views_than_a_method_reads_are_refused():
    with pytest.raises(ConfigError, match=r"mae reads 1 view\(s\).*data.augment=simclr makes 2"):
        resolve("mae-digits", ["data.augment=simclr"])


def test_differences_name_what_makes_another_run(tmp_path):
    one = tiny("simclr", tmp_path)
    data = one.data.model_copy(update={"changed": "allow"})
    same = one.model_copy(update={"resume": "auto", "device": "auto", "data": data})
    assert differences(one, same) == []
    other = tiny("simclr", tmp_path, optim__lr=0.5, data__workers=3)
    assert differences(one, other) == ["optim.lr: 0.001 -> 0.5"]


def test_a_run_may_go_on_at_another_stage_precision_and_accumulation(tmp_path):
    one = tiny("simclr", tmp_path)
    raw = {"zero_optimization": {"overlap_comm": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    elsewhere = {"engine__zero_stage": 3, "engine__precision": "bf16", "engine__deepspeed": raw}
    assert differences(one, tiny("simclr", tmp_path, engine__accumulation=2, **elsewhere)) == []
    zero = {"offload_optimizer": "cpu", "persistence_threshold": 0, "accumulation_dtype": "fp32"}
    tuned = {**elsewhere, "engine__zero": {**zero, "offload_parameters": "cpu"}}
    assert differences(one, tiny("simclr", tmp_path, **tuned | {"engine__deepspeed": {}})) == []
    for key, value in {"large_batch": "plain", "micro_batchnorm": True}.items():
        keys = {"engine__accumulation": 2, f"engine__{key}": value}
        (parts, _) = differences(one, tiny("simclr", tmp_path, **keys))
        assert parts == "engine.accumulation: 1 -> 2"
    dumped = {"engine__deepspeed": {"dump_state": True}}
    assert differences(one, tiny("simclr", tmp_path, **dumped))


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


def test_the_names_of_all_keys_are_those_of_the_schema():
    """Fault 19: keys.json refuses a misspelt key before torch is imported."""
    mend = 'python -c "from fastssl.config.keys import write; write()"'
    assert known_keys() == names_of(RunConfig), f"a key has come or gone: {mend}"


def test_nothing_in_a_configuration_is_interpolated(tmp_path, monkeypatch):
    """Faults 17 and 31: a `${...}` is text, in an override and in a stranger's run."""
    monkeypatch.setenv("SECRET", "hunter2")
    text = "/a/${oc.env:SECRET}/${b/x"
    cfg = resolve("simclr-digits", [f"output={text}", "model.kwargs={act: '${seed}'}"])
    assert str(cfg.output) == text and cfg.model.kwargs == {**cfg.model.kwargs, "act": "${seed}"}
    (tmp_path / "config.yaml").write_text(dump(cfg))
    assert load(tmp_path) == cfg


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("a: &a [1]\nb: [*a, *a]", r"aliases are not read, and there is \*a"),
        ("name: x\nname: y", "name is given twice"),
        ("a: " + "[" * 600, "recursion"),
    ],
)
def test_yaml_that_is_a_trap_is_refused(text, sentence, tmp_path):
    """Kin of faults 30 and 31: bombs of anchors, keys that hide one another, endless nesting."""
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError, match=f"does not read as YAML: .*{sentence}"):
        resolve(str(tmp_path / "a.yaml"))


def test_numbers_dates_and_texts_survive_yaml(tmp_path):
    kwargs = {"a": 1e-3, "b": "1e-3", "c": "2024-01-01", "d": "yes", "e": None, "f": [1, 2.5]}
    cfg = tiny("mae", tmp_path, model__kwargs=kwargs, optim__lr=1e-05, name="1e5")
    (tmp_path / "config.yaml").write_text(dump(cfg))
    assert load(tmp_path) == cfg
    read = resolve("simclr-digits", ["model.kwargs={a: 1e-3, b: 2024-01-01}"]).model.kwargs
    assert (read["a"], read["b"]) == (1e-3, "2024-01-01")


def test_old_spellings_are_read_with_a_warning(tmp_path):
    own = ["data.augment=byol", "data.overrides.colour=linear", "data.overrides.view1.solarise=0.3"]
    with pytest.warns(FutureWarning, match="is called") as said:
        cfg = resolve("simclr-digits", own)
    assert [str(one.message) for one in said] == [
        "data.overrides.colour is called data.overrides.color now",
        "data.overrides.view1.solarise is called data.overrides.view1.solarize now",
    ]
    looks = cfg.views().views
    assert looks[0].color == "linear" and [look.solarize for look in looks] == [0.0, 0.3]
    new = dump(cfg)
    assert "colour" not in new and "solarise" not in new
    (tmp_path / "config.yaml").write_text(new.replace("color:", "colour:"))
    with pytest.warns(FutureWarning, match="is called data.overrides.color now"):
        assert load(tmp_path) == cfg  # a run of an earlier version
    with pytest.raises(ConfigError, match="is the old name of data.overrides.color, and both"):
        resolve("simclr-digits", [*own, "data.overrides.color=linear"])
    with pytest.warns(FutureWarning, match="data.source.name=hub is called .*=hf_datasets now"):
        source = resolve("simclr-digits", ["data.source.name=hub", "data.source.path=/x"])
    assert source.data.source.name == "hf_datasets"
    with pytest.warns(FutureWarning, match="colour is called color now"):
        assert view_spec("clips", 8, colour="sequential").color == "sequential"


def test_a_run_from_before_exact_large_batches_stays_what_it_was(tmp_path):
    cfg = resolve("simclr-digits", ["engine.accumulation=4"])
    (tmp_path / "config.yaml").write_text(re.sub(" *(large_b|reduce_o|micro_b).*\n", "", dump(cfg)))
    before = load(tmp_path)
    assert before.engine.large_batch == "plain" and cfg.engine.large_batch == "exact"
    assert differences(before, cfg) == ["engine.large_batch: plain -> exact"]


def test_old_names_of_keys_are_read_with_a_warning(monkeypatch):
    renamed = {"data.shape": "data.image_size", "data.batch_ops.scale": "data.batch_ops.alpha"}
    module = importlib.import_module("fastssl.config.load")  # the function hides its name
    monkeypatch.setattr(module, "RENAMED", renamed)
    overrides = ["data.shape=8", "data.batch_ops=[{name: mixup, scale: [0, 0.5]}]"]
    with pytest.warns(FutureWarning, match="is called") as said:
        cfg = resolve("simclr-digits", overrides)
    assert str(said[0].message) == "data.shape is called data.image_size now" and len(said) == 2
    assert cfg.data.image_size == 8 and cfg.data.batch_ops[0].alpha == (0, 0.5)
    with pytest.raises(ConfigError, match="data.shape is the old name of"):
        resolve("simclr-digits", ["data.shape=8", "data.image_size=8"])


def test_ends_of_numbers_are_read_by_their_old_names():
    """Runs of before numbers could move by any schedule."""
    old = ["method.momentum=0.9", "method.momentum_end=0.95", "method.until=0.25"]
    with pytest.warns(FutureWarning, match="is method.momentum.(end|until) now"):
        cfg = resolve("data2vec-digits", old)
    assert [at(cfg.method.momentum, p) for p in (0, 0.125, 1)] == pytest.approx([0.9, 0.925, 0.95])
    for new in ("method.momentum.end=0.9", "method.momentum=[0.9, 0.95]"):
        with pytest.raises(
            ConfigError, match="momentum_end is the old name of method.momentum.end"
        ):
            resolve("data2vec-digits", [old[1], new])
    assert resolve("mae-digits", ["optim.weight_decay_end=null"]).optim.weight_decay == 0.05
    with pytest.warns(FutureWarning, match="optim.weight_decay_end is optim.weight_decay.end now"):
        cfg = resolve("mae-digits", ["optim.weight_decay_end=0.2"])
    assert [at(cfg.optim.weight_decay, p) for p in (0, 0.5, 1)] == pytest.approx([0.05, 0.125, 0.2])
    with pytest.warns(FutureWarning, match="is called optim.schedule.end now"):
        cfg = resolve("mae-digits", ["optim.schedule.final=0.1"])
    assert cfg.optim.schedule.factor(999, 1000) == pytest.approx(0.1, abs=1e-5)
    assert cfg.optim.schedule.warmup == 0.1
