"""Neural network training on MPI clusters: the names that a user's own program starts from.

    from hpctrain import Communicator, DistributedOptimizer, SGD

Importing the package is light: neither MPI, CuPy, h5py nor NumPy. Each name below is imported
from its own module when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hpctrain.data import Loader, open_dataset, pack
    from hpctrain.device import open_device
    from hpctrain.optim import SGD, AdamW
    from hpctrain.parallel import Communicator, DistributedOptimizer

__version__ = "0.1.0"

__all__ = [
    "SGD",
    "AdamW",
    "Communicator",
    "DistributedOptimizer",
    "Loader",
    "__version__",
    "open_dataset",
    "open_device",
    "pack",
]

_MODULES = {
    "AdamW": "hpctrain.optim",
    "Communicator": "hpctrain.parallel",
    "DistributedOptimizer": "hpctrain.parallel",
    "Loader": "hpctrain.data",
    "SGD": "hpctrain.optim",
    "open_dataset": "hpctrain.data",
    "open_device": "hpctrain.device",
    "pack": "hpctrain.data",
}


def __getattr__(name: str) -> object:
    """Import a public name when it is first asked for (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module 'hpctrain' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
