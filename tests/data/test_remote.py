"""Shards behind a web server of our own, which fails in each way that stores fail."""

import logging
import re
import socket
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from fastssl.data.errors import BadItem, DataError
from fastssl.data.loader import PretrainLoader
from fastssl.data.sources import remote
from fastssl.data.sources.files import Files, read_all, status
from fastssl.data.sources.tfrecord import _label
from fastssl.data.sources.webdataset import WebDatasetSource
from fastssl.data.views.image import preset
from tests.data.made import shard


class Store(ThreadingHTTPServer):
    """Serves `folder`; a request meets `failure` where `fails` says so.

    It is asked with the request's number, and whether the same request failed when it last came.
    """

    daemon_threads = True

    def __init__(self, folder, failure="", fails=lambda n, again: False):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.failure, self.fails = folder, failure, fails
        self.lock, self.asked, self.failed = threading.Lock(), 0, set()

    def handle_error(self, request, client_address): ...  # a client that is gone

    def next_failure(self, request):
        with self.lock:
            self.asked += 1
            if not self.fails(self.asked, request in self.failed):
                self.failed.discard(request)
                return ""
            self.failed.add(request)
            return self.failure


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Store

    def do_HEAD(self):
        self.respond(body=False)

    def do_GET(self):
        self.respond(body=True)

    def respond(self, body):
        failure = self.server.next_failure((self.requestline, self.headers.get("Range")))
        if failure.isdigit():
            return self.send_error(int(failure))
        path = self.server.folder / self.path.lstrip("/")
        if not path.is_file():
            return self.send_error(404)
        data, code = path.read_bytes(), 200
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if span and failure != "whole":
            data, code = data[int(span[1]) : int(span[2]) + 1], 206
        self.send_response(code)
        if failure != "sizeless":
            self.send_header("Content-Length", str(len(data)))
        self.send_header("Accept-Ranges", "none" if failure == "whole" else "bytes")
        self.end_headers()
        self.close_connection = failure in ("dropped", "sizeless")
        if failure == "dropped":
            data = data[: len(data) // 2]
        if body:
            self.wfile.write(data)

    def log_message(self, *args): ...


@contextmanager
def serving(folder, failure="", fails=lambda n, again: False):
    with Store(folder, failure, fails) as store:
        threading.Thread(target=store.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{store.server_port}", store
        store.shutdown()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(remote, "WAITS", (0.001,) * 7)


@pytest.fixture
def shards(tmp_path):
    shard(tmp_path / "train-0.tar", 0, 5)
    shard(tmp_path / "train-1.tar", 5, 5)
    return tmp_path


def views_of(path):
    (source,) = WebDatasetSource(path=str(path)).open()
    loader = PretrainLoader(source, preset("plain", 8), batch_size=4, seed=1, workers=2)
    return [(b["index"], b["views"][0], b["label"], b["bad"]) for b in loader.stream(0, 4)]


def every_third(n, again):
    return n % 3 == 1 and not again  # or one reader's turns might all be among them


@pytest.mark.parametrize("failure", ["503", "dropped"])
def test_a_store_that_fails_now_and_then(failure, shards):
    """The batches of the local files, in workers that forked after the first reads."""
    expected = views_of(shards / "train-{0..1}.tar")
    with serving(shards, failure, every_third) as (url, store):
        got = views_of(url + "/train-{0..1}.tar")
        assert store.asked > 16 * 2
    for mine, theirs in zip(expected, got, strict=True):
        assert mine[3] == theirs[3] == []
        assert all(map(torch.equal, mine[:3], theirs[:3]))


@pytest.mark.parametrize("failure", ["429", "dropped"])
def test_a_store_that_is_not_up_yet(failure, shards):
    with serving(shards, failure, lambda n, again: n <= 6) as (url, store):
        (source,) = WebDatasetSource(path=url + "/train-{0..1}.tar").open()
        assert len(source) == 10 and store.asked > 6


def test_each_failure_is_told(shards, caplog):
    with (
        serving(shards, "503", lambda n, again: n <= 2) as (url, store),
        caplog.at_level(logging.WARNING),
    ):
        path = url + "/train-0.tar"
        assert Files([path]).read(0, 3, 4) == (shards / "train-0.tar").read_bytes()[3:7]
        assert store.asked == 3
    said = [r.message for r in caplog.records if r.name == remote.log.name]
    assert len(said) == 2 and all(path in text and "503" in text for text in said)


def test_a_store_that_fails_to_the_end(shards):
    with serving(shards, "503", lambda n, again: True) as (url, store):
        with pytest.raises(DataError, match=r"could not be read in 8 tries over \d+ s .*503"):
            Files([url + "/train-0.tar"]).record(0, 0, 4, "x")
        assert store.asked == 8
    with pytest.raises(DataError, match="see that its store answers, then go on with resume=auto"):
        read_all(url + "/train-0.tar")  # nobody there any more


def test_a_store_that_dies_in_an_epoch(shards):
    """The run ends with the sentence, not with a worker's traceback."""
    with serving(shards) as (url, store):
        (source,) = WebDatasetSource(path=url + "/train-{0..1}.tar").open()
        loader = PretrainLoader(source, preset("plain", 8), batch_size=2, seed=1, workers=1)
        batches = loader.stream(0, 500)
        next(batches)
        store.failure, store.fails = "500", lambda n, again: True
        with pytest.raises(DataError, match="could not be read in 8 tries"):
            list(batches)


@pytest.mark.parametrize(
    "failure, kind, text",
    [
        ("401", BadItem, "^x: Not permitted .HTTP 401"),
        ("403", BadItem, "^x: Not permitted .HTTP 403"),
        ("404", BadItem, "^x: No such file"),
        ("405", DataError, "is refused by its store .405.*: mend the address"),
    ],
)
def test_what_a_store_says_for_good_is_not_asked_again(failure, kind, text, shards):
    with serving(shards, failure, lambda n, again: True) as (url, store):
        with pytest.raises(kind, match=text):
            Files([url + "/train-0.tar"]).record(0, 0, 4, "x")
        assert store.asked == 1


def test_a_file_that_may_not_be_read_is_told_at_the_start(shards):
    with serving(shards, "403", lambda n, again: True) as (url, _):
        with pytest.raises(DataError, match=r"train-0.tar' cannot be read .Not permitted"):
            WebDatasetSource(path=url + "/train-0.tar").open()
        with pytest.raises(DataError, match=r"/shards' cannot be read .Not permitted"):
            WebDatasetSource(path=url + "/shards").open()
        with pytest.raises(DataError, match=r"may not be listed: name its files by a range"):
            WebDatasetSource(path=url + "/train-*.tar").open()


def test_a_file_cut_short_since_the_scan(shards):
    """Items behind the end are bad ones, whether it answers with nothing or with 416."""
    with serving(shards) as (url, store):
        files = Files([url + "/train-0.tar"])
        path = shards / "train-0.tar"
        path.write_bytes(path.read_bytes()[:1000])
        with pytest.raises(BadItem, match="ends 100 bytes before"):
            files.record(0, 900, 200, "x")
        store.failure, store.fails = "416", lambda n, again: True
        with pytest.raises(BadItem, match="ends 200 bytes before"):
            files.record(0, 2000, 200, "x")


def test_a_server_that_sends_whole_files_is_refused(shards):
    with serving(shards, "whole", lambda n, again: True) as (url, _):
        assert status(url + "/train-0.tar").size == (shards / "train-0.tar").stat().st_size
        with pytest.raises(DataError, match=r"asked for 64 bytes and sent \d+: its server"):
            WebDatasetSource(path=url + "/train-0.tar").open()


def test_a_server_that_tells_no_size_is_refused(shards):
    with serving(shards, "sizeless", lambda n, again: True) as (url, _):
        with pytest.raises(DataError, match="is of no known size: its server sends no"):
            WebDatasetSource(path=url + "/train-0.tar").open()


def test_a_shard_is_not_fetched_to_see_whether_it_is_a_folder(shards, monkeypatch):
    monkeypatch.setattr(remote, "is_folder", lambda path: pytest.fail(f"asked about {path}"))
    with serving(shards) as (url, _):
        assert len(WebDatasetSource(path=url + "/train-0.tar").open()[0]) == 5


def test_a_store_that_fails_is_no_damaged_record():
    class Failing:
        def read(self, offset, size):
            raise DataError("could not be read")

    with pytest.raises(DataError, match="could not be read"):
        _label(Failing(), 0, 100, "label")


# fsspec's own destructor of an FTP client that was never made
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    "address", ["http://[::1", "reference://", "ftp://", "zip://", "ftp://h/x"]
)
def test_an_address_that_makes_no_sense_is_one_sentence(address):
    """Fault 42: each was its library's traceback."""
    with pytest.raises(DataError) as error:
        WebDatasetSource(path=address).open()
    assert address in str(error.value) and "\n" not in str(error.value)


def test_a_silent_server_is_left(tmp_path, monkeypatch):
    """Fault 42: it was waited for without end, and without a word."""
    monkeypatch.setattr(remote, "WAITS", ())
    monkeypatch.setattr(remote, "SILENCE", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}/a.tar"
        with pytest.raises(DataError, match="could not be read in 1 tries"):
            status(address)
