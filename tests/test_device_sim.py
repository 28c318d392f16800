"""The simulated GPU, held against cases worked out by hand: orders, streams, memory, counts."""

import numpy as np
import pytest
from simulated import ORDERS, open_sim, outcomes, peek

from hpctrain.device import open_device, visible_gpus
from hpctrain.device.sim import Machine, SimDevice
from hpctrain.errors import DeviceError

N = 3


def fill(device, array, value):
    device.launch("fill", array, value, array.size, work=array.size)


def first(device, array):
    return float(device.to_host(array)[0])


# Orders


def test_late_work_has_not_happened_until_the_host_waits():
    device = open_sim("late")
    x = device.zeros(N, "float64")
    fill(device, x, 5)
    assert np.isnan(peek(x)).all()  # not even the zeros
    device.synchronize()
    assert peek(x).tolist() == [5, 5, 5]


def test_early_work_happens_at_once():
    device = open_sim("early")
    x = device.zeros(N, "float64")
    fill(device, x, 5)
    assert peek(x).tolist() == [5, 5, 5]


@pytest.mark.parametrize("order", ORDERS)
def test_a_stream_keeps_its_order(order):
    """x = ((0 + 1) + x) + x ...: 2^10 after ten doublings, whatever the order."""
    device = open_sim(order)
    x = device.zeros(N, "float64")
    fill(device, x, 1)
    for _ in range(10):
        device.launch("add_into", x, x, N, work=N)
    assert first(device, x) == 1024


def test_two_racing_streams_end_either_way_and_no_other():
    def program(device):
        cuda = device._cupy.cuda
        x = device.zeros(N, "float64")
        device.synchronize()
        streams = [cuda.Stream(non_blocking=True) for _ in range(2)]
        for stream, value in zip(streams, (1, 2), strict=True):
            with stream:
                fill(device, x, value)
        for stream in streams:
            stream.synchronize()
        return peek(x).tolist()

    results = outcomes(program)
    assert results["early"] == results["late"] == [2, 2, 2]
    assert {tuple(result) for result in results.values()} == {(1, 1, 1), (2, 2, 2)}


def consumer(with_event=False, **stream_options):
    """A stream copies what the default stream writes."""

    def program(device):
        cuda = device._cupy.cuda
        x, y = device.zeros(N, "float64"), device.zeros(N, "float64")
        device.synchronize()
        fill(device, x, 5)
        stream = cuda.Stream(**stream_options)
        if with_event:
            stream.wait_event(cuda.get_current_stream().record())
        with stream:
            device.copy(y, x)
        stream.synchronize()
        return peek(y)[0]

    return outcomes(program)


def test_an_event_orders_streams():
    assert set(consumer(with_event=True, non_blocking=True).values()) == {5}


def test_without_an_event_the_result_is_wrong_in_some_order():
    results = consumer(non_blocking=True)
    assert results["early"] == 5 and results["late"] == 0
    assert set(results.values()) == {0, 5}


def test_the_default_stream_orders_blocking_streams():
    assert set(consumer().values()) == {5}


def test_the_default_stream_waits_for_blocking_streams():
    def program(device):
        x, y = device.zeros(N, "float64"), device.zeros(N, "float64")
        device.synchronize()
        with device._cupy.cuda.Stream():
            fill(device, x, 5)
        device.copy(y, x)
        return first(device, y)

    assert set(outcomes(program).values()) == {5}


def test_an_event_stands_for_its_newest_record_at_the_time_of_the_wait():
    device = open_sim("late")
    cuda = device._cupy.cuda
    x, event, other = device.zeros(N, "float64"), cuda.Event(), cuda.Stream(non_blocking=True)
    other.wait_event(event)  # no record yet: waits for nothing
    other.synchronize()
    event.synchronize()
    assert np.isnan(peek(x)).all()
    fill(device, x, 1)
    event.record()
    other.wait_event(event)
    fill(device, x, 2)
    event.record()
    other.synchronize()
    assert peek(x).tolist() == [1, 1, 1]
    assert not event.done
    event.synchronize()
    assert peek(x).tolist() == [2, 2, 2] and event.done


def test_a_loop_that_asks_whether_work_is_done_ends():
    device = open_sim("late")
    x = device.zeros(N, "float64")
    event = device._cupy.cuda.get_current_stream().record()
    assert sum(not event.done for _ in range(5)) == 2  # the zeros, and the record itself
    assert peek(x).tolist() == [0, 0, 0]


