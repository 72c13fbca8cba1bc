"""Files of another length than they promise: cut ones are errors, unfinished ones are read with a warning."""

from __future__ import annotations

import io
import logging
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile

from speechlm_ext.audio.files import audio_seconds, read_audio
from speechlm_ext.errors import AudioError

RATE, LENGTH = 16000, 16001
SINE = (0.5 * np.sin(np.arange(LENGTH) / 6)).astype(np.float32)
PCM = (SINE * 32767).astype("<i2")
CONTAINERS = {
    "wav": {},
    "wavex": {"format": "WAVEX"},
    "rifx": {"format": "WAV", "endian": "BIG"},
    "stereo.wav": {},
    "u8.wav": {"subtype": "PCM_U8"},
    "rf64": {"format": "RF64"},
    "w64": {},
    "aiff": {},
    "au": {},
    "caf": {},
    "nist": {"format": "NIST"},
}


def encoded(name: str, wave: np.ndarray = SINE, **how: object) -> bytes:
    buffer = io.BytesIO()
    samples = np.stack([wave, wave], 1) if name.startswith("stereo") else wave
    kind = {"format": name.split(".")[-1].upper()} | CONTAINERS.get(name, {}) | how
    soundfile.write(buffer, samples, RATE, **kind)
    return buffer.getvalue()


def wav(size: int, data: bytes, after: bytes = b"") -> bytes:
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, RATE, 2 * RATE, 2, 16)
    body = b"WAVE" + form + struct.pack("<4sI", b"data", size) + data + after
    return struct.pack("<4sI", b"RIFF", len(body)) + body


def put(folder: Path, data: bytes, name: str = "a.wav") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("name", [*CONTAINERS, "flac", "ogg", "mp3"])
def test_whole_files_log_nothing(tmp_path, name, caplog):
    path = put(tmp_path, encoded(name), name)
    wave, rate = read_audio(path)
    assert (len(wave), rate) == (LENGTH, RATE) and not caplog.records
    assert audio_seconds(path) == pytest.approx(LENGTH / RATE)
    if name not in ("ogg", "mp3"):
        np.testing.assert_allclose(wave, SINE, atol=1 / 64 if name == "u8.wav" else 1 / 16384)


@pytest.mark.parametrize("name", [*CONTAINERS, "flac", "ogg", "mp3"])
@pytest.mark.parametrize("share", [0.9, 0.7])
def test_cut_files_are_refused(tmp_path, name, share):
    data = encoded(name)
    path = put(tmp_path, data[: int(len(data) * share)], name)
    with pytest.raises(AudioError, match=r"was cut|cannot be read|before them"):
        read_audio(path)


def test_the_message_has_both_counts_and_the_way_out(tmp_path):
    path = put(tmp_path, wav(2 * LENGTH, PCM.tobytes()[: 2 * 8000]))
    words = r"a\.wav promises 16001 samples but holds 8000 \(its header counts 32002 bytes .* 16000 follow\).*copy it"
    with pytest.raises(AudioError, match=words):
        read_audio(path)
    with pytest.raises(AudioError, match="counts 32002 bytes of samples in its header but ends before them"):
        read_audio(put(tmp_path, wav(2 * LENGTH, b"")))


@pytest.mark.parametrize("name", [n for n in CONTAINERS if n != "stereo.wav"])
def test_a_few_missing_samples_are_a_warning(tmp_path, name, caplog):
    path = put(tmp_path, encoded(name)[:-8], name)
    for _ in range(2):
        wave, _ = read_audio(path)
    np.testing.assert_allclose(wave, SINE[: len(wave)], atol=1 / 64 if name == "u8.wav" else 1 / 16384)
    assert LENGTH - 10 < len(wave) < LENGTH
    (line,) = [r.message for r in caplog.records]  # once a file
    assert "promises" in line and f"samples but holds {len(wave)} (" in line


@pytest.mark.parametrize("size", [0x7FFFF000, 0x80000000, 0xFFFFFFFF, 0xFFFFFFDB, 0x7FFFF000 - 36])
def test_sizes_that_pipes_leave_are_no_promise(tmp_path, size, caplog):
    wave, _ = read_audio(put(tmp_path, wav(size, PCM.tobytes())))
    np.testing.assert_allclose(wave, SINE, atol=1 / 16384)
    assert not caplog.records


def test_a_header_that_was_never_finished_is_read_to_the_end(tmp_path, caplog):
    unfinished = bytearray(wav(0, PCM.tobytes()))
    unfinished[4:8] = bytes(4)
    w64 = encoded("w64")
    w64 = w64.replace(struct.pack("<Q", 2 * LENGTH + 24), struct.pack("<Q", 24))
    for name, data in {"a.wav": bytes(unfinished), "a.w64": w64}.items():
        path = put(tmp_path, data, name)
        caplog.clear()
        wave, _ = read_audio(path)
        np.testing.assert_allclose(wave[:LENGTH], SINE, atol=1 / 16384)
        assert len(wave) - LENGTH < 8 and audio_seconds(path) == pytest.approx(len(wave) / RATE)
        (line,) = [r.message for r in caplog.records]
        assert "its header says that there are no samples" in line and name in line


