"""Codec codes to sound while they arrive: the protocol, and a decoder for any codec with finite context.

The samples of a stream do not depend on how its codes are pushed: any split gives the same bits. A decoder therefore
works in blocks on a grid that is fixed by the frames' numbers, and a push only decides how many blocks are whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import numpy as np

from speechlm_ext.errors import TokenizerError
from speechlm_ext.tokenizers import base


@runtime_checkable
class StreamDecoder(Protocol):
    """Turns the codes of one utterance after the other into sound."""

    frame_samples: int
    """Samples of a frame."""
    lookahead: int
    """Frames that must follow a frame, at most, before all its samples are out."""

    def push(self, codes: np.ndarray) -> np.ndarray:
        """Take in the next frames, int ``[t, C]`` with t >= 0, and give out the samples that are ready.

        Returns:
            float32 ``[n]`` in [-1, 1], the ones behind those given out before; n may be 0.

        Raises:
            TokenizerError: not such codes; nothing was taken in.
        """
        ...

    def flush(self) -> np.ndarray:
        """End the utterance: its remaining samples, ``frame_samples`` for each frame altogether. The next push begins
        another one."""
        ...


def stream_decoder(codec: Any) -> StreamDecoder:
    """The stream decoder of a codec.

    Raises:
        TokenizerError: it has none.
    """
    make = getattr(codec, "stream_decoder", None)
    if make is None:
        raise TokenizerError(
            f"codec {getattr(codec, 'kind', type(codec).__name__)!r} cannot be decoded while its codes arrive; give it "
            "a method stream_decoder(), e.g. one that returns an OverlapDecoder."
        )
    return make()


class Blocks:
    """Cuts pushed codes into blocks of a fixed number of frames.

    Args:
        vocab_sizes: of the codec; codes are checked against them.
        block: frames.
    """

    def __init__(self, vocab_sizes: tuple[int, ...], block: int) -> None:
        self.vocab_sizes, self.block = vocab_sizes, block
        self.reset()

    def reset(self) -> None:
        """Forget all codes."""
        self.codes_TC = np.zeros((0, len(self.vocab_sizes)), np.int64)
        """Codes that are kept, int64."""
        self.first = 0
        """Number of the first of them."""

    @property
    def end(self) -> int:
        """Frames that came so far."""
        return self.first + len(self.codes_TC)

    def push(self, codes: np.ndarray) -> None:
        """Take in codes ``[t, C]``. Raises :class:`TokenizerError`."""
        checked = base.check_ids(codes, self.vocab_sizes, "codec codes")
        self.codes_TC = np.concatenate([self.codes_TC, checked])

    def forget(self, frame: int) -> None:
        """Drop what lies before a frame."""
        if frame > self.first:
            self.codes_TC, self.first = self.codes_TC[frame - self.first :], frame

    def take(self, start: int, end: int) -> np.ndarray:
        """Codes of frames ``start`` to ``end``."""
        return self.codes_TC[start - self.first : end - self.first]


class OverlapDecoder:
    """Decodes windows of frames, with context on both sides, and keeps their middle.

    Where ``decode`` looks no further than the contexts reach, the sound is that of the whole utterance: a window lacks
    only frames that its middle does not hear. Windows lie on a grid of ``block`` frames, and one with context costs
    ``(left + block + right) / block`` times the decoding of its middle.

    Args:
        decode: codes int64 ``[t, C]`` → ``t * frame_samples`` samples, as the codec's own ``decode``.
        vocab_sizes: of the codec.
        frame_samples: samples of a frame.
        left, right: frames of context that ``decode`` hears before and behind a frame.
        block: frames given out together.
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
        for name, value, least in (
            ("frame_samples", frame_samples, 1),
            ("left", left, 0),
            ("right", right, 0),
            ("block", block, 1),
        ):
            if value < least:
                raise TokenizerError(f"overlap decoder: {name} must be at least {least}, got {value}.")
        self.frame_samples, self.left, self.right, self.block = frame_samples, left, right, block
        self.lookahead = right + block - 1
        self._decode = decode
        self._blocks = Blocks(vocab_sizes, block)
        self._next = 0

    def push(self, codes: np.ndarray) -> np.ndarray:
        """See :class:`StreamDecoder`."""
        self._blocks.push(codes)
        parts = [np.zeros(0, np.float32)]
        while self._next + self.block + self.right <= self._blocks.end:
            parts.append(self._window())
        return np.concatenate(parts)

    def flush(self) -> np.ndarray:
        """See :class:`StreamDecoder`."""
        parts = [np.zeros(0, np.float32)]
        while self._next < self._blocks.end:
            parts.append(self._window())
        self._blocks.reset()
        self._next = 0
        return np.concatenate(parts)

    def _window(self) -> np.ndarray:
        """Sound of the next block, of what there is of it."""
        start = max(self._next - self.left, 0)
        stop = min(self._next + self.block, self._blocks.end)
        end = min(stop + self.right, self._blocks.end)
        wave = np.asarray(self._decode(self._blocks.take(start, end)), dtype=np.float32)
        if wave.shape != ((end - start) * self.frame_samples,):
            raise TokenizerError(
                f"overlap decoder: {end - start} frames must decode to [{(end - start) * self.frame_samples}] samples, "
                f"got {list(wave.shape)}; frame_samples {self.frame_samples} is not this codec's."
            )
        middle = wave[(self._next - start) * self.frame_samples : (stop - start) * self.frame_samples]
        self._next = stop
        self._blocks.forget(stop - self.left)
        return middle
