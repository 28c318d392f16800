"""A residual convolutional network for small images.

    x -> conv 3x3 -> norm -> activation
      -> stages; each: blocks at one width, then (but for the last stage) 2x2 max pooling
      -> average over the image -> dropout -> linear -> logits

    block: activation(x + norm(conv(activation(norm(conv(x)))))); a 1x1 convolution brings x to
    another width.

Source: He et al., "Deep residual learning for image recognition", CVPR 2016, with pooling in the
place of strides, as images are small. Layer: models.
"""

from __future__ import annotations

from hpctrain.autograd import Tape, Variable
from hpctrain.errors import UsageError
from hpctrain.nn.layers import BatchNorm, Conv2d, Dropout, Linear, activation
from hpctrain.nn.module import Module
from hpctrain.nn.operations import add, reshape
from hpctrain.nn.pooling import average_pool, max_pool
from hpctrain.sections import Convnet

__all__ = ["ConvNet"]


class ConvNet(Module):
    """See the top of the file; samples are images (H, W) or (H, W, C)."""

    def __init__(self, config: Convnet, sample_shape: tuple[int, ...], outputs: int) -> None:
        if len(sample_shape) not in (2, 3):
            raise UsageError(
                f"convnet needs images of shape (H, W) or (H, W, C), not {sample_shape}; "
                "use the model mlp, or pack the data as images"
            )
        height, width = sample_shape[:2]
        shrink = 2 ** (len(config.widths) - 1)
        if min(height, width) < shrink:
            raise UsageError(
                f"model.widths has {len(config.widths)} stages, each halves the image, but the "
                f"images are {height} x {width}; take fewer stages"
            )
        self.image = (height, width, sample_shape[2] if len(sample_shape) == 3 else 1)
        self.stem = ConvNorm(config, self.image[2], config.widths[0])
        self.stages = []
        before = config.widths[0]
        for after in config.widths:
            stage = [Block(config, before, after)]
            stage += [Block(config, after, after) for _ in range(config.blocks - 1)]
            self.stages.append(stage)
            before = after
        self.dropout = Dropout(config.dropout) if config.dropout else None
        self.head = Linear(before, outputs, gain=1.0)

    def __call__(self, tape: Tape, x: Variable) -> Variable:
        """x: (N, H, W[, C]) -> logits (N, outputs)."""
        x = reshape(tape, x, (x.shape[0], *self.image))
        x = self.stem(tape, x)
        for index, stage in enumerate(self.stages):
            for block in stage:
                x = block(tape, x)
            if index < len(self.stages) - 1:
                x = max_pool(tape, x, 2)
        images, height, width, channels = x.shape
        x = average_pool(tape, x, (height, width))
        x = reshape(tape, x, (images, channels))
        if self.dropout is not None:
            x = self.dropout(tape, x)
        return self.head(tape, x)


class ConvNorm(Module):
    """A convolution that keeps the image's size, its norm (or a bias), and an activation."""

    def __init__(
        self, config: Convnet, before: int, after: int, kernel: int = 3, gamma: float = 1.0
    ) -> None:
        normed = config.norm == "batch"
        self.activation = config.activation
        self.conv = Conv2d(before, after, kernel, padding=kernel // 2, bias=not normed)
        self.norm = (
            BatchNorm(after, whole_step=config.batch_statistics == "step", gamma=gamma)
            if normed
            else None
        )

    def __call__(self, tape: Tape, x: Variable, shortcut: Variable | None = None) -> Variable:
        """activation(norm(conv(x)) + shortcut); x: (N, H, W, before) -> (N, H, W, after)."""
        x = self.conv(tape, x)
        if self.norm is not None and self.activation == "relu":  # in one pass over memory
            return self.norm(tape, x, relu=True, shortcut=shortcut)
        if self.norm is not None:
            x = self.norm(tape, x, shortcut=shortcut)
        elif shortcut is not None:
            x = add(tape, x, shortcut)
        return activation(self.activation, tape, x)


class Block(Module):
    """A residual block of two 3x3 convolutions."""

    def __init__(self, config: Convnet, before: int, after: int) -> None:
        self.first = ConvNorm(config, before, after)
        # A gamma of 0 lets the block begin as its shortcut: Goyal et al., "Accurate, large
        # minibatch SGD", arXiv 1706.02677, section 5.1.
        self.second = ConvNorm(config, after, after, gamma=0.0)
        self.shortcut = Conv2d(before, after, kernel=1) if before != after else None

    def __call__(self, tape: Tape, x: Variable) -> Variable:
        """x: (N, H, W, before) -> (N, H, W, after)."""
        shortcut = x if self.shortcut is None else self.shortcut(tape, x)
        return self.second(tape, self.first(tape, x), shortcut)
