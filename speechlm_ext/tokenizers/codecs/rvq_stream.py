"""Sound of the RVQ codec while its codes arrive: codes → log-mel → magnitudes → phase, block by block.

A block is one token frame, or as many as make ``BLOCK`` mel frames where tokens are shorter. ``LOOKAHEAD`` mel frames
are held back until the block behind them is there, and half a window more cannot be whole before that; in all 80 ms at
the default settings, which is one token frame of 80 ms. Each mel frame goes through about as many steps of Griffin-Lim
as the codec's ``griffin_lim_iterations`` says, so streaming costs what decoding the whole utterance costs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from speechlm_ext.tokenizers.codecs.config import RVQConfig
from speechlm_ext.tokenizers.codecs.phase import OnlinePhase
from speechlm_ext.tokenizers.encoders.mel import one_thread
from speechlm_ext.tokenizers.streaming import Blocks

#: Fewest mel frames of a block: with fewer there is little new to each step, and the same steps reach less.
BLOCK = 4
#: Mel frames that are held back. Fewer are heard sooner and cost accuracy: 2 add 4 % to the log-mel error that phase
#: reconstruction leaves, 0 add half of it.
LOOKAHEAD = 6


class RVQStreamDecoder:
    """Stream decoder of an ``rvq-kmeans`` codec; see the module's text and :class:`StreamDecoder`.

    Args:
        config: the codec's settings.
        vocab_sizes: codes of each codebook.
        magnitude: STFT magnitudes ``[T * frames_per_token, n_fft / 2 + 1]`` of codes ``[T, num_codebooks]``.
    """

    def __init__(
        self, config: RVQConfig, vocab_sizes: Sequence[int], magnitude: Callable[[np.ndarray], torch.Tensor]
    ) -> None:
        c = config
        self._magnitude = magnitude
        self._blocks = Blocks(tuple(vocab_sizes), math.ceil(BLOCK / c.frames_per_token))
        num_mel = self._blocks.block * c.frames_per_token
        self._phase = OnlinePhase(
            c.mel,
            lookahead=LOOKAHEAD,
            # A frame is iterated over in its own block and, while it is held, in the next ones.
            iterations=math.ceil(c.griffin_lim_iterations * num_mel / (num_mel + LOOKAHEAD)),
            momentum=c.griffin_lim_momentum,
        )
        self.frame_samples = c.mel.hop * c.frames_per_token
        self.lookahead = math.ceil(self._phase.lag / self.frame_samples) + self._blocks.block - 1

    def push(self, codes: np.ndarray) -> np.ndarray:
        """See :class:`StreamDecoder`."""
        self._blocks.push(codes)
        block, parts = self._blocks.block, [np.zeros(0, np.float32)]
        while self._blocks.first + block <= self._blocks.end:
            parts.append(self._sound(block))
        return np.concatenate(parts)

    def flush(self) -> np.ndarray:
        """See :class:`StreamDecoder`."""
        rest = self._blocks.end - self._blocks.first
        parts = [self._sound(rest)] if rest else []
        with one_thread(), torch.inference_mode():
            parts.append(self._phase.finish().numpy())
        self._blocks.reset()
        return np.concatenate(parts)

    def _sound(self, count: int) -> np.ndarray:
        """What the next ``count`` frames make ready."""
        first = self._blocks.first
        codes_TC = self._blocks.take(first, first + count)
        self._blocks.forget(first + count)
        with one_thread(), torch.inference_mode():
            return self._phase.push(self._magnitude(codes_TC)).numpy()
