"""The house's own rules, as CONTRIBUTING.md states them: who imports whom, and sizes."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = [p for top in ("fastssl", "kernels", "bench") for p in sorted((ROOT / top).rglob("*.py"))]
# Each layer may import from its own package and from lower levels; level 0 is the ground.
LEVELS = [
    {"distributed", "draws", "masking", "schedules"},
    {"kernels"},
    {"losses", "models"},
    {"data", "methods", "evaluate", "report", "engine"},
    {
        *("train", "config", "results", "rundir", "embedding", "runlog", "plan", "export"),
        *("doctor", "bottleneck", "sheets"),
    },
    {"bench"},
    {"cli", "progress", "__main__"},
]
# Part of the same level, but a package of its own may not look into its neighbours.
ALONE = {"data", "methods", "evaluate", "report", "engine", "losses", "models"}
ONLY_IN = {"deepspeed": ("engine",), "nvidia": ("data",)}
ONLY_IN["timm"] = ("models", "engine", "export", "bench")  # bench: as a rival
TORCH_ONLY = {"kernels", "losses", "distributed", "draws", "masking"}
STDLIB_AND_TORCH = {"torch", "triton", "fastssl", *__import__("sys").stdlib_module_names}


def part(path: Path) -> str:
    relative = path.relative_to(ROOT)
    return relative.parts[0] if relative.parts[0] != "fastssl" else Path(relative.parts[1]).stem


def imports(path: Path) -> set[str]:
    """Dotted names of the modules a file imports, relative ones made absolute."""
    package = path.relative_to(ROOT).parts[:-1]
    package = package if package[:1] == ("fastssl",) else ("fastssl", *package)
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            name = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{name}.{alias.name}" for alias in node.names}
    return found


def level(name: str) -> int | None:
    return next((i for i, names in enumerate(LEVELS) if name in names), None)


def test_every_part_has_a_place():
    parts = {part(path) for path in FILES} - {"__init__"}
    assert parts == set().union(*LEVELS)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_import_goes_upward(path):
    me = part(path)
    if me == "__init__":
        return
    mine = level(me)
    assert mine is not None
    for name in imports(path):
        if not name.startswith("fastssl."):
            continue
        other = name.split(".")[1]
        theirs = level(other)
        assert theirs is not None, f"{me} imports {name}, which has no place"
        assert theirs <= mine, f"{me} imports {name}: upward"
        neighbours = theirs == mine and other != me and {me, other} & ALONE
        assert not neighbours, f"{me} imports its neighbour {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_heavy_libraries_stay_in_their_room(path):
    for name in imports(path):
        rooms = ONLY_IN.get(name.split(".")[0])
        assert rooms is None or part(path) in rooms, f"{part(path)} imports {name}"
        if part(path) in TORCH_ONLY:
            assert name.split(".")[0] in STDLIB_AND_TORCH, f"{part(path)} needs more than torch"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_sizes(path):
    source = path.read_text()
    assert len(source.splitlines()) <= 400
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        lines = (node.end_lineno or node.lineno) - node.lineno + 1
        kernel = any("jit" in ast.unparse(d) for d in node.decorator_list)
        assert lines <= (90 if kernel else 60), f"{node.name} has {lines} lines"
        given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        names = [a.arg for a in given if a.arg not in ("self", "cls", "impl")]
        assert kernel or len(names) <= 7, f"{node.name} has {len(names)} arguments"
