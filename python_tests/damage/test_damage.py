"""Damaged files of every kind of folder: the undamaged values, or one error of the project that names the folder.

Random damage with fixed seeds over all kinds, and by name those kinds of damage that readers once let through.
``python -m python_tests.damage.subjects KIND --cases 1000 --seed 7`` looks for more.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from python_tests.damage.harness import damaged, outcome
from python_tests.damage.subjects import SUBJECTS, quiet
from speechlm_ext.errors import CheckpointError, ConfigError, KMeansError, ShardError, TokenizerError
from speechlm_ext.model import ModelConfig
from speechlm_ext.tasks import Entry, TaskTemplate
from speechlm_ext.tokenizers import HuggingFaceText, SentencePieceText

#: How many random cases of each kind, by what one of them costs.
CASES = {
    "tokens": 24, "layout": 40, "model": 20, "sentencepiece": 30, "huggingface": 30, "mfcc-kmeans": 20,
    "encoder-kmeans": 20, "rvq-kmeans": 20, "kmeans": 40, "kmeans-checkpoint": 40, "feature-shards": 40,
    "kmeans-fit": 4, "kmeans-assign": 5, "kmeans-assign-shards": 20, "results": 40, "hubert": 8, "checkpoint": 20,
    "records": 20,
}  # fmt: skip


class Good(NamedTuple):
    """A good folder, and what reading it gives."""

    folder: Path
    value: Any


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Good]:
    """Make each kind once."""
    made: dict[str, Good] = {}

    def get(kind: str) -> Good:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            quiet(lambda path: SUBJECTS[kind].make(path))(folder)
            copy = tmp_path_factory.mktemp("copy") / "copy"  # some readers write into what they read
            shutil.copytree(folder, copy)
            made[kind] = Good(folder, quiet(SUBJECTS[kind].read)(copy))
        return made[kind]

    return get


@pytest.mark.parametrize("kind", sorted(CASES))
def test_random_damage_is_harmless_or_refused(kind: str, good: Callable[[str], Good], tmp_path: Path) -> None:
    subject, (folder, value) = SUBJECTS[kind], good(kind)
    honest = {"same", "refused"} | (set() if subject.is_proven else {"different values"})
    for what, copy in damaged(folder, tmp_path, cases=CASES[kind], seed=3, skip=subject.skip):
        found = outcome(quiet(subject.read), copy, value)
        assert found in honest, f"{what}: {found}"


# ---- damage by name --------------------------------------------------------------------------------------------
def edit(path: Path, *keys: Any, to: Any = None, twice: bool = False) -> None:
    """Set a value in a JSON file; ``to`` an ellipsis removes it, ``twice`` writes the key a second time."""
    data = json.loads(path.read_text())
    inside = data
    for key in keys[:-1]:
        inside = inside[key]
    if to is ...:
        del inside[keys[-1]]
    elif twice:
        inside[f"{keys[-1]}<again>"] = to
    else:
        inside[keys[-1]] = to
    path.write_text(
        json.dumps(data).replace("<again>", "").replace('"<1e999>"', "1e999").replace('"<NaN>"', "NaN")
    )


def flip(path: Path, place: int, bit: int = 2) -> None:
    """Turn one bit over."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


def to_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def to_loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


