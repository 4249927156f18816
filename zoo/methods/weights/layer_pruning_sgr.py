"""Layer pruning with self-generated responses: remove layers, heal on what the whole model would have said.

On the Limits of Layer Pruning for Generative Reasoning in LLMs (arXiv 2602.01997, 2026). The paper compares rules that
choose whole decoder layers; ``zoo train layer-pruning-sgr`` then lets the unpruned model answer the prompts of the data
and fine-tunes the pruned one with LoRA on these answers, with the loss on their tokens only.

The healing recipe is the released one. Answers are 256 tokens long at most (8192 there), the frozen weights keep
their type (4-bit there).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from zoo.dialogues import Dialogue
from zoo.engines.language_modelling import TokenExample, prompt_ids
from zoo.engines.removal_search import run_blocks, whole_layers
from zoo.engines.self_responses import respond
from zoo.engines.statistics import BlockDistance, Watch
from zoo.engines.stepping import layer_arguments
from zoo.engines.surgery import Block
from zoo.engines.training import Recipe
from zoo.families.layer_removal import LayerRemover
from zoo.families.recovery import LoraRecovery
from zoo.families.weights import Work
from zoo.interface import register
from zoo.models import LoadedModel
from zoo.models.anatomy import Decoder
from zoo.training import Setting

SYSTEM = "You are a helpful assistant."
OPENING = 32
"""Tokens of a text without a prompt that serve as one."""


class LastToken:
    """What enters and leaves a layer at the last token of each sequence: two lists of ``[hidden]`` float32."""

    def __init__(self) -> None:
        self.before: list[torch.Tensor] = []
        self.after: list[torch.Tensor] = []

    def update(self, *activations: torch.Tensor) -> None:
        """Take in one sequence."""
        before, after = activations
        self.before.append(before[-1].clone())
        self.after.append(after[-1].clone())


def closest_stretch(states: torch.Tensor, count: int) -> int:
    """First layer of the ``count`` neighbouring layers, layer 0 not among them, that turn the last token least.

    Args:
        states: residual stream before each layer and after the last one, ``[layers + 1, sequences, hidden]``.
        count: how many layers.
    """
    start, end = states[1:-count], states[1 + count :]
    cosine = torch.cosine_similarity(start, end, dim=-1).clamp(-1, 1)
    return 1 + int((cosine.arccos() / torch.pi).mean(1).argmin())


@register("layer-pruning-sgr")
class LayerPruningSgr(LoraRecovery, LayerRemover):
    """Removes whole decoder layers, never the first one, by one of the paper's rules."""

    recipe: ClassVar[Recipe] = Recipe(
        learning_rate=2e-4,
        schedule="constant",
        warmup=50,
        betas=(0.9, 0.99),
        weight_decay=1e-4,
        batch=4,
        accumulate=2,
    )
    adapter_dropout: ClassVar[float] = 0.05

    rule: Literal["contiguous", "block-influence", "reverse", "iterative"] = Field(
        "contiguous",
        description="Which layers leave: neighbours that together turn the last token least; those that change hidden "
        "states least; the last ones; or one after the other, each time the one whose absence costs least accuracy.",
    )
    keep_last: bool = Field(True, description="The rule 'reverse' counts back from the last layer but one.")
    recovery_rank: int = Field(
        16, ge=1, description="Rank of the adapters with which zoo train heals the model."
    )
    temperature: float = Field(0.9, gt=0, description="Of the self-generated responses.")
    top_p: float = Field(0.95, gt=0, le=1, description="Of the self-generated responses.")
    response_tokens: int = Field(256, ge=1, description="Length of a self-generated response, at most.")

    def choose(self, work: Work) -> Collection[Block]:
        """Layers to remove."""
        total = len(work.decoder.layers)
        count = self.count(total)
        if count == 0:
            return []
        if self.rule == "reverse":
            end = max(1 + count, total - self.keep_last)
            chosen: Collection[int] = range(end - count, end)
        elif self.rule == "contiguous":
            seen = [
                layer["token"] for layer in work.observe(lambda _: {"token": Watch("layer", LastToken())})
            ]
            states = torch.stack([torch.stack(rows) for rows in (*(x.before for x in seen), seen[-1].after)])
            first = closest_stretch(states, count)
            chosen = range(first, first + count)
        elif self.rule == "block-influence":
            moved = work.observe(lambda _: {"distance": Watch("layer", BlockDistance("cosine"))})
            chosen = sorted(range(1, total), key=lambda index: moved[index]["distance"].total)[:count]
        else:
            chosen = self._search(work, count)
        return [Block(index) for index in chosen]

    def _search(self, work: Work, count: int) -> list[int]:
        """One layer per round: the one without which accuracy stays highest; of equals the later one."""
        left = whole_layers(work.decoder)
        for step in range(count):
            scores = {
                block: accuracy(work, [other for other in left if other != block]) for block in left[1:]
            }
            left.remove(max(scores, key=lambda block: (scores[block], block.index)))
            work.step(step + 1, count)
        return sorted(set(range(len(work.decoder.layers))) - {block.index for block in left})

    def lessons(
        self, dense: LoadedModel, dialogues: Sequence[Dialogue], setting: Setting
    ) -> list[list[TokenExample]]:
        """The unpruned model's own answers to the prompts that leave room for one."""
        prompts = [opening(dense.tokenizer, dialogue) for dialogue in dialogues]
        fitting = [place for place, prompt in enumerate(prompts) if len(prompt) < setting.length]
        answered = respond(
            dense,
            [prompts[place] for place in fitting],
            setting.folder / "responses.jsonl",
            new_tokens=min(self.response_tokens, setting.length),
            temperature=self.temperature,
            top_p=self.top_p,
            seed=setting.seed,
            progress=partial(setting.progress, "generating responses"),
        )
        lessons: list[list[TokenExample]] = [[] for _ in dialogues]
        for place, example in zip(fitting, answered, strict=True):
            lessons[place].append(TokenExample(example.ids[: setting.length], example.start))
        return lessons


def opening(tokenizer: Any, dialogue: Dialogue) -> list[int]:
    """Token ids of what the model answers or continues: the prompt, or the beginning of a text without one."""
    if dialogue.prompt:
        return prompt_ids(tokenizer, dialogue.prompt, SYSTEM)
    return list(tokenizer(dialogue.response, verbose=False)["input_ids"][:OPENING])


@torch.no_grad()
def accuracy(work: Work, blocks: Sequence[Block]) -> float:
    """Fraction of the next tokens of the calibration text that ``blocks`` of the decoder, and no others, predict."""
    decoder: Decoder = work.decoder
    assert decoder.head is not None
    right = total = 0
    for ids in work.windows.split(work.batch):
        ids = ids.to(decoder.embed.weight.device)
        hidden, arguments = layer_arguments(decoder, ids)
        hidden = run_blocks(decoder, blocks, hidden, arguments)
        predicted = decoder.head(decoder.norm(hidden[:, :-1])).argmax(-1)
        right += int((predicted == ids[:, 1:]).sum())
        total += predicted.numel()
    return right / max(1, total)
