"""One version everywhere, and one clear sentence where versions do not fit."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import speechlm_ext
from speechlm_ext import SpeechLM
from speechlm_ext.layout import TokenLayout
from speechlm_ext.model import ModelConfig
from speechlm_ext.ops.common.native import check_version, native
from speechlm_ext.training import ModelSettings
from speechlm_ext.utils.files.run_folders import CONFIG_NAME

ROOT = Path(__file__).resolve().parents[3]
needs_sources = pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="needs the source tree")


def import_in_new_process(code: str, path: Path) -> str:
    """Standard error of a process that must fail at ``code``, with ``path`` first on the module path."""
    start = f"import sys; sys.path[:0] = {[str(path), str(Path(speechlm_ext.__file__).parents[1])]}; "
    done = subprocess.run([sys.executable, "-c", start + code], capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stderr


def test_the_compiled_module_and_the_installed_package_have_this_version():
    assert native.build_info()["version"] == speechlm_ext.__version__
    assert version("speechlm_ext").partition("+")[0] == speechlm_ext.__version__


@needs_sources
def test_no_other_file_has_a_version_of_its_own():
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    assert not re.search(r"^version\s*=", text, re.MULTILINE) and 'dynamic = ["version"]' in text
    latest = re.search(r"^## (?!Unreleased)(\S+)", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert latest and latest.group(1) == speechlm_ext.__version__
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        named = re.findall(r"speechlm_ext(?:==|-)(\d+\.\d+\.\d+)", page.read_text("utf-8"))
        assert set(named) <= {speechlm_ext.__version__}, page


@needs_sources
def test_pyproject_declares_the_oldest_versions():
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    python, torch = (".".join(map(str, v)) for v in (speechlm_ext.MIN_PYTHON, speechlm_ext.MIN_TORCH))
    assert f'requires-python = ">={python}"' in text and f'"torch>={torch}"' in text


def test_a_model_folder_records_the_version(tmp_path):
    tiny = ModelSettings(hidden_size=8, num_layers=1, num_heads=2, ffn_size=12, max_positions=32)
    model = SpeechLM(ModelConfig(tiny.llama()), TokenLayout.build(ssl=4, codec=[5, 5], text=9))
    model.save_pretrained(tmp_path)
    path = tmp_path / CONFIG_NAME
    config = json.loads(path.read_text("utf-8"))
    assert config.pop("speechlm_ext_version") == speechlm_ext.__version__
    assert SpeechLM.from_pretrained(tmp_path).config == model.config
    path.write_text(json.dumps(config))  # as releases wrote it that recorded none
    assert SpeechLM.from_pretrained(tmp_path, verify=False).config == model.config


@pytest.mark.parametrize("built", ["0.0.9", None])
def test_a_stale_module_is_refused_with_the_command(built):
    with pytest.raises(ImportError) as caught:
        check_version(built)
    words = str(caught.value)
    assert f"speechlm_ext is {speechlm_ext.__version__}" in words and native.__file__ in words
    assert (built or "an earlier version") in words and "pip install --no-build-isolation -e ." in words


def test_ops_do_not_import_beside_a_stale_module(tmp_path):
    said = import_in_new_process("import speechlm_ext as sx; sx.__version__ = '9.9.9'; sx.ops", tmp_path)
    last = said.strip().splitlines()[-1]
    assert last.startswith("ImportError: speechlm_ext is 9.9.9, but its compiled module")
    assert f"was built from {speechlm_ext.__version__}. Rebuild it" in last


@pytest.mark.parametrize("torch", ["2.5.1+cu121", "1.13.1"])
def test_an_old_torch_is_refused_before_it_is_imported(tmp_path, torch):
    (tmp_path / f"torch-{torch}.dist-info").mkdir()
    (tmp_path / f"torch-{torch}.dist-info" / "METADATA").write_text(f"Name: torch\nVersion: {torch}\n")
    said = import_in_new_process("import speechlm_ext", tmp_path)
    name = f"speechlm_ext {speechlm_ext.__version__}"
    want = f"ImportError: {name} needs torch 2.6 or later, but torch {torch} is installed"
    assert want in said.splitlines()[-1] and said.count("\n  File") <= 3


@pytest.mark.parametrize("torch", ["2.6.0", "2.6.0a0+git1234", "2.13.0+cpu", "3.0"])
def test_a_supported_torch_is_not_refused(monkeypatch, torch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: torch)
    speechlm_ext.check_requirements()


def test_an_old_python_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 9, 18, "final", 0))
    with pytest.raises(ImportError, match=r"needs Python 3\.10 or later, but this is Python 3\.9\.18"):
        speechlm_ext.check_requirements()
