"""Which process's gradient was NaN or infinite, where the losses of all were finite.

Gradients are summed over processes while the backward pass runs, and afterwards all have the same.  What a process adds
is seen only on the way: at one small weight of the first decoder layer, which nearly every such number passes.
"""

from __future__ import annotations

import paddle
from paddle import nn

_FIRST_LAYER = "language_model.layers.0."


class GradientWatch:
    """Looks at one weight's gradient in every micro-batch, before it is summed over processes."""

    def __init__(self) -> None:
        self._found: paddle.Tensor | None = None

    def look_at(self, model: nn.Layer) -> None:
        """Chooses the weight: of those that train the smallest of the first decoder layer, or else of all."""
        trained = {name: weight for name, weight in model.named_parameters() if not weight.stop_gradient}
        first = [weight for name, weight in trained.items() if name.startswith(_FIRST_LAYER)]
        min(first or trained.values(), key=lambda weight: int(weight.size)).register_hook(self._see)

    def take(self) -> paddle.Tensor:
        """float32 scalar, above 0 where a number of this step's gradient was NaN or infinite; not waited for."""
        found, self._found = self._found, None
        return paddle.zeros([], dtype="float32") if found is None else found

    @paddle.no_grad()
    def _see(self, gradient: paddle.Tensor) -> None:
        # Of bfloat16 the Ascend plugin cannot tell; the gradient would go to the host in every micro-batch.
        found = 1.0 - paddle.isfinite(gradient.astype("float32")).all().astype("float32")
        self._found = found if self._found is None else self._found + found
