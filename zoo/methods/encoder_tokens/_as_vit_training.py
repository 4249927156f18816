"""How AS-ViT learns (2209.13802, section 3.3): masks instead of dropped tokens, so that gradients reach the thresholds.

The loss is cross entropy, the distance of the mean FLOPs from the budget, and the divergence from the dense model's
logits and from its features of the tokens that are kept to the end.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from pydantic import PrivateAttr
from torch import nn
from torch.nn import functional

from zoo.engines.blocks import BlockReducer, BlockStage, BlockView
from zoo.engines.classification import Batch, input_size
from zoo.engines.training import Group, Loss
from zoo.families.encoder_fine_tuning import FineTuning, backbone_groups
from zoo.families.encoder_tokens import AppliedEncoder
from zoo.methods.encoder_tokens.as_vit import TRAINED, ASViT, token_score
from zoo.models import LoadedModel
from zoo.models.anatomy import Encoder

TAU = 1e-4
EPSILON = 1e-6
BUDGET_WEIGHT, DISTILLATION_WEIGHT = 2.0, 0.5
DEIT_S = 4.6
"""10^9 FLOPs of DeiT-S. The published term is in such units, which smaller encoders would not feel: it is measured in
those of the dense encoder here, and equals the published one on DeiT-S."""


class LearningASViT(ASViT):
    """AS-ViT whose stages mask. The mask is made anew at each stage; blocks between stages use the last one."""

    _learned: list[nn.Parameter] = PrivateAttr(default_factory=list)

    def stages(self, encoder: Encoder) -> list[BlockStage]:
        """Masks in front of the blocks."""
        return [
            BlockStage(block, partial(self.mask, learned=learned), place="before")
            for block, learned in zip(self.blocks(encoder), self._learned, strict=True)
        ]

    def mask(self, view: BlockView, learned: torch.Tensor) -> None:
        """Note the policy ``[B, N]``, 1 for tokens that stay; the prefix always does."""
        kept = threshold_mask(view.memory["score"], learned)
        view.memory["policy"] = torch.cat((kept.new_ones(len(kept), view.prefix), kept), 1)

    def attend(self, view: BlockView) -> torch.Tensor:
        """Masked attention once there is a policy; notes how many tokens count in this block."""
        policy = view.memory.get("policy")
        tokens = (
            view.tokens.new_full((len(view.tokens),), view.tokens.shape[1])
            if policy is None
            else policy.sum(1)
        )
        view.memory.setdefault("counts", []).append(tokens)
        if policy is None:
            return super().attend(view)
        seen = view.seen
        attention = masked_softmax(seen.query @ seen.key.transpose(-1, -2) * seen.scaling, policy)
        output = attention.to(seen.value.dtype) @ seen.value
        view.memory["score"] = token_score(attention[:, :, 0], output)[:, view.prefix :]
        return output.transpose(1, 2)


def threshold_mask(score: torch.Tensor, threshold: torch.Tensor, tau: float = TAU) -> torch.Tensor:
    """1 where ``score [B, n]`` exceeds the threshold, else 0; its gradient is that of ``sigmoid(difference / tau)``."""
    soft = torch.sigmoid((score - threshold) / tau)
    hard = (soft > 0.5).to(soft.dtype)
    return hard + (soft - soft.detach())


def masked_softmax(logits: torch.Tensor, policy: torch.Tensor) -> torch.Tensor:
    """Softmax that keeps tokens out without dropping them; every token sees itself.

    Args:
        logits: ``[B, H, N, N]``.
        policy: ``[B, N]``, 1 for tokens that may be seen.

    Returns:
        ``[B, H, N, N]`` in float32: ``(e + eps / N) / (sum e + eps)`` with ``e = exp(logits - max) * allowed``.
    """
    tokens = logits.shape[-1]
    own = torch.eye(tokens, device=logits.device)
    allowed = own + (1 - own) * policy.float()[:, None, None]
    logits = logits.float()
    weights = (logits - logits.amax(-1, keepdim=True)).exp() * allowed
    return (weights + EPSILON / tokens) / (weights.sum(-1, keepdim=True) + EPSILON)


def encoder_flops(encoder: Encoder, counts: Sequence[torch.Tensor], patches: int) -> torch.Tensor:
    """The paper's FLOPs (multiplications) in 10^9, differentiable in the counts.

    Args:
        encoder: whose widths are taken.
        counts: tokens in each block, ``[B]`` each.
        patches: of the whole image.

    Returns:
        ``[B]``: ``4 D^2 t + 2 D t^2 + 2 D D_mlp t`` over all blocks, and the patch embedding.
    """
    dim = encoder.hidden_size
    total = counts[0].new_full(counts[0].shape, patches * dim * 3 * encoder.patch_size**2)
    for block, tokens in zip(encoder.blocks, counts, strict=True):
        hidden = next(part.out_features for part in block.mlp.modules() if isinstance(part, nn.Linear))
        total = total + 4 * dim**2 * tokens + 2 * dim * tokens**2 + 2 * dim * hidden * tokens
    return total / 1e9


def fine_tuning(method: ASViT, student: LoadedModel) -> FineTuning:
    """Everything of the student learns, and one threshold for each stage."""
    encoder = student.anatomy.encoder
    assert encoder is not None
    layers = method.blocks(encoder)
    height, width = input_size(student)
    patches = (height // encoder.patch_size) * (width // encoder.patch_size)
    begin = [method.threshold(encoder, number, patches) for number in range(len(layers))]
    learned = [nn.Parameter(torch.tensor(value, device=student.device)) for value in begin]
    learner = LearningASViT(layers=layers)
    learner._learned.extend(learned)
    teacher = copy.deepcopy(student.model).eval()

    def loss(batch: Batch, step: int) -> Loss:
        return _loss(learner, method.flops_ratio, student, teacher, batch)

    def trained() -> ASViT:
        found = tuple(max(0.0, value.item()) for value in learned)
        return method.model_copy(update={"layers": layers, "thresholds": found})

    def finish() -> None:
        values = [max(0.0, value.item()) for value in learned]
        setattr(student.model.config, TRAINED, {"layers": list(layers), "thresholds": values})

    thresholds = {f"threshold.{block}": value for block, value in zip(layers, learned, strict=True)}
    groups = [*backbone_groups(student.model), Group(thresholds, weight_decay=0.0)]
    return FineTuning(groups, loss, trained, finish)


def _loss(learner: LearningASViT, ratio: float, student: LoadedModel, teacher: Any, batch: Batch) -> Loss:
    encoder = student.anatomy.encoder
    assert encoder is not None
    with torch.no_grad(), _patch_features(teacher, encoder.prefix) as dense:
        target = teacher(pixel_values=batch.pixels).logits
    with learner.apply(student) as applied:
        reducer = cast(BlockReducer, cast(AppliedEncoder, applied).reducer)
        with _patch_features(student.model, encoder.prefix, lambda: reducer.memory["policy"]) as sparse:
            logits = student.model(pixel_values=batch.pixels).logits
        memory = reducer.memory
    whole = [counts.new_full((1,), reducer.entered) for counts in memory["counts"]]
    dense_flops = encoder_flops(encoder, whole, memory["patches"])
    share = (encoder_flops(encoder, memory["counts"], memory["patches"]) / dense_flops).mean()
    kept = memory["policy"][:, encoder.prefix :].detach().bool()
    parts = {
        "cross entropy": functional.cross_entropy(logits, batch.labels),
        "budget": BUDGET_WEIGHT * DEIT_S * (share - ratio).abs(),
        "logits": DISTILLATION_WEIGHT * _divergence(logits, target),
        "features": DISTILLATION_WEIGHT * _divergence(sparse[0][kept], dense[0][kept]),
    }
    count = len(batch.labels)
    summed = {name: value * count for name, value in parts.items()}
    return Loss(torch.stack(list(summed.values())).sum(), count, summed)


def _divergence(learned: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """``KL(target || learned)`` over the last dimension of ``[M, D]``, mean over the rows (0 when there is none)."""
    if not len(learned):
        return learned.sum()
    logs, goal = learned.float().log_softmax(-1), target.float().log_softmax(-1)
    return functional.kl_div(logs, goal, reduction="batchmean", log_target=True)


@contextmanager
def _patch_features(
    model: Any, prefix: int, policy: Callable[[], torch.Tensor] | None = None
) -> Iterator[list[torch.Tensor]]:
    """Collect the final features of the patches, ``[B, n, D]``.

    With a policy the head behind them gets patches scaled so that their plain mean is that over the kept ones: a head
    that pools patches then learns on what it will see when the others have left.
    """
    found: list[torch.Tensor] = []

    def see(_: Any, __: Any, output: Any) -> None:
        tokens = output.last_hidden_state
        found.append(tokens[:, prefix:])
        if policy is not None:
            kept = policy()[:, prefix:]
            weight = kept * kept.shape[1] / kept.sum(1, keepdim=True).clamp(min=1)
            weight = torch.cat((weight.new_ones(len(weight), prefix), weight), 1)
            output.last_hidden_state = tokens * weight.unsqueeze(-1)

    handle = model.base_model.register_forward_hook(see)
    try:
        yield found
    finally:
        handle.remove()
