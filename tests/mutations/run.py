"""Runs: which tests look at a file, and the tokens that are changed in it."""

TRAIN = "tests/train/test_train.py"
DATA = "tests/data/test_same_data.py"

TESTS = {
    "run/train": (
        f"{TRAIN} tests/train/test_resume.py tests/methods/test_methods.py {DATA}",
        "skipping_ends or never_the_best or rank_leaves or signals_ask or one_image or padding"
        " or short_batch or not_come or no_trace or by_the_clock or with_its_weights"
        " or first_rank_says or second_interrupt or goes_back or no_way_back or is_no_best",
    ),
    "run/build": (
        f"tests/methods/test_methods.py {DATA} tests/test_plugins.py tests/models/test_deferred.py"
        " tests/methods/test_distill.py",
        "one_image or short_batch or cannot_wait or resumes_with_it",
    ),
    "run/rehearsal": ("tests/test_given.py", "wrong_is_told"),
    "run/directory": (
        f"{DATA} {TRAIN} tests/train/test_damage.py tests/test_given.py",
        "wrong_is_told or other_data or may_lie or going_on or directory_in or that_is_a_file"
        " or by_leave or can_start",
    ),
    "run/evaluation": (DATA, "mostly_bad"),
    "run/collapse": ("tests/train/test_collapse.py", "sentence or lasts or must_last"),
    "run/spikes": (f"{TRAIN} fastssl/run/spikes.py", "whole_window or goes_back or spikes"),
    "run/restarts": ("tests/train/test_restarts.py", "nothing_else"),
    "run/trace": ("tests/engine/test_engine.py", "breakdown"),
    "run/log": (TRAIN, "log_is_json or skipping_ends"),
}

