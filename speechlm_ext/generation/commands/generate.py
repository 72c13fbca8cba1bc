"""``speechlm generate``: a request of the command line, or a file of requests into a results folder."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from speechlm_ext.audio.files import write_wav
from speechlm_ext.errors import ConfigError, GenerationError
from speechlm_ext.generation.commands.generate_stream import CUT_NOTE, STDOUT, run_stream
from speechlm_ext.generation.generate import generate
from speechlm_ext.generation.requests.prompt import find_task
from speechlm_ext.generation.requests.request import GenerationRequest, GenerationResult
from speechlm_ext.generation.requests.request_file import Line, RejectedRequest, read_requests
from speechlm_ext.generation.requests.results_folder import ResultsFolder
from speechlm_ext.generation.requests.settings import SamplingSettings
from speechlm_ext.utils.console import argument_text
from speechlm_ext.utils.files.io import atomic_write_text, sha256_file
from speechlm_ext.utils.files.run_folders import WEIGHTS_NAME, find_model_folder

if TYPE_CHECKING:
    from speechlm_ext.model.lm import SpeechLMModel


#: Shown below the options by ``speechlm generate --help``.
EXAMPLES = """\
examples (M is a model folder or a run folder; -o is --output; dashes and underscores in names are alike):

  speechlm generate --model M --task tts --text "three seven one" -o out.wav
  speechlm generate --model M --task asr --audio in.wav                     print the text
  speechlm generate --model M --task asr --audio in.wav --beam-size 5 --n-best 3
  speechlm generate --model M --task asr --audio in.wav --target-text "six"  score a text
  speechlm generate --model M --task textlm --text "three sev" --temperature 0.9 --seed 1
  speechlm generate --model M --task tts --text "six" --temperature "[0.9,0,0,0]" -o out.wav
  speechlm generate --model M --task tts --text "six" --stream -o - | aplay -f S16_LE -r 16000
  speechlm generate --model M --requests requests.jsonl --output-dir results

Each line of a requests file is one request, with sampling settings of its own:

  {"id": "u1", "task": "tts", "text": "three seven one", "seed": 3, "max_len_ratio": 20}
  {"id": "u2", "task": "asr", "audio": "clips/u2.wav", "lang": "en", "n_best": 2}

