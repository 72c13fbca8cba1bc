"""multistream_loss in plain torch: the logits of one stream after the other, gradients by autograd."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from speechlm_ext.ops.multistream_loss.scopes import local_targets
from speechlm_ext.ops.multistream_loss.types import LossInputs, LossResult, LossWants, sum_dtype


@torch.enable_grad()
def loss_pass(inputs: LossInputs, wants: LossWants) -> LossResult:
    """Losses of all live targets, and all gradients if any is wanted."""
    targets, coef_nll = inputs.targets, inputs.coef_nll
    dtype = sum_dtype(inputs.hidden.dtype)
    given = (inputs.hidden, inputs.weight, inputs.stream_embed, inputs.bias)
    leaves = [None if t is None else t.detach().to(dtype).requires_grad_() for t in given]
    hidden, weight, embed, bias = leaves
    assert hidden is not None and weight is not None
    total = hidden.new_zeros(())
    stream_loss = hidden.new_zeros(targets.shape[1])
    stream_correct = torch.zeros_like(stream_loss, dtype=torch.int64)
    token_nll, token_entropy = hidden.new_zeros(2, *targets.shape)
    for kind, scopes in enumerate(inputs.sets):
        live = inputs.live_of(kind)
        for s, scope in enumerate(scopes):
            rows = live[:, s].nonzero().squeeze(1)
            head = torch.cat([torch.arange(i.row, i.row + i.num_ids, device=rows.device) for i in scope])
            vector = (
                -1 if embed is None else s - targets.shape[1] + embed.shape[0]
            )  # the last streams have one
            h = hidden[rows] if embed is None or vector < 0 else hidden[rows] + embed[vector]
            logits = F.linear(h, weight[head], None if bias is None else bias[head])
            if inputs.softcap:
                logits = inputs.softcap * torch.tanh(logits / inputs.softcap)
            target = local_targets(targets[rows, s], scope)
            nll = F.cross_entropy(logits, target, reduction="none")
            loss = F.cross_entropy(logits, target, reduction="none", label_smoothing=inputs.label_smoothing)
            loss = loss + inputs.z_loss * logits.logsumexp(1).square()
            weighted = (inputs.coef_loss[rows, s].to(dtype) * loss).sum()
            total = total + weighted
            if coef_nll is not None:
                total = total + (coef_nll[rows, s].to(dtype) * nll).sum()
            log_p = logits.detach().log_softmax(1)
            stream_loss[s] += weighted.detach()
            stream_correct[s] += (log_p.gather(1, target[:, None]).squeeze(1) == log_p.amax(1)).sum()
            token_nll[rows, s] = nll.detach()
            token_entropy[rows, s] = -torch.xlogy(log_p.exp(), log_p.exp()).sum(1)
    result = LossResult(
        stream_loss,
        torch.stack((stream_correct, inputs.live.sum(dim=0))),
        token_nll if wants.token_nll else None,
        token_entropy if wants.token_entropy else None,
    )
    if any(wants.gradients):
        learned = [t for t in leaves if t is not None]
        gradients = iter(torch.autograd.grad(total, learned, materialize_grads=True))
        names = ("grad_hidden", "grad_weight", "grad_embed", "grad_bias")
        for name, leaf in zip(names, leaves, strict=True):
            setattr(result, name, None if leaf is None else next(gradients))
    return result
