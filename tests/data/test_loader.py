"""Batches: the same whatever the workers, the ranks and where the run began; bad images told."""

import atexit
import logging.handlers
import multiprocessing
import multiprocessing.util
import os
import random
import resource
import signal
import time

import numpy as np
import pytest
import torch

from fastssl.data.datasets import ArrayImages
from fastssl.data.errors import BadItem, DataError
from fastssl.data.loader import EvalLoader, PretrainLoader
from fastssl.data.render.torchvision import apply, drawn_parameters
from fastssl.data.views.image import preset
from fastssl.random import sample_seed

VIEWS = preset("simclr", 12)
PLAIN = preset("plain", 12, mean=(0.5,), std=(0.25,))


class Images(ArrayImages):
    """Random images, of which those in `bad` cannot be read."""

    def __init__(self, count=22, size=12, bad=()):
        g = torch.Generator().manual_seed(0)
        pixels = torch.randint(0, 256, (count, 3, size, size), generator=g, dtype=torch.uint8)
        names = [f"img{i}" for i in range(count)]
        super().__init__(pixels, 3 * torch.arange(count), ("a",), names)
        self.bad = frozenset(bad)

    def item(self, i):
        if i in self.bad:
            raise BadItem(self.name(i), "broken")
        return super().item(i)


def loader(source=None, **options):
    source = Images() if source is None else source
    return PretrainLoader(source, VIEWS, **{"batch_size": 4, "seed": 7, **options})


def assert_same(a, b):
    assert a.keys() == b.keys() and a["bad"] == b["bad"]
    assert all(torch.equal(a[key], b[key]) for key in ("index", "seeds", "label"))
    assert len(a["views"]) == len(b["views"])
    for key in {"views", "params"} & a.keys():
        assert all(torch.equal(x, y) for x, y in zip(a[key], b[key], strict=True))


def assert_same_stream(first, second):
    for a, b in zip(first, second, strict=True):
        assert_same(a, b)


def test_batch_is_what_the_spec_says():
    own = loader()
    batch = next(own.stream(6, 7))  # epoch 1, for an epoch has 5 steps
    assert own.steps_per_epoch == 5 and batch["bad"] == []
    assert batch["index"].dtype == batch["seeds"].dtype == batch["label"].dtype == torch.int64
    assert torch.equal(batch["label"], 3 * batch["index"])
    for k, i in enumerate(batch["index"].tolist()):
        seed = sample_seed(7, 1, i)
        assert batch["seeds"][k] == seed
        want = apply(VIEWS, own.source.item(i), seed)
        for v, view in enumerate(batch["views"]):
            assert view.shape == (4, 3, 12, 12) and torch.equal(view[k], want[v])


def test_without_labels_there_are_none():
    source = Images()
    source.labels = None
    assert "label" not in next(loader(source).stream(0, 1))


def test_parameters_are_told_to_those_who_ask():
    source = Images(bad=[3, 4])
    assert "params" not in next(loader(source).stream(0, 1))
    batches = list(loader(source, parameters=True).stream(0, 7))
    assert any(b["bad"] for b in batches)
    for batch in batches:
        assert [p.shape for p in batch["params"]] == [(4, 16)] * 2
        for k, seed in enumerate(batch["seeds"].tolist()):
            image = source.item(int(batch["index"][k]))
            want = drawn_parameters(VIEWS, image.shape, seed)
            assert torch.equal(torch.stack([p[k] for p in batch["params"]]), want)
            assert torch.equal(batch["views"][1][k], apply(VIEWS, image, seed)[1])


def test_parameters_change_nothing_else_and_depend_on_nothing_else():
    source = Images(bad=[3, 4])
    told = list(loader(source, parameters=True).stream(2, 9))
    for batch, plain in zip(told, loader(source).stream(2, 9), strict=True):
        assert_same({k: v for k, v in batch.items() if k != "params"}, plain)
    assert_same_stream(told[3:], loader(source, parameters=True, workers=2).stream(5, 9))
    halves = [loader(source, parameters=True, rank=r, world=2).stream(2, 9) for r in (0, 1)]
    for batch, *parts in zip(told, *halves, strict=True):
        for v, whole in enumerate(batch["params"]):
            assert torch.equal(torch.cat([part["params"][v] for part in parts]), whole)


