from golden_cases import Case, golden
from torch.testing import assert_close

from zoo.engines.key_eviction import entries_of
from zoo.methods.cache.spatten import SpAtten, logit_importance


@golden("spatten", "start_size", "recent_size", "important_size", "num_coming", "k0", "v0", "attn_logits0")
def cache_of_a_chat(case: Case) -> None:
    start, important, recent = (case.item(f"{name}_size") for name in ("start", "important", "recent"))
    method = SpAtten(mode="kv", start=start, important=important, recent=recent)
    layer = 0
    while f"k{layer}" in case:
        logits = case.tensor(f"attn_logits{layer}")
        assert_close(logit_importance(logits), case.tensor(f"score{layer}"), rtol=1e-5, atol=1e-4)
        kept = method.entries(logits, case.item("num_coming"))
        for name in ("k", "v"):
            held = case.tensor(f"{name}{layer}")
            found = held if kept is None else entries_of(held, kept)
            assert_close(found, case.tensor(f"out_{name}{layer}"), rtol=0, atol=0)
        layer += 1
