"""What a model does with its gradients: it hands them to a sink and forgets them."""

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn


class GradientSink(Protocol):
    """Takes every weight's gradient exactly once per backward, as soon as it is there.

    Whole, or in slices of rows from the first to the last with nothing left out. The tensor belongs
    to the sink from then on, and the sink may change the weight at once: all of it, or these rows.
    """

    def receive(self, name: str, gradient: Tensor) -> None:
        """The whole gradient of the parameter of that name."""

    def receive_rows(self, name: str, start: int, rows: Tensor) -> None:
        """The rows start, start + 1, ... of the gradient of a matrix."""


@runtime_checkable
class CountingSink(GradientSink, Protocol):
    """A sink for layer-major order, where every weight has several gradients in a row."""

    def expect(self, left: int) -> None:
        """What comes next is the last but so many of its weight's gradients in this update."""


@runtime_checkable
class SurveyingSink(GradientSink, Protocol):
    """A sink that may be shown a gradient's rows before it receives them."""

    def wants_survey(self, name: str) -> bool:
        """Shall all rows be shown before the first is handed over?"""

    def survey_rows(self, name: str, start: int, rows: Tensor) -> None:
        """Look at the rows start, start + 1, ..., which come again."""


class ParameterGrads:
    """The sink of a model that nobody attached to an optimizer: fills the parameters' `.grad`."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def receive(self, name: str, gradient: Tensor) -> None:
        parameter = self.model.get_parameter(name)
        if parameter.grad is None:
            parameter.grad = gradient
        else:
            parameter.grad.add_(gradient)

    def receive_rows(self, name: str, start: int, rows: Tensor) -> None:
        parameter = self.model.get_parameter(name)
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad[start : start + len(rows)].add_(rows)