def test_devices_have_streams_of_their_own_and_no_hold_on_each_other():
    machine = Machine("late", "host", 2)
    one, two = SimDevice(0, machine), SimDevice(1, machine)
    y = two.zeros(N, "float64")  # opened last: the current device
    assert one.uuid != two.uuid
    one._device.use()
    x = one.zeros(N, "float64")
    with pytest.raises(RuntimeError, match="uses memory of device 1"):
        one.launch("add_into", x, y, N, work=N)


# Copies and memory


def test_copies_to_the_host_happen_late():
    device = open_sim("late")
    x, host = device.from_host(np.arange(3.0)), device.staging(24).view(np.float64)
    ticket = device.download(x, host)
    assert np.isnan(host).all()
    ticket.wait()
    assert host.tolist() == [0, 1, 2]


def test_copies_from_pinned_memory_read_it_late():
    device = open_sim("late")
    x, host = device.zeros(3, "float64"), device.staging(24).view(np.float64)
    host[:] = 1
    ticket = device.upload(host, x)
    host[:] = 2  # too early
    ticket.wait()
    assert peek(x).tolist() == [2, 2, 2]


def test_from_host_reads_at_once():
    device = open_sim("late")
    host = np.arange(3.0)
    x = device.from_host(host)
    host[:] = 9
    assert device.to_host(x).tolist() == [0, 1, 2]


def test_a_copy_through_memory_that_is_not_pinned_waits_and_is_counted():
    device = open_sim("late")
    x, host = device.from_host(np.arange(3.0)), np.empty(3)
    device.download(x, host)
    assert host.tolist() == [0, 1, 2]
    assert device.counts().synchronizations == {"copy": 1}
    device.upload(host, x)
    host[:] = 9
    assert device.to_host(x).tolist() == [0, 1, 2]


def test_fresh_and_freed_memory_is_poisoned_and_used_again_by_its_stream():
    def program(device):
        x, y = device.zeros(1000, "float64"), device.zeros(1000, "float64")
        fill(device, x, 3)
        device.launch("add_into", y, x, 1000, work=1000)
        where = x.data.ptr
        del x  # the work above is pending, but comes before whatever this stream does next
        z = device.empty(999, "float64")
        assert z.data.ptr == where
        poisoned = np.isnan(device.to_host(z)).all()
        return bool(poisoned), first(device, y)

    assert set(outcomes(program).values()) == {(True, 3)}


def test_other_streams_get_other_memory():
    device = open_sim("late")
    x = device.zeros(1000, "float64")
    where = x.data.ptr
    del x
    with device._cupy.cuda.Stream(non_blocking=True):
        assert device.empty(1000, "float64").data.ptr != where
    assert device.empty(1000, "float64").data.ptr == where


def test_memory_freed_under_another_streams_copy_is_seen():
    """What holds the array until the copy is done is `download`'s ticket; here is none."""

    def program(device):
        stream = device._cupy.cuda.Stream(non_blocking=True)
        host = device.staging(24)
        x = device.zeros(3, "float64")
        device.synchronize()
        x.data.copy_to_host_async(host.ctypes.data, 24, stream)
        del x
        y = device.empty(3, "float64")  # the memory of x
        fill(device, y, 7)
        device.synchronize()
        stream.synchronize()
        return str(host.view(np.float64)[0])

    results = outcomes(program)
    assert results["early"] == "0.0" and results["late"] == "7.0"
    assert set(results.values()) <= {"0.0", "nan", "7.0"}


def test_pinned_memory_freed_under_a_copy_is_seen():
    device = open_sim("late")
    x, host = device.zeros(3, "float64"), device.staging(24)
    host.view(np.float64)[:] = 1
    x.data.copy_from_host_async(host.ctypes.data, 24)
    where = host.ctypes.data
    del host
    assert device.staging(20).ctypes.data == where
    assert np.isnan(device.to_host(x)).all()


def test_the_host_cannot_touch_an_array_by_accident():
    device = open_sim()
    x, host = device.zeros(3, "float64"), np.ones(3)
    for access in (
        lambda: np.asarray(x),
        lambda: host + x,
        lambda: x + x,
        lambda: np.copyto(host, x),
        lambda: np.concatenate([x]),
        lambda: float(x[0]),
        lambda: bool(x[0]),
        lambda: memoryview(x),
        lambda: x.__setitem__(0, host),
        lambda: x[[0, 1]],
    ):
        with pytest.raises(TypeError):
            access()
    with pytest.raises((BufferError, RuntimeError)):
        np.from_dlpack(x)


