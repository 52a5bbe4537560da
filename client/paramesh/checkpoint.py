"""`save`, `load` and `export`: checkpoints without pickle, plain files that others can read.

    paramesh.save("runs/1/step-900")       # every worker calls it; the chief writes
    paramesh.load("runs/1/step-900")       # every worker; nothing is touched before all is verified
    paramesh.export("net.safetensors", model)

A checkpoint is a folder: `model-K.safetensors` (a model's state_dict), `optimizer-K.safetensors`
with its structure in the manifest (torch's state_dict, gathered from the servers),
`state.safetensors` (what `paramesh.state` keeps) and `MANIFEST.json` with sizes and digests.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.torch
import torch

from paramesh.errors import ConfigError, ParameshError, refuse
from paramesh.files import Folder, write_file
from paramesh.plain import from_document, to_document
from paramesh.profiling import phase
from paramesh.session import current, registry
from paramesh.v1 import ledger_pb2 as lg

if TYPE_CHECKING:
    from paramesh.membership import Session

__all__ = ["export", "load", "save"]

FORMAT = 1
"""Version of the folder's layout; raised when an older Paramesh could not read it."""

Tensors = dict[str, torch.Tensor]


def save(path: str | os.PathLike[str], *, wait: bool = True) -> None:
    """Write models, optimizers and small state of this script to a folder.

    Every worker calls it at the same place; the chief (lowest rank) writes, the others wait
    until it is safe on disk. It holds the models and optimizers of all `DistributedOptimizer`s
    and the objects given to `paramesh.state`. BatchNorm statistics are the chief's.

    Args:
        path: the folder, local or a URL that fsspec knows; an older checkpoint there is
            replaced, at once on a local disk.
        wait: False if only the chief calls it (`if paramesh.is_chief(): ...`).

    Raises:
        ConfigError: there is no DistributedOptimizer.
        RequestRefused: PATH, if it cannot be written (on every worker); FORMAT.
        PartitionOffline: a server is lost.
    """
    optimizers = _optimizers("save")

    def work() -> None:
        with phase("save"):
            manifest: dict[str, Any] = {"format": FORMAT, "models": 0, "optimizers": [], "state": {}}
            Folder(path).write(_contents(optimizers, manifest), manifest)

    _chief_does(work, f"a checkpoint at {os.fspath(path)}", wait=wait)


