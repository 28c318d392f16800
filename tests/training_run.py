"""Run some training steps and print, for each, the samples of all ranks in order and the loss.

mpirun -n 3 python tests/training_run.py RUN.toml STEPS [section.key=value ...]
"""

import json
import sys

from hpctrain.config import resolve
from hpctrain.mpi.start import start
from hpctrain.parallel.communicator import open_chosen_device
from hpctrain.train.evaluate import evaluate
from hpctrain.train.session import open_session
from hpctrain.train.step import Trainer, schedule_of


def main(run_file, count, *overrides):
    config = resolve(run_file, overrides).config
    device = open_chosen_device(config.run.device)
    comm = start()
    result = {"samples": [], "loss": []}
    with open_session(config, device, comm) as session:
        loader = session.loader(config.data.train)
        trainer = Trainer(session)
        trainer.schedule = schedule_of(config, int(count))
        trainer.initialize()
        step = 0
        for epoch in range(10**6):
            for batch in loader.epoch(epoch):
                done = trainer.step(batch, step)
                ids = comm.gather(batch.samples.tolist())
                if ids is not None:
                    result["samples"].append(sum(ids, []))
                result["loss"].append(done.loss)
                step += 1
                if step == int(count):
                    break
            if step == int(count):
                break
        final = evaluate(session, config.data.test)
        result["accuracy"] = final.accuracy
        result["evaluated"] = final.samples
        loader.close()
        trainer.free()
    if comm.rank == 0:
        print("RESULT " + json.dumps(result), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
