"""Tasks for language models: perplexity, agreement with the dense model, multiple choice by likelihood."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from zoo.bench.record import Comparison, Figure, compare
from zoo.bench.tasks import Desk, Task, task
from zoo.errors import BadInput, RunFailed

if TYPE_CHECKING:
    import torch

    from zoo.bench.session import Arm
    from zoo.question_data import Question


class _OnHeldOutText(Task):
    """A task on consecutive windows of the packaged news that calibration never sees, or of a text of one's own."""

    text: str = Field("news", description="Packaged news, or a file as for zoo run --calibration.")
    length: int = Field(128, ge=2, description="Tokens per window; each is predicted from those before it.")
    tokens: int = Field(
        16384, ge=2, description="Tokens in all windows together, as far as the text reaches."
    )

    def windows(self, dense: Arm) -> torch.Tensor:
        """Token ids ``[windows, length]``."""
        import torch

        from zoo.data import TEXTS, load_texts

        tokenizer = _tokenizer(dense)
        text = "\n\n".join(load_texts(self.text, split="heldout" if self.text in TEXTS else None))
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        context = getattr(dense.loaded.model.config.get_text_config(), "max_position_embeddings", None)
        if context and self.length > context:
            raise BadInput(
                f"{dense.loaded.ref} reads {context} tokens at once; give {self.name} a length up to that"
            )
        count = min(max(1, self.tokens // self.length), len(ids) // self.length)
        if count < 1:
            raise BadInput(f"the held-out text has {len(ids)} tokens; give {self.name} a shorter length")
        return torch.tensor(ids[: count * self.length]).view(count, self.length)

    def described(self, windows: torch.Tensor) -> str:
        """Data and protocol."""
        return f"{PurePath(self.text).name}, {len(windows)} x {self.length} tokens"


@task("perplexity")
class Perplexity(_OnHeldOutText):
    """Exponential of the mean next-token loss on held-out news, window by window."""

    def run(self, dense: Arm, method: Arm | None, desk: Desk) -> list[Comparison]:
        """One comparison, ``perplexity``.

        Raises:
            BadInput: no tokenizer, or windows longer than the model reads.
            RunFailed: a loss is no finite number, or too large for its exponential.
        """
        windows = self.windows(dense)
        own = desk.answers(self, lambda: self._figure(dense, windows, desk))
        other = None if method is None else self._figure(method, windows, desk)
        return [compare("perplexity", own, other, task=self.described(windows))]

    def _figure(self, arm: Arm, windows: torch.Tensor, desk: Desk) -> Figure:
        from torch.nn.functional import cross_entropy

        total, count = 0.0, windows.shape[0] * (windows.shape[1] - 1)
        for ids, logits in _logits(arm, windows, desk, "reading held-out text"):
            total += float(cross_entropy(logits[:-1].float(), ids[1:], reduction="sum"))
        loss = total / count
        if not loss < 700:
            raise RunFailed(f"{arm.loaded.ref} is broken on this text: its loss is {loss:.4g} nats per token")
        return Figure(median=math.exp(loss), n=count)


@task("agreement")
class Agreement(_OnHeldOutText):
    """How far next-token predictions are from the dense model's: most likely token, and KL divergence."""

    length: int = Field(256, ge=2, description="Tokens per window; each is predicted from those before it.")
    tokens: int = Field(4096, ge=2, description="Tokens in all windows together, as far as the text reaches.")

    def run(self, dense: Arm, method: Arm | None, desk: Desk) -> list[Comparison]:
        """Two comparisons, ``agreement`` and ``kl``; none without a method.

        Raises:
            BadInput: no tokenizer, or windows longer than the model reads.
            RunFailed: the method's distributions are no numbers.
        """
        if method is None:
            return []
        windows = self.windows(dense)
        same = kl = 0.0
        both = zip(
            _logits(dense, windows, desk, "comparing predictions"),
            _logits(method, windows, desk),
            strict=True,
        )
        for (_, expected), (_, actual) in both:
            expected, actual = (part[:-1].float().log_softmax(-1) for part in (expected, actual))
            same += float((expected.argmax(-1) == actual.argmax(-1)).sum())
            kl += float((expected.exp() * (expected - actual)).sum())
        count = windows.shape[0] * (windows.shape[1] - 1)
        if not math.isfinite(kl):
            raise RunFailed(
                f"{method.loaded.ref} is broken on this text: its divergence from dense is not a number"
            )
        label = self.described(windows)
        return [
            compare("agreement", None, Figure(median=same / count, n=count), task=label),
            compare("kl", None, Figure(median=kl / count, n=count), task=label),
        ]


def _logits(
    arm: Arm, windows: torch.Tensor, desk: Desk, what: str | None = None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Ids ``[T]`` and logits ``[T, V]`` of one window after the other.

    The arm is at work during a forward pass only, so that both sides may take turns on one model.
    """
    for done, window in enumerate(windows):
        if what is not None:
            desk.progress(what, done, len(windows))
        ids = window.unsqueeze(0).to(arm.loaded.device)
        with arm.forward({"input_ids": ids, "use_cache": False}) as work:
            logits = work().logits[0]
        yield ids[0], logits


@task("multiple-choice")
class MultipleChoice(Task):
    """Fraction of questions whose right answer is the likeliest, per character, after the question."""

    data: Literal["quartz", "social-iqa"] = Field("quartz", description="A packaged set of questions.")
    limit: int | None = Field(200, ge=1, description="Questions asked; always the same ones. None: all.")

    def run(self, dense: Arm, method: Arm | None, desk: Desk) -> list[Comparison]:
        """Two comparisons: ``accuracy`` and, with a method, ``loyalty``.

        Raises:
            BadInput: no tokenizer.
            DownloadFailed: the questions could not be fetched.
        """
        from zoo.bench.scoring import fraction
        from zoo.question_data import load_questions

        questions = load_questions(self.data, self.limit)
        label = f"{self.data}, {len(questions)} questions, likelihood per character"
        own = desk.answers(self, lambda: _choices(dense, questions, desk))
        others = None if method is None else _choices(method, questions, desk)

        def accuracy(chosen: Sequence[int]) -> Figure:
            return fraction(
                [pick == question.right for pick, question in zip(chosen, questions, strict=True)]
            )

        rows = [compare("accuracy", accuracy(own), None if others is None else accuracy(others), task=label)]
        if others is not None:
            same = fraction([a == b for a, b in zip(own, others, strict=True)])
            rows.append(compare("loyalty", None, same, task=label))
        return rows


def _choices(arm: Arm, questions: Sequence[Question], desk: Desk) -> list[int]:
    """Index of the option that the model finds likeliest, per question.

    As in lm-evaluation-harness: sum of the log-likelihoods of the option's tokens after the question, over the length
    of the option in characters (its ``acc_norm``).
    """
    chosen = []
    for done, question in enumerate(questions):
        desk.progress("answering questions", done, len(questions))
        scores = _likelihoods(arm, f"Question: {question.text}\nAnswer:", question.options)
        per_character = [score / len(option) for score, option in zip(scores, question.options, strict=True)]
        chosen.append(max(range(len(per_character)), key=per_character.__getitem__))
    return chosen


def _likelihoods(arm: Arm, beginning: str, options: Sequence[str]) -> list[float]:
    """Log-likelihood in nats of each option after ``beginning``; one forward pass, padded on the right."""
    import torch

    tokenizer = _tokenizer(arm)
    begun = len(tokenizer(beginning)["input_ids"])
    rows = [tokenizer(f"{beginning} {option}")["input_ids"] for option in options]
    longest = max(map(len, rows))
    pad = tokenizer.pad_token_id or 0
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows], device=arm.loaded.device)
    lengths = torch.tensor([len(row) for row in rows], device=ids.device)
    places = torch.arange(longest, device=ids.device)
    inputs = {"input_ids": ids, "attention_mask": (places < lengths[:, None]).long(), "use_cache": False}
    with arm.forward(inputs) as work:
        # Of the logits [options, T, V], those that predict the options' tokens.
        predicted = work().logits[:, begun - 1 : -1].float().log_softmax(-1)
    found = predicted.gather(-1, ids[:, begun:, None]).squeeze(-1)
    return (found * (places[begun:] < lengths[:, None])).sum(-1).tolist()


def _tokenizer(arm: Arm) -> Any:
    tokenizer = arm.loaded.tokenizer
    if tokenizer is None:
        raise BadInput(f"{arm.loaded.ref} has no tokenizer, so there is no text to measure it on")
    return tokenizer
