"""The registry: names are taken once, patterns must match, unknown sizes are refused."""

import pytest
import torch

from fastssl.bench import registry
from fastssl.bench.cases import all_cases, select
from fastssl.bench.registry import GRID, SIZES, Sweep, case


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    monkeypatch.setattr(registry, "_cases", dict(all_cases()))


def make(shape, dtype, device):
    """A case of the test's.

    More of it.
    """


def other(shape, dtype, device):
    """Another."""


def test_a_case_is_registered_under_a_name_of_its_own():
    assert case("mine", test="t", shapes={"quick": [{"N": 1}]})(make) is make
    assert all_cases()["mine"].about == "A case of the test's."
    case("mine", test="t", shapes={})(make)  # the same function: its module came by another name
    with pytest.raises(
        ValueError, match="case 'mine' is registered twice, in .*test_registry.py and"
    ):
        case("mine", test="t", shapes={})(other)


def test_unknown_sizes_are_refused():
    with pytest.raises(ValueError, match=r"got \['huge'\] in case 'mine'"):
        case("mine", test="t", shapes={"huge": []})
    with pytest.raises(ValueError, match=r"got \['tiny'\]"):
        case("mine", test="t", shapes={}, sweeps={"tiny": []})


def test_cases_are_selected_by_pattern():
    names = [c.name for c in select(["train-*", "ntxent"])]
    assert names == ["ntxent", "train-simclr", "train-barlow-twins", "train-mae", "train-mae-large"]
    assert [c.name for c in select([])] == list(all_cases())
    with pytest.raises(ValueError, match="no case is called 'unheard-of'; there are ntxent, "):
        select(["unheard-of"])
    with pytest.raises(ValueError, match="'ntxnt'; did you mean 'ntxent'. there are"):  # fault 26
        select(["ntxnt"])


def test_a_family_is_selected_by_its_first_words():
    family = [name for name in all_cases() if name.startswith("data-")]
    assert len(family) > 3 and [c.name for c in select(["data"])] == family
    jpegs = [name for name in family if name.startswith("data-jpeg-")]
    assert [c.name for c in select(["data-jpeg", "ntxent"])] == ["ntxent", *jpegs]
    assert [c.name for c in select(["clip"])] == ["clip"]
    with pytest.raises(ValueError, match="no case is called 'dat'"):
        select(["dat"])


def test_a_case_of_a_familys_name_is_that_case():
    case("data", test="t", shapes={})(make)
    assert [c.name for c in select(["data"])] == ["data"]


def test_every_case_has_shapes_of_some_size_and_a_sentence():
    for one in all_cases().values():
        assert one.about.endswith(".") and set(one.shapes) <= {*SIZES, GRID} and one.shapes


def test_a_sweep_frees_one_side():
    assert Sweep("B", (1, 2), {"D": 3}).shapes() == [{"D": 3, "B": 1}, {"D": 3, "B": 2}]


def test_the_gate_cuts_the_sides_it_names_alone():
    """The others choose the schedule that is timed."""
    shapes = {"quick": [{"B": 100, "D": 768}]}
    made = case("gated", test="t", shapes=shapes, gate_shape={"B": 10}, gpu_gate_shape={"B": 50})
    made(lambda *_: pytest.fail("made"))
    gated, (shape,) = registry._cases.pop("gated"), shapes["quick"]
    assert gated.gate(shape, torch.device("cpu")) == {"B": 10, "D": 768}
    assert gated.gate(shape, torch.device("cuda")) == {"B": 50, "D": 768}
    assert gated.gate({"B": 4, "D": 8}, torch.device("cpu")) == {"B": 4, "D": 8}
