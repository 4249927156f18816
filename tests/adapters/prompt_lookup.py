from __future__ import annotations

from golden_cases import Case, golden

from zoo.engines.ngrams import NgramIndex
from zoo.methods.decoding.prompt_lookup import lookup


@golden("prompt-lookup", "sequences", "params", "official", "official_len", "hf", "hf_len")
def draft(case: Case) -> None:
    eos = {case.item("hf_eos")} if "hf_eos" in case else set()
    offset = case.item("hf_max_length_offset") if "hf_max_length_offset" in case else None
    for row, (length, _, max_ngram, count) in enumerate(case.tensor("params").tolist()):
        index = NgramIndex(range(1, max_ngram + 1))
        index.extend(case.tensor("sequences")[row, :length].tolist())
        official, _ = lookup(index, count, "official")
        assert official == case.tensor("official")[row, : case.tensor("official_len")[row]].tolist(), row
        limit = None if offset is None else length + offset
        lenient, _ = lookup(index, count, "transformers", eos, limit)
        assert lenient == case.tensor("hf")[row, : case.tensor("hf_len")[row]].tolist(), row
