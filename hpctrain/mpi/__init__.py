"""MPI: start-up, the map of ranks to nodes, memory that a node's ranks share, plain messages.

The only package that imports mpi4py, and only in functions or in modules that `import hpctrain`
does not reach. Everything above is handed a communicator or a `Topology`.

Layer 1, beside device.
"""
