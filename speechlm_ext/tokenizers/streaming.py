"""Decoding codec codes while they arrive: the protocol, and a decoder for any codec with finite context.

The samples of a stream do not depend on how its codes are split over the pushes: any split gives the same bits. A
decoder therefore works in blocks at fixed frame numbers, and a push only completes blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import numpy as np

from speechlm_ext.errors import TokenizerError
from speechlm_ext.tokenizers.base import check_ids


@runtime_checkable
class StreamDecoder(Protocol):
    """Decodes the codes of one utterance after another to sound."""

    frame_samples: int
    """Samples of a frame."""
    lookahead: int
    """Max. number of frames that must follow a frame before all its samples are returned."""

    def push(self, codes: np.ndarray) -> np.ndarray:
        """Append the next frames, int ``[t, C]`` with t >= 0, and return the samples that they complete.

        Returns:
            float32 ``[n]`` in [-1, 1], following those returned before; n may be 0.

        Raises:
            TokenizerError: not such codes; the decoder is unchanged.
        """
        ...

    def flush(self) -> np.ndarray:
        """End the utterance and return its remaining samples; in all, each frame gives ``frame_samples``.

        The next push begins another utterance.
        """
        ...


def stream_decoder(codec: Any) -> StreamDecoder:
    """The stream decoder of a codec. Raises :class:`TokenizerError`: it has none."""
    make = getattr(codec, "stream_decoder", None)
    if make is None:
        raise TokenizerError(
            f"codec {getattr(codec, 'kind', type(codec).__name__)!r} cannot be decoded while its codes arrive; give it "
            "a method stream_decoder(), e.g. one that returns an OverlapDecoder."
        )
    return make()


class CodeBuffer:
    """Checked codes of a stream, without those that were dropped."""

    def __init__(self, vocab_sizes: tuple[int, ...]) -> None:
        self.vocab_sizes = vocab_sizes
        self.reset()

    def reset(self) -> None:
        """Drop all codes and start at frame 0."""
        self.codes_TC = np.zeros((0, len(self.vocab_sizes)), np.int64)
        """Codes of frames ``start`` to ``end``, int64."""
        self.start = 0
        """Number of the first frame."""

    @property
    def end(self) -> int:
        """Number of frames pushed."""
        return self.start + len(self.codes_TC)

    def push(self, codes: np.ndarray) -> None:
        """Append codes ``[t, C]``. Raises :class:`TokenizerError`: not such codes."""
        self.codes_TC = np.concatenate([self.codes_TC, check_ids(codes, self.vocab_sizes, "codec codes")])

    def drop_before(self, frame: int) -> None:
        """Drop the frames before ``frame``."""
        if frame > self.start:
            self.codes_TC, self.start = self.codes_TC[frame - self.start :], frame

    def slice(self, start: int, end: int) -> np.ndarray:
        """Codes of frames ``start`` to ``end``."""
        return self.codes_TC[start - self.start : end - self.start]


class OverlapDecoder:
    """Decodes windows of frames with context on both sides, and keeps their middle.

    If the receptive field of ``decode`` is within the contexts, the result equals offline decoding. Windows start at
    multiples of ``block`` frames; one window costs ``(left + block + right) / block`` times the decoding of its middle.

    Args:
        decode: codes int64 ``[t, C]`` → ``t * frame_samples`` samples, as the codec's own ``decode``.
        vocab_sizes: of the codec.
        frame_samples: samples of a frame.
        left, right: frames of context before and after a block.
        block: frames returned together.

    Raises:
        TokenizerError: a number below its minimum.
    """

    def __init__(
        self,
        decode: Callable[[np.ndarray], np.ndarray],
        *,
        vocab_sizes: tuple[int, ...],
        frame_samples: int,
        left: int,
        right: int,
        block: int = 1,
    ) -> None:
        numbers = {"frame_samples": frame_samples, "left": left, "right": right, "block": block}
        for name, value in numbers.items():
            minimum = 0 if name in ("left", "right") else 1
            if value < minimum:
                raise TokenizerError(f"overlap decoder: {name} must be at least {minimum}, got {value}.")
        self.frame_samples, self.left, self.right, self.block = frame_samples, left, right, block
        self.lookahead = right + block - 1
        self._decode = decode
        self._buffer = CodeBuffer(vocab_sizes)
        self._next = 0

    def push(self, codes: np.ndarray) -> np.ndarray:
        """See :class:`StreamDecoder`."""
        self._buffer.push(codes)
        parts = [np.zeros(0, np.float32)]
        while self._next + self.block + self.right <= self._buffer.end:
            parts.append(self._decode_block())
        return np.concatenate(parts)

    def flush(self) -> np.ndarray:
        """See :class:`StreamDecoder`."""
        parts = [np.zeros(0, np.float32)]
        while self._next < self._buffer.end:
            parts.append(self._decode_block())
        self._buffer.reset()
        self._next = 0
        return np.concatenate(parts)

    def _decode_block(self) -> np.ndarray:
        """Samples of the next block, or of its frames that are there."""
        start, end = self._next, min(self._next + self.block, self._buffer.end)
        left, right = max(start - self.left, 0), min(end + self.right, self._buffer.end)
        num_samples = (right - left) * self.frame_samples
        wave = np.asarray(self._decode(self._buffer.slice(left, right)), dtype=np.float32)
        if wave.shape != (num_samples,):
            raise TokenizerError(
                f"overlap decoder: {right - left} frames must decode to [{num_samples}] samples, got "
                f"{list(wave.shape)}; frame_samples {self.frame_samples} is not this codec's."
            )
        self._next = end
        self._buffer.drop_before(end - self.left)
        return wave[(start - left) * self.frame_samples : (end - left) * self.frame_samples]
