"""``speechlm generate``: one request from the command line, or a file of requests into a results folder."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from speechlm_ext.audio import write_wav
from speechlm_ext.errors import ConfigError, GenerationError
from speechlm_ext.generation.cli_stream import STDOUT, run_stream
from speechlm_ext.generation.prompt import find_task
from speechlm_ext.generation.records import ResultsFolder
from speechlm_ext.generation.request import GenerationRequest, GenerationResult, SamplingSettings
from speechlm_ext.generation.run import generate
from speechlm_ext.utils.io import atomic_write_text, sha256_file

if TYPE_CHECKING:
    from speechlm_ext.model.speechlm import SpeechLM


@dataclass(frozen=True)
class GenerateConfig:
    """Generate text or speech with a trained model."""

    model: Path
    """Model folder: a checkpoint, an export, or a folder downloaded from the Hub."""
    task: str | None = None
    """Task name or kind: tts, asr, textlm, audiolm, … With ``requests``: for lines that name none."""
    text: str | None = None
    """Text to speak (tts), or to continue (textlm)."""
    audio: Path | None = None
    """Recording to transcribe (asr), or to continue (audiolm)."""
    speaker_prompt: Path | None = None
    """Recording of the voice to speak with, for tasks with a speaker condition."""
    lang: str | None = None
    """Language code, kept in the record."""
    output: Path | None = None
    """Where the result goes: a wav file for speech; text is printed and also written here if given. With ``stream``,
    ``-`` sends raw 16-bit samples to standard output."""
    stream: bool = False
    """Write the sound or text of one request while it is made: the wav file grows and is valid at every moment."""
    chunk_frames: int = 1
    """With ``stream``: fewest frames that are written at a time."""
    requests: Path | None = None
    """JSONL file of requests: id, task, text, audio, speaker_prompt, lang and any sampling setting.
    Audio paths are relative to the file."""
    output_dir: Path | None = None
    """Folder for ``results.jsonl`` and ``wav/`` of ``requests``; a stopped run goes on where it was."""
    batch_size: int = 16
    """Requests decoded at once."""
    greedy: bool | None = None
    """Take the most probable token. Default: true for text, false for speech."""
    temperature: float | None = None
    """Sampling temperature. Default for speech: 0.8."""
    codec_temperature: float | None = None
    """Temperature of the streams behind the first; 0 takes their most probable code. Default: as ``temperature``."""
    top_k: int | None = None
    """Sample among the k most probable tokens. Default for speech: 30."""
    top_p: float | None = None
    """Sample among the fewest tokens whose probabilities reach p."""
    min_p: float | None = None
    """Leave out tokens that are less probable than this times the most probable one."""
    repetition_penalty: float | None = None
    """Makes ids that a stream had lately less probable; 1 is off, 1.1 is mild."""
    repetition_window: int | None = None
    """Rows that the repetition penalty looks back; default 50."""
    guidance: float | None = None
    """Classifier-free guidance; 1 is off, 1.5 to 3 follow the text or voice more closely. Made for models that were
    trained with conditions left out at times."""
    beam_size: int | None = None
    """Beam search over so many beginnings, for text and units; default 1, off."""
    length_penalty: float | None = None
    """Beam search compares log p / tokens^length_penalty; default 1, and 0 favours short targets."""
    seed: int | None = None
    """Seed of the draws; default 0."""
    best_of: int | None = None
    """Tries at speaking a text; the one that the model itself recognises best is kept. Default 1."""
    min_len: int | None = None
    """Fewest new frames (text tokens or speech frames) before the end; default 1."""
    max_len: int | None = None
    """Most new frames; default: as many as the context holds, at most 2048."""
    max_len_ratio: float | None = None
    """Most new frames as a multiple of the prompt's content frames, instead of ``max_len``."""
    resample: bool = False
    """Convert recordings of another sampling rate; otherwise they are an error."""
    device: str = "auto"
    """``cpu``, ``cuda``, ``cuda:1``, or ``auto``: CUDA where there is a device."""
    dtype: str = "auto"
    """``float32``, ``bfloat16``, or ``auto``: bfloat16 on CUDA, float32 on the CPU."""

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
            extra = [n for n in ("text", "audio", "speaker_prompt", "output") if getattr(self, n) is not None]
            if extra:
                raise ConfigError(
                    f"{', '.join(extra)} cannot be given together with requests; put it in the file."
                )
            if self.output_dir is None:
                raise ConfigError("requests needs output_dir, the folder for the results.")

    def sampling(self) -> dict[str, Any]:
        """The sampling settings that were given."""
        names = [f.name for f in dataclasses.fields(SamplingSettings)]
        return {n: getattr(self, n) for n in names if getattr(self, n) is not None}


