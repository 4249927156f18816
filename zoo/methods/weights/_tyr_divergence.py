"""How far the predictions of a pruned model are from the dense model's, where the dense model puts its weight."""

from __future__ import annotations

import torch

from zoo.engines.evolution import Dice
from zoo.errors import RunFailed
from zoo.models.anatomy import Decoder


class DenseOutputs:
    """The highest logits of the dense model at every calibration token, and the tokens that they stand for.

    Args:
        decoder: dense, with an LM head, on the device where it shall run.
        windows: ids ``[windows, tokens]``, two tokens or more.
        top: how many logits are kept per position.
        batch: windows run at once. It changes speed and memory only.

    Raises:
        RunFailed: logits are not finite.
    """

    def __init__(self, decoder: Decoder, windows: torch.Tensor, top: int, batch: int) -> None:
        self.windows, self.batch = windows, batch
        values, places = [], []
        for ids in windows.split(batch):
            logits = _logits(decoder, ids)
            highest = logits.topk(min(top, logits.shape[-1]), dim=-1)
            values.append(highest.values.cpu())
            places.append(highest.indices.int().cpu())
        self.values, self.places = torch.cat(values), torch.cat(places)
        if not bool(self.values.isfinite().all()):
            raise RunFailed("the model's logits are NaN or infinite; load it in float32 or bfloat16")

    def sample(self, tokens: int, dice: Dice) -> torch.Tensor:
        """Random windows that hold ``tokens`` tokens, each once, or all there are: indices ``[n]``."""
        return dice.sample(-(-tokens // self.windows.shape[1]), len(self.windows))

    @torch.no_grad()
    def divergence(self, decoder: Decoder, sample: torch.Tensor, tokens: int) -> float:
        """Mean KL divergence per predicted token, in nats, over the first ``tokens`` of the ``sample``.

        Both distributions are taken over the kept logits alone ("sparse KL"). Attention is causal, so a last window
        that counts in part need not be cut.

        Args:
            decoder: pruned.
            sample: indices of windows ``[n]``.
            tokens: how many count.
        """
        total, counted = 0.0, 0
        for rows in sample.split(self.batch):
            logits = _logits(decoder, self.windows[rows])
            places = self.places[rows].to(logits.device, torch.int64)
            theirs = logits.gather(-1, places).float().log_softmax(-1)
            own = self.values[rows].to(logits.device).float().log_softmax(-1)
            divergences = (own.exp() * (own - theirs)).sum(-1).flatten()[: tokens - counted]
            total += float(divergences.double().sum())
            counted += len(divergences)
        return total / counted


def _logits(decoder: Decoder, ids: torch.Tensor) -> torch.Tensor:
    """Logits of all next tokens within the windows ``ids [batch, tokens]``: ``[batch, tokens - 1, vocabulary]``."""
    assert decoder.head is not None
    hidden = decoder.module(input_ids=ids.to(decoder.embed.weight.device), use_cache=False).last_hidden_state
    logits: torch.Tensor = decoder.head(hidden[:, :-1])
    return logits
