"""``speechlm evaluate``: from generated results to records, from records to scores.

Three inputs, each optional. ``results`` of ``speechlm generate`` with a ``manifest`` of references: texts are compared;
speech is transcribed by the ASR scorer and the transcripts are compared, as are, for the same sentences, those of the
recordings and of the codec's resynthesis of them, which show the error of the scorer and of the codec. ``model`` and
``tokens``: perplexity. ``records``: scoring alone, on any machine.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from speechlm_ext.audio.waveform import says_conversions
from speechlm_ext.errors import ConfigError
from speechlm_ext.evaluation.collect import collect
from speechlm_ext.evaluation.config import EvaluateConfig
from speechlm_ext.evaluation.records import FILE_NAME, Record, read_records, write_records
from speechlm_ext.evaluation.scores import score_records
from speechlm_ext.evaluation.transcribe import PARTIAL
from speechlm_ext.utils.files.io import atomic_write_json
from speechlm_ext.utils.language import canonical_tag
from speechlm_ext.utils.options import as_list

if TYPE_CHECKING:
    from speechlm_ext.evaluation.asr.scorer import AsrScorer

SCORES = "scores.json"


@says_conversions()
def run_evaluate(cfg: EvaluateConfig) -> int:
    """Compute, print and write the scores that ``cfg`` asks for.

    Returns:
        0, also where scores are skipped: ``scores.json`` holds the reasons.

    Raises:
        SpeechLMError: an input that cannot be used.
    """
    if cfg.model is not None:
        from speechlm_ext.utils.files.run_folders import find_model_folder

        cfg = replace(cfg, model=find_model_folder(cfg.model))
    if cfg.records is not None:
        scores: dict[str, Any] = {"errors": score_records(read_records(cfg.records))}
        if cfg.output_dir is not None:
            _write(cfg.output_dir, scores)
        print(format_scores(scores))
        return 0
    assert cfg.output_dir is not None
    scores = {"errors": {}, "perplexity": {}, "judge": None}
    if cfg.tokens:
        _check_tokens(cfg)
    if cfg.results:
        records, scores["judge"] = _make_records(cfg)
        write_records(cfg.output_dir / FILE_NAME, records)
        (cfg.output_dir / PARTIAL).unlink(missing_ok=True)
        scores["errors"] = score_records(records)
        # Hours of transcription are not lost if the model fails.
        _write(cfg.output_dir, scores)
    if cfg.tokens:
        scores["perplexity"] = _perplexity(cfg)
    _write(cfg.output_dir, scores)
    print(format_scores(scores))
    return 0


def _make_records(cfg: EvaluateConfig) -> tuple[list[Record], dict[str, Any]]:
    """Records of all results, and the ASR scorer's settings or the reason why there is none."""
    from speechlm_ext.evaluation.asr.scorer import AsrUnavailable, load_asr_scorer

    if canonical_tag(cfg.lang) is None:
        raise ConfigError(f"lang must be a language tag such as 'en', 'pt-BR' or 'deu', got {cfg.lang!r}.")
    scorer: AsrScorer | None = None
    if cfg.judge == "none":
        about: dict[str, Any] = {"skipped": "the judge was switched off"}
    else:
        try:
            scorer = load_asr_scorer(
                cfg.cache_dir,
                model=cfg.judge_model,
                source=cfg.judge,
                window_s=cfg.judge_window_s,
                threads=cfg.threads,
            )
            about = scorer.describe()
        except AsrUnavailable as error:
            about = {"skipped": str(error)}
            print(f"note: speech is not scored: {error}")
    return collect(cfg, scorer, about.get("skipped")), about


def _check_tokens(cfg: EvaluateConfig) -> None:
    """Refuse tokens that do not fit the model before anything is computed."""
    from speechlm_ext.evaluation.perplexity import open_for
    from speechlm_ext.layout import TokenLayout

    assert cfg.model is not None
    open_for(TokenLayout.load(cfg.model), cfg.tokens)


def _perplexity(cfg: EvaluateConfig) -> dict[str, Any]:
    from speechlm_ext.evaluation.perplexity import perplexity
    from speechlm_ext.model.files.model_folder import load_model
    from speechlm_ext.model.lm import SpeechLMModel

    assert cfg.model is not None
    model = load_model(cfg.model, SpeechLMModel, verify=cfg.verify)
    return perplexity(model, cfg.tokens, as_list(cfg.tasks) or None, limit=cfg.limit)


def _write(out: Path, scores: dict[str, Any]) -> None:
    atomic_write_json(Path(out) / SCORES, json.loads(json.dumps(scores)))


def format_scores(scores: dict[str, Any]) -> str:
    """The scores as an aligned table for the terminal."""
    lines = []
    for kind, score in scores.get("errors", {}).items():
        for group, rates in score["groups"].items():
            counts = rates["wer"]
            lines.append(
                f"{kind:<10} {group:<22} WER {counts['rate']:7.2%}  ({counts['errors']}/{counts['total']} words, "
                f"{counts['utterances']} utterances)  CER {rates['cer']['rate']:7.2%}"
            )
        for reason, count in score["skipped"].items():
            lines.append(f"{kind:<10} {count} skipped: {reason}")
    for task, parts in scores.get("perplexity", {}).items():
        for name, part in parts.items():
            if isinstance(part, dict):
                lines.append(
                    f"ppl        {task + ' ' + name:<34} {part['ppl']:10.2f}  ({part['count']} tokens)"
                )
    return "\n".join(lines) or "no scores"
