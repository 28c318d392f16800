"""Training and evaluation of a run, by its run file.

Layer 5. `train` and `evaluate` are the loops; `Session` holds what they work on.
"""
