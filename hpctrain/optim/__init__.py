"""Update rules on flat ranges, and learning rates as functions of the step.

Layer 3. Knows nothing of ranks: a rule is given the range of the stores that it must update.
"""

from hpctrain.optim.rules import SGD, AdamW, Range, Rule, square_sum
from hpctrain.optim.schedules import Schedule

__all__ = ["SGD", "AdamW", "Range", "Rule", "Schedule", "square_sum"]
