"""Everything is killed after a checkpoint; restored onto 1, 2 and 5 servers, the rest of the run is the same bits.

With the commands that people type and real processes (invariant 24): optimizer state, schedulers,
buffers, random generators, and samples. The export is loaded by a process that cannot import Paramesh.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys

import pytest

from tests.cluster.processes import MARK, kill_all, marked_processes
from tests.cluster.waiting import wait_until
from tests.integration.test_checkpoint_processes import command, environment, finals, free_port, psctl

SCRIPT = """
import os, random, sys, time
import paramesh, torch
torch.manual_seed(5 + paramesh.rank()); random.seed(paramesh.rank())
model = torch.nn.Sequential(
    torch.nn.Linear(16, 64), torch.nn.BatchNorm1d(64), torch.nn.Tanh(), torch.nn.Dropout(0.3), torch.nn.Linear(64, 1)
)
data = torch.randn(160, 16, generator=torch.Generator().manual_seed(0))
loader = paramesh.DataLoader(torch.utils.data.TensorDataset(data), batch_size=2, shuffle=True, seed=1)
inner = {"sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True, weight_decay=1e-3),
         "adam": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True)}[sys.argv[2]](model.parameters())
optimizer = paramesh.DistributedOptimizer(inner, model, partition_bytes=1024)
scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=200)
paramesh.state(scheduler=scheduler)
done = 0
for _ in range(2):
    for (x,) in loader:
        optimizer.zero_grad()
        (model(x) * random.uniform(0.9, 1.1) - x.sum(1, keepdim=True)).square().mean().backward()
        optimizer.step()
        scheduler.step()
        done += 1
        while done == 9 and not os.path.exists(sys.argv[1]):
            time.sleep(0.02)
total = sum(value.double().sum() for value in model.state_dict().values()).item()
print("FINAL", paramesh.rank(), total.hex(), scheduler.get_last_lr()[0].hex(), random.random(), torch.rand(1).item(),
      flush=True)
print("DONE", done, flush=True)
"""

PLAIN = """
import sys
sys.modules["paramesh"] = None  # any import of it is an error
import safetensors.torch, torch
model = torch.nn.Sequential(
    torch.nn.Linear(16, 64), torch.nn.BatchNorm1d(64), torch.nn.Tanh(), torch.nn.Dropout(0.3), torch.nn.Linear(64, 1)
)
print(model.load_state_dict(safetensors.torch.load_file(sys.argv[1])))
print("batches", int(model[1].num_batches_tracked))
"""


class Runs:
    """Starts ps-run on one script, each run with its own log; everything ends with the test."""

    def __init__(self, folder, optimizer: str) -> None:
        self.folder, self.optimizer = folder, optimizer
        self.script = folder / "train.py"
        self.script.write_text(SCRIPT)
        self.root = folder / "checkpoints"
        self.port = free_port()

    def start(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        """A run that waits in its loader's ninth step until its gate is there."""
        args = [*arguments, "--workers", "2", "--port", str(self.port), "--checkpoint-dir", str(self.root)]
        with open(self.log(name), "wb") as output:
            return subprocess.Popen(
                [command("ps-run"), "--plain", *args, str(self.script), str(self.folder / f"gate-{name}"),
                 self.optimizer],
                stdout=output, stderr=subprocess.STDOUT, env=environment() | {MARK: str(self.folder)},
            )  # fmt: skip

    def log(self, name: str):
        """Its output."""
        return self.folder / f"{name}.log"

    def open(self, name: str) -> None:
        """Let it go on."""
        (self.folder / f"gate-{name}").touch()

    def finish(self, process: subprocess.Popen[bytes], name: str) -> list[str]:
        """Let it end well: what each worker printed at the end."""
        self.open(name)
        assert process.wait(180) == 0, self.log(name).read_text()[-3000:]
        found = finals(self.log(name))
        assert len(found) == 2
        return found

    def kill(self) -> None:
        """SIGKILL to everything that was started."""
        wait_until(lambda: not kill_all(left := marked_processes(str(self.folder)), signal.SIGKILL) and not left, 20,
                   "all to be gone")  # fmt: skip


@pytest.fixture
def runs(tmp_path, request):
    made = Runs(tmp_path, request.param)
    yield made
    made.kill()


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("runs", ["sgd", "adam"], indirect=True)
def test_everything_killed_and_restored_onto_1_2_and_5_servers_ends_in_the_same_bits(runs):
    undisturbed = runs.finish(runs.start("whole", "--servers", "2"), "whole")

    killed = runs.start("killed", "--servers", "2")
    wait_until(lambda: b'"step": 9' in psctl(runs.port, "status", "--json", check=False).stdout.encode(), 120, "step 9")
    psctl(runs.port, "checkpoint", "--name", "one", "--no-wait")
    runs.open("killed")
    wait_until(lambda: (runs.root / "one" / "MANIFEST.json").exists(), 60, "the checkpoint")
    runs.kill()
    killed.wait(20)
    assert not finals(runs.log("killed")), "it was killed in its middle"

    for servers in (1, 2, 5):
        name = f"on-{servers}"
        again = runs.start(name, "--servers", str(servers), "--restore", f"{runs.root}/one")
        assert runs.finish(again, name) == undisturbed, servers
        assert {int(n) for n in re.findall(r"DONE (\d+)", runs.log(name).read_text())} == {80 - 10}, "it began anew"

    net = runs.folder / "net.safetensors"
    subprocess.run([command("psctl"), "export", f"{runs.root}/one", net], check=True, timeout=60)
    loaded = subprocess.run([sys.executable, "-c", PLAIN, net], capture_output=True, text=True, timeout=60, check=True)
    assert loaded.stdout == "<All keys matched successfully>\nbatches 10\n"
