"""Stream decoder of the RVQ codec: codes → log-mel → magnitudes → phase, block by block.

A block is one token frame or, where that has fewer than ``BLOCK`` mel frames, the fewest token frames with that many.
``LOOKAHEAD`` mel frames are held back until the next block is there, and half a window more is incomplete until then:
80 ms in all at the default settings, one token frame of 80 ms. Each mel frame goes through about
``griffin_lim_iterations`` steps of Griffin-Lim, so streaming costs as much as decoding a whole utterance.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

from speechlm_ext.tokenizers.codecs.config import RVQConfig
from speechlm_ext.tokenizers.codecs.phase import OnlinePhase
from speechlm_ext.tokenizers.streaming import CodeBuffer
from speechlm_ext.utils.device import one_thread

#: Min. mel frames of a block: with fewer, a step has little new data and reaches less.
BLOCK = 4
#: Mel frames that are held back. Fewer lower the latency and cost accuracy: 2 add 4 % to the log-mel error of phase
#: reconstruction, 0 add half of it.
LOOKAHEAD = 6


class RVQStreamDecoder:
    """Stream decoder of an ``rvq-kmeans`` codec; see the module's text and :class:`StreamDecoder`.

    Args:
        config: the codec's settings.
        magnitude: STFT magnitudes ``[T * frames_per_token, n_fft / 2 + 1]`` of codes ``[T, num_codebooks]``.
    """

    def __init__(self, config: RVQConfig, magnitude: Callable[[np.ndarray], torch.Tensor]) -> None:
        c = config
        self._magnitude = magnitude
        self._buffer = CodeBuffer((c.codebook_size,) * c.num_codebooks)
        self._block = math.ceil(BLOCK / c.frames_per_token)
        num_mel = self._block * c.frames_per_token
        self._phase = OnlinePhase(
            c.mel,
            lookahead=LOOKAHEAD,
            # A frame is in the window of its own block and, while it is held back, of the next ones.
            iterations=math.ceil(c.griffin_lim_iterations * num_mel / (num_mel + LOOKAHEAD)),
            momentum=c.griffin_lim_momentum,
        )
        self.frame_samples = c.frame_samples
        self.lookahead = math.ceil(self._phase.lag / self.frame_samples) + self._block - 1

    def push(self, codes: np.ndarray) -> np.ndarray:
        """See :class:`StreamDecoder`."""
        self._buffer.push(codes)
        parts = [np.zeros(0, np.float32)]
        while len(self._buffer.codes_TC) >= self._block:
            parts.append(self._decode(self._block))
        return np.concatenate(parts)

    def flush(self) -> np.ndarray:
        """See :class:`StreamDecoder`."""
        rest = len(self._buffer.codes_TC)
        parts = [self._decode(rest)] if rest else []
        with one_thread(), torch.inference_mode():
            parts.append(self._phase.finish().numpy())
        self._buffer.reset()
        return np.concatenate(parts)

    def _decode(self, num_frames: int) -> np.ndarray:
        """Samples that the next ``num_frames`` frames complete."""
        start = self._buffer.start
        codes_TC = self._buffer.slice(start, start + num_frames)
        self._buffer.drop_before(start + num_frames)
        with one_thread(), torch.inference_mode():
            return self._phase.push(self._magnitude(codes_TC)).numpy()
