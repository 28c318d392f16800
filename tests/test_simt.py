"""The SIMT simulator finds planted mistakes, passes what is right, and agrees with the host target.

tests/planted/*.cu holds the kernels with mistakes, each beside its right counterpart. The cases of
kernel_cases.py run every kernel of cuda/ with two block sizes and several orders of threads.
"""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest
from kernel_cases import CASES
from kernel_checks import DTYPES, compare, device_for, launch, same_bits

from hpctrain.device import simt, simt_library
from hpctrain.device.signatures import kernel_table
from hpctrain.errors import KernelError

PLANTED = Path(__file__).parent / "planted"
for path in sorted(Path(__file__).parent.glob("cases_*.py")):
    importlib.import_module(path.stem)

# Block sizes and orders of threads; every kernel must be right for all.
LAUNCHES = ((32, "forward"), (32, 1), (128, "reverse"), (128, 2))


@pytest.fixture(scope="module", autouse=True)
def compiled():
    """Everything compiled at once, not a file at a time."""
    simt.prepare(DTYPES)


# ---- every kernel


class Simulated:
    """The simulator with the part of a device's interface that launching a case needs."""

    def __init__(self, block, order):
        self._shape = {"block": block, "order": order}

    def from_host(self, array):
        return array.copy()

    to_host = from_host

    def peers(self, arrays):
        return list(arrays)

    def launch(self, name, *args, work):
        simt.launch(name, *args, work=work, **self._shape)

    def synchronize(self):
        pass


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", sorted(CASES))
def test_every_kernel_agrees_with_the_host_target(name, dtype):
    for size in CASES[name].sizes:
        case = CASES[name].build(dtype, size)
        host = launch(device_for(), case)
        for block, order in LAUNCHES:
            outputs = launch(Simulated(block, order), case)
            same_bits(host, outputs, f"{name} {size}: host and {block} threads, {order}")
        compare(case, outputs)


def test_every_kernel_has_a_case():
    with_case = {family.build("float32", family.sizes[0]).kernel for family in CASES.values()}
    assert sorted(set(kernel_table()) - with_case) == []


# ---- planted mistakes

N = 64
BLOCKS = "blocks are not ordered within a launch"
BARRIER = "no __syncthreads lies between"
WARP = "no __syncwarp lies between"
SHORT = np.arange(N - 1, dtype=np.float32)


def run(file, kernel, *args, work=N, block=N, **shape):
    """Launch a kernel of tests/planted on copies of x = 1, 2, ... and y = 0; y and the counts.

    "x", "y" and "flag" among `args` stand for these; n is added at the end.
    """
    x = np.arange(1, N + 1, dtype=np.float32)
    arrays = {"x": x, "y": np.zeros_like(x), "flag": np.zeros(1, np.int32)}
    values = [arrays.get(value, value) if isinstance(value, str) else value for value in args]
    path = PLANTED / f"{file}.cu"
    counts = simt.launch(kernel, *values, N, work=work, block=block, source=path, **shape)
    return arrays, counts


def ints(value, n=N):
    return np.full(n, value, np.int32)