KNOWN = [
    *[("tokens", "index.json", partial(edit, to=...), key) for key in
      ("layout_sha256", "num_utterances", "frames")],
    ("tokens", "index.json", partial(edit, to=64), "names"),
    ("tokens", "index.json", partial(edit, to=[]), "names", "dataset"),
    ("tokens", "index.json", partial(edit, to="s9"), "names", "speaker", 1),
    ("tokens", "index.json", partial(edit, to=5), "layout_sha256"),
    ("tokens", "index.json", partial(edit, to="<1e999>"), "shards"),
    ("tokens", "index.json", partial(edit, to=1, twice=True), "num_utterances"),
    ("tokens", "lengths.npz", flip, 28),
    ("tokens", "lengths.npz", flip, 400),
    ("tokens", "lengths.npz", flip, -20),
    ("tokens", "shard-00001.parquet", flip, 48),
    ("tokens", "shard-00001.parquet", flip, 1200),
    ("tokens", "token_layout.json", to_folder),
    ("layout", "token_layout.json", to_loop),
    ("layout", "token_layout.json", partial(edit, to=None), "name"),
    ("layout", "token_layout.json", partial(edit, to=-1), "special", 3, 1),
    ("layout", "token_layout.json", partial(edit, to="x", twice=True), "name"),
    ("layout", "token_layout.json", partial(edit, to=1), "unheard_of"),
    ("sentencepiece", "sentencepiece.model", flip, 3848),
    ("sentencepiece", "tokenizer.json", to_folder),
    ("sentencepiece", "tokenizer.json", partial(edit, to=[]), "kind"),
    ("sentencepiece", "tokenizer.json", partial(edit, to=7), "sha256"),
    ("huggingface", "huggingface.json", flip, 300),
    ("huggingface", "huggingface.json", write, b"{}"),
    ("encoder-kmeans", "tokenizer.json", partial(edit, to="<1e999>"), "config", "sample_rate"),
    ("rvq-kmeans", "tokenizer.json", partial(edit, to=-4), "config", "beam"),
    ("kmeans", "kmeans.json", partial(edit, to=7), "sha256"),
    ("kmeans", "kmeans.json", partial(edit, to="many"), "inertia"),
    ("kmeans", "kmeans.json", partial(edit, to="x"), "settings"),
    ("kmeans-checkpoint", "kmeans_state.json", partial(edit, to=5), "data"),
    ("feature-shards", "b.npy", flip, 19, 3),
    ("feature-shards", "a.npy", write, b"\x93NUMPY\x01\x00\x76\x00{(" + b" " * 115 + b"\n" + bytes(100)),
    ("feature-shards", "a.npy", lambda path: write(path, 2 * path.read_bytes())),
    ("kmeans-fit", "features/done-00000.json", partial(edit, to=5), "rejected"),
    ("kmeans-fit", "features/done-00000.json", partial(edit, to=...), "rejected"),
    ("kmeans-fit", "features/shard-00000.npy", flip, 900),
    ("kmeans-fit", "features/shard-00000.npy", Path.unlink),
    ("kmeans-assign", "parts/part-00000.parquet", flip, 30),
    ("kmeans-assign", "parts/part-00000.parquet", write, b"PAR1"),
    ("kmeans-assign-shards", "out/a.npy", write, b""),
    ("kmeans-assign-shards", "out/a.npy", flip, 20),
    ("results", "results.jsonl", lambda path: write(path, b'{"id": "r1", "alternatives": 5}\n')),
    ("results", "results.jsonl", lambda path: write(path, b'{"id": "r1", "audio": 0.5}\n')),
    ("results", "results.jsonl", lambda path: write(path, b'{"id": "r1", "id": "r2"}\n')),
    ("hubert", "preprocessor_config.json", partial(edit, to=None), "sampling_rate"),
    ("hubert", "config.json", partial(edit, to=0), "conv_stride", 3),
    ("hubert", "config.json", partial(edit, to=10**7), "num_hidden_layers"),
    ("w2v-bert", "preprocessor_config.json", partial(edit, to=79), "num_mel_bins"),
    ("whisper", "preprocessor_config.json", partial(edit, to=-160), "hop_length"),
    ("model", "tokenizers/text/sentencepiece.model", flip, 3848),
    ("model", "config.json", partial(edit, to=None), "tasks", 0, "name"),
]  # fmt: skip


def _name(case: tuple) -> str:
    kind, file, way, *keys = case
    name = getattr(way, "func", way).__name__
    return "-".join(str(part)[:20] for part in (kind, file, name, *keys))


@pytest.mark.parametrize("case", KNOWN, ids=_name)
def test_known_damage_is_refused(case: tuple, good: Callable[[str], Good], tmp_path: Path) -> None:
    kind, file, way, *keys = case
    folder, value = good(kind)
    copy = tmp_path / "damaged"
    shutil.copytree(folder, copy)
    way(copy / file, *keys)
    assert outcome(quiet(SUBJECTS[kind].read), copy, value, seconds=10) == "refused"


