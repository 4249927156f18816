"""The head of EAGLE (2401.15077): one transformer layer that predicts the target's next final hidden state."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import DynamicCache, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from zoo.engines.draft_heads import DraftHeads, HeadText, Output, final_hidden, output_of, target_sizes
from zoo.engines.language_modelling import IGNORED
from zoo.engines.training import Loss
from zoo.models import LoadedModel

TOKEN_WEIGHT = 0.1
"""Weight of the tokens' cross entropy beside the features' smooth L1 (section 3.2 of the paper)."""
Embed = Callable[[torch.Tensor], torch.Tensor]


class EagleHead(DraftHeads):
    """From the feature at a place and the token behind it to the feature at the next place.

    A feature is a final hidden state of the target, as its output layer reads it. The layer is a Llama layer of the
    target's sizes without a norm in front of its attention; the target's embedding and output layer stay frozen.

    Args:
        sizes: ``hidden``, ``vocabulary``, ``intermediate``, ``heads``, ``kv_heads``, ``head_dim``, ``epsilon``,
            ``theta``.
    """

    method = "eagle"

    def __init__(self, sizes: Mapping[str, Any]) -> None:
        super().__init__(sizes)
        hidden = sizes["hidden"]
        self.config = LlamaConfig(
            hidden_size=hidden,
            intermediate_size=sizes["intermediate"],
            num_hidden_layers=1,
            num_attention_heads=sizes["heads"],
            num_key_value_heads=sizes["kv_heads"],
            head_dim=sizes["head_dim"],
            rms_norm_eps=sizes["epsilon"],
            attn_implementation="sdpa",
        )
        self.fuse = nn.Linear(2 * hidden, hidden)
        self.layer = LlamaDecoderLayer(self.config, 0)
        self.layer.input_layernorm = nn.Identity()

    @classmethod
    def fresh(cls, loaded: LoadedModel, seed: int = 0) -> EagleHead:
        """An untrained head (float32) with the sizes of a model's own layers."""
        text = loaded.model.config.get_text_config(decoder=True)
        sizes = target_sizes(loaded)
        heads = text.num_attention_heads
        rope = getattr(text, "rope_parameters", None) or {}
        sizes_of_layer = {
            "intermediate": getattr(text, "intermediate_size", None) or 4 * sizes["hidden"],
            "heads": heads,
            "kv_heads": getattr(text, "num_key_value_heads", None) or heads,
            "head_dim": getattr(text, "head_dim", None) or sizes["hidden"] // heads,
            "epsilon": getattr(text, "rms_norm_eps", 1e-6),
            "theta": rope.get("rope_theta", 10000.0),
        }
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return cls({**sizes, **sizes_of_layer}).to(loaded.device)

    def forward(
        self,
        features: torch.Tensor,
        embedded: torch.Tensor,
        positions: torch.Tensor,
        mask: torch.Tensor | None = None,
        cache: DynamicCache | None = None,
    ) -> torch.Tensor:
        """Predicted features.

        Args:
            features: ``[batch, n, hidden]``, of the places.
            embedded: ``[batch, n, hidden]``, of the tokens one place further.
            positions: ``[n]``.
            mask: additive ``[1, 1, n, cached + n]``; ``None`` = causal.
            cache: of what came before; is added to.

        Returns:
            ``[batch, n, hidden]``, of the next places.
        """
        kind = self.fuse.weight.dtype
        inputs = self.fuse(torch.cat((embedded.to(kind), features.to(kind)), dim=-1))
        output: torch.Tensor = self.layer(
            inputs,
            attention_mask=mask,
            past_key_values=cache,
            position_embeddings=self._rotary(positions, kind),
        )
        return output

    def _rotary(self, positions: torch.Tensor, kind: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines ``[1, n, head_dim]``; not a buffer, which would lose digits in bfloat16."""
        size = self.sizes["head_dim"]
        powers = torch.arange(0, size, 2, device=positions.device) / size
        angles = positions.float().unsqueeze(-1) / self.sizes["theta"] ** powers
        angles = torch.cat((angles, angles), dim=-1).unsqueeze(0)
        return angles.cos().to(kind), angles.sin().to(kind)


def predict_ahead(
    head: EagleHead, features: torch.Tensor, ids: torch.Tensor, embed: Embed
) -> tuple[torch.Tensor, torch.Tensor]:
    """Predictions of all features but the first, from true ones; and those, ``[batch, tokens - 1, hidden]`` each.

    Place ``t`` is given ``features[:, t]`` and token ``t + 1`` and predicts the feature at ``t + 1``.
    """
    positions = torch.arange(ids.shape[1] - 1, device=ids.device)
    return head(features[:, :-1], embed(ids[:, 1:]), positions), features[:, 1:]


def head_loss(
    head: EagleHead,
    features: torch.Tensor,
    batch: Mapping[str, torch.Tensor],
    embed: Embed,
    output: Output,
    noise: float,
) -> Loss:
    """Smooth L1 between features, and the cross entropy of the tokens that they stand for.

    Learnt from are the places whose given token (one place further) is one to predict.

    Args:
        head: to be trained.
        features: of the target ``[batch, tokens, hidden]``, float32.
        batch: as from ``zoo.engines.language_modelling.collate``.
        embed, output: of the target, frozen.
        noise: the features that are given get uniform noise in ``[-1/2, 1/2] * noise * 512 / length``.
    """
    lengths = batch["attention_mask"].sum(1).view(-1, 1, 1)
    noisy = features + (torch.rand_like(features) - 0.5) * noise * 512 / lengths
    predicted, _ = predict_ahead(head, noisy, batch["input_ids"], embed)
    places = batch["labels"][:, 1:] != IGNORED
    predicted, true = predicted[places].float(), features[:, 1:][places]
    alike = functional.smooth_l1_loss(predicted, true, reduction="none").mean(-1).sum()
    law = output(true).float().softmax(-1)
    tokens = -(law * output(predicted).float().log_softmax(-1)).sum()
    return Loss(alike + TOKEN_WEIGHT * tokens, len(true), {"features": alike, "tokens": tokens})


@torch.no_grad()
def agreement(head: EagleHead, model: Any, text: HeadText) -> float:
    """How often the likeliest token behind a predicted feature is the target's own choice, on held-out text."""
    embed, output = model.get_input_embeddings(), output_of(model)

    def same() -> Iterator[torch.Tensor]:
        for batch in text.batches():
            predicted, true = predict_ahead(head, final_hidden(model, batch), batch["input_ids"], embed)
            places = batch["labels"][:, 1:] != IGNORED
            yield output(predicted[places]).argmax(-1) == output(true[places]).argmax(-1)

    found = [item for part in same() for item in part.tolist()]
    return sum(found) / max(1, len(found))
