"""Every causal LM class of transformers, tried as a backbone: docs/training.md says what came of it."""

from __future__ import annotations

import pytest
import transformers

from python_tests.model.backbone import table as backbones


def test_the_table_is_true() -> None:
    written = backbones.written().splitlines()
    if f"transformers {transformers.__version__}:" not in written[1]:
        pytest.skip(f"the table in docs/training.md is of another release: {written[1]}")
    backbones.quiet()
    exact = written[1].split(": ")[1].split()[0]
    readme = (backbones.DOCS.parents[1] / "README.md").read_text("utf-8")
    assert f"{exact} model classes are" in " ".join(readme.split())
    assert written == backbones.table().splitlines(), (
        "write it anew: python -m python_tests.model.backbone.table"
    )
