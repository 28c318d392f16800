"""Checkpoints: a run on disk, the same for any number of ranks.

    step_00001200/
        parameters.safetensors   parameters and averages by name
        optimizer.safetensors    <state>.<parameter name>
        state.json               position of the run, sizes and checksums

`save` writes one, `latest_valid` or `verify` finds out that it is whole, `load` fills arrays from
it. A `Saver` writes them while training goes on, and others on the nodes themselves; `newest_valid`
finds the newest of both. `describe` and `read_tensors` need no MPI. Nothing is pickled.

Layer 3, beside optim and compress. Is given layouts, flat arrays and a communicator; knows nothing
of models and optimizers.
"""

from __future__ import annotations

from hpctrain.checkpoint.background import Saved, Saver
from hpctrain.checkpoint.local import NodeFolder, open_folder
from hpctrain.checkpoint.parts import Part
from hpctrain.checkpoint.read import Description, describe, latest_valid, load, verify
from hpctrain.checkpoint.recover import newest_valid
from hpctrain.checkpoint.tensors import Tensor, read_tensors
from hpctrain.checkpoint.write import save

__all__ = [
    "Description",
    "NodeFolder",
    "Part",
    "Saved",
    "Saver",
    "Tensor",
    "describe",
    "latest_valid",
    "load",
    "newest_valid",
    "open_folder",
    "read_tensors",
    "save",
    "verify",
]
