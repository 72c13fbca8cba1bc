"""Recordings that are shorter than their file promises.

libsndfile reads the samples of a cut file without an error, as if the recording were short, so the number of samples
read is compared with the container's own counts.
"""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from speechlm_ext.audio.mp3 import mp3_frames
from speechlm_ext.audio.pcm_size import data_size
from speechlm_ext.errors import AudioError

if TYPE_CHECKING:
    import soundfile

logger = logging.getLogger("speechlm_ext")
#: Seconds that may be missing from a file because of rounded headers: a warning, not an error.
_TOLERANCE = 0.01
#: Samples of silence that mp3 encoders add at both ends together and decoders remove.
_MP3_SILENCE = 4608
#: libsndfile reports an unknown length as a number near the largest 64-bit integer.
UNKNOWN_FRAMES = 1 << 62
_MAX_PAGE = 65307  # bytes of an Ogg page
_COPY_AGAIN = "copy it again; or, if this is all there is, rewrite it, e.g. by ffmpeg -i OLD NEW.wav"


def check_length(path: Path, file: soundfile.SoundFile, num_read: int) -> None:
    """Compare ``num_read`` samples per channel, all of ``file``, with the counts of the file.

    More than 10 ms missing is an :class:`AudioError`, less a warning in the log.
    """
    if file.format == "OGG":
        _check_ogg(path)
        return
    if file.format == "MP3":
        promised, reason = _mp3_promise(path, num_read)
    else:
        promised, reason = _pcm_promise(path, file, num_read)
    if promised <= num_read:
        return
    message = f"audio file {path} promises {promised} samples but holds {num_read} ({reason})"
    if promised - num_read > _TOLERANCE * file.samplerate:
        raise AudioError(f"{message}: it was cut, or its header is wrong; {_COPY_AGAIN}.")
    warn_once(f"{message}; it is read to its end.")


@functools.cache
def warn_once(text: str) -> None:
    """Log a warning once in a process."""
    logger.warning("%s", text)


def _pcm_promise(path: Path, file: soundfile.SoundFile, num_read: int) -> tuple[int, str]:
    """Number of samples that the header counts, and the reason; ``num_read`` if it promises none."""
    size = data_size(path)
    if size is not None and size.declared is not None and size.declared > size.available:
        if num_read == 0:
            raise AudioError(
                f"audio file {path} counts {size.declared} bytes of samples in its header but ends before them, so it "
                "was cut; copy or record it again, or leave it out."
            )
        reason = f"its header counts {size.declared} bytes of samples and {size.available} follow"
        return max(num_read + 1, round(num_read * size.declared / size.available)), reason
    if num_read < file.frames < UNKNOWN_FRAMES:
        return file.frames, "its header counts more"
    if size is not None and size.declared and num_read:
        bytes_per_sample = size.declared / num_read
        if size.trailing > _TOLERANCE * file.samplerate * bytes_per_sample:
            warn_once(
                f"audio file {path}: {size.trailing} bytes behind the samples that its header counts are neither "
                "samples nor other data and are not read."
            )
    return num_read, ""


def _mp3_promise(path: Path, num_read: int) -> tuple[int, str]:
    """As :func:`_pcm_promise`, by the frame count of the header and the frames themselves."""
    frames = mp3_frames(path)
    if frames is None:
        return num_read, ""
    missing = 0 if frames.promised is None else frames.promised - frames.num_frames
    if missing == 1 and not frames.is_cut:  # some encoders count the header's own frame
        warn_once(
            f"audio file {path}: its header counts one mp3 frame more than it holds; it is read to its end."
        )
    elif missing > 0:
        reason = f"its header counts {frames.promised} mp3 frames and {frames.num_frames} are whole"
        return num_read + missing * frames.num_samples, reason
    elif frames.is_cut and frames.promised is None:
        raise AudioError(
            f"audio file {path} ends in the middle of an mp3 frame, so it was cut; {_COPY_AGAIN}."
        )
    elif num_read < frames.num_frames * frames.num_samples - _MP3_SILENCE:
        raise AudioError(
            f"audio file {path} holds about {frames.num_frames * frames.num_samples} samples, but its header or first "
            f"frames make the reader stop after {num_read}; rewrite it, e.g. by ffmpeg -i OLD NEW.wav."
        )
    return num_read, ""


def _check_ogg(path: Path) -> None:
    """Require that the last page is whole. Raises :class:`AudioError`."""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - _MAX_PAGE))
        data = file.read()
    start = data.rfind(b"OggS\0")
    page = data[start:] if start >= 0 else b""
    sizes = page[27 : 27 + page[26]] if len(page) >= 27 else b""  # of the page's segments
    if len(page) < 27 or len(sizes) < page[26] or len(page) < 27 + len(sizes) + sum(sizes):
        raise AudioError(
            f"audio file {path} ends in the middle of an Ogg page, so it was cut; {_COPY_AGAIN}."
        )
    if not page[5] & 4:
        warn_once(f"audio file {path}: its last page is not marked as the end; it may have been cut.")