def run_generate(cfg: GenerateConfig) -> int:
    """Serve what the config asks for.

    Returns:
        0, or 1 when some requests of a file failed (their errors stand in the records).

    Raises:
        SpeechLMError: the model or the requests cannot be read, or the one request failed.
    """
    if cfg.requests is not None:
        requests = read_requests(cfg.requests, cfg)
        return _run_file(cfg, requests)
    request = GenerationRequest(
        id="request",
        task=cfg.task or "",
        text=cfg.text,
        audio=cfg.audio,
        speaker_prompt=cfg.speaker_prompt,
        lang=cfg.lang,
        settings=SamplingSettings(**cfg.sampling()),
        resample=cfg.resample,
    )
    model = load_model(cfg)
    template = find_task(request, model.tasks)
    if template.targets[-1].modality.startswith("codec") and cfg.output is None:
        raise ConfigError(f"task {cfg.task!r} makes speech; say where to write it with -o out.wav.")
    if cfg.stream:
        return run_stream(model, request, cfg.output, cfg.chunk_frames)
    _write_one(generate(model, [request])[0], cfg.output)
    return 0


def load_model(cfg: GenerateConfig) -> SpeechLM:
    """Load the model folder onto the device. Raises :class:`SpeechLMError` if that is not possible."""
    import torch

    from speechlm_ext.model.speechlm import SpeechLM

    device = cfg.device if cfg.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        on_gpu = torch.device(device).type == "cuda"
    except RuntimeError:
        raise ConfigError(f"device must be auto, cpu or cuda[:N], got {cfg.device!r}.") from None
    if on_gpu and not torch.cuda.is_available():
        raise ConfigError(
            f"device {cfg.device} was asked for but torch sees no CUDA device; use cpu or auto."
        )
    model = SpeechLM.from_pretrained(cfg.model, device)
    if cfg.dtype == "bfloat16" or (cfg.dtype == "auto" and on_gpu):
        model = model.to(torch.bfloat16)
    return model


def read_requests(path: Path, cfg: GenerateConfig) -> list[GenerationRequest]:
    """Read a JSONL file of requests; the config's task and sampling settings fill what a line leaves out.

    Raises:
        GenerationError: the file is missing, empty or not UTF-8, or a line is not a request or repeats an id.
    """
    path = Path(path)
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise GenerationError(
            f"requests file {path} is not UTF-8 (byte {error.start}); save it as UTF-8."
        ) from None
    except OSError as error:
        raise GenerationError(f"requests file {path} cannot be read: {error.strerror or error}.") from None
    requests: list[GenerationRequest] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            data = json.loads(line)
        except ValueError as error:
            raise GenerationError(f"{where}: not JSON ({error}).") from None
        if isinstance(data, dict):
            given = cfg.sampling()
            mine = set(data) | set(data.get("settings") or {})
            if mine & {"max_len", "max_len_ratio"}:
                given = {k: v for k, v in given.items() if k not in ("max_len", "max_len_ratio")}
            data = {k: v for k, v in given.items() if k not in mine} | data
            if cfg.task is not None:
                data.setdefault("task", cfg.task)
            if cfg.resample:
                data.setdefault("resample", True)
        request = GenerationRequest.from_dict(data, where, path.parent)
        if request.id in seen:
            raise GenerationError(f"{where}: id {request.id!r} stands on line {seen[request.id]} already.")
        seen[request.id] = number
        requests.append(request)
    if not requests:
        raise GenerationError(f"requests file {path} holds no requests; write one JSON object per line.")
    return requests


def _run_file(cfg: GenerateConfig, requests: list[GenerationRequest]) -> int:
    from speechlm_ext.model.speechlm import WEIGHTS_NAME

    assert cfg.output_dir is not None
    model = load_model(cfg)
    folder = ResultsFolder(cfg.output_dir, cfg.model, sha256_file(Path(cfg.model) / WEIGHTS_NAME))
    todo = [r for r in requests if not folder.is_done(r)]
    if len(todo) < len(requests):
        print(f"{len(requests) - len(todo)} of {len(requests)} requests are done already.", file=sys.stderr)

    def keep(index: int, result: GenerationResult) -> None:
        folder.add(todo[index], result)

    generate(model, todo, cfg.batch_size, progress=True, on_result=keep)
    path = folder.close(requests)
    failed = [r for r in requests if folder.records[r.id]["finished"] == "failed"]
    print(f"{len(requests) - len(failed)} of {len(requests)} requests served: {path}", file=sys.stderr)
    for request in failed[:5]:
        print(f"failed: {folder.records[request.id]['error']}", file=sys.stderr)
    return 1 if failed else 0


def _write_one(result: GenerationResult, output: Path | None) -> None:
    """Print text, write speech; say on stderr what became of it."""
    if result.finished == "failed":
        raise GenerationError(result.error or "the request failed.")
    if result.finished == "max_len":
        print(
            "note: the model did not end by itself; the result was cut at the longest length.",
            file=sys.stderr,
        )
    if result.wav is not None and result.sample_rate:
        if output is None:
            raise ConfigError(f"task {result.task!r} makes speech; say where to write it with -o out.wav.")
        write_wav(output, result.wav, result.sample_rate)
        seconds = len(result.wav) / result.sample_rate
        print(f"wrote {output}: {seconds:.2f} s of speech in {result.seconds:.2f} s.", file=sys.stderr)
        return
    if result.text is not None:
        text = result.text
    else:
        text = " ".join(str(i) for i in result.ids.ravel().tolist()) if result.ids is not None else ""
    print(text)
    if output is not None:
        atomic_write_text(output, text + "\n")
