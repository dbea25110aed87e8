"""The GPU's commands: which tests look at a file, and the tokens that are changed in it."""

CHILDREN, COMMANDS = "tests/bench/test_gpu_children.py", "tests/bench/test_gpu.py"

TESTS = {
    "bench/gpu/children": (CHILDREN, "not pytest"),
    "bench/gpu/watched": (CHILDREN, "not pytest"),
    "bench/gpu/plugin": (CHILDREN, "pytest"),
    "bench/gpu/lines": (CHILDREN, "damaged"),
    "bench/gpu/tuning": (COMMANDS, "chosen or hopeless"),
    "bench/gpu/carried": (COMMANDS, "cache"),
    "bench/gpu/summary": (COMMANDS, "summary"),
    "bench/gpu/steps": (COMMANDS, "verdict or later or shares or names or rehearsal"),
    "bench/gpu/__main__": (COMMANDS, "command_leaves or pass_is or lacks"),
    "bench/gpu/times": (COMMANDS, "rehearse"),
    "bench/gpu/train": (COMMANDS, "rehearse"),
}

MUTATIONS = {
    "bench/gpu/children.listen": [
        ('line["n"] + 1', 'line["n"] + 2'),
        ('line["child"] != ', "None is "),
    ],
    "bench/gpu/children.finish": [("os.killpg(self.process.pid", "os.kill(self.process.pid")],
    "bench/gpu/children.step": [
        ("silent <= self.patience", "silent <= 0"),
        ("refused or self.done", "self.done"),
        ("elif not self.lost", "elif self.lost"),
        ("self.tries >= TRIES", "self.tries > TRIES"),
    ],
    "bench/gpu/children.blame": [("self.next + 1, 0", "self.next + 2, 0")],
    "bench/gpu/children.close": [("self.names[self.next :]", "self.names[: self.next]")],
    "bench/gpu/watched.end": [('{"lost": True} if lost', "{} if lost"), ("os._exit(LOST)", "pass")],
    "bench/gpu/watched.run": [
        ("if n < watch.skip", "if n <= watch.skip"),
        ('found.pop("why", "")', '""'),
    ],
    "bench/gpu/plugin.pytest_collection_modifyitems": [
        ("items[part::parts]", "items[part:]"),
        ("del items[: watch.skip]", "del items[: watch.skip + 1]"),
    ],
    "bench/gpu/plugin.pytest_runtest_makereport": [('state["error"] is None', "False")],
    "bench/gpu/lines.new": [('text.rfind(b"\\n") + 1', "len(text)"), ("continue", "break")],
    "bench/gpu/tuning.candidates": [
        ("(variant.safe, *others)", "(*others, variant.safe)"),
        ("variant.tried(arch)", "variant.candidates"),
    ],
    "bench/gpu/tuning.run": [
        ("mine.status != OK or wrong", "mine.status != OK"),
        ("self.hopeless:\n            return", "():\n            return"),
    ],
    "bench/gpu/tuning.chosen": [
        ("GAIN * (safe.ms or 0.0)", "(safe.ms or 0.0)"),
        ("if not of_class[True]", "if not of_class"),
        ('line["ok"] and', ""),
    ],
    "bench/gpu/carried.judge": [
        ('carried["sources"] == here["sources"]', "True"),
        ('carried["key"] == here["key"]', "True"),
    ],
    "bench/gpu/carried.adopt": [('lambda: carried["key"]', "cache.triton_key")],
    "bench/gpu/summary.summary": [("98 - len(said)", "980 - len(said)")],
    "bench/gpu/summary._enqueued": [("1e3 *", "1e6 *")],
    "bench/gpu/steps.judge_sanitizer": [("code == 0 and", ""), ("bool(errors) and", "")],
    "bench/gpu/steps.second": [("Phase(tuple(watched), 0.45)", "Phase(tuple(watched), 0.0)")],
    "bench/gpu/__main__.run_command": [
        ("- (time.time() - began)", ""),
        ("fnmatchcase(child.name, args.only)", "True"),
    ],
    "bench/gpu/__main__._is_bad": [("unreached or", "")],
    "bench/gpu/times.use_table": [("tune.merge(old, new)", "new")],
    "bench/gpu/times.measure": [("rivals=RIVALS", 'rivals=frozenset({"compile"})')],
    "bench/gpu/train._loop": [("optimizer.step()", "pass")],
}
