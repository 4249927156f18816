"""Bayesian optimisation of a few continuous knobs, for methods whose settings were searched offline.

A Gaussian process models the objective; the next point is the best one under expected improvement, probability of
improvement or the lower confidence bound, and a bandit learns which of the three to follow (GP-Hedge: Hoffman, Brochu
and de Freitas, UAI 2011). All numbers are float64 on the CPU, and everything random comes from one seed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

_CANDIDATES = 4096
"""Random points among which the best under an acquisition function is sought; the best are then refined."""
_MARGIN = 0.01
"""Improvement, in the objective's own units, below which a point is not interesting."""
_KAPPA = 1.96
"""Standard deviations of the lower confidence bound."""


def matern(a: torch.Tensor, b: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Matern kernel of order 5/2 with a length scale per knob: ``a [n, d]``, ``b [m, d]`` -> ``[n, m]``."""
    square = (a / lengths).square().sum(-1, keepdim=True) + (b / lengths).square().sum(-1)
    square = square - 2 * (a / lengths) @ (b / lengths).T
    # The root has no derivative at 0, where equal points are.
    distance = (5 * square.clamp(min=1e-18)).sqrt()
    return (1 + distance + distance.square() / 3) * torch.exp(-distance)


class GaussianProcess:
    """Regression with a Matern 5/2 kernel; amplitude, length scales and noise maximise the marginal likelihood.

    Args:
        points: in the unit cube, ``[n, d]``.
        values: ``[n]``.
        start: hyper-parameters of an earlier fit (``theta``) to begin with.
    """

    def __init__(self, points: torch.Tensor, values: torch.Tensor, start: torch.Tensor | None = None) -> None:
        self.points = points
        self.mean = values.mean()
        scale = values.std() if len(values) > 1 else values.new_zeros(())
        self.scale = scale if scale > 0 else torch.ones_like(scale)
        self.targets = (values - self.mean) / self.scale
        dimensions = points.shape[1]
        neutral = torch.zeros(dimensions + 2, dtype=torch.float64)
        neutral[-1] = math.log(1e-2)
        self.theta = neutral if start is None else start.clone()
        self._maximise()
        self.factor, self.weights = self._solve(self.theta)

    def _solve(self, theta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        amplitude, lengths, noise = _unpacked(theta)
        covariance = amplitude * matern(self.points, self.points, lengths)
        factor = torch.linalg.cholesky(covariance + (noise + 1e-8) * torch.eye(len(self.points)).double())
        return factor, torch.cholesky_solve(self.targets.unsqueeze(1), factor)

    def _maximise(self) -> None:
        theta = self.theta.requires_grad_()
        optimiser = torch.optim.LBFGS([theta], max_iter=25, line_search_fn="strong_wolfe")

        def loss() -> torch.Tensor:
            optimiser.zero_grad()
            factor, weights = self._solve(theta)
            value = 0.5 * self.targets @ weights[:, 0] + factor.diagonal().log().sum()
            # A weak prior keeps knobs without influence from drifting away.
            value = value + 0.02 * theta.square().sum()
            value.backward()
            return value.detach()

        with torch.enable_grad():
            optimiser.step(loss)
        self.theta = theta.detach()

    def predict(self, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation at ``points [m, d]``, each ``[m]``, in the units of the values."""
        amplitude, lengths, _ = _unpacked(self.theta)
        cross = amplitude * matern(points, self.points, lengths)
        mean = cross @ self.weights[:, 0]
        part = torch.linalg.solve_triangular(self.factor, cross.T, upper=False)
        deviation = (amplitude - part.square().sum(0)).clamp(min=1e-18).sqrt()
        return mean * self.scale + self.mean, deviation * self.scale


def _unpacked(theta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Amplitude, length scales and noise from their logarithms ``[1 + d + 1]``, held within sane bounds."""
    amplitude, lengths, noise = theta[0], theta[1:-1], theta[-1]
    return amplitude.clamp(-4.6, 6.9).exp(), lengths.clamp(-4.6, 4.6).exp(), noise.clamp(-11.5, 0).exp()


def expected_improvement(mean: torch.Tensor, deviation: torch.Tensor, best: torch.Tensor) -> torch.Tensor:
    """How far below ``best`` a normal variable falls on average, less a margin; 0 where it does not. ``[m]``"""
    gap = best - _MARGIN - mean
    normal = torch.distributions.Normal(0.0, 1.0, validate_args=False)
    return gap * normal.cdf(gap / deviation) + deviation * normal.log_prob(gap / deviation).exp()


def probability_of_improvement(
    mean: torch.Tensor, deviation: torch.Tensor, best: torch.Tensor
) -> torch.Tensor:
    """Probability that a normal variable falls below ``best`` by a margin, ``[m]``."""
    return torch.special.ndtr((best - _MARGIN - mean) / deviation)


def low_bound(mean: torch.Tensor, deviation: torch.Tensor, best: torch.Tensor) -> torch.Tensor:
    """Negative lower confidence bound, ``[m]``; ``best`` plays no part."""
    return _KAPPA * deviation - mean


class Search:
    """Minimises a function of a few bounded knobs: ``ask`` for a point, ``tell`` its value.

    Args:
        bounds: lowest and highest value of each knob.
        initial: random points before the model guides.
        seed: of everything random.
    """

    def __init__(self, bounds: Sequence[tuple[float, float]], initial: int, seed: int) -> None:
        self.low = torch.tensor([low for low, _ in bounds], dtype=torch.float64)
        self.span = torch.tensor([high for _, high in bounds], dtype=torch.float64) - self.low
        self.initial = initial
        self.points: list[torch.Tensor] = []
        self.values: list[float] = []
        self._generator = torch.Generator().manual_seed(seed)
        self._gains = torch.zeros(3, dtype=torch.float64)
        self._proposed: torch.Tensor | None = None
        self._theta: torch.Tensor | None = None

    @property
    def best(self) -> tuple[float, ...]:
        """The point with the lowest value so far."""
        return self._knobs(self.points[min(range(len(self.values)), key=self.values.__getitem__)])

    def ask(self) -> tuple[float, ...]:
        """The point to try next; ``tell`` its value before the next call."""
        if len(self.values) < max(1, self.initial):
            self._proposed = None
            self.points.append(self._random(1)[0])
            return self._knobs(self.points[-1])
        model = self._model()
        if self._proposed is not None:  # what each rule proposed last time is judged by the newer model
            self._gains -= model.predict(self._proposed)[0]
        best = torch.tensor(min(self.values), dtype=torch.float64)
        rules = (expected_improvement, low_bound, probability_of_improvement)
        self._proposed = torch.stack([self._maximum(model, rule, best) for rule in rules])
        chances = (self._gains - self._gains.max()).exp()
        chosen = int(torch.multinomial(chances, 1, generator=self._generator))
        self.points.append(self._proposed[chosen])
        return self._knobs(self.points[-1])

    def tell(self, value: float) -> None:
        """The value of the point that was asked for last."""
        self.values.append(value)

    def _model(self) -> GaussianProcess:
        values = torch.tensor(self.values, dtype=torch.float64)
        model = GaussianProcess(torch.stack(self.points), values, self._theta)
        self._theta = model.theta
        return model

    def _maximum(self, model: GaussianProcess, rule: object, best: torch.Tensor) -> torch.Tensor:
        assert callable(rule)
        points = self._random(_CANDIDATES)
        for width in (0.0, 0.1, 0.02, 0.004):
            if width:  # look around the best so far, ever closer
                noise = torch.randn(256, points.shape[1], generator=self._generator, dtype=torch.float64)
                points = torch.cat((points[:1], (points[:1] + width * noise).clamp(0, 1)))
            points = points[rule(*model.predict(points), best).argmax()].unsqueeze(0)
        return points[0]

    def _random(self, number: int) -> torch.Tensor:
        return torch.rand(number, len(self.low), generator=self._generator, dtype=torch.float64)

    def _knobs(self, point: torch.Tensor) -> tuple[float, ...]:
        return tuple((self.low + point * self.span).tolist())
