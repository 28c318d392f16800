"""What was not sent yet: nothing, a residual, or DGC's velocity and residual.

    Nothing     x = g                                       for unbiased codecs
    Kept        x = e + g                  e <- x           for methods that leave the rest in x
    Residual    x = e + g                  e <- x - sent + rejected
    Momentum    u <- m u + g, x = e + u    e <- x - sent + rejected,  u <- 0 where sent

A residual holds exactly what was not sent: of a value that was rounded, what rounding took. It is
kept in the gradient's units. Nothing that is not finite enters it.

Layer: compress. Is given payloads; knows nothing of ranks and messages.

References:
    [LH18] Y. Lin et al., "Deep gradient compression", ICLR 2018: momentum correction and masking.
    The update rule must then have no momentum of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from hpctrain.compress.interface import Codec, Payload, SparseCodec
from hpctrain.errors import UsageError

if TYPE_CHECKING:
    from hpctrain.device import Device

__all__ = ["Kept", "Momentum", "Nothing", "Residual"]

Array = Any  # of the device


class Nothing:
    """See `interface.Memory`: what is not sent is lost, and made up for on average."""

    def __init__(self, codec: Codec, lossy: bool = False) -> None:
        """`lossy`: take a codec whose losses do not make up for one another, too.

        Raises:
            UsageError: the codec is biased, and not `lossy`.
        """
        if not (codec.unbiased or lossy):
            raise UsageError(
                f"{codec.name} without a memory loses the same elements in every step: give it a "
                "Residual"
            )

    def compensate(self, g: Array) -> Array:
        """See `Memory`."""
        return g

    def update(self, sent: Payload, rejected: Payload | None = None) -> None:
        """See `Memory`."""

    def flush(self, g: Array) -> None:
        """See `Memory`."""

    def arrays(self) -> dict[str, Array]:
        """See `Memory`."""
        return {}

    def load(self, arrays: dict[str, Array]) -> None:
        """See `Memory`."""
        _require(arrays, {})


class Kept:
    """A residual e of n numbers, and one array more to make the next e in.

    Attributes:
        residual: shape (n,).
    """

    def __init__(self, device: Device, n: int, dtype: Any = np.float32) -> None:
        """`dtype`: of gradients."""
        self._device = device
        self.residual: Array = device.zeros(n, dtype)
        self._x: Array = device.zeros(n, dtype)

    def compensate(self, g: Array) -> Array:
        """See `Memory`."""
        self._device.launch("keep_residual", self.residual, g, self._x, g.shape[0], work=g.shape[0])
        return self._x

    def keep(self) -> None:
        """What `compensate` gave, as it is now, is what was not sent."""
        self.residual, self._x = self._x, self.residual

    def undo(self) -> None:
        """Go back before the last `keep` or `update`; only before the next `compensate`."""
        self.residual, self._x = self._x, self.residual

    def flush(self, g: Array) -> None:
        """See `Memory`."""
        n = g.shape[0]
        self._device.launch("add_into", g, self.residual, n, work=n)
        self._device.launch("fill", self.residual, 0.0, n, work=n)

    def arrays(self) -> dict[str, Array]:
        """See `Memory`."""
        return {"residual": self.residual}

    def load(self, arrays: dict[str, Array]) -> None:
        """See `Memory`."""
        own = self.arrays()
        _require(arrays, own)
        for name, array in own.items():
            self._device.copy(array, arrays[name])


class Residual(Kept):
    """See `interface.Memory`; 2 n numbers."""

    def __init__(self, device: Device, codec: Codec, dtype: Any = np.float32) -> None:
        """`dtype`: of gradients.

        Raises:
            UsageError: a codec that is no contraction: its residual would grow without limit.
        """
        if codec.contraction is None:
            raise UsageError(
                f"{codec.name} is unbiased and no contraction, its residual would grow: use it "
                "without a memory, or unscaled"
            )
        super().__init__(device, codec.extent.n, dtype)
        self._codec = codec

    def update(self, sent: Payload, rejected: Payload | None = None) -> None:
        """See `Memory`."""
        self._codec.add_into(sent, self._x, -1.0)
        if rejected is not None:
            self._codec.add_into(rejected, self._x)
        self.keep()


class Momentum(Residual):
    """DGC's memory: momentum is gathered before the selection; 4 n numbers.

    The velocity of elements that were sent is forgotten; with `keep`, after a sum of everything, it
    stays, and all is as with momentum in the update rule.
    """

    def __init__(
        self, device: Device, codec: SparseCodec, momentum: float = 0.9, dtype: Any = np.float32
    ) -> None:
        """Raises `UsageError` for a codec that does not send single elements, or a momentum out of
        range."""
        if not hasattr(codec, "mask"):
            raise UsageError(
                f"{codec.name} sends no single elements whose momentum could be forgotten: use a "
                "Residual, and momentum in the update rule"
            )
        if not 0 <= momentum < 1:
            raise UsageError(f"momentum {momentum}: it is from 0 to below 1")
        super().__init__(device, codec, dtype)
        self._sparse, self._m = codec, momentum
        self.velocity: Array = device.zeros(codec.extent.n, dtype)
        self._u: Array = device.zeros(codec.extent.n, dtype)

    def compensate(self, g: Array) -> Array:
        """See `Memory`."""
        device, n = self._device, g.shape[0]
        device.copy(self._u, self.velocity)
        device.launch("keep_momentum", self.residual, g, self._u, self._x, self._m, n, work=n)
        return self._x

    def update(self, sent: Payload, rejected: Payload | None = None) -> None:
        """See `Memory`."""
        super().update(sent, rejected)
        self._sparse.mask(sent, self.residual, self.velocity)

    def keep(self) -> None:
        """See `Kept`."""
        super().keep()
        self.velocity, self._u = self._u, self.velocity

    def undo(self) -> None:
        """See `Kept`."""
        super().undo()
        self.velocity, self._u = self._u, self.velocity

    def arrays(self) -> dict[str, Array]:
        """See `Memory`."""
        return {"residual": self.residual, "velocity": self.velocity}


def _require(given: dict[str, Array], own: dict[str, Array]) -> None:
    """Refuse arrays of another memory, or of another range."""
    shapes = {name: tuple(array.shape) for name, array in given.items()}
    wanted = {name: tuple(array.shape) for name, array in own.items()}
    if shapes != wanted:
        raise UsageError(
            f"a memory of {wanted} cannot go on from {shapes}: it takes what a memory of the same "
            "kind and range has saved"
        )
