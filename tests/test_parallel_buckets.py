"""Buckets: cut at tensors, near the wanted size; which of them are complete."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hpctrain.nn.layout import Layout
from hpctrain.parallel.buckets import Readiness, bucket_ranges, suited_bytes

MIB = 1 << 20
layouts = st.lists(st.integers(0, 5000), max_size=12).map(
    lambda sizes: Layout([(f"t{k}", (size,), True) for k, size in enumerate(sizes)], "float32")
)


@given(layouts, st.integers(1, 20_000))
def test_buckets_are_the_layout_cut_at_tensors(layout, nbytes):
    buckets = bucket_ranges(layout, nbytes)
    ends = [0, *(stop for _, stop in buckets)]
    assert [start for start, _ in buckets] == ends[:-1] and ends[-1] == layout.size
    assert {start for start, _ in buckets} <= {0, *(entry.offset for entry in layout.entries)}
    longest = max([entry.size for entry in layout.entries], default=0)
    assert all(stop - start < nbytes / 2 + longest + 32 for start, stop in buckets)


@given(layouts, st.integers(1, 20_000), st.randoms(use_true_random=False))
def test_complete_buckets_are_counted_from_the_first_on(layout, nbytes, random):
    buckets = bucket_ranges(layout, nbytes)
    readiness = Readiness(layout, buckets)
    for _ in range(2):
        names = [entry.name for entry in layout.entries]
        random.shuffle(names)
        told = set()
        for name in names:
            told.add(name)
            complete = [
                all(entry.name in told for entry in layout.entries if start <= entry.offset < stop)
                for start, stop in buckets
            ]
            counted = readiness.done(name)
            empty = [entry for entry in layout.entries if not entry.size]
            if not empty:
                assert counted == (complete + [False]).index(False)
        if names:
            assert counted == len(buckets)
        readiness.reset()


def test_a_tensor_that_several_buckets_share_holds_all_of_them_up():
    layout = Layout([("a", (32,), True), ("b", (64,), True)], "float32")
    readiness = Readiness(layout, [(0, 16), (16, 64), (64, 96)])
    assert readiness.buckets("a") == [0, 1] and readiness.buckets("b") == [1, 2]
    assert readiness.done("b") == 0
    assert readiness.done("a") == 3


def test_the_size_that_suits():
    assert suited_bytes(0) == suited_bytes(3 * MIB) == MIB
    assert suited_bytes(80 * MIB) == 10 * MIB
    assert suited_bytes(1000 * MIB) == 25 * MIB
