"""The parameter server: holds partitions, applies updates, serves values, hosts the ledger."""
