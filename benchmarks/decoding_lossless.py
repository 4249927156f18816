"""That drafters change nothing: 50 prompts, 128 tokens, token for token what plain greedy decoding writes.

The plain side runs prompt by prompt and is kept in the zoo's cache folder. The methods run on small budgets (every
draft, whatever its size, goes through the same verification), several padded prompts at once.

Where two outputs part, it is looked up how far apart the model's two best logits are there, and how much its logits
differ between passes over different numbers of tokens, which only round differently. A gap below twice that noise is a
tie of the arithmetic, which any other kernel would break, too; a larger one is an error.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from decoding_tasks import tasks, varied
from transformers import DynamicCache

import zoo
from taxonomy.runs import Measurement
from zoo.bench.quality import common_prefix
from zoo.bench.session import greedy
from zoo.engines.language_modelling import prompt_ids
from zoo.engines.verification_cost import VerificationCost
from zoo.families.decoding import AppliedDecoder
from zoo.models import LoadedModel
from zoo.models.packages import home

PARAMETERS: dict[str, dict[str, Any]] = {
    **{
        slug: {"budget": "auto"}
        for slug in ("prompt-lookup", "token-recycling", "sam-decoding", "rest", "goose", "jacobi")
    },
    "speculative-sampling": {"draft_tokens": 2},
    "layer-skip-self-speculation": {"draft_tokens": 3, "search_iterations": 5},
    "medusa": {"tree": "measured", "nodes": 5},
    "eagle": {"depth": 2, "top_k": 2, "nodes": 6},
    "lookahead": {"ngram": 3, "window": 3, "pool": 2},
}
"""Drafts small enough that two CPU cores prove all methods in minutes."""
NODES = 6
"""Tokens per sample and pass up to which verification passes for free, where a budget is kept to."""
WIDTHS = (1, 2, 4, 8, 16, 32)
"""Tokens per pass among which rounding is compared."""


@dataclass
class Proof:
    """What came out for one method."""

    parameters: dict[str, Any]
    prompts: int = 0
    tokens: int = 0
    identical: int = 0
    ties: int = 0
    wrong: int = 0
    steps: int = 0
    committed: int = 0
    differences: list[str] = field(default_factory=list)

    @property
    def summary(self) -> str:
        """In one line."""
        return f"{self.identical} of {self.prompts} outputs identical, {self.ties} ties, {self.wrong} wrong"

    def measurements(self) -> Iterator[Measurement]:
        """For the catalogue."""
        for quantity, unit, count in (
            ("prompts", "prompts", self.prompts),
            ("tokens", "tokens", self.tokens),
            ("identical-outputs", "outputs", self.identical),
            ("ties", "outputs", self.ties),
            ("wrong", "outputs", self.wrong),
        ):
            yield Measurement(quantity, "method", unit, count, None, self.prompts, "lossless")
        if self.steps:
            tau = round(self.committed / self.steps, 4)
            yield Measurement("tokens-per-step", "method", "1", tau, None, self.prompts, "lossless")


@torch.no_grad()
def prove(
    loaded: LoadedModel, slug: str, resources: Mapping[str, Any], count: int, new_tokens: int, batch: int
) -> Proof:
    """Compare ``count`` outputs of a method with plain greedy decoding; it ends early at the first that is wrong."""
    prompts = [(task, prompt_ids(loaded.tokenizer, prompt)) for task, prompt in varied(tasks(), count)]
    prompts.sort(key=lambda item: len(item[1]))  # little padding
    method = zoo.method(slug, **PARAMETERS[slug])
    proof = Proof(method.parameters())
    references = References(loaded, new_tokens)
    with method.apply(loaded, **resources, cost=free_up_to(NODES * batch)) as applied:
        assert isinstance(applied, AppliedDecoder)
        for first in range(0, len(prompts), batch):
            part = prompts[first : first + batch]
            said = answers(loaded, applied, [prompt for _, prompt in part], new_tokens)
            stats = applied.report.decoding
            assert stats is not None
            # Steps of every sample for itself; the first entry of each is the prompt's own pass.
            proof.steps += len(applied.trace) - len(part)
            proof.committed += sum(stats.committed)
            for (task, prompt), answer in zip(part, said, strict=True):
                compare(proof, loaded, task, prompt, references[prompt], answer)
            if proof.wrong:
                break
    return proof


def free_up_to(positions: int) -> VerificationCost:
    """Verification of so many positions costs what a plain step costs, and of more than could ever pay."""
    return VerificationCost((1, positions, positions + 1), (64,), ((1.0, 1.0, 1e6),))


def answers(
    loaded: LoadedModel, applied: AppliedDecoder, prompts: Sequence[Sequence[int]], new_tokens: int
) -> list[list[int]]:
    """What a method generates, up to the end of each text."""
    width = max(map(len, prompts))
    options = greedy(loaded.tokenizer, new_tokens)
    ids = torch.tensor(
        [[options["pad_token_id"]] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    )
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    out = applied.generate(input_ids=ids.to(loaded.device), attention_mask=mask.to(loaded.device), **options)
    end = loaded.tokenizer.eos_token_id
    return [row[: row.index(end) + 1] if end in row else row for row in out[:, width:].tolist()]


def compare(
    proof: Proof,
    loaded: LoadedModel,
    task: str,
    prompt: Sequence[int],
    plain: Sequence[int],
    own: Sequence[int],
) -> None:
    """Add one output to a proof."""
    proof.prompts += 1
    proof.tokens += len(plain)
    if list(plain) == list(own):
        proof.identical += 1
        return
    place = common_prefix(list(plain), list(own))
    gap, noise = gap_and_noise(loaded.model, [*prompt, *plain[:place]])
    tie = gap < 2 * noise
    proof.ties += tie
    proof.wrong += not tie
    proof.differences.append(
        f"{task}: {'a tie' if tie else 'WRONG'} at token {place + 1} of {len(plain)}: "
        f"best logits {gap:.1e} apart, noise {noise:.1e}"
    )


def gap_and_noise(model: Any, ids: Sequence[int]) -> tuple[float, float]:
    """How far apart the two best logits behind ``ids`` are, and how much any there depends on the width of passes."""
    device = model.device
    found = []
    for width in (width for width in WIDTHS if width < len(ids)):
        cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        for part in (ids[:-width], ids[-width:]):
            logits = model(
                torch.tensor([part], device=device), past_key_values=cache, logits_to_keep=1
            ).logits
        found.append(logits[0, -1].float())
    best = found[0].topk(2).values
    noise = max(float((other - found[0]).abs().max()) for other in found[1:])
    return float(best[0] - best[1]), noise


class References:
    """Plain greedy answers, prompt by prompt, each made once and kept."""

    def __init__(self, loaded: LoadedModel, new_tokens: int) -> None:
        self.loaded = loaded
        self.new_tokens = new_tokens
        facts = [
            loaded.ref,
            loaded.revision,
            str(loaded.dtype),
            str(loaded.device),
            torch.__version__,
            new_tokens,
        ]
        digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
        self.folder = home() / "plain-answers" / digest

    def __getitem__(self, prompt: Sequence[int]) -> list[int]:
        file = self.folder / f"{hashlib.sha256(json.dumps(list(prompt)).encode()).hexdigest()[:16]}.json"
        if not file.is_file():
            ids = torch.tensor([list(prompt)], device=self.loaded.device)
            options = greedy(self.loaded.tokenizer, self.new_tokens)
            out = self.loaded.model.generate(ids, attention_mask=torch.ones_like(ids), **options)
            write(file, json.dumps(out[0, len(prompt) :].tolist()))
        answer: list[int] = json.loads(file.read_text(encoding="utf-8"))
        return answer


def write(file: Path, text: str) -> None:
    """All or nothing, since several processes may prove at once."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)
