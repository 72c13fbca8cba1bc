"""Small configurations of every causal LM class of transformers, and the table in docs/training.md that they make.

``python -m python_tests.model.backbone.table`` writes the table anew.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from speechlm_ext.errors import ConfigError
from speechlm_ext.model.backbone.proof import probe_backbone

DOCS = Path(__file__).parents[3] / "docs" / "training.md"
BEGIN, END = "<!-- backbones: begin -->", "<!-- backbones: end -->"

#: Sizes under all the names that classes use; a class gets those that it knows.
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "sliding_window": 5,
    "moe_intermediate_size": 16,
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "shared_expert_intermediate_size": 16,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "ffn_dim": 48,
    "n_inner": 48,
    "dff": 48,
    "word_embed_proj_dim": 16,
    "d_model": 32,
    "decoder_layers": 2,
    "decoder_ffn_dim": 48,
    "decoder_attention_heads": 4,
    "encoder_layers": 2,
    "encoder_ffn_dim": 48,
    "encoder_attention_heads": 4,
    "rotary_dim": 4,
    "pad_token_id": 0,
    "embedding_size": 32,
    "use_sliding_window": True,
    "pronunciation_vocab_size": 8,
    "shape_vocab_size": 8,
}
_LATENT = {"num_key_value_heads": 4, "head_dim": None}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_d_ssm": 64, "mamba_n_groups": 1}
#: What single classes need besides; None leaves a size out.
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": _MAMBA | {"attn_layer_indices": [1, 3]},
    "falcon_h1": _MAMBA,
    "gemma2": {"query_pre_attn_scalar": 8},
    "gemma3_text": {"num_hidden_layers": 6, "query_pre_attn_scalar": 8},
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "vocab_size_per_layer_input": 64,
        "hidden_size_per_layer_input": 8,
    },
    "gemma4_text": {
        "num_kv_shared_layers": 0,
        "vocab_size_per_layer_input": 64,
        "hidden_size_per_layer_input": 8,
    },
    "gpt_neo": {"num_layers": 4, "num_hidden_layers": None, "attention_types": [[["global", "local"], 2]]},
    "granite": {"logits_scaling": 3.0, "embedding_multiplier": 5.0, "residual_multiplier": 0.5},
    "granitemoehybrid": _MAMBA | {"layer_types": ["linear_attention", "full_attention"] * 2},
    "kimi_linear": {"num_key_value_heads": 4, "linear_num_heads": 4, "linear_head_dim": 8},
    "lfm2": {"full_attn_idxs": [1]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1},
    **{kind: {"max_window_layers": 0} for kind in ("qwen2", "qwen3")},
    "qwen2_moe": {"use_sliding_window": False},
    **{
        kind: {"layer_types": ["linear_attention", "full_attention"] * 2}
        for kind in ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")
    },
    "trocr": {"decoder_layers": 2, "d_model": 32, "decoder_ffn_dim": 48},
    "xlnet": {"n_head": 4, "d_head": 8, "d_inner": 48},
    "zaya": {"num_experts_per_tok": 1},
    **{
        kind: _LATENT
        for kind in (
            "axk1",
            "axk2",
            "deepseek_v2",
            "deepseek_v3",
            "deepseek_v32",
            "glm4_moe_lite",
            "glm_moe_dsa",
            "longcat_flash",
            "minicpm3",
            "youtu",
        )
    },
}


def settings_of(kind: str) -> dict[str, Any]:
    """The configuration of a small model as plain data."""
    default = AutoConfig.for_model(kind)
    known = set(default.to_dict()) | set(getattr(default, "attribute_map", {}))
    sizes = {k: v for k, v in (SIZES | SPECIAL.get(kind, {})).items() if k in known and v is not None}
    return AutoConfig.for_model(kind, **sizes).to_dict()


def verdict(kind: str) -> str:
    """``exact``, with what the class has beyond plain causal attention and two tables, or ``refused: …``."""
    try:
        settings = settings_of(kind)
    except Exception as error:
        name = type(error).__name__
        return f"refused: no small configuration of it can be made ({name})"
    try:
        facts = probe_backbone(settings)
    except ConfigError as error:
        reason = str(error).split(" A SpeechLM on it")[0]
        for start in (f"model type {kind!r}: ", f"model type {kind!r} "):
            reason = reason.removeprefix(start)
        # Neither sizes of differences nor texts of foreign exceptions: they change with machines and releases.
        reason = re.sub(r" \(by [^)]* of the largest\)", "", reason.rstrip(". "))
        reason = re.sub(r" \((\w+): .*\)$", r" (\1)", reason, flags=re.S)
        return f"refused: {reason}"
    transforms = facts.transforms
    extras = sorted({part for rule in facts.rules for part in rule.split(", ")})
    extras += ["scaled embeddings"] if transforms.embed_scale != 1 else []
    extras += ["scaled logits"] if transforms.logit_scale != 1 else []
    extras += ["capped logits"] if transforms.softcap is not None else []
    extras += ["a bias on the logits"] if transforms.has_bias else []
    return "exact" + (f", with {', '.join(extras)}" if extras else "")


def table() -> str:
    """The text between the marks in docs/training.md."""
    verdicts = {kind: verdict(kind) for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    exact = [kind for kind, found in verdicts.items() if found.startswith("exact")]
    release, many = transformers.__version__, len(verdicts)
    lines = [
        BEGIN,
        f"transformers {release}: {len(exact)} of {many} causal-LM classes are carried exactly.",
        "",
        "| model type | |",
        "|---|---|",
        *(f"| `{kind}` | {found} |" for kind, found in sorted(verdicts.items(), key=_order)),
        END,
    ]
    return "\n".join(lines)


def _order(item: tuple[str, str]) -> tuple[bool, str]:
    return item[1].startswith("refused"), item[0]


def written() -> str:
    """What docs/training.md says."""
    text = DOCS.read_text("utf-8")
    return text[text.index(BEGIN) : text.index(END) + len(END)]


def main() -> None:
    """Write the table anew."""
    quiet()
    text = DOCS.read_text("utf-8")
    DOCS.write_text(text.replace(written(), table()), "utf-8")


def quiet() -> None:
    """Leave the warnings of transformers about small models out."""
    transformers.logging.set_verbosity(50)
    logging.getLogger("transformers").setLevel(logging.CRITICAL)


if __name__ == "__main__":
    main()
