"""The command line of the benchmarks."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from benchmarks.workload import parse_sizes


def main(argv: list[str] | None = None) -> int:
    """Run one benchmark; exit 1 if its parameters did not end right."""
    arguments = _parser().parse_args(argv)
    benchmarks = {
        "dense": _dense, "alone": _alone, "failover": _failover, "moves": _moves, "grow": _grow, "flood": _flood,
        "limits": _limits,
    }  # fmt: skip
    result = benchmarks[arguments.benchmark](arguments)
    if arguments.json:
        print(json.dumps(result, indent=2))
    else:
        from benchmarks.report import show

        show(arguments.benchmark, result)
    return 0 if all(row["right"] for row in result.get("rows", [])) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="benchmark", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print JSON instead of tables")
    dense = commands.add_parser("dense", parents=[common], help="steps of dense tables, real processes")
    dense.add_argument("--sizes", type=parse_sizes, default=parse_sizes("1M,16M,64M"), help="such as 1M,16M")
    dense.add_argument("--workers", type=int, default=2)
    dense.add_argument("--servers", type=int, default=2)
    dense.add_argument("--mode", choices=("sync", "async"), default="sync")
    dense.add_argument("--replicas", type=int, default=1, help="above 1: beside one replica, in the same run")
    dense.add_argument("--tls", action="store_true", help="mutual TLS, beside plaintext in the same run")
    dense.add_argument("--runs", type=int, default=1, help="repeat; the median run of each size is shown")
    failover = commands.add_parser("failover", parents=[common], help="servers killed under load, real processes")
    failover.add_argument("--runs", type=int, default=20, help="faults of each kind under each load")
    failover.add_argument("--faults", default="SIGKILL,SIGSTOP", help="a SIGSTOP run takes 40 s")
    failover.add_argument("--loads", default="async,sync")
    failover.add_argument("--no-peers", action="store_true", help="without Redis and etcd")
    moves = commands.add_parser("moves", parents=[common], help="partitions that move under load, real processes")
    moves.add_argument("--moves", type=int, default=100, help="random moves under each load")
    moves.add_argument("--loads", default="async,sync")
    moves.add_argument("--replicas", default="1,2", help="such as 1,2; at most 2 of 3 servers")
    moves.add_argument("--partitions", type=int, default=6)
    moves.add_argument("--mib", type=float, default=1.0, help="size of a partition's values")
    grow = commands.add_parser("grow", parents=[common], help="a server added under load, real processes")
    grow.add_argument("--mib", type=float, default=256.0, help="size of the model's values")
    grow.add_argument("--partitions", type=int, default=16)
    grow.add_argument("--replicas", default="1,2", help="such as 1,2")
    grow.add_argument("--copy-rates", default="0,64", help="MiB/s of ps-server --copy-rate, 0: as fast as it goes")
    flood = commands.add_parser("flood", parents=[common], help="training beside hostile clients, real processes")
    flood.add_argument("--seconds", type=float, default=30.0, help="of one window, calm or flooded")
    flood.add_argument("--pairs", type=int, default=3, help="of windows")
    flood.add_argument("--clients", type=int, default=64)
    flood.add_argument("--idle", type=int, default=1000)
    commands.add_parser("alone", parents=[common], help="without a cluster, against plain torch")
    commands.add_parser("limits", parents=[common], help="the machine's limits only")
    return parser


def _dense(arguments: argparse.Namespace) -> dict[str, Any]:
    from benchmarks import dense

    plan = dense.Plan(
        arguments.sizes, arguments.workers, arguments.servers, arguments.mode, arguments.replicas, arguments.tls
    )
    return dense.run(plan, arguments.runs)


def _failover(arguments: argparse.Namespace) -> dict[str, Any]:
    from benchmarks import failover

    faults, loads = arguments.faults.split(","), arguments.loads.split(",")
    return failover.run(arguments.runs, faults, loads, not arguments.no_peers)


def _moves(arguments: argparse.Namespace) -> dict[str, Any]:
    from benchmarks import moves

    replicas = [int(count) for count in arguments.replicas.split(",")]
    return moves.run(arguments.moves, arguments.loads.split(","), replicas, arguments.partitions, arguments.mib)


def _grow(arguments: argparse.Namespace) -> dict[str, Any]:
    from benchmarks import grow

    replicas = [int(count) for count in arguments.replicas.split(",")]
    rates = [int(rate) for rate in arguments.copy_rates.split(",")]
    return grow.run(arguments.mib, arguments.partitions, replicas, rates)


def _flood(arguments: argparse.Namespace) -> dict[str, Any]:
    from benchmarks import flood

    return flood.run(arguments.seconds, arguments.pairs, arguments.clients, arguments.idle)


def _alone(_arguments: argparse.Namespace) -> dict[str, Any]:
    from benchmarks import alone

    return alone.run()


def _limits(_arguments: argparse.Namespace) -> dict[str, Any]:
    from benchmarks import limits

    return {"limits": limits.measure().as_dict()}


if __name__ == "__main__":
    sys.exit(main())
