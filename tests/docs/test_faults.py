"""docs/faults.md names tests that there are, one in each row."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_fault_has_its_test():
    page = (ROOT / "docs/faults.md").read_text()
    rows = re.findall(r"^\| (?!fault|---)(.*) \|$", page, re.MULTILINE)
    assert len(rows) > 20
    for row in rows:
        *cells, test = re.split(r" *\| *", row)
        assert len(cells) == 3, row
        file, name = re.fullmatch(r"`(tests/[\w/]+\.py)::(test_\w+)`", test).groups()
        assert re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.MULTILINE), test
