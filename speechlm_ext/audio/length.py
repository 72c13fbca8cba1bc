"""What a recording's file says of its length, and what it holds: a broken copy is not taken for a short recording.

libsndfile reads what is there. A file that was cut, whose header was never finished, or whose length nobody wrote down
gives fewer samples without a word, so the containers' own counts are read here: chunk sizes (wav, RF64, W64, AIFF, CAF,
AU, NIST), the end of the last Ogg page, the frames of an mp3. It costs a few small reads; of an mp3 the frame headers
are walked, about a hundredth of the time of decoding.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

#: 32-bit sizes that writers to a pipe leave, who cannot come back to write the right one.
_UNKNOWN_32 = (range(0x7FFF0000, 0x80010000), range(0xFFFF0000, 0x100000000))
_UNKNOWN_64 = 1 << 62
_MAX_PAGE = 65307  # bytes of an Ogg page
_NIST_HEADER = 1024


@dataclass(frozen=True)
class DataSize:
    """Where the samples of an uncompressed file are, and how many bytes of them."""

    declared: int | None
    """Bytes that the header counts; None where it says that it does not know."""
    held: int
    """Bytes from the first sample to the end of the file."""
    tail: int
    """Bytes behind those that the header counts, unless they are chunks of other data."""
    place: int = 0
    """Position in the file of the size, or 0 where it cannot be written anew."""
    form: str = "<I"
    """How the size is written, for :mod:`struct`."""
    extra: int = 0
    """Bytes that the size counts besides the samples."""

    @property
    def is_open(self) -> bool:
        """Whether the size is 0 although samples follow: nobody came back to write it."""
        limit = 1 << 8 * struct.calcsize(self.form)
        return self.declared == 0 and self.tail > 0 and self.place > 0 and self.held + self.extra < limit

    def mended(self, data: bytes) -> bytes:
        """The file's bytes with the size that it holds."""
        size = struct.pack(self.form, self.held + self.extra)
        return data[: self.place] + size + data[self.place + len(size) :]


@dataclass(frozen=True)
class _Chunks:
    """How a family of containers writes its chunks."""

    start: int
    """Position of the first chunk."""
    id_len: int
    form: str
    data: bytes
    """Id of the chunk of samples."""
    align: int = 1
    counted: int = 0
    """Header bytes that a size counts."""
    skipped: int = 0
    """Bytes between the chunk's header and the first sample, which its size counts."""


_W64_DATA = b"data\xf3\xac\xd3\x11\x8c\xd1\x00\xc0\x4f\x8e\xdb\x8a"
_FAMILIES = {
    b"RIFF": _Chunks(12, 4, "<I", b"data", 2),
    b"RIFX": _Chunks(12, 4, ">I", b"data", 2),
    b"RF64": _Chunks(12, 4, "<I", b"data", 2),
    b"BW64": _Chunks(12, 4, "<I", b"data", 2),
    b"FORM": _Chunks(12, 4, ">I", b"SSND", 2, skipped=8),
    b"caff": _Chunks(8, 4, ">Q", b"data", skipped=4),
    b"riff": _Chunks(40, 16, "<Q", _W64_DATA, 8, counted=24),
}


