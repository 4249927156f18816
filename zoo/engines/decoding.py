"""Draft, verify, commit: the one loop behind every accelerated decoder.

A *drafter* proposes tokens (a chain or a tree), the target model scores all of them in one forward pass, a rule accepts
some (greedy match, or exact rejection sampling), and the cache keeps what was accepted. The loop is handed to
``model.generate`` through its ``custom_generate`` argument, so that prompts, images, padding, generation config,
logits processors and stopping criteria are prepared by transformers itself.

Samples of a batch accept different numbers of tokens. Their caches stay aligned by columns: a column that a sample
rejected is masked for that sample, positions are counted per sample, and the dead columns are squeezed out from time
to time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from zoo.engines.sampling import Warper, accept_chain, accept_siblings, draw, longest_match
from zoo.engines.trees import ancestors, children, depths, is_chain, keep_last, longest_path, tree_mask
from zoo.errors import BadInput, Refused
from zoo.report import DecodingStats

Need = Literal["logits", "prompt-logits", "hidden-states"]


@dataclass
class Draft:
    """What a drafter proposes after the last committed token of one sample.

    Attributes:
        tokens: ``n`` token ids.
        parents: ``[n]``, see ``zoo.engines.trees``; ``None`` is a chain.
        laws: full distributions ``[n, V]`` (float32, on the model's device) from which the tokens were drawn, after
            ``Context.scores``; siblings carry the law of the first of them. ``None`` = the tokens were not drawn but
            chosen, and the one-hot rule applies. Only looked at when sampling.
        replacement: ``False`` when siblings were drawn without replacement.
        seen: bool ``[n + 1, n + 1]`` in place of the ancestors (row 0 the root), for drafts that are not only a tree.
        depths: distances from the root ``[n]`` in place of those of the tree; they set the position ids.
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] | None = None
    laws: torch.Tensor | None = None
    replacement: bool = True
    seen: np.ndarray | None = None
    depths: list[int] | None = None

    @property
    def chain(self) -> bool:
        """Whether plain causal attention and consecutive positions are right for it."""
        return self.seen is None and self.depths is None and (self.parents is None or is_chain(self.parents))

    def within(self, depth: int) -> Draft:
        """The part that is at most ``depth`` deep (deeper tokens could not be committed any more)."""
        if self.seen is not None or self.depths is not None:
            return self
        if self.parents is None or is_chain(self.parents):
            if len(self.tokens) <= depth:
                return self
            laws = None if self.laws is None else self.laws[:depth]
            return Draft(self.tokens[:depth], None, laws, self.replacement)
        deep = depths(self.parents)
        if max(deep) <= depth:
            return self
        stay = [index for index, level in enumerate(deep) if level <= depth]
        place = {old: new for new, old in enumerate(stay)}
        return Draft(
            [self.tokens[index] for index in stay],
            [place.get(self.parents[index], self.parents[index]) for index in stay],
            None if self.laws is None else self.laws[stay],
            self.replacement,
        )


@dataclass
class Row:
    """One sample. ``tokens`` is the live list of its prompt (padding left out) and all committed tokens.

    ``limit`` is how deep a draft may be in this step: near the end of the generation or of the model's positions it
    falls to 0. A cap on the number of nodes, should a drafter have one, is the drafter's own.
    """

    index: int
    tokens: list[int]
    prompt: int
    limit: int = 0
    done: bool = False

    @property
    def generated(self) -> int:
        """Tokens committed so far."""
        return len(self.tokens) - self.prompt


@dataclass
class Verified:
    """What the target said about the root and the nodes of one sample's draft (or about its prompt).

    ``tokens[0]`` is the root, ``tokens[i + 1]`` node ``i``; after the prefill they are the prompt. What the drafter did
    not ask for is ``None``. Methods that shorten the prompt inside the model leave fewer rows than tokens after the
    prefill; rows and tokens are aligned at their ends.

    Attributes:
        tokens: ``[n + 1]``.
        path: accepted nodes, from the root downwards.
        committed: tokens committed by this step: those of ``path`` and one of the target's own, unless cut short.
        logits: ``[n + 1, V]``, raw.
        hidden_states: per layer (embeddings first, as transformers orders them) ``[n + 1, D]``.
        prefill: whether the tokens are the prompt.
    """

    tokens: list[int]
    path: list[int]
    committed: list[int]
    logits: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    prefill: bool = False


