"""One cluster interface for every test, on two backends.

    with ProcessCluster(servers=2) as cluster:              # real `ps-coordinator`, `ps-server`
        worker = cluster.start_worker("tests.cluster.bodies:train_linear", steps=20)
        cluster.wait_until(lambda: worker.events("step"), 20, "the first step")
        cluster.kill("server-0")

A test that takes the `cluster_factory` fixture of tests/conftest.py is written once and
runs on both. Worker bodies are plain functions that get a `Desk` (see desk.py) to talk to
the test through; they use `paramesh` as a user's script does.
"""
