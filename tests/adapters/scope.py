from golden_cases import Case, golden

from zoo.methods.visual_tokens.scope import Scope


@golden("scope", "features", "saliency", "k", "alpha", "mode", "order", "kept_sorted")
def selection(case: Case) -> None:
    method = Scope(keep_tokens=case.item("k"), alpha=case.item("alpha"), combination=case.item("mode"))
    features = case.tensor("features")
    order = method.order(features, case.tensor("saliency"), method.count(len(features)))
    assert order.tolist() == case.tensor("order").tolist()
    assert order.sort().values.tolist() == case.tensor("kept_sorted").tolist()
