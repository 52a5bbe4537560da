"""Replication in one thread: the real pure cores in a world of a seeded clock, network and faults."""
