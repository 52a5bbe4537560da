"""A Docker engine and the images: the one at hand, or a private one; from a registry of images, or made here.

Environment: PARAMESH_TEST_CACHE, a folder outside the repository where the private engine, the stand-ins for base
images and the wheels are kept between runs (default: paramesh-tests in the user's cache).
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.cluster.processes import ROOT
from tests.containers.wires import missing

HERE = Path(__file__).parent
IMAGES = ("coordinator", "server", "worker", "tools")
BUILT = ("coordinator", "server-0", "worker-0", "driver")
"""Services that stand for all of one image."""
STAND_IN = "paramesh-stand-in-"
"""What the names of images that stand for published ones begin with: `-python`, `-etcd`."""

PYTHON_IMAGE = "python:3.11-slim"
PULL_S = 60.0
"""Where there is no registry the answer comes at once; where there is one the image is 50 MB."""


def cache() -> Path:
    """Where what takes long to make is kept."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "paramesh-tests"
    return Path(os.environ.get("PARAMESH_TEST_CACHE", default))


def ready() -> str:
    """An engine that answers and images that are built, in this process's environment; the engine's description.

    Raises:
        pytest.UsageError: there is no engine and none could be started.
    """
    if why := missing():
        raise pytest.UsageError(f"--backend compose: {why}")
    private = not _answers()
    if private:
        _start()
    version = _docker("version", "--format", "{{.Server.Version}}").strip()
    build()
    if private:
        _docker("image", "prune", "-f")  # the images of the build before
    return f"{'private ' if private else ''}engine {version}"


def _answers() -> bool:
    return subprocess.run(["docker", "compose", "version"], capture_output=True).returncode == 0 and (
        subprocess.run(["docker", "info"], capture_output=True).returncode == 0
    )


def _start() -> None:
    done = subprocess.run([str(HERE / "engine.sh"), "up", str(cache() / "engine")], capture_output=True, text=True)
    if done.returncode:
        raise pytest.UsageError(f"--backend compose: no Docker engine, and none could be started:\n{done.stderr}")
    for name, value in re.findall(r"(\w+)=(\S+)", done.stdout):
        os.environ[name] = value.replace("$PATH", os.environ["PATH"])


def stop_private() -> None:
    """End the private engine if it runs; what it built is kept."""
    subprocess.run([str(HERE / "engine.sh"), "down", str(cache() / "engine")], check=False)


def _docker(*words: str) -> str:
    done = subprocess.run(["docker", *words], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"docker {' '.join(words)}: {done.stderr[-3000:]}")
    return done.stdout


def build() -> None:
    """Build what the compose file names."""
    files = [ROOT / "docker" / "compose.yaml"]
    if not _pulled(PYTHON_IMAGE):
        os.environ["WHEELHOUSE"] = str(_made("wheelhouse"))
        os.environ["PYTHON_IMAGE"] = _imported("python", "base")
        files.append(HERE / "compose.ci.yaml")
    given = [word for file in files for word in ("-f", str(file))]
    _docker("compose", *given, "build", "-q", *BUILT)


def etcd_image() -> str:
    """The image of etcd of compose.faults.yaml, or what stands for it."""
    named = re.search(r"ETCD_IMAGE:-([^}]+)", (ROOT / "docker" / "compose.faults.yaml").read_text())
    assert named is not None
    return named.group(1) if _pulled(named.group(1)) else _imported("etcd", "etcd")


def _pulled(image: str) -> bool:
    if subprocess.run(["docker", "image", "inspect", image], capture_output=True).returncode == 0:
        return True
    try:
        return subprocess.run(["docker", "pull", "-q", image], capture_output=True, timeout=PULL_S).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def _made(what: str) -> Path:
    done = subprocess.run([str(HERE / "images.sh"), what, str(cache())], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"images.sh {what}: {done.stderr[-3000:]}")
    return Path(done.stdout.strip())


def _imported(name: str, what: str) -> str:
    tag = STAND_IN + name
    if subprocess.run(["docker", "image", "inspect", tag], capture_output=True).returncode:
        _docker("import", str(_made(what)), tag)
    return tag