# ---- a model's config.json -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "keys, to, message",
    [
        (("tasks", 0, "name"), None, r"tasks\.0\.name should be a text, got None"),
        (("tasks", 0, "name"), 5, r"tasks\.0\.name should be a text, got 5"),
        (("tasks", 0, "name"), " ", "a task's name must be a word"),
        (("tasks", 0, "name"), "textlm", "task name 'textlm' or id .* occurs twice"),
        (("tasks", 0, "kind"), "", "a task's kind must be a word"),
        (("tasks", 1, "id"), "64", r"tasks\.1\.id should be a whole number, got '64'"),
        (("tasks", 1, "id"), True, r"tasks\.1\.id should be a whole number, got True"),
        (("tasks", 1, "id"), 7, "has id 7; expected one of 64 to 127"),
        (("tasks", 1, "id"), 128, "has id 128"),
        (("tasks", 0, "targets"), [], "has no target"),
        (("tasks", 0, "targets", 0, "modality"), "smell", "got 'audio' and 'smell'"),
        (("tasks", 0, "targets", 0, "weight"), 1, r"unknown key 'tasks\.0\.targets\.0\.weight'"),
        (("tasks", 0, "targets", 0, "field"), ..., r"key 'tasks\.0\.targets\.0\.field' is missing"),
        (("tasks",), ..., "key 'tasks' is missing"),
        (("loss", "scope"), ..., r"key 'loss\.scope' is missing"),
        (("loss", "z_loss"), "<1e999>", "1e999 is larger than any finite number"),
        (("backbone", "rms_norm_eps"), "<NaN>", "NaN is not a JSON number"),
        (("loss", "softcap"), "x", r"loss\.softcap should be a finite number"),
        (("loss",), None, "loss should be an object"),
        (("tie_head",), 1, "tie_head should be true or false"),
        (("heads",), "both", r"heads should be one of \('shared', 'separate'\)"),
        (("unheard_of",), 1, "unknown key 'unheard_of'"),
        (("frame_transformer",), {"hidden_size": 16}, r"key 'frame_transformer\.num_layers' is missing"),
        (("backbone",), [], "backbone should be an object"),
        (("backbone", "model_type"), 5, r"backbone\.model_type should be a text"),
        (("backbone", "num_hidden_layers"), 10**9, "num_hidden_layers is 1000000000, more than 10000"),
    ],
)  # fmt: skip
def test_a_models_config_is_refused_by_the_keys_name(
    keys: tuple, to: Any, message: str, good: Callable[[str], Good], tmp_path: Path
) -> None:
    path = tmp_path / "config.json"
    shutil.copy(good("model").folder / "config.json", path)
    assert [t.name for t in ModelConfig.load(tmp_path).tasks] == ["codec_ssl_plain_tts", "textlm"]
    edit(path, *keys, to=to)
    with pytest.raises(CheckpointError, match=f"config.json.*{message}") as caught:
        ModelConfig.load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["5", "null", "[" * 100_000], ids=["number", "null", "deep"])
def test_what_is_no_config_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        ModelConfig.load(tmp_path)


def test_tasks_are_checked_where_they_are_made() -> None:
    target = (Entry("text", "text_bpe"),)
    with pytest.raises(ConfigError, match="a task's name must be a word, got None"):
        TaskTemplate(None, 64, "lm", (), target)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="id must be an integer"):
        TaskTemplate("a", 64.0, "lm", (), target)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="'smell'"):
        Entry("smell", "codec")
    with pytest.raises(ConfigError, match="task name 'b' or id 64 occurs twice"):
        ModelConfig({}, (TaskTemplate("a", 64, "lm", (), target), TaskTemplate("b", 64, "lm", (), target)))


