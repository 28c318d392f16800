"""Collectives: how ranks add up and exchange flat arrays.

Layer 2. Is given a topology and a device; knows nothing of networks and optimizers.
"""
