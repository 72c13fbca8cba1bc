"""The demo's data: real telephone prompts of five voices, and spoken numbers composed from the same
recordings.

``prompts`` are the transcribed recordings of the Debian packages ``asterisk-core-sounds-{en,es,fr,it,ru}`` (16 kHz
studio speech, one voice per language). ``numbers`` are strings of 2–5 number words (in training 2–7, and single words)
joined from each voice's own digit recordings, with varied gaps, speed, gain and faint noise. They are composed, not
read as strings, and ``about.json`` and the report state that. Test strings never occur as text in training; the single
words do.

The packages are fetched with ``apt-get download`` and unpacked with ``dpkg-deb -x``: no root, nothing
installed. The same seed gives the same files.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import soxr
from number_words import RECORDED_WORDS, normalize
from tqdm import tqdm

from speechlm_ext.audio.files import read_audio
from speechlm_ext.errors import ConfigError, ManifestError
from speechlm_ext.utils.console import make_output_safe
from speechlm_ext.utils.files.io import atomic_write_json, atomic_write_text
from speechlm_ext.utils.files.json_text import json_line, parse_json
from speechlm_ext.utils.names import file_name

SAMPLE_RATE = 16000
LANGUAGES = ("en", "es", "fr", "it", "ru")
LICENCES = {lang: "CC-BY-3.0" if lang == "ru" else "CC-BY-SA-3.0" for lang in LANGUAGES}
PACKAGES = [f"asterisk-core-sounds-{lang}{suffix}" for lang in LANGUAGES for suffix in ("", "-g722")]


class Manifests(NamedTuple):
    """Paths of the two manifests that :func:`prepare` wrote."""

    train: Path
    test: Path


@dataclass(frozen=True)
class DataConfig:
    """Composed and held-out items; the defaults are the demo's."""

    train_numbers: dict[str, int] = field(
        default_factory=lambda: {"en": 3000, "es": 400, "fr": 400, "it": 400, "ru": 400}
    )
    """Composed strings per language for training."""
    train_single_words: dict[str, int] = field(
        default_factory=lambda: {"en": 10, "es": 3, "fr": 3, "it": 3, "ru": 3}
    )
    """Number of single-word items per word in training, varied like the strings: word boundaries are learned sooner if
    words also occur alone."""
    test_numbers: dict[str, int] = field(
        default_factory=lambda: {"en": 40, "es": 10, "fr": 10, "it": 10, "ru": 10}
    )
    """Composed strings per language that are held out."""
    words: tuple[int, int] = (2, 5)
    """Minimum and maximum number of words of a held-out string."""
    train_words: tuple[int, int] = (2, 7)
    """The same in training, with a larger maximum: long strings are learned last, so the longest held-out ones should
    not be the longest of training."""
    gap: tuple[float, float] = (0.02, 0.2)
    """Seconds of silence between words."""
    speed: float = 0.08
    """Maximum relative change of speed, up or down; the pitch changes with it."""
    gain_db: tuple[float, float] = (-6.0, 0.0)
    """Gain of a whole string."""
    noise_db: tuple[float, float] = (-70.0, -56.0)
    """Level of white noise relative to full scale."""
    test_prompts: float = 0.05
    """Share of the prompts that is held out; never the recordings that strings are composed from."""
    max_seconds: float = 15.0
    """Longer prompts are left out."""
    seed: int = 0
    """Seed of all random choices."""


@dataclass(frozen=True)
class Prompt:
    """One recording of the packages with its transcript."""

    key: str
    path: Path
    text: str