@dataclass(frozen=True)
class Context:
    """What a drafter may know about the run.

    Attributes:
        model: the target.
        cache: the target's cache (to be read; self-speculation may extend it if it crops it back).
        sample: ``False`` = greedy.
        eos: ids that end a sample.
        max_length: total length, prompt included, at which generation ends.
    """

    model: Any
    cache: Any
    sample: bool
    eos: frozenset[int]
    max_length: int
    warper: Warper
    starts: tuple[int, ...]

    def scores(self, row: Row, drafted: Sequence[int], logits: torch.Tensor) -> torch.Tensor:
        """A drafter's ``logits [V]`` after ``row.tokens + drafted``, through the target's processors.

        Returns float32 ``[V]``; its softmax is the law to draw a draft token from.
        """
        if self.warper.plain:
            return logits.float()
        return self.warper.after(row.index, self.starts[row.index] + row.generated, drafted, logits)


class Drafter:
    """Proposes tokens. All methods have a default, so a drafter writes only what it uses.

    A drafter lives as long as its method is applied; ``start`` begins a new ``generate``. Batches: either write
    ``propose_row``, or ``propose`` for all rows at once.
    """

    needs: ClassVar[frozenset[Need]] = frozenset()
    """What ``observe`` wants to see of the target's forward passes: logits of drafts, of the prompt, hidden states."""
    tree: ClassVar[bool] = False
    """Whether drafts may be anything else than chains."""

    def start(self, context: Context, rows: Sequence[Row]) -> None:
        """A new generation begins; the prompts are in ``rows``, nothing is committed yet."""

    def propose(self, rows: Sequence[Row]) -> list[Draft]:
        """One draft for each of ``rows`` (those still running with a ``limit`` above 0)."""
        return [self.propose_row(row) for row in rows]

    def propose_row(self, row: Row) -> Draft:
        """A draft to follow ``row.tokens``; an empty one makes this a plain step."""
        return Draft()

    def observe(self, row: Row, verified: Verified) -> None:
        """Called after the prefill and after every step, when ``row.tokens`` already holds what was committed."""

    def stop(self) -> None:
        """The generation is over (also after an exception)."""

    def close(self) -> None:
        """The method is taken off the model."""


@dataclass(frozen=True)
class Step:
    """Tokens committed to one sample at once; the first ``accepted`` came from its draft of ``drafted`` nodes."""

    row: int
    tokens: tuple[int, ...]
    accepted: int
    drafted: int


class _Columns:
    """Which cache columns count for which sample (an attention mask that grows and is squeezed)."""

    def __init__(self, prompt: torch.Tensor) -> None:
        self.mask = prompt.to(torch.long)
        self.prompt = self.used = prompt.shape[1]

    def view(self, fresh: int) -> torch.Tensor:
        """Attention mask ``[batch, used + fresh]`` with all fresh columns open."""
        end = self.used + fresh
        if end > self.mask.shape[1]:
            room = self.mask.new_ones(len(self.mask), max(end, 64))
            self.mask = torch.cat((self.mask, room), dim=1)
        self.mask[:, self.used : end] = 1
        return self.mask[:, :end]

    def commit(self, kept: int, lengths: list[int]) -> None:
        """The first ``kept`` fresh columns stay; sample ``b`` uses the first ``lengths[b]`` of them."""
        fresh = self.view(kept)[:, self.used :]
        if any(length < kept for length in lengths):
            place = torch.arange(kept, device=fresh.device)
            fresh.copy_(place < torch.tensor(lengths, device=fresh.device).unsqueeze(1))
        self.used += kept

    def squeeze(self, cache: Any, most: int) -> None:
        """Move each sample's columns together once they are far more than the ``most`` that any sample needs."""
        width = self.used - self.prompt
        if width < 2 * most + 64:
            return
        tail = self.mask[:, self.prompt : self.used]
        keep = int(tail.sum(1).max())
        index = tail.argsort(dim=1, descending=True, stable=True)[:, :keep]
        keep_last(cache, width, index)
        self.mask[:, self.prompt : self.prompt + keep] = tail.gather(1, index)
        self.used = self.prompt + keep


