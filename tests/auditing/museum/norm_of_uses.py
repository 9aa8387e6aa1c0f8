"""Fast norms that take the layers' uses one by one: a weight that is used twice (tied, shared, repeated words) counts as if its
two gradients were at right angles.

Claimed: epsilon = 4.38 for one Gaussian step. In truth k uses that agree move it by sqrt(k) C: with k = 8, the noise multiplier
is sigma / sqrt(8), epsilon = 15.5.
"""

import torch
from tests.auditing.adapters.loop import EXPECTED, C, gaussian, move, trainer

RIGHT_ROW, ROWS = 13, {13}
CLAIMED_EPSILON, TRUE_EPSILON = 4.38, 15.46
TRUE_NOISE_MULTIPLIER = 1 / 8**0.5


def norm_by_uses(model, row):
    """The square root of the summed squares of every use's gradient: outputs' gradients times inputs, position by position."""
    squares = []

    def keep(module, args, output):
        rows = args[0].detach()

        def back(gradient):
            flat = gradient.reshape(-1, gradient.shape[-1]).double()
            if isinstance(module, torch.nn.Embedding):
                squares.append(
                    float(
                        flat[rows.reshape(-1) != (module.padding_idx if module.padding_idx is not None else -1)]
                        .square()
                        .sum()
                    )
                )
            elif isinstance(module, torch.nn.Linear):
                bias = 1.0 if module.bias is not None else 0.0
                length = rows.reshape(-1, rows.shape[-1]).double().square().sum(1) + bias
                squares.append(float((flat.square().sum(1) * length).sum()))
            else:
                raise ValueError(f"no rule for {type(module).__name__}")

        output.register_hook(back)

    handles = [m.register_forward_hook(keep) for m in model.modules() if not list(m.children())]
    try:
        gradients = torch.autograd.grad(model(row).sum(), list(model.parameters()))
    finally:
        for handle in handles:
            handle.remove()
    return torch.cat([g.double().flatten() for g in gradients]), sum(squares) ** 0.5


def step(model, inputs, noise_multiplier, generator):
    total = torch.zeros(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    for row in range(len(inputs)):
        gradient, norm = norm_by_uses(model, inputs[row : row + 1])
        if torch.isfinite(gradient).all() and norm < float("inf"):
            total += gradient * min(1.0, C / max(norm, 1e-300))
    move(model, (total + gaussian(len(total), noise_multiplier * C, generator)) / EXPECTED)


def wrong():
    return trainer(step=step, train=None)