THREE_BLOCKS = {"work": 3 * N}
RACES = [
    ("race_between_blocks", ["y"], THREE_BLOCKS,
     "race: block 1, thread 0 writes y[0] (races.cu:10), which block 0, thread 0 wrote "
     f"(races.cu:10): {BLOCKS}"),
    ("race_same_value", ["y"], THREE_BLOCKS, BLOCKS),
    ("race_in_place", ["x", "x"], {"block": 32},
     "block 1, thread 0 writes y[32] (races.cu:27), which block 0, thread 31 read (races.cu:27)"),
    ("race_missing_barrier", ["x", "y"], {}, "race: block 0, thread 1 writes part[1] "),
    ("race_missing_barrier", ["x", "y"], {"order": "reverse"}, "block 0, thread 31 reads part[63] "
     f"(races.cu:37), which block 0, thread 63 wrote (races.cu:34): {BARRIER}"),
    ("race_missing_barrier", ["x", "y"], {"order": 3}, BARRIER),
    ("race_missing_syncwarp", ["x", "y"], {}, WARP),
    ("race_missing_syncwarp", ["x", "y"], {"order": "reverse"}, WARP),
    ("race_shuffle_is_no_fence", ["x", "y"], {}, f"{WARP}; shuffles order nothing"),
    ("race_half_warps", ["x", "y"], {}, "block 0, thread 0 reads slot[16] (races.cu:90), which "
     f"block 0, thread 16 wrote (races.cu:87): {WARP}"),
    ("race_write_after_reads", ["x", "y"], {}, "block 0, thread 40 writes x[0] (races.cu:108), "
     f"which block 0, thread 0 read (races.cu:107): {BARRIER}"),
    ("race_counter", ["x", "flag"], {}, "writes count[0] (races.cu:122)"),
]  # fmt: skip
BOUNDS = [
    ("write_past_end", ["x", "y"], {}, "writes y[64] (bounds.cu:8), which has 64 elements"),
    ("read_past_end", ["x", "y"], {}, "thread 63 reads x[64] (bounds.cu:13)"),
    ("read_before_start", ["x", "y"], {}, "thread 0 reads x[-1] (bounds.cu:18)"),
    ("add_peers", [["x", SHORT], 2, "y"], {}, "thread 63 reads peers[1][63] (bounds.cu:26)"),
    ("absent_mask", ["x", None, "y"], {}, "reads a null pointer (bounds.cu:34); absent arguments: "
     "mask"),
    ("write_to_const", ["x", "y"], {}, "write to a const array: block 0, thread 0 writes x[0]"),
    ("uninitialized_shared", ["x", "y"], {}, "uninitialized: block 0, thread 0 reads tile[63]"),
    ("shared_of_other_block", ["y"], THREE_BLOCKS, "uninitialized: block 1, thread 0 reads kept"),
    ("shared_past_end", ["x", "y"], {}, "thread 32 uses index 32 of 'float [32]' (bounds.cu:72)"),
    ("local_past_end", ["x", ints(4), "y"], {}, "uses index 4 of 'float [4]' (bounds.cu:82)"),
    ("copy_too_much", ["x", "y"], {}, "block 0, thread 0 reads 260 bytes from x[0] (bounds.cu:"),
    ("divide", [ints(1), ints(0), ints(0), "x"], {}, "division by zero: block 0, thread 0 "),
    ("misaligned", ["x", "y"], {}, "misaligned: block 0, thread 0 uses 4 bytes at x[0]"),
    ("deep_recursion", ["x", "y", N], {"order": "reverse"}, "stack overflow: block 0, thread 6"),
]  # fmt: skip
WAITS = [
    ("barrier_in_branch", ["y"], {}, "divergence at a barrier: block 0: threads 16-63 finished; "
     "threads 0-15 wait in __syncthreads (line 8)"),
    ("barrier_after_return", ["y"], {"grid": 1, "block": 128},
     "threads 64-127 finished; threads 0-63 wait in __syncthreads (line 16)"),
    ("two_barriers", ["y"], {}, "wait in __syncthreads (line 24); threads 0, 2, 4, "),
    ("shuffle_in_branch", ["x", "y"], {}, "divergence at a warp operation: block 0: threads 20-31, "
     "52-63 finished; threads 0-19, 32-51 wait in __shfl_xor_sync (line 34, mask 0xffffffff)"),
    ("shuffle_outside_mask", ["x", "y"], {}, "thread 16 is not in the mask 0x0000ffff"),
    ("shuffle_from_outside", ["x", "y"], {}, "thread 15 reads lane 16, which is not in the mask"),
    ("endless_loop", ["y"], {"limit": 100_000}, "no end: block 0, thread 0 still runs after "),
    ("endless_barriers", ["y"], {"limit": 100_000}, "no end: block 0 still runs after "),
]  # fmt: skip
MISTAKES = [
    (file, *mistake)
    for file, mistakes in (("races", RACES), ("bounds", BOUNDS), ("waits", WAITS))
    for mistake in mistakes
]


@pytest.mark.parametrize("file, kernel, args, shape, says", MISTAKES)
def test_a_mistake_is_found(file, kernel, args, shape, says):
    with pytest.raises(KernelError) as error:
        run(file, kernel, *with_peers(args), **shape)
    assert says in str(error.value)
    assert f"kernel {kernel} (float32, " in str(error.value)
    assert 1 <= str(error.value).count("\n") <= 8


def with_peers(args):
    """A list among the arguments is a table; "x" in it is an array of N elements."""
    full = np.arange(N, dtype=np.float32)
    return [
        [full if isinstance(array, str) else array for array in value]
        if isinstance(value, list)
        else value
        for value in args
    ]