def test_epoch_is_a_permutation_without_its_short_end():
    batches = list(loader().stream(0, 10))
    epochs = [torch.cat([b["index"] for b in part]) for part in (batches[:5], batches[5:])]
    assert all(len(e.unique()) == 20 for e in epochs)
    assert not torch.equal(*epochs)
    assert not torch.equal(batches[0]["index"], next(loader(seed=8).stream(0, 1))["index"])


def test_workers_change_nothing():
    source = Images(bad=[3, 4])
    streams = [loader(source, workers=w).stream(2, 13) for w in (0, 2)]
    assert_same_stream(*streams)


def test_one_worker_process_or_many_threads_round_alike():
    """Contrast sums over pixels, which torch splits among threads above 32768 of them."""
    source, threads = Images(4, 200), torch.get_num_threads()
    views = preset("plain", 200, jitter=1, contrast=1)
    try:
        torch.set_num_threads(4)
        here = next(PretrainLoader(source, views, batch_size=4, seed=0).stream(0, 1))
        assert torch.get_num_threads() == 4
        torch.set_num_threads(1)
        alone = next(PretrainLoader(source, views, batch_size=4, seed=0).stream(0, 1))
    finally:
        torch.set_num_threads(threads)
    assert_same(here, alone)


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_joined_are_one_process(world):
    source = Images(bad=[3, 4])
    whole = loader(source).stream(0, 11)
    parts = [loader(source, rank=r, world=world).stream(0, 11) for r in range(world)]
    for one, *shares in zip(whole, *parts, strict=True):
        joined = {
            "views": [torch.cat(v) for v in zip(*(s["views"] for s in shares), strict=True)],
            "index": torch.cat([s["index"] for s in shares]),
            "seeds": torch.cat([s["seeds"] for s in shares]),
            "label": torch.cat([s["label"] for s in shares]),
            "bad": sum((s["bad"] for s in shares), []),
        }
        assert_same(one, joined)


def test_resume_in_mid_epoch_is_the_uninterrupted_run():
    whole = list(loader().stream(0, 12))
    assert_same_stream(whole[7:], loader().stream(7, 12))
    assert list(loader().stream(5, 5)) == []


def test_global_generators_are_untouched():
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    for workers in (0, 1):
        list(loader(workers=workers).stream(0, 2))
        list(EvalLoader(Images(), PLAIN, 8, workers=workers))
    assert torch.equal(states[0], torch.get_rng_state())
    assert (states[1] == np.random.get_state()[1]).all() and states[2] == random.getstate()


def test_bad_images_are_replaced_counted_and_named():
    bad = {2, 5, 11}
    batches = list(loader(Images(bad=bad), batch_size=11).stream(0, 6))
    clean = list(loader(Images(), batch_size=11).stream(0, 6))
    named = [name for b in batches for name, reason in b["bad"]]
    assert {*named} == {"img2", "img5", "img11"} and len(named) >= 9  # three epochs
    for got, want in zip(batches, clean, strict=True):
        assert torch.equal(got["seeds"], want["seeds"])  # the place's own
        assert torch.equal(got["label"], 3 * got["index"])  # the replacement's
        assert not bad & {*got["index"].tolist()}
        for k, (i, j) in enumerate(zip(got["index"], want["index"], strict=True)):
            assert (i == j) != (int(j) in bad)
            seed = int(got["seeds"][k])
            assert torch.equal(got["views"][0][k], apply(VIEWS, Images().item(int(i)), seed)[0])
    swaps = {
        int(i)
        for g, w in zip(batches, clean, strict=True)
        for i in g["index"][g["index"] != w["index"]]
    }
    assert len(swaps) > 3  # not always the same image in the place


def test_every_unreadable_replacement_is_listed():
    batch = next(loader(Images(bad=range(11)), batch_size=22).stream(0, 1))
    assert len(batch["bad"]) > 11


@pytest.mark.parametrize("workers", [0, 1])
def test_mostly_unreadable_data_stops_with_examples(workers):
    with pytest.raises(DataError) as error:
        list(loader(Images(bad=range(22)), workers=workers).stream(0, 1))
    words = str(error.value)
    assert words.startswith("most of the data is unreadable, 17 items in a row (img")
    assert words.count(": broken") == 3 and "\n" not in words


def test_a_share_of_bad_items_stops_the_stream():
    """None of them 17 in a row, but every second one."""
    source = Images(40, bad=range(0, 40, 2))
    with pytest.raises(DataError, match="most of the data is unreadable, .* of .* items .img"):
        list(loader(source, max_bad=0.4).stream(0, 70))
    assert len(list(loader(source, max_bad=0.6).stream(0, 70))) == 70  # of 4: above 200 samples


