"""Gradients of a loss by the weights of linear layers, and their squares, summed over calibration batches.

Each gradient is added to its sum the moment the backward pass has it, and freed: beside the sums, the gradients of one
layer live at a time. Nothing is left behind: no ``grad``, no hook, and what was frozen is frozen again. Weights are
named by ``LinearPart``s, so parts of a fused layer have gradients of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from zoo.engines.stepping import evaluating
from zoo.errors import RunFailed
from zoo.models.anatomy import LinearPart

Batch = TypeVar("Batch", bound=Sized)


class GradientSums:
    """What ``sum_gradients`` returns. All tensors are float32, on the device of their weight.

    Attributes:
        samples: how many went into the sums.
    """

    def __init__(self, parameters: Sequence[torch.Tensor], squares: bool) -> None:
        self.samples = 0
        self._batch = 0
        self._totals = {id(one): torch.zeros_like(one, dtype=torch.float32) for one in parameters}
        self._squares = {key: torch.zeros_like(total) for key, total in self._totals.items() if squares}
        self._parameters = list(parameters)  # kept alive: they are known by their identity

    def mean(self, part: LinearPart) -> torch.Tensor:
        """Mean gradient over all samples, ``[out, in]``."""
        return self._rows(self._totals, part) / self.samples

    def mean_square(self, part: LinearPart) -> torch.Tensor:
        """Squared gradients of the batches' mean losses, summed and divided by the number of samples, ``[out, in]``.

        With batches of one sample this is the mean over samples of their squared gradients.
        """
        return self._rows(self._squares, part) / self.samples

    def begin(self, samples: int) -> None:
        """The gradients to come are those of a batch of so many samples."""
        self._batch = samples
        self.samples += samples

    def add(self, parameter: torch.Tensor) -> None:
        """Take the gradient out of ``parameter.grad``."""
        assert parameter.grad is not None
        gradient = parameter.grad.float()
        self._totals[id(parameter)].add_(gradient, alpha=self._batch)
        if self._squares:
            self._squares[id(parameter)].addcmul_(gradient, gradient)
        parameter.grad = None

    @staticmethod
    def _rows(sums: dict[int, torch.Tensor], part: LinearPart) -> torch.Tensor:
        whole = sums[id(part.linear.weight)]
        return whole if part.rows is None else whole[part.rows[0] : part.rows[1]]


def sum_gradients(
    model: nn.Module,
    parts: Iterable[LinearPart],
    batches: Iterable[Batch],
    loss: Callable[[Batch], torch.Tensor],
    *,
    squares: bool = False,
    step: Callable[[], None] = lambda: None,
) -> GradientSums:
    """Differentiate ``loss`` on every batch by the weights of ``parts``.

    Args:
        model: runs in evaluation mode meanwhile; gradients reach no other parameter of it.
        parts: linears of ``model``.
        batches: what ``loss`` takes, one after the other; the length of one is its number of samples.
        loss: mean over the samples of a batch, 0-d.
        squares: also sum the squares of the batches' gradients.
        step: called after each batch.

    Raises:
        RunFailed: a loss is NaN or infinite.
    """
    parameters = list({id(part.linear.weight): part.linear.weight for part in parts}.values())
    sums = GradientSums(parameters, squares)
    with evaluating(model), _handing_over(model, parameters, sums.add), torch.enable_grad():
        for batch in batches:
            sums.begin(len(batch))
            value = loss(batch)
            if not bool(torch.isfinite(value)):
                raise RunFailed(
                    "the loss on the calibration data is NaN or infinite, so nothing was pruned; load the model in "
                    "float32 or bfloat16, and check that its weights are finite"
                )
            torch.autograd.backward(value)
            step()
    return sums


def language_model_loss(model: Any, windows: torch.Tensor) -> torch.Tensor:
    """Mean next-token cross entropy of ``windows [windows, tokens]``, 0-d, by the model's own loss."""
    ids = windows.to(model.device)
    loss: torch.Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return loss


@contextmanager
def _handing_over(
    model: nn.Module, parameters: Sequence[torch.Tensor], take: Callable[[torch.Tensor], None]
) -> Iterator[None]:
    """Let gradients reach ``parameters`` and nothing else; ``take`` gets each as soon as it is there."""
    before = [(one, one.requires_grad, one.grad) for one in model.parameters()]
    hooks = []
    try:
        for one, _, _ in before:
            one.requires_grad_(False)
            one.grad = None
        for weight in parameters:
            weight.requires_grad_(True)
            hooks.append(weight.register_post_accumulate_grad_hook(take))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for one, flag, gradient in before:
            one.requires_grad_(flag)
            one.grad = gradient
