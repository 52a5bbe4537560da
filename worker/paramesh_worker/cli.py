"""`ps-worker`: runs training processes on one machine of a cluster, as torchrun does."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Sequence

from paramesh.errors import ConfigError, ParameshError

from .config import WorkerConfig, parse
from .output import Printer, PrinterHandler

__all__ = ["main"]

DESCRIPTION = """\
Run the training processes of one machine of a Paramesh job, and look after them.

Each is restarted when it fails, its output is labelled, the cluster hears at once when it ends or is stopped,
and nothing is left when you stop. An error that a restart cannot mend (lost partitions, a wrong setting or
command line, a script that cannot be loaded) ends the job at once.
SCRIPT is started as `python SCRIPT ARGS` would start it; everything after SCRIPT is the script's own."""

EXAMPLES = """\
examples:
  ps-worker --coordinator host-a:7070 train.py --lr 0.1
      one process that runs `train.py --lr 0.1`
  ps-worker --coordinator host-a:7070 --nproc 8 train.py
      eight processes, one per GPU; their lines start with [worker 0] .. [worker 7]
  ps-worker --nproc 2 --log-dir logs -m mypackage.train
      a module, output to logs/worker-0.log and logs/worker-1.log; the address comes from PARAMESH_COORDINATOR
  ps-run --workers 2 train.py
      no cluster yet? this starts one on this machine

what a process finds in its environment:
  PARAMESH_COORDINATOR, PARAMESH_JOB   the cluster; `import paramesh` joins it by itself
  PARAMESH_LOCAL_RANK                  index on this machine, from 0
  PARAMESH_SLOT                        its place, HOST/INDEX, kept over restarts
  PARAMESH_RESTART                     how often it was restarted, from 0
  PARAMESH_RANK                        preferred rank, if PARAMESH_RANK was set for ps-worker itself (as the
                                       rank of its first process)

exit status: 0 when all processes are done; that of the first process that failed for good (128 + the signal's
number if it was killed); 1 if the cluster cannot be reached; 2 for a mistake in the options."""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `ps-worker`; ends the program with its exit status."""
    config, command = parse(
        WorkerConfig,
        sys.argv[1:] if argv is None else argv,
        prog="ps-worker",
        description=DESCRIPTION,
        examples=EXAMPLES,
    )
    # Late: --help and mistakes answer without loading gRPC.
    from .supervisor import Supervisor

    printer = Printer()
    handler = PrinterHandler(printer, 2)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s ps-worker: %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=config.log_level.upper(), handlers=[handler], force=True)
    log = logging.getLogger(__name__)

    async def supervise() -> int:
        return await Supervisor(config, command, environ=os.environ, printer=printer).run()

    try:
        status = asyncio.run(supervise())
    except ConfigError as error:
        log.error("%s", error)
        status = 2
    except ParameshError as error:
        log.error("%s", error)
        status = 1
    printer.close()
    sys.exit(status)


if __name__ == "__main__":
    main()
