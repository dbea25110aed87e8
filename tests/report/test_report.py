"""The page: valid, self-contained, escaped, and whole whatever pieces of a run are there."""

import json
import re
from html.parser import HTMLParser

import pytest

from fastssl.report import read_metrics, write_report
from fastssl.report.words import headline, scaled

PNG = b"\x89PNG not really"
EVIL = "<script>alert('&')</script>"
VOID = {"meta", "link", "img", "br"}


class Page(HTMLParser):
    """Fails on unbalanced tags; collects what a browser would load, run or show."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.links, self.text = [], [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href", "srcset", "action", "data")]
        assert not [k for k, _ in attrs if k.startswith("on")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "title"} & set(self.open):
            self.text += data


def results(**change):
    rows = [
        {"encoder": "pretrained", "knn": 0.97, "linear": 0.981, "rankme": 61.25, "notes": ["odd"]},
        {"encoder": "random initialization", "knn": 0.91, "linear": 0.94, "rankme": 20.0},
        {"encoder": "raw input", "knn": 0.96, "linear": None},
    ]
    train = {"loss": 1.25, "steps": 1400, "seconds": 75.0, "peak_memory_bytes": 812e6}
    return {
        "method": "simclr",
        "source": "digits",
        "rows": rows,
        "train": train | {"bad_images": 3},
        "versions": {"torch": "2.15.0"},
        "command": "fastssl pretrain simclr-digits",
    } | change


def write(run, results=None, config=None, metrics=None, pictures=()):
    if results is not None:
        (run / "results.json").write_text(json.dumps(results))
    if config is not None:
        (run / "config.yaml").write_text(config)
    if metrics is not None:
        (run / "metrics.jsonl").write_text(metrics)
    for name in pictures:
        (run / f"{name}.png").write_bytes(PNG)
    path = write_report(run)
    assert path == run / "report.html"
    assert not [p for p in run.iterdir() if p.name.startswith(".")]
    return Page(path.read_text(encoding="utf-8"))


def test_a_whole_run(tmp_path):
    names = ["curves", "embedding", "embedding_random", "reconstructions", "views", "views-<b>"]
    event = {"kind": "event", "step": 7, "what": "bad_image", "detail": "a.jpg: truncated"}
    page = write(tmp_path, results(), "method: simclr", json.dumps(event) + '\n{"kin', names)
    for text in (
        "98.1\xa0%",
        "91.0\xa0%",
        "61.2",
        "1,400",
        "1 min 15 s",
        "774 MiB",
        "torch 2.15.0",
    ):
        assert text in page.text
    assert "fastssl pretrain simclr-digits" in page.text and "method: simclr" in page.text
    assert "1 × bad_image" in page.text and "step 7  bad_image  a.jpg: truncated" in page.text
    assert page.tags.count("img") == 6 and "Views of <b>" in page.text
    assert page.text.count("–") == 2  # raw input: no linear probe, no RankMe
    assert "odd" in page.text


def test_it_loads_nothing_and_runs_nothing(tmp_path):
    page = write(tmp_path, results(), "a: 1", "", ["curves", "views"])
    assert all(link.startswith("data:") for link in page.links) and len(page.links) == 3
    assert "script" not in page.tags
    assert not re.search(r"https?:|url\(|@import", (tmp_path / "report.html").read_text())


def test_every_text_is_escaped(tmp_path):
    evil_rows = [{"encoder": EVIL, "knn": 0.5, "notes": [EVIL]}]
    versions, event = {EVIL: EVIL}, {"kind": "event", "step": 7, "what": EVIL, "detail": EVIL}
    bad = results(method=EVIL, source=EVIL, rows=evil_rows, versions=versions, command=EVIL)
    page = write(tmp_path, bad, EVIL, json.dumps(event))
    assert "script" not in page.tags
    assert page.text.count(EVIL) == 11  # shown as it is written, everywhere


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"config": "a: 1"},
        {"pictures": ["embedding_random"]},
        {"results": {}},
        {"results": []},
        {"results": {"rows": "none", "train": [], "versions": 3}},
        {"results": {"rows": [3, {}, {"encoder": "pretrained"}], "train": {"loss": "high"}}},
        {"metrics": "not json\n3\n"},
    ],
)
def test_missing_and_misshapen_pieces_are_left_out(tmp_path, given):
    page = write(tmp_path, **given)
    assert "None" not in page.text and "nan" not in page.text
    assert "table" not in page.tags


def test_a_broken_results_file_is_said(tmp_path):
    (tmp_path / "results.json").write_text('{"method": ')
    assert "results.json could not be read" in write(tmp_path).text


def test_a_missing_directory_is_named(tmp_path):
    with pytest.raises(ValueError, match="run must be a directory, got .*nowhere"):
        write_report(tmp_path / "nowhere")


def test_a_write_that_fails_keeps_the_old_report(tmp_path, monkeypatch):
    write(tmp_path, results())
    before = (tmp_path / "report.html").read_text()

    def refuse(*paths):
        raise OSError("no space left on device")

    monkeypatch.setattr("fastssl.files.os.replace", refuse)
    with pytest.raises(OSError, match="no space"):
        write_report(tmp_path)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    assert (tmp_path / "report.html").read_text() == before


def test_the_headline_tells_success_and_failure_apart():
    won = headline(results())
    assert "against 94.0\xa0% for the same encoder before training." in won
    assert "does not beat" not in won
    rows = [{"encoder": "pretrained", "knn": 0.95}, {"encoder": "raw input", "knn": 0.96}]
    lost = headline({"method": "mae", "rows": rows})
    assert lost.startswith("A nearest-neighbor vote among the MAE features is right for 95.0\xa0%")
    assert lost.endswith("It does not beat the raw input.")
    unlabeled = {"rows": [{"encoder": "pretrained", "rankme": 61.25}]}
    assert "about 61 dimensions" in headline(unlabeled)
    assert headline({}) == ""


def test_numbers_round_into_the_next_prefix():
    assert [scaled(v) for v in (999.4, 999.6, 1e6, -2500)] == ["999", "1 k", "1 M", "-2.5 k"]


def test_metrics_survive_a_killed_write(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"kind": "train", "step": 1, "loss": None}, {"kind": "eval", "step": 2}]
    lines = b"\n".join(json.dumps(row).encode() for row in rows)
    path.write_bytes(lines + b'\n"text"\n{"kind": "train", "step": "1"}\n{"step": 3, "wh\xff')
    assert read_metrics(path) == rows
