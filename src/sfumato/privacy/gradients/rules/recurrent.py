"""Recurrent cells: two linear layers and gates.

(nn.RNN, nn.LSTM and nn.GRU run over time inside one operator, whose states have the rows in their second dimension.)
"""

from typing import Any

import torch
from torch import Tensor, nn

from sfumato.errors import UnsupportedLayer
from sfumato.privacy.gradients.rules.linear import Linear, linear_terms
from sfumato.privacy.gradients.rules.registry import Call, Labelled, Record, Rule, labelled_with, rule
from sfumato.privacy.gradients.terms import Term


class _CellRule(Rule):
    """Sources: the formulas in the documentation of torch's cells."""

    parameters = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    nests = True
    piecewise = True

    def gates(self, module: Any, record: Record, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        for tensor in (x, h):
            if tensor.dim() != 2:
                raise UnsupportedLayer(
                    f"{type(module).__name__} · got an input of shape {tuple(tensor.shape)}; needs rows and features",
                    next="Keep the batch's rows as the leading dimension.",
                )
        from_input: Any = Linear.apply(Labelled(record, 0), x, module.weight_ih, module.bias_ih)
        from_state: Any = Linear.apply(Labelled(record, 1), h, module.weight_hh, module.bias_hh)
        return from_input, from_state

    def terms(self, module: Any, calls: list[Call]) -> list[Term]:
        terms: list[Term] = []
        for label, weight, bias in (
            (0, module.weight_ih, module.bias_ih),
            (1, module.weight_hh, module.bias_hh),
        ):
            found = labelled_with(label, calls)
            if found:
                terms += linear_terms(weight, bias, found)
        return terms


def _zeros(module: Any, x: Tensor) -> Tensor:
    return torch.zeros(x.shape[0], module.hidden_size, dtype=x.dtype, device=x.device)


@rule(nn.RNNCell)
class RNNCellRule(_CellRule):
    def forward(self, module: Any, record: Record, input: Tensor, hx: Tensor | None = None) -> Tensor:
        a, b = self.gates(module, record, input, _zeros(module, input) if hx is None else hx)
        return torch.tanh(a + b) if module.nonlinearity == "tanh" else torch.relu(a + b)


@rule(nn.LSTMCell)
class LSTMCellRule(_CellRule):
    def forward(
        self, module: Any, record: Record, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        h, c = (_zeros(module, input), _zeros(module, input)) if hx is None else hx
        a, b = self.gates(module, record, input, h)
        i, f, g, o = (a + b).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c


@rule(nn.GRUCell)
class GRUCellRule(_CellRule):
    def forward(self, module: Any, record: Record, input: Tensor, hx: Tensor | None = None) -> Tensor:
        h = _zeros(module, input) if hx is None else hx
        a, b = (gates.chunk(3, 1) for gates in self.gates(module, record, input, h))
        reset, update = (a[0] + b[0]).sigmoid(), (a[1] + b[1]).sigmoid()
        new = (a[2] + reset * b[2]).tanh()
        return (1 - update) * new + update * h
