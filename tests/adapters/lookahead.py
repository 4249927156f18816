from __future__ import annotations

import torch
from golden_cases import Case, golden

from zoo.methods.decoding._lookahead_window import NgramPool, Window, layout


def same_layout(case: Case, prefix: str, sizes: list[int], guesses: int) -> None:
    past, last = case.item("past"), case.item("last_pos")
    length = case.item("N") - 1
    chains = [-1 if place % length == 0 else place - 1 for place in range(guesses * length)]
    seen, places = layout(sizes, chains)
    allow = torch.cat((torch.ones(len(seen), past, dtype=torch.bool), torch.from_numpy(seen)), dim=1)
    assert torch.equal(allow, case.tensor(f"{prefix}allow"))
    assert [last, *(last + place for place in places)] == case.tensor(f"{prefix}position_ids").tolist()


def rows_of(pool: NgramPool, tokens: set[int]) -> list[list[int]]:
    return [[token, rank, *ngram] for token in sorted(tokens) for rank, ngram in enumerate(pool.after(token))]


@golden("lookahead", "N", "W", "allow", "level_sizes", "pool_after_prompt", "window_init", "new_results")
def everything(case: Case) -> None:
    levels, width = case.item("N") - 1, case.item("W")
    sizes = case.tensor("level_sizes").tolist()
    same_layout(case, "", sizes, case.item("n_guess"))

    # The window fills up level by level.
    filling = Window(levels, range(width + levels - 2))
    while len(filling.levels) < levels:
        assert not filling.ngrams(0, filling.levels[-1])
        filling.advance(filling.levels[-1])
        warm = len(filling.levels) - 1
        if f"warm{warm}_sizes" in case:
            assert filling.sizes == case.tensor(f"warm{warm}_sizes").tolist()
            rows = len(case.arrays[f"warm{warm}_allow"])
            same_layout(case, f"warm{warm}_", filling.sizes, (rows - 1 - sum(filling.sizes)) // levels)
    assert filling.sizes == sizes

    prompt = case.tensor("prompt").tolist()
    pool = NgramPool(case.item("pool_cap"))
    pool.add_text(prompt, levels)
    tokens = set(prompt)
    assert rows_of(pool, tokens) == case.tensor("pool_after_prompt").tolist()

    window = Window(levels, [])
    window.levels = [level.tolist() for level in case.tensor("window_init").split(sizes)]
    for step, new in enumerate(case.tensor("new_results").tolist()):
        for token, continuation in window.ngrams(int(case.tensor("last_tokens")[step]), new):
            pool.add(token, continuation)
            tokens.add(token)
        window.advance(new)
        assert window.tokens == case.tensor("window_after")[step].tolist()
        if step == 0:
            assert rows_of(pool, tokens) == case.tensor("pool_after_step1").tolist()
    assert rows_of(pool, tokens) == case.tensor("pool_final").tolist()
