"""Models: networks by the `[model]` section of a run file.

Layer 5, beside train. Knows nothing of data files, ranks and optimizers.
"""

from __future__ import annotations

from hpctrain.models.convnet import ConvNet
from hpctrain.models.mlp import MLP
from hpctrain.nn.module import Module
from hpctrain.sections import Convnet, Mlp

__all__ = ["MLP", "ConvNet", "build"]


def build(config: Mlp | Convnet, sample_shape: tuple[int, ...], outputs: int) -> Module:
    """The model for samples of `sample_shape` (images: (H, W[, C])) and `outputs` classes."""
    if isinstance(config, Mlp):
        return MLP(config, sample_shape, outputs)
    return ConvNet(config, sample_shape, outputs)
