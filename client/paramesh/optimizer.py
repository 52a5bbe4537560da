"""`DistributedOptimizer`: a torch optimizer whose step is taken by the whole cluster.

    optimizer = paramesh.DistributedOptimizer(torch.optim.Adam(model.parameters(), lr=1e-3), model)
    for x, y in loader:
        optimizer.zero_grad(); loss_fn(model(x), y).backward(); optimizer.step()

It *is* the inner optimizer for everything that reads or sets it: `param_groups`, `state`, `defaults`,
hooks and schedulers. Alone (no cluster in the environment) `step` is the inner optimizer's, in place.
In a cluster the servers hold the optimizer's state and take the step; `state_dict()` gathers it.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from typing import Any, overload

import torch

from paramesh.amp import AmpState
from paramesh.attachment import Attachment
from paramesh.config import ClientConfig
from paramesh.errors import ConfigError, refuse
from paramesh.gradients import with_gradient
from paramesh.optimizer_state import gathered_state, hyper_parameters_only, load_into_cluster
from paramesh.options import Options, Outer, check_supported
from paramesh.profiling import phase
from paramesh.session import current, registry

__all__ = ["DistributedOptimizer"]

_HOOKS = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)
"""torch's own registries; shared with the inner optimizer, so that hooks registered before and after
wrapping are the same ones."""


class DistributedOptimizer(torch.optim.Optimizer):
    """Wraps a torch optimizer; `step()` returns with all parameters applied, committed and in place.

    Args:
        optimizer: One of SGD, Adam, AdamW, Adagrad, RMSprop, Rprop, Adadelta, Adamax, NAdam, RAdam, ASGD
            of torch.optim (any but LBFGS in local mode).
        model: The module whose parameters it trains; it names them, and all workers' must agree.
        mode: "sync" (default): one global step, as if the batches were one. "async": each worker's update
            is applied on arrival. "ssp": async within `staleness` clocks. "local": `every` local steps,
            then the workers agree. None: PARAMESH_MODE, else "sync".
        staleness: How many clocks the fastest worker may lead the slowest in ssp. None: 4.
        every: Local steps between two exchanges in local mode. None: 1.
        outer: Local mode's optimizer of the exchange: "average" (default), ("nesterov", lr, momentum) for
            DiLoCo, or (torch.optim.X, {settings}).
        loss_reduction: "mean": the step's gradient is `sum(w_i g_i) / sum(w_i)`, for losses that average
            over the batch. "sum": it is `sum(g_i)`, for losses that add up.
        max_grad_norm: Clip the *global* gradient to this norm (one more round trip). By hand,
            `clip_grad_norm_` clips each worker's own.
        backup_workers: A step takes the first N minus this many contributions.
        overlap_pull: `step()` returns before values have arrived; the wait sits on the forward of the
            modules that hold them.
        speculate: Push gradients during backward; right in any case, and faster when they are final.
        sync_buffers: "mean": average floating-point buffers (BatchNorm's) over the workers at every step.
            None: each worker's own.
        name: The optimizer's name in the job; default: by order of construction.
        partition_bytes: Bound on one partition's values; default 32 MiB.
        non_finite: What a NaN or infinity in this worker's gradient does in a cluster. "reject" (default):
            `step()` raises and nothing has changed. "skip": the step is skipped as one with an inf under
            AMP, in async and ssp only this worker's. "allow": it is applied, as torch does; alone always.
        acks: When an update is acknowledged in async mode. "isr" (default): when every in-sync replica has it.
            "primary": when one server has it; a lost server may cost its last updates, which are counted.

    Raises:
        UnsupportedOptimizer: UNSUPPORTED_OPTIMIZER, naming the optimizer and what is supported.
        ConfigError: An option is wrong.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: torch.nn.Module,
        mode: str | None = None,
        *,
        staleness: int | None = None,
        every: int | None = None,
        outer: Outer = None,
        loss_reduction: str = "mean",
        max_grad_norm: float | None = None,
        backup_workers: int = 0,
        overlap_pull: bool = False,
        speculate: bool = True,
        sync_buffers: str | None = None,
        name: str | None = None,
        partition_bytes: int | None = None,
        non_finite: str = "reject",
        acks: str = "isr",
    ):
        _check_arguments(optimizer, model)
        session = current()
        config = session.config if session is not None else ClientConfig()
        options = Options(
            mode=mode or config.mode or "sync",
            staleness=_first(staleness, config.staleness, 4),
            every=_first(every, config.every, 1),
            outer=outer,
            loss_reduction=loss_reduction,
            max_grad_norm=max_grad_norm,
            backup_workers=backup_workers,
            overlap_pull=overlap_pull,
            speculate=speculate,
            sync_buffers=sync_buffers,
            name=name,
            partition_bytes=partition_bytes,
            non_finite=non_finite,
            acks=acks,
        )
        check_supported(optimizer, options.mode)
        self._attachment: Attachment | None = None
        """The tie to a cluster; None: alone."""
        self._bind(optimizer, model, options)
        if session is not None:
            self._attachment = Attachment(session, optimizer, model, options, self._run_inner)
            session.register(self)
        else:
            registry().remember(self)

    def _bind(self, inner: torch.optim.Optimizer, model: torch.nn.Module, options: Options) -> None:
        self._inner = inner
        self._model = model
        self._options = options
        self._amp = AmpState()
        for hooks in _HOOKS:
            setattr(self, hooks, getattr(inner, hooks))
        self._warned_capturable_if_run_uncaptured = True
        self._patch_step_function()

    # ------------------------------------------------------------------ the inner optimizer's own

    @property
    def inner(self) -> torch.optim.Optimizer:
        """The wrapped optimizer."""
        return self._inner

    @property
    def model(self) -> torch.nn.Module:
        """The module whose parameters it trains."""
        return self._model

    @property
    def attachment(self) -> Attachment | None:
        """The tie to a cluster; None: alone. For the library's own use."""
        return self._attachment

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The inner optimizer's param groups; schedulers write to them."""
        return self._inner.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self._inner.param_groups = value

    @property
    def state(self) -> Any:
        """The inner optimizer's state: its own when alone or in local mode, else empty (servers hold it)."""
        return self._inner.state

    @state.setter
    def state(self, value: Any) -> None:
        self._inner.state = value

    @property
    def defaults(self) -> dict[str, Any]:
        """The inner optimizer's defaults."""
        return self._inner.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self._inner.defaults = value

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_inner" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self._inner, name)

    def __repr__(self) -> str:
        where = f"mode={self._options.mode!r}" if self._attachment is not None else "alone"
        return f"DistributedOptimizer({where}, {self._inner!r})"

    def __getstate__(self) -> dict[str, Any]:
        # For deepcopy and pickle. A copy trains alone: two of one name in one job would be one group.
        return {"_inner": self._inner, "_model": self._model, "_options": self._options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._attachment = None
        self._bind(state["_inner"], state["_model"], state["_options"])

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears gradients, as the inner optimizer does."""
        self._inner.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a param group; in a cluster it becomes a table at the next step, on every worker alike.

        Raises:
            ConfigError: After the first step together with `max_grad_norm`.
        """
        self._inner.add_param_group(param_group)
        if self._attachment is not None:
            try:
                self._attachment.add_group(len(self._inner.param_groups) - 1)
            except BaseException:
                self._inner.param_groups.pop()
                raise

    # ------------------------------------------------------------------ mixed precision

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Tells GradScaler to pass scale and found_inf; alone, if the inner optimizer wants them."""
        return self._attachment is not None or bool(getattr(self._inner, "_step_supports_amp_scaling", False))

    @property
    def grad_scale(self) -> torch.Tensor | None:
        """What GradScaler multiplied the loss with; set by it around `step`."""
        if not self._amp.has_grad_scale:
            raise AttributeError("grad_scale")
        return self._amp.grad_scale

    @grad_scale.setter
    def grad_scale(self, value: torch.Tensor | None) -> None:
        self._amp.grad_scale, self._amp.has_grad_scale = value, True

    @grad_scale.deleter
    def grad_scale(self) -> None:
        self._amp.grad_scale, self._amp.has_grad_scale = None, False

    @property
    def found_inf(self) -> torch.Tensor:
        """Above 0 if a gradient of this worker is not finite; set by GradScaler around `step`."""
        if self._amp.found_inf is None:
            raise AttributeError("found_inf")
        return self._amp.found_inf

    @found_inf.setter
    def found_inf(self, value: torch.Tensor) -> None:
        self._amp.set_found_inf(value)

    @found_inf.deleter
    def found_inf(self) -> None:
        self._amp.found_inf = self._amp.scaler = None

    # ------------------------------------------------------------------ the step

    @overload
    def step(self, closure: None = None, *, weight: float | None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float], *, weight: float | None = None) -> float: ...
    def step(self, closure: Callable[[], float] | None = None, *, weight: float | None = None) -> float | None:
        """Takes one step with the whole cluster.

        Args:
            closure: Computes loss and gradients; run once.
            weight: Of this worker's gradient, such as its number of tokens; default: samples delivered by
                `paramesh.DataLoader` since the last step, else 1.

        Returns:
            What the closure returned.

        Raises:
            ParametersChanged: Parameters were edited since the last step; names `paramesh.assign(model)`.
            PartitionOffline: A server is lost, and with it values; names it and the remedy.
            RequestRefused: WEIGHT, if the weight is not a finite number above 0. NON_FINITE, if a gradient holds
                NaN or infinity (see `non_finite`); after `zero_grad()` the next step goes on.
            TensorMismatch: A gradient is sparse, or this worker's model differs from the others'.
        """
        if weight is not None and not (math.isfinite(weight) and weight > 0):
            raise refuse("WEIGHT", f"weight={weight} must be a finite number above 0; pause() sits out a step")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._attachment is None:
            self._step_alone()
        else:
            with phase("step"), self._attachment.session.departure.undisturbed():
                skipped = self._attachment.step(weight, self._amp)
            if skipped:
                self._amp.learn(self)
            self._inner._opt_called = True  # type: ignore[attr-defined]
        return loss

    def _step_alone(self) -> None:
        if self._options.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(with_gradient(self._inner), self._options.max_grad_norm)
        if self._amp.found_inf is None:
            self._run_inner()
            return
        self._inner.grad_scale, self._inner.found_inf = self._amp.grad_scale, self._amp.found_inf  # type: ignore
        try:
            self._run_inner()
        finally:
            del self._inner.grad_scale, self._inner.found_inf  # type: ignore[attr-defined]

    def _run_inner(self) -> None:
        """The inner optimizer's step, without its hooks: they have run as this one's."""
        _unhooked_step(type(self._inner))(self._inner)
        self._inner._opt_called = True  # type: ignore[attr-defined]

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Marks backward passes whose gradients only accumulate: nothing is pushed early.

        Accumulation is right without it; it saves pushes that the next backward would undo.
        """
        if self._attachment is None:
            yield
            return
        with self._attachment.no_sync():
            yield

    # ------------------------------------------------------------------ state

    def state_dict(self, *, local: bool = False) -> dict[str, Any]:
        """Returns torch's state_dict, gathered from the servers at one committed step.

        Args:
            local: Only this worker's hyper-parameters, without asking anybody.

        Returns:
            {"state": {index: {name: tensor}}, "param_groups": [...]}; loads into the plain optimizer.
        """
        if local:
            return hyper_parameters_only(self._inner)
        if self._attachment is None or self._options.mode == "local":
            return super().state_dict()
        with gathered_state(self._attachment):
            return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state_dict of this or of the plain optimizer.

        In a cluster every worker calls it; the chief writes to the servers, the others wait. Before the
        first step it becomes part of the first values.

        Raises:
            ValueError: Its groups or parameters do not fit, as torch says.
        """
        self._inner.load_state_dict(copy.copy(state_dict))
        if self._attachment is not None and self._options.mode != "local" and "state" in state_dict:
            load_into_cluster(self._attachment)

    # ------------------------------------------------------------------ what the session tells

    def on_active(self, positions: Any) -> None:
        """Called when steps begin to wait for this worker: brings parameters to the group's step."""
        if self._attachment is not None:
            self._attachment.on_active(positions)

    def on_rejoined(self) -> None:
        """Called when this worker was evicted and has joined anew."""
        if self._attachment is not None:
            self._attachment.on_rejoined()

    def drain(self) -> None:
        """Called before this worker leaves: returns when everything pushed is applied."""
        if self._attachment is not None:
            self._attachment.drain()


def _unhooked_step(kind: type[torch.optim.Optimizer]) -> Callable[[torch.optim.Optimizer], object]:
    step: Callable[[torch.optim.Optimizer], object] = kind.step
    return getattr(step, "__wrapped__", step) if getattr(step, "hooked", False) else step


def _first(*values: int | None) -> int:
    return next(value for value in values if value is not None)


def _check_arguments(optimizer: object, model: object) -> None:
    if isinstance(optimizer, DistributedOptimizer):
        raise ConfigError("the optimizer is a DistributedOptimizer already")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(f"optimizer is a {type(optimizer).__name__}, not a torch optimizer")
    if not isinstance(model, torch.nn.Module):
        raise ConfigError(f"model is a {type(model).__name__}, not a torch.nn.Module")
