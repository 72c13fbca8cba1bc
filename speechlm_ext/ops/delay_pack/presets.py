"""The delay layouts of other systems, as arguments of `delay_pack`: to train on their tokens, or to load their
models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from speechlm_ext.ops.common.native import check, int_list

#: What `delay_preset` knows.
PRESETS = ("parallel", "espnet_v1", "espnet_v2", "musicgen", "musicgen_stereo", "moshi", "dia")


def delay_preset(
    name: str,
    num_streams: int,
    *,
    delays: Sequence[int] | None = None,
    pad_ids: Sequence[int] | int | None = None,
    tail_ids: Sequence[int] | int | None = None,
) -> dict[str, Any]:
    """Arguments with which `delay_pack` lays a segment out as another system does.

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
        delays: instead of the layout's own, as that system counts them (``moshi``'s initial row comes on top).
        pad_ids: instead of the layout's own fill; one int is taken for every stream. ``espnet_v2`` needs it.
        tail_ids: instead of the layout's own fill after the last frame.

    Returns:
        ``delays``, ``pad_ids``, ``tail_ids``, ``tail`` and ``fill_weight`` for `delay_pack`; ``["delays"]`` is also
        what `delay_unpack` and `DelayUnpacker` take.

    Raises:
        OpError: (a ValueError) for an unknown name, or a number of streams or values that the layout cannot have.

    Example:
        >>> delay_preset("musicgen", 4)["delays"]
        [1, 2, 3, 4]
    """
    op = f"delay_preset({name!r})"
    check(name in PRESETS, f"delay_preset: name must be one of {', '.join(PRESETS)}; got {name!r}")
    S = num_streams
    check(S >= 1, f"{op}: num_streams must be 1 or more; got {S}")
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
        check(S % 2 == 0, f"{op}: the streams are pairs of left and right; got {S} streams")
        own, pad, first_row = [s // 2 for s in range(S)], 2048, 1
    elif name == "moshi":
        own = [0] + [0 if k % 8 == 0 else 1 for k in range(S - 1)] if (S - 1) % 8 == 0 else None
        pad, first_row, tail = [32000] + [2048] * (S - 1), 1, 1
    else:
        own, pad, end = [0, *range(8, 7 + S)], 1026, 1025
    check(
        delays is not None or own is not None,
        f"{op}: give delays; the layout's own are for 1 + 8 k streams, not for {S}",
    )
    check(
        pad_ids is not None or pad is not None, f"{op}: give pad_ids, the id that each stream is filled with"
    )
    shifts = int_list(own if delays is None else delays, f"{op}: delays", S)  # type: ignore[arg-type]
    fills = _for_streams(pad if pad_ids is None else pad_ids, f"{op}: pad_ids", S)  # type: ignore[arg-type]
    after = end if tail_ids is None else tail_ids
    return {
        "delays": [d + first_row for d in shifts],
        "pad_ids": fills,
        "tail_ids": fills if after is None else _for_streams(after, f"{op}: tail_ids", S),
        "tail": tail,
        "fill_weight": fill_weight,
    }


def _for_streams(ids: Sequence[int] | int, name: str, num_streams: int) -> list[int]:
    return [ids] * num_streams if isinstance(ids, int) else int_list(ids, name, num_streams)
