"""Perplexity per modality of each task's targets on a held-out token folder.

``exp(Σ nll / count)`` over the tokens of one modality, every token with weight 1, whatever the weights of training. The
nll is over the model's configured softmax scope. A text's end token counts as text, as usual for language models; the
end of speech and markers count as ``special``. Text perplexity is also given per word and per character, which do not
depend on the tokenizer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from speechlm_ext.data.sequence import LossWeights
from speechlm_ext.errors import CheckpointError, LayoutMismatchError, PlanError
from speechlm_ext.tasks import resolve_task

if TYPE_CHECKING:
    from speechlm_ext.data.tokens.folder import TokenCorpus
    from speechlm_ext.layout import TokenLayout
    from speechlm_ext.model.lm import SpeechLMModel

MODALITIES = ("text", "ssl", "codec", "special")


@dataclass
class Sum:
    """Negative log-likelihood in nats, and its number of tokens."""

    nll: float = 0.0
    count: int = 0

    def to_dict(self) -> dict[str, float]:
        """Perplexity with its parts."""
        mean = self.nll / self.count
        return {"ppl": math.exp(min(mean, 700.0)), "nll": self.nll, "count": self.count}


def classify(labels_NS: np.ndarray, layout: TokenLayout) -> np.ndarray:
    """Index into :data:`MODALITIES` of each label id, int8 ``[N, S]``; ends of text count as ``special`` here."""
    kinds = np.full(labels_NS.shape, MODALITIES.index("special"), np.int8)
    for interval in layout.intervals:
        name = "codec" if interval.name.startswith("codec") else interval.name
        name = "text" if name in ("text_bpe", "g2p") else name
        if name in MODALITIES and name != "special":
            kinds[(labels_NS >= interval.start) & (labels_NS < interval.end)] = MODALITIES.index(name)
    return kinds


def open_for(layout: TokenLayout, tokens: str | Path | Sequence[str]) -> TokenCorpus:
    """Open token folders for a model with ``layout``, in the model's delays.

    Raises:
        LayoutMismatchError: the tokens come from other tokenizers than the model's. ShardError: no such folder.
    """
    from speechlm_ext.data.loader import open_tokens

    corpus = open_tokens(tokens)
    if corpus.layout.num_streams == layout.num_streams:
        corpus = open_tokens(corpus, layout.delays)
    if layout.sha256 != corpus.layout.sha256:
        raise LayoutMismatchError(
            f"the model has layout {layout} but the tokens {corpus.layout}: "
            f"{layout.first_difference(corpus.layout)}. Tokenize with the model's tokenizers."
        )
    return corpus


def perplexity(
    model: SpeechLMModel,
    tokens: str | Path | Sequence[str],
    tasks: Iterable[str] | None = None,
    *,
    limit: int | None = None,
    budget: int = 4096,
) -> dict[str, dict[str, Any]]:
    """Perplexity of each task's targets.

    Args:
        model: its layout must be that of the tokens; only delays may differ, and the model's are used.
        tokens: held-out token folders.
        tasks: names of tasks; default: the model's tasks that have data here.
        limit: maximum number of samples per task, from the first.
        budget: maximum number of rows in one forward pass.

    Returns:
        ``{task: {modality: {"ppl", "nll", "count"}, "samples": n}}``; text targets add ``text_per_word`` and
        ``text_per_char``; speech targets add ``audio``, all SSL and codec tokens together.

    Raises:
        LayoutMismatchError: the tokens come from other tokenizers than the model's.
        ConfigError: a named task is not one of the model's.
        PlanError: a named task has no data here.
        CheckpointError: the model's log-probabilities are not finite.
    """
    corpus = open_for(model.layout, tokens)
    out = {}
    for task in tasks if tasks is not None else [t.name for t in model.tasks]:
        try:
            out[task] = _task_perplexity(model, corpus, task, limit, budget)
        except PlanError:
            if tasks is not None:
                raise
    return out


def _task_perplexity(
    model: SpeechLMModel, corpus: Any, task: str, limit: int | None, budget: int
) -> dict[str, Any]:
    import torch

    from speechlm_ext.data.loader import iter_eval

    # Weight 1 for every token: the codec's weight is shared among its codebooks.
    unit = LossWeights(text=1.0, ssl=1.0, codec=float(max(1, model.layout.num_codebooks)), special=1.0)
    template = resolve_task(task, model.tasks)
    target_is_text = template.targets[-1].modality in ("text_bpe", "g2p")
    sums = {name: Sum() for name in MODALITIES}
    samples = words = chars = 0
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for part in iter_eval(template.name, corpus, budget=budget, loss=unit, limit=limit):
            batch = part.batch.to(model.device)
            live_NS = batch.loss_weight > 0
            logprobs_NS, _ = model.logprobs(
                batch.ids, batch.labels, live_NS, batch.position, batch.cu_seqlens
            )
            nll_NS, live_NS = -logprobs_NS.double().cpu().numpy(), live_NS.cpu().numpy()
            if not np.isfinite(nll_NS[live_NS]).all():
                raise CheckpointError(
                    f"the model's log-probabilities are not finite for {task}, among the samples "
                    f"{', '.join(part.ids[:3])}{' …' if len(part.ids) > 3 else ''}: its weights are damaged or its "
                    "training had diverged. Use an older checkpoint."
                )
            kinds_NS = classify(batch.labels.cpu().numpy(), model.layout)
            for index, name in enumerate(MODALITIES):
                chosen = live_NS & (kinds_NS == index)
                sums[name].nll += float(nll_NS[chosen].sum())
                sums[name].count += int(chosen.sum())
            samples += len(part.ids)
            texts = [u["text"] or "" for u in part.utterances]
            words += sum(len(t.split()) + 1 for t in texts)
            chars += sum(len(t) + 1 for t in texts)
    model.train(was_training)
    if target_is_text:
        text, end = sums["text"], sums.pop("special")
        sums["text"] = Sum(text.nll + end.nll, text.count + end.count)
    result: dict[str, Any] = {name: s.to_dict() for name, s in sums.items() if s.count}
    if target_is_text:
        nll = sums["text"].nll
        result["text_per_word"] = Sum(nll, words).to_dict()
        result["text_per_char"] = Sum(nll, chars).to_dict()
    elif sums["ssl"].count + sums["codec"].count:
        both = Sum(sums["ssl"].nll + sums["codec"].nll, sums["ssl"].count + sums["codec"].count)
        result["audio"] = both.to_dict()
    result["samples"] = samples
    return result
