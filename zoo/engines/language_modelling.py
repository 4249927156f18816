"""Learning to predict text: dialogues as token ids, batches with padding, and the causal language-model loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from zoo.dialogues import Dialogue
from zoo.engines.training import Loss

IGNORED = -100
"""Label of a position that is not predicted."""


@dataclass(frozen=True)
class TokenExample:
    """Token ids, of which those from ``start`` on are to be predicted (never the first one)."""

    ids: tuple[int, ...]
    start: int


def prompt_ids(tokenizer: Any, prompt: str, system: str | None = None) -> list[int]:
    """A prompt up to where the answer begins: in the chat template where there is one, else followed by a newline.

    Args:
        tokenizer: of the model.
        prompt: what the user says.
        system: system message, for chat templates.
    """
    if getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": prompt}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
    else:
        ids = tokenizer(f"{prompt}\n")["input_ids"]
    return list(ids)


def encode(tokenizer: Any, dialogue: Dialogue, length: int) -> list[TokenExample]:
    """Token examples of at most ``length`` tokens from one dialogue.

    A response is predicted given its prompt, its end included; what does not fit is cut off. A text without a prompt is
    cut into pieces, and all tokens but the first of each are predicted. What leaves nothing to predict is left out.
    """
    if not dialogue.prompt:
        ids = tokenizer(dialogue.response, verbose=False)["input_ids"]
        pieces = [tuple(ids[first : first + length]) for first in range(0, len(ids), length)]
        return [TokenExample(piece, 1) for piece in pieces if len(piece) > 1]
    prompt = prompt_ids(tokenizer, dialogue.prompt)
    response = tokenizer(dialogue.response, add_special_tokens=False, verbose=False)["input_ids"]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if not response or len(prompt) >= length:
        return []
    return [TokenExample((*prompt, *response, *end)[:length], len(prompt))]


def collate(
    examples: Sequence[TokenExample], padding: int, device: torch.device | str
) -> dict[str, torch.Tensor]:
    """One batch, padded on the right.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels`` (``IGNORED`` where nothing is predicted), ``[batch, tokens]``.
    """
    width = max(len(example.ids) for example in examples)
    ids = torch.full((len(examples), width), padding)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for row, example in enumerate(examples):
        count = len(example.ids)
        ids[row, :count] = torch.tensor(example.ids)
        mask[row, :count] = 1
        labels[row, example.start : count] = ids[row, example.start : count]
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device), "labels": labels.to(device)}


def causal_lm_loss(model: Any, batch: dict[str, torch.Tensor]) -> Loss:
    """Cross entropy of the predicted tokens, each given those before it; summed, in float32, natural logarithm.

    Args:
        model: transformers causal LM.
        batch: as from ``collate``.
    """
    output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    labels = batch["labels"][:, 1:]
    predicted = labels != IGNORED
    logits = output.logits[:, :-1][predicted].float()
    total = functional.cross_entropy(logits, labels[predicted], reduction="sum")
    return Loss(total, int(predicted.sum()))


@torch.no_grad()
def mean_loss(model: Any, examples: Sequence[TokenExample], padding: int, batch: int = 4) -> float:
    """Mean ``causal_lm_loss`` per predicted token, in evaluation mode."""
    training = model.training
    model.eval()
    try:
        device = next(model.parameters()).device
        losses = [
            causal_lm_loss(model, collate(examples[first : first + batch], padding, device))
            for first in range(0, len(examples), batch)
        ]
    finally:
        model.train(training)
    return sum(float(loss.total) for loss in losses) / max(1, sum(loss.terms for loss in losses))
