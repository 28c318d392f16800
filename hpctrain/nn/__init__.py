"""Networks: layouts and stores, operations, layers and losses.

Layer 2, beside collectives and data. Knows nothing of ranks, files and optimizers.
"""
