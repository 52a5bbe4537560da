"""Lanes: how frames reach a server. gRPC streams today; shared memory comes as a second."""
