"""How much of the exchange between nodes hides behind the computation, measured in pairs.

    tools/netns-cluster run 2x1 --rate 500mbit -- .venv/bin/python tools/bench_overlap.py

Two copies of one network train side by side, step by step in turn: one exchanges its gradients
after the backward pass and its parameters before the next forward pass, the other meanwhile. The
batch is chosen so that communication takes half of the first one's step. Printed are medians over
pairs; the two must have the same parameters, bit for bit, in the end.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import time

import numpy as np

from hpctrain.autograd import Tape, Variable
from hpctrain.device import open_device
from hpctrain.models import build
from hpctrain.mpi.start import start
from hpctrain.mpi.topology import topology
from hpctrain.nn.layout import Store
from hpctrain.nn.losses import softmax_cross_entropy
from hpctrain.optim import SGD
from hpctrain.parallel import DataParallel
from hpctrain.parallel.buckets import bucket_ranges, suited_bytes
from hpctrain.sections import Mlp

FEATURES, CLASSES = 1024, 10
STEPS = 6  # in a row: only the last one has no forward pass after it to hide behind


class Training:
    """A network of `layers` square layers, and how it is exchanged."""

    def __init__(self, where, device, args, overlap):
        self.where, self.device = where, device
        self.model = build(Mlp(hidden=(FEATURES,) * args.layers), (FEATURES,), CLASSES)
        layouts = self.model.layouts(np.float32)
        layout = layouts.parameters
        self.nbytes = layout.size * 4
        size = int(args.bucket_mib * 2**20) or suited_bytes(self.nbytes)
        buckets = bucket_ranges(layout, size)
        self.count = len(buckets)
        self.parallel = DataParallel(where, device, layout, SGD(), buckets=buckets, overlap=overlap)
        averages = Store(layouts.averages, device.zeros(layouts.averages.size, np.float32))
        sums = Store(layouts.sums, device.zeros(layouts.sums.size, np.float32))
        self.model.bind(self.parallel.parameters, averages, self.parallel.gradients, sums)
        named = self.model.parameters()
        self.parallel.set_parameters(lambda name: named[name].initial(1, name))
        self.names = {id(parameter): name for name, parameter in named.items()}
        for name, parameter in named.items():
            parameter.arrive = lambda name=name: self.parallel.arrive(name)
        self.steps = 0

    def compute(self, x, labels):
        """Forward and backward."""
        tape = Tape(
            self.device, ready=lambda p: self.parallel.ready(self.names[id(p)]), step=self.steps
        )
        losses, _ = softmax_cross_entropy(tape, self.model(tape, Variable(x)), labels)
        tape.backward(losses)
        tape.finish(self.model.parameters().values())

    def step(self, x, labels):
        """Seconds of a step, and of what came after its backward pass."""
        begun = time.perf_counter()
        self.compute(x, labels)
        computed = time.perf_counter()
        self.parallel.update(self.steps, 1e-3, len(x) * self.where.size)
        self.steps += 1
        ended = time.perf_counter()
        return ended - begun, ended - computed

    def digest(self):
        """Of all parameters, once they are there."""
        self.parallel.slices.arrive()
        return hashlib.sha256(self.parallel.parameters.array.tobytes()).hexdigest()


def samples(device, rank, count):
    """A batch drawn for this rank."""
    rng = np.random.default_rng(rank)
    x = rng.standard_normal((count, FEATURES), np.float32)
    return device.from_host(x), device.from_host(rng.integers(0, CLASSES, count))


def suited_batch(where, device, args):
    """The batch for which communication takes its share of a step, one after the other."""
    comm, share, batch = where.comm, args.share, 64
    training = Training(where, device, args, "off")
    for _ in range(3):
        x, labels = samples(training.device, comm.rank, batch)
        training.step(x, labels)
        found = [training.step(x, labels) for _ in range(3)]
        whole, after = (comm.allreduce(statistics.median(row)) for row in zip(*found, strict=True))
        wanted = after * (1 - share) / share
        batch = int(np.clip(batch * wanted / (whole - after), 16, 16384))
    training.parallel.free()
    return batch


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batch", type=int, default=0, help="per rank; 0: as --share wants")
    parser.add_argument("--share", type=float, default=0.5, help="of communication in a step")
    parser.add_argument("--bucket-mib", type=float, default=0.0, help="0: as in training")
    parser.add_argument("--pairs", type=int, default=15)
    args = parser.parse_args()
    device, comm = open_device("cpu"), start()
    device.prepare(["float32"], comm)
    with topology(comm) as where:
        batch = args.batch or suited_batch(where, device, args)
        x, labels = samples(device, comm.rank, batch)
        plain, behind = (Training(where, device, args, overlap) for overlap in ("off", "on"))
        for training in (plain, behind):
            training.step(x, labels)
        times = {"plain": [], "after": [], "behind": [], "ratio": []}
        for pair in range(args.pairs):
            done = {}
            for training in (plain, behind) if pair % 2 else (behind, plain):
                comm.Barrier()
                begun = time.perf_counter()
                for _ in range(STEPS):  # parameters arrive during the next step's forward pass
                    done[training] = training.step(x, labels)
                training.parallel.slices.arrive()
                done[training] = ((time.perf_counter() - begun) / STEPS, done[training][1])
            times["plain"].append(done[plain][0])
            times["after"].append(done[plain][1])
            times["behind"].append(done[behind][0])
            times["ratio"].append(done[behind][0] / done[plain][0])
        show(comm, args, batch, plain, behind, times)
        for training in (plain, behind):
            training.parallel.free()


def show(comm, args, batch, plain, behind, times):
    """Print the medians; rank 0."""
    parameters = {d for training in (plain, behind) for d in comm.allgather(training.digest())}
    middle = {name: statistics.median(values) for name, values in times.items()}
    if comm.rank:
        return
    print(
        f"{comm.size} nodes, {plain.nbytes / 2**20:.0f} MiB of gradients in {plain.count} buckets, "
        f"{batch} samples per rank, {args.pairs} pairs of {STEPS} steps"
    )
    print(f"exchange after the backward pass: {middle['plain'] * 1e3:.0f} ms per step,")
    print(f"    of which communication and update {middle['after'] / middle['plain']:.0%}")
    print(f"exchange behind the computation:  {middle['behind'] * 1e3:.0f} ms per step")
    low, high = min(times["ratio"]), max(times["ratio"])
    print(f"ratio {middle['ratio']:.3f} (median of pairs; {low:.3f} to {high:.3f})")
    print(f"parameters are the same, bit for bit: {'yes' if len(parameters) == 1 else 'NO'}")


if __name__ == "__main__":
    main()
