"""The house's own rules: which room may import which, what stays private, and no circles.

Imports are read from the source, those inside functions and under TYPE_CHECKING included, and so
are modules named in a string ("fastssl.engine.optim").
"""

import ast
import re
import sys
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
# room: the rooms it may import beside itself, and libraries beyond the standard one and torch.
# A module belongs to the room with the longest name that fits; `*` is any library.
ROOMS = {
    "distributed": "",
    "random": "numpy",
    "schedules": "registry section pydantic pydantic_core",
    "files": "",
    "section": "pydantic pydantic_core",
    "tree": "",
    "pieces": "",
    "registry": "pydantic pydantic_core",
    "masking": "random",
    "kernels": "kernels.* distributed triton",
    "kernels.common": "distributed triton",
    "kernels.pairwise": "kernels.common triton",
    "kernels.correlation": "kernels.common distributed triton",
    "kernels.patches": "kernels.common triton",
    "kernels.tokens": "kernels.common triton",
    "kernels.regression": "kernels.common triton",
    "losses": "kernels distributed random",
    "models": "kernels masking distributed pieces registry timm safetensors",
    "methods": "models losses kernels masking random schedules section registry pydantic",
    "data": "random distributed files section registry *",
    "engine": "models distributed pieces random schedules section files tree registry "
    "deepspeed timm pydantic safetensors numpy psutil",
    "evaluate": "data kernels random distributed sklearn numpy",
    "report": "files *",
    "config": "methods models engine data schedules section registry pydantic yaml",
    "export": "config engine data evaluate models files safetensors timm numpy",
    "run": "random tree pieces section config engine data methods evaluate report models "
    "distributed export files *",
    "diagnose": "random tree run config engine data methods kernels models distributed *",
    "bench": "methods models losses kernels masking engine data report files *",
    "cli": "config run diagnose data export files registry bench *",
    "__main__": "cli",
    "__init__": "methods models data engine schedules run",
}
ONLY_IN = {"deepspeed": "engine", "timm": "models engine export bench", "nvidia": "data.render"}


def name_of(path: Path) -> str:
    """A file's module without the leading `fastssl.`; kernels/ and bench/ are packages of it."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[1:] if parts[0] == "fastssl" else parts).removesuffix(".__init__")


FILES = {
    name_of(path): path
    for top in ("fastssl", "kernels", "bench")
    for path in sorted((ROOT / top).rglob("*.py"))
}


def imports(name: str) -> set[str]:
    """What a module imports: ours without `fastssl.`, with the name taken from it."""
    path, found = FILES[name], set()
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = ["fastssl", *filter(None, package.split("."))]
            base = above[: len(above) - node.level + 1] if node.level else []
            origin = ".".join([*base, *filter(None, [node.module])])
            found |= {f"{origin}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= set(re.findall(r"^fastssl(?:\.\w+)+$", node.value))
    return found


def module_of(dotted: str) -> str:
    """The module that a dotted name of ours lies in."""
    name = dotted.removeprefix("fastssl.")
    while name not in FILES and "." in name:
        name = name.rpartition(".")[0]
    return name if name in FILES else "__init__"


def room_of(name: str) -> str:
    """The room of a module: the longest entry of the table that it lies under."""
    parts = name.split(".")
    rooms = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((room for room in rooms if room in ROOMS), "")


def fits(name: str, rooms: list[str]) -> bool:
    """Whether a dotted name is one of the rooms, or lies in one."""
    return any(f"{name}.".startswith(room.removesuffix("*").rstrip(".") + ".") for room in rooms)


def test_each_room_imports_what_the_table_allows():
    wrong = []
    for name in FILES:
        room = room_of(name)
        assert room, f"{name} has no room: give it one, or a line in ROOMS"
        allowed = ROOMS[room].split()
        for dotted in imports(name):
            top = dotted.split(".")[0]
            if top == "fastssl":
                fine = dotted == "fastssl.__version__" or fits(module_of(dotted), [room, *allowed])
            elif top in ONLY_IN and not fits(name, ONLY_IN[top].split()):
                fine = False
            else:
                fine = top in {"torch", *allowed, *sys.stdlib_module_names} or "*" in allowed
            if not fine:
                wrong.append(f"{name} imports {dotted}")
    assert not wrong, "\n".join(sorted(wrong))


def test_no_name_with_an_underscore_leaves_its_package():
    wrong = []
    for name in FILES:
        for dotted in imports(name):
            private = re.match(r"fastssl\.(.*\.)?_[a-z]", dotted)
            if private and not fits(name, [(private[1] or name).rstrip(".")]):
                wrong.append(f"{name} imports {dotted}")
    assert not wrong, "\n".join(sorted(wrong))


def test_no_attribute_of_deepspeed_is_read_outside_of_the_engine():
    wrong = []
    for name in FILES:
        if fits(name, ["engine"]):
            continue
        for node in ast.walk(ast.parse(FILES[name].read_text())):
            read = getattr(node, "attr", getattr(node, "value", None))
            if isinstance(read, str) and re.fullmatch(r"ds|ds_[a-z_]+", read):
                wrong.append(f"{name} reads {read}")
    assert not wrong, "\n".join(sorted(wrong))


def test_no_module_imports_itself_by_way_of_others():
    graph = {}
    for name in FILES:
        ours = {module_of(dotted) for dotted in imports(name) if dotted.startswith("fastssl.")}
        graph[name] = ours - {name, "__init__"}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_every_mutation_has_its_token_in_the_code(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests"))
    import mutate

    for mutation in mutate.mutations():
        mutate.found(mutation, ROOT)  # exits, naming it, where the code has moved on