def test_an_empty_recording_stays_empty(tmp_path):
    title = struct.pack("<4sI4s4sI6s", b"LIST", 18, b"INFO", b"INAM", 6, b"empty\0")
    for after in (b"", title, title + bytes(3)):
        with pytest.raises(AudioError, match="holds no samples"):
            read_audio(put(tmp_path, wav(0, b"", after)))


def test_less_than_one_sample_is_an_empty_recording(tmp_path):
    mono = wav(1, b"\x01", b"\0")
    with pytest.raises(AudioError, match="holds no samples"):
        read_audio(put(tmp_path, mono))


def test_bytes_after_the_counted_samples_are_a_warning_but_titles_are_not(tmp_path, caplog):
    title = struct.pack("<4sI4s4sI6s", b"LIST", 18, b"INFO", b"INAM", 6, b"hello\0")
    assert len(read_audio(put(tmp_path, wav(2 * LENGTH, PCM.tobytes(), title)))[0]) == LENGTH
    assert len(read_audio(put(tmp_path, wav(2 * LENGTH, PCM.tobytes(), bytes(4))))[0]) == LENGTH
    assert not caplog.records
    path = put(tmp_path, wav(2 * 8000, PCM.tobytes()), "b.wav")
    np.testing.assert_allclose(read_audio(path)[0], SINE[:8000], atol=1 / 16384)
    assert f"{2 * (LENGTH - 8000)} bytes behind the samples" in caplog.text


def test_flac_of_unknown_length_is_read_and_a_wrong_one_refused(tmp_path):
    data = bytearray(encoded("flac"))
    data[21] &= 0xF0
    data[22:26] = bytes(4)
    path = put(tmp_path, bytes(data), "a.flac")
    np.testing.assert_allclose(read_audio(path)[0], SINE, atol=1 / 16384)
    assert audio_seconds(path) == pytest.approx(LENGTH / RATE)
    data[21] |= 0x0F  # 2^36 samples: nothing is reserved for them
    data[22:26] = b"\xff" * 4
    with pytest.raises(AudioError, match=f"promises 68719476735 samples but holds {LENGTH}"):
        read_audio(put(tmp_path, bytes(data), "a.flac"))


def test_ogg_without_an_end_is_a_warning(tmp_path, caplog):
    data = bytearray(encoded("ogg"))
    at = data.rfind(b"OggS")
    whole = put(tmp_path, bytes(data[:at]), "a.ogg")  # up to a page's end, as a copy in blocks may leave it
    with caplog.at_level(logging.WARNING):
        with pytest.raises(AudioError):
            read_audio(whole)  # nothing but headers in this short one
    assert "may have been cut" in caplog.text


def test_an_mp3_header_that_counts_one_frame_more_is_a_warning(tmp_path, caplog):
    data = encoded("mp3", bitrate_mode="VARIABLE")
    at = data.index(b"Xing") + 8
    count = struct.unpack(">I", data[at : at + 4])[0]
    for more, name in ((1, "a.mp3"), (2, "b.mp3")):
        path = put(tmp_path, data[:at] + struct.pack(">I", count + more) + data[at + 4 :], name)
        if more == 1:
            assert len(read_audio(path)[0]) >= LENGTH
            assert "a.mp3: its header counts one mp3 frame more" in caplog.text
        else:
            with pytest.raises(AudioError, match=f"counts {count + 2} mp3 frames and {count} are whole"):
                read_audio(path)


@pytest.mark.parametrize("mode", ["VARIABLE", "CONSTANT"])
def test_mp3_frames_are_counted(tmp_path, mode):
    """Without the header that counts frames libsndfile guesses the length from the first ones."""
    noise = np.random.default_rng(0).standard_normal(3 * RATE).astype(np.float32)
    noise *= np.repeat([0.5, 0.001, 0.5], RATE).astype(np.float32)
    data = encoded("mp3", noise, bitrate_mode=mode, compression_level=0.1)
    assert len(read_audio(put(tmp_path, data, "a.mp3"))[0]) == 3 * RATE
    tagged = b"ID3\x04\0\0\0\0\0\x0a" + bytes(10) + data + b"TAG" + bytes(125)
    assert len(read_audio(put(tmp_path, tagged, "b.mp3"))[0]) == 3 * RATE
    with pytest.raises(AudioError, match="make the reader stop after 48000"):
        read_audio(put(tmp_path, data + data, "c.mp3"))
    bare = data[data.index(data[:2], 4) :]
    if mode == "VARIABLE":
        with pytest.raises(AudioError, match="make the reader stop after"):
            read_audio(put(tmp_path, bare, "d.mp3"))
    else:
        assert len(read_audio(put(tmp_path, bare, "d.mp3"))[0]) == pytest.approx(3 * RATE, abs=4608)
    with pytest.raises(AudioError, match="in the middle of an mp3 frame"):
        read_audio(put(tmp_path, bare[: len(bare) // 2 - 7], "e.mp3"))
