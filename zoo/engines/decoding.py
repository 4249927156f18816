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

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any

import numpy as np
import torch

from zoo.engines.drafting import Context, Draft, Drafter, Row, Verified
from zoo.engines.sampling import Warper, accept_chain, accept_siblings, draw, longest_match
from zoo.engines.trees import ancestors, children, depths, keep_last, longest_path, tree_mask
from zoo.errors import BadInput, Refused
from zoo.report import DecodingStats


@dataclass(frozen=True)
class Step:
    """Tokens committed to one sample at once; the first ``accepted`` came from its draft of ``drafted`` nodes.

    ``draft`` is what was verified behind the token ``root``, and ``path`` which of its nodes stayed.
    """

    row: int
    tokens: tuple[int, ...]
    accepted: int
    drafted: int
    root: int | None = field(default=None, compare=False)
    draft: Draft = field(default_factory=Draft, compare=False, repr=False)
    path: tuple[int, ...] = field(default=(), compare=False)


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
        self._refuse(model, len(input_ids), logits_processor, generation_config, cache)
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

    def _refuse(self, model: Any, batch: int, processors: Any, config: Any, cache: Any) -> None:
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
        first = config.eos_token_id[0] if isinstance(config.eos_token_id, list) else config.eos_token_id
        self.pad: int | None = first if config.pad_token_id is None else config.pad_token_id
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
            lambda: None if self.columns is None else self.columns.view(0),
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
            seen.append((row, Verified(tokens, path, list(step.tokens), draft=draft)))
            drafted += step.drafted
            accepted += step.accepted
        self._crop(seen, width)
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
                # Filling stays at the root's position: behind the draft there may be no position left.
                offsets.append([*range(root, root + width - rest), *[root] * rest])
            else:
                deep = draft.depths if draft.depths is not None else depths(draft.parents or [])
                offsets.append([root, *(root + depth for depth in deep), *[root] * rest])
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

        if not all(draft.chain for draft in drafts):
            inputs["attention_mask"] = self._tree_masks(drafts, width)
        elif self.columns is not None:
            inputs["attention_mask"] = self.columns.view(width)
        ids_tensor = torch.tensor(ids, device=self.device)
        return self.model.prepare_inputs_for_generation(ids_tensor, is_first_iteration=False, **inputs)

    def _tree_masks(self, drafts: list[Draft], width: int) -> torch.Tensor:
        """Additive mask ``[batch, 1, width, past + width]`` of root and draft of every sample."""
        masks = []
        for index, draft in enumerate(drafts):
            own = draft.seen
            if own is None:
                parents = draft.parents if draft.parents is not None else range(-1, len(draft.tokens) - 1)
                own = ancestors(parents)
            # Filling behind a draft looks at itself and the cache; nobody looks at it.
            seen = np.eye(width, dtype=bool)
            seen[: len(own), : len(own)] = own
            columns = self.past if self.columns is None else self.columns.view(0)[index].bool()
            masks.append(tree_mask(seen, columns, self.model.dtype, self.device))
        return torch.cat(masks)

    def _crop(self, seen: list[tuple[Row, Verified]], width: int) -> None:
        """Keep the root and the accepted nodes in every layer, drop the others.

        A step that commits ``c`` tokens leaves ``c`` entries: the root and all but the last of them, which is the
        next root. Samples that commit fewer than the others keep more columns than they need; those are masked.
        """
        lengths = {row.index: len(verified.committed) for row, verified in seen}
        kept = max(lengths.values())
        stay = [list(range(kept)) for _ in self.rows]
        for row, verified in seen:
            nodes = verified.path[: lengths[row.index] - 1]
            stay[row.index][1 : 1 + len(nodes)] = [node + 1 for node in nodes]
        if any(row != list(range(kept)) for row in stay):
            keep_last(self.cache, width, torch.tensor(stay, device=self.device))
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
        if self.sample and self.drafter.rule is not None:
            count = len(draft.tokens)
            parents = draft.parents if draft.parents is not None else range(-1, count - 1)
            scores = self.warper.throughout(row.index, length, draft.tokens, parents, logits[: count + 1])
            return self.drafter.rule(draft, scores.softmax(-1))
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
        root = row.tokens[-1] if row.tokens else None
        row.tokens.extend(tokens)
        if row.generated >= self.max_length - self.width:
            row.done = True
        path = path[: len(tokens)]
        shown = draft if draft.laws is None else replace(draft, laws=None)  # these are large
        step = Step(row.index, tuple(tokens), len(path), len(draft.tokens), root, shown, tuple(path))
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
