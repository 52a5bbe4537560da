"""What people deploy, checked without an engine and without a cluster: compose files, manifests, the Dockerfile."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import pathlib
import re
import subprocess
import sys
from typing import Any

import kubernetes_validate
import pytest
import yaml
from paramesh_coordinator import cli as coordinator_cli
from paramesh_server import cli as server_cli
from paramesh_worker.config import WorkerConfig
from typer.main import get_command

ROOT = pathlib.Path(__file__).parents[2]
KUBERNETES = ROOT / "deploy" / "kubernetes"
COMPOSE = [*sorted((ROOT / "docker").glob("compose*.yaml")), ROOT / "tests" / "containers" / "compose.ci.yaml"]
VERSION = "1.31"
"""The oldest Kubernetes of which the manifests say that they run there."""

Document = dict[str, Any]


@pytest.mark.parametrize("file", COMPOSE, ids=lambda file: file.name)
def test_compose_files_follow_the_specification(file):
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_compose_file_is_what_it_says():
    services = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())["services"]
    assert sorted(services) == [
        "coordinator", "driver", "server-0", "server-1", "server-2", "worker-0", "worker-1",
    ]  # fmt: skip
    assert "--replicas=2" in services["coordinator"]["command"]
    for name, service in services.items():
        assert "container_name" not in service
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        assert service.get("restart", "no") == ("on-failure" if name.startswith(("coord", "server")) else "no")


def documents(folder: pathlib.Path) -> list[Document]:
    """The manifests of a folder, with the patches of an overlay applied to those below it."""
    plan = yaml.safe_load((folder / "kustomization.yaml").read_text())
    found: list[Document] = []
    for resource in plan["resources"]:
        path = (folder / resource).resolve()
        found += documents(path) if path.is_dir() else [d for d in yaml.safe_load_all(path.read_text()) if d]
    for patch in plan.get("patches", []):
        change = yaml.safe_load((folder / patch["path"]).read_text())
        targets = [d for d in found if named(d) == named(change)]
        assert len(targets) == 1, f"{patch['path']} patches {named(change)}, which is there {len(targets)} times"
        merge(targets[0], change)
    return found


def named(document: Document) -> tuple[str, str]:
    return document["kind"], document["metadata"]["name"]


def merge(into: Document, change: Document) -> None:
    """A strategic merge, as far as these patches use it: lists of things with names by name, None removes."""
    for key, value in change.items():
        if value is None:
            into.pop(key, None)
        elif isinstance(value, dict) and isinstance(into.get(key), dict):
            merge(into[key], value)
        elif isinstance(value, list) and value and isinstance(value[0], dict) and "name" in value[0]:
            merge_by_name(into.setdefault(key, []), value)
        else:
            into[key] = copy.deepcopy(value)


def merge_by_name(into: list[Document], change: list[Document]) -> None:
    for one in change:
        same = [item for item in into if item["name"] == one["name"]]
        if same:
            merge(same[0], one)
        else:
            into.append(copy.deepcopy(one))


def folders() -> list[pathlib.Path]:
    return sorted(file.parent for file in KUBERNETES.rglob("kustomization.yaml"))


@pytest.mark.parametrize("folder", folders(), ids=lambda folder: folder.name)
def test_manifests_are_valid_in_every_field(folder):
    for document in documents(folder):
        kubernetes_validate.validate(document, VERSION, strict=True)


def test_a_wrong_field_is_found():
    """That the validation above can fail."""
    (server,) = (d for d in documents(KUBERNETES / "base") if named(d) == ("StatefulSet", "server"))
    server["spec"]["template"]["spec"]["terminationGracePeriod"] = 1
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(server, VERSION, strict=True)


def test_every_manifest_is_listed():
    listed = {
        (folder / entry).resolve()
        for folder in folders()
        for plan in [yaml.safe_load((folder / "kustomization.yaml").read_text())]
        for entry in [*plan["resources"], *(patch["path"] for patch in plan.get("patches", []))]
    }
    assert {file for file in KUBERNETES.rglob("*.yaml") if file.name != "kustomization.yaml"} <= listed


def pods(folder: str) -> dict[str, Document]:
    """Pod specifications by the name of what makes them."""
    return {
        d["metadata"]["name"]: d["spec"]["template"]["spec"]
        for d in documents(KUBERNETES / folder)
        if d["kind"] in ("StatefulSet", "Job")
    }


@pytest.mark.parametrize("folder", ["base", "overlays/tls"])
def test_pods_are_locked_down_and_bounded(folder):
    for name, pod in pods(folder).items():
        (container,) = pod["containers"]
        assert pod["securityContext"]["runAsNonRoot"], name
        assert container["securityContext"]["readOnlyRootFilesystem"], name
        assert container["resources"]["limits"]["memory"], name


def test_under_tls_nothing_is_insecure_and_no_probe_is_plain():
    base, tls = pods("base"), pods("overlays/tls")
    for name in ("coordinator", "server"):
        (plain,), (container,) = base[name]["containers"], tls[name]["containers"]
        assert "--insecure" in plain["args"]
        # The patch repeats the arguments: none may be forgotten, and only hosts may differ.
        flags = [arg.partition("=")[0] for arg in plain["args"] if arg != "--insecure"]
        assert [arg.partition("=")[0] for arg in container["args"]] == flags
        probes = {key: value for key, value in container.items() if key.endswith("Probe")}
        assert len(probes) == 3
        assert not any("grpc" in probe for probe in probes.values()), name


@pytest.mark.parametrize(("name", "app"), [("coordinator", coordinator_cli.app), ("server", server_cli.app)])
@pytest.mark.parametrize("folder", ["base", "overlays/tls"])
def test_manifests_use_flags_that_exist(folder, name, app):
    known = {flag for parameter in get_command(app).params for flag in parameter.opts}
    (container,) = pods(folder)[name]["containers"]
    assert {arg.partition("=")[0] for arg in container["args"]} <= known


def test_a_budget_selects_its_pods():
    found = documents(KUBERNETES / "base")
    labels = {d["metadata"]["name"]: d["spec"]["template"]["metadata"]["labels"] for d in found if d["kind"] in PODDED}
    for document in found:
        if document["kind"] == "PodDisruptionBudget":
            assert document["spec"]["selector"]["matchLabels"] == labels[document["metadata"]["name"]]


PODDED = ("StatefulSet",)


def test_the_dockerfile_runs_nobody_as_root_and_fetches_no_frontend():
    text = (ROOT / "docker" / "Dockerfile").read_text()
    assert "# syntax=" not in text
    for stage in re.split(r"^FROM ", text, flags=re.MULTILINE):
        if "ENTRYPOINT" in stage:
            assert re.findall(r"^USER (\S+)", stage, re.MULTILINE)[-1] == "paramesh", stage
            assert '"tini", "--"' in stage


def driver() -> Any:
    spec = importlib.util.spec_from_file_location("driver", ROOT / "docker" / "driver.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


LIVE, GONE = {"state": "live"}, {"state": "left"}
DONE = {"role": "worker", "slot": "a/0", "reason": "left"}
FAILED = {"role": "worker", "slot": "b/0", "reason": "exit code 1"}


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        ({}, None),
        ({"hosts": [LIVE, GONE], "workers": [DONE]}, None),
        ({"hosts": [GONE, GONE], "workers": [DONE]}, ""),
        ({"hosts": [GONE, GONE], "workers": [DONE, FAILED]}, "b/0: exit code 1"),
        ({"hosts": [GONE, GONE], "workers": [FAILED, {**FAILED, "reason": "left"}]}, ""),
        ({"hosts": [GONE, GONE], "workers": []}, "no worker ever joined"),
    ],
)
def test_the_driver_says_what_became_of_the_job(found, verdict):
    assert driver().verdict(found, machines=2) == verdict


SCRIPTS = [
    *(ROOT / "deploy" / "slurm").iterdir(),
    *(ROOT / "tests" / "containers").glob("*.sh"),
    ROOT / "docker" / "install.sh",
]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_scripts_can_be_read_by_the_shell(script):
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def known_flags(program: str) -> set[str]:
    if program == "ps-worker":
        return {"--" + field.name.replace("_", "-") for field in dataclasses.fields(WorkerConfig)}
    app = {"ps-coordinator": coordinator_cli.app, "ps-server": server_cli.app}[program]
    return {flag for parameter in get_command(app).params for flag in parameter.opts}


HOSTS = [*(ROOT / "deploy" / "systemd").iterdir(), *(ROOT / "deploy" / "slurm").iterdir()]


@pytest.mark.parametrize("file", HOSTS, ids=lambda file: file.name)
def test_hosts_start_commands_with_flags_that_exist(file):
    text = file.read_text().replace("\\\n", " ")
    commands = re.findall(r"^(?!#).*?bin/(ps-\w+)\"? (.*)$", text, re.MULTILINE)
    assert commands
    for program, rest in commands:
        assert set(re.findall(r"(?<!\S)--[a-z-]+", rest)) <= known_flags(program), (program, rest)
