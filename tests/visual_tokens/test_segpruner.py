"""SeGPruner against loops over pixels and picks; scenes from files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from reference import load, picture

import zoo
from zoo.errors import BadInput
from zoo.methods.visual_tokens.segpruner import SeGPruner, patch_centres

SIDE, GRID = 50, 6  # the tiny encoder has 6 x 6 patches; two pixels on the right and below belong to none


def geometry(views: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    rotation = np.linalg.qr(rng.normal(size=(views, 3, 3)))[0]
    pose = np.tile(np.eye(4), (views, 1, 1))
    pose[:, :3, :3], pose[:, :3, 3] = rotation, rng.normal(size=(views, 3))
    return {
        "depths": rng.uniform(0.5, 4, (views, SIDE, SIDE)).astype(np.float32),
        "cam2world": pose.astype(np.float32),
        "intrinsic": np.array([[40, 0, 24], [0, 41, 25], [0, 0, 1]], dtype=np.float32),
    }


def plain_centres(depth: np.ndarray, pose: np.ndarray, intrinsic: np.ndarray, patch: int) -> np.ndarray:
    rows, columns = depth.shape[0] // patch, depth.shape[1] // patch
    found = np.zeros((rows * columns, 3))
    for row in range(rows * patch):
        for column in range(columns * patch):
            z = depth[row, column]
            x = (column - intrinsic[0, 2]) / intrinsic[0, 0] * z
            y = (row - intrinsic[1, 2]) / intrinsic[1, 1] * z
            world = pose @ np.array([x, y, z, 1.0])
            found[row // patch * columns + column // patch] += world[:3] / patch**2
    return found


def plain_order(
    features: torch.Tensor,
    attention: torch.Tensor,
    centres: torch.Tensor,
    count: int,
    share: float,
    weight: float,
) -> list[int]:
    ranked = sorted(range(len(features)), key=lambda i: -float(attention[i]))
    important = ranked[: int(count * share)]
    if len(important) == count:
        return important
    rest = ranked[int(count * share) :]
    unit = features / features.norm(dim=-1, keepdim=True)
    picks = [rest[0]]
    reach = max(float((centres[j] - centres[rest[0]]).norm()) for j in rest)

    def distance(i: int, j: int) -> float:
        gap = float((centres[i] - centres[j]).norm())
        return weight * gap / reach + (1 - weight) * (1 - float(unit[i] @ unit[j]))

    while len(picks) < count - len(important):
        left = [j for j in rest if j not in picks]
        picks.append(max(left, key=lambda j: min(distance(i, j) for i in picks)))
    return important + picks


def test_patch_centres_equal_a_loop_over_pixels() -> None:
    scene = geometry(2)
    found = patch_centres(
        *(torch.from_numpy(scene[name]) for name in ("depths", "cam2world", "intrinsic")), 8
    )
    for view in range(2):
        expected = plain_centres(scene["depths"][view], scene["cam2world"][view], scene["intrinsic"], 8)
        np.testing.assert_allclose(found[view].numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_the_order_equals_a_loop_over_picks(share: float) -> None:
    generator = torch.Generator().manual_seed(4)
    features, attention = torch.randn(30, 8, generator=generator), torch.rand(30, generator=generator)
    centres = torch.randn(30, 3, generator=generator)
    method = SeGPruner(keep_tokens=11, important_ratio=share, geometry_weight=0.3)
    assert method.order(features, attention, centres).tolist() == plain_order(
        features, attention, centres, 11, share, 0.3
    )


def test_far_patches_are_kept_where_features_say_nothing() -> None:
    """Forty patches on a wall, four objects elsewhere in the room, all of one colour."""
    generator = torch.Generator().manual_seed(5)
    centres = 0.01 * torch.randn(44, 3, generator=generator)
    objects = torch.tensor([7, 20, 31, 40])
    centres[objects] += torch.tensor([[3.0, 0, 0], [0, 3, 0], [0, 0, 3], [-3, 0, 0]])
    attention = torch.rand(44, generator=generator)
    attention[objects] = 0
    kept = SeGPruner(keep_tokens=5).order(torch.ones(44, 8), attention, centres)
    assert set(objects.tolist()) < set(kept.tolist())


def test_a_view_without_depth_falls_back_on_features() -> None:
    features = torch.randn(12, 8, generator=torch.Generator().manual_seed(6))
    attention = torch.arange(12.0)
    method = SeGPruner(keep_tokens=5)
    assert torch.equal(
        method.order(features, attention, torch.zeros(12, 3)), method.order(features, attention, None)
    )


def test_a_scene_changes_what_views_keep(tmp_path: Path) -> None:
    path = tmp_path / "scene.npz"
    np.savez(path, **geometry(2))
    loaded = load("tiny-llava")
    data = loaded.processor(
        images=[picture(0), picture(1)], text=["<image><image>\nwhere?"], return_tensors="pt"
    )
    kept = []
    for scene in (path, None):
        with torch.no_grad(), zoo.method("segpruner", keep_tokens=9, scene=scene).apply(loaded) as applied:
            applied(**data)
            kept.append(applied.kept[-1][0])
            assert applied.report.kept == 18
    places = (data["input_ids"][0] == loaded.anatomy.image_token_id).nonzero().squeeze(-1)
    assert all(int((k <= places[GRID**2 - 1]).sum()) == 9 for k in kept)
    assert kept[0].tolist() == sorted(kept[0].tolist()) != kept[1].tolist()


def test_bad_scenes_are_one_line(tmp_path: Path) -> None:
    loaded = load("tiny-llava")
    data = loaded.processor(images=[picture(0)], text=["<image>\nwhere?"], return_tensors="pt")
    bad = {name: tmp_path / f"{name}.npz" for name in ("corrupt", "lacking", "shape", "views", "small")}
    bad["corrupt"].write_bytes(b"PK\x03\x04 nothing")
    np.savez(bad["lacking"], depths=np.zeros((1, 4, 4)))
    np.savez(bad["shape"], **{**geometry(1), "intrinsic": np.eye(4)})
    for name in ("corrupt", "lacking", "shape"):
        with pytest.raises(BadInput, match="needed") as caught:
            zoo.method("segpruner", scene=bad[name]).apply(loaded)
        assert "\n" not in str(caught.value)
    with pytest.raises(BadInput, match="no scene"):
        zoo.method("segpruner", scene=tmp_path / "absent.npz").apply(loaded)
    np.savez(bad["views"], **geometry(3))
    np.savez(bad["small"], **{**geometry(1), "depths": np.ones((1, 4, 4))})
    for name, message in (("views", "one picture per view"), ("small", "do not fit")):
        method = zoo.method("segpruner", scene=bad[name])
        with method.apply(loaded) as applied, pytest.raises(BadInput, match=message):
            applied(**data)
