"""Generated waveforms, and views of signals: cropped, normalized, deterministic."""

import numpy as np
import pytest
import torch

from fastssl.data.synthetic.signals import WAVES, SignalsSource, signal
from fastssl.data.views.signal import SignalViews
from fastssl.data.views.spec import apply, view_spec


def test_deterministic_and_sized():
    a = signal(1, 2, 3, 500)
    assert a.shape == (1, 500) and a.dtype == torch.float32 and a.isfinite().all()
    assert torch.equal(a, signal(1, 2, 3, 500))


def test_every_number_matters():
    waves = [signal(*key, 300) for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]]
    assert len({x.numpy().tobytes() for x in waves}) == 4


def pitch_ratio(x):
    """The strongest frequency of the last quarter over that of the first."""
    peaks = []
    for part in (x[:512], x[-512:]):
        power = np.abs(np.fft.rfft(part * np.hanning(512))) ** 2
        peaks.append(2 + power[2:60].argmax())
    return peaks[1] / peaks[0]


def test_kinds_are_what_they_are_named():
    def many(kind):
        return [signal(0, WAVES.index(kind), i, 2048)[0].double().numpy() for i in range(12)]

    assert sum(pitch_ratio(x) > 1.3 for x in many("rise")) >= 11
    assert sum(pitch_ratio(x) < 0.8 for x in many("fall")) >= 11
    assert sum(0.9 < pitch_ratio(x) < 1.1 for x in many("tone")) >= 11

    def slope(x):
        power = np.abs(np.fft.rfft(x))[4:60] ** 2
        return np.polyfit(np.log(np.arange(4, 60)), np.log(power), 1)[0]

    pink, brown = (
        np.mean([slope(x) for x in many("pink")]),
        np.mean([slope(x) for x in many("brown")]),
    )
    assert -1.5 < pink < -0.6 and -2.6 < brown < -1.5

    def beat(x):
        """How much the loudness of 16 stretches varies."""
        return np.std(np.square(x).reshape(16, -1).mean(1)) / np.square(x).mean()

    loud = {kind: np.mean([beat(x) for x in many(kind)]) for kind in ("tone", "tremolo", "bursts")}
    assert loud["tremolo"] > 4 * loud["tone"] and loud["bursts"] > 4 * loud["tone"]


def test_samples_alone_say_little_of_the_kind():
    tones = range(5)  # of the same pitches and timbres
    x = torch.stack([torch.cat([signal(0, c, i, 512) for i in range(30)]) for c in tones]).double()
    x = x / x.std(-1, keepdim=True)
    means = x[:, :20].mean(1)
    guesses = torch.cdist(x[:, 20:].flatten(0, 1), means).argmin(1)
    assert (guesses == torch.arange(5).repeat_interleave(10)).double().mean() < 0.4


def test_the_source_names_and_selects():
    (source,) = SignalsSource(classes=3, per_class=11, length=64, seed=5).open()
    assert len(source) == 33 and source.channels == 1 and source.classes == WAVES[:3]
    part = source.select(np.array([13, 2]))
    assert part.name(0) == "rise/02" and part.labels.tolist() == [1, 0]
    assert torch.equal(part.item(0), signal(5, 1, 2, 64))


def test_views_have_mean_0_and_deviation_1():
    item = 3e4 + 5 * torch.randn(2, 400, generator=torch.Generator().manual_seed(0))
    (view,) = SignalViews.preset(100, gain=(1.0, 1.0)).apply(item, 3)
    assert view.shape == (2, 100) and view.dtype == torch.float32
    torch.testing.assert_close(view.mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(view.std(correction=0), torch.tensor(1.0))
    loud = [
        SignalViews.preset(100, gain=(0.5, 2.0)).apply(item, s)[0].std(correction=0)
        for s in range(99)
    ]
    logs = torch.stack(loud).log2()
    assert logs.min() > -1.001 and logs.max() < 1.001 and -0.3 < logs.mean() < 0.3
    assert logs.std() > 0.4


def test_silence_stays_silent():
    (view,) = SignalViews.preset(10).apply(torch.full((1, 20), 7.0), 0)
    assert (view == 0).all()


def test_crops_are_stretches_of_the_signal():
    item = torch.arange(30.0)[None]
    spec = SignalViews.preset(20, gain=(1.0, 1.0))
    deviation = torch.arange(20.0).std(correction=0)
    views = [spec.apply(item, seed)[0][0] for seed in range(100)]
    for view in views:
        torch.testing.assert_close(view.diff(), torch.full((19,), 1 / deviation.item()))
    ramp = torch.arange(40) ** 2.0
    starts = {
        int(v.argmin())
        for v in (SignalViews.preset(30).apply(ramp[None], s)[0][0] for s in range(9))
    }
    assert starts == {0}
    first = [
        SignalViews.preset(4).apply((torch.arange(9) == 4).float()[None], s)[0][0]
        for s in range(99)
    ]
    assert {int(v.argmax()) if v.any() else -1 for v in first} == {-1, 0, 1, 2, 3}
    (short,) = SignalViews.preset(50).evaluation().apply(item, 0)
    torch.testing.assert_close(short[0, 30:], short[0, :20])


def test_views_are_pure_functions_of_item_and_seed():
    item = signal(0, 0, 0, 300)
    spec = SignalViews.preset(100, count=2)
    a, b = apply(spec, item, 3), apply(spec, item, 3)
    assert len(a) == 2 and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not torch.equal(a[0], a[1]) and not torch.equal(a[0], apply(spec, item, 4)[0])
    assert [tuple(x.shape) for x in a] == spec.shapes(1)
    plain = spec.evaluation()
    assert plain.count == 1 and torch.equal(plain.apply(item, 0)[0], plain.apply(item, 9)[0])
    x = item[0, 100:200]
    torch.testing.assert_close(plain.apply(item, 0)[0][0], (x - x.mean()) / x.std(correction=0))


def test_bad_items_and_options_are_refused():
    spec = view_spec("signals", 16)
    assert isinstance(spec, SignalViews) and spec.length == 16
    for bad in (torch.zeros(20), torch.zeros(1, 0), torch.zeros(1, 20, dtype=torch.int16)):
        with pytest.raises(ValueError, match="want float"):
            spec.apply(bad, 0)
    with pytest.raises(ValueError, match="did you mean 'gain'"):
        view_spec("signals", 16, gains=(1, 1))
