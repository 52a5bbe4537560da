"""A cluster on several hosts, each with an address of its own, and the wires between them cut, slowed and made to lose.

One interface (`hosts.HostCluster`), three backends: `compose` (containers of docker/), `netns` (network namespaces of
this machine) and `processes` (loopback: nodes can be killed and stopped, wires cannot be cut). The scenarios are
written once. `make containers`, `make netns` and `make hosts BACKEND=processes` run them.
"""