class Speculation:
    """The loop, to be given to ``model.generate(custom_generate=...)``. Made anew for every call.

    Args:
        drafter: the drafter.
        name: method name, for messages.
        streamer: gets the prompt and then every token, as under plain ``generate``.
        on_step: called after every commit.
        synchronise: wait for the accelerator at both ends of every timed part, so that the split of the time is exact
            (and the whole a little slower).
    """

    def __init__(
        self,
        drafter: Drafter,
        name: str,
        *,
        streamer: Any = None,
        on_step: Callable[[Step], None] | None = None,
        synchronise: bool = False,
    ) -> None:
        self.drafter = drafter
        self.name = name
        self.streamer = streamer
        self.on_step = on_step
        self.synchronise = synchronise
        self.stats = DecodingStats()
        self.trace: list[Step] = []

    def __call__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        **model_kwargs: Any,
    ) -> Any:
        """Generate; the arguments are those transformers gives to its own decoding loops.

        Returns:
            Ids ``[batch, length]``, prompt included, padded on the right; a ``GenerateDecoderOnlyOutput`` when the
            config says ``return_dict_in_generate``.

        Raises:
            Refused: the generation config asks for something this loop cannot honour.
        """
        begun = perf_counter()
        cache = model_kwargs.get("past_key_values")
        self._refuse(model, input_ids, logits_processor, stopping_criteria, generation_config, cache)
        if synced_gpus:
            raise Refused(
                f"{self.name} runs each process on its own; sharded generation (synced_gpus) is not supported"
            )
        run = _Run(
            self, model, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs
        )
        try:
            if self.streamer is not None:
                self.streamer.put(input_ids.cpu())
            run.prefill()
            while not all(row.done for row in run.rows):
                run.step()
            if self.streamer is not None:
                self.streamer.end()
        finally:
            self.drafter.stop()
            self.stats.total_seconds = perf_counter() - begun
        ids = run.output(input_ids)
        if not generation_config.return_dict_in_generate:
            return ids
        from transformers.generation import GenerateDecoderOnlyOutput

        # The columns of a batch have gaps that a caller could not know of.
        return GenerateDecoderOnlyOutput(sequences=ids, past_key_values=cache if len(ids) == 1 else None)

    def _refuse(
        self, model: Any, input_ids: torch.Tensor, processors: Any, criteria: Any, config: Any, cache: Any
    ) -> None:
        """Raise ``Refused``, in one line, for what cannot be honoured exactly."""

        def say(what: str) -> Refused:
            return Refused(
                f"{self.name} decodes greedily or by sampling, one token sequence per sample; {what}"
            )

        if (config.num_beams or 1) > 1:
            raise say("set num_beams=1")
        if str(getattr(config.get_generation_mode(), "value", "")) not in ("greedy_search", "sample"):
            raise say(f"leave out what asks for {config.get_generation_mode().value}")
        if config.guidance_scale not in (None, 1, 1.0):
            raise say("leave out guidance_scale, which needs a second pass per token")
        if config.watermarking_config is not None:
            raise say("leave out watermarking_config, which keeps a state from token to token")
        if config.prefill_chunk_size is not None:
            raise say("leave out prefill_chunk_size")
        if config.return_dict_in_generate:
            for wanted in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
                if getattr(config, wanted):
                    raise say(f"leave out {wanted}: scores of rejected drafts are not collected")
        from transformers import DynamicCache

        if not isinstance(cache, DynamicCache) or getattr(cache, "offloading", False):
            raise say("it needs the default dynamic cache: leave out use_cache and cache_implementation")
        if cache.get_seq_length() > 0:
            raise say("pass the whole prompt without past_key_values")
        if any(cache.is_linear) or model.config.is_encoder_decoder:
            raise say("it needs a decoder whose layers all attend to a cache that can be cropped")
        sliding = any(cache.is_sliding)
        batch = len(input_ids)
        if batch > 1:
            if self.streamer is not None:
                raise say("a streamer shows one sample at a time: use batch size 1")
            if sliding:
                raise say("sliding-window layers cannot skip the columns of other samples: use batch size 1")
            for item in processors:
                if type(item).__name__.startswith(("PrefixConstrained", "Encoder")):
                    raise say(f"{type(item).__name__} looks at the place in the batch: use batch size 1")
        if self.drafter.tree:
            if sliding:
                raise say("a tree needs full attention, and this model has sliding-window layers")
            if batch > 1:
                raise say("a tree of drafts needs batch size 1")
            implementation = model.config.get_text_config(decoder=True)._attn_implementation or ""
            if implementation not in ("sdpa", "eager"):
                raise say(
                    f"a tree needs a 4-D mask, which attention '{implementation}' does not take; use sdpa"
                )


