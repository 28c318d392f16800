"""Who holds what, and when it is exchanged.

Layer 4. `DataParallel` is what training uses; `Communicator` and `DistributedOptimizer` are the
same for loops of one's own.
"""

from hpctrain.parallel.communicator import Communicator
from hpctrain.parallel.data import DataParallel
from hpctrain.parallel.optimizer import DistributedOptimizer

__all__ = ["Communicator", "DataParallel", "DistributedOptimizer"]
