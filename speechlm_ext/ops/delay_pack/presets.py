"""Delay layouts of other systems, as arguments of `delay_pack`: to train on their tokens, or to load their models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from speechlm_ext.ops.common.native import OpError, int_list

#: Names that `delay_preset` takes.
PRESETS = ("parallel", "espnet_v1", "espnet_v2", "musicgen", "musicgen_stereo", "moshi", "dia")


def delay_preset(
    name: str,
    num_streams: int,
    *,
    delays: Sequence[int] | None = None,
    pad_ids: Sequence[int] | int | None = None,
    tail_ids: Sequence[int] | int | None = None,
) -> dict[str, Any]:
    """Arguments of `delay_pack` for the layout of another system.

    ==================  ==========================  =====  =======================  ===================================
    name                delays                      rows   fills                    defined by
    ==================  ==========================  =====  =======================  ===================================
    ``parallel``        0, 0, …                     T      none                     no delay
    ``espnet_v1``       0, 1, 2, …                  T      0; the last S-1 frames   ESPnet-SpeechLM, ``ARDelayLM``
                                                           are cut (append pads)
    ``espnet_v2``       0, 1, 2, …                  T+S-1  ``pad_ids``, learnt      ESPnet-SpeechLM, 2026
    ``musicgen``        1, 2, 3, …                  T+S    2048                     MusicGen (Copet et al. 2023), delay
                                                                                    pattern; audiocraft
    ``musicgen_stereo`` 1, 1, 2, 2, …               T+S/2  2048                     its stereo models
    ``moshi``           1, then 1, 2, 2, … for      T+1    32000, then 2048         Moshi (Défossez et al. 2024):
                        each 8 codebooks                                            ``_delay_sequence`` behind a first
                                                                                    row of initial ids
    ``dia``             0, 8, 9, 10, …              T+max  1026 before, 1025 after  Dia-1.6B
    ==================  ==========================  =====  =======================  ===================================

    Args:
        name: one of `PRESETS`.
        num_streams: S.
        delays: replaces the layout's own, as that system counts them (``moshi``'s initial row is added).
        pad_ids: replaces the layout's own pad; one int for all streams. ``espnet_v2`` needs it.
        tail_ids: replaces the layout's own pad after the last frame.

    Returns:
        ``delays``, ``pad_ids``, ``tail_ids``, ``tail`` and ``fill_weight`` for `delay_pack`; `delay_unpack` and
        `DelayUnpacker` take the same ``delays``.

    Raises:
        OpError: (a ValueError) an unknown name, or a number of streams or values that the layout cannot have.

    Example:
        >>> delay_preset("musicgen", 4)["delays"]
        [1, 2, 3, 4]
    """
    op = f"delay_preset({name!r})"
    if name not in PRESETS:
        raise OpError(f"delay_preset: name must be one of {', '.join(PRESETS)}; got {name!r}")
    S = num_streams
    if S < 1:
        raise OpError(f"{op}: num_streams must be 1 or more; got {S}")
    own: list[int] | None
    pad: list[int] | int | None = 0
    end: list[int] | int | None = None
    tail: str | int = "keep"
    fill_weight, first_row = 0.0, 0
    if name == "parallel":
        own = [0] * S
    elif name == "espnet_v1":
        own, tail = list(range(S)), "trim"
    elif name == "espnet_v2":
        own, pad, fill_weight = list(range(S)), None, 1.0
    elif name == "musicgen":
        own, pad, first_row = list(range(S)), 2048, 1
    elif name == "musicgen_stereo":
        if S % 2:
            raise OpError(f"{op}: the streams are pairs of left and right; got {S} streams")
        own, pad, first_row = [s // 2 for s in range(S)], 2048, 1
    elif name == "moshi":
        own = [0] + [0 if k % 8 == 0 else 1 for k in range(S - 1)] if (S - 1) % 8 == 0 else None
        pad, first_row, tail = [32000] + [2048] * (S - 1), 1, 1
    else:
        own, pad, end = [0, *range(8, 7 + S)], 1026, 1025
    if delays is None and own is None:
        raise OpError(f"{op}: give delays; the layout's own are for 1 + 8 k streams, not for {S}")
    if pad_ids is None and pad is None:
        raise OpError(f"{op}: give pad_ids, the pad id of each stream")
    shifts = int_list(own if delays is None else delays, f"{op}: delays", S)  # type: ignore[arg-type]
    pads = _for_streams(pad if pad_ids is None else pad_ids, f"{op}: pad_ids", S)  # type: ignore[arg-type]
    after = end if tail_ids is None else tail_ids
    return {
        "delays": [d + first_row for d in shifts],
        "pad_ids": pads,
        "tail_ids": pads if after is None else _for_streams(after, f"{op}: tail_ids", S),
        "tail": tail,
        "fill_weight": fill_weight,
    }


def _for_streams(ids: Sequence[int] | int, name: str, num_streams: int) -> list[int]:
    return [ids] * num_streams if isinstance(ids, int) else int_list(ids, name, num_streams)
