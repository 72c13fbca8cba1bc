"""Loads a pretrained causal LM into a model: its body and text rows, compared with its own code afterwards."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from speechlm_ext.errors import CheckpointError, TokenizerError, foreign_errors
from speechlm_ext.model.backbone.body import BackboneError, text_body
from speechlm_ext.model.backbone.proof import first_difference
from speechlm_ext.model.embedding import gathered, load_rows

logger = logging.getLogger("speechlm_ext")


@torch.no_grad()
def load_backbone(model: Any, folder: str | Path) -> None:
    """Copy the body of a pretrained causal LM, and its text rows into the table and the head.

    New rows (special, ssl, codec ids) are drawn at the pretrained tables' own scale; see
    :meth:`MultiStreamEmbedding.load_text_rows`. A tied head takes its rows from the input table. The text logits are
    then compared with the pretrained model's own (``proof.py``), and the text tokenizer with the one in its folder;
    ``model.config.verify_backbone`` False skips both.

    Args:
        model: the SpeechLM, changed in place.
        folder: a transformers causal-LM folder whose tokenizer is the model's text tokenizer.

    Raises:
        CheckpointError: the folder cannot be loaded, or its sizes are not the model's.
        BackboneError: the text logits are not the pretrained model's, or the text tokenizer is not.
    """
    if model.config.verify_backbone:
        _check_tokenizer(model, folder)
    with foreign_errors(
        CheckpointError, f"backbone {folder} cannot be loaded as a causal LM", "Copy the folder again."
    ):
        pretrained = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, attn_implementation="eager"
        ).eval()
    _copy(model, pretrained, folder)
    if model.config.verify_backbone:
        _compare(model, pretrained, folder)


def _copy(model: Any, pretrained: Any, folder: str | Path) -> None:
    table, out = pretrained.get_input_embeddings().weight, pretrained.get_output_embeddings()
    start, end = model.layout.interval("text_bpe")
    if table.shape[1] != model.embedding.embedding_dim or end - start > table.shape[0]:
        raise CheckpointError(
            f"backbone {folder} has a table of {tuple(table.shape)}, but the layout has {end - start} text ids and the "
            f"model a width of {model.embedding.embedding_dim}. Use the backbone's own tokenizer and configuration."
        )
    ours = model.backbone.state_dict()
    state = {k: v for k, v in text_body(pretrained).state_dict().items() if k in ours}
    try:
        model.backbone.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise CheckpointError(f"backbone {folder} does not fit the model's configuration: {error}") from None
    model.embedding.load_text_rows(table, start, end)
    head = model.head
    with gathered(*head.parameters(recurse=False)):
        rows = head.rows_of(0, start, end)
        if not model.config.tie_head:
            load_rows(head.weight, table if out is None else out.weight, rows.start, rows.stop)
        if head.bias is not None:
            # Every logit is scaled through its hidden state, which does not reach the bias.
            head.bias.zero_()
            head.bias[rows] = out.bias[: end - start].to(head.bias) * model.transforms.logit_scale


def _check_tokenizer(model: Any, folder: str | Path) -> None:
    """Raise :class:`BackboneError` unless the text tokenizer is the backbone's."""
    from speechlm_ext.tokenizers.text.huggingface import HuggingFaceText

    found = dict(model.layout.tokenizers).get("text_bpe")
    if found is None:
        logger.warning(
            "backbone %s: the token layout names no text tokenizer, so whether its text ids are the backbone's cannot "
            "be checked",
            folder,
        )
        return
    way_out = (
        f"Tokenize with the backbone's own: --text.kind huggingface --text.path {folder}; or, to train its rows for "
        "other texts knowingly, set model.verify_backbone to false."
    )
    try:
        own = HuggingFaceText.from_folder(folder).fingerprint
    except TokenizerError as error:
        raise BackboneError(
            f"backbone {folder}: its own tokenizer cannot be read, so whether the text ids of the data are its ids "
            f"cannot be checked ({error}). Put its tokenizer.json there. {way_out}"
        ) from None
    if own != found:
        raise BackboneError(
            f"backbone {folder}: the data's text tokenizer (fingerprint {found[:12]}) is not the backbone's "
            f"({own[:12]}), so text ids would name other words than the pretrained rows. {way_out}"
        )


def _compare(model: Any, pretrained: Any, folder: str | Path) -> None:
    """Raise :class:`BackboneError` unless the text logits equal those of the backbone's own code."""
    start, end = model.layout.interval("text_bpe")

    def embed(ids_N: Tensor) -> Tensor:
        ids_NS = ids_N.new_full((len(ids_N), model.layout.num_streams), model.layout.pad_id)
        ids_NS[:, 0] = ids_N + start
        return model.embed(ids_NS)

    def logits(hidden_ND: Tensor) -> Tensor:
        return head(model.head_input(hidden_ND)).clone()

    training = model.training
    model.eval()
    with gathered(*model.parameters()):
        head = model.scope_head([[(start, end)], *[[] for _ in range(model.layout.num_streams - 1)]])
        different = first_difference(pretrained, model.backbone, embed, logits, end - start)
    model.train(training)
    if different is None:
        return
    tied = " Its own head is not tied: leave model.tie_head out." if model.config.tie_head else ""
    raise BackboneError(
        f"backbone {folder}, model type {model.config.backbone['model_type']!r}: {different}.{tied} "
        "model.verify_backbone: false skips the check."
    )
