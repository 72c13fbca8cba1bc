"""Frames of mp3 files, counted by their headers: about a hundredth of the time of decoding."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple


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


class _Frame(NamedTuple):
    """A frame by its header."""

    num_bytes: int
    num_samples: int
    kind: tuple[int, int, int]
    """Version, layer and sampling rate, which all frames of a file share."""


def mp3_frames(path: Path) -> Mp3Frames | None:
    """Count the frames of an mp3 file by their headers; None if no two follow each other."""
    data = path.read_bytes()
    at, num_frames, num_samples = _tags(data, 0), 0, 0
    promised: int | None = None
    kind: tuple[int, int, int] | None = None
    is_cut = False
    while at + 4 <= len(data) and not is_cut:
        frame = _frame_at(data, at)
        if frame is None or kind not in (None, frame.kind):
            after_tags = _tags(data, at)
            # A header in other data may be chance; two in a row are frames.
            at = after_tags if after_tags > at else _next_frame(data, at + 1, kind)
            continue
        num_samples, kind = frame.num_samples, frame.kind
        is_cut = at + frame.num_bytes > len(data)
        if num_frames == 0 and promised is None and not is_cut:
            promised = _frame_count(data[at : at + frame.num_bytes])
            num_frames += promised is None
        else:
            num_frames += not is_cut
        at += frame.num_bytes
    return Mp3Frames(num_frames, num_samples, promised, is_cut) if num_frames else None


def _frame_count(frame: bytes) -> int | None:
    """Number of frames by a header frame (Xing, Info or VBRI); None for a frame of sound."""
    tag = re.search(rb"(?:Xing|Info).{3}(.)(.{4})", frame[:72], re.DOTALL)
    if tag is not None and tag[1][0] & 1:
        return int.from_bytes(tag[2], "big")
    if frame[36:40] == b"VBRI" and len(frame) >= 54:
        return int.from_bytes(frame[50:54], "big")
    return None


def _frame_at(data: bytes, at: int) -> _Frame | None:
    """The frame whose header is at ``at``; None if there is none."""
    if at + 4 > len(data) or data[at] != 0xFF or data[at + 1] & 0xE0 != 0xE0:
        return None
    version, layer = data[at + 1] >> 3 & 3, 4 - (data[at + 1] >> 1 & 3)
    bits, rate, pad = data[at + 2] >> 4, data[at + 2] >> 2 & 3, data[at + 2] >> 1 & 1
    if version == 1 or layer == 4 or bits in (0, 15) or rate == 3:
        return None
    hertz = (44100, 48000, 32000)[rate] // {3: 1, 2: 2, 0: 4}[version]
    kbit = _KBIT[3 if version == 3 else 2, layer][bits - 1]
    num_samples = 384 if layer == 1 else 1152 if layer == 2 or version == 3 else 576
    unit = 4 if layer == 1 else 1
    num_bytes = (num_samples // 8 * kbit * 1000 // (hertz * unit) + pad) * unit
    return _Frame(num_bytes, num_samples, (version, layer, rate))


def _next_frame(data: bytes, at: int, kind: tuple[int, int, int] | None) -> int:
    """Position of the next frame that is followed by another one, or the file's end."""
    while (at := data.find(b"\xff", at)) >= 0:
        frame = _frame_at(data, at)
        if frame is not None and kind in (None, frame.kind):
            following = _frame_at(data, at + frame.num_bytes)
            if following is not None and following.kind == frame.kind:
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
