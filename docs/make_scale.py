"""The table of docs/scale.md: what `fastssl plan` says of each recipe that names its hardware.

python docs/make_scale.py            writes the table anew
"""

import json
import tempfile
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from fastssl import cli
from fastssl.config import recipes

PAGE = Path(__file__).parent / "scale.md"
BEGIN, END = "<!-- by docs/make_scale.py -->\n", "<!-- to here -->"
HEAD = """\
| recipe | planned for | parameters | batch | GiB a GPU | images/s | MFU | images | days |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""
_MARK = "# plan: "


def options(recipe: Path) -> list[str]:
    """What a recipe's `# plan:` line gives to `fastssl plan`; [] where it has none."""
    lines = recipe.read_text().splitlines()
    return next((line[len(_MARK) :].split() for line in lines if line.startswith(_MARK)), [])


def planned() -> dict[str, list[str]]:
    """The options of each recipe that has them, by its name."""
    return {name: own for name, path in recipes().items() if (own := options(path))}


def plan(name: str) -> dict[str, Any]:
    """The plan of a recipe for the hardware that it names, as `fastssl plan --json` writes it."""
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()):
        file = Path(folder) / "plan.json"
        words = ["plan", name, "data.source.path=/data", *planned()[name], "--json", str(file)]
        cli.app(words, standalone_mode=False)
        return json.loads(file.read_text())


def row(name: str, made: dict[str, Any]) -> str:
    """A recipe's line of the table."""
    batch = made["images_per_s"] * made["seconds"]["step"]
    cells = (
        f"`{name}`",
        f"{made['gpus']} x {made['gpu']['name']}",
        f"{made['parameters'] / 1e9:.2f} B",
        f"{batch:,.0f}",
        f"{made['memory']['peak'] / 2**30:.0f} of {made['memory']['capacity'] / 2**30:.0f}",
        f"{made['images_per_s']:,.0f}",
        f"{100 * made['mfu']:.0f} %",
        f"{made['steps'] * batch / 1e6:,.0f} M",
        f"{made['days']:.1f}",
    )
    return f"| {' | '.join(cells)} |\n"


def write() -> None:
    before, _, rest = PAGE.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    table = HEAD + "".join(row(name, plan(name)) for name in planned())
    PAGE.write_text(before + BEGIN + table + END + after)


if __name__ == "__main__":
    write()
