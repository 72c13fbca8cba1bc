"""Every kind of folder that the package writes and reads again: how to make a good one, and how to read all of it.

``python -m python_tests.damage.subjects KIND --cases 500`` damages one kind at scale and lists what is not honest.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from python_tests.damage.harness import damaged, outcome, plain
from python_tests.damage.kmeans_files import (
    WAVE,
    make_assign_folder,
    make_assigned_shards,
    make_feature_shards,
    make_fit_folder,
    make_kmeans,
    make_kmeans_checkpoint,
    read_assign_folder,
    read_assigned_shards,
    read_feature_shards,
    read_fit_folder,
    read_kmeans,
    read_kmeans_checkpoint,
    recordings,
)
from speechlm_ext import SpeechLM
from speechlm_ext.data.loader import PackLoader
from speechlm_ext.data.plan.plan import PlanConfig
from speechlm_ext.data.samples import TaskUse
from speechlm_ext.data.tokenize.command import run_tokenize
from speechlm_ext.data.tokenize.settings import CodecFit, SSLFit, TextFit, TokenizeConfig
from speechlm_ext.data.tokens.folder import TokenFolder
from speechlm_ext.data.tokens.format import write_index, write_shard
from speechlm_ext.data.tokens.index import shard_name
from speechlm_ext.evaluation.records import Record, read_records, write_records
from speechlm_ext.generation.requests.request import GenerationRequest, GenerationResult, SamplingSettings
from speechlm_ext.generation.requests.results_folder import ResultsFolder
from speechlm_ext.layout import TokenLayout
from speechlm_ext.model import ModelConfig
from speechlm_ext.tasks import builtin_tasks
from speechlm_ext.tokenizers import (
    EncoderKMeans,
    EncoderKMeansConfig,
    HuggingFaceText,
    MFCCKMeans,
    RVQConfig,
    RVQKMeansCodec,
    SentencePieceText,
    SSLConfig,
    TextConfig,
    TokenizerSet,
    load_tokenizer,
)
from speechlm_ext.tokenizers.encoders.build import build_encoder
from speechlm_ext.training import checkpoint as ckpt
from speechlm_ext.training.optimizer_state import load_optimizer


@dataclass(frozen=True)
class Subject:
    """A kind of folder."""

    make: Callable[[Path], None]
    """Writes a good one into an empty folder."""
    read: Callable[[Path], Any]
    """Reads all of it, and gives a value that can be compared."""
    is_proven: bool = True
    """Whether digests in it hold all values: what is read is then either the same or refused."""
    skip: Callable[[Path], bool] = lambda path: False
    """Files that another guard watches."""


# ---- token folders ---------------------------------------------------------------------------------------------
@lru_cache
def tokenizer_set() -> TokenizerSet:
    """A text tokenizer, units and a codec, fitted on noise."""
    rng = np.random.default_rng(0)
    waves = [WAVE, (0.1 * rng.standard_normal(16000)).astype(np.float32)]
    return TokenizerSet(
        SentencePieceText.fit(["one two three", "four five six"], TextConfig(vocab_size=290)),
        MFCCKMeans.fit(waves, SSLConfig(num_clusters=8, fit_iterations=2)),
        RVQKMeansCodec.fit(waves, RVQConfig(num_codebooks=3, codebook_size=8, fit_iterations=2)),
    )


def make_tokens(folder: Path) -> None:
    rng = np.random.default_rng(0)
    tokenizers = tokenizer_set()
    layout = tokenizers.make_layout()
    rows = []
    for i in range(14):
        frames = int(rng.integers(5, 30))
        rows.append(
            {"id": f"u{i}", "dataset": "tiny", "speaker": f"s{i % 3}", "lang": "en", "text": "x"}
            | {"duration": frames / 50, "text_bpe": rng.integers(0, 270, (4, 1))}
            | {"ssl": rng.integers(0, 8, (frames, 1))}
            | {"codec": rng.integers(0, 8, (frames, 3))}
        )  # fmt: skip
    write_shard(folder / shard_name(0), rows[:8], layout)
    write_shard(folder / shard_name(1), rows[8:], layout)
    tokenizers.save(folder / "tokenizers")
    write_index(folder, layout, 2, {"num_rejected": 0})


def read_tokens(path: Path) -> Any:
    folder = TokenFolder.open(path)
    utterances = [plain(folder.utterance(i)) for i in range(len(folder))]
    uses = [TaskUse("codec_ssl_asr"), TaskUse("codec_ssl_tts"), TaskUse("textlm")]
    loader = PackLoader(PlanConfig(tokens=[str(path)], tasks=uses, budget=256))
    packs = [plain(vars(next(loader))) for _ in range(loader.packs_per_epoch)]
    names = [loader.describe(i) for i in range(loader.packs_per_epoch)]
    tokenizers = loader.tokenizers.fingerprints()
    speakers = [plain(getattr(folder, n)) for n in ("speaker", "dataset", "lang", "lengths", "names")]
    return folder.ids, utterances, packs, names, tokenizers, speakers, folder.layout, loader.fingerprint


# ---- models ----------------------------------------------------------------------------------------------------
TASKS = ("codec_ssl_plain_tts", "textlm")
BACKBONE = dict(
    model_type="llama", hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=64)  # fmt: skip


def make_model(folder: Path) -> None:
    torch.manual_seed(0)
    config = ModelConfig(BACKBONE, tuple(builtin_tasks()[name] for name in TASKS))
    tokenizers = tokenizer_set()
    SpeechLM(config, tokenizers.make_layout(), tokenizers).save_pretrained(folder)


def read_model(folder: Path) -> Any:
    model = SpeechLM.from_pretrained(folder)
    weights = {name: plain(value) for name, value in model.state_dict().items()}
    settings = SamplingSettings(greedy=True, max_len=4)
    requests = [GenerationRequest("a", "textlm", text="one", settings=settings)]
    requests += [GenerationRequest("b", "codec_ssl_plain_tts", text="two", settings=settings)]
    results = [(r.finished, r.text, plain(r.ids), plain(r.wav)) for r in model.generate(requests)]
    return model.config.to_dict(), model.layout, weights, results


def make_checkpoint(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as other:
        make_model(Path(other))
        model = SpeechLM.from_pretrained(other)
    optimizer = torch.optim.AdamW(model.parameters())
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    state = ckpt.TrainerState(step=3, packs_consumed=7, optimizer_step=1.0, plan="ab" * 32)
    ckpt._write(
        folder / "step-00000003",
        model,
        {n: p.detach() for n, p in model.named_parameters()},
        {f"{k}.{n}": optimizer.state[p][k] for n, p in model.named_parameters() for k in ckpt.MOMENTS},
        state,
    )


def read_checkpoint(root: Path) -> Any:
    folder = ckpt.list_checkpoints(root)[-1] if ckpt.list_checkpoints(root) else root / "step-00000003"
    state = ckpt.read_state(folder)
    ckpt.verify_files(folder)
    config = ModelConfig(BACKBONE, tuple(builtin_tasks()[name] for name in TASKS))
    model = SpeechLM(config, tokenizer_set().make_layout())
    model.layout.require_same(TokenLayout.load(folder), "the token folder", f"checkpoint {folder}")
    weights = ckpt.load_weights(model, folder)
    optimizer = torch.optim.AdamW(model.parameters())
    moments = ckpt.read_moments(model, folder)
    load_optimizer(SimpleNamespace(optimizer=optimizer), model, moments, weights, state.optimizer_step)
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    return state, {name: plain(value) for name, value in model.state_dict().items()}


# ---- tokenizers ------------------------------------------------------------------------------------------------
def make_text(folder: Path) -> None:
    tokenizer_set().text.save(folder)


def make_huggingface(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(["one two three", "four five six"], trainer)
    HuggingFaceText(tokenizer.to_str()).save(folder)


def read_text(folder: Path) -> Any:
    text = load_tokenizer(folder)
    return text.kind, text.fingerprint, text.vocab_sizes, plain(text.encode("one six"))


def make_units(folder: Path) -> None:
    tokenizer_set().ssl.save(folder)


def make_codec(folder: Path) -> None:
    tokenizer_set().codec.save(folder)


def make_encoder_units(folder: Path) -> None:
    config = EncoderKMeansConfig(encoder="mfcc", num_clusters=5)
    EncoderKMeans.fit([WAVE], config).save(folder)


def read_units(folder: Path) -> Any:
    units = load_tokenizer(folder)
    return units.kind, units.fingerprint, units.vocab_sizes, units.frame_rate, plain(units.encode(WAVE))


# ---- a token folder under way ------------------------------------------------------------------------------------
def _tokenize_config(folder: Path) -> TokenizeConfig:
    manifest = recordings() / "manifest.jsonl"
    rows = [{"id": f"r{n}", "audio": f"r{n}.wav", "text": "one two three"} for n in range(3)]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return TokenizeConfig(
        manifest=[str(manifest)],
        output_dir=str(folder),
        text=TextFit(vocab_size=280),
        ssl=SSLFit(num_clusters=5, fit_iterations=2),
        codec=CodecFit(num_codebooks=2, codebook_size=5, fit_iterations=2),
        rows_per_shard=2,
        num_workers=0,
    )


def make_tokenized(folder: Path) -> None:
    """Tokenizing that was stopped before it wrote the index."""
    run_tokenize(_tokenize_config(folder))
    for name in ("index.json", "lengths.npz"):
        (folder / name).unlink()


def read_tokenized(folder: Path) -> Any:
    run_tokenize(_tokenize_config(folder))
    tokens = TokenFolder.open(folder)
    return [plain(tokens.utterance(i)) for i in range(len(tokens))], tokens.layout


# ---- records ---------------------------------------------------------------------------------------------------
REQUESTS = [GenerationRequest(f"r{n}", "textlm", text="one") for n in range(3)]


def make_results(folder: Path) -> None:
    results = ResultsFolder(folder, "model", "0" * 64)
    for request in REQUESTS:
        wav = WAVE[:2000] if request.id == "r1" else None
        more = [GenerationResult("r2", "textlm", "eos", text="b")] if request.id == "r2" else []
        results.add(
            request,
            GenerationResult(
                request.id, "textlm", "eos", text="a", wav=wav, sample_rate=16000, alternatives=more
            ),
        )
    results.close(REQUESTS)
    results.release()


def read_results(folder: Path) -> Any:
    results = ResultsFolder(folder, "model", "0" * 64)
    try:
        done = [results.is_done(request) for request in REQUESTS]
        return results.records, done
    finally:
        results.release()


def make_records(folder: Path) -> None:
    rows = [Record(f"u{n}", "asr", "one two", "one", settings={"top_k": 1}, seconds=1.5) for n in range(3)]
    write_records(folder / "records.jsonl", rows)


def read_scored_records(folder: Path) -> Any:
    from speechlm_ext.evaluation.scores import score_records

    return score_records(read_records(folder))


# ---- encoders and backbones of others ----------------------------------------------------------------------------
def make_encoder(kind: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        from python_tests.tokenizers.encoders.models import make as make_hf

        make_hf(kind, folder)

    return make


def read_encoder(folder: Path) -> Any:
    encoder = build_encoder(f"hf:{folder}:2")
    # The weights' sha256 is in the description, and units compare it with that of their fit.
    return plain(encoder(WAVE)), {**encoder.describe(), "weights_sha256": ""}


def make_backbone(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    size = tokenizer_set().text.vocab_sizes[0]
    LlamaForCausalLM(LlamaConfig(**{**BACKBONE, "vocab_size": size})).save_pretrained(folder)


def read_backbone(folder: Path) -> Any:
    from speechlm_ext.model.backbone.body import backbone_settings

    torch.manual_seed(0)
    layout = replace(tokenizer_set().make_layout(), tokenizers=())  # the folder has weights alone
    model = SpeechLM(ModelConfig(backbone_settings(folder)), layout)
    model.load_backbone(folder)
    return {name: plain(value) for name, value in model.state_dict().items()}


def make_layout(folder: Path) -> None:
    tokenizer_set().make_layout().save(folder)


SUBJECTS = {
    "tokens": Subject(make_tokens, read_tokens),
    "tokenize": Subject(make_tokenized, read_tokenized, is_proven=False),
    "layout": Subject(make_layout, lambda f: (TokenLayout.load(f), TokenLayout.load(f).name), is_proven=False),
    "model": Subject(make_model, read_model),
    "checkpoint": Subject(make_checkpoint, read_checkpoint),
    "sentencepiece": Subject(make_text, read_text),
    "huggingface": Subject(make_huggingface, read_text),
    "mfcc-kmeans": Subject(make_units, read_units),
    "encoder-kmeans": Subject(make_encoder_units, read_units),
    "rvq-kmeans": Subject(make_codec, read_units),
    "kmeans": Subject(make_kmeans, read_kmeans),
    "kmeans-checkpoint": Subject(make_kmeans_checkpoint, read_kmeans_checkpoint),
    "feature-shards": Subject(make_feature_shards, read_feature_shards, is_proven=False),
    "kmeans-fit": Subject(make_fit_folder, read_fit_folder, is_proven=False),
    "kmeans-assign": Subject(make_assign_folder, read_assign_folder, is_proven=False),
    "kmeans-assign-shards": Subject(make_assigned_shards, read_assigned_shards, is_proven=False),
    "results": Subject(make_results, read_results, is_proven=False),
    "records": Subject(make_records, read_scored_records, is_proven=False),
    "hubert": Subject(make_encoder("hubert"), read_encoder, is_proven=False),
    "whisper": Subject(make_encoder("whisper"), read_encoder, is_proven=False),
    "w2v-bert": Subject(make_encoder("wav2vec2-bert"), read_encoder, is_proven=False),
    "backbone": Subject(make_backbone, read_backbone, is_proven=False),
}  # fmt: skip


def quiet(read: Callable[[Path], Any]) -> Callable[[Path], Any]:
    """The same without what it prints."""

    def reading(folder: Path) -> Any:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return read(folder)

    return reading


def main() -> None:
    import resource

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=SUBJECTS)
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory", type=int, default=12, help="GiB of address space")
    args = parser.parse_args()
    # A damaged size that is believed ends in an error here, and not in a machine without memory.
    resource.setrlimit(resource.RLIMIT_AS, (args.memory << 30, args.memory << 30))
    torch.set_num_threads(1)
    subject, counts = SUBJECTS[args.kind], Counter()
    read = quiet(subject.read)
    with tempfile.TemporaryDirectory() as root:
        good, work = Path(root, "good"), Path(root, "work")
        good.mkdir()
        work.mkdir()
        with contextlib.redirect_stdout(io.StringIO()):
            subject.make(good)
        # Some readers write into what they read: the reference comes from a copy, too.
        import shutil

        shutil.copytree(good, work / "reference")
        expected = read(work / "reference")
        for what, folder in damaged(good, work, cases=args.cases, seed=args.seed, skip=subject.skip):
            print(
                f"{args.kind}: {what}", file=sys.stderr, flush=True
            )  # the last one, should this process crash
            found = outcome(read, folder, expected)
            name = found.partition(":")[0]
            counts[name] += 1
            if name in ("foreign", "unnamed", "not one line") or (
                found == "different values" and subject.is_proven
            ):
                print(json.dumps([args.kind, what, found.replace(str(folder), "FOLDER")]), flush=True)
    print(f"{args.kind}: {dict(counts)} of {args.cases}", flush=True)


if __name__ == "__main__":
    main()
