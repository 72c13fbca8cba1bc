"""Frames of mp3 files, counted by their headers: about a hundredth of the time of decoding."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Mp3Frames:
    """Frames of an mp3 file."""

    num_frames: int
    """Whole frames of sound."""
    num_samples: int
    """Samples in a frame."""
    promised: int | None
    """Number of frames by the header of LAME and others; None without one."""
    is_cut: bool
    """Whether the file ends inside a frame."""


_KBIT = {
    (3, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (3, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (3, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (2, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (2, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_KBIT[2, 3] = _KBIT[2, 2]


def mp3_frames(path: Path) -> Mp3Frames | None:
    """Count the frames of an mp3 file by their headers; None if no two follow each other."""
    data = path.read_bytes()
    at, count, samples, promised, is_cut, kind = _tags(data, 0), 0, 0, None, False, None
    while at + 4 <= len(data):
        frame = _mp3_frame(data, at)
        if frame is None or (kind is not None and frame[2] != kind):
            past = _tags(data, at)
            # Skip other data. Two headers in a row are a frame; one alone may be chance.
            at = past if past > at else _next_frame(data, at + 1, kind)
            continue
        length, samples, kind = frame
        if at + length > len(data):
            is_cut = True
            break
        if count == 0 and promised is None:
            head = re.search(rb"Xing|Info", data[at : at + min(length, 64)])
            if head is not None and data[at + head.end() + 3] & 1:
                promised = struct.unpack(">I", data[at + head.end() + 4 : at + head.end() + 8])[0]
                at += length
                continue
            if data[at + 36 : at + 40] == b"VBRI":
                promised = struct.unpack(">I", data[at + 50 : at + 54])[0]
                at += length
                continue
        count += 1
        at += length
    return Mp3Frames(count, samples, promised, is_cut) if kind is not None and count else None


def _mp3_frame(data: bytes, at: int) -> tuple[int, int, tuple[int, int, int]] | None:
    """Bytes and samples of the frame at ``at``, and the part of its header that all frames share; None for no frame."""
    if at + 4 > len(data) or data[at] != 0xFF or data[at + 1] & 0xE0 != 0xE0:
        return None
    version, layer = data[at + 1] >> 3 & 3, 4 - (data[at + 1] >> 1 & 3)
    bits, rate, pad = data[at + 2] >> 4, data[at + 2] >> 2 & 3, data[at + 2] >> 1 & 1
    if version == 1 or layer == 4 or bits in (0, 15) or rate == 3:
        return None
    hertz = (44100, 48000, 32000)[rate] // {3: 1, 2: 2, 0: 4}[version]
    kbit = _KBIT[3 if version == 3 else 2, layer][bits - 1]
    samples = 384 if layer == 1 else 1152 if layer == 2 or version == 3 else 576
    unit = 4 if layer == 1 else 1
    length = (samples // 8 * kbit * 1000 // (hertz * unit) + pad) * unit
    return length, samples, (version, layer, rate)


def _next_frame(data: bytes, at: int, kind: tuple[int, int, int] | None) -> int:
    """Position of the next frame that is followed by another one, or the file's end."""
    while (at := data.find(b"\xff", at)) >= 0:
        frame = _mp3_frame(data, at)
        if frame is not None and kind in (None, frame[2]):
            after = _mp3_frame(data, at + frame[0])
            if after is not None and after[2] == frame[2]:
                return at
        at += 1
    return len(data)


def _tags(data: bytes, at: int) -> int:
    """Position after the tags (ID3, APE) at ``at``, before the sound or after it."""
    while True:
        if data[at : at + 3] == b"ID3" and len(data) >= at + 10:
            a, b, c, d = (byte & 0x7F for byte in data[at + 6 : at + 10])
            at += 10 + (a << 21 | b << 14 | c << 7 | d) + (10 if data[at + 5] & 0x10 else 0)
        elif data[at : at + 3] == b"TAG":
            at += 128
        elif data[at : at + 8] == b"APETAGEX" and len(data) >= at + 24:
            is_header = data[at + 23] & 0x20
            at += 32 + (struct.unpack("<I", data[at + 12 : at + 16])[0] if is_header else 0)
        else:
            return at
