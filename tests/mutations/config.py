"""Configuration: which tests look at a file, and the tokens that are changed in it."""

CONFIG = "tests/test_config.py"
PLUGINS = "tests/test_plugins.py"
ENGINE = "tests/engine/test_engine.py"

TESTS = {
    "config/load": (
        f"{CONFIG} tests/test_schedules.py",
        "hostile or broken_files or another_choice or trap or old_names or rate_chosen or leaves_to"
        " or as_they_are or another_name",
    ),
    "config/keys": (f"{CONFIG} tests/methods/test_cmc.py", "refusals or names_of or checked_like"),
    "config/schema": (
        f"{CONFIG} tests/methods/test_cmc.py tests/train/test_streams_run.py",
        "rate_chosen or refus or differ or go_on_at or annealed or more_views or checked_like"
        " or do_not_fit",
    ),
    "config/errors": (f"{CONFIG} tests/methods/test_cmc.py", "refusals or missing or checked_like"),
    "section": (CONFIG, "refusals"),
    "engine/config": (ENGINE, "deepspeed_keys"),
    "files": ("tests/test_files.py", ""),
    "registry": (PLUGINS, "not all_that"),
    "tree": (ENGINE, "micro or moves_the"),
    "models/backbones": (PLUGINS, "two_of"),
    "models/published": ("tests/models/test_published.py", ""),
    "models/weights": (
        "tests/models/test_weights.py tests/models/test_deferred.py tests/train/test_start.py",
        "are_fitted or unless_partial or fits_nowhere or a_hub or asked_for or does_not_fit"
        " or whose_tensors or next_run",
    ),
}

MUTATIONS = {  # place: (what stands in it or below, what it becomes)
    "models/weights._files": [("names)]", "[*names][:1])]")],
    "registry.add": [("before.module != module", "before.made != made")],
    "registry.entry": [
        (
            "if name not in self.entries:\n                raise",
            "if not found:\n                raise",
        )
    ],
    "registry.validate": [("is entry.config for", "is not None for")],
    "registry.plugins_of": [("if not entry.is_ours", "if entry.is_ours")],
    "registry.import_plugin": [
        ("part.isidentifier()", "part"),
        ('startswith(f"{error.name}.")', 'startswith("")'),
    ],
    "tree.count_rows": [("elif len(leaf) != first[1]:", "elif len(leaf) > first[1]:")],
    "models/weights.load_weights": [
        ("or faults and not partial", "or faults and partial"),
        ('_names(model, "classifier")', '_names(model, "first_conv")'),
        ("if not loaded or", "if"),
        ("weights[k].shape != loaded[k].shape", "weights[k].shape == loaded[k].shape"),
    ],
    "models/published.backbone_in": [
        ("_stands(p, own)", "_stands(p, kept)"),
        ("blocks.\\1.", "blocks.0."),
        ("left + rest", "left"),
    ],
    "models/published.network_in": [("_NETWORKS if", "_NETWORKS[2:] if")],
    "models/published.check_biases": [
        ("(q.any() or v.any())", "False"),
        ('f"{key}_mask" not in weights and', "False and"),
    ],
    "models/weights.load_method": [
        ('facts.get("method") != name', "False"),
        ("if k not in weights)", "if False)"),
        ("_fitted(network, part)", "part"),
    ],
    "models/weights._fitted": [("given.shape[1] == 3", "given.shape[1] == 4")],
    "tree.join": [("torch.cat(parts)", "parts[0]")],
    "models/backbones.register_model": [(".__module__ != module:", ".__module__ == module:")],
    "config/load.load": [
        ('f"{path}: {error}"', 'f"{error}"'),
        ('f"{run} holds no run', 'f"{run} has none'),
    ],
    "config/load.compose_node": [("yaml.AliasEvent", "yaml.DocumentEndEvent")],
    "config/load.construct_mapping": [("names.count(name) > 1", "names.count(name) > 2")],
    "config/load._merged": [
        ("RecursionError", "KeyError"),
        ("name != _at(read", "name == _at(read"),
        ('"lr" not in own', '"lr" in own'),
        ('read.get("batch_size")', 'merged.get("batch_size")'),
        ("if not isinstance(read, dict):", "if isinstance(read, list):"),
    ],
    "config/keys._check_models": [("if streams and others", "if False")],
    "config/load._put": [("if key in VERBATIM", "if key not in VERBATIM")],
    "config/load._over": [
        ('!= below["name"]', '== below["name"]'),
        ('if "start" in keys else ()', 'if "start" not in keys else ()'),
    ],
    "config/load._check_moved": [("isinstance(now, list) or", ""), ("key in now", "old in now")],
    "config/load._unset": [('"???"', '"??"')],
    "config/load._renamed": [("if key in tree:", "if new in tree:")],
    "config/keys.check_keys": [
        ("if known else", "if not known else"),
        ("if key not in names:", "if key is names:"),
        ("enumerate(value)} if isinstance(value, list)", "enumerate(value)} if value"),
    ],
    "config/keys._no_model": [
        ("if close else", "if not close else"),
        ('return ""\n    known', "return name\n    known"),
    ],
    "config/schema.notes": [
        ("self.batch_size / made_for", "made_for / self.batch_size"),
        ("(None, self.batch_size)", "(None, made_for)"),
    ],
    "config/schema._consistent": [
        ("self.batch_size % self.engine", "0 % self.engine"),
        ("self.name.startswith", "self.name.isdecimal() and self.name.startswith"),
    ],
    "config/schema._check_views": [("views.count < least or", "views.count < least and")],
    "config/schema._check_streams": [("names[:1] != wanted[:1]", "names[:1] == wanted[:1]")],
    "config/schema.differences": [
        ('"engine.zero_stage", "engine.precision"', '"engine.zero_stage", ""'),
        ('f"engine.zero.{key}"', 'f"engine.{key}"'),
        ('startswith(f"{name}.")', 'endswith(f"{name}.")'),
        ("and not c.engine.micro_batchnorm", ""),
        ('c.engine.large_batch == "exact" and', ""),
        ('", ".join(own.data.streams)', '", ".join(sorted(own.data.streams))'),
        ('"data.changed"', '"data.source"'),
        ("| new.keys()) - free_leaves", "| new.keys())"),
        ('"optim.schedule.anneal_steps"', '"optim.schedule.constant"'),
    ],
    "config/errors.about_stream": [("model.{stream}.", "model.")],
    "config/errors.sentence": [
        ("if part not in tagged", "if part in tagged"),
        ('first["type"] == "missing"', 'first["type"] == "absent"'),
    ],
    "section.Section": [
        ("allow_inf_nan=False", "allow_inf_nan=True"),
        ("bool not in kinds", "bool in kinds"),
        ("else [value]", "else []"),
    ],
    "engine/config._known_keys": [
        ("if key in _OWN_KEYS:", "if value in ():"),
        ("if key not in _SECTIONS + _VALUES:", "if key in ():"),
        ("if key in _SECTIONS and", "if key in _VALUES and"),
        ('"stage" in given', '"stag" in given'),
    ],
    "files.write_atomically": [
        ("os.fsync(file.fileno())", "file.fileno()"),
        ("sync(path.parent)", "path.parent"),
        ('"backslashreplace"', '"replace"'),
        ("aside.unlink(missing_ok=True)", "aside"),
    ],
    "files.printable": [
        ("or c in keep", "and c in keep"),
        ("if text.isprintable", "if text.isascii"),
    ],
}
