from collections import Counter
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastssl.masking import span_masking, time_frequency_masking
from tests.covering import examples
from tests.oracle import DEVICE

from .generators import shown


def seeds(n):
    return torch.arange(n, device=DEVICE)


def runs(hidden):
    """Lengths of the runs of True on a ring that is not all True."""
    start = hidden.index(False)
    turned = "".join("x" if h else " " for h in hidden[start:] + hidden[:start])
    return [len(run) for run in turned.split()]


@settings(max_examples=examples(60, 15))
@given(
    keep=st.integers(1, 30), span=st.integers(1, 8), more=st.integers(0, 20), seed=st.integers(0)
)
def test_runs_are_whole_spans_but_one(keep, span, more, seed):
    hide = span + more
    made = span_masking(torch.tensor([seed % 2**63]), keep + hide, keep, span)
    hidden = (~shown(made))[0].tolist()
    left = [run % span for run in runs(hidden) if run % span]
    assert sum(hidden) == hide and left == ([hide % span] if hide % span else [])


def test_every_arrangement_is_equally_likely():
    """Two spans of 2 and two visible places on a ring of 6, cut anywhere."""
    law = Counter()
    for spans in combinations(range(4), 2):
        ring = [h for unit in range(4) for h in ([True] * 2 if unit in spans else [False])]
        for cut in range(6):
            law[tuple(ring[cut:] + ring[:cut])] += 1 / 36
    n = 12000
    seen = Counter(map(tuple, (~shown(span_masking(seeds(n), 6, 2, 2))).tolist()))
    assert seen.keys() == law.keys()
    for arrangement, p in law.items():
        assert abs(seen[arrangement] - n * p) < 4.5 * (n * p * (1 - p)) ** 0.5


@pytest.mark.parametrize(
    "times, bands, spans",
    [(3, 2, {}), (4, 3, {"time_span": 2, "band_span": 1}), (0, 2, {}), (5, 0, {"time_span": 5})],
)
def test_whole_times_and_whole_bands_are_hidden(times, bands, spans):
    F, S = 6, 9
    hidden = ~shown(time_frequency_masking(seeds(50), (F, S), times, bands, **spans))
    hidden = hidden.view(50, F, S)
    rows, columns = hidden.all(2), hidden.all(1)
    assert torch.equal(hidden, rows[:, :, None] | columns[:, None])
    assert (rows.sum(1) == bands).all() and (columns.sum(1) == times).all()
    for lines, span in (
        (rows, spans.get("band_span", bands)),
        (columns, spans.get("time_span", times)),
    ):
        assert all(run % span == 0 for line in lines.tolist() for run in runs(line))


def test_times_and_bands_are_independent():
    n = 6000
    hidden = ~shown(time_frequency_masking(seeds(n), (4, 5), 1, 1)).view(n, 4, 5)
    pairs = torch.einsum("nf,nt->ft", hidden.all(2).double(), hidden.all(1).double()) / n
    assert ((pairs - 1 / 20).abs() < 4.5 * (0.05 * 0.95 / n) ** 0.5).all()


REFUSED = {
    "nothing hidden": (lambda s: span_masking(s, 8, 8, 1), "keep .* 7, got 8"),
    "no span": (lambda s: span_masking(s, 8, 4, 0), "between 1 and 4 hidden places, got 0"),
    "a long span": (lambda s: span_masking(s, 8, 4, 5), "got 5"),
    "nothing of either": (lambda s: time_frequency_masking(s, (4, 8), 0, 0), "not both 0, got 0"),
    "all times": (lambda s: time_frequency_masking(s, (4, 8), 8, 0), r"0\.\.7 .* got 8 and 0"),
    "all bands": (lambda s: time_frequency_masking(s, (4, 8), 1, 4), "got 1 and 4"),
    "a long time": (
        lambda s: time_frequency_masking(s, (4, 8), 2, 1, time_span=3),
        "time_span must lie between 1 and 2 hidden, got 3",
    ),
    "a clip": (lambda s: time_frequency_masking(s, (4, 8, 2), 2, 1), "grid must be 2 sides"),
}


@pytest.mark.parametrize("call, words", REFUSED.values(), ids=REFUSED)
def test_refuses(call, words):
    with pytest.raises(ValueError, match=words):
        call(torch.zeros(2, dtype=torch.int64))