@pytest.mark.parametrize("order", ["forward", "reverse", 0, 7])
@pytest.mark.parametrize(
    "file, kernel, args, shape",
    [
        ("races", "blocks_apart", ["y"], THREE_BLOCKS),
        ("races", "race_in_place", ["x", "y"], {}),  # not in place
        ("races", "block_sum_with_barriers", ["x", "y"], {}),
        ("races", "pass_on_in_warp", ["x", "y"], {}),
        ("races", "swap_in_half_warps", ["x", "y"], {}),
        ("races", "write_after_reads", ["x", "y"], {}),
        ("races", "atomic_counter", ["x", "flag"], {"block": 32}),
        ("races", "bytes_side_by_side", ["x", np.zeros(N, np.uint8)], {}),
        ("bounds", "add_peers", [["x", "x"], 2, "y"], {}),
        ("bounds", "absent_mask", ["x", np.ones(N, np.uint8), "y"], {}),
        ("bounds", "local_past_end", ["x", ints(3), "y"], {}),
        ("bounds", "copy", ["x", "y"], {}),
        ("bounds", "deep_recursion", ["x", "y", 30], {}),
        ("bounds", "divide", [ints(6), ints(2), ints(0), "x"], {}),
        ("waits", "barrier_after_return", ["y"], {}),  # all threads have work
        ("waits", "wait_for_flag", ["flag", "y"], {}),
        ("waits", "many_barriers", ["y"], {}),
    ],
)
def test_what_is_right_passes(file, kernel, args, shape, order):
    run(file, kernel, *with_peers(args), order=order, **shape)


def test_the_end_of_an_array_inside_a_larger_one():
    """Also where another array of the launch lies beside it; an error leaves both unchanged."""
    base = np.arange(1, 3 * N + 1, dtype=np.float32)
    before = base.copy()
    y, x = base[N : 2 * N], base[2 * N :]
    with pytest.raises(KernelError, match=r"writes y\[64\]"):
        run("bounds", "write_past_end", x, y)
    with pytest.raises(KernelError, match=r"reads x\[-1\]"):
        run("bounds", "read_before_start", x, y)
    np.testing.assert_array_equal(base, before)
    run("races", "blocks_apart", y, **THREE_BLOCKS)
    assert list(base[N : N + 3]) == [0, 1, 2]
    base[N : N + 3] = before[N : N + 3]
    np.testing.assert_array_equal(base, before)


def random_script(rng):
    """128 threads in two blocks: a few accesses to a few places, between barriers for all."""
    script = np.zeros((2 * N, 10), np.int32)
    for step in range(script.shape[1]):
        kind = rng.integers(4)
        if kind == 0:
            script[:, step] = -1
        elif kind == 1:
            script[:, step] = -2
        else:
            some = rng.choice(2 * N if rng.integers(8) == 0 else N, 2, replace=False)
            place = rng.integers(4, size=2) + 4 * (some >= N) * rng.integers(1, 3)
            script[some, step] = 2 * (place % 8) + rng.choice([1, 1, 2], 2)
    return script


def races_of(script):
    """Whether two accesses are not ordered, told from every pair of them."""
    uses = [(t, s, script[t, s]) for t, s in zip(*np.nonzero(script > 0), strict=True)]

    def ordered(t, s, other, later):
        between = set(script[t, min(s, later) : max(s, later)])
        return t // N == other // N and (
            -1 in between or (t // 32 == other // 32 and -2 in between)
        )

    return any(
        t != other
        and (code - 1) // 2 == (code2 - 1) // 2
        and (code % 2 == 0 or code2 % 2 == 0)
        and not ordered(t, s, other, later)
        for t, s, code in uses
        for other, later, code2 in uses
    )


def test_races_are_those_that_all_pairs_of_accesses_show():
    rng = np.random.default_rng(2)
    found = []
    for _ in range(400):
        script = random_script(rng)
        memory, out = np.zeros(8, np.float32), np.zeros(2 * N, np.float32)
        order = ["forward", "reverse", int(rng.integers(99))][rng.integers(3)]
        try:
            args = (script.ravel(), memory, out, script.shape[1], 2 * N)
            source = PLANTED / "races.cu"
            simt.launch("follow_script", *args, work=2 * N, block=N, order=order, source=source)
            found.append(False)
        except KernelError as error:
            assert "race: " in str(error)
            found.append(True)
        assert found[-1] == races_of(script), script
    assert 50 < sum(found) < 350  # both are common


# ---- results


def test_block_sum():
    arrays, counts = run("races", "block_sum_with_barriers", "x", "y", work=N, block=32)
    assert list(arrays["y"][:3]) == [sum(range(1, 33)), sum(range(33, 65)), 0]
    assert counts.grid == 2


def test_atomics():
    assert run("races", "atomic_counter", "x", "flag")[0]["flag"][0] == N


def test_copies():
    arrays, _ = run("bounds", "copy", "x", "y")
    assert list(arrays["y"]) == list(range(N))


