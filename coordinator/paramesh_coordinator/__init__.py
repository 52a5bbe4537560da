"""The coordinator: membership, partition map, catalogue, eviction. Control plane only.

A change walks: `servicer -> driver.decide -> (pure) membership | catalog -> Draft ->
store.transact -> state.apply -> map watchers and operations`. Silence walks:
`driver tick -> checkers.Liveness -> membership.node_silent -> ...` the same way.
"""
