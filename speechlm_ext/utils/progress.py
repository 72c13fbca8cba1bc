"""Progress bar of one pass over the rows or of one stage; it appears after two seconds."""

from __future__ import annotations

from tqdm import tqdm

_DELAY = 2.0


def stage_bar(what: str | None, total: int, *, unit: str = "row", progress: bool | None) -> tqdm:
    """A bar that is removed when it ends; ``progress=None`` shows it on a terminal only."""
    hide = True if what is None or progress is False else (None if progress is None else False)
    return tqdm(total=total, desc=what, unit=unit, unit_scale=True, leave=False, delay=_DELAY, disable=hide)
