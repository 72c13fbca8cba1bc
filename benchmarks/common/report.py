"""The history of all committed results as one page and one table: ``make bench-report``.

Reads ``benchmarks/results/*.json`` (and ``benchmarks/out/*.json``, the runs of this machine), writes
``benchmarks/out/report.html`` with a curve per op and device, and prints the newest table in Markdown for the README.
"""

from __future__ import annotations

import base64
import io
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.common.rows import Results, ResultsError, Row, read_all  # noqa: E402
from speechlm_ext.utils.console import make_output_safe  # noqa: E402
from speechlm_ext.utils.files.io import atomic_write_text  # noqa: E402

HERE = Path(__file__).resolve().parents[1]
TEMPLATES = [HERE / "common", HERE.parent / "recipes" / "report"]

Key = tuple[str, str, str]


def newest(history: list[Results]) -> dict[Key, tuple[Results, Row]]:
    """The newest row of each op, shape and device."""
    found: dict[Key, tuple[Results, Row]] = {}
    for results in sorted(history, key=lambda r: r.date):
        for row in results.rows:
            found[row.key] = (results, row)
    return found


def cells(history: list[Results]) -> dict[Key, dict[str, str]]:
    """The newest row of each op, shape and device as text, in order."""
    found = {}
    for (op, shape, device), (results, row) in sorted(newest(history).items()):
        found[op, shape, device] = {
            "shape": shape,
            "us": f"{row.seconds * 1e6:,.1f}",
            "limit": "" if row.limit_fraction is None else f"{row.limit_fraction:.0%}",
            "ratios": ", ".join(f"{rival} {ratio:.3g}" for rival, ratio in sorted(row.ratios.items())),
            "commit": results.commit[:12],
        }
    return found


def markdown(history: list[Results]) -> str:
    """One line per op, shape and device."""
    lines = [
        "| op | shape | device | time | of the limit | rival time ÷ ours | commit |",
        "|---|---|---|---|---|---|---|",
    ]
    for key, c in cells(history).items():
        lines.append(f"| {' | '.join(key)} | {c['us']} us | {c['limit']} | {c['ratios']} | {c['commit']} |")
    return "\n".join(lines)


def curves(history: list[Results], op: str, device: str) -> str:
    """A picture, as a ``data:`` address, of the ratios to every rival over the commits, a line per shape and rival."""
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
    buffer = io.BytesIO()
    fig.savefig(buffer, format="svg")
    plt.close(fig)
    return f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def page(history: list[Results]) -> str:
    """The page with a table and a picture for each op and device."""
    from jinja2 import Environment, FileSystemLoader

    rows = cells(history)
    ops = []
    for number, (op, device) in enumerate(sorted({(op, device) for op, _, device in rows})):
        mine = [row for (o, _, d), row in rows.items() if (o, d) == (op, device)]
        title, picture = f"{op} on {device}", curves(history, op, device)
        ops.append({"id": f"{op}-{number}", "title": title, "rows": mine, "curves": picture})
    template = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True).get_template("report.html")
    return template.render(
        title="Speed of the ops",
        subtitle="Every number beside its rivals, from the same run.",
        sections={op["id"]: op["title"] for op in ops},
        ops=ops,
    )


def main() -> int:
    """Write the page and print the table."""
    history = []
    for path in sorted([*(HERE / "results").glob("*.json"), *(HERE / "out").glob("*.json")]):
        try:
            history += read_all(path)
        except ResultsError as error:
            print(f"bench-report: left out {error}", file=sys.stderr)
    history = [h for h in history if h.rows]
    if not history:
        print(
            "bench-report: no results in benchmarks/results or benchmarks/out; run make bench",
            file=sys.stderr,
        )
        return 2
    out = HERE / "out" / "report.html"
    atomic_write_text(out, page(history))
    table = markdown(history)
    atomic_write_text(HERE / "out" / "table.md", table + "\n")
    print(table)
    print(f"\nwrote {out}")
    return 0


if __name__ == "__main__":
    make_output_safe()
    sys.exit(main())
