"""What a user types: the compose file as it is, with nothing on top of it."""

from __future__ import annotations

import json
import os
import re
import subprocess

import pytest

from tests.cluster.processes import ROOT, free_port
from tests.containers import engine

pytestmark = [pytest.mark.hosts, pytest.mark.compose]


class Project:
    """docker/compose.yaml under a name of its own; images are built already."""

    def __init__(self, *files: str) -> None:
        self.name = f"pm{os.getpid():x}up"
        self.env = os.environ | {"COMPOSE_PROJECT_NAME": self.name, "PARAMESH_PORT": str(free_port())}
        self.command = ["docker", "compose", *(word for file in files for word in ("-f", str(ROOT / file)))]

    def run(self, *words: str, deadline: float = 60.0) -> subprocess.CompletedProcess[str]:
        """One command of compose."""
        return subprocess.run(
            [*self.command, *words], env=self.env, capture_output=True, text=True, cwd=ROOT, timeout=deadline
        )


@pytest.fixture
def project():
    """The project; taken away with the test."""
    one = Project("docker/compose.yaml")
    yield one
    print(one.run("logs", "--tail", "40").stdout)
    one.run("down", "-v", "-t", "1")


def test_the_compose_file_trains_digits(project, say):
    """`up --exit-code-from driver`: healthy in order, trained by both workers, exit status 0."""
    up = project.run("up", "--exit-code-from", "driver", deadline=170)
    assert up.returncode == 0, up.stdout[-5000:] + up.stderr[-2000:]
    accuracy = [float(value) for value in re.findall(r"test accuracy ([\d.]+)%", up.stdout)]
    assert len(accuracy) == 2, up.stdout[-5000:]
    say(accuracy=accuracy[0])
    assert min(accuracy) > 90


@pytest.mark.long
def test_a_script_that_is_not_there_is_the_exit_status(project, tmp_path):
    """Whoever types the command hears that the job failed, though each container's end ends all."""
    wrong = {"command": ["/no/such/script.py"]}
    file = tmp_path / "wrong.yaml"
    file.write_text(json.dumps({"services": {"worker-0": wrong, "worker-1": wrong}}))
    project.command += ["-f", str(file)]
    up = project.run("up", "--exit-code-from", "driver", deadline=170)
    assert up.returncode == 1, up.stdout[-5000:]


def test_images_hold_no_compiler_and_run_as_nobody(say):
    """Non-root, no gcc, no pip in the venv; a coordinator's image has no torch."""
    script = "id -u; command -v gcc cc; ls /opt/paramesh/lib/python3*/site-packages | grep -cE '^(torch|pip)$'"
    seen = {}
    for target in engine.IMAGES:
        done = subprocess.run(
            ["docker", "run", "--rm", "--network", "none", "--entrypoint", "sh", f"paramesh-{target}", "-c", script],
            capture_output=True, text=True,
        )  # fmt: skip
        seen[target] = done.stdout.split()
    size = subprocess.run(
        ["docker", "image", "inspect", "-f", "{{.Size}}", *(f"paramesh-{target}" for target in engine.IMAGES)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    say(**{target: f"{int(each) >> 20}MiB" for target, each in zip(engine.IMAGES, size.stdout.split(), strict=True)})
    assert seen == {
        "coordinator": ["10001", "0"], "server": ["10001", "1"], "worker": ["10001", "1"], "tools": ["10001", "0"],
    }  # fmt: skip
