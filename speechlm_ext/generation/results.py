"""Results from decoded rows: raw ids with their scores, then text or a waveform."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from speechlm_ext.errors import SpeechLMError
from speechlm_ext.generation.engine.rows import Decoded
from speechlm_ext.generation.requests.encode_fields import content_columns, raw_content
from speechlm_ext.generation.requests.prompt import Prompt
from speechlm_ext.generation.requests.request import GenerationRequest, GenerationResult
from speechlm_ext.model.lm import SpeechLMModel


def make_result(prompt: Prompt, decoded: Decoded, seconds: float, model: SpeechLMModel) -> GenerationResult:
    """The ids and log-probabilities of a decoded request; :func:`decode_content` adds text and waveform."""
    result = GenerationResult(
        prompt.id,
        prompt.template.name,
        decoded.finished,
        modality=prompt.modality,
        num_given=prompt.num_given if len(prompt.segments) == 1 else 0,
        seconds=seconds,
        settings=prompt.segments[-1].settings,
    )
    if decoded.error is not None:
        return replace(result, error=decoded.error)
    modalities = [segment.modality for segment in prompt.segments]
    frames = (*decoded.intermediate, decoded.content_TS)
    *intermediate, ids = (raw_content(f, m, model.layout) for f, m in zip(frames, modalities, strict=True))
    logprobs = content_columns(decoded.logprob_TS, prompt.modality, model.layout)
    logprob, num_scored = decoded.logprob, decoded.num_scored
    if prompt.target_TS is not None:  # nothing was sampled, and everything is scored
        new = logprobs[prompt.num_given :]
        logprob, num_scored = float(new.sum(dtype=np.float64)) + decoded.end_logprob, new.size + 1
        if not math.isfinite(logprob):
            message = f"request {result.id!r}: the model's logits are not finite."
            return replace(result, finished="failed", error=message)
    return replace(
        result,
        ids=ids,
        chain=tuple(intermediate),
        logprob=logprob,
        num_scored=num_scored,
        logprobs=logprobs,
        end_logprob=None if math.isnan(decoded.end_logprob) else decoded.end_logprob,
        text=prompt.target_text,
    )


def decode_content(result: GenerationResult, model: SpeechLMModel) -> GenerationResult:
    """The result with the text or waveform of its ids; SSL units alone have neither. A failure is in the result."""
    tokenizers, ids = model.tokenizers, result.ids
    assert tokenizers is not None
    if result.finished == "failed" or ids is None:
        return result
    try:
        if result.modality == "text_bpe" and tokenizers.text is not None:
            return replace(result, text=str(tokenizers.text.decode(ids)))
        if result.modality in ("codec", "codec_ssl") and tokenizers.codec is not None:
            codes = ids[:, 1:] if result.modality == "codec_ssl" else ids
            wav = tokenizers.decode_codec(codes) if len(codes) else np.zeros(0, np.float32)
            return replace(
                result, wav=np.asarray(wav, dtype=np.float32), sample_rate=tokenizers.codec.sample_rate
            )
        return result
    except SpeechLMError as error:
        return replace(result, finished="failed", error=f"request {result.id!r}: {error}")


def failed_request(request: GenerationRequest, error: SpeechLMError) -> GenerationResult:
    """Result of a request that is rejected before it is decoded."""
    return GenerationResult(request.id, request.task, "failed", error=str(error))
