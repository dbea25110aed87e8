"""Do the tests notice a wrong line?  One token at a time is changed in a copy of the tree.

    python tests/mutate.py                  all of it; writes tests/mutations.md
    python tests/mutate.py --new            those that tests/mutations.md does not have; adds them
    python tests/mutate.py losses/ntxent    of these files or folders; with --new too

Each mutation must make at least one test of its place fail.  One that does not ends the command
with 1: then the tests have a hole, or the token does nothing.  The mutations stand in
tests/mutations/, a file a room.  Libraries are imported once, and each mutation runs in a fork.
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import sys
import tempfile
import traceback
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
REPORT = ROOT / "tests" / "mutations.md"
TABLES = sorted(path.stem for path in (ROOT / "tests/mutations").glob("[a-z]*.py"))
# What a test process imports besides the project: once, here, before anything is forked.
LIBRARIES = "torch triton numpy pytest lightly.loss open_clip.loss"  # not pytest's plugins
LIBRARIES += " pytorch_metric_learning.losses pydantic yaml typer rich"
HEAVY = "torchvision.transforms.v2 timm deepspeed sklearn.linear_model matplotlib.figure"
TITLE = """# Mutations

Each line is one token changed, and the first test that then fails, as
`python tests/mutate.py` found them.

| place | was | became | first failure |
| --- | --- | --- | --- |""".splitlines()
LIMIT = 300  # seconds of one mutation; a hang is noticed too
MEMORY = 32 << 30  # bytes of one: DeepSpeed reserves 2 GB an engine
NO_TESTS = 5  # pytest's exit code


class Mutation(NamedTuple):
    """The first `old` at or after `def NAME(` or `class NAME` of a file becomes `new`."""

    place: str  # path without .py, a dot, and the name
    old: str
    new: str
    tests: str  # files, for a run of pytest
    only: str  # and an expression for its -k

    @property
    def file(self) -> str:
        return self.place.rpartition(".")[0] + ".py"


def mutations() -> Iterator[Mutation]:
    """All of them: each table has TESTS {path: (files, -k)} and MUTATIONS {path.name: [pairs]}."""
    for name in TABLES:
        table = import_module(f"mutations.{name}")
        for place, pairs in table.MUTATIONS.items():
            path = place.rpartition(".")[0]
            known = [key for key in table.TESTS if f"{path}/".startswith(key.rstrip("/") + "/")]
            for old, new in pairs:
                yield Mutation(place, old, new, *table.TESTS[max(known, key=len)])


def copy_tree(folder: Path) -> None:
    """The project as it is installed, so that a path in front of all others is enough to use it."""
    skip = shutil.ignore_patterns("results")
    shutil.copytree(ROOT / "fastssl", folder / "fastssl")
    for top in ("kernels", "bench"):
        shutil.copytree(ROOT / top, folder / "fastssl" / top, ignore=skip)
    shutil.copytree(ROOT / "tests", folder / "tests")
    shutil.copytree(ROOT / "docs", folder / "docs")
    shutil.copy(ROOT / "pyproject.toml", folder)


def found(mutation: Mutation, folder: Path) -> tuple[Path, str, int]:
    """The file below `folder`, what it holds, and where in that the mutation's token stands."""
    path = folder / mutation.file
    if not path.is_file():
        path = folder / "fastssl" / mutation.file
    source, name = path.read_text(), mutation.place.rpartition(".")[2]
    starts = [source.find(f"{word} {name}{end}") for word in ("def", "class") for end in "(:"]
    start = min((at for at in starts if at >= 0), default=0 if name == "*" else -1)
    at = source.find(mutation.old, start)
    if start < 0 or at < 0:
        raise SystemExit(f"{mutation.place} has no {mutation.old!r}")
    return path, source, at


def mutate(mutation: Mutation, folder: Path) -> tuple[Path, str]:
    """Change the file in the copy; return its path and what it held."""
    path, source, at = found(mutation, folder)
    path.write_text(source[:at] + mutation.new + source[at + len(mutation.old) :])
    return path, source