def test_views_share_memory():
    device = open_sim()
    x = device.from_host(np.arange(6.0))
    view = x.reshape(2, 3)[1:].T
    device.copy(view, device.from_host(np.full((3, 1), 9.0)))
    assert device.to_host(x).tolist() == [0, 1, 2, 9, 9, 9]
    assert view.data.ptr == x.data.ptr + 24 and view.shape == (3, 1)
    assert x[5].shape == () and x.view(np.uint8).shape == (48,)
    with pytest.raises(ValueError, match="takes a copy"):
        x.reshape(2, 3).T.reshape(6)


def test_a_capsule_keeps_the_memory():
    device = open_sim()
    x = device.zeros(1000, "float64")
    where = x.data.ptr
    capsule = x.__dlpack__(stream=-1)
    del x
    assert device.empty(1000, "float64").data.ptr != where
    del capsule
    assert device.empty(1000, "float64").data.ptr == where


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_products(dtype):
    device, rng = open_sim(), np.random.default_rng(1)
    a, b = (rng.standard_normal(shape).astype(dtype) for shape in ((4, 3), (4, 5)))
    out = device.empty((3, 5), dtype)
    x, y = device.from_host(a), device.from_host(b)
    device.matmul(x.T, y, out)
    np.testing.assert_array_equal(device.to_host(out), a.T @ b)


def test_products_of_16_bits_are_summed_in_32():
    device = open_sim()
    out = device.empty((1, 1), "float16")
    ones = np.ones((1, 4096), np.float16)
    device.matmul(device.from_host(ones), device.from_host(ones).T, out)
    assert device.to_host(out)[0, 0] == 4096  # ones added in float16 stop at 2048


# Counts, settings, errors


def test_counts():
    """Two fills, a product, 24 bytes up, 24 down, one wait of each kind; 512 bytes a block."""
    device = open_sim()
    device.reset_counts()
    x = device.from_host(np.ones((3, 1)))
    y = device.empty((3, 3), "float64")
    fill(device, x, 1)
    fill(device, x, 2)
    device.matmul(x, x.T, y)
    device.download(x, device.staging(24)).wait()
    device.synchronize()
    device._device.synchronize()
    device.to_host(y)
    del x
    counts = device.counts()
    assert counts.launches == {"fill": 2} and counts.products == 1
    assert counts.copies == {"to device": 1, "to host": 2}
    assert counts.copied == {"to device": 24, "to host": 24 + 72}
    assert counts.synchronizations == {"event": 1, "stream": 1, "device": 1, "copy": 1}
    assert (counts.bytes, counts.peak_bytes) == (512, 1024)
    device.reset_counts()
    counts = device.counts()
    assert not counts.launches and not counts.copied and counts.peak_bytes == 512


def test_settings(monkeypatch):
    monkeypatch.setenv("HPCTRAIN_SIM_DEVICES", "3")
    assert visible_gpus("sim") == 3
    assert open_device("sim", local_rank=4)._device.id == 1
    monkeypatch.setenv("HPCTRAIN_SIM_DEVICES", "0")
    with pytest.raises(DeviceError, match="no GPU can be used"):
        open_device("sim")
    monkeypatch.setenv("HPCTRAIN_SIM_ORDER", "lat")
    with pytest.raises(DeviceError, match="late, early or a number"):
        open_device("sim")
    with pytest.raises(DeviceError, match="did you mean 'host'"):
        Machine("late", "hosts")


def test_copies_of_other_shapes_are_refused():
    device = open_sim()
    x, y = device.zeros(3, "float64"), device.zeros(4, "float64")
    with pytest.raises(DeviceError, match="shape and dtype must be equal"):
        device.copy(x, y)
    with pytest.raises(DeviceError, match="24 bytes on the device and 20 on the host"):
        device.download(x, device.staging(20))
    with pytest.raises(DeviceError, match="cannot use host memory in place"):
        device.wrap(np.zeros(3))


def test_the_cpu_has_the_same_transfers():
    device = open_device("cpu")
    x, host = device.zeros((2, 2), "float64"), device.staging(32)
    host.view(np.float64)[:] = 3
    device.upload(host, x).wait()
    device.launch("add_into", x, x, 4, work=4)
    device.download(x, host).wait()
    assert host.view(np.float64).tolist() == [6, 6, 6, 6]
    assert not device.shared(5, "float32").any() and device.uuid == ""
    with pytest.raises(DeviceError, match="NodeWindow"):
        device.export(x)
