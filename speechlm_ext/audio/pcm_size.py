"""Sizes of the samples in uncompressed files: by the header, and by the file's length.

libsndfile reads the samples that are there and reports a wrong size, if at all, in a log of free form, so the chunk
sizes of wav, RF64, W64, AIFF, CAF, AU and NIST files are read here. It costs a few small reads.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, replace
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
    available: int
    """Bytes from the first sample to the end of the file."""
    trailing: int
    """Bytes after the declared ones, unless they are chunks of other data."""
    position: int = 0
    """Position of the size field in the file; 0 if it cannot be rewritten."""
    format: str = "<I"
    """Format of the size field for :mod:`struct`."""
    extra: int = 0
    """Bytes besides the samples that the size field counts."""

    @property
    def is_open(self) -> bool:
        """Whether the size is 0 although samples follow, as after a recorder was stopped."""
        fits = self.available + self.extra < 1 << 8 * struct.calcsize(self.format)
        return self.declared == 0 and self.trailing > 0 and self.position > 0 and fits

    def repaired(self, data: bytes) -> bytes:
        """The file's bytes ``data`` with the right size."""
        size = struct.pack(self.format, self.available + self.extra)
        return data[: self.position] + size + data[self.position + len(size) :]


@dataclass(frozen=True)
class _Chunks:
    """Format of the chunks of a family of containers."""

    start: int
    """Position of the first chunk."""
    id_len: int
    format: str
    """Format of a size for :mod:`struct`."""
    data: bytes
    """Id of the chunk of samples."""
    align: int = 1
    counted: int = 0
    """Bytes of its own header that a size counts."""
    skipped: int = 0
    """Bytes between the chunk's header and the first sample; a size counts them."""

    @property
    def header_len(self) -> int:
        return self.id_len + struct.calcsize(self.format)

    def read(self, file: BinaryIO, at: int) -> tuple[bytes, int] | None:
        """Id of the chunk at ``at`` and size of its content; None at the end of the file."""
        file.seek(at)
        header = file.read(self.header_len)
        if len(header) < self.header_len:
            return None
        return header[: self.id_len], struct.unpack(self.format, header[self.id_len :])[0] - self.counted

    def next(self, at: int, size: int) -> int:
        """Position after a chunk with ``size`` bytes of content."""
        return at + self.header_len + size + -(size + self.counted) % self.align


_W64_DATA = b"data\xf3\xac\xd3\x11\x8c\xd1\x00\xc0\x4f\x8e\xdb\x8a"
_RIFF = _Chunks(12, 4, "<I", b"data", 2)
_FAMILIES = {
    b"RIFF": _RIFF,
    b"RIFX": replace(_RIFF, format=">I"),
    b"RF64": _RIFF,
    b"BW64": _RIFF,
    b"FORM": _Chunks(12, 4, ">I", b"SSND", 2, skipped=8),
    b"caff": _Chunks(8, 4, ">Q", b"data", skipped=4),
    b"riff": _Chunks(40, 16, "<Q", _W64_DATA, 8, counted=24),
}


def data_size(path: Path) -> DataSize | None:
    """Size of the samples of an uncompressed file; None for other formats and damaged headers."""
    file_size = path.stat().st_size
    with open(path, "rb") as file:
        magic = file.read(4)
        if magic in (b".snd", b"dns."):
            return _au_size(file.read(8), ">" if magic == b".snd" else "<", file_size)
        if magic == b"NIST":
            return _nist_size(magic + file.read(_NIST_HEADER), file_size)
        family = _FAMILIES.get(magic)
        return None if family is None else _chunk_size(file, file_size, family)


def _chunk_size(file: BinaryIO, file_size: int, family: _Chunks) -> DataSize | None:
    at, long_size, long_position = family.start, 0, 0
    while True:
        chunk = family.read(file, at)
        if chunk is None:
            return None
        name, size = chunk
        if name == b"ds64":  # of RF64: 64-bit sizes of the file and of the samples
            sizes = file.read(16)
            if len(sizes) == 16:
                long_size, long_position = struct.unpack("<Q", sizes[8:])[0], at + family.header_len + 8
        if name == family.data:
            break
        if size < 0 or size + family.counted > file_size:
            return None
        at = family.next(at, size)
    start, position, format = at + family.header_len + family.skipped, at + family.id_len, family.format
    if long_position and size == 0xFFFFFFFF:
        size, position, format = long_size, long_position, "<Q"
    end = family.next(at, max(size, family.skipped))
    has_other_chunks = end >= file_size or _are_chunks(file, end, file_size, family)
    return DataSize(
        declared=_known(max(0, size - family.skipped), format),
        available=max(0, file_size - start),
        trailing=0 if has_other_chunks else file_size - end,
        position=position,
        format=format,
        extra=family.counted + family.skipped,
    )


def _known(size: int, format: str) -> int | None:
    """The size, or None if it stands for an unknown one."""
    if struct.calcsize(format) == 8:
        return None if size >= _UNKNOWN_64 else size
    return None if any(size in sizes for sizes in _UNKNOWN_32) else size


def _are_chunks(file: BinaryIO, at: int, file_size: int, family: _Chunks) -> bool:
    """Whether chunks of other data, e.g. titles, extend to the end; a few bytes more are padding."""
    while chunk := family.read(file, at):
        name, size = chunk
        is_chunk = re.fullmatch(rb"[ -~]{4}", name[:4]) and size >= 0
        if not is_chunk or at + family.header_len + size > file_size + 1:
            return False
        at = family.next(at, size)
    return True


def _au_size(header: bytes, order: str, file_size: int) -> DataSize | None:
    """Size of the samples of an AU file."""
    if len(header) < 8:
        return None
    start, size = struct.unpack(f"{order}II", header)
    return DataSize(_known(size, "I"), max(0, file_size - start), 0, 8, f"{order}I")


def _nist_size(header: bytes, file_size: int) -> DataSize | None:
    """Size of the samples of a NIST SPHERE file, whose header is text."""
    values = {k: int(v) for k, v in re.findall(rb"(\w+) -i (\d+)", header.split(b"end_head")[0])}
    numbers = [values.get(k) for k in (b"sample_count", b"channel_count", b"sample_n_bytes")]
    start = re.match(rb"NIST_1A\s+(\d+)", header)
    is_compressed = any(word in header for word in (b"shorten", b"wavpack", b"shortpack"))
    if start is None or None in numbers or is_compressed:
        return None
    count, channels, width = (int(n or 0) for n in numbers)
    return DataSize(count * channels * width, max(0, file_size - int(start[1])), 0)
