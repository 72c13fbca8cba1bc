"""A rival: the decode loop as the reference toolkit's published inference does it, one utterance at a time.

Every step computes the logits of all streams over the whole vocabulary, masks what may not be sampled, takes the k most
probable of each stream, samples, and asks on the host whether the end was said. Written from its description; the
model, the cache (transformers' DynamicCache) and the attention (SDPA) are what it would use.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache

from speechlm_ext import SpeechLM
from speechlm_ext.generation.engine.rows import prefix_rows
from speechlm_ext.generation.requests.prompt import Prompt


def decode_one(
    model: SpeechLM, prompt: Prompt, top_k: int = 30, temperature: float = 0.8, greedy: bool = False
) -> Tensor:
    """Delayed rows int64 ``[R, S]`` of one target; exactly ``max_new`` frames, as the prompt asks.

    ``greedy`` takes the most probable tokens and allows no pads among codes, for a comparison with the engine.
    """
    ours = model.backbone.config._attn_implementation
    model.backbone.set_attn_implementation("sdpa")
    try:
        return _decode_one(model, prompt, top_k, temperature, greedy)
    finally:
        model.backbone.set_attn_implementation(ours)


@torch.inference_mode()
def _decode_one(model: SpeechLM, prompt: Prompt, top_k: int, temperature: float, greedy: bool) -> Tensor:
    layout, device = model.layout, model.device
    S, V = layout.num_streams, layout.vocab_size
    segment = prompt.segments[0]
    forbidden = torch.ones(S, V, dtype=torch.bool, device=device)
    for s, ids in enumerate(layout.content_ranges(segment.modality)):
        assert ids is not None
        forbidden[s, slice(*ids)] = False
        if s > 0 and not greedy:
            forbidden[s, layout.pad_id] = False
    vectors = model.head.stream_vectors()
    cache = DynamicCache(config=model.backbone.config)
    rows = torch.from_numpy(prefix_rows(prompt.frames_PS, layout)).to(device)
    position = torch.arange(len(rows), device=device)
    out, finish = [], None
    step = 0
    while finish is None or step - finish < S:
        embedded = model.embedding(rows)[None]
        mask = None
        if len(rows) > 1:
            mask = torch.ones(len(rows), len(rows), dtype=torch.bool, device=device).tril()[None, None]
        hidden = model.backbone(
            inputs_embeds=embedded,
            attention_mask=mask,
            position_ids=position[None],
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[0, -1]
        logits = (hidden + vectors) @ model.head.weight.T
        mask_now = forbidden.clone()
        mask_now[0, layout.sos_eos_id] = step < segment.min_new
        logits = logits.masked_fill(mask_now, float("-inf"))
        values, indices = logits.topk(1 if greedy else top_k, dim=-1)
        chosen = torch.multinomial((values / temperature).softmax(-1), 1)
        row = indices.gather(-1, chosen)[:, 0]
        if step < S:
            row[step + 1 :] = layout.pad_id
        if step == segment.max_new:
            row[0] = layout.sos_eos_id
        if finish is not None:
            row[: step - finish + 1] = layout.pad_id
        elif bool(row[0] == layout.sos_eos_id):
            finish = step
        out.append(row)
        rows, position = row[None], position[-1:] + 1
        step += 1
    return torch.stack(out)
