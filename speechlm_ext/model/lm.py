"""The model: a causal LM over several parallel token streams.

The input of a position is the sum of its streams' embeddings (pads contribute exactly zero), the body is that of a
causal LM of transformers, carried exactly (``backbone/``), and one head serves all streams: side by side, or one
after the other through a small transformer inside the frame (``frame.py``). Training reads packed rows; generation
prefills packed rows and then takes one row a step, with a key/value cache.

Axes: N packed positions, B batch, T frames, S streams, D hidden, V vocabulary, K keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from speechlm_ext.errors import ConfigError
from speechlm_ext.layout import TokenLayout
from speechlm_ext.model.attention.kernels import choose_attention
from speechlm_ext.model.attention.kv_cache import KVCache
from speechlm_ext.model.backbone.body import (
    build_body,
    make_config,
    max_positions,
    run_packed,
    run_prefill,
    run_step,
    stochastic_settings,
)
from speechlm_ext.model.backbone.pretrained import load_backbone
from speechlm_ext.model.backbone.proof import probe_backbone
from speechlm_ext.model.backbone.transforms import TextTransforms
from speechlm_ext.model.config import LossSettings, ModelConfig
from speechlm_ext.model.decode_head import DecodeHead
from speechlm_ext.model.embedding import MultiStreamEmbedding
from speechlm_ext.model.frame import FrameCache, Frames, FrameTransformer
from speechlm_ext.model.frame_loss import frame_positions
from speechlm_ext.model.head import MultiStreamHead
from speechlm_ext.model.host_facts import HostFacts
from speechlm_ext.ops import MultiStreamLoss, PackedBatch

if TYPE_CHECKING:
    from speechlm_ext.tasks import TaskTemplate
    from speechlm_ext.tokenizers import TokenizerSet


class SpeechLMModel(nn.Module):
    """A speech language model with its token layout and, where known, its tokenizers.

    Args:
        config: backbone, tasks and loss settings.
        layout: meaning of the ids; its vocabulary sizes the embedding table and the head.
        tokenizers: turn text and audio into raw ids and back; only generation needs them.

    Raises:
        ConfigError: the backbone's configuration is not a causal LM's; a frame transformer with delayed streams, or
            with one stream; another softcap than the backbone's.
        BackboneError: (a ConfigError) a SpeechLM cannot compute this kind of backbone exactly.
    """

    def __init__(
        self, config: ModelConfig, layout: TokenLayout, tokenizers: TokenizerSet | None = None
    ) -> None:
        super().__init__()
        if config.frame_transformer is not None:
            _check_layout(layout)
        self.config, self.layout, self.tokenizers = config, layout, tokenizers
        backbone_config = make_config(config.backbone)
        facts = probe_backbone(config.backbone, verify=config.verify_backbone)
        self.transforms: TextTransforms = facts.transforms
        """Scales, cap and bias that the backbone's own model puts on embeddings and logits."""
        self.attention_rules = facts.rules
        """Parts of the backbone's attention beyond plain causal softmax, in words."""
        self.backbone = build_body(backbone_config, layout.vocab_size)
        settings = _loss_settings(config, self.transforms)
        D = backbone_config.hidden_size
        std = float(getattr(backbone_config, "initializer_range", 0.02))
        self.embedding = MultiStreamEmbedding(layout.vocab_size, D, pad_id=layout.pad_id, std=std)
        self.head = MultiStreamHead(
            layout.vocab_size,
            D,
            layout.num_streams,
            layout.scopes(config.loss.scope),
            settings,
            weight=self.embedding.weight if config.tie_head else None,
            heads=config.heads,
            contents=layout.stream0_contents() if config.loss.scope == "modality" else None,
            has_bias=self.transforms.has_bias,
        )
        # Kept in float32 and cast to the table's dtype, as transformers does it.
        self.register_buffer("_embed_scale", torch.tensor(self.transforms.embed_scale), persistent=False)
        if not config.tie_head:
            nn.init.normal_(self.head.weight, std=std)
        if self.head.stream_embed is not None:
            nn.init.normal_(self.head.stream_embed, std=std)
        self.frame: FrameTransformer | None = None
        """The transformer inside a frame of a multi-scale model."""
        if config.frame_transformer is not None:
            self.frame = FrameTransformer(config.frame_transformer, D, layout.num_streams)

    # ---- properties ---------------------------------------------------------------------------------------------
    @property
    def tasks(self) -> tuple[TaskTemplate, ...]:
        """The tasks that the model is trained for."""
        return self.config.tasks

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.weight.device

    @property
    def max_positions(self) -> int:
        """Longest sequence, in frames, that the backbone was configured for."""
        return max_positions(self.backbone.config)

    def num_parameters(self) -> int:
        """Number of trainable values, shared ones counted once."""
        return sum(p.numel() for p in self.parameters())

    # ---- forward ------------------------------------------------------------------------------------------------
    def hidden(
        self, ids_NS: Tensor, position_N: Tensor, cu_seqlens: Tensor, facts: HostFacts | None = None
    ) -> Tensor:
        """Last hidden states of a packed row, as the head takes them.

        Args:
            ids_NS: int ``[N, S]`` delayed ids.
            position_N: int ``[N]``, restarting at 0 in each sequence.
            cu_seqlens: int32 ``[n+1]`` sequence bounds.
            facts: of the batch, so that attention does not wait for a GPU; None reads them where they are needed.

        Returns:
            float ``[N, D]``.

        Raises:
            ConfigError: the facts are those of another batch.
        """
        bounds = None if facts is None else facts.bounds
        return self.head_input(run_packed(self.backbone, self.embed(ids_NS), position_N, cu_seqlens, bounds))

    def embed(self, ids_NS: Tensor) -> Tensor:
        """The backbone's input ``[N, D]``."""
        embedded_ND = self.embedding(ids_NS)
        if self.transforms.embed_scale == 1:
            return embedded_ND
        return embedded_ND * self._embed_scale.to(embedded_ND.dtype)

    def head_input(self, hidden: Tensor) -> Tensor:
        """Hidden states as the head takes them, with the factor on the logits applied."""
        return hidden if self.transforms.logit_scale == 1 else hidden * self.transforms.logit_scale

    def forward(
        self,
        ids: Tensor,
        labels: Tensor,
        loss_weight: Tensor,
        position: Tensor,
        cu_seqlens: Tensor,
        reduction: Literal["sum", "none"] = "sum",
        facts: HostFacts | None = None,
    ) -> MultiStreamLoss:
        """Loss of a packed batch; the arguments are the fields of :class:`speechlm_ext.ops.PackedBatch`.

        Args:
            ids, labels: int ``[N, S]``.
            loss_weight: float32 ``[N, S]``, 0 where there is no loss.
            position: int ``[N]``.
            cu_seqlens: int32 ``[n+1]``.
            reduction: ``sum``, or ``none`` to get each token's loss as well.
            facts: as in :meth:`hidden`.
        """
        hidden_ND = self.hidden(ids, position, cu_seqlens, facts)
        frames = self._frames(hidden_ND, labels, loss_weight, facts)
        rows = None if facts is None else facts.loss_rows
        return self.head(hidden_ND, labels, loss_weight, reduction, frames, rows)

    def facts(self, batch: PackedBatch) -> HostFacts:
        """What :meth:`forward` has to know about a batch that is still on the CPU; move it with the batch."""
        rows_R = None if self.frame is None else frame_positions(batch.loss_weight)
        rows = self.head.plan_rows(batch.labels, batch.loss_weight, rows_R)
        return replace(HostFacts.read(batch), loss_rows=rows, frame_rows_R=rows_R)

    def _frames(
        self, hidden_ND: Tensor, labels_NS: Tensor, weight_NS: Tensor, facts: HostFacts | None = None
    ) -> Frames | None:
        """Hidden states of streams 1 to S - 1 where their labels have weights; None without a frame transformer."""
        if self.frame is None:
            return None
        rows_R = None if facts is None else facts.frame_rows_R
        if rows_R is None:
            rows_R = frame_positions(weight_NS)
        tokens_RE = labels_NS[rows_R, :-1]
        return Frames(rows_R, self.frame(hidden_ND[rows_R], self.embedding(tokens_RE[..., None])))

    def logprobs(
        self, ids: Tensor, labels: Tensor, mask: Tensor, position: Tensor, cu_seqlens: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities of a packed batch's labels, for scoring: no gradients.

        Args:
            ids, labels: int ``[N, S]``.
            mask: bool ``[N, S]``, True for labels to score.
            position: int ``[N]``.
            cu_seqlens: int32 ``[n+1]``.

        Returns:
            ``(logprobs, entropy)``, float32 ``[N, S]`` in nats, 0 where the mask is False; the entropy is that of the
            softmax over the label's scope.
        """
        with torch.no_grad():
            hidden_ND = self.hidden(ids, position, cu_seqlens)
            return self.head.logprobs(hidden_ND, labels, mask, self._frames(hidden_ND, labels, mask))

    # ---- generation ---------------------------------------------------------------------------------------------
    def new_cache(self, num_slots: int, num_rows: int) -> KVCache:
        """An empty key/value cache for :meth:`prefill` and :meth:`step_hidden`: ``num_rows`` rows for each request."""
        return KVCache(num_slots, num_rows, self.embedding.weight.dtype, self.device)

    def prefill(self, ids_NS: Tensor, cache: KVCache, slots: Sequence[int], lengths: Sequence[int]) -> Tensor:
        """Append the rows of several requests to their slots, in one packed forward.

        Args:
            ids_NS: int ``[N, S]`` delayed ids, one request after the other.
            cache: updated in place.
            slots, lengths: of each request; the lengths sum to N.

        Returns:
            float ``[N, D]`` hidden states.
        """
        return self.head_input(run_prefill(self.backbone, self.embed(ids_NS), cache, slots, lengths))

    def step_hidden(self, ids_BS: Tensor, cache: KVCache) -> Tensor:
        """Hidden states ``[B, D]`` of one more row for each of the first B slots. No gradients.

        Args:
            ids_BS: int ``[B, S]`` delayed ids.
            cache: updated in place.
        """
        return self.head_input(run_step(self.backbone, self.embed(ids_BS), cache))

    def new_frame_cache(self, num_slots: int) -> FrameCache:
        """Memory for :meth:`stream_hidden`, of a model with a frame transformer."""
        assert self.frame is not None
        return self.frame.new_cache(num_slots, self.embedding.weight.dtype, self.device)

    def stream_hidden(self, hidden_BD: Tensor, token_B: Tensor, stream: int, cache: FrameCache) -> Tensor:
        """Hidden states ``[B, D]`` of ``stream``, 1 to S - 1, of a model with a frame transformer: one call per stream,
        in order.

        Args:
            hidden_BD: of :meth:`step_hidden`.
            token_B: int ``[B]``, the previous stream's ids in this frame.
            cache: updated in place.
        """
        assert self.frame is not None
        return self.frame.step(hidden_BD, self.embedding(token_B[:, None]), stream, cache)

    def scope_head(self, ranges: Sequence[Sequence[tuple[int, int]]]) -> DecodeHead:
        """Logits over chosen id ranges of each stream; see :class:`DecodeHead`. With a frame transformer every product
        serves one stream."""
        return DecodeHead(self.head, ranges, join=self.frame is None)

    # ---- the backbone ---------------------------------------------------------------------------------------------
    def describe_backbone(self) -> str:
        """One line for a log: whether the backbone was compared, its attention rules, and the settings switched off."""
        compared = self.config.verify_backbone
        parts = [
            str(self.config.backbone["model_type"]),
            "text logits equal to its own code's" if compared else "NOT compared with its own code",
        ]
        if self.attention_rules:
            kernel, _ = choose_attention(self.device, self.embedding.weight.dtype)
            parts.append(f"attention with {'; '.join(self.attention_rules)} on {kernel}")
        noise = stochastic_settings(self.config.backbone)
        if noise:
            parts.append("switched off: " + ", ".join(f"{name} {value:g}" for name, value in noise.items()))
        return ", ".join(parts)

    def load_backbone(self, folder: str | Path) -> None:
        """Start from a pretrained causal LM, proven to compute the same text logits; see
        :func:`speechlm_ext.model.backbone.pretrained.load_backbone`."""
        load_backbone(self, folder)


def _loss_settings(config: ModelConfig, transforms: TextTransforms) -> LossSettings:
    """The loss with the backbone's own soft cap on the logits."""
    asked = config.loss.softcap
    if transforms.softcap is None or asked == transforms.softcap:
        return config.loss
    if asked is not None:
        raise ConfigError(
            f"loss.softcap is {asked}, but the backbone caps its logits at {transforms.softcap}; leave loss.softcap "
            "out."
        )
    return replace(config.loss, softcap=transforms.softcap)


def _check_layout(layout: TokenLayout) -> None:
    """Raise :class:`ConfigError` for a frame transformer with one stream or delayed streams."""
    if layout.num_streams < 2:
        raise ConfigError(
            f"model.frame_transformer predicts a frame's streams one after the other, but layout {layout} has one "
            "stream. Leave it out."
        )
    if any(layout.delays):
        raise ConfigError(
            f"model.frame_transformer predicts all streams of a frame in its own row, but layout {layout} delays them "
            f"by {list(layout.delays)}. Set data.delays to {[0] * layout.num_streams}, or leave frame_transformer out."
        )
