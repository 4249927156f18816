"""The probe against ridge regressions that are solved one by one."""

from __future__ import annotations

import torch

from zoo.image_data import LabelledImages
from zoo.models import LoadedModel
from zoo.models.tiny import tiny_model
from zoo.reference.probe import STRENGTHS, Probe, batches, features


def problem() -> tuple[torch.Tensor, torch.Tensor]:
    """Features that tell three classes apart, but not well."""
    random = torch.Generator().manual_seed(3)
    labels = torch.arange(3).repeat(10)
    centres = torch.randn(3, 6, generator=random, dtype=torch.float64)
    x = 3 + 2 * (centres[labels] + torch.randn(30, 6, generator=random, dtype=torch.float64))
    return x, labels


def solved(x: torch.Tensor, labels: torch.Tensor, strength: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and offset by the normal equations; the offset is not shrunk."""
    y = torch.eye(3, dtype=torch.float64)[labels]
    centred = x - x.mean(0)
    eye = torch.eye(x.shape[1], dtype=torch.float64)
    weight = torch.linalg.solve(centred.T @ centred + strength * eye, centred.T @ (y - y.mean(0)))
    return weight, y.mean(0) - x.mean(0) @ weight


def test_the_fit_is_ridge_regression_of_the_best_left_out_strength() -> None:
    x, labels = problem()
    probe = Probe.fit(x, labels)
    standard = (x - x.mean(0)) / x.std(0)
    weight, offset = solved(standard, labels, probe.strength)
    torch.testing.assert_close(probe.weight, weight)
    torch.testing.assert_close(probe.offset, offset)

    def left_out(strength: float) -> float:
        right = 0
        for place in range(len(x)):
            others = torch.arange(len(x)) != place
            weight, offset = solved(standard[others], labels[others], strength)
            right += int((standard[place] @ weight + offset).argmax() == labels[place])
        return right / len(x)

    found = {strength: left_out(strength) for strength in STRENGTHS}
    assert found[probe.strength] == max(found.values()) == probe.left_out
    assert len(set(found.values())) > 1


def test_one_linear_layer_gives_the_same_scores() -> None:
    x, labels = problem()
    probe = Probe.fit(x, labels)
    weight, bias = probe.linear()
    scores = ((x - probe.mean) / probe.scale) @ probe.weight + probe.offset
    torch.testing.assert_close(x @ weight.T + bias, scores)
    assert probe.accuracy(x, labels) == float((scores.argmax(1) == labels).double().mean())


def test_features_are_cls_and_mean_patch_of_enlarged_pictures() -> None:
    loaded = LoadedModel(*tiny_model("tiny-dinov2"))
    side = 3 * loaded.model.config.patch_size
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (60, 32, 32, 3), generator=random, dtype=torch.uint8).numpy()
    pictures = LabelledImages(images, torch.zeros(60, dtype=torch.int64).numpy(), ("thing",))
    done: list[tuple[int, int]] = []
    found = features(loaded, pictures, side, progress=lambda *steps: done.append(steps))
    pixels = torch.cat(list(batches(loaded, pictures, side)))
    assert pixels.shape == (60, 3, side, side)
    with torch.no_grad():
        last = loaded.model(pixel_values=pixels[:2]).last_hidden_state
    expected = torch.cat((last[:, 0], last[:, 1:].mean(1)), dim=1)
    assert last.shape[1] == 10
    torch.testing.assert_close(found[:2].float(), expected)
    assert done == [(50, 60), (60, 60)]