# ---- what the words say ----------------------------------------------------------------------------------------
def test_a_shard_is_compared_with_its_hash_when_it_is_first_read(
    good: Callable[[str], Good], tmp_path: Path
) -> None:
    from speechlm_ext.data.tokens.folder import TokenFolder

    shutil.copytree(good("tokens").folder, tmp_path / "t")
    flip(tmp_path / "t" / "shard-00001.parquet", 48)
    folder = TokenFolder.open(tmp_path / "t")
    assert folder.utterance(0)["id"] == "u0"  # of the shard before it
    with pytest.raises(ShardError, match=r"shard-00001\.parquet: content does not match the sha256"):
        folder.utterance(13)


def test_lengths_that_do_not_fit_the_index_are_refused(good: Callable[[str], Good], tmp_path: Path) -> None:
    """With a right hash, as after a writer's mistake."""
    from speechlm_ext.data.tokens.folder import TokenFolder
    from speechlm_ext.utils.files.io import sha256_file

    shutil.copytree(good("tokens").folder, tmp_path / "t")
    path, index = tmp_path / "t" / "lengths.npz", tmp_path / "t" / "index.json"
    arrays = dict(np.load(path))
    for key, value, message in (
        ("speaker", arrays["speaker"] + 1, r"speaker should be in \[-1, 2\], got 1 to 3"),
        ("row", arrays["row"][::-1], "the row numbers are not those of index.json"),
        ("ssl", arrays["ssl"].astype(np.int64), r"ssl should be int32 \[14\], got int64 \[14\]"),
        ("codec", arrays["codec"][:3], r"codec should be int32 \[14\], got int32 \[3\]"),
    ):
        np.savez(path, **{**arrays, key: value})
        edit(index, "lengths", to={"size": path.stat().st_size, "sha256": sha256_file(path)})
        with pytest.raises(ShardError, match=message):
            TokenFolder.open(tmp_path / "t")


def test_the_index_vouches_for_no_damaged_shard(good: Callable[[str], Good], tmp_path: Path) -> None:
    """A shard that was damaged between two runs of tokenize: its ids are the same, or it is refused."""
    found = []
    for place in range(112, 1500, 67):
        copy = tmp_path / str(place)
        shutil.copytree(good("tokenize").folder, copy)
        flip(copy / "shard-00001.parquet", place)
        found.append(outcome(quiet(SUBJECTS["tokenize"].read), copy, good("tokenize").value))
    assert set(found) == {"same", "refused"} and found.count("refused") > 5, found


def test_text_tokenizers_in_memory_are_guarded() -> None:
    for data in (b"", b"\x0a\x05noise", bytes(100)):
        with pytest.raises(TokenizerError, match="not a SentencePiece model"):
            SentencePieceText(data)
    for definition in ("", "{}", '{"version": "1.0", "model": 5}'):
        with pytest.raises(TokenizerError, match="not a Hugging Face tokenizer"):
            HuggingFaceText(definition)


def test_a_lost_shard_of_features_is_not_left_out(good: Callable[[str], Good], tmp_path: Path) -> None:
    """A fit that goes on must have all frames that it had."""
    copy = tmp_path / "fit"
    shutil.copytree(good("kmeans-fit").folder, copy)
    (copy / "features" / "shard-00000.npy").unlink()
    with pytest.raises(KMeansError, match=r"shard-00000\.npy is missing or damaged.*Delete done-00000\.json"):
        quiet(SUBJECTS["kmeans-fit"].read)(copy)
    (copy / "features" / "done-00000.json").unlink()
    assert quiet(SUBJECTS["kmeans-fit"].read)(copy) == good("kmeans-fit").value


@pytest.mark.parametrize("size", ["hidden_size", "intermediate_size", "num_attention_heads", "head_dim"])
def test_a_damaged_size_takes_no_memory(size: str, good: Callable[[str], Good], tmp_path: Path) -> None:
    from speechlm_ext import SpeechLM

    shutil.copytree(good("model").folder, tmp_path / "m")
    (tmp_path / "m" / "digests.json").unlink(missing_ok=True)
    edit(tmp_path / "m" / "config.json", "backbone", size, to=10**11)
    with pytest.raises(CheckpointError, match=f"backbone.{size} is 1e\\+11, but no weight has more than"):
        SpeechLM.from_pretrained(tmp_path / "m")
