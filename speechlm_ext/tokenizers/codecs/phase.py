"""Phase of a magnitude spectrogram that arrives block by block: fast Griffin-Lim over a sliding window.

The window holds the frames whose phase may still change: the newest block and up to ``lookahead`` older frames. Each
block adds ``iterations`` steps of fast Griffin-Lim (Perraudin, Balazs and Søndergaard, 2013) over the window, with the
sound of the fixed frames on its left, as in real-time iterative spectrogram inversion with lookahead (Zhu, Beauregard
and Wyse, 2007). Then all frames but the newest ``lookahead`` are fixed; these keep their phase as the start of the next
block's steps. New frames start with phase zero, so nothing is random.

The sound is a function of the blocks alone: of their content and their boundaries.

Axes: T frames of the window, F bins of the spectrum, W samples of a frame (``n_fft``), N samples of the window.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from speechlm_ext.tokenizers.encoders.mel import MelConfig

#: Samples with a smaller sum of squared windows are silent.
_TINY = 1e-8


class OnlinePhase:
    """Converts magnitudes to sound, block by block; frame i is centered on sample ``i * hop``.

    Args:
        mel: window, hop and FFT length.
        lookahead: frames that are held back.
        iterations: steps per block.
        momentum: of fast Griffin-Lim; 0 is the classic one.

    Attributes:
        lag: samples of delay in the steady state: those of the held frames, and half a window before the first of them.
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
        """Start a new sound."""
        #: Number of fixed frames, and of returned samples.
        self._num_fixed = self._num_returned = 0
        # Of the fixed frames: sums of windowed sound and of squared windows, from the start of frame `_num_fixed`.
        self._sound_N, self._weight_N = torch.zeros(self.n_fft), torch.zeros(self.n_fft)
        self._held_TF = torch.zeros(0, self.n_fft // 2 + 1)
        self._spectrum_TF = torch.zeros(0, self.n_fft // 2 + 1, dtype=torch.complex64)

    def push(self, magnitude_TF: Tensor) -> Tensor:
        """Append a block, float32 ``[T, F]`` with T >= 1; returns the samples ``[n]`` that it completes."""
        return self._advance(magnitude_TF, last=False)

    def finish(self) -> Tensor:
        """Return the remaining samples, so that each frame gives ``hop`` in all, and start a new sound."""
        if len(self._held_TF) == self._num_fixed == 0:
            return torch.zeros(0)
        # One more frame, equal to the last, closes the last hop.
        out_N = self._advance(self._last_F[None], last=True)
        self.reset()
        return out_N

    def _advance(self, block_TF: Tensor, last: bool) -> Tensor:
        """Append a block, iterate, fix the frames before the lookahead, and return the finished samples."""
        self._last_F = block_TF[-1]
        M_TF = torch.cat([self._held_TF, block_TF])
        X_TF = torch.cat([self._spectrum_TF, block_TF.to(torch.complex64)])
        T, H, W = len(M_TF), self.hop, self.n_fft
        length = (T - 1) * H + W
        sound_N, weight_N = (pad(x, (0, length - len(x))) for x in (self._sound_N, self._weight_N))
        # The sound is silent before its first sample and after its last one.
        zero = W // 2 - self._num_fixed * H
        end = zero + (self._num_fixed + T - 1) * H if last else length
        square_TW = self.window_W.square().expand(T, W)
        gain_N = _inverse(weight_N + self._overlap_add(square_TW))
        gain_N[: max(zero, 0)] = gain_N[end:] = 0
        X_TF = self._iterate(X_TF, M_TF, sound_N * gain_N, gain_N)

        num_new = T if last else max(T - self.lookahead, 0)
        if num_new:
            reached = (num_new - 1) * H + W
            sound_N[:reached] += self._overlap_add(torch.fft.irfft(X_TF[:num_new], W) * self.window_W)
            weight_N[:reached] += self._overlap_add(square_TW[:num_new])
        # No later frame reaches the samples before this one.
        num_final = end - zero if last else (self._num_fixed + num_new) * H - self._reach
        start, self._num_returned = self._num_returned, max(self._num_returned, num_final)
        part = slice(zero + start, zero + self._num_returned)
        out_N = (sound_N[part] * _inverse(weight_N[part])).clamp_(-1, 1)
        self._sound_N, self._weight_N = (
            pad(x[num_new * H :], (0, max(0, W - len(x) + num_new * H))) for x in (sound_N, weight_N)
        )
        self._num_fixed += num_new
        self._held_TF, self._spectrum_TF = M_TF[num_new:], X_TF[num_new:]
        return out_N

    def _iterate(self, X_TF: Tensor, M_TF: Tensor, fixed_N: Tensor, gain_N: Tensor) -> Tensor:
        """Spectrum after the steps of fast Griffin-Lim from ``X_TF``, of magnitude ``M_TF``.

        ``fixed_N`` is the weighted sound of the fixed frames, ``gain_N`` one over the sum of all squared windows.
        """
        W, momentum = self.n_fft, self.momentum
        previous_TF: Tensor | None = None
        for _ in range(self.iterations):
            frames_TW = torch.fft.irfft(X_TF, W).mul_(self.window_W)
            sound_N = self._overlap_add(frames_TW).mul_(gain_N).add_(fixed_N)
            rebuilt_TF = torch.fft.rfft(sound_N.unfold(0, W, self.hop) * self.window_W)
            step_TF = rebuilt_TF
            if previous_TF is not None:
                step_TF = torch.add(rebuilt_TF, rebuilt_TF - previous_TF, alpha=momentum)
            X_TF = torch.sgn(step_TF).mul_(M_TF)  # sgn has unit modulus; 0 stays 0
            previous_TF = rebuilt_TF
        return X_TF

    def _overlap_add(self, frames_TW: Tensor) -> Tensor:
        """Sum of frames that start one hop apart: ``[T, W]`` → ``[(T - 1) * H + W]``.

        Cut into K hops, row t of the sum is frame t's hop 0 plus frame t - 1's hop 1 and so on: a diagonal of the
        frames, so one strided view and one reduction compute it.
        """
        T, W = frames_TW.shape
        H, K = self.hop, -(-W // self.hop)
        rows = torch.zeros(T + 2 * (K - 1), K * H)
        rows[K - 1 : K - 1 + T, :W] = frames_TW
        diagonals = rows.as_strided((T + K - 1, K, H), (K * H, (K - 1) * H, 1), (K - 1) * H)
        return diagonals.sum(1).view(-1)[: (T - 1) * H + W]


def _inverse(weight_N: Tensor) -> Tensor:
    """One over the weights; 0 where the weight is 0."""
    return torch.where(weight_N < _TINY, 0.0, weight_N.clamp_min(_TINY).reciprocal())
