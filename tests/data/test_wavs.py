"""WAV files: every width of PCM, mono mix, resampling; unreadable ones are named, not fatal."""

import wave

import numpy as np
import pytest
import torch

from fastssl.data.datasets import open_source
from fastssl.data.errors import BadItem, DataError
from fastssl.data.sources.wavs import WavsSource, decode_wav

RAMP = np.array([-1.0, -0.5, 0.0, 0.25, 0.5])


def write(path, samples, width=2, rate=8000, channels=1):
    """samples in [-1, 1), interleaved."""
    whole = np.round(np.asarray(samples) * 2 ** (8 * width - 1)).astype(np.int64)
    if width == 1:
        data = (whole + 128).astype(np.uint8).tobytes()
    else:
        data = b"".join(int(v).to_bytes(width, "little", signed=True) for v in whole)
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setparams((channels, width, rate, 0, "NONE", ""))
        file.writeframes(data)
    return path


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_samples_of_every_width(width, tmp_path):
    x = decode_wav(write(tmp_path / "a.wav", RAMP, width), "a.wav")
    assert x.shape == (1, 5) and x.dtype == torch.float32
    torch.testing.assert_close(x[0].double(), torch.from_numpy(RAMP), atol=1e-7, rtol=0)


def test_24_bits_keep_their_low_byte(tmp_path):
    step = 2.0**-23
    x = decode_wav(write(tmp_path / "a.wav", [step, -step], 3), "a.wav")
    assert x[0].tolist() == [step, -step]


def test_channels_are_averaged(tmp_path):
    both = np.stack([RAMP, RAMP[::-1]], 1).ravel()
    x = decode_wav(write(tmp_path / "a.wav", both, channels=2), "a.wav")
    np.testing.assert_allclose(x[0], (RAMP + RAMP[::-1]) / 2, atol=1e-4)


def test_other_rates_are_resampled(tmp_path):
    t = np.arange(4000)
    tone = write(tmp_path / "a.wav", 0.5 * np.sin(2 * np.pi * 0.01 * t), rate=8000)
    assert decode_wav(tone, "a", rate=8000).shape == (1, 4000)
    x = decode_wav(tone, "a", rate=12000)[0].numpy()
    assert len(x) == 6000
    want = 0.5 * np.sin(2 * np.pi * 0.01 * np.arange(6000) * 2 / 3)
    np.testing.assert_allclose(x[200:-200], want[200:-200], atol=2e-3)


def test_class_folders_are_labels(tmp_path):
    for name in ("b/0.wav", "b/1.WAV", "b/2.wav", "a/0.wav", "a/1.wav"):
        write(tmp_path / name, RAMP)
    (tmp_path / "a" / "notes.txt").write_text("not a signal")
    (source,) = WavsSource(path=tmp_path).open()
    assert source.classes == ("a", "b") and source.labels.tolist() == [0, 0, 1, 1, 1]
    assert source.channels == 1 and source.name(3) == "b/1.WAV"
    split = open_source(WavsSource(path=tmp_path), seed=0)
    assert len(split.train) == 3 and len(split.test) == 2
    assert split.train.item(0).shape == (1, 5)


def test_a_folder_may_come_split_or_flat(tmp_path):
    write(tmp_path / "train" / "x.wav", RAMP)
    write(tmp_path / "val" / "y.wav", RAMP)
    train, test = WavsSource(path=tmp_path, rate=4000).open()
    assert train.labels is None and test.item(0).shape == (1, 3)
    assert len(WavsSource(path=tmp_path / "val", flat=True).open()[0]) == 1


def test_unreadable_files_are_bad_items(tmp_path):
    bad = {
        "text.wav": b"not a wave file",
        "none.wav": b"",
        "empty.wav": write(tmp_path / "e.wav", []).read_bytes(),
    }
    for name, data in bad.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(BadItem) as caught:
            decode_wav(tmp_path / name, name)
        assert caught.value.name == name and caught.value.reason
        assert str(tmp_path) not in caught.value.reason
    with pytest.raises(BadItem):
        decode_wav(tmp_path / "gone.wav", "gone.wav")


def test_a_cut_file_is_read_as_far_as_it_goes(tmp_path):
    path = write(tmp_path / "a.wav", np.tile(RAMP, 20), 2, channels=2)
    path.write_bytes(path.read_bytes()[:-7])
    assert decode_wav(path, "a.wav").shape == (1, 48)


def test_a_folder_without_signals_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"no WAV file in folder .*\.wav"):
        WavsSource(path=tmp_path).open()
    with pytest.raises(DataError, match="does not exist: give the path of a folder of WAV files"):
        WavsSource(path=tmp_path / "gone").open()


def test_floats_are_samples(tmp_path):
    """Fault 17: Python 3.11's own reader knows none."""
    from scipy.io import wavfile

    x = np.linspace(-1, 1, 40, dtype=np.float32).reshape(20, 2)
    wavfile.write(tmp_path / "a.wav", 8000, x)
    assert np.allclose(decode_wav(tmp_path / "a.wav", "a")[0], x.mean(1))


def test_a_rate_beyond_measure_is_a_bad_item(tmp_path):
    """Fault 42: resampling asked for 320 GiB."""
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setparams((1, 2, 2**31 - 1, 0, "NONE", ""))
        file.writeframes(bytes(40))
    with pytest.raises(BadItem, match="a rate of 2147483647 samples a second"):
        decode_wav(tmp_path / "a.wav", "a", rate=16000)