def data_size(path: Path) -> DataSize | None:
    """The size of the samples of a wav, RF64, W64, AIFF, CAF, AU or NIST file; None for others and damaged headers."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        magic = file.read(4)
        if magic in (b".snd", b"dns."):
            head = file.read(8)
            if len(head) < 8:
                return None
            form = ">I" if magic == b".snd" else "<I"
            offset, declared = struct.unpack(form[0] + "II", head)
            return _size(declared, max(0, size - offset), 0, 8, form, 0)
        if magic == b"NIST":
            return _nist_size(magic + file.read(_NIST_HEADER), size)
        family = _FAMILIES.get(magic)
        return None if family is None else _chunk_size(file, size, family)


def _chunk_size(file: BinaryIO, size: int, family: _Chunks) -> DataSize | None:
    width = struct.calcsize(family.form)
    at, long_size = family.start, (0, 0)
    while True:
        file.seek(at)
        head = file.read(family.id_len + width)
        if len(head) < family.id_len + width:
            return None
        name, (count,) = head[: family.id_len], struct.unpack(family.form, head[family.id_len :])
        if name == b"ds64":  # of RF64: 64-bit sizes of the whole and of the samples
            more = file.read(16)
            if len(more) == 16:
                long_size = struct.unpack("<Q", more[8:])[0], at + len(head) + 8
        if name == family.data:
            break
        count -= family.counted
        if count < 0 or count > size:
            return None
        at += len(head) + count + -count % family.align
    place, form = at + family.id_len, family.form
    if long_size[1] and count == 0xFFFFFFFF:
        count, place, form = long_size[0], long_size[1], "<Q"
    extra = family.counted + family.skipped
    first = at + len(head) + family.skipped
    declared = max(0, count - extra)
    rest = first + declared + -(declared + family.skipped) % family.align
    tail = 0 if rest >= size or _are_chunks(file, rest, size, family) else size - rest
    return _size(declared, max(0, size - first), tail, place, form, extra)


def _size(declared: int, held: int, tail: int, place: int, form: str, extra: int) -> DataSize:
    wide = struct.calcsize(form) == 8
    is_unknown = declared >= _UNKNOWN_64 if wide else any(declared in sizes for sizes in _UNKNOWN_32)
    return DataSize(None if is_unknown else declared, held, tail, place, form, extra)


def _are_chunks(file: BinaryIO, at: int, size: int, family: _Chunks) -> bool:
    """Whether chunks of other data go on to the end, as titles and markers do; a few bytes more are padding."""
    width = struct.calcsize(family.form)
    while size - at >= family.id_len + width:
        file.seek(at)
        head = file.read(family.id_len + width)
        count = struct.unpack(family.form, head[family.id_len :])[0] - family.counted
        if not re.fullmatch(rb"[ -~]{4}", head[:4]) or count < 0 or at + len(head) + count > size + 1:
            return False
        at += len(head) + count + -count % family.align
    return True


def _nist_size(head: bytes, size: int) -> DataSize | None:
    """Of a NIST SPHERE file, whose header is text."""
    values = {k: int(v) for k, v in re.findall(rb"(\w+) -i (\d+)", head.split(b"end_head")[0])}
    numbers = [values.get(k) for k in (b"sample_count", b"channel_count", b"sample_n_bytes")]
    first = re.match(rb"NIST_1A\s+(\d+)", head)
    if first is None or None in numbers or b"shorten" in head or b"wavpack" in head or b"shortpack" in head:
        return None
    count, channels, width = (int(n or 0) for n in numbers)
    return DataSize(count * channels * width, max(0, size - int(first[1])), 0)


# ---- Ogg ------------------------------------------------------------------------------------------------------------
def ogg_end(path: Path) -> str:
    """How an Ogg file ends: ``whole``, ``open`` (its last page is not marked as the end) or ``cut`` (in a page)."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        file.seek(max(0, size - _MAX_PAGE))
        data = file.read()
    at = data.rfind(b"OggS\0")
    if at < 0 or len(data) < at + 27 or len(data) < at + 27 + data[at + 26]:
        return "cut"
    segments = data[at + 27 : at + 27 + data[at + 26]]
    if len(data) < at + 27 + len(segments) + sum(segments):
        return "cut"
    return "whole" if data[at + 5] & 4 else "open"


# ---- mp3 ------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Mp3Frames:
    """What the frames of an mp3 file are."""

    num_frames: int
    """Whole frames of sound."""
    num_samples: int
    """Samples in a frame."""
    promised: int | None
    """Frames of sound that the header of LAME and others counts; None without one."""
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
    """The frames of an mp3 file by their headers; None where no two follow each other."""
    data = path.read_bytes()
    at, count, samples, promised, is_cut, kind = _tags(data, 0), 0, 0, None, False, None
    while at + 4 <= len(data):
        frame = _mp3_frame(data, at)
        if frame is None or (kind is not None and frame[2] != kind):
            past = _tags(data, at)
            # Sound is looked for behind what is no frame; a header alone may be chance, two are none.
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
    """Bytes and samples of the frame whose header is here, and what all frames of a file share; None for none."""
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
    """Position of the next frame that another one follows, or the file's end."""
    while (at := data.find(b"\xff", at)) >= 0:
        frame = _mp3_frame(data, at)
        if frame is not None and kind in (None, frame[2]):
            after = _mp3_frame(data, at + frame[0])
            if after is not None and after[2] == frame[2]:
                return at
        at += 1
    return len(data)


def _tags(data: bytes, at: int) -> int:
    """Position behind the tags that begin here, in front of the sound or behind it."""
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
