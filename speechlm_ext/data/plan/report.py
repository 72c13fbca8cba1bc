"""The report of a pack plan: tokens per modality and task, padding, packs per epoch, each kind's share of the loss."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass

import numpy as np

from speechlm_ext.data.plan.plan import PackPlan, PlanConfig, build_samples
from speechlm_ext.data.samples import SampleCounts, SampleTable
from speechlm_ext.data.sequence import LossWeights, content_kinds, content_length
from speechlm_ext.data.tokens.folder import TokenCorpus
from speechlm_ext.errors import PlanError
from speechlm_ext.layout import TokenLayout
from speechlm_ext.tasks import TaskTemplate

KINDS = ("text", "ssl", "codec", "special")
#: Why utterances are left out of a task, by field of :class:`SampleCounts`.
_REASONS = {
    "filtered": "outside its data sets or languages",
    "lacking": "lack a modality",
    "no_prompt": "no other utterance of the speaker to prompt with",
    "overlong": "too long, dropped",
}


@dataclass(frozen=True)
class TaskReport(SampleCounts):
    """One task in one epoch."""

    copies: int
    """Samples with their repetitions."""
    rows: int
    tokens: dict[str, int]
    """Tokens per kind: text, ssl, codec (all codebooks), special."""


@dataclass(frozen=True)
class PlanReport:
    """Size and contents of an epoch; token counts are those of the first one."""

    layout: str
    utterances: int
    tasks: list[TaskReport]
    budget: int
    rows: int
    packs_per_epoch: int
    padding: float
    """Share of the packs' rows without a sample."""
    pad_cells: float
    """Share of the filled rows' cells (rows times streams) without a token: single-stream parts and delays."""
    longest: int
    """Rows of the longest sample."""
    tokens: dict[str, int]
    loss_share: dict[str, float]
    """Share of the total loss weight per kind of token; they add up to 1."""


def make_report(corpus: TokenCorpus, cfg: PlanConfig) -> PlanReport:
    """The report over opened token folders.

    Raises:
        PlanError: nothing would be learned; others as for training.
    """
    samples = build_samples(corpus, cfg)
    plan = PackPlan(samples, cfg.seed, cfg.budget, overlong=cfg.overlong)
    draw = plan.draw(0)
    copies, lengths = samples.copies(0, draw), samples.lengths(0, draw)
    prompt_len = np.minimum(samples.speech_lengths[samples.prompts(0, draw)], cfg.prompt_frames)
    tasks, total, loss = [], Counter[str](), dict.fromkeys(KINDS, 0.0)
    for number, (template, counts) in enumerate(zip(samples.templates, samples.counts, strict=True)):
        mine = np.flatnonzero(samples.task == number)
        frames = _frames(samples, template, mine, copies[mine], prompt_len)
        num_copies = int(copies[mine].sum())
        tokens, task_loss = _tokens_and_loss(template, frames, num_copies, corpus.layout, cfg.loss)
        total.update(tokens)
        loss = {kind: loss[kind] + task_loss[kind] for kind in KINDS}
        num_rows = int((copies[mine] * lengths[mine]).sum())
        tasks.append(TaskReport(**asdict(counts), copies=num_copies, rows=num_rows, tokens=dict(tokens)))
    rows = int((copies * lengths).sum())
    weight = sum(loss.values())
    if weight <= 0:
        raise PlanError(
            "nothing would be learned: every token of these tasks has loss weight 0. Raise data.loss."
        )
    return PlanReport(
        layout=str(corpus.layout),
        utterances=len(corpus),
        tasks=tasks,
        budget=cfg.budget,
        rows=rows,
        packs_per_epoch=plan.packs_per_epoch,
        padding=1 - rows / (plan.packs_per_epoch * cfg.budget),
        pad_cells=1 - sum(total.values()) / (rows * corpus.layout.num_streams),
        longest=int(samples.max_lengths().max()),
        tokens={k: total[k] for k in KINDS},
        loss_share={k: loss[k] / weight for k in KINDS},
    )


def format_report(report: PlanReport) -> str:
    """The report as a table for people."""
    table = [["task", "samples", "copies", "rows", *(f"{kind} tokens" for kind in KINDS)]]
    samples, copies = (sum(getattr(t, name) for t in report.tasks) for name in ("samples", "copies"))
    for name, *numbers, tokens in (
        *((t.task, t.samples, t.copies, t.rows, t.tokens) for t in report.tasks),
        ("all", samples, copies, report.rows, report.tokens),
    ):
        table.append([name, *(f"{n:,}" for n in (*numbers, *(tokens.get(kind, 0) for kind in KINDS)))])
    table.append(["loss share", "", "", "", *(f"{report.loss_share[kind]:.1%}" for kind in KINDS)])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [f"layout {report.layout}    {report.utterances:,} utterances", ""]
    for name, *cells in table:
        right = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *right]))
    lines.append("")
    for t in report.tasks:
        counts = [(getattr(t, name), reason) for name, reason in _REASONS.items()]
        left_out = "; ".join(f"{count:,} {reason}" for count, reason in counts if count)
        if left_out:
            lines.append(f"left out of {t.task}: {left_out}")
    lines.append(
        f"{report.packs_per_epoch:,} packs an epoch of at most {report.budget:,} rows, padding {report.padding:.2%}; "
        f"cells without a token {report.pad_cells:.1%}; longest sample {report.longest:,} rows"
    )
    return "\n".join(lines)


def _frames(
    samples: SampleTable, template: TaskTemplate, mine: np.ndarray, copies: np.ndarray, prompt_len: np.ndarray
) -> list[int]:
    """Content frames of each entry of a task in one epoch."""
    at = samples.utterance[mine]
    columns = {c: v[at].astype(np.int64) for c, v in samples.corpus.lengths.items()} | {"spk": prompt_len[at]}
    layout = samples.corpus.layout
    return [int((content_length(e.modality, columns, layout) * copies).sum()) for e, _ in template.entries]


def _tokens_and_loss(
    template: TaskTemplate, frames: list[int], copies: int, layout: TokenLayout, weights: LossWeights
) -> tuple[Counter[str], dict[str, float]]:
    """Number of tokens and sum of loss weights per kind, of a task in one epoch."""
    everything = weights.region == "all"
    ends = sum(weights.of_end(entry.modality, layout) for entry in template.targets)
    markers = weights.special * (1 + len(template.entries)) if everything else 0.0
    tokens = Counter(special=copies * (2 + len(template.entries) + len(template.targets)))
    loss = {kind: 0.0 for kind in KINDS} | {"special": (ends + markers) * copies}
    for (entry, is_target), length in zip(template.entries, frames, strict=True):
        for kind in filter(None, content_kinds(entry.modality, layout)):
            tokens[kind] += length
            if is_target or everything:
                loss[kind] += length * weights.of_kind(kind, layout)
    return tokens, loss
