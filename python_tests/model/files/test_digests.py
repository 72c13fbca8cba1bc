"""Digests of a model folder: any changed bit of a file that is read is noticed and named, and nothing else is."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch

from speechlm_ext import SpeechLM
from speechlm_ext.errors import CheckpointError
from speechlm_ext.layout import TokenLayout
from speechlm_ext.model import ModelConfig
from speechlm_ext.model.files.digests import DIGESTS_NAME
from speechlm_ext.tokenizers import MFCCKMeans, SSLConfig, TokenizerSet
from speechlm_ext.training import ModelSettings
from speechlm_ext.utils.files.io import sha256_file

TINY = ModelSettings(hidden_size=8, num_layers=1, num_heads=2, ffn_size=12, max_positions=32)


def make(ssl: int = 4) -> SpeechLM:
    torch.manual_seed(0)
    units = MFCCKMeans(SSLConfig(num_clusters=ssl), torch.zeros(39), torch.ones(39), torch.randn(ssl, 39))
    tokenizers = TokenizerSet(ssl=units)
    layout = TokenLayout.build(ssl=ssl, codec=[5, 5], text=9, tokenizers=tokenizers.fingerprints())
    return SpeechLM(ModelConfig(TINY.llama()), layout, tokenizers).eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "model"
    make().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


FILES = [
    "config.json",
    "model.safetensors",
    "token_layout.json",
    "tokenizers/ssl/arrays.safetensors",
    "tokenizers/ssl/tokenizer.json",
]


def test_every_file_has_its_digest(saved: Path) -> None:
    record = json.loads((saved / DIGESTS_NAME).read_text())
    assert record == {
        "version": 1,
        "algorithm": "sha256",
        "files": {name: sha256_file(saved / name) for name in FILES},
    }


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_is_noticed_and_its_file_named(folder: Path, name: str) -> None:
    data = bytearray((folder / name).read_bytes())
    data[-2] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(
        CheckpointError, match=rf"{name} is damaged or truncated: its sha256 is .* names .*verify=False"
    ):
        SpeechLM.from_pretrained(folder)


def test_a_weight_may_be_edited_knowingly(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 0x80  # the sign of the last weight
    path.write_bytes(data)
    edited = SpeechLM.from_pretrained(folder, verify=False)
    wanted, found = make().state_dict(), edited.state_dict()
    assert sum(int((found[n] != wanted[n]).sum()) for n in wanted) == 1
    edited.save_pretrained(folder)
    again = SpeechLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(again[n], found[n]) for n in found)


@pytest.mark.parametrize("name", FILES[:4])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"has no {name}: the folder is incomplete"):
        SpeechLM.from_pretrained(folder)


def test_what_a_model_does_not_read_may_come_and_go(folder: Path) -> None:
    for name in ("README.md", ".gitattributes", "LICENSE", "tokenizers/.DS_Store", "tokenizers/README.md"):
        (folder / name).write_text("mine")
    (folder / "samples").mkdir()
    (folder / "samples" / "a.wav").write_bytes(b"RIFF")
    folder = folder.rename(folder.parent / "moved")
    wanted, found = make().state_dict(), SpeechLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(found[n], wanted[n]) for n in wanted)


def test_a_file_that_would_be_read_may_not_come(folder: Path) -> None:
    shutil.copytree(folder / "tokenizers" / "ssl", folder / "tokenizers" / "codec")
    with pytest.raises(CheckpointError, match=r"tokenizers/codec/\S+ has no digest in digests.json"):
        SpeechLM.from_pretrained(folder)


def test_a_model_without_tokenizers_does_not_take_those_of_the_one_before(folder: Path) -> None:
    SpeechLM(ModelConfig(TINY.llama()), make().layout).save_pretrained(folder)
    with pytest.raises(CheckpointError, match="left from another model"):
        SpeechLM.from_pretrained(folder)


def test_a_stop_between_two_files_is_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another model is saved over one, and half of it comes to the disk."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(TokenLayout, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        make(ssl=5).save_pretrained(folder)
    with pytest.raises(CheckpointError, match="model.safetensors is damaged or truncated"):
        SpeechLM.from_pretrained(folder)


def test_an_older_folder_passes_with_a_line(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / DIGESTS_NAME).unlink()
    with caplog.at_level(logging.INFO, "speechlm_ext"):
        SpeechLM.from_pretrained(folder)
        SpeechLM.from_pretrained(folder, verify=False)
    assert [r.message for r in caplog.records] == [
        f"{folder} has no digests.json (an older version wrote it): whether its files are intact is not checked"
    ]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "\x00\xff",
        '{"version": 1, "algorithm": "sha256", "files": {}}',
        '{"version": 1, "algorithm": "md5", "files": {"config.json": "%s"}}' % ("0" * 64),
        '{"version": true, "algorithm": "sha256", "files": {"config.json": "%s"}}' % ("0" * 64),
        '{"version": 1, "algorithm": "sha256", "files": {"config.json": null}}',
        '{"version": 1, "algorithm": "sha256", "files": {"../config.json": "%s"}}' % ("0" * 64),
        '{"version": 1, "version": 1, "algorithm": "sha256", "files": {"config.json": "%s"}}' % ("0" * 64),
    ],
)  # fmt: skip
def test_damaged_digests_are_named(folder: Path, text: str) -> None:
    (folder / DIGESTS_NAME).write_text(text, "latin-1")
    with pytest.raises(CheckpointError, match=r"digests\.json is damaged"):
        SpeechLM.from_pretrained(folder)
    SpeechLM.from_pretrained(folder, verify=False)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_neither_saved_nor_used(folder: Path, value: float) -> None:
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    model = make()
    with torch.no_grad():
        model.embedding.weight[3, 2:4] = value
    count = model.embedding.weight.numel()
    told = rf"'embedding\.weight' \(2 of {count} values, the first is {value}\) is not finite"
    with pytest.raises(CheckpointError, match=told):
        model.save_pretrained(folder)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    # As an older version would have written it.
    from safetensors.torch import save_file

    save_file({k: v.detach() for k, v in model.state_dict().items()}, folder / "model.safetensors")
    (folder / DIGESTS_NAME).unlink()
    with pytest.raises(CheckpointError, match=told):
        SpeechLM.from_pretrained(folder)
