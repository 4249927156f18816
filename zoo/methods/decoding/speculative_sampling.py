"""Speculative sampling: a small model drafts, the large one checks, and the output law stays the large one's.

Leviathan et al., "Fast Inference from Transformers via Speculative Decoding" (2211.17192), algorithm 1; Chen et al.,
"Accelerating Large Language Model Decoding with Speculative Sampling" (2302.01318), algorithm 2. The draft model writes
a few tokens one by one; the target scores them all in one pass and accepts a prefix by rejection sampling (when
decoding greedily: those equal to its own choice).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field
from transformers import DynamicCache

from zoo.engines.drafting import Context, Draft, Drafter, Row, Verified
from zoo.engines.sampling import draw
from zoo.errors import BadInput, Refused
from zoo.families.decoding import BudgetedDecoder
from zoo.interface import register

if TYPE_CHECKING:
    from zoo.models import LoadedModel

Schedule = Literal["constant", "heuristic", "confidence"]


class _Reader:
    """What the draft model has read of one sample: its cache, and how many tokens that holds."""

    def __init__(self, config: Any, draft_tokens: int) -> None:
        self.cache = DynamicCache(config=config)
        # A cache of sliding-window layers can be cropped only if it is told beforehand.
        self.cache.activate_past_recording()
        self.length = 0
        self.draft_tokens = draft_tokens


class ModelDrafter(Drafter):
    """Drafts chains with a language model of its own, sample by sample, each with its own cache.

    Args:
        model: the draft model (transformers).
        vocabulary: width of the target's logits, to which the draft model's are cut or padded.
        draft_tokens: tokens per draft (at first, under ``heuristic``).
        schedule: see ``SpeculativeSampling``.
        threshold: see ``SpeculativeSampling.confidence``.
    """

    costly = True

    def __init__(
        self, model: Any, vocabulary: int, draft_tokens: int, schedule: Schedule, threshold: float
    ) -> None:
        self.model = model
        self.vocabulary = vocabulary
        self.draft_tokens = draft_tokens
        self.schedule = schedule
        self.threshold = threshold
        self.config = model.config.get_text_config(decoder=True)
        self.readers: list[_Reader] = []
        self.context: Context | None = None
        keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.last_only: dict[str, Any] = {"logits_to_keep": 1} if keeps else {}

    def start(self, context: Context, rows: Sequence[Row]) -> None:
        """Fresh caches; the prompts are read with the first draft."""
        self.context = context
        self.readers = [_Reader(self.config, self.draft_tokens) for _ in rows]

    def propose_row(self, row: Row) -> Draft:
        """Read what was committed since the last draft, then write token by token."""
        assert self.context is not None
        reader = self.readers[row.index]
        fresh = row.tokens[reader.length :]
        room = getattr(self.config, "max_position_embeddings", None) or len(row.tokens) + row.limit
        count = min(reader.draft_tokens, row.limit, room - len(row.tokens) + 1)
        if max(fresh) >= self.model.get_input_embeddings().num_embeddings:
            return Draft()  # an id that only the target has (of its padding, or of an image)
        tokens: list[int] = []
        laws: list[torch.Tensor] = []
        while len(tokens) < count:
            scores = self.context.scores(row, tokens, self._read(reader, fresh))
            if self.context.sample:
                laws.append(scores.softmax(-1))
                token = draw(laws[-1])
            else:
                # Chosen, not drawn: without a law the one-hot rule applies.
                token = int(scores.argmax(-1))
            tokens.append(token)
            fresh = [token]
            if self.schedule == "confidence" and float(scores.softmax(-1).max()) < self.threshold:
                break
        return Draft(tokens, laws=torch.stack(laws) if laws else None)

    def observe(self, row: Row, verified: Verified) -> None:
        """Take back what was rejected, and set the next draft's length."""
        if verified.prefill:
            return
        reader = self.readers[row.index]
        # Of an entirely accepted draft the last token has not been read yet.
        agreed = min(reader.length, len(row.tokens) - len(verified.committed) + len(verified.path))
        reader.cache.crop(agreed - reader.length)
        reader.length = agreed
        drafted = len(verified.tokens) - 1
        if self.schedule == "heuristic" and drafted:
            whole = len(verified.path) == drafted
            reader.draft_tokens = reader.draft_tokens + 2 if whole else max(1, reader.draft_tokens - 1)

    def stop(self) -> None:
        """Release the caches."""
        self.readers = []
        self.context = None

    def _read(self, reader: _Reader, tokens: list[int]) -> torch.Tensor:
        """Logits ``[vocabulary]`` after ``tokens``, which go into the cache."""
        device = self.model.device
        start, reader.length = reader.length, reader.length + len(tokens)
        logits = self.model(
            input_ids=torch.tensor([tokens], device=device),
            position_ids=torch.arange(start, reader.length, device=device).unsqueeze(0),
            past_key_values=reader.cache,
            use_cache=True,
            **self.last_only,
        ).logits[0, -1, : self.vocabulary]
        missing = self.vocabulary - len(logits)
        return torch.nn.functional.pad(logits, (0, missing), value=float("-inf")) if missing else logits


@register("speculative-sampling")
class SpeculativeSampling(BudgetedDecoder):
    """Drafts with a smaller model of the same vocabulary; exact at any temperature."""

    draft_tokens: int = Field(5, ge=1, le=256, description="Tokens drafted per step (gamma in the paper).")
    draft_model: str | None = Field(
        None, description="Draft model: short name, hub id or folder. Or give apply(..., draft=loaded_model)."
    )
    schedule: Schedule = Field(
        "constant",
        description="Length of drafts: constant; heuristic (2 more after a draft accepted whole, else 1 fewer); "
        "confidence (a draft ends with the first token whose distribution peaks below `confidence`).",
    )
    confidence: float = Field(0.4, ge=0, le=1, description="Threshold of the confidence schedule.")

    def drafter(
        self, loaded: LoadedModel, *, draft: LoadedModel | None = None, **resources: Any
    ) -> ModelDrafter:
        """Load the draft model, unless it is given, and check that both mean the same by a token id.

        Raises:
            BadInput: no draft model is given.
            Refused: the two vocabularies differ.
        """
        if draft is None:
            if self.draft_model is None:
                raise BadInput(
                    "speculative-sampling needs a smaller model with the same tokenizer to draft: set "
                    "draft_model=NAME, or call apply(model, draft=loaded_model)"
                )
            from zoo.models.loading import load_model

            draft = load_model(self.draft_model)
            draft.model.to(device=loaded.device, dtype=loaded.dtype)
        target, small = (model.model.config.get_text_config(decoder=True) for model in (loaded, draft))
        if loaded.tokenizer is not None and draft.tokenizer is not None:
            same = loaded.tokenizer.get_vocab() == draft.tokenizer.get_vocab()
        else:
            same = target.vocab_size == small.vocab_size
        if not same:
            raise Refused(
                f"speculative-sampling needs a draft model with the target's vocabulary; {draft.ref} has "
                f"{small.vocab_size} tokens of its own, {loaded.ref} {target.vocab_size}: choose one of the same family"
            )
        return ModelDrafter(draft.model, target.vocab_size, self.draft_tokens, self.schedule, self.confidence)