def start(mutation: Mutation, folder: Path, log: Path) -> int:
    """Run the mutation's tests in a fork, and return its process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 70  # pytest did not start
    try:
        os.setpgid(0, 0)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.chdir(folder)
        os.environ |= {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
        sys.path[:0] = [str(folder)]
        import pytest

        argv = ["-x", "-q", "-p", "no:cacheprovider", "--no-header", "--tb=no"]
        argv += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # of what LIBRARIES imported
        only = ["-k", mutation.only] if mutation.only else []
        code = int(pytest.main([*argv, *mutation.tests.split(), *only]))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def finish(pid: int) -> int:
    """The exit code of a fork, negative for a signal; one that hangs is killed."""
    import signal
    import time

    limit = time.monotonic() + LIMIT
    while time.monotonic() < limit:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return -signal.SIGKILL


def first_failure(code: int, log: Path) -> str:
    """The test that noticed, or SURVIVED: a crash is noticed too, a missing file is not."""
    lines = log.read_text(errors="replace").splitlines()
    failed = [x for x in lines if x.startswith("FAILED") or x.startswith("ERROR") and "::" in x]
    if code < 0:
        return f"ended with {code}"
    if code == 1 or failed:
        if not failed:
            return f"ended with {code}"
        return failed[0].partition(" ")[2].partition(" - ")[0].rpartition("::")[2]
    if code == 70 and any("PytestUnraisable" in line for line in lines):
        return "at the end"
    if code not in (0, 2):
        raise SystemExit(f"pytest ended with {code}: " + " ".join(lines[-3:]))
    # What the tests import is broken: noticed, if it is the mutated tree that is.
    return "at import" if any("rror" in x for x in lines) and code == 2 else "SURVIVED"


def head(mutation: Mutation) -> str:
    """What the mutation's line of the report begins with: the place, and the two tokens."""
    old, new = (" ".join(text.split()).replace("|", "\\|") for text in mutation[1:3])
    return f"| `{mutation.place}` | `{old}` | `{new}` |"


def row(mutation: Mutation, folder: Path, report: str) -> str:
    """The mutation's line of the report; it ends in SURVIVED when no test failed.

    The test that noticed it when `report` was made is tried alone first.
    """
    log, noticed = folder / "mutation.log", "SURVIVED"
    before = re.search(re.escape(head(mutation)) + r" (test_\w+)", report)
    path, source = mutate(mutation, folder)
    try:
        for only in (*(before.groups() if before else ()), mutation.only):
            code = finish(start(mutation._replace(only=only), folder, log))
            if code != NO_TESTS or only == mutation.only:
                noticed = first_failure(code, log)
            if noticed != "SURVIVED":
                break
    finally:
        path.write_text(source)
    return f"{head(mutation)} {noticed} |"


def write(rows: list[str]) -> None:
    """The report with these lines, and of all other mutations the lines that it had."""
    had = REPORT.read_text().splitlines() if REPORT.exists() else []
    of = ([line for line in (*rows, *had) if line.startswith(head(m))] for m in mutations())
    REPORT.write_text("\n".join([*TITLE, *(lines[0] for lines in of if lines)]) + "\n")


def main() -> int:
    sys.path.insert(0, str(ROOT / "tests"))
    sys.dont_write_bytecode = True  # a mutation may leave a file's size and time as they were
    os.environ.setdefault("TRITON_INTERPRET", "1")
    parts = [part for part in sys.argv[1:] if part != "--new"]
    new = len(parts) < len(sys.argv) - 1
    report = REPORT.read_text() if REPORT.exists() else ""
    wanted = [m for m in mutations() if not parts or any(part in m.place for part in parts)]
    wanted = [m for m in wanted if not new or head(m) not in report]
    heavy = any(not m.place.startswith(("kernels", "losses")) for m in wanted)
    for name in (LIBRARIES + f" {HEAVY}" * heavy).split():
        import_module(name)
    import torch

    torch.set_num_threads(1)
    lines: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        copy_tree(Path(folder))
        for mutation in wanted:
            lines.append(row(mutation, Path(folder), report))
            print(lines[-1], flush=True)
            if new or not parts:
                write(lines)
    survivors = sum(line.endswith("SURVIVED |") for line in lines)
    print(f"{len(wanted)} mutations, {survivors} survived")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main())