MUTATIONS = {  # place: (what stands in it or below, what it becomes)
    "run/trace.traced": [("wait=SKIPPED - 1", "wait=SKIPPED")],
    "run/build.begin": [("deferred.refused is None and", "")],
    "run/build.build": [("cfg.batch_size == cfg.engine", "cfg.batch_size < cfg.engine")],
    "run/build.start_teacher": [("None, True, said", "None, True, None")],
    "run/build.check_steps": [
        ("max(2 if couples", "max(1 if couples"),
        ("parts * (2 if alone or", "parts * (1 if alone or"),
    ],
    "run/train.without_padding": [("leaf[:rows]", "leaf[: rows + 1]")],
    "run/train.agreed": [
        ("if vote == LEAVE", "if vote != LEAVE"),
        ("best=False", "best=True"),
    ],
    "run/train.should_stop": [
        ("            heart.beat()", "            pass"),
        ("or bool(self.stalled)", "or False"),
        ("self.readers.show()", "self.readers"),
    ],
    "run/train.time_to_save": [
        ("60 * minutes", "minutes"),
        ("and distributed.rank() == 0", "and True"),
    ],
    "run/train.save": [("time.monotonic()", "self.saved_at"), ("asdict(", "vars(")],
    "run/train.train": [
        ("* distributed.world_size()", "* self.cfg.batch_size"),
        ("state.applied.add(step, self.cfg.engine)", "state.applied"),
    ],
    "run/collapse.symptoms": [
        ("value < STD", "value <= 1"),
        ('f"{prefix}loss" in number', "prefix"),
        ("<= NEAR * value", "<= NEAR"),
        ('and row.get("kind") == "eval"', "and True"),
        (">= STD", ">= 0"),
    ],
    "run/collapse._teacher": [("- kl", "+ kl"), ("(1 - NEAR) * chance", "NEAR * chance")],
    "run/collapse.read": [("self.since.get(key, step)", "step"), ("self.rows.get(key, 0)", "0")],
    "run/collapse._lasts": [(">= ROWS", ">= 1"), ("STEPS)", "total)")],
    "run/collapse._new": [("self.said += fresh", "pass")],
    "run/spikes.add": [("del kept[: -cfg.spike_window]", "kept"), ("kept.clear()", "pass")],
    "run/spikes.limits": [
        (">= cfg.spike_window:", ">= 1:"),
        ("max(spread, abs(middle) / 100)", "spread"),
        ("1.4826 * median", "1.4826 * max"),
    ],
    "run/spikes.stretch_of": [("spike - back", "spike - back + 1")],
    "run/spikes.is_left_out": [("step <= last", "step < last")],
    "run/spikes.goes_until": [("if first > step", "if first >= step")],
    "run/spikes.in_a_row": [("[0] - 1", "[0]")],
    "run/train.stream": [("self.progress.left_out)", "[])")],
    "run/train.pass_over": [
        (
            "state.skipped, passed = state.step + 1, state.skipped + 1",
            "0, passed = state.step + 1, 0",
        ),
        ("% self.steps_per_epoch == 0", "< 0"),
    ],
    "run/train.go_back": [
        ("until=first - 1", "until=first"),
        ("self.checkpoints.forget(saved.step)", "None"),
        ("self.waits.follow(self.stream())", "None"),
    ],
    "run/train.take_up": [("self.log.cut(saved.step)", "None"), ("saved.best = None", "None")],
    "run/restarts.after_restart": [
        ('if cfg.resume == "never" else cfg.resume', "if True else 0"),
        ('"overwrite": False', '"overwrite": cfg.overwrite'),
    ],
    "run/restarts._is_restart": [
        ('if saved["process"] == now["process"]', "if False"),
        ('bool(now["job"][1]) and', "True and"),
        ('saved["restarts"] < now["restarts"]', "True"),
    ],
    "run/directory.extension": [
        ("min(step, total - 1)", "step - 1"),
        ("if not changed", "if False"),
    ],
    "run/directory.undo": [("self.written and", "False and")],
    "run/train.leave": [
        ("if stalled else self", "if not stalled else self"),
        ("nullcontext() if stalled", "nullcontext() if True"),
    ],
    "run/train.prepare": [
        ("distributed.from_first(", "(lambda look: look())("),
        (".latest() is not None", " is not None"),
    ],
    "run/train.go": [
        ("if not self.taken_up", "if True"),
        ("if self.checkpoints.writing()", "if not self.checkpoints.writing()"),
    ],
    "run/train.resume": [("and self.cfg.begins_from_weights()", "and False")],
    "run/train.improves": [
        ("or not math.isfinite", "or math.isnan(0) and math.isfinite"),
        ("value <= self", "value < self"),
        ('if name == "loss"', 'if name != "loss"'),
    ],
    "run/train.refuse": [
        ("state.skipped_in_row, returns) < most", "state.skipped_in_row, returns) <= most"),
        ("state.skipped_in_row, returns) <", "state.skipped_in_row, 0) <"),
        ("min(cfg.max_skipped", "max(cfg.max_skipped"),
        ("state.skipped + 1", "state.skipped"),
        ("images=indices", "images=indices[:16]"),
        ('if last else "none yet"', "if not last else last"),
    ],
    "run/train._Signals": [
        ("signal.SIGUSR1", "signal.SIGUSR2"),
        ("signal.signal(number, handler)", "signal.getsignal(number)"),
        ("!= signal.SIG_IGN", "== signal.SIG_IGN"),
        ("asked_to_stop = True", "asked_to_stop = False"),
    ],
    "run/directory._locked": [
        ("path.unlink(missing_ok=True)", "path"),
        ("fcntl.LOCK_EX", "fcntl.LOCK_SH"),
    ],
    "run/directory.prepared": [
        ("except OSError as error", "except EOFError as error"),
        ("except BaseException", "except Exception"),
    ],
    "run/directory._changed": [
        ('== "allow"', '== "refuse"'),
        ('"same_data": same or allowed', '"same_data": allowed'),
        ("or before is None or same", "or before is not None or same"),
        ("if counts[0] != counts[1]", "if counts[0] == counts[1]"),
    ],
    "run/directory._prepare": [
        ("and _replaced(cfg).is_dir()", "and False"),
        ('{"changed": "refuse"}', '{"changed": "allow"}'),
        ("if data is not None:", "if data is None:"),
    ],
    "run/evaluation.evaluate_on": [
        ("len(bad) > cfg.data.max_bad", "len(bad) < cfg.data.max_bad"),
        ("if unreadable:", "if not unreadable and not problem:"),
    ],
    "run/rehearsal.rehearse": [("before.restore()", "before")],
    "run/rehearsal._called": [("raise _Unknown from error", "raise")],
    "run/rehearsal._once": [('check_rows(method, "encode", encoded, ROWS)', "None")],
    "run/directory.Place": [("if self.begun or not self.made", "if True or not self.made")],
    "run/log.cut": [('row["step"] <= step', 'row["step"] < step')],
    "run/log.finite": [("None for k", "0 for k")],
    "run/log.bad_images": [("map(printable, e)", "e")],
}
