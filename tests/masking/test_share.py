import pytest

from fastssl.masking import keep_of


@pytest.mark.parametrize("length, ratio, keep", [(196, 0.75, 49), (16, 0.9, 2), (2, 0.5, 1)])
def test_keep_of_a_share(length, ratio, keep):
    assert keep_of(length, ratio) == keep


REFUSED = {
    "all": (lambda: keep_of(4, 0.05), "ratio=0.05 leaves 4 of 4"),
    "none": (lambda: keep_of(4, 0.99), "ratio=0.99 leaves 0 of 4"),
    "below": (lambda: keep_of(4, -0.5), "between 0 and 1, got -0.5"),
    "nan": (lambda: keep_of(4, float("nan")), "between 0 and 1, got nan"),
}


@pytest.mark.parametrize("call, words", REFUSED.values(), ids=REFUSED)
def test_refuses(call, words):
    with pytest.raises(ValueError, match=words):
        call()