def prepare(
    out_dir: str | Path, debs_dir: str | Path | None = None, config: DataConfig | None = None
) -> Manifests:
    """Write wavs, ``train.jsonl``, ``test.jsonl`` and ``about.json`` into ``out_dir``.

    A folder that already holds the result of the same settings is unchanged.

    Args:
        out_dir: output folder; audio paths in the manifests are relative to it.
        debs_dir: folder with the ``.deb`` files; None fetches them into ``out_dir/../cache`` with ``apt-get
            download``.
        config: items to compose and to hold out.

    Returns:
        The manifests' paths. Lines have ``id, audio, text, speaker, lang, duration, dataset``.

    Raises:
        ConfigError: the packages cannot be fetched; the message names the way with the user's own recordings.
    """
    out_dir, config = Path(out_dir), config or DataConfig()
    settings = json.loads(json.dumps(asdict(config)))
    manifests = Manifests(out_dir / "train.jsonl", out_dir / "test.jsonl")
    about_path = out_dir / "about.json"
    if about_path.is_file() and all(m.is_file() for m in manifests):
        with contextlib.suppress(ValueError, AttributeError):  # damaged: prepared again
            if parse_json(about_path.read_bytes()).get("settings") == settings:
                return manifests
    about_path.unlink(missing_ok=True)
    cache = Path(debs_dir) if debs_dir is not None else out_dir.parent / "cache"
    if debs_dir is None:
        fetch_packages(cache)
    sounds = unpack_packages(cache, out_dir / "unpacked")
    (out_dir / "wav").mkdir(parents=True, exist_ok=True)

    rows: dict[str, list[dict]] = {"train": [], "test": []}
    notes: list[str] = []
    for lang in tqdm(LANGUAGES, desc="prepare data", disable=None):
        rng = np.random.default_rng([config.seed, LANGUAGES.index(lang)])
        prompts, speaker, lang_notes = read_prompts(sounds, lang)
        notes += lang_notes
        _add_prompts(rows, notes, prompts, speaker, lang, out_dir, config, rng)
        _add_numbers(rows, prompts, speaker, lang, out_dir, config, rng)
    shutil.rmtree(out_dir / "unpacked", ignore_errors=True)
    for split, path in zip(("train", "test"), manifests, strict=True):
        atomic_write_text(path, "".join(map(json_line, rows[split])))
    atomic_write_json(about_path, _about(rows, notes, settings))
    return manifests


# ---- packages ----------------------------------------------------------------------------------------------
def fetch_packages(cache: Path) -> None:
    """Download the packages that ``cache`` does not hold yet, without root.

    When apt has no package lists (a fresh container), they are fetched into ``cache`` as well.

    Raises:
        ConfigError: no apt here, or the download fails.
    """
    cache.mkdir(parents=True, exist_ok=True)
    missing = [p for p in PACKAGES if not list(cache.glob(f"{p}_*.deb"))]
    if not missing:
        return
    way_out = (
        "The demo's recordings are Debian packages; on another system, or without a network, use your own: "
        "`make demo DATA=folder`, where the folder holds train.jsonl and test.jsonl with lines "
        '{"id": …, "audio": "path", "text": …, "speaker": …, "lang": …}.'
    )
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise ConfigError(
            f"apt-get and dpkg-deb are needed to get {len(missing)} packages but are not here. {way_out}"
        )
    state = (cache / "apt").resolve()
    for sub in ("lists/partial", "cache/archives/partial"):
        (state / sub).mkdir(parents=True, exist_ok=True)
    private = [
        "-o",
        f"Dir::State::lists={state}/lists",
        "-o",
        f"Dir::Cache={state}/cache",
        "-o",
        "Debug::NoLocking=1",
    ]
    attempts = [[["apt-get", "download", *missing]]]
    attempts += [[["apt-get", *private, "update"], ["apt-get", *private, "download", *missing]]]
    last = ""
    for commands in attempts:
        for command in commands:
            done = subprocess.run(command, cwd=cache, capture_output=True, encoding="utf-8", errors="replace")
            last = done.stderr.strip() or last
        missing = [p for p in PACKAGES if not list(cache.glob(f"{p}_*.deb"))]
        if not missing:
            shutil.rmtree(state, ignore_errors=True)
            return
    reason = last.splitlines()[-1] if last else "no message"
    raise ConfigError(f"could not download {', '.join(missing)} (apt-get: {reason}). {way_out}")


