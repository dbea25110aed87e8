import pytest

from fastssl.bench.cases import precision


def test_prints_what_rounding_costs(monkeypatch, capsys):
    monkeypatch.setattr(precision, "SHAPES", ((24, 40),))
    monkeypatch.setattr(precision._train, "__defaults__", (3,))
    precision.main()
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert len(rows) == 12
    found = {(row[1], row[2]): float(row[4]) for row in rows}
    for kind in precision.INPUTS:
        assert found[kind, "float32"] == pytest.approx(2e-3, abs=1.1e-3)  # bfloat16's own rounding
        assert found[kind, "float32"] <= found[kind, "bfloat16"] <= 1.5 * found[kind, "autocast"]