class _Run:
    """State of one generation."""

    def __init__(
        self,
        owner: Speculation,
        model: Any,
        input_ids: torch.Tensor,
        processors: Any,
        criteria: Any,
        config: Any,
        model_kwargs: dict[str, Any],
    ) -> None:
        from transformers.generation.stopping_criteria import MaxLengthCriteria

        self.owner = owner
        self.drafter = owner.drafter
        self.stats = owner.stats
        self.model = model
        self.sample = bool(config.do_sample)
        self.kwargs = model_kwargs
        self.cache = model_kwargs["past_key_values"]
        self.device = input_ids.device
        batch, width = input_ids.shape

        self.eos = frozenset(
            int(token)
            for item in criteria
            if hasattr(item, "eos_token_id")
            for token in torch.as_tensor(item.eos_token_id).reshape(-1).tolist()
        )
        self.max_length = min(
            [
                int(config.max_length),
                *(item.max_length for item in criteria if isinstance(item, MaxLengthCriteria)),
            ]
        )
        self.criteria = [
            item
            for item in criteria
            if not isinstance(item, MaxLengthCriteria) and not hasattr(item, "eos_token_id")
        ]
        pad = config.pad_token_id
        self.pad = int(pad) if pad is not None else min(self.eos, default=None)
        if isinstance(config.eos_token_id, (list, tuple)) and pad is None:
            self.pad = int(config.eos_token_id[0])
        if batch > 1 and self.criteria and self.pad is None:
            raise BadInput(
                f"{owner.name}: samples of a batch may stop at different lengths: give pad_token_id"
            )

        # Prompt columns as the language model counts them (with inputs_embeds there are no ids).
        mask = model_kwargs.get("attention_mask")
        embeds = model_kwargs.get("inputs_embeds")
        columns = embeds.shape[1] if embeds is not None and width == 0 else width
        self.columns: _Columns | None = None
        if mask is not None or batch > 1:
            self.columns = _Columns(mask if mask is not None else input_ids.new_ones(batch, columns))
        self.past = columns

        ids = torch.zeros(batch, max(self.max_length, width + 1), dtype=torch.long, device=self.device)
        ids[:, :width] = input_ids
        self.warper = Warper(processors, ids)
        self.width = width
        self.rows: list[Row] = []
        for index, tokens in enumerate(input_ids.tolist()):
            if mask is not None and mask.shape[1] == width:
                tokens = [token for token, valid in zip(tokens, mask[index].tolist(), strict=True) if valid]
            self.rows.append(Row(index, tokens, len(tokens)))

        positions = model_kwargs.get("position_ids")
        self.last_position: torch.Tensor | None = None if positions is None else positions[..., -1:]
        text = model.config.get_text_config(decoder=True)
        room = getattr(text, "max_position_embeddings", None)
        self.room: list[int] | None = None
        """Positions that the model still has behind the prompt, per sample; ``None`` = no limit is known."""
        if room and self.last_position is not None:
            latest = self.last_position.reshape(-1, self.last_position.shape[-2]).amax(0).expand(batch)
            self.room = [int(room) - 1 - int(position) for position in latest.tolist()]

    # --- forward passes ---------------------------------------------------------------------------------------

    def prefill(self) -> None:
        """Run the prompt, as ``generate`` does, and commit the first token."""
        start = self._clock()
        context = Context(
            self.model,
            self.cache,
            self.sample,
            self.eos,
            self.max_length,
            self.warper,
            (self.width,) * len(self.rows),
        )
        self.drafter.start(context, self.rows)
        self.stats.draft_seconds += (middle := self._clock()) - start

        kwargs = dict(self.kwargs)
        if "prompt-logits" in self.drafter.needs:
            kwargs.pop("logits_to_keep", None)
        if "hidden-states" in self.drafter.needs:
            kwargs["output_hidden_states"] = True
        ids = self.warper.ids[:, : self.width]
        inputs = self.model.prepare_inputs_for_generation(ids, is_first_iteration=True, **kwargs)
        outputs = self.model(**inputs, return_dict=True)
        # Layers with a sliding window must from now on keep what a crop may need.
        self.cache.activate_past_recording()
        self.stats.prefill_seconds += self._clock() - middle

        seen = []
        for row in self.rows:
            prompt = list(row.tokens)
            _, token = self._choose(row, Draft(), outputs.logits[row.index, -1:])
            self._commit(row, Draft(), [], token)
            seen.append((row, Verified(prompt, [], row.tokens[row.prompt :], prefill=True)))
        self._show(outputs, seen)

    def step(self) -> None:
        """Draft, verify in one forward pass, commit."""
        start = self._clock()
        drafts = self._drafts()
        middle = self._clock()
        self.stats.draft_seconds += middle - start
        width = 1 + max(len(draft.tokens) for draft in drafts)
        outputs = self.model(**self._inputs(drafts, width), return_dict=True)
        choices = self._greedy_choices(outputs.logits)
        self.stats.verify_seconds += self._clock() - middle

        seen: list[tuple[Row, Verified]] = []
        drafted = accepted = 0
        for row, draft in zip(self.rows, drafts, strict=True):
            if row.done:
                continue
            tokens = [row.tokens[-1], *draft.tokens]
            own = None if choices is None else choices[row.index]
            step, path = self._commit(row, draft, *self._choose(row, draft, outputs.logits[row.index], own))
            seen.append((row, Verified(tokens, path, list(step.tokens))))
            drafted += step.drafted
            accepted += step.accepted
        self._crop(drafts, seen, width)
        self.stats.steps += 1
        self.stats.drafted.append(drafted)
        self.stats.accepted.append(accepted)
        self.stats.committed.append(sum(len(verified.committed) for _, verified in seen))
        self._show(outputs, seen)

    def _drafts(self) -> list[Draft]:
        """A draft per sample, empty for those that are done or must not draft."""
        drafts = [Draft() for _ in self.rows]
        asked = []
        for row in self.rows:
            if row.done:
                continue
            # One place is always left for the target's own token.
            row.limit = self.max_length - self.width - row.generated - 1
            if self.room is not None:
                row.limit = min(row.limit, self.room[row.index] - row.generated)
            if row.limit > 0:
                asked.append(row)
        for row, draft in zip(asked, self.drafter.propose(asked) if asked else [], strict=True):
            if not self.drafter.tree and not draft.chain:
                raise ValueError(f"{type(self.drafter).__name__} drafts trees but does not declare it")
            drafts[row.index] = draft.within(row.limit)
        return drafts

    def _inputs(self, drafts: list[Draft], width: int) -> dict[str, Any]:
        """Arguments of the forward pass over ``[last committed token, draft]``."""
        fill = self.rows[0].tokens[-1]
        ids, offsets = [], []
        for row, draft in zip(self.rows, drafts, strict=True):
            rest = width - 1 - len(draft.tokens)
            ids.append([row.tokens[-1], *draft.tokens, *[fill] * rest])
            # The last committed token is the g-th generated one: its position is g behind the prompt's last.
            root = row.generated
            if draft.chain:
                offsets.append(list(range(root, root + width)))
            else:
                deep = draft.depths if draft.depths is not None else depths(draft.parents or [])
                offsets.append([root, *(root + depth for depth in deep)])
        inputs = dict(self.kwargs)
        for name in ("logits_to_keep", "inputs_embeds", "position_ids", "attention_mask"):
            inputs.pop(name, None)
        for name in ("token_type_ids", "mm_token_type_ids"):
            types = inputs.get(name)
            if types is not None:
                last = types[:, -1:] if name == "token_type_ids" else torch.zeros_like(types[:, -1:])
                inputs[name] = last.expand(-1, width)
        if self.last_position is not None:
            inputs["position_ids"] = self.last_position + torch.tensor(
                offsets, device=self.last_position.device
            )
        if "hidden-states" in self.drafter.needs:
            inputs["output_hidden_states"] = True

        tree = next((draft for draft in drafts if not draft.chain), None)
        if tree is not None:  # batch 1, see _refuse
            seen = tree.seen if tree.seen is not None else ancestors(tree.parents or [])
            columns: torch.Tensor | int = self.past
            if self.columns is not None:
                columns = self.columns.view(0)[0].bool()
            inputs["attention_mask"] = tree_mask(seen, columns, self.model.dtype, self.device)
        elif self.columns is not None:
            inputs["attention_mask"] = self.columns.view(width)
        ids_tensor = torch.tensor(ids, device=self.device)
        return self.model.prepare_inputs_for_generation(ids_tensor, is_first_iteration=False, **inputs)

    def _crop(self, drafts: list[Draft], seen: list[tuple[Row, Verified]], width: int) -> None:
        """Keep the root and the accepted nodes in every layer, drop the others.

        A step that commits ``c`` tokens leaves ``c`` entries: the root and all but the last of them, which is the
        next root.
        """
        lengths = {row.index: len(verified.committed) for row, verified in seen}
        kept = max(lengths.values())
        nodes = seen[0][1].path[: kept - 1]
        if not drafts[seen[0][0].index].chain and nodes != list(range(len(nodes))):
            keep_last(self.cache, width, torch.tensor([0, *(node + 1 for node in nodes)], device=self.device))
        else:
            # Also with nothing to remove: layers with a sliding window trim themselves here.
            self.cache.crop(kept - width)
        self.past += kept
        if self.columns is not None:
            self.columns.commit(kept, [lengths.get(row.index, 0) for row in self.rows])
            if len(self.rows) > 1:
                self.columns.squeeze(self.cache, max(row.generated for row in self.rows))

    # --- acceptance -------------------------------------------------------------------------------------------

    def _greedy_choices(self, logits: torch.Tensor) -> list[list[int]] | None:
        """The target's argmax at every place ``[batch, width]``; ``None`` when scores must be processed one by one."""
        if self.sample or not self.warper.plain:
            return None
        # In float32, as generate does: which of several equal maxima wins may depend on the type.
        return logits.float().argmax(-1).tolist()

    def _choose(
        self, row: Row, draft: Draft, logits: torch.Tensor, choices: list[int] | None = None
    ) -> tuple[list[int], int]:
        """Accepted nodes and the target's own next token, from ``logits [>= n + 1, V]``."""
        if choices is not None:
            if draft.chain:
                count = longest_match(draft.tokens, choices)
                return list(range(count)), choices[count]
            path = longest_path(draft.tokens, draft.parents or [], choices)
            return path, choices[path[-1] + 1 if path else 0]
        length = self.width + row.generated
        if self.sample and draft.chain:
            count = len(draft.tokens)
            p = self.warper.along(row.index, length, draft.tokens, logits[: count + 1]).softmax(-1)
            tokens = torch.tensor(draft.tokens, dtype=torch.long, device=p.device)
            laws = None if draft.laws is None else draft.laws.to(p.device)
            accepted, rest = accept_chain(p, tokens, torch.rand(count, device=p.device), laws)
            return list(range(int(accepted))), draw(rest)
        return self._walk(row, draft, logits, length)

    def _walk(self, row: Row, draft: Draft, logits: torch.Tensor, length: int) -> tuple[list[int], int]:
        """From the root downwards, scoring only the nodes on the way (trees when sampling; processed greedy scores)."""
        below = children(
            draft.parents if draft.parents is not None else list(range(-1, len(draft.tokens) - 1))
        )
        path: list[int] = []
        while True:
            node = path[-1] + 1 if path else 0
            options = below[node]
            tokens = [draft.tokens[option] for option in options]
            so_far = [draft.tokens[step] for step in path]
            scores = self.warper.after(row.index, length, so_far, logits[node])
            if not self.sample:
                token = int(scores.argmax(-1))
                # Of equal siblings the first is followed; which one makes no difference to the output.
                found = tokens.index(token) if token in tokens else None
            else:
                p = scores.softmax(-1)
                law = None if draft.laws is None or not options else draft.laws[options[0]].to(p.device)
                uniforms = torch.rand(len(options), device=p.device)
                found, p = accept_siblings(p, tokens, uniforms, law, replacement=draft.replacement)
                token = draw(p) if found is None else tokens[found]
            if found is None:
                return path, token
            path.append(options[found])

    def _commit(self, row: Row, draft: Draft, path: list[int], token: int) -> tuple[Step, list[int]]:
        """Append the accepted tokens and the target's own, up to where generation ends; also the path that stayed."""
        tokens = [*(draft.tokens[node] for node in path), token]
        del tokens[self.max_length - self.width - row.generated :]
        for place, item in enumerate(tokens):
            if item in self.eos:
                del tokens[place + 1 :]
                row.done = True
                break
        start = self.width + row.generated
        if self.warper.contextual or self.criteria:
            self.warper.write(row.index, start, tokens)
        if self.criteria:
            ids = self.warper.ids[row.index : row.index + 1]
            for place in range(len(tokens)):
                if any(bool(item(ids[:, : start + place + 1], None).any()) for item in self.criteria):
                    del tokens[place + 1 :]
                    row.done = True
                    break
        row.tokens.extend(tokens)
        if row.generated >= self.max_length - self.width:
            row.done = True
        path = path[: len(tokens)]
        step = Step(row.index, tuple(tokens), len(path), len(draft.tokens))
        self.owner.trace.append(step)
        if self.owner.streamer is not None:
            for item in tokens:
                self.owner.streamer.put(torch.tensor([item]))
        if self.owner.on_step is not None:
            self.owner.on_step(step)
        return step, path

    # --- the rest ---------------------------------------------------------------------------------------------

    def _show(self, outputs: Any, seen: list[tuple[Row, Verified]]) -> None:
        """Let the drafter observe what it asked for."""
        start = self._clock()
        needs = self.drafter.needs
        for row, verified in seen:
            count = len(verified.tokens)
            # A prompt ends with the sequence (padding is on the left); a draft begins with it (padding on the right).
            part = slice(-count, None) if verified.prefill else slice(0, count)
            if ("prompt-logits" if verified.prefill else "logits") in needs:
                verified.logits = outputs.logits[row.index, part]
            if "hidden-states" in needs:
                verified.hidden_states = tuple(states[row.index, part] for states in outputs.hidden_states)
            self.drafter.observe(row, verified)
        self.stats.draft_seconds += self._clock() - start

    def output(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Ids ``[batch, length]``: the prompt as it was given, then what was generated, padded on the right."""
        new = [row.tokens[row.prompt :] for row in self.rows]
        longest = max(map(len, new))
        filled = [tokens + [self.pad or 0] * (longest - len(tokens)) for tokens in new]
        return torch.cat((input_ids, torch.tensor(filled, dtype=input_ids.dtype, device=self.device)), dim=1)

    def _clock(self) -> float:
        if self.owner.synchronise and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return perf_counter()
