"""Slowdowns between two results files: ``python benchmarks/common/compare.py OLD NEW [--band 0.05]``.

It compares ratios to the rivals of the same run, not times: one machine differs from hour to hour. Results of different
kinds of devices are refused, since there the ratios differ as well. A ratio has fallen when it is below the old one by
more than the band: the larger of ``--band`` and three times the spread of both runs' rounds. Exit code 1 if a row's
ratios to all its rivals have fallen, 2 for unusable files.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.common.rows import ResultsError, Row, read  # noqa: E402
from speechlm_ext.utils.console import make_output_safe  # noqa: E402


def verdict_of(old: Row, new: Row, band: float) -> tuple[str, str]:
    """``("slower" | "faster" | "same" | "unknown", text)`` of one row."""
    rivals = sorted(set(old.ratios) & set(new.ratios))
    if not rivals:
        return "unknown", "no rival in common"
    band = max(band, 3 * (old.spread + new.spread))
    changes = {rival: new.ratios[rival] / old.ratios[rival] for rival in rivals if old.ratios[rival] > 0}
    shown = ", ".join(
        f"{rival} {old.ratios[rival]:.3g} -> {new.ratios[rival]:.3g}" for rival in sorted(changes)
    )
    # One ratio alone may fall because its rival became faster; all of them fall together if ours is slower.
    if all(change < 1 - band for change in changes.values()):
        verdict = "slower"
    elif all(change > 1 + band for change in changes.values()):
        verdict = "faster"
    else:
        verdict = "same"
    return verdict, f"{shown} (band {band:.0%})"


def main(argv: list[str] | None = None) -> int:
    """Print a line per row; returns the exit code."""
    parser = argparse.ArgumentParser(prog="compare.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument(
        "--band", type=float, default=0.05, help="minimum change of a ratio that counts (0.05)"
    )
    arguments = parser.parse_args(argv)
    try:
        old, new = read(arguments.old), read(arguments.new)
    except ResultsError as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    common = old.kinds & new.kinds
    if not common:
        kinds = [", ".join(sorted(results.kinds)) for results in (old, new)]
        print(
            f"compare: {old.path} was measured on {kinds[0]}, {new.path} on {kinds[1]}; the ratios of different "
            "devices do not compare. Measure both on one machine, e.g. by make bench-compare BASE=<commit>.",
            file=sys.stderr,
        )
        return 2
    old, new = (replace(r, rows=[row for row in r.rows if r.kind_of(row) in common]) for r in (old, new))
    before = {row.key: row for row in old.rows}
    print(f"{old.commit[:12]} -> {new.commit[:12]}")
    slower = 0
    for row in new.rows:
        name = " ".join(row.key)
        if row.key not in before:
            print(f"  new      {name}")
            continue
        verdict, text = verdict_of(before.pop(row.key), row, arguments.band)
        slower += verdict == "slower"
        print(f"  {verdict:8} {name}: {text}")
    for key in before:
        print(f"  gone     {' '.join(key)}")
    print(f"{slower} slower" if slower else "nothing became slower")
    return 1 if slower else 0


if __name__ == "__main__":
    make_output_safe()
    sys.exit(main())
