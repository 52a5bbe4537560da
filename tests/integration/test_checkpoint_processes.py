"""Checkpoints with real processes and the commands that people type: random generators and buffers too."""

import json
import os
import pathlib
import re
import socket
import subprocess
import sys

import pytest
import safetensors.torch
import torch

from tests.cluster.waiting import wait_until

SCRIPT = """
import os, random, sys, time
import paramesh, torch
torch.manual_seed(5 + paramesh.rank()); random.seed(paramesh.rank())
model = torch.nn.Sequential(
    torch.nn.Linear(16, 64), torch.nn.BatchNorm1d(64), torch.nn.Tanh(), torch.nn.Dropout(0.3), torch.nn.Linear(64, 1)
)
data = torch.randn(160, 16, generator=torch.Generator().manual_seed(0))
loader = paramesh.DataLoader(torch.utils.data.TensorDataset(data), batch_size=2, shuffle=True, seed=1)
optimizer = paramesh.DistributedOptimizer(torch.optim.Adam(model.parameters(), lr=1e-2), model)
scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
paramesh.state(scheduler=scheduler)
done = 0
for _ in range(2):
    for (x,) in loader:
        optimizer.zero_grad()
        (model(x) * random.uniform(0.9, 1.1) - x.sum(1, keepdim=True)).square().mean().backward()
        optimizer.step()
        scheduler.step()
        done += 1
        while done == 8 and not os.path.exists(sys.argv[1]):
            time.sleep(0.02)
total = sum(value.double().sum() for value in model.state_dict().values()).item()
print("FINAL", paramesh.rank(), total.hex(), random.random(), torch.rand(1).item(), flush=True)
"""


def command(name):
    return pathlib.Path(sys.executable).with_name(name)


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture
def started():
    """Processes of the test; what still runs at its end is killed."""
    running = []
    yield running
    for process in running:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()


def environment():
    return {name: value for name, value in os.environ.items() if not name.startswith("PARAMESH_")}


def ps_run(started, log, *arguments):
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [command("ps-run"), "--plain", *arguments], stdout=output, stderr=subprocess.STDOUT, env=environment()
        )
    started.append(process)
    return process


def psctl(port, *arguments, check=True):
    done = subprocess.run(
        [command("psctl"), "--coordinator", f"127.0.0.1:{port}", *arguments],
        capture_output=True, text=True, timeout=90, env=environment(), check=False,
    )  # fmt: skip
    assert not check or done.returncode == 0, done.stderr
    return done


def finals(log):
    return sorted(re.findall(r"FINAL (.*)", log.read_text()))


@pytest.mark.soak
@pytest.mark.timeout(400)
def test_a_run_is_the_same_from_a_checkpoint_taken_back_to_it_or_begun_with_it(tmp_path, started):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    port, root = free_port(), tmp_path / "checkpoints"
    first_gate, second_gate = tmp_path / "gate-1", tmp_path / "gate-2"
    first = ps_run(
        started, tmp_path / "a.log", "--servers", "2", "--workers", "2", "--port", str(port),
        "--checkpoint-dir", str(root), str(script), str(first_gate),
    )  # fmt: skip

    def step():
        groups = json.loads(psctl(port, "status", "--json", check=False).stdout)["ledger"]["groups"]
        return groups[0]["step"]

    wait_until(lambda: step() == 8, 120, "training to come to the gate")
    psctl(port, "checkpoint", "--name", "one", "--no-wait")
    first_gate.touch()
    wait_until(lambda: (root / "one" / "MANIFEST.json").exists(), 60, "the checkpoint")
    assert first.wait(120) == 0, (tmp_path / "a.log").read_text()[-3000:]
    second = ps_run(
        started, tmp_path / "b.log", "--servers", "3", "--workers", "2", "--port", str(port),
        "--checkpoint-dir", str(root), "--restore", f"{root}/one", str(script), str(second_gate),
    )  # fmt: skip
    wait_until(lambda: step() > 0, 120, "the restore")
    (row,) = json.loads(psctl(port, "checkpoints", "--verify", "--json").stdout)["checkpoints"]
    assert (row["name"], row["complete"], row["level"], row["warnings"]) == ("one", True, "step", [])
    at = row["steps"]["optimizer0"]
    for bad, said in ((["--name", "../x"], "is no name"), (["--level", "aligned"], "a group trains in steps")):
        refused = psctl(port, "checkpoint", *bad, check=False)
        assert (refused.returncode, said in refused.stderr) == (1, True)
    wait_until(lambda: step() == at + 8, 120, "training to come to the gate")
    assert "restored one" in psctl(port, "restore", "one").stdout
    second_gate.touch()
    assert second.wait(120) == 0, (tmp_path / "b.log").read_text()[-3000:]
    text = (tmp_path / "b.log").read_text()
    assert text.count("the job was restored; started again at the checkpoint") == 2, text[-3000:]
    assert len(finals(tmp_path / "a.log")) == 2
    assert finals(tmp_path / "a.log") == finals(tmp_path / "b.log")
    subprocess.run([command("psctl"), "export", f"{root}/one", tmp_path / "net.safetensors"], check=True, timeout=60)
    plain = torch.nn.Sequential(
        torch.nn.Linear(16, 64),
        torch.nn.BatchNorm1d(64),
        torch.nn.Tanh(),
        torch.nn.Dropout(0.3),
        torch.nn.Linear(64, 1),
    )
    plain.load_state_dict(safetensors.torch.load_file(tmp_path / "net.safetensors"))
    assert plain[1].num_batches_tracked == at
