"""The ledger as people see it. Pure."""

from __future__ import annotations

from paramesh.v1.ledger_pb2 import Activity, EpochStatus, GroupStatus, LedgerStatusResponse, Member

from paramesh_server.ledger_clocks import Clocks
from paramesh_server.ledger_epochs import Epochs
from paramesh_server.ledger_groups import Groups, GroupState
from paramesh_server.ledger_members import Members
from paramesh_server.ledger_steps import Steps


class Status:
    """Answers LedgerStatus out of all parts."""

    def __init__(self, members: Members, groups: Groups, steps: Steps, clocks: Clocks, epochs: Epochs):
        self._members = members
        self._groups = groups
        self._steps = steps
        self._clocks = clocks
        self._epochs = epochs

    def response(self) -> LedgerStatusResponse:
        """All but figures and lsn."""
        return LedgerStatusResponse(
            members=self._member_list(),
            groups=[self._group(group) for group in self._groups.state.values()],
            epochs=[
                EpochStatus(dataset=e.key[0], epoch=e.key[1], length=e.limit, consumed=e.consumed)
                for _, e in sorted(self._epochs.state.epochs.items())
            ],
            evictions=self._members.state.evictions,
            phase=self.phase(),
            started=self._members.state.started,
        )

    def _member_list(self) -> list[Member]:
        return [
            Member(
                client_id=m.client_id,
                rank=m.rank,
                slot=m.slot,
                activity=Activity.ValueType(m.activity),
                joined_order=m.joined_order,
                clock=max((g.clocks.get(m.client_id, 0) for g in self._groups.state.values()), default=0),
                samples=m.samples,
            )
            for m in self._members.by_rank()
        ]

    def _group(self, group: GroupState) -> GroupStatus:
        status = GroupStatus(
            group=group.number,
            name=group.spec.name,
            mode=group.spec.mode,
            next_step=group.next_step,
            skipped_steps=group.skipped,
            initialised=group.initialised,
            staleness=group.spec.staleness,
        )
        if self._clocks.has_clocks(group):
            status.min_clock, status.max_clock = self._clocks.bounds(group)
            status.widest_gap = self._clocks.widest.get(group.number, 0)
        else:
            status.waiting_for.extend(self._steps.waiting_for(group))
        return status

    def phase(self) -> str:
        """In a few words, what the job is doing."""
        joined = len(self._members.state.members)
        if not self._members.state.started:
            return f"waiting for workers ({joined} of {self._members.start_workers()} joined)"
        if not joined:
            return "all workers have left"
        if not self._members.enough():
            return f"paused: waiting for workers ({joined} joined, min_workers is higher)"
        groups = self._groups.state.values()
        if not groups:
            return "starting"
        if not all(group.initialised for group in groups):
            return "initialising"
        return "training" if self._members.active else "idle"
