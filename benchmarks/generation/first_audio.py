"""First-audio latency of text to speech, stage by stage, over delay patterns.

    python -m benchmarks.generation.first_audio [--shape 30m|smoke] [--model FOLDER] [--text "…"] [--repeat 5]

One request alone, on the CPU with as many threads as torch is given. Without ``--model``: random weights, S = 9 and
OpusLM's vocabulary, and a codec of random codebooks at 50 frames a second. With it also that model, whose weights then
run under other delays than it was trained with: the times are right, the speech is not. ``rows``: rows from the
target's marker to the first samples, the delay's ``max_delay + 1`` and those that the codec waits for. ``floor``: what
they last as sound, which a dialogue in real time could not go below; speech from a text waits ``rows`` steps instead.
Milliseconds, medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace

import numpy as np
import torch

from benchmarks.generation.models import build
from speechlm_ext import SpeechLM
from speechlm_ext.generation.engine.engine import Engine
from speechlm_ext.generation.engine.rows import FrameReader
from speechlm_ext.generation.engine.slots import DecodeJob
from speechlm_ext.generation.live.stream import make_chunk_decoder
from speechlm_ext.generation.requests.encode_fields import raw_content
from speechlm_ext.generation.requests.prompt import build_prompt
from speechlm_ext.generation.requests.request import GenerationRequest, SamplingSettings
from speechlm_ext.tasks import builtin_tasks
from speechlm_ext.tokenizers import RVQConfig, RVQKMeansCodec, SentencePieceText, TextConfig, TokenizerSet
from speechlm_ext.utils.console import make_output_safe

STAGES = ("tokenize", "prompt", "prefill", "first frame", "lookahead", "codec")
TEXT = "three seven one nine two five eight zero"


def with_tokenizers(model: SpeechLM) -> SpeechLM:
    """A random model with a text tokenizer and a codec whose ids its layout has room for."""
    config = RVQConfig(codebook_size=1024)
    width = config.frames_per_token * config.mel.num_mels
    generator = torch.Generator().manual_seed(0)
    books = torch.randn(config.num_codebooks, config.codebook_size, width, generator=generator) / 8
    text = SentencePieceText.fit([TEXT], TextConfig(vocab_size=300))
    model.tokenizers = TokenizerSet(
        text=text, codec=RVQKMeansCodec(config, torch.full((width,), -4.0), books)
    )
    model.config = replace(model.config, tasks=(builtin_tasks()["codec_ssl_plain_tts"],))
    return model


def with_delays(model: SpeechLM, delays: tuple[int, ...]) -> SpeechLM:
    """The model under other delays."""
    model.layout = model.layout.with_delays(delays)
    return model


def staged(model: SpeechLM, request: GenerationRequest) -> tuple[dict[str, float], int]:
    """Seconds of each stage until the first samples, and the rows that it took."""
    assert model.tokenizers is not None
    spent = dict.fromkeys(STAGES, 0.0)
    last = time.perf_counter()

    def stage(name: str) -> None:
        nonlocal last
        now = time.perf_counter()
        spent[name] += now - last
        last = now

    model.tokenizers.text.encode(request.text)
    stage("tokenize")
    prompt = build_prompt(request, model)
    decoder = make_chunk_decoder(prompt.modality, model.tokenizers)
    stage("prompt")
    engine = Engine(model, 1)
    reader = FrameReader(prompt, model.layout)
    engine.admit([DecodeJob("a", prompt)])
    stage("prefill")
    name, samples = "first frame", np.zeros(0, np.float32)
    while not len(samples):
        engine.step()
        frames_TS = reader.push(engine.rows("a", reader.num_new_rows))
        stage(name)
        if len(frames_TS):
            name = "lookahead"
            samples = decoder.push(raw_content(frames_TS, prompt.modality, model.layout))["audio"]
            stage("codec")
    return spent, reader.num_new_rows


def first_chunk(model: SpeechLM, request: GenerationRequest) -> float:
    """Seconds until the product's own stream has samples."""
    start = time.perf_counter()
    chunks = model.stream(request)
    while not len(next(chunks).audio):
        pass
    seconds = time.perf_counter() - start
    chunks.close()
    return seconds


def table(name: str, model: SpeechLM, patterns: list[tuple[int, ...]], text: str, repeat: int) -> str:
    """Markdown of one model over delay patterns."""
    tts = next(
        t for t in model.tasks if t.kind == "tts" and not any(c.field == "speaker" for c in t.conditions)
    )
    model.config = replace(model.config, tasks=(tts,))
    settings = SamplingSettings(seed=1, min_len=30, max_len=30)
    request = GenerationRequest("a", tts.name, text=text, settings=settings)
    assert model.tokenizers is not None
    frame_ms = 1e3 / model.tokenizers.codec.frame_rate
    lines = [
        f"{name}: {model.num_parameters() / 1e6:.1f} M parameters, {frame_ms:g} ms a frame, codec lookahead "
        f"{model.tokenizers.stream_codec().lookahead} frames, {torch.get_num_threads()} thread(s)\n",
        f"| delays | rows | floor | {' | '.join(STAGES)} | sum | stream |",
        "|---" * (len(STAGES) + 5) + "|",
    ]
    for delays in patterns:
        with_delays(model, delays)
        staged(model, request)
        runs = [staged(model, request) for _ in range(repeat)]
        spent = {s: 1e3 * statistics.median(run[0][s] for run in runs) for s in STAGES}
        total = 1e3 * statistics.median(sum(run[0].values()) for run in runs)
        whole = 1e3 * statistics.median(first_chunk(model, request) for _ in range(repeat))
        rows = runs[0][1]
        cells = " | ".join(f"{spent[s]:.1f}" for s in STAGES)
        label = ",".join(map(str, delays))
        lines.append(f"| {label} | {rows} | {rows * frame_ms:g} | {cells} | {total:.1f} | {whole:.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=("30m", "smoke"), default="30m")
    parser.add_argument("--model", help="model folder")
    parser.add_argument("--text", default=TEXT)
    parser.add_argument("--repeat", type=int, default=5)
    arguments = parser.parse_args()
    models = [(arguments.shape, with_tokenizers(build(arguments.shape, "cpu")))]
    if arguments.model:
        models.append((arguments.model, SpeechLM.from_pretrained(arguments.model)))
    for name, model in models:
        S = model.layout.num_streams
        patterns = [tuple(range(S)), (0, *[1] * (S - 1)), (0,) * S]
        patterns += [model.layout.delays] if model.layout.delays not in patterns else []
        if model.frame is not None:  # a multi-scale model says all streams of a frame in one row
            patterns = [model.layout.delays]
        print(table(name, model, patterns, arguments.text, arguments.repeat), end="\n\n")


if __name__ == "__main__":
    make_output_safe()
    main()