def test_warp_operations():
    x, t = np.arange(32, dtype=np.float64), np.arange(32)
    out = np.zeros((5, 32))
    path = PLANTED / "waits.cu"
    simt.launch("warp_operations", x, out, 32, work=32, block=32, source=path)
    assert list(out[0]) == list(t // 8 * 8 + 3)
    assert list(out[1]) == list(t ^ 5)
    assert list(out[2]) == list(np.where(t < 2, t, t - 2))
    assert list(out[3]) == list(np.where(t % 16 < 12, t + 4, t))
    assert set(out[4]) == {sum(1 << lane for lane in range(0, 32, 3))}


def turns(order):
    turn = ints(0)
    run("waits", "take_turns", "flag", turn, "x", block=32, order=order)
    return list(turn)


def test_order_of_turns():
    forward = list(range(N))
    assert turns("forward") == forward
    assert turns("reverse") == forward[::-1]
    assert turns(5) == turns(5) != turns(6)
    assert sorted(turns(5)) == forward and turns(5)[:32] != sorted(turns(5)[:32])


@pytest.mark.parametrize("kernel", ["many_warp_syncs", "many_barriers"])
def test_counts(kernel):
    _, counts = run("waits", kernel, "y")
    assert counts == simt.Counts(grid=1, switches=N * (N + 1), accesses=N)


def test_nothing_to_do_and_few_blocks():
    x = np.ones(1000, np.float32)
    assert simt.launch("fill", x, 2.0, 1000, work=0).grid == 0
    assert simt.launch("fill", x, 2.0, 1000, work=1000, block=64).grid == 3
    assert simt.launch("fill", x, 2.0, 1000, work=1000, block=64, grid=7).grid == 7
    assert simt.launch("add_bias", x, x[:10].copy(), 100, 10, work=1, block=64).grid == 1
    assert set(simt.launch("fill", x[:0], 2.0, 0, work=1).__dict__.values()) >= {1}


@pytest.mark.slow
def test_fibers_of_other_architectures(monkeypatch):
    """Switching by swapcontext, as on all but x86-64."""
    options = [*simt_library.RUNTIME_OPTIONS, "-DSIMT_UCONTEXT"]
    monkeypatch.setattr(simt_library, "RUNTIME_OPTIONS", options)
    caches = [simt_library.runtime, simt_library._loaded]
    for cache in caches:
        cache.cache_clear()
    try:
        test_block_sum()
        test_a_mistake_is_found(*MISTAKES[3])
        test_order_of_turns()
    finally:
        for cache in caches:
            cache.cache_clear()


# ---- wrong launches


@pytest.mark.parametrize(
    "says, name, args, shape",
    [
        ("block=48; a block has 32, 64, ", "fill", [SHORT, 1.0, 3], {"block": 48}),
        ("block=0; ", "fill", [SHORT, 1.0, 3], {"block": 0}),
        ("order 'sideways'", "fill", [SHORT, 1.0, 3], {"order": "sideways"}),
        ("no kernel is called 'fil'", "fil", [SHORT, 1.0, 3], {}),
        ("fill takes 3 arguments (y, a, n), not 2", "fill", [SHORT, 1.0], {}),
        ("y has dtype int32; ", "fill", [ints(1), 1.0, 3], {}),
        ("y of shape (32,) is not C-contiguous", "fill", [SHORT[::2], 1.0, 3], {}),
        ("peers is a table of pointers; give the simulator the list", "sum_peers",
         [np.zeros(2, np.uint64), 2, 0, SHORT.copy(), 3], {}),
        ("peers[1] has dtype float64", "sum_peers",
         [[SHORT, np.ones(3)], 2, 0, SHORT.copy(), 3], {}),
        ("waits.cu defines no kernel 'many_barrier'",
         "many_barrier", [SHORT, 1], {"source": PLANTED / "waits.cu"}),
    ],
)  # fmt: skip
def test_a_wrong_launch_is_refused(says, name, args, shape):
    with pytest.raises(KernelError) as error:
        simt.launch(name, *args, work=3, **shape)
    assert says in str(error.value)


@pytest.mark.parametrize(
    "body, says",
    [
        ("atomicAdd(y, x[i]);", "atomics are for integers"),
        ("real own[99999]; own[i] = x[i]; y[i] = own[n - i];", "frame size"),
    ],
)
def test_a_kernel_is_refused(body, says, tmp_path):
    source = tmp_path / "refused.cu"
    source.write_text(
        '#include "kernel.h"\n'
        "ELEMENTS_KERNEL refused(const real* x, real* y, int64 n)\n"
        f"{{ GRID_STRIDE(i, n) {{ {body} }} }}\n"
    )
    with pytest.raises(KernelError, match=says):
        simt.launch("refused", SHORT, SHORT.copy(), 3, work=3, source=source)
