"""The history of all committed results as one page and one table: ``make bench-report``.

Reads ``benchmarks/results/*.json`` (and ``benchmarks/out/*.json``, the runs of this machine), writes
``benchmarks/out/report.html`` with a curve per op and device, and prints the newest table in Markdown for the README.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.common.rows import Results, ResultsError, Row, read  # noqa: E402
from speechlm_ext.evaluation.report import page as report  # noqa: E402
from speechlm_ext.evaluation.report.page import Cell, Section  # noqa: E402
from speechlm_ext.utils.console import make_output_safe  # noqa: E402
from speechlm_ext.utils.files.io import atomic_write_text  # noqa: E402

HERE = Path(__file__).resolve().parents[1]


def newest(history: list[Results]) -> dict[tuple[str, str, str], tuple[Results, Row]]:
    """The newest row of each op, shape and device."""
    found: dict[tuple[str, str, str], tuple[Results, Row]] = {}
    for results in sorted(history, key=lambda r: r.date):
        for row in results.rows:
            found[row.key] = (results, row)
    return found


def markdown(history: list[Results]) -> str:
    """One line per op, shape and device."""
    lines = [
        "| op | shape | device | time | of the limit | rival time ÷ ours | commit |",
        "|---|---|---|---|---|---|---|",
    ]
    for key, (results, row) in sorted(newest(history).items()):
        share = "" if row.limit_fraction is None else f"{row.limit_fraction:.0%}"
        ratios = ", ".join(f"{rival} {ratio:.3g}" for rival, ratio in sorted(row.ratios.items()))
        lines.append(
            f"| {' | '.join(key)} | {row.seconds * 1e6:,.1f} us | {share} | {ratios} | {results.commit[:12]} |"
        )
    return "\n".join(lines)


def curves(history: list[Results], op: str, device: str) -> str:
    """The ratios to every rival over the commits, one line per shape and rival."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    runs = sorted(
        (r for r in history if any(w.op == op and w.device == device for w in r.rows)), key=lambda r: r.date
    )
    fig, axes = plt.subplots(figsize=(8.6, 3.6), layout="constrained")
    lines: dict[str, list[tuple[int, float]]] = {}
    for at, results in enumerate(runs):
        for row in results.rows:
            if (row.op, row.device) == (op, device):
                for rival, ratio in row.ratios.items():
                    lines.setdefault(f"{row.shape}: {rival}", []).append((at, ratio))
    for name, points in sorted(lines.items()):
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3.5, label=name)
    axes.set_xticks(range(len(runs)), [r.commit[:7] for r in runs], rotation=45, ha="right", fontsize=8)
    axes.set_yscale("log")
    axes.axhline(1, color="#999", linewidth=1)
    axes.set_ylabel("rival time ÷ our time")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    buffer = io.StringIO()
    fig.savefig(buffer, format="svg")
    plt.close(fig)
    return buffer.getvalue()


def main() -> int:
    """Write the page and print the table."""
    history = []
    for path in sorted([*(HERE / "results").glob("*.json"), *(HERE / "out").glob("*.json")]):
        try:
            history.append(read(path))
        except ResultsError as error:
            print(f"bench-report: left out {error}", file=sys.stderr)
    history = [h for h in history if h.rows]
    if not history:
        print(
            "bench-report: no results in benchmarks/results or benchmarks/out; run make bench",
            file=sys.stderr,
        )
        return 2
    sections = []
    pairs = sorted({(row.op, row.device) for h in history for row in h.rows})
    for op, device in pairs:
        rows = []
        for (o, shape, d), (results, row) in sorted(newest(history).items()):
            if (o, d) == (op, device):
                share = "" if row.limit_fraction is None else f"{row.limit_fraction:.0%}"
                ratios = ", ".join(f"{rival} {ratio:.3g}" for rival, ratio in sorted(row.ratios.items()))
                time = Cell(f"{row.seconds * 1e6:,.1f}", "num")
                rows.append((shape, time, Cell(share, "num"), ratios, Cell(results.commit[:12], "mono")))
        heads = ("shape", Cell("us", "num"), Cell("of the limit", "num"), "rival time ÷ ours", "commit")
        svg = curves(history, op, device).encode()
        figure = report.figure(svg, "image/svg+xml", "Above 1: faster than that rival in the same run.")
        anchor = f"{op}-{len(sections)}"
        sections.append(Section(anchor, f"{op} on {device}", report.join(report.table(heads, rows), figure)))
    out = HERE / "out" / "report.html"
    report.render(
        out, "Speed of the ops", sections, subtitle="Every number beside its rivals, from the same run."
    )
    table = markdown(history)
    atomic_write_text(HERE / "out" / "table.md", table + "\n")
    print(table)
    print(f"\nwrote {out}")
    return 0


if __name__ == "__main__":
    make_output_safe()
    sys.exit(main())