@pytest.mark.parametrize("world, workers", [(1, 0), (2, 0), (1, 2)])
def test_a_padded_epoch_has_every_sample_once(world, workers):
    """Padding is marked, of the same epoch, and the rest is what "drop" has."""
    options = {"batch_size": 8, "world": world, "workers": workers}
    own = [loader(last="pad", rank=r, **options) for r in range(world)]
    assert own[0].steps_per_epoch == 3 and loader(batch_size=8).steps_per_epoch == 2
    assert loader(Images(24), last="pad", batch_size=8).steps_per_epoch == 3
    batches = [list(part.stream(0, 6)) for part in own]
    for epoch in (0, 1):
        steps = range(3 * epoch, 3 * epoch + 3)
        index = torch.cat([part[s]["index"] for s in steps for part in batches])
        padding = torch.cat([part[s]["padding"] for s in steps for part in batches])
        assert len(index) == 24 and padding.sum() == 2
        assert sorted(index[~padding].tolist()) == list(range(22))
        assert torch.equal(index[padding], index[:2])
    dropped = list(loader(batch_size=8).stream(0, 2))
    for s in (0, 1):
        assert torch.equal(torch.cat([p[s]["index"] for p in batches]), dropped[s]["index"])
    resumed = list(own[0].stream(2, 6))
    for a, b in zip(batches[0][2:], resumed, strict=True):
        assert torch.equal(a["padding"], b["padding"]) and torch.equal(a["index"], b["index"])
    assert "padding" not in dropped[0]


@pytest.mark.parametrize(
    "options, words",
    [
        ({"batch_size": 23}, r"batch_size 23 is larger than the data set \(22 training images\)"),
        ({"batch_size": 0}, "batch_size 0 is not positive"),
        ({"batch_size": 6, "world": 4}, "batch_size 6 is not divisible by the 4 ranks"),
        ({"rank": 2, "world": 2}, "rank 2 of world 2"),
        ({"workers": -1}, "workers: want 0 or more, got -1"),
    ],
)
def test_impossible_settings(options, words):
    with pytest.raises(ValueError, match=words):
        loader(**options)


@pytest.mark.parametrize("steps", [(-1, 2), (3, 2)])
def test_impossible_steps(steps):
    with pytest.raises(ValueError, match="0 <= start <= end"):
        loader().stream(*steps)


def test_stream_may_be_left_early(monkeypatch):
    """The workers end of themselves: torch, which waits before it uses force, would wait long."""
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 100.0)
    stream = loader(workers=2).stream(0, 100)
    next(stream)
    started = time.monotonic()
    stream.close()
    assert time.monotonic() - started < 50
    assert not multiprocessing.active_children()


def test_workers_outlive_the_signals_of_their_group():
    """A cluster signals every process; the main one may want its step done, and saves."""
    stream = loader(workers=1).stream(0, 12)
    first = next(stream)
    (worker,) = multiprocessing.active_children()
    assert worker.pid is not None
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):  # fault 46
        os.kill(worker.pid, number)
    rest = list(stream)
    assert_same_stream([first, *rest], loader().stream(0, 12))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 3])
def test_eval_has_every_image_once_in_order(workers, world):
    source = Images(bad=[0, 9])
    parts = [
        EvalLoader(source, PLAIN, 4, rank=r, world=world, workers=workers) for r in range(world)
    ]
    batches = [batch for part in parts for batch in part]
    assert len(batches) == sum(len(part) for part in parts)
    index = torch.cat([b["index"] for b in batches])
    assert index.tolist() == [i for i in range(22) if i not in (0, 9)]
    assert [name for b in batches for name, _ in b["bad"]] == ["img0", "img9"]
    want = (source.pixels[index].float() / 255 - 0.5) / 0.25
    torch.testing.assert_close(torch.cat([b["view"] for b in batches]), want)


def test_eval_batch_of_bad_images_alone_is_empty():
    (batch,) = EvalLoader(Images(2, bad=[0, 1]), PLAIN, 4)
    assert batch["view"].shape == (0, 3, 12, 12) and len(batch["index"]) == 0
    assert [name for name, _ in batch["bad"]] == ["img0", "img1"]