def unpack_packages(cache: Path, folder: Path) -> Path:
    """Unpack the ``.deb`` files of ``cache`` into ``folder`` and return the folder.

    Raises:
        ConfigError: a package is missing or damaged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for package in PACKAGES:
        debs = sorted(cache.glob(f"{package}_*.deb"))
        if not debs:
            raise ConfigError(
                f"no {package}_*.deb in {cache}; give the folder of all {len(PACKAGES)} packages."
            )
        done = subprocess.run(
            ["dpkg-deb", "-x", str(debs[-1]), str(folder)],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
        )
        if done.returncode != 0:
            reason = done.stderr.strip()
            raise ConfigError(
                f"{debs[-1]} cannot be unpacked ({reason}); remove it and run the same command again."
            )
    return folder


def read_prompts(root: Path, lang: str) -> tuple[list[Prompt], str, list[str]]:
    """Read one language's transcripts and pair them with its recordings.

    Returns:
        Prompts sorted by key, the speaker's name, and notes on omitted recordings.
    """
    folder = next(
        (p for p in sorted((root / "usr/share/asterisk/sounds").glob(f"{lang}_*")) if p.is_dir()), None
    )
    documents = sorted((root / f"usr/share/doc/asterisk-core-sounds-{lang}").glob("core-sounds-*.txt*"))
    if folder is None or not documents:
        raise ManifestError(
            f"the unpacked packages in {root} hold no {lang} recordings or transcripts; fetch them again."
        )
    data = documents[0].read_bytes()
    text = (gzip.decompress(data) if documents[0].suffix == ".gz" else data).decode("utf-8-sig")
    entries: dict[str, list[str]] = {}
    for line in text.split("\n"):
        match = re.fullmatch(r"([\w./-]+)\s*:\s*(\S.*?)\s*", line)
        if match and not line.startswith(";"):
            entries.setdefault(match.group(1), []).append(match.group(2))
    prompts, dropped = [], Counter[str]()
    for path in sorted(folder.rglob("*.g722")):
        key = path.relative_to(folder).with_suffix("").as_posix()
        written = sorted(set(entries.get(key, [])))
        known = RECORDED_WORDS[lang].get(key.removeprefix("digits/")) if key.startswith("digits/") else None
        if known is not None:
            prompts.append(Prompt(key, path, known))
        elif not written:
            dropped["no transcript"] += 1
        elif len(written) > 1:
            dropped[f"two different transcripts ({key})"] += 1
        elif key.startswith("silence/") or re.search(r"[\[\](){}]", written[0]):
            dropped["not speech, or a remark in brackets"] += 1
        else:
            normal = normalize(written[0], lang)
            if normal is None:
                dropped["a number or symbol whose reading is not known"] += 1
            else:
                prompts.append(Prompt(key, path, normal))
    notes = [f"{lang}: {count} recordings left out: {why}" for why, count in sorted(dropped.items())]
    notes += [
        f"{lang}: the transcript list names {key} twice ({', '.join(sorted(set(texts)))}); "
        + (
            "the word heard was written by hand"
            if key.removeprefix("digits/") in RECORDED_WORDS[lang]
            else "not used"
        )
        for key, texts in sorted(entries.items())
        if len(set(texts)) > 1
    ]
    return prompts, folder.name, notes


# ---- the two data sets -------------------------------------------------------------------------------------
def _add_prompts(rows, notes, prompts, speaker, lang, out_dir, config, rng) -> None:
    counts = Counter(p.text for p in prompts)
    eligible = [
        p.key for p in prompts if counts[p.text] == 1 and not p.key.startswith(("digits/", "letters/"))
    ]
    held_out = set(rng.permutation(eligible)[: round(len(prompts) * config.test_prompts)].tolist())
    too_long = 0
    for prompt in prompts:
        wave, _ = read_audio(prompt.path, SAMPLE_RATE)
        if len(wave) > config.max_seconds * SAMPLE_RATE:
            too_long += 1
            continue
        name = f"{lang}_{prompt.key.replace('/', '_')}"
        split = "test" if prompt.key in held_out else "train"
        rows[split].append(_write(out_dir, name, wave, prompt.text, speaker, lang, "prompts"))
    if too_long:
        notes.append(f"{lang}: {too_long} recordings left out: longer than {config.max_seconds:g} s")


def _add_numbers(rows, prompts, speaker, lang, out_dir, config, rng) -> None:
    paths = {p.key: p.path for p in prompts}
    words = {word: f"digits/{key}" for key, word in RECORDED_WORDS[lang].items() if f"digits/{key}" in paths}
    voice = _Voice(
        {word: trim_silence(read_audio(paths[key], SAMPLE_RATE)[0]) for word, key in words.items()}
    )
    vocabulary = sorted(words)
    seen: set[tuple[str, ...]] = set()
    for split, count, (min_words, max_words) in (
        ("test", config.test_numbers.get(lang, 0), config.words),
        ("train", config.train_numbers.get(lang, 0), config.train_words),
    ):
        for index in range(count):
            while True:
                length = int(rng.integers(min_words, max_words + 1))
                string = tuple(vocabulary[i] for i in rng.integers(0, len(vocabulary), length))
                if string not in seen:
                    break
            seen.add(string)
            wave = compose(string, voice, config, rng)
            name = f"{lang}_number_{split}_{index:05d}"
            rows[split].append(_write(out_dir, name, wave, " ".join(string), speaker, lang, "numbers"))
    for repeat in range(config.train_single_words.get(lang, 0)):
        for index, word in enumerate(vocabulary):
            wave = compose((word,), voice, config, rng)
            name = f"{lang}_word_train_{repeat:02d}_{index:02d}"
            rows["train"].append(_write(out_dir, name, wave, word, speaker, lang, "numbers"))


class _Voice:
    """Word recordings of one voice, with each speed (in steps of 1 %) computed once."""

    def __init__(self, words: dict[str, np.ndarray]) -> None:
        self.words = words
        self._cache: dict[tuple[str, int], np.ndarray] = {}

    def word(self, word: str, percent: int) -> np.ndarray:
        if (word, percent) not in self._cache:
            changed = soxr.resample(self.words[word], SAMPLE_RATE * (100 + percent) / 100, SAMPLE_RATE)
            self._cache[word, percent] = changed.astype(np.float32)
        return self._cache[word, percent]


def compose(
    string: tuple[str, ...], voice: _Voice, config: DataConfig, rng: np.random.Generator
) -> np.ndarray:
    """Join word recordings to one float32 waveform ``[T]`` at 16 kHz."""
    percent = round(100 * config.speed)
    percent = int(rng.integers(-percent, percent + 1))
    gain = 10 ** (rng.uniform(*config.gain_db) / 20)
    parts = [np.zeros(int(rng.uniform(0.04, 0.1) * SAMPLE_RATE), np.float32)]
    for index, word in enumerate(string):
        if index:
            parts.append(np.zeros(int(rng.uniform(*config.gap) * SAMPLE_RATE), np.float32))
        parts.append(gain * voice.word(word, percent))
    parts.append(np.zeros(int(rng.uniform(0.04, 0.1) * SAMPLE_RATE), np.float32))
    wave = np.concatenate(parts)
    noise = rng.standard_normal(len(wave), dtype=np.float32) * 10 ** (rng.uniform(*config.noise_db) / 20)
    return np.clip(wave + noise, -1, 1).astype(np.float32)


def trim_silence(wave: np.ndarray, threshold_db: float = 42.0, margin: float = 0.02) -> np.ndarray:
    """Cut both ends where they are more than ``threshold_db`` below the loudest 10 ms, and fade 5 ms in and out."""
    hop = SAMPLE_RATE // 100
    usable = len(wave) // hop * hop
    if usable == 0:
        return wave
    level = np.sqrt((wave[:usable].reshape(-1, hop) ** 2).mean(1)) + 1e-9
    loud = np.flatnonzero(level > level.max() * 10 ** (-threshold_db / 20))
    extra = int(margin * SAMPLE_RATE)
    wave = wave[max(0, loud[0] * hop - extra) : (loud[-1] + 1) * hop + extra].copy()
    fade = np.linspace(0, 1, min(len(wave), SAMPLE_RATE // 200), dtype=np.float32)
    wave[: len(fade)] *= fade
    wave[len(wave) - len(fade) :] *= fade[::-1]
    return wave


def _write(
    out_dir: Path, name: str, wave: np.ndarray, text: str, speaker: str, lang: str, dataset: str
) -> dict:
    # Plain writes: thousands of small files, and the manifest that names them appears only when all are
    # there.
    audio = f"wav/{file_name(name, '.wav')}"
    soundfile.write(out_dir / audio, wave, SAMPLE_RATE, subtype="PCM_16")
    duration = round(len(wave) / SAMPLE_RATE, 3)
    row = {"id": name, "audio": audio, "text": text, "speaker": speaker, "lang": lang}
    return {**row, "duration": duration, "dataset": dataset}


def _about(rows: dict[str, list[dict]], notes: list[str], settings: dict) -> dict:
    table = []
    for split, items in rows.items():
        for key in sorted({(r["dataset"], r["lang"]) for r in items}):
            chosen = [r["duration"] for r in items if (r["dataset"], r["lang"]) == key]
            minutes = round(sum(chosen) / 60, 2)
            table.append(
                {"split": split, "dataset": key[0], "lang": key[1], "count": len(chosen), "minutes": minutes}
            )
    return {
        "composed": "The data set 'numbers' is composed: strings of number words put together from single "
        "recorded words of each voice, with varied gaps, speed, gain and faint noise. The held-out strings "
        "do not occur in training; the recordings of the single words do. The data set 'prompts' is real "
        "recordings, unchanged.",
        "source": "Debian packages asterisk-core-sounds-{en,es,fr,it,ru}-g722",
        "licences": LICENCES,
        "counts": table,
        "notes": notes,
        "settings": settings,
    }


if __name__ == "__main__":
    make_output_safe()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out_dir", type=Path)
    parser.add_argument(
        "--debs-dir", type=Path, default=None, help="folder with the .deb files (default: download)"
    )
    arguments = parser.parse_args()
    for manifest in prepare(arguments.out_dir, arguments.debs_dir):
        print(manifest)
