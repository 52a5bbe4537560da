"""Measurements of Paramesh beside the limits of the machine, taken in the same run.

    python -m benchmarks dense [--json]     synchronous (or other) steps of dense tables
    python -m benchmarks failover [--json]  servers killed under load; Redis and etcd beside it
    python -m benchmarks moves [--json]     partitions that move under load, beside the same without a move
    python -m benchmarks alone              a script without a cluster against plain torch
    python -m benchmarks limits             the machine's limits only

Absolute figures drift by tens of per cent between hours and machines: only ratios to the
limits of the same run mean anything, so no command prints a figure without its limits.
"""
