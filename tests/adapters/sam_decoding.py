from __future__ import annotations

from golden_cases import Case, golden

from zoo.methods.decoding.sam_decoding import NOTHING, OwnText, corpus_automaton


@golden("sam-decoding", "tokens", "n_predicts", "dyn_match_len", "dyn_draft", "corpus", "static_draft")
def drafts(case: Case) -> None:
    count = case.item("n_predicts")
    corpus = corpus_automaton(
        [[token for token in row if token >= 0] for row in case.tensor("corpus").tolist()], case.item("eos")
    )
    own, cursor = OwnText(), NOTHING

    def whole(token: int, draft: list[int]) -> list[int]:
        """The official code draws the root first and fills up with zeros."""
        return [token, *draft, *[0] * (count - 1 - len(draft))]

    for place, token in enumerate(case.tensor("tokens").tolist()):
        match = own.lookup(token)
        assert match[1] == case.tensor("dyn_match_len")[place]
        if "dyn_match_len_bruteforce" in case:
            assert match[1] == case.tensor("dyn_match_len_bruteforce")[place]
        assert whole(token, own.draft(match, count)) == case.tensor("dyn_draft")[place].tolist()
        own.extend([token])
        assert len(own.automaton.link) == case.tensor("dyn_num_states")[place]

        cursor = corpus.follow(cursor, token)
        assert cursor[1] == case.tensor("static_match_len")[place]
        draft = corpus.behind(cursor[0], count - 1)
        assert whole(token, draft) == case.tensor("static_draft")[place].tolist()
