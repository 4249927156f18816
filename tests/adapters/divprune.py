from golden_cases import Case, golden

from zoo.methods.visual_tokens.divprune import DivPrune


@golden("divprune", "x", "ratio", "k", "order", "kept_sorted")
def selection(case: Case) -> None:
    method = DivPrune(keep_ratio=case.item("ratio"))
    x = case.tensor("x")
    assert method.count(len(x)) == case.item("k")
    order = method.order(x)
    assert order.tolist() == case.tensor("order").tolist()
    assert order.sort().values.tolist() == case.tensor("kept_sorted").tolist()
