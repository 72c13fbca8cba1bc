"""The frame transformer of a multi-scale model: predicts a frame's streams one after the other.

The backbone takes one row per frame; its state ``h`` predicts stream 0 through the head, so text and all other content
of one stream is unchanged, a pretrained backbone's text included. A small causal transformer predicts streams 1 to
S - 1 of the frame (RQ-Transformer, Lee et al. 2022; UniAudio, Yang et al. 2023; Moshi's depth
transformer, Défossez et al. 2024). Its position s takes ``h`` and the frame's token in stream s - 1, and

    hidden_s = h + to_hidden(body(from_hidden(h) + from_token(norm(embedding(token_{s-1}))) + e_s))

goes to the model's own head, with stream s's vector and scope. Without its second term that is the ``parallel`` layout.
The streams of a frame are exact conditionals of one another, so no stream has to be delayed.

Axes: N packed positions, R of them with a frame to predict, E = S - 1 inner positions, S streams, B rows of a step,
D the model's width, L layers, H heads, P head size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModel

from speechlm_ext.model.attention.kv_cache import KVCache, Step
from speechlm_ext.model.attention.scores import ScoreRule
from speechlm_ext.model.backbone.body import run_inner_step
from speechlm_ext.model.config import FrameTransformerConfig
from speechlm_ext.ops.decode_layer import add_rms_norm, decode_linear

NAME = "speechlm_frame"
NORM_EPS = 1e-5


class Frames(NamedTuple):
    """Hidden states of streams 1 to S - 1, of those packed positions whose next frame has any.

    A named tuple for the same reason as :class:`speechlm_ext.ops.MultiStreamLoss`.
    """

    rows_R: Tensor
    """int64 ``[R]``, ascending: the packed positions; at least one, so that all ranks call the same modules."""
    hidden_RED: Tensor
    """float ``[R, E, D]``: input of the head for stream 1, 2, …"""


class FrameTransformer(nn.Module):
    """The transformer of a frame; the module has its formula.

    Args:
        config: sizes.
        width: D.
        num_streams: S, at least 2.
    """

    def __init__(self, config: FrameTransformerConfig, width: int, num_streams: int) -> None:
        super().__init__()
        self.num_inner = num_streams - 1
        settings = AutoConfig.for_model(
            "llama",
            hidden_size=config.hidden_size,
            intermediate_size=config.ffn_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_heads,
            max_position_embeddings=self.num_inner,
            rms_norm_eps=NORM_EPS,
            vocab_size=1,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
            use_cache=False,
        )
        self.body = AutoModel.from_config(settings, attn_implementation=NAME)
        self.body.set_input_embeddings(nn.Identity())
        self.token_norm = nn.RMSNorm(width, eps=NORM_EPS)
        self.from_token = nn.Linear(width, config.hidden_size, bias=False)
        self.from_hidden = nn.Linear(width, config.hidden_size, bias=False)
        self.stream_embed = nn.Parameter(torch.empty(self.num_inner, config.hidden_size))
        self.to_hidden = nn.Linear(config.hidden_size, width, bias=False)
        self.register_buffer("_positions", torch.arange(self.num_inner), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all weights outside the body, so that the three parts of an input have equal variance.

        The table's own entries are some fifty times smaller than a normed hidden state: without ``token_norm`` a new
        model would not see the tokens beside ``h``.
        """
        for layer in (self.from_token, self.from_hidden):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
        nn.init.normal_(self.stream_embed)
        nn.init.normal_(self.to_hidden.weight, std=0.02)

    def forward(self, hidden_RD: Tensor, embedded_RED: Tensor) -> Tensor:
        """Hidden states of streams 1 to S - 1 of whole frames.

        Args:
            hidden_RD: float ``[R, D]``, the backbone's, R at least 1.
            embedded_RED: float ``[R, E, D]``, embeddings of the frames' tokens in streams 0 to S - 2.

        Returns:
            float ``[R, E, D]``.
        """
        inputs = self._inputs(hidden_RD[:, None], embedded_RED, self.stream_embed)
        # A batch of frames, each attended to causally: no padding, no packing.
        out = self.body(inputs_embeds=inputs, position_ids=self._positions[None], use_cache=False)
        return hidden_RD[:, None] + self.to_hidden(out.last_hidden_state)

    def _inputs(self, hidden: Tensor, embedded: Tensor, stream_embed: Tensor) -> Tensor:
        return self.from_hidden(hidden) + self.from_token(self.token_norm(embedded)) + stream_embed

    # ---- decoding -----------------------------------------------------------------------------------------------
    def new_cache(self, num_slots: int, dtype: torch.dtype, device: torch.device) -> FrameCache:
        """Memory for the inner positions of ``num_slots`` rows."""
        return FrameCache(num_slots, self.num_inner, dtype, device)

    @torch.no_grad()
    def step(self, hidden_BD: Tensor, embedded_BD: Tensor, stream: int, cache: FrameCache) -> Tensor:
        """Hidden states ``[B, D]`` of one stream, after those of the streams before it.

        No choice depends on values in device memory, so a CUDA graph can replay it.

        Args:
            hidden_BD: the backbone's.
            embedded_BD: embeddings of the tokens of stream ``stream`` - 1.
            stream: 1 to S - 1.
            cache: of this frame's earlier streams, updated in place.
        """
        inner = stream - 1
        normed_BD, _ = add_rms_norm(embedded_BD, None, self.token_norm.weight, NORM_EPS)
        inputs_BD = decode_linear(hidden_BD, self.from_hidden.weight)
        inputs_BD = inputs_BD + decode_linear(normed_BD, self.from_token.weight) + self.stream_embed[inner]
        out_BD = run_inner_step(self.body, inputs_BD, cache, inner)
        return hidden_BD + decode_linear(out_BD, self.to_hidden.weight)


class FrameCache(KVCache):
    """Keys and values of the inner positions of the current frame, overwritten by each frame.

    All rows take position s in the same call, so nothing is counted.
    """

    def __init__(self, num_slots: int, num_inner: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(num_slots, num_inner, dtype, device)
        # Row e holds e for each slot: the positions and lengths of a step, without a copy from the host.
        self._inner_EB = torch.arange(num_inner + 1, device=device)[:, None].repeat(1, num_slots)

    def begin_inner(self, num_rows: int, inner: int) -> None:
        """Prepare a forward of the first ``num_rows`` slots at position ``inner``."""
        self._step = Step(
            self.block_table[:num_rows],
            self._inner_EB[inner, :num_rows],
            self._inner_EB[inner + 1, :num_rows],
        )


def frame_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    kv: KVCache | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """The body's attention for transformers: causal over whole frames, or through the cache of the frame being decoded.

    Args:
        query, key, value: ``[R, H, E, P]``, or ``[B, H, 1, P]`` with ``kv``.

    Returns:
        ``([R, E, H, P], None)``.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if kv is not None:
        return kv.attend(module.layer_idx, query, key, value, ScoreRule(scale)), None  # type: ignore[arg-type]
    causal = query.shape[2] > 1
    out = F.scaled_dot_product_attention(query, key, value, is_causal=causal, scale=scale)
    return out.transpose(1, 2), None


AttentionInterface.register(NAME, frame_attention)
