"""Every kernel through cuda.py on a simulated GPU: the same bits as on the CPU."""

import cases_batch_norm  # noqa: F401
import cases_flat  # noqa: F401
import cases_images  # noqa: F401
import cases_rows  # noqa: F401
import cases_samples  # noqa: F401
import cases_sums  # noqa: F401
import cases_winograd  # noqa: F401
import numpy as np
import pytest
from kernel_cases import CASES
from kernel_checks import DTYPES, DTYPES16, device_for, same_bits
from simulated import open_sim

from hpctrain.device.signatures import kernel_table


def run(device, case):
    """The outputs of a case by argument index."""
    keep = [
        [device.from_host(part) for part in value] if isinstance(value, list)
        else device.from_host(value) if isinstance(value, np.ndarray)
        else value
        for value in case.args
    ]  # fmt: skip
    args = [device.peers(value) if isinstance(value, list) else value for value in keep]
    device.launch(case.kernel, *args, work=case.work)
    return {index: device.to_host(args[index]) for index in case.expected}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [*DTYPES, *DTYPES16])
def test_the_same_bits_as_on_the_cpu(name, dtype):
    sizes = CASES[name].sizes
    device = open_sim()
    for size in (sizes[0], sizes[-1]):
        case = CASES[name].build(dtype, size)
        same_bits(run(device_for(), case), run(device, case), f"{case.kernel} {dtype} {size}")


def test_there_is_a_case_for_every_kernel():
    built = {family.build("float32", family.sizes[0]).kernel for family in CASES.values()}
    assert built == set(kernel_table())
