from __future__ import annotations

from golden_cases import Case, golden

from zoo.engines.trees import ancestors, children, depths
from zoo.methods.decoding._draft_and_verify import AdaptiveThreshold
from zoo.methods.decoding._swift import SAMPLING_WIDTHS, SIBLINGS, WIDTHS, confident_tree


def swift_trees(case: Case) -> None:
    confidences = case.tensor("top1_probs").tolist()
    for name, widths in (("greedy", WIDTHS), ("sample", SAMPLING_WIDTHS)):
        parents, ranks = confident_tree(confidences, widths)
        deep = depths(parents)
        paths: list[list[int]] = []
        nodes: list[list[int]] = []
        for node, (parent, rank) in enumerate(zip(parents, ranks, strict=True)):
            above, through = ([], [0]) if parent < 0 else (paths[parent], nodes[parent])
            paths.append([*above, rank])
            nodes.append([*through, node + 1])
        padded = [path + [-1] * (len(confidences) - len(path)) for path in paths]
        assert padded == case.tensor(f"{name}_choices").tolist()
        assert ancestors(parents).astype(int).tolist() == case.tensor(f"{name}_attn_mask").int().tolist()
        assert [0, *deep] == case.tensor(f"{name}_position_ids").tolist()
        # The official code finds a node's token among the root and all siblings of all depths.
        places = [SIBLINGS * (depth - 1) + rank + 1 for depth, rank in zip(deep, ranks, strict=True)]
        assert [0, *places] == case.tensor(f"{name}_tree_indices").tolist()
        below = children(parents)
        leaves = [nodes[node] for node in range(len(parents)) if not below[node + 1]]
        rows = case.tensor(f"{name}_retrieve_indices").tolist()
        assert sorted(leaves) == sorted([node for node in row if node >= 0] for row in rows)


def adaptive_threshold(case: Case) -> None:
    adaptation = [float(str(value)) for value in case.arrays["dv_auto_parameters"]]
    adaptive = AdaptiveThreshold(case.item("dv_init_threshold"), case.item("dv_max_step_draft"), adaptation)
    steps = zip(
        *(
            case.tensor(f"dv_{name}").tolist()
            for name in ("drafted", "matched", "threshold_f64", "matchness_f64")
        ),
        strict=True,
    )
    for drafted, matched, threshold, match_rate in steps:
        adaptive.update(drafted, matched)
        assert abs(adaptive.threshold - threshold) < 1e-9
        assert abs(adaptive.match_rate - match_rate) < 1e-9


@golden("layer-skip-self-speculation", "top1_probs", "greedy_choices", "sample_choices", "dv_drafted")
def both(case: Case) -> None:
    swift_trees(case)
    adaptive_threshold(case)
