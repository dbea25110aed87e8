import pytest

from fastssl.masking import keep_at, keep_of, ratio_schedule


@pytest.mark.parametrize("length, ratio, keep", [(196, 0.75, 49), (16, 0.9, 2), (2, 0.5, 1)])
def test_keep_of_a_share(length, ratio, keep):
    assert keep_of(length, ratio) == keep


def test_a_schedule_goes_from_first_to_last():
    ramp = [ratio_schedule(i / 10, 0.9, 0.4) for i in range(11)]
    assert ramp[0] == 0.9 and ramp[-1] == pytest.approx(0.4)
    assert all(a - b == pytest.approx(0.05) for a, b in zip(ramp, ramp[1:], strict=False))


def test_stages_are_equally_long():
    ratios = [ratio_schedule((i + 0.5) / 1000, 0.5, 0.8, steps=4) for i in range(1000)]
    stages = sorted(set(ratios))
    assert stages == pytest.approx([0.5, 0.6, 0.7, 0.8])
    assert [ratios.count(s) for s in stages] == [250] * 4
    assert ratio_schedule(1.0, 0.5, 0.8, steps=4) == pytest.approx(0.8)


def test_keep_follows_the_schedule():
    keeps = [keep_at(i / 20, 196, first=0.5, last=0.9, steps=5) for i in range(21)]
    assert keeps[0] == 98 and keeps[-1] == 20 and keeps == sorted(keeps, reverse=True)
    assert len(set(keeps)) == 5


REFUSED = {
    "all": (lambda: keep_of(4, 0.05), "ratio=0.05 leaves 4 of 4"),
    "none": (lambda: keep_of(4, 0.99), "ratio=0.99 leaves 0 of 4"),
    "below": (lambda: keep_of(4, -0.5), "between 0 and 1, got -0.5"),
    "nan": (lambda: keep_of(4, float("nan")), "between 0 and 1, got nan"),
    "progress": (lambda: ratio_schedule(1.1, 0.5, 0.6), "progress must lie in 0..1, got 1.1"),
    "first": (lambda: ratio_schedule(0.5, 0.0, 0.6), "got 0.0 and 0.6"),
    "last": (lambda: ratio_schedule(0.5, 0.5, 1.0), "got 0.5 and 1.0"),
    "steps": (lambda: ratio_schedule(0.5, 0.5, 0.6, steps=1), "steps must be at least 2, got 1"),
    "a short line": (lambda: keep_at(1.0, 4, first=0.5, last=0.95), "leaves 0 of 4"),
}


@pytest.mark.parametrize("call, words", REFUSED.values(), ids=REFUSED)
def test_refuses(call, words):
    with pytest.raises(ValueError, match=words):
        call()
