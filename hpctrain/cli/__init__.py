"""The commands of `hpctrain`, one module each; `main` puts them together.

Layer 6, the highest. Only option parsing, and printing what the layers below found out.
"""
