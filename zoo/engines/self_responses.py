"""Answers of a model to prompts, sampled and kept in a file as they come: training data that a model makes itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from zoo.engines.language_modelling import TokenExample
from zoo.engines.training import derived_seed
from zoo.errors import BadInput, RunFailed
from zoo.models import LoadedModel

BATCH = 8
"""Prompts answered at once."""


@torch.no_grad()
def respond(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    file: Path,
    *,
    new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[TokenExample]:
    """Let a model answer prompts.

    Args:
        loaded: a causal LM with a tokenizer.
        prompts: token ids of each, none of them empty.
        file: JSON lines with prompt, response and their ids. Answers that it holds already are not made again; a batch
            that was cut off is.
        new_tokens: length of an answer, at most.
        temperature, top_p: of the sampling.
        seed: what is drawn depends on it and on the place among the prompts. The global random state is neither read
            nor changed.
        progress: called with finished and total prompts.

    Returns:
        One example per prompt: its ids and the answer's, end-of-sequence token included, to be predicted from where
        the answer begins.

    Raises:
        BadInput: the file holds something else.
        RunFailed: the file cannot be written.
    """
    examples = _read(file)
    examples = examples[: len(examples) // BATCH * BATCH] if len(examples) < len(prompts) else examples
    if any(
        tuple(prompt) != example.ids[: example.start]
        for prompt, example in zip(prompts, examples, strict=False)
    ):
        raise BadInput(f"{file} holds answers to other prompts; train into a new folder")
    cuda = [loaded.device] if loaded.device.type == "cuda" else []
    _write(file, loaded, examples, "w")
    with torch.random.fork_rng(devices=cuda):
        for first in range(len(examples), len(prompts), BATCH):
            torch.manual_seed(derived_seed(seed, first))
            batch = prompts[first : first + BATCH]
            answered = _answer(loaded, batch, new_tokens, temperature, top_p)
            _write(file, loaded, answered, "a")
            examples += answered
            if progress is not None:
                progress(len(examples), len(prompts))
    return examples


def _answer(
    loaded: LoadedModel, prompts: Sequence[Sequence[int]], new_tokens: int, temperature: float, top_p: float
) -> list[TokenExample]:
    """One batch, padded on the left."""
    tokenizer = loaded.tokenizer
    end, padding = tokenizer.eos_token_id, tokenizer.pad_token_id or 0
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), padding)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    output = loaded.model.generate(
        input_ids=ids.to(loaded.device),
        attention_mask=mask.to(loaded.device),
        max_new_tokens=new_tokens,
        do_sample=True,
        temperature=temperature,
        top_p=top_p,
        top_k=0,
        pad_token_id=padding,
    )
    examples = []
    for prompt, row in zip(prompts, output[:, width:].tolist(), strict=True):
        answer = row[: row.index(end) + 1] if end in row else row
        examples.append(TokenExample((*prompt, *answer), len(prompt)))
    return examples


def _read(file: Path) -> list[TokenExample]:
    if not file.exists():
        return []
    examples = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
            examples.append(TokenExample(tuple(row["ids"]), row["start"]))
        except (ValueError, KeyError, TypeError):
            break  # cut off while it was written
    return examples


def _write(file: Path, loaded: LoadedModel, examples: Sequence[TokenExample], mode: str) -> None:
    decode = loaded.tokenizer.decode
    try:
        with file.open(mode, encoding="utf-8") as lines:
            for example in examples:
                prompt, answer = example.ids[: example.start], example.ids[example.start :]
                row = {
                    "prompt": decode(prompt),
                    "response": decode(answer),
                    "start": example.start,
                    "ids": example.ids,
                }
                lines.write(json.dumps(row) + "\n")
    except OSError as error:
        raise RunFailed(f"{file} cannot be written: {(error.strerror or str(error)).lower()}") from error