If a run is interrupted in any way, rerun the same command to resume. The exit code is 1 if requests failed."""


@dataclass(frozen=True)
class GenerateConfig:
    """Generate text or speech with a trained model."""

    model: Path
    """Model folder: a checkpoint, an export, or a folder downloaded from the Hub; a run folder stands for its newest
    checkpoint."""
    task: str | None = None
    """Task name or kind: tts, asr, textlm, audiolm, … With ``requests``: default of its lines."""
    text: str | None = None
    """Text to speak (tts), or to continue (textlm)."""
    audio: Path | None = None
    """Recording to transcribe (asr), or to continue (audiolm)."""
    speaker_prompt: Path | None = None
    """Recording of the voice to speak with, for tasks with a speaker condition."""
    lang: str | None = None
    """Language code, kept in the record."""
    target_text: str | None = None
    """Target text to score token by token instead of generating one, for tasks that end in text."""
    target_audio: Path | None = None
    """Target recording to score, for tasks that end in speech."""
    output: Path | None = None
    """File of the result: a wav file for speech; text is printed, and also written here if given. With ``stream``,
    ``-`` sends raw 16-bit samples to standard output."""
    stream: bool = False
    """Write the audio or text of one request while it is decoded; the growing wav file is always valid."""
    chunk_frames: int = 1
    """With ``stream``: minimum number of frames that are written at a time."""
    requests: Path | None = None
    """JSONL file of requests: id, task, text, audio, speaker_prompt, lang, target_text, target_audio, resample and any
    of the sampling settings below. Audio paths are relative to the file."""
    output_dir: Path | None = None
    """Folder for ``results.jsonl`` and ``wav/`` of ``requests``; an interrupted run resumes."""
    batch_size: int = 16
    """Requests decoded at once."""
    greedy: bool | None = None
    """Take the most probable token. Default: true for text, false for speech."""
    temperature: float | list[float] | None = None
    """Sampling temperature. Default for speech: 0.8. This, top_k, top_p, min_p and the repetition settings also take a
    list with a value for each stream, as in ``"[0.8,0.5,0.5]"``; 0 in it takes the most probable token."""
    codec_temperature: float | None = None
    """Temperature of all streams but the first; 0 takes their most probable code. Default: as ``temperature``."""
    top_k: int | list[int] | None = None
    """Sample among the k most probable tokens. Default for speech: 30."""
    top_p: float | list[float] | None = None
    """Sample among the smallest set of tokens whose probabilities reach p."""
    min_p: float | list[float] | None = None
    """Drop tokens that are less probable than this times the most probable one."""
    repetition_penalty: float | list[float] | None = None
    """Makes recent ids of a stream less probable; 1 is off, 1.1 is mild."""
    repetition_window: int | list[int] | None = None
    """Rows that the repetition penalty covers; default 50."""
    guidance: float | None = None
    """Classifier-free guidance; 1 is off, 1.5 to 3 follow the text or voice more closely. For models trained with
    conditions dropped at random."""
    beam_size: int | None = None
    """Number of beams, for text and units; default 1, off."""
    length_penalty: float | None = None
    """Beam search compares log p / tokens^length_penalty; default 1; 0 favors short targets."""
    seed: int | None = None
    """Seed of the samples; default 0."""
    n_best: int | None = None
    """Number of results: with ``beam_size`` the best, else samples with seeds from ``seed`` on. Default 1."""
    best_of: int | None = None
    """Number of tries at speaking a text; the result is the one that the model itself recognizes best. Default 1."""
    min_len: int | None = None
    """Minimum number of new frames (text tokens or speech frames); default 1."""
    min_len_ratio: float | None = None
    """Minimum as a multiple of the prompt's content frames, instead of ``min_len``."""
    max_len: int | None = None
    """Maximum number of new frames; default: what the context holds, up to 2048."""
    max_len_ratio: float | None = None
    """Maximum as a multiple of the prompt's content frames, instead of ``max_len``."""
    resample: bool = True
    """Convert recordings of another sampling rate and log it once; ``false`` makes them an error."""
    device: str = "auto"
    """``cpu``, ``cuda``, ``cuda:1``, or ``auto``: CUDA if there is a device."""
    dtype: str = "auto"
    """``float32``, ``bfloat16``, or ``auto``: bfloat16 on CUDA, float32 on the CPU."""
    verify: bool = True
    """Compare the model's files with their digests before use."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {self.batch_size}.")
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise ConfigError(f"dtype must be auto, float32 or bfloat16, got {self.dtype!r}.")
        if self.stream and self.requests is not None:
            raise ConfigError("stream is for one request; leave it out, or give task instead of requests.")
        if self.output == STDOUT and not self.stream:
            raise ConfigError("output - (standard output) goes with stream; add --stream, or name a file.")
        if self.requests is None:
            if self.task is None:
                raise ConfigError("give a task (for one request) or requests (a JSONL file).")
            if self.output_dir is not None:
                raise ConfigError("output_dir goes with requests; give output (-o) for one request.")
        else:
            one = ("text", "audio", "speaker_prompt", "target_text", "target_audio", "output")
            extra = [n for n in one if getattr(self, n) is not None]
            if extra:
                raise ConfigError(f"{', '.join(extra)} cannot be given with requests; put it in the file.")
            if self.output_dir is None:
                raise ConfigError("requests needs output_dir, the folder for the results.")

    def sampling(self) -> dict[str, Any]:
        """The sampling settings that are not None."""
        return self._not_none(f.name for f in dataclasses.fields(SamplingSettings))

    def defaults(self) -> dict[str, Any]:
        """Values for lines of a requests file that leave them out."""
        return self.sampling() | self._not_none(("task", "lang", "resample"))

    def _not_none(self, names: Iterable[str]) -> dict[str, Any]:
        return {name: value for name in names if (value := getattr(self, name)) is not None}


def run_generate(cfg: GenerateConfig) -> int:
    """Generate what the config asks for; 1 if requests of a file failed, whose records hold the errors."""
    settings = SamplingSettings(**cfg.sampling())
    cfg = dataclasses.replace(cfg, model=find_model_folder(cfg.model))
    if cfg.requests is not None:
        return _run_file(cfg, read_requests(cfg.requests, cfg.defaults()))
    request = GenerationRequest(
        id="request",
        task=cfg.task or "",
        text=argument_text(cfg.text),
        audio=cfg.audio,
        speaker_prompt=cfg.speaker_prompt,
        lang=cfg.lang,
        settings=settings,
        resample=cfg.resample,
        target_text=argument_text(cfg.target_text),
        target_audio=cfg.target_audio,
    )
    return _run_one(cfg, request, load_model(cfg))


def _run_one(cfg: GenerateConfig, request: GenerationRequest, model: SpeechLMModel) -> int:
    is_scored = request.given_target is not None
    if is_scored and (cfg.output is not None or cfg.stream):
        raise ConfigError("a given target is scored and makes no file; leave out output and stream.")
    modality = find_task(request, model.tasks).targets[-1].modality
    if modality.startswith("codec") and cfg.output is None and not is_scored:
        raise ConfigError(f"task {cfg.task!r} makes speech; name the file to write with -o out.wav.")
    if cfg.stream:
        return run_stream(model, request, cfg.output, cfg.chunk_frames)
    result = generate(model, [request])[0]
    if is_scored and result.logprob is not None:
        nats = -result.logprob / result.num_scored
        print(
            f"log p {result.logprob:.4f} over {result.num_scored} tokens with the end, {nats:.4f} nats a token"
        )
        return 0
    _write_one(result, cfg.output)
    return 0


def load_model(cfg: GenerateConfig) -> SpeechLMModel:
    """Load the model folder onto the device. Raises :class:`SpeechLMError` if that is not possible."""
    import torch

    from speechlm_ext.model.files import model_folder
    from speechlm_ext.model.lm import SpeechLMModel

    device = cfg.device if cfg.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        on_gpu = torch.device(device).type == "cuda"
    except RuntimeError:
        raise ConfigError(f"device must be auto, cpu or cuda[:N], got {cfg.device!r}.") from None
    if on_gpu and not torch.cuda.is_available():
        raise ConfigError(f"device is {cfg.device}, but torch finds no CUDA device; use cpu or auto.")
    model = model_folder.load_model(cfg.model, SpeechLMModel, device, verify=cfg.verify)
    if cfg.dtype == "bfloat16" or (cfg.dtype == "auto" and on_gpu):
        model = model.to(torch.bfloat16)
    return model


def _run_file(cfg: GenerateConfig, lines: list[Line]) -> int:
    assert cfg.output_dir is not None
    model = load_model(cfg)
    folder = ResultsFolder(
        cfg.output_dir,
        cfg.model,
        sha256_file(Path(cfg.model) / WEIGHTS_NAME),
        layout=model.layout.sha256,
        dtype=str(model.embedding.weight.dtype).removeprefix("torch."),
    )
    try:
        requests = [line for line in lines if isinstance(line, GenerationRequest)]
        for line in lines:
            if isinstance(line, RejectedRequest):
                folder.add_rejected(line)
        todo = [r for r in requests if not folder.is_done(r)]
        if len(todo) < len(requests):
            print(f"{len(requests) - len(todo)} of {len(lines)} requests are already done.", file=sys.stderr)
        generate(
            model,
            todo,
            cfg.batch_size,
            progress=True,
            on_result=lambda n, result: folder.add(todo[n], result),
        )
        path = folder.close(lines)
    finally:
        folder.release()
    failed = [line for line in lines if folder.records[line.id]["finished"] == "failed"]
    print(f"{len(lines) - len(failed)} of {len(lines)} requests succeeded: {path}", file=sys.stderr)
    for line in failed[:5]:
        print(f"failed: {folder.records[line.id]['error']}", file=sys.stderr)
    if len(failed) > 5:
        print(f"… and {len(failed) - 5} more; {path} has their errors.", file=sys.stderr)
    return 1 if failed else 0


def _write_one(result: GenerationResult, output: Path | None) -> None:
    """Print the text or write the speech of a result and its alternatives, with notes on stderr."""
    results = [result, *result.alternatives]
    for one in results:
        if one.finished == "failed":
            raise GenerationError(one.error or "the request failed.")
    if any(one.finished == "max_len" for one in results):
        print(CUT_NOTE, file=sys.stderr)
    if result.wav is None:
        text = "\n".join(_text_of(one) for one in results)
        print(text)
        if output is not None:
            atomic_write_text(output, text + "\n")
        return
    assert output is not None
    for number, one in enumerate(results, 1):
        assert one.wav is not None and one.sample_rate is not None
        path = output if number == 1 else output.with_stem(f"{output.stem}.{number}")
        write_wav(path, one.wav, one.sample_rate)
        seconds = len(one.wav) / one.sample_rate
        print(f"wrote {path}: {seconds:.2f} s of speech in {one.seconds:.2f} s.", file=sys.stderr)


def _text_of(result: GenerationResult) -> str:
    """The text, or ids where there is none."""
    if result.text is not None:
        return result.text
    return " ".join(map(str, [] if result.ids is None else result.ids.ravel().tolist()))
