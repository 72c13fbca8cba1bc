"""Reading and writing audio: values survive, channels and rates convert, every defect is one clear error."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pytest
import soundfile

from python_tests.data_fixtures import recordings, waves
from speechlm_ext.audio import check_wave, read_audio, resample_audio, write_wav
from speechlm_ext.errors import AudioError, StorageError


def tone(rate: int, seconds: float = 0.5, hz: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hz * np.arange(round(rate * seconds)) / rate)).astype(np.float32)


@pytest.mark.parametrize("name", ["a.wav", "a.flac"])
def test_lossless_formats_round_trip(tmp_path, name):
    wave = waves()[0]
    soundfile.write(tmp_path / name, wave, 16000, subtype="PCM_16")
    read, rate = read_audio(tmp_path / name)
    assert rate == 16000 and read.dtype == np.float32
    np.testing.assert_allclose(read, wave, atol=1 / 32768)


@pytest.mark.parametrize("name", ["a.ogg", "a.mp3"])
def test_lossy_formats_are_close(tmp_path, name):
    wave = tone(16000)
    soundfile.write(tmp_path / name, wave, 16000)
    read, rate = read_audio(tmp_path / name)
    assert rate == 16000
    # mp3 adds silence at both ends, so the tone's level in the middle is compared.
    middle = read[len(read) // 2 - 1600 : len(read) // 2 + 1600]
    assert abs(np.sqrt((middle**2).mean()) - 0.5 / np.sqrt(2)) < 0.02


def test_g722_of_a_real_recording(tmp_path):
    av = pytest.importorskip("av")
    wave = waves()[5]
    path = tmp_path / "a.g722"
    with av.open(str(path), "w", format="g722") as container:
        stream = container.add_stream("g722", rate=16000, layout="mono")
        pcm = (wave * 32767).astype(np.int16)
        for start in range(0, len(pcm), 320):
            block = np.zeros(320, np.int16)
            block[: len(pcm[start : start + 320])] = pcm[start : start + 320]
            frame = av.AudioFrame.from_ndarray(block[None], format="s16", layout="mono")
            frame.sample_rate = 16000
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    read, rate = read_audio(path)
    assert rate == 16000 and abs(len(read) - len(wave)) <= 640
    length = min(len(read), len(wave))
    # G.722 delays by 22 samples; the best lag must explain nearly all of the signal.
    best = max(np.corrcoef(wave[: length - 64], read[lag : lag + length - 64])[0, 1] for lag in range(48))
    assert best > 0.99


def test_stereo_becomes_the_mean_of_its_channels(tmp_path):
    left, right = tone(16000, hz=300), tone(16000, hz=700)
    soundfile.write(tmp_path / "s.wav", np.stack([left, right], 1), 16000, subtype="FLOAT")
    read, _ = read_audio(tmp_path / "s.wav")
    np.testing.assert_allclose(read, (left + right) / 2, atol=1e-6)


@pytest.mark.parametrize("rate", [8000, 22050, 48000])
def test_resampling_keeps_the_tone(tmp_path, rate):
    soundfile.write(tmp_path / "t.wav", tone(rate), rate, subtype="FLOAT")
    read, new_rate = read_audio(tmp_path / "t.wav", 16000)
    assert new_rate == 16000 and abs(len(read) - 8000) <= 1
    np.testing.assert_allclose(read[800:7200], tone(16000)[800:7200], atol=2e-3)


def test_another_rate_is_an_error_when_not_resampling(tmp_path):
    soundfile.write(tmp_path / "t.wav", tone(8000), 8000)
    with pytest.raises(AudioError, match=r"t\.wav has sampling rate 8000 Hz but 16000 Hz was expected"):
        read_audio(tmp_path / "t.wav", 16000, resample=False)


def test_bad_files_are_named(tmp_path):
    with pytest.raises(AudioError, match="nothing.wav does not exist"):
        read_audio(tmp_path / "nothing.wav")
    with pytest.raises(AudioError, match="is a folder"):
        read_audio(tmp_path)
    (tmp_path / "zero.wav").write_bytes(b"")
    with pytest.raises(AudioError, match=r"zero\.wav is empty"):
        read_audio(tmp_path / "zero.wav")
    soundfile.write(tmp_path / "header.wav", np.zeros(0, np.float32), 16000)
    with pytest.raises(AudioError, match=r"header\.wav holds no samples"):
        read_audio(tmp_path / "header.wav")
    for name in ("text.wav", "text.mp3", "text.raw", "text.flac"):
        (tmp_path / name).write_text("this is not audio " * 50)
        with pytest.raises(AudioError, match=f"{name} cannot be read"):
            read_audio(tmp_path / name)
    bad = tone(16000)
    bad[17] = np.nan
    soundfile.write(tmp_path / "nan.wav", bad, 16000, subtype="FLOAT")
    with pytest.raises(AudioError, match=r"nan\.wav: sample 17 of 8000 is nan"):
        read_audio(tmp_path / "nan.wav")


def test_truncated_flac_is_an_error_or_shorter(tmp_path):
    data = recordings()[5].path.read_bytes()
    (tmp_path / "cut.flac").write_bytes(data[:60])
    with pytest.raises(AudioError, match=r"cut\.flac"):
        read_audio(tmp_path / "cut.flac")


def test_check_wave():
    with pytest.raises(AudioError, match=r"one channel \[T\], got shape \[2, 3\]"):
        check_wave(np.zeros((2, 3)))
    with pytest.raises(AudioError, match="at least one sample"):
        check_wave(np.zeros(0))
    with pytest.raises(AudioError, match="sample 1 of 2 is inf"):
        check_wave(np.array([0.0, np.inf]))
    np.testing.assert_array_equal(check_wave(np.array([-32768, 16384], np.int16)), [-1.0, 0.5])
    with pytest.raises(AudioError, match="largest sample is 20000 .* divide 16-bit PCM by 32768"):
        check_wave(np.array([0.0, -20000.0]))
    with pytest.raises(AudioError, match="positive"):
        resample_audio(np.zeros(4, np.float32), 16000, 0)


def test_write_clips_and_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "o.wav"
    write_wav(path, np.array([-2.0, -0.5, 0.5, 2.0]), 16000)
    read, _ = read_audio(path)
    np.testing.assert_allclose(read, [-1.0, -0.5, 0.5, 1.0], atol=1 / 32000)

    def full_disk(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    before = path.read_bytes()
    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(StorageError, match="disk is full"):
        write_wav(path, np.zeros(100), 16000)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["o.wav"]
