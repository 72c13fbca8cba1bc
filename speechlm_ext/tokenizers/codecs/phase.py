"""Phase of a magnitude spectrogram that arrives bit by bit: blockwise fast Griffin-Lim.

What may still change is a short window of frames: the newest block and up to ``lookahead`` older frames. With each
block come ``iterations`` steps of fast Griffin-Lim (Perraudin, Balazs and Søndergaard, 2013) over this window, on its
left against the sound of the frames whose phases are fixed already, as in real-time iterative spectrogram inversion
with lookahead (Zhu, Beauregard and Wyse, 2007). Then all but the newest ``lookahead`` frames are fixed for good, and
those begin the next block's steps where they are. New frames begin with phase zero, so nothing is drawn.

The sound is a function of the blocks alone: of their content and of where one ends and the next begins.

Axes: T frames of the window, F bins of the spectrum, W samples of a frame (``n_fft``), N samples of the window.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from speechlm_ext.tokenizers.encoders.mel import MelConfig

#: Samples with less squared window over them are silent.
_TINY = 1e-8


class OnlinePhase:
    """Turns magnitudes into sound, block by block; frame i is centred on sample ``i * hop``.

    Args:
        mel: window, hop and FFT length.
        lookahead: frames that are held back.
        iterations: steps for each block.
        momentum: of fast Griffin-Lim; 0 is the classic one.

    Attributes:
        lag: samples by which what is given out is behind what came, once it flows: those of the held frames, and those
            that the first of them reaches back.
    """

    def __init__(self, mel: MelConfig, *, lookahead: int, iterations: int, momentum: float) -> None:
        self.hop, self.n_fft, self.lookahead = mel.hop, mel.n_fft, lookahead
        self.iterations, self.momentum = iterations, momentum
        start = (mel.n_fft - mel.window) // 2
        self.window_W = torch.zeros(mel.n_fft)
        self.window_W[start : start + mel.window] = torch.hann_window(mel.window)
        self._reach = mel.n_fft // 2 - start
        self.lag = lookahead * mel.hop + self._reach
        self.reset()

    def reset(self) -> None:
        """Forget everything; the next block begins a new sound."""
        #: Frames that are fixed, and samples that were given out.
        self._fixed = self._given = 0
        # Over the fixed frames: sums of windowed sound and of squared windows, from the start of frame `_fixed` on.
        self._sound_N, self._weight_N = torch.zeros(self.n_fft), torch.zeros(self.n_fft)
        self._held_TF = torch.zeros(0, self.n_fft // 2 + 1)
        self._spectrum_TF = torch.zeros(0, self.n_fft // 2 + 1, dtype=torch.complex64)

    def push(self, magnitude_TF: Tensor) -> Tensor:
        """Take in a block of frames, float32 ``[T, F]`` with T >= 1; returns the samples that are ready, ``[n]``."""
        return self._advance(magnitude_TF, last=False)

    def finish(self) -> Tensor:
        """The samples that are left: ``hop`` for each frame are then given out. The next block begins a new sound."""
        if len(self._held_TF) == self._fixed == 0:
            return torch.zeros(0)
        # One more frame, equal to the last, closes the last hop.
        out_N = self._advance(self._last_F[None], last=True)
        self.reset()
        return out_N

    def _advance(self, block_TF: Tensor, last: bool) -> Tensor:
        """Iterate over the window with a new block in it, fix what is not held, and cut off what is ready."""
        self._last_F = block_TF[-1]
        M_TF = torch.cat([self._held_TF, block_TF])
        X_TF = torch.cat([self._spectrum_TF, block_TF.to(torch.complex64)])
        T, H, W = len(M_TF), self.hop, self.n_fft
        length = (T - 1) * H + W
        sound_N, weight_N = (pad(x, (0, length - len(x))) for x in (self._sound_N, self._weight_N))
        # The sound is silent before its first sample and behind its last one.
        zero = W // 2 - self._fixed * H
        end = zero + (self._fixed + T - 1) * H if last else length
        square_TW = self.window_W.square().expand(T, W)
        gain_N = _inverse(weight_N + self._overlap_add(square_TW))
        gain_N[: max(zero, 0)] = gain_N[end:] = 0
        X_TF = self._iterate(X_TF, M_TF, sound_N * gain_N, gain_N)

        fixed = T if last else max(T - self.lookahead, 0)
        if fixed:
            reached = (fixed - 1) * H + W
            sound_N[:reached] += self._overlap_add(torch.fft.irfft(X_TF[:fixed], W) * self.window_W)
            weight_N[:reached] += self._overlap_add(square_TW[:fixed])
        # Ready is what no later frame reaches.
        ready = end - zero if last else (self._fixed + fixed) * H - self._reach
        first, self._given = self._given, max(self._given, ready)
        part = slice(zero + first, zero + self._given)
        out_N = (sound_N[part] * _inverse(weight_N[part])).clamp_(-1, 1)
        self._sound_N, self._weight_N = (
            pad(x[fixed * H :], (0, max(0, W - len(x) + fixed * H))) for x in (sound_N, weight_N)
        )
        self._fixed += fixed
        self._held_TF, self._spectrum_TF = M_TF[fixed:], X_TF[fixed:]
        return out_N

    def _iterate(self, X_TF: Tensor, M_TF: Tensor, before_N: Tensor, gain_N: Tensor) -> Tensor:
        """The steps of fast Griffin-Lim.

        Args:
            X_TF: spectrum to begin with, of magnitude ``M_TF``.
            before_N: what the fixed frames say, weighted.
            gain_N: one over the sum of all squared windows, 0 where the sound is silent.
        """
        W, momentum = self.n_fft, self.momentum
        previous_TF: Tensor | None = None
        for _ in range(self.iterations):
            frames_TW = torch.fft.irfft(X_TF, W).mul_(self.window_W)
            sound_N = self._overlap_add(frames_TW).mul_(gain_N).add_(before_N)
            rebuilt_TF = torch.fft.rfft(sound_N.unfold(0, W, self.hop) * self.window_W)
            step_TF = rebuilt_TF
            if previous_TF is not None:
                step_TF = torch.add(rebuilt_TF, rebuilt_TF - previous_TF, alpha=momentum)
            X_TF = torch.sgn(step_TF).mul_(M_TF)  # sgn has unit modulus; 0 stays 0
            previous_TF = rebuilt_TF
        return X_TF

    def _overlap_add(self, frames_TW: Tensor) -> Tensor:
        """Sum of frames, each a hop behind the one before: ``[T, W]`` → ``[(T - 1) * H + W]``.

        Cut into K hops, row t of the sum is frame t's hop 0, plus frame t - 1's hop 1, and so on: a diagonal of the
        frames, so one strided view and one reduction do it.
        """
        T, W = frames_TW.shape
        H, K = self.hop, -(-W // self.hop)
        rows = torch.zeros(T + 2 * (K - 1), K * H)
        rows[K - 1 : K - 1 + T, :W] = frames_TW
        diagonals = rows.as_strided((T + K - 1, K, H), (K * H, (K - 1) * H, 1), (K - 1) * H)
        return diagonals.sum(1).view(-1)[: (T - 1) * H + W]


def _inverse(weight_N: Tensor) -> Tensor:
    """One over the weights; 0 where there is none."""
    return torch.where(weight_N < _TINY, 0.0, weight_N.clamp_min(_TINY).reciprocal())
