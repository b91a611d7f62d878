"""Adapted layers other than dense ones: embeddings and convolutions.

Both are matrices whose rows can be gathered from the output, so that the same update applies: an embedding is Wᵀ with
one-hot inputs, a convolution a dense layer over patches, whose output channels are the rows.
"""

from __future__ import annotations

from torch import Tensor, nn

from .core import CoreSettings
from .layer import Linear


class Embedding(Linear):
    """An embedding (V, d) as the dense layer W = weightᵀ (d, V): J are tokens, I dimensions."""

    like_input = False

    def check_fit(self, settings: CoreSettings) -> None:
        _refuse_calibration(self, settings)
        super().check_fit(settings)

    def _times_rows(self, x: Tensor, weight: Tensor) -> Tensor:
        return nn.functional.embedding(x, weight.t())


class Conv(Linear):
    """A convolution as the dense layer W = weight (out, in · kernel) over patches."""

    like_input = False

    def check_fit(self, settings: CoreSettings) -> None:
        _refuse_calibration(self, settings)
        groups = self.get_base_layer().groups
        if groups > 1:
            raise ValueError(
                f"{settings.key}: a convolution with groups={groups} cannot be adapted: its rows read different "
                "inputs; remove it from target_modules."
            )
        super().check_fit(settings)

    def channels_last(self, y: Tensor) -> Tensor:
        return y.movedim(1, -1)

    def _channels_back(self, y: Tensor) -> Tensor:
        return y.movedim(-1, 1)

    def _times_rows(self, x: Tensor, weight: Tensor) -> Tensor:
        base = self.get_base_layer()
        return self.channels_last(base._conv_forward(x, weight.view(-1, *base.weight.shape[1:]), None))


def _refuse_calibration(layer: Linear, settings: CoreSettings) -> None:
    if settings.config.selection == "activation":
        kind = type(layer.get_base_layer()).__name__
        raise ValueError(
            f"{settings.key}: selection='activation' is measured on dense layers only, and this is a {kind}; use "
            "another selection, or remove it from target_modules."
        )


def kind_of(base: nn.Module) -> type[Linear] | None:
    """The class for a base layer, None if it cannot be adapted."""
    if isinstance(base, nn.Embedding):
        return Embedding
    if isinstance(base, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return Conv
    if hasattr(base, "in_features") or hasattr(base, "nx"):
        return Linear
    return None
