"""What tools/bench_nodes.py runs on every rank: all-reduces, and plain sockets, side by side.

    bench_nodes_rank.py mpi BYTES REPEAT        only MPI_Allreduce
    bench_nodes_rank.py all BYTES REPEAT        all that are ours, MPI_Allreduce and plain sockets

Rank 0 prints one line, "found " and a list as JSON: for each contender its name, the seconds of
every round (from a barrier to the last rank's end) and, of the node that sent most, the payload
bytes that its ranks send to other nodes by the formula and the bytes that its interface counted.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hpctrain.collectives.algorithms import PRESETS, Level, all_reduce
from hpctrain.collectives.buffers import Buffers
from hpctrain.collectives.interpreter import Interpreter, node_list
from hpctrain.collectives.ports import BFLOAT16
from hpctrain.collectives.schedule import Send
from hpctrain.device.cpu import CpuDevice
from hpctrain.mpi import messages, start
from hpctrain.mpi.topology import Topology, topology

if TYPE_CHECKING:
    from mpi4py import MPI

Array = np.ndarray[Any, Any]
PORT = 5777
CHUNK = 1 << 18  # bytes in one call to a socket
ENOUGH = 16 << 20  # bytes to send before counters are believed


@dataclass
class Contender:
    """`run` replaces `array` by its sum; `payload` bytes go from this rank to other nodes."""

    name: str
    run: Callable[[], None]
    payload: int = 0
    array: Array | None = None

    def fill(self, rank: int) -> None:
        if self.array is not None:
            self.array[:] = rank + 1

    def check(self, size: int) -> None:
        if self.array is not None and (self.array != size * (size + 1) // 2).any():
            raise SystemExit(f"{self.name}: a wrong sum")


class Sockets:
    """As many bytes as an all-reduce needs, by one connection from each node to the next."""

    def __init__(self, where: Topology, nbytes: int) -> None:
        self._comm, self.nbytes = where.leaders, 0
        if self._comm is None:
            return
        nodes = self._comm.size
        self.nbytes = 2 * nbytes * (nodes - 1) // nodes
        with socket.create_server(("", PORT), backlog=1) as server:
            self._comm.Barrier()
            following = (self._comm.rank + 1) % nodes
            self._out = socket.create_connection((f"10.77.0.{following + 1}", PORT))
            self._in, _ = server.accept()

    def run(self) -> None:
        if self._comm is None:
            return
        sending = threading.Thread(target=self._send)
        sending.start()
        room = bytearray(CHUNK)
        left = self.nbytes
        while left:
            left -= self._in.recv_into(room, min(left, CHUNK))
        sending.join()

    def _send(self) -> None:
        data, left = memoryview(bytearray(CHUNK)), self.nbytes
        while left:
            left -= self._out.send(data[: min(left, CHUNK)])


def scheduled(where: Topology, nbytes: int) -> list[Contender]:
    """Our schedules, all on the same buffer. Collective."""
    device, n = CpuDevice(), nbytes // 4
    device.prepare(["float32", "bfloat16"], where.comm)
    in_turn = topology(where.comm.Split(0, where.local_rank * where.size + where.node_index))
    buffers = Buffers(where, device, n, "float32")
    array, peers = buffers.array, buffers.peers
    short = (Level("peer", "node"), Level("direct", wire=BFLOAT16))
    choices: list[tuple[str, Topology, tuple[Level, ...], dict[str, Any]]] = [
        ("two-level", where, PRESETS["two-level"], {}),
        ("two-level, in 2 pieces", where, PRESETS["two-level"], {"depth": 2}),
        ("two-level, bfloat16 between nodes", where, short, {}),
        ("ring in the order of nodes", where, PRESETS["ring"], {}),
        ("ring placed round-robin", in_turn, PRESETS["ring"], {"by_node": False}),
    ]
    found = []
    for name, at, levels, options in choices:
        nodes = node_list(at)
        schedule = all_reduce(nodes, n, 4, levels, name=name, **options)
        program = Interpreter(at, device, schedule, array, peers if at is where else {})
        payload = sum(
            schedule.nbytes(message)
            for turn in schedule.rounds(at.rank)
            for message in turn.messages
            if isinstance(message, Send) and nodes[message.peer] != nodes[at.rank]
        )
        found.append(Contender(name, checked(program, at.rank), payload, array))
    return found


def checked(program: Interpreter, rank: int) -> Callable[[], None]:
    """A run whose messages are as many, and of as many bytes, as the schedule's formula says."""

    def run() -> None:
        program.run()
        if program.moved != program.schedule.traffic(rank):
            raise SystemExit(f"{program.schedule.name}: moved {program.moved}, not the formula's")

    return run


def of_mpi(comm: MPI.Intracomm, nbytes: int) -> Contender:
    array = np.empty(nbytes // 4, np.float32)
    return Contender("MPI_Allreduce", lambda: messages.allreduce(comm, array), 0, array)


def sent() -> int:
    """Bytes that this node's interface has sent."""
    text = Path("/proc/net/dev").read_text()
    [line] = [line for line in text.splitlines() if line.strip().startswith("eth0:")]
    return int(line.partition(":")[2].split()[8])


def counted(where: Topology, contender: Contender, times: int) -> int:
    """Bytes that this node's interface sends in so many runs, with what frames them. Collective."""
    where.comm.Barrier()
    before = sent()
    where.comm.Barrier()  # nobody sends before all have read their counters
    for _ in range(times):
        contender.run()
    where.comm.Barrier()
    after = sent()
    where.comm.Barrier()
    return after - before


def measure(where: Topology, contenders: list[Contender], nbytes: int, repeat: int) -> Any:
    """One record for each contender, complete on rank 0. Collective."""
    seconds: list[list[float]] = [[] for _ in contenders]
    for turn in range(repeat + 1):  # the first is for warming up and checking
        for contender, times in zip(contenders, seconds, strict=True):
            contender.fill(where.rank)
            where.comm.Barrier()
            begun = time.perf_counter()
            contender.run()
            took = where.comm.allreduce(time.perf_counter() - begun, op=largest())
            contender.check(where.size)
            if turn:
                times.append(took)
    runs = max(ENOUGH // nbytes, 1)
    found = []
    for contender, times in zip(contenders, seconds, strict=True):
        idle = counted(where, contender, 0)
        bytes_sent = (counted(where, contender, runs) - idle) / runs
        payload = where.node.allreduce(contender.payload)
        most = where.comm.allreduce((payload, bytes_sent), op=largest())
        found.append(
            {"name": contender.name, "seconds": times, "payload": most[0], "sent": most[1]}
        )
    return found


def largest() -> MPI.Op:
    from mpi4py import MPI

    return MPI.MAX


def main() -> None:
    which, nbytes, repeat = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    world = start.start()
    with topology(world) as where:
        contenders = [of_mpi(where.comm, nbytes)]
        if which == "all":
            sockets = Sockets(where, nbytes)
            contenders += scheduled(where, nbytes)
            contenders.append(Contender("plain sockets", sockets.run, sockets.nbytes))
        found = measure(where, contenders, nbytes, repeat)
    if world.rank == 0:
        print("found", json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
