"""The page: valid, self-contained, escaped, and whole whatever pieces of a run are there."""

import base64
import sys
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from fastssl import files
from fastssl.bench.record import Ceiling, Run
from fastssl.bench.report import figures, page
from fastssl.bench.report.figures import Picture
from fastssl.bench.report.published import PUBLISHED, quote
from tests.bench import sample

VOID = {"meta", "link", "img", "br"}
PNG = b"\x89PNG not really"


class Page(HTMLParser):
    """Fails on unbalanced tags; collects what a browser would load, follow or show."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.loaded, self.links, self.text = [], [], [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loaded += [v for k, v in attrs if k in ("src", "srcset", "action", "data")]
        self.links += [v for k, v in attrs if k == "href" and tag == "a"]
        assert not [k for k, _ in attrs if k.startswith("on")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "title"} & set(self.open):
            self.text += data


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """The pictures are tested elsewhere; here they are five bytes."""
    picture = Picture("roofline-float32", "Roofline", "A caption.", PNG)
    monkeypatch.setattr(figures, "pictures", lambda run: [picture] if run.results else [])


def written(tmp_path, run):
    path = page.write_page(run, tmp_path / "deep" / "index.html")
    assert [p.name for p in path.parent.iterdir()] == ["index.html"]
    return Page(path.read_text(encoding="utf-8"))


def test_it_says_everything(tmp_path):
    found = written(tmp_path, sample.run())
    said = " ".join(found.text.split())
    for words in (
        "fastssl bench · Imaginary GPU, torch 2.15.0, triton 3.9.0 · 2026-11-20",
        "fastssl is faster in 8, ties in 1 and is slower in 1. In 1 more it has no time.",
        "Wrong or failed: pytorch-metric-learning in ntxent, fastssl in siglip.",
        "python -m fastssl.bench ntxent 'clip*'",
        "It took 1 min 15 s.",
        "out of memory: CUDA out of memory. Tried 32 GiB",
        "tie 1.01",
        "gate: tests/test_ntxent.py; live at N=64",
        "Sweep, 7 shapes",
        "0.36 GB",
        "sm_90",
        "lightly 1.5.26",
        "N^2.00",
        "4800 GB/s",
        "No time without a right answer",
        "A caption.",
    ):
        assert words in said
    assert said.count("sweep of N") == 7  # in their fold, and only there
    assert found.links == ["https://x.org/1?a=b&c"]


def test_it_loads_nothing_and_runs_nothing(tmp_path):
    found = written(tmp_path, sample.run())
    assert found.loaded == ["data:image/png;base64," + base64.b64encode(PNG).decode()]
    assert not {"script", "iframe", "object", "form"} & set(found.tags)


def test_every_text_is_escaped(tmp_path):
    def evil(thing):
        strings = {k: sample.EVIL for k, v in vars(thing).items() if isinstance(v, str)}
        return replace(thing, **strings | ({"status": "wrong"} if "status" in strings else {}))

    timed = [replace(evil(r), status="ok", shape={sample.EVIL: 1}) for r in sample.fixed_rows()[:3]]
    run = sample.run(
        conditions={key: sample.EVIL for key in sample.CONDITIONS if key != "versions"}
        | {"versions": {sample.EVIL: sample.EVIL}},
        ceilings=[evil(c) for c in sample.CEILINGS],
        results=[evil(r) for r in sample.fixed_rows()] + timed,
        published=[evil(p) for p in sample.run().published],
    )
    found = written(tmp_path, run)
    assert "script" not in found.tags and sample.EVIL in found.text
    text = (tmp_path / "deep" / "index.html").read_text()
    assert "<script" not in text and text.count("&lt;script&gt;") > 20


def test_a_source_that_is_no_web_address_is_no_link(tmp_path):
    (one,) = sample.run().published
    sources = ("javascript:alert(1)", 'https://x.org/"><b> (p. 1)')
    found = written(tmp_path, Run({}, published=[replace(one, source=s) for s in sources]))
    assert found.links == ['https://x.org/"><b>'] and "b" not in found.tags
    assert "javascript:alert(1)" in found.text and "(p. 1)" in found.text


def test_pieces_may_be_missing(tmp_path):
    found = written(tmp_path, Run({}))
    assert "This run was cut short: rows are missing." in found.text
    assert "Nothing was measured beside a rival." in found.text
    for heading in ("Measurements", "Published elsewhere", "Exponents", "Conditions", "repeat"):
        assert heading not in found.text
    assert "table" not in found.tags and "img" not in found.tags
    whole = written(tmp_path, sample.run())
    assert "cut short" not in whole.text


def test_without_matplotlib_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    found = written(tmp_path, sample.run())
    assert "The pictures are left out: matplotlib was not installed." in found.text
    assert "img" not in found.tags


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = page.write_page(sample.run(), tmp_path / "index.html")
    old = path.read_text()

    def full(descriptor):
        raise OSError("no space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        page.write_page(Run({}), path)
    assert path.read_text() == old and len(list(tmp_path.iterdir())) == 1


def test_published_figures_have_a_source_and_find_their_cases():
    assert quote() == list(PUBLISHED) and len(set(PUBLISHED)) == len(PUBLISHED)
    for row in PUBLISHED:
        assert row.source.startswith("https://") and row.figure and row.hardware and row.shape
    assert {row.case for row in quote(["train-simclr"])} == {
        "train-barlow",
        "train-dino",
        "train-mae",
    }
    assert {row.case for row in quote(["clip_sweep", "ntxent"])} == {"clip"}
    assert quote(["ntxent"]) == [] and quote([]) == []


def test_a_slow_machine_has_its_ceilings_in_gflops(tmp_path):
    slow = [Ceiling("matmul float32", 0.05, "TFLOP/s", 0.1, "a datasheet")]
    said = written(tmp_path, sample.run(ceilings=slow)).text
    assert "50.0 GFLOP/s" in said and "100 GFLOP/s" in said and "50 %" in said