def _contents(optimizers: list[Any], manifest: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
    """The files, one at a time, so that not all are in memory; fills the manifest meanwhile."""
    for number, model in enumerate(_models(optimizers)):
        manifest["models"] = number + 1
        yield f"model-{number}.safetensors", _encode(model.state_dict())
    for number, optimizer in enumerate(optimizers):
        tensors: Tensors = {}
        manifest["optimizers"].append(to_document(optimizer.state_dict(), tensors, "optimizer"))
        yield f"optimizer-{number}.safetensors", _encode(tensors)
    tensors = {}
    for name, thing in registry().objects.items():
        manifest["state"][name] = to_document(thing.state_dict(), tensors, name)
    yield "state.safetensors", _encode(tensors)


def load(path: str | os.PathLike[str]) -> None:
    """Read what `save` wrote into the models, optimizers and small state of this script.

    Every worker calls it, after making the same objects as when it was saved. Each verifies
    every file first, and none changes anything unless all can read it all. In a running
    cluster the servers get the loaded values; before the first step they become the first ones.

    Args:
        path: the folder.

    Raises:
        ConfigError: this script has other models or optimizers than the checkpoint.
        StateRefused: NOT_FOUND, if there is no complete checkpoint.
        RequestRefused: FORMAT, naming the damaged file; PATH.
    """
    optimizers = _optimizers("load")
    models = _models(optimizers)
    parsed: _Parsed | None = None
    error: ParameshError | None = None
    try:
        with phase("load"):
            parsed = _Parsed(Folder(path), len(models), len(optimizers))
            parsed.check(models)
    except ParameshError as found:
        error = found
    _agree(error, f"the checkpoint at {os.fspath(path)}")
    assert parsed is not None
    for model, values in zip(models, parsed.models, strict=True):
        model.load_state_dict(values)
    if current() is not None:
        from paramesh.model_values import assign

        for model in models:
            assign(model)
    for optimizer, content in zip(optimizers, parsed.optimizers, strict=True):
        optimizer.load_state_dict(content)
    for name, thing in registry().objects.items():
        if name in parsed.state:
            thing.load_state_dict(parsed.state[name])


class _Parsed:
    """A checkpoint in memory, verified; nothing was changed yet.

    Raises:
        ConfigError, StateRefused, RequestRefused: as `load`.
    """

    def __init__(self, folder: Folder, models: int, optimizers: int):
        manifest = folder.open()
        if manifest.get("format") != FORMAT:
            raise refuse("FORMAT", f"{folder.path} has format {manifest.get('format')!r}, not {FORMAT}")
        documents, state = manifest.get("optimizers"), manifest.get("state")
        if not isinstance(documents, list) or not isinstance(state, dict):
            raise refuse("FORMAT", f"{folder.path} is not a checkpoint of paramesh.save")
        if (manifest.get("models"), len(documents)) != (models, optimizers):
            raise ConfigError(
                f"load: {folder.path} holds {manifest.get('models')} models and {len(documents)} optimizers, "
                f"this script has {models} and {optimizers}"
            )
        self.models = [_decode(folder, f"model-{number}.safetensors") for number in range(models)]
        self.optimizers = [
            from_document(document, _decode(folder, f"optimizer-{number}.safetensors"))
            for number, document in enumerate(documents)
        ]
        tensors = _decode(folder, "state.safetensors")
        self.state = {name: from_document(document, tensors) for name, document in state.items()}

    def check(self, models: list[torch.nn.Module]) -> None:
        """Refuse values that do not fit, before the first one is loaded."""
        for number, (model, values) in enumerate(zip(models, self.models, strict=True)):
            own = model.state_dict()
            for name in sorted(own.keys() | values.keys()):
                mine = list(own[name].shape) if name in own else "nothing"
                theirs = list(values[name].shape) if name in values else "nothing"
                if mine != theirs:
                    raise refuse(
                        "TENSOR_MISMATCH",
                        f"load: {name!r} of model {number} is {mine} here and {theirs} in the checkpoint",
                        tensor=name,
                    )


def export(path: str | os.PathLike[str], model: torch.nn.Module) -> None:
    """Write a model's state_dict as one safetensors file that loads without Paramesh.

    Every worker calls it; the chief writes, the others wait.

    Args:
        path: the file, local or a URL that fsspec knows; replaced at once.
        model: any module; what its state_dict holds must be tensors.

    Raises:
        RequestRefused: PATH or FORMAT.
    """
    _chief_does(lambda: write_file(path, _encode(model.state_dict())), f"an export to {os.fspath(path)}")


# ---------------------------------------------------------------------- together


def _optimizers(who: str) -> list[Any]:
    optimizers = registry().optimizers
    if not optimizers:
        raise ConfigError(f"{who}: this script has made no paramesh.DistributedOptimizer")
    return optimizers


def _models(optimizers: list[Any]) -> list[torch.nn.Module]:
    """The optimizers' models, each once, in order."""
    return list({id(optimizer.model): optimizer.model for optimizer in optimizers}.values())


def _chief_does(work: Callable[[], None], what: str, *, wait: bool = True) -> None:
    """Let the chief work and the others wait; its failure is everybody's."""
    session = current()
    if session is None or not wait:
        return work()
    chief = session.rank == 0 or session.roster.is_lowest()
    failure: ParameshError | None = None
    error: BaseException | None = None
    if chief:
        try:
            work()
        except Exception as found:
            error = found
            failure = found if isinstance(found, ParameshError) else refuse("INTERNAL", str(found))
    done, failed = _tally(session, [float(chief), float(failure is not None)], what)
    if error is not None:
        raise error
    if failed or not done:
        why = "its own error says why" if failed else "it died meanwhile"
        raise refuse("PATH", f"{what}: the chief could not write it; {why}")
    return None


def _agree(error: ParameshError | None, what: str) -> None:
    """Raise on every worker if one of them has an error."""
    session = current()
    if session is not None and (_tally(session, [float(error is not None)], what)[0]) and error is None:
        raise refuse("FORMAT", f"{what}: another worker cannot read it; its own error says why")
    if error is not None:
        raise error


def _tally(session: Session, values: list[float], what: str) -> list[float]:
    """The mean of every worker's values, for this call's place in the script."""
    number = session.next_round("checkpoint")
    response = session.request(
        lambda: session.client.ledger.gather(
            lg.GatherRequest(name="checkpoint", round=number, values=values, weight=1.0)
        ),
        f"all workers at {what}",
    )
    return list(response.values) if response.count else values


# ---------------------------------------------------------------------- bytes


def _encode(tensors: dict[str, Any]) -> bytes:
    """A safetensors file of contiguous CPU copies; tied weights are written twice."""
    copies = {}
    for name, value in tensors.items():
        if not isinstance(value, torch.Tensor) or value.is_sparse or value.is_quantized:
            raise refuse("FORMAT", f"{name!r} is a {type(value).__name__}; only dense tensors can be written")
        copies[name] = value.detach().cpu().contiguous().clone()
    try:
        return bytes(safetensors.torch.save(copies))
    except (ValueError, KeyError) as error:  # a dtype that the format lacks
        raise refuse("FORMAT", f"cannot be written as safetensors: {error}") from error


def _decode(folder: Folder, name: str) -> Tensors:
    try:
        return dict(safetensors.torch.load(folder.read(name)))
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise refuse("FORMAT", f"{folder.path}/{name}: {error}", path=f"{folder.path}/{name}") from None
