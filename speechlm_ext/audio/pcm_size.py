"""Sizes of the samples in uncompressed files: by the header, and by the file's length.

libsndfile reads the samples that are there and reports a wrong size, if at all, in a log of free form, so the chunk
sizes of wav, RF64, W64, AIFF, CAF, AU and NIST files are read here. It costs a few small reads.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

#: 32-bit sizes of writers to a pipe, which cannot seek back to write the right one.
_UNKNOWN_32 = (range(0x7FFF0000, 0x80010000), range(0xFFFF0000, 0x100000000))
_UNKNOWN_64 = 1 << 62
_NIST_HEADER = 1024


@dataclass(frozen=True)
class DataSize:
    """Size of the samples in an uncompressed file."""

    declared: int | None
    """Bytes by the header; None if it marks them as unknown."""
    held: int
    """Bytes from the first sample to the end of the file."""
    tail: int
    """Bytes after the declared ones, unless they are chunks of other data."""
    place: int = 0
    """Position of the size field in the file; 0 if it cannot be rewritten."""
    form: str = "<I"
    """Format of the size field for :mod:`struct`."""
    extra: int = 0
    """Bytes besides the samples that the size field counts."""

    @property
    def is_open(self) -> bool:
        """Whether the size is 0 although samples follow, as after a recorder was stopped."""
        limit = 1 << 8 * struct.calcsize(self.form)
        return self.declared == 0 and self.tail > 0 and self.place > 0 and self.held + self.extra < limit

    def repaired(self, data: bytes) -> bytes:
        """The file's bytes ``data`` with the right size."""
        size = struct.pack(self.form, self.held + self.extra)
        return data[: self.place] + size + data[self.place + len(size) :]


@dataclass(frozen=True)
class _Chunks:
    """Format of the chunks of a family of containers."""

    start: int
    """Position of the first chunk."""
    id_len: int
    form: str
    data: bytes
    """Id of the chunk of samples."""
    align: int = 1
    counted: int = 0
    """Bytes of its own header that a size counts."""
    skipped: int = 0
    """Bytes between the chunk's header and the first sample; a size counts them."""


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
    """Size of the samples of a wav, RF64, W64, AIFF, CAF, AU or NIST file; None for others and damaged headers."""
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
        if name == b"ds64":  # of RF64: 64-bit sizes of the file and of the samples
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
    """Whether chunks of other data, such as titles and markers, extend to the end; a few bytes more are padding."""
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
    """Size of the samples of a NIST SPHERE file, whose header is text."""
    values = {k: int(v) for k, v in re.findall(rb"(\w+) -i (\d+)", head.split(b"end_head")[0])}
    numbers = [values.get(k) for k in (b"sample_count", b"channel_count", b"sample_n_bytes")]
    first = re.match(rb"NIST_1A\s+(\d+)", head)
    if first is None or None in numbers or b"shorten" in head or b"wavpack" in head or b"shortpack" in head:
        return None
    count, channels, width = (int(n or 0) for n in numbers)
    return DataSize(count * channels * width, max(0, size - int(first[1])), 0)