def test_eval_of_other_shapes_is_the_centered_square():
    wide = Images(1)
    wide.pixels = torch.arange(120, dtype=torch.uint8).expand(1, 3, 60, 120).contiguous()
    (batch,) = EvalLoader(wide, preset("plain", 60, mean=(0.0,), std=(1.0,)), 1)
    assert torch.equal((batch["view"] * 255).round().byte(), wide.pixels[..., 30:90])


def test_eval_settings_are_checked():
    with pytest.raises(ValueError, match="batch_size: want 1 or more, got 0"):
        EvalLoader(Images(), PLAIN, 0)


class Stalled(Images):
    """Images of which one is on a disk that does not answer."""

    def __init__(self, fifo):
        super().__init__()
        self.fifo = fifo

    def item(self, i):
        if i == 5:
            open(self.fifo).close()  # waits for a writer that never comes
        return super().item(i)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stalled_disk_does_not_keep_a_run_from_leaving(workers, tmp_path):
    """Fault 11: what was read before is given, and no process is left behind."""
    os.mkfifo(tmp_path / "fifo")
    whole, got = list(loader().stream(0, 5)), []
    before = next(s for s, batch in enumerate(whole) if 5 in batch["index"])
    assert before > 0

    def should_stop():  # asked while a batch is waited for
        return len(got) == before

    for batch in loader(Stalled(tmp_path / "fifo"), workers=workers).stream(0, 5, should_stop):
        got.append(batch)
    assert_same_stream(got, whole[:before])
    assert not multiprocessing.active_children()


def _without_memory(said):
    """As with a full /dev/shm: what is larger than a semaphore has no room."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (256, limits[1]))
    records = logging.handlers.BufferingHandler(99)
    logging.getLogger().addHandler(records)
    assert_same_stream(loader(workers=2).stream(0, 7), loader().stream(0, 7))
    said.put([record.getMessage() for record in records.buffer])


def _without_descriptors(said):
    most = max(map(int, os.listdir("/proc/self/fd"))) + 60
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    stream = loader(workers=1).stream(0, 7)
    next(stream)
    kept = []
    try:
        while True:
            kept.append(os.dup(0))
    except OSError:
        pass
    try:
        list(stream)
    except DataError as error:
        os.close(kept.pop())
        said.put(str(error))


def _without_an_end(said):
    """What Python does on its way out."""
    atexit._clear()
    atexit.register(multiprocessing.util._exit_function)
    stream = loader(workers=1).stream(0, 100)
    next(stream)
    atexit._run_exitfuncs()
    said.put("left")


def _said_in_a_fork(target):
    context = multiprocessing.get_context("fork")
    said = context.SimpleQueue()
    process = context.Process(target=target, args=(said,))
    process.start()
    process.join(300)
    process.kill()
    assert process.exitcode == 0
    return said.get()


def test_without_memory_or_descriptors_or_an_end():
    """Fault 10: batches have another way, or end in a sentence; neither waits for ever.  Nor does
    Python, on its way out with a stream open, whose workers ignore the signal that ends them."""
    (warning,) = _said_in_a_fork(_without_memory)
    assert "batches come from their loader processes by a pipe" in warning
    sentence = _said_in_a_fork(_without_descriptors)
    assert "a batch could not be received from its loader process" in sentence
    assert "ulimit -n" in sentence
    assert _said_in_a_fork(_without_an_end) == "left"


def test_a_killed_worker_is_one_sentence():
    """Fault 43: a traceback, wherever the process was when its worker died."""
    stream = loader(workers=1).stream(0, 100)
    next(stream)
    (worker,) = multiprocessing.active_children()
    worker.kill()
    worker.join()
    time.sleep(0.01)  # torch's handler would speak here
    with pytest.raises(DataError, match="ended by (SIGKILL|a signal).*lower data.workers"):
        list(stream)


@pytest.mark.parametrize(
    "workers, error, words",
    [
        (1, OSError(116, "Stale file handle"), "Stale file handle.: see that its disk answers"),
        (0, MemoryError("a lot"), "a lot.: memory ran out"),
        (0, OSError(24, "Too many"), "Too many.: raise the limit of open files"),
    ],
)
def test_a_failure_of_the_machine_is_one_sentence(workers, error, words):
    """Fault 42: it was a traceback."""
    with pytest.raises(DataError, match=f"the data cannot be read .*{words}"):
        list(loader(Failing(error), workers=workers).stream(0, 1))


class Failing(Images):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def item(self, i):
        raise self.error
