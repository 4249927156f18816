from itertools import groupby

import torch
from golden_cases import Case, golden

from zoo.engines.reductions import Merge
from zoo.engines.stretches import contiguous
from zoo.methods.visual_tokens.prunevid import PruneVid


@golden(
    "prunevid", "features", "tau", "temporal_segment_ratio", "cluster_ratio", "knn_k", "merged", "kept_sorted"
)
def both_stages(case: Case) -> None:
    method = PruneVid(
        static_threshold=case.item("tau"),
        segment_ratio=case.item("temporal_segment_ratio"),
        cluster_ratio=case.item("cluster_ratio"),
        neighbours=case.item("knn_k"),
        inside_ratio=case.item("alpha"),
    )
    x = case.tensor("features")
    raw = method.frame_clusters(x)
    assert raw == case.tensor("raw_frame_clusters").tolist()
    refined = contiguous(raw)
    assert refined == case.tensor("refined_frame_clusters").tolist()
    plan = method.plan(x)
    assert list(plan.windows) == case.tensor("window_sizes").tolist()
    assert list(plan.windows) == [len(list(run)) for _, run in groupby(refined)]
    assert [static for static, _ in plan.sizes] == case.tensor("static_sizes").tolist()
    assert [dynamic for _, dynamic in plan.sizes] == case.tensor("dynamic_sizes").tolist()
    flat = x.flatten(0, 1).unsqueeze(0)
    merge = Merge(plan.assignment.unsqueeze(0), torch.ones(flat.shape[:2]), plan.first.unsqueeze(0))
    torch.testing.assert_close(merge.apply(flat)[0], case.tensor("merged"), rtol=1e-5, atol=1e-5)
    scores = case.tensor("text_to_video_attention").amax((0, 1))
    assert method.survivors(scores, plan.group).tolist() == case.tensor("kept_sorted").tolist()
