import torch
from golden_cases import Case, golden

from zoo.methods.visual_tokens.g_prune import GPrune, graph_flow


@golden(
    "g-prune",
    "features",
    "n_base",
    "rows",
    "cols",
    "similarity",
    "keep_ratio",
    "temperature",
    "iterations",
    "score_base",
    "score_crop",
    "degree_base",
    "degree_crop",
    "kept",
)
def selection(case: Case) -> None:
    features = case.tensor("features")
    base, rows, cols = (case.item(name) for name in ("n_base", "rows", "cols"))
    options = {name: case.item(name) for name in ("similarity", "temperature", "iterations")}
    method = GPrune(keep_ratio=case.item("keep_ratio"), **options)
    # Behind the base picture stand the rows of the crop grid, each with its newline token.
    grid = torch.arange(base, base + rows * (cols + 1)).view(rows, cols + 1)
    graphs = {"base": torch.arange(base), "crop": grid[:, :-1].flatten()}
    kept = [grid[:, -1]]
    counts = method.counts([len(graph) for graph in graphs.values()])
    for (name, graph), count in zip(graphs.items(), counts, strict=True):
        score, degree = graph_flow(features[graph], **options)
        torch.testing.assert_close(score, case.tensor(f"score_{name}"), rtol=1e-3, atol=1e-6)
        assert degree.tolist() == case.tensor(f"degree_{name}").tolist()
        kept.append(graph[method.order(features[graph], count)])
    assert torch.cat(kept).sort().values.tolist() == case.tensor("kept").tolist()
