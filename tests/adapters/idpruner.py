from golden_cases import Case, golden

from zoo.methods.visual_tokens.idpruner import IDPruner


@golden(
    "idpruner", "features", "raw_scores", "ratio_dropped", "mmr_lambda", "parallel_k", "keep_mask", "num_keep"
)
def selection(case: Case) -> None:
    method = IDPruner(
        keep_ratio=1 - case.item("ratio_dropped"),
        mmr_lambda=case.item("mmr_lambda"),
        parallel_k=case.item("parallel_k"),
    )
    features = case.tensor("features")
    assert method.count(len(features)) == case.item("num_keep")
    order = method.order(features, case.tensor("raw_scores"))
    assert order.sort().values.tolist() == case.tensor("keep_mask").nonzero().squeeze(-1).tolist()
