"""Tokenised text that drafts are retrieved from, with the suffix array to search it; on disk as safetensors.

A store belongs to one tokenizer. It is built once per text and tokenizer and kept in the zoo's cache folder, or saved
wherever the user wants it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from zoo.engines.suffixes import SuffixArray
from zoo.errors import BadInput

SUFFIX = ".safetensors"
_FORMAT = "efficiency-zoo datastore 1"


@dataclass(frozen=True)
class Datastore:
    """A searchable corpus.

    Attributes:
        array: tokens ``[N]`` (uint16 where the vocabulary allows it, else int32) and their suffix array.
        tokenizer: digest of the vocabulary that the tokens belong to.
        texts: number of texts that were put together.
    """

    array: SuffixArray
    tokenizer: str
    texts: int

    @property
    def megabytes(self) -> float:
        """Size on disk and in memory."""
        return (self.array.tokens.nbytes + self.array.order.nbytes) / 1e6

    @classmethod
    def build(cls, texts: Sequence[str], tokenizer: Any, depth: int) -> Datastore:
        """Tokenise ``texts``, put them one behind the other, and sort.

        Args:
            texts: one or more, not all empty.
            tokenizer: of the model that will be helped.
            depth: longest phrase that will be looked for.

        Raises:
            BadInput: no text.
        """
        batches = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        tokens = [token for ids in batches for token in ids]
        if not tokens:
            raise BadInput("a datastore needs some text, and there is none")
        kind = np.uint16 if len(tokenizer) <= 1 << 16 else np.int32
        array = SuffixArray.build(np.array(tokens, dtype=kind), depth)
        return cls(array, vocabulary_digest(tokenizer), len(texts))

    def save(self, file: Path) -> None:
        """Write to ``file``; it appears complete or not at all."""
        from safetensors.numpy import save_file

        metadata = {
            "format": _FORMAT,
            "tokenizer": self.tokenizer,
            "depth": str(self.array.depth),
            "texts": str(self.texts),
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(file.name + ".partial")
        save_file({"tokens": self.array.tokens, "order": self.array.order}, partial, metadata)
        partial.replace(file)

    @classmethod
    def load(cls, file: Path) -> Datastore:
        """Read what ``save`` wrote.

        Raises:
            BadInput: no such file, or it is not a datastore.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, framework="np") as stored:
                facts = stored.metadata() or {}
                if facts.get("format") != _FORMAT:
                    raise BadInput(f"{file} holds no datastore; give a text file to build one from")
                tokens, order = stored.get_tensor("tokens"), stored.get_tensor("order")
        except (OSError, SafetensorError) as error:
            raise BadInput(f"{file} cannot be read as a datastore: {error}") from None
        return cls(SuffixArray(tokens, order, int(facts["depth"])), facts["tokenizer"], int(facts["texts"]))


def vocabulary_digest(tokenizer: Any) -> str:
    """Which token has which number, as a short digest."""
    return _digest([json.dumps(sorted(tokenizer.get_vocab().items()))])


def _digest(parts: Iterable[str]) -> str:
    whole = hashlib.sha256()
    for part in parts:
        whole.update(part.encode("utf-8", "surrogatepass"))
        whole.update(b"\0")
    return whole.hexdigest()[:16]


def open_datastore(ref: str, tokenizer: Any, depth: int) -> Datastore:
    """A datastore from a built file, or from text: then it is built once and kept.

    Args:
        ref: a ``.safetensors`` file that ``Datastore.save`` wrote, or texts: a packaged name or a file (see
            ``zoo.data.load_texts``). Of packaged texts the calibration part is taken, so that the held-out part stays
            unseen.
        tokenizer: of the model.
        depth: longest phrase that will be looked for.

    Raises:
        BadInput: no such file or texts; a store of another tokenizer, or for shorter phrases only.
    """
    from zoo.data import TEXTS, load_texts
    from zoo.models.packages import home

    if not ref.endswith(SUFFIX):
        texts = load_texts(ref, "calibration" if ref in TEXTS else None)
        key = _digest([_FORMAT, vocabulary_digest(tokenizer), str(depth), *texts])
        file = home() / "datastores" / f"{key}{SUFFIX}"
        if file.is_file():
            return Datastore.load(file)
        store = Datastore.build(texts, tokenizer, depth)
        with suppress(OSError):  # a cache that cannot be written costs a second the next time, nothing else
            store.save(file)
        return store
    store = Datastore.load(Path(ref).expanduser())
    if store.tokenizer != vocabulary_digest(tokenizer):
        raise BadInput(f"{ref} was built with another tokenizer; build it anew for this model")
    if store.array.depth < depth:
        raise BadInput(
            f"{ref} is sorted for phrases of at most {store.array.depth} tokens; lower max_match, or build it anew"
        )
    return store
