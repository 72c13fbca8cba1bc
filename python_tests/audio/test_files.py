"""Reading and writing audio: values survive, channels and rates convert, every defect is one clear error."""

from __future__ import annotations

import errno
import io
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from python_tests.assets import demo_module, recordings, waves
from speechlm_ext.audio.files import read_audio, write_wav
from speechlm_ext.audio.wav_stream import pcm16
from speechlm_ext.audio.waveform import check_wave, resample_audio
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


def test_without_their_packages_files_are_refused_by_name(tmp_path, monkeypatch):
    """The room imports without soundfile and soxr; what needs them says so, and how to get them."""
    import speechlm_ext.audio

    path = tmp_path / "a.wav"
    write_wav(path, tone(8000), 8000)
    monkeypatch.setitem(sys.modules, "soundfile", None)
    monkeypatch.setitem(sys.modules, "soxr", None)
    monkeypatch.delitem(sys.modules, "speechlm_ext.audio.containers", raising=False)
    monkeypatch.delattr(speechlm_ext.audio, "containers", raising=False)
    for call in (lambda: read_audio(path), lambda: write_wav(path, tone(8000), 8000)):
        with pytest.raises(
            AudioError, match=r"a\.wav: audio files need the package soundfile.*pip install soundfile"
        ):
            call()
    with pytest.raises(AudioError, match="8000 Hz to 16000 Hz needs the package soxr.*pip install soxr"):
        resample_audio(tone(8000), 8000, 16000)
    np.testing.assert_array_equal(resample_audio(tone(8000), 8000, 8000), tone(8000))


def test_check_wave():
    with pytest.raises(AudioError, match=r"one channel \[T\], got shape \[2, 3\]"):
        check_wave(np.zeros((2, 3)))
    with pytest.raises(AudioError, match="at least one sample"):
        check_wave(np.zeros(0))
    with pytest.raises(AudioError, match="sample 1 of 2 is inf"):
        check_wave(np.array([0.0, np.inf]))
    with pytest.raises(AudioError, match="largest sample is 20000; divide 16-bit PCM by 32768"):
        check_wave(np.array([0.0, -20000.0]))
    with pytest.raises(AudioError, match="positive"):
        resample_audio(np.zeros(4, np.float32), 16000, 0)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    ("dtype", "samples", "right"),
    [
        ("u1", [0, 64, 128, 255], [-1.0, -0.5, 0.0, 127 / 128]),
        ("i1", [-128, -64, 0, 127], [-1.0, -0.5, 0.0, 127 / 128]),
        ("u2", [0, 16384, 32768, 65535], [-1.0, -0.5, 0.0, 32767 / 32768]),
        ("i2", [-32768, -16384, 0, 32767], [-1.0, -0.5, 0.0, 32767 / 32768]),
        ("u4", [0, 2**30, 2**31, 2**31 + 2**29], [-1.0, -0.5, 0.0, 0.25]),
        ("i4", [-(2**31), -(2**30), 0, 2**29], [-1.0, -0.5, 0.0, 0.25]),
        ("f2", [-1.0, -0.5, 0.0, 0.25], [-1.0, -0.5, 0.0, 0.25]),
        ("f4", [-1.0, -0.5, 0.0, 0.25], [-1.0, -0.5, 0.0, 0.25]),
        ("f8", [-1.0, -0.5, 0.0, 0.25], [-1.0, -0.5, 0.0, 0.25]),
    ],
)
def test_every_pcm_format_is_scaled_by_its_range(dtype, samples, right, order):
    wave = check_wave(np.array(samples, dtype=order + dtype))
    assert wave.dtype == np.float32 and wave.dtype.isnative
    np.testing.assert_array_equal(wave, np.array(right, np.float32))


@pytest.mark.parametrize(
    ("wave", "words"),
    [
        (np.array([0, 16384, -32768]), "int64 is no PCM format"),
        (np.array([0, 1], np.uint64), "uint64 is no PCM format"),
        (np.array([True, False]), "got bool"),
        (np.array([0.5, 0.5j]), "got complex128"),
        (np.array([0.5, None]), "got object"),
        (np.array(["0.5"]), "got <U3"),
        (np.array([1, 2], "m8[s]"), "got timedelta64"),
        (np.ma.array([0.5, 0.25], mask=[False, True]), "masked"),
        ([[0.5], [0.5, 0.25]], "cannot be converted to an array"),
        (np.array([0.0, 1e300]), "sample 1 of 2 is inf"),
    ],
)
def test_what_is_no_pcm_is_refused_by_name(wave, words):
    with pytest.raises(AudioError, match=words):
        check_wave(wave)


def test_a_stream_of_integers_is_scaled_not_clipped():
    samples = np.array([-32768, -16384, 0, 16384], np.int16)
    assert pcm16(samples) == samples.astype("<i2").tobytes() == pcm16(samples.astype(">i2"))
    assert pcm16(np.zeros(0, np.int16)) == b""
    with pytest.raises(AudioError, match="sample 1 of 2 is nan"):
        pcm16(np.array([0.0, np.nan], np.float32))


def test_integers_are_scaled_before_conversion_and_in_players():
    samples = np.round(tone(16000) * 32768).astype(np.int16)
    for wave in (samples, (samples.astype(np.int32) + 32768).astype(np.uint16)):
        converted = resample_audio(wave, 16000, 8000)
        np.testing.assert_allclose(converted[400:3600], tone(8000)[400:3600], atol=2e-3)
    read, _ = soundfile.read(io.BytesIO(demo_module("media").flac_bytes(samples, 16000)))
    np.testing.assert_allclose(read, samples / 32768, atol=1 / 32768)


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
