"""Going on from a checkpoint: which one, and what it holds of training.

Layer: train. `saving` writes what is read here.
"""

from __future__ import annotations

from pathlib import Path

from hpctrain import checkpoint
from hpctrain.checkpoint import NodeFolder, Part
from hpctrain.data import Loader
from hpctrain.device.dtypes import wide_dtype
from hpctrain.errors import CheckpointError
from hpctrain.nn.layout import Store
from hpctrain.train.compressing import Loading, residual_parts
from hpctrain.train.folder import RunFolder
from hpctrain.train.records import Position
from hpctrain.train.session import Session
from hpctrain.train.step import Trainer

__all__ = ["load_model", "parts", "restore"]


def parts(trainer: Trainer, load: bool) -> list[Part]:
    """What a checkpoint of training holds, and which of it this rank writes or wants."""
    averages = trainer.averages
    everywhere = load or trainer.session.comm.rank == 0
    whole = (0, averages.layout.size) if everywhere else (0, 0)
    held = trainer.parallel.loaded_parts() if load else trainer.parallel.saved_parts()
    averaged = Part("parameters", "", averages.layout, averages.array, whole)
    if load:
        return [*held, averaged]
    return [*held, averaged, *residual_parts(trainer.compression, trainer.session)]


def restore(
    session: Session,
    trainer: Trainer,
    loader: Loader,
    folder: RunFolder,
    resume: str,
    local: NodeFolder | None,
) -> Position:
    """Load the checkpoint that `resume` asks for; the position to go on from. Collective.

    `local`: where to look for checkpoints on this node, too.
    """
    if resume == "never":
        return Position()
    path: Path | None = Path(resume)
    if resume == "auto":
        path = checkpoint.newest_valid(folder.checkpoints, session.topology, local)
    else:
        checkpoint.verify(Path(resume), session.comm)
    if path is None:
        return Position()
    residuals = Loading(path, trainer.compression, session)
    wanted = [*parts(trainer, load=True), *residuals.parts]
    state = checkpoint.load(path, wanted, session.comm, fill=session.fill)
    trainer.held_back = residuals.finish(state.get("compression", []))
    trainer.parallel.publish()
    if not {"step", "data"} <= state.keys():
        raise CheckpointError(f"{path} was not written by training: its state lacks step and data")
    position = Position(int(state["step"]), *loader.restore(state["data"]))
    trainer.scaling.restore(state.get("scaling", {}))
    folder.forget_after(position.step)
    return position


def load_model(session: Session, folder: Path, path: str | None) -> Path:
    """Load parameters and averages of a run's checkpoint to evaluate it; its path. Collective.

    `path` names the checkpoint; None takes the newest valid one of the run folder.
    """
    if path is not None:
        found: Path | None = Path(path)
        checkpoint.verify(path, session.comm)
    else:
        found = checkpoint.latest_valid(folder / "checkpoints", session.comm)
    if found is None:
        raise CheckpointError(f"{folder} holds no checkpoint yet; train first")
    averages, layout = session.averages(), session.layouts.parameters
    wide = layout.with_dtype(wide_dtype(layout.dtype))
    parameters = Store(wide, session.device.zeros(layout.size, wide.dtype))
    stores = [
        Part("parameters", "", s.layout, s.array, (0, s.layout.size))
        for s in (parameters, averages)
    ]
    checkpoint.load(found, stores, session.comm, partial=True, fill=session.fill)
    if wide.dtype != layout.dtype:
        short = Store(layout, session.device.zeros(layout.size, layout.dtype))
        session.device.launch(
            "narrow", parameters.array, short.array, layout.size, work=layout.size
        )
        parameters = short
    session.model.bind(parameters, averages)
    return found
