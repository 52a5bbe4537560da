"""The public surface is frozen here; a change of it is a decision, and goes into CHANGELOG."""

import importlib
import inspect
import pkgutil
import subprocess
import sys
import types

import paramesh
import pytest

PUBLIC = {
    "Client": "paramesh.client",
    "DataLoader": "paramesh.data",
    "DistributedOptimizer": "paramesh.optimizer",
    "assign": "paramesh.model_values",
    "barrier": "paramesh.runtime",
    "broadcast": "paramesh.model_values",
    "connect": "paramesh.client",
    "device": "paramesh.runtime",
    "epochs": "paramesh.runtime",
    "export": "paramesh.checkpoint",
    "init": "paramesh.session",
    "is_chief": "paramesh.runtime",
    "load": "paramesh.checkpoint",
    "mean": "paramesh.runtime",
    "pause": "paramesh.runtime",
    "profile": "paramesh.profiling",
    "progress": "paramesh.progress_line",
    "rank": "paramesh.runtime",
    "report": "paramesh.runtime",
    "save": "paramesh.checkpoint",
    "shutdown": "paramesh.session",
    "state": "paramesh.small_state",
    "world_size": "paramesh.runtime",
}

SIGNATURES = {
    "assign": "(model)",
    "barrier": "(name='')",
    "broadcast": "(model)",
    "connect": "(coordinators, job='default', *, timeout=30.0)",
    "device": "()",
    "epochs": "(count)",
    "export": "(path, model)",
    "init": "(coordinator=None, *, job=None, rank=None)",
    "is_chief": "()",
    "load": "(path)",
    "mean": "(value, weight=1.0, name='')",
    "pause": "()",
    "profile": "()",
    "progress": "(iterable, *, label='', total=None)",
    "rank": "()",
    "report": "(**figures)",
    "save": "(path, *, wait=True)",
    "shutdown": "()",
    "state": "(**objects)",
    "world_size": "()",
}


def test_all_is_frozen():
    assert sorted(paramesh.__all__) == sorted([*PUBLIC, "__version__", "errors", "testing"])
    assert dir(paramesh) == sorted(paramesh.__all__)


@pytest.mark.parametrize("name", PUBLIC)
def test_each_name_is_there_documented_and_at_home(name):
    thing = getattr(paramesh, name)
    assert thing.__module__ == PUBLIC[name]
    assert inspect.getdoc(thing)


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_frozen(name):
    signature = inspect.signature(getattr(paramesh, name))
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    assert str(inspect.Signature(bare)) == SIGNATURES[name]


def test_data_loader_takes_torchs_arguments_in_torchs_order():
    import torch.utils.data

    theirs = inspect.signature(torch.utils.data.DataLoader.__init__).parameters
    ours = inspect.signature(paramesh.DataLoader.__init__).parameters
    positional = [n for n, p in theirs.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [n for n, p in ours.items() if p.kind is p.POSITIONAL_OR_KEYWORD] == positional
    assert set(theirs) - set(ours) == set()
    assert set(ours) - set(theirs) == {"seed", "name", "train"}


def test_modules_and_version():
    assert isinstance(paramesh.errors, types.ModuleType)
    assert isinstance(paramesh.testing, types.ModuleType)
    assert paramesh.__version__[0].isdigit()
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        paramesh.nothing  # noqa: B018


def test_no_module_shadows_a_public_function():
    modules = {module.name for module in pkgutil.iter_modules(paramesh.__path__)}
    assert modules & set(PUBLIC) == set()
    for name in sorted(modules - {"v1", "lanes"}):
        importlib.import_module(f"paramesh.{name}")
    for name, home in PUBLIC.items():
        assert getattr(paramesh, name).__module__ == home


@pytest.mark.parametrize("statement", ["import paramesh", "import paramesh.errors, paramesh.session, paramesh.config"])
def test_import_is_light(statement):
    code = f"import sys; {statement}; print([m for m in ('torch', 'grpc', 'numpy') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize("module", ["membership", "runtime", "client", "async_client", "channel"])
def test_roles_can_use_the_client_without_torch(module):
    code = f"import sys, paramesh.{module}; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout.strip() == "False"
