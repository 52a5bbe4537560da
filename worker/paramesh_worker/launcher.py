"""`ps-run`: a whole cluster on this machine from one command."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence

from .config import RunConfig, parse

__all__ = ["main"]

DESCRIPTION = """\
Train SCRIPT on a whole Paramesh cluster on this machine.

A coordinator, S servers and W workers are started here, watched, and gone when you leave. A worker that
fails is restarted, and the others go on meanwhile, unless a restart cannot mend its error.
SCRIPT is started as `python SCRIPT ARGS` would start it; everything after SCRIPT is the script's own."""

EXAMPLES = """\
examples:
  ps-run --servers 2 --workers 2 examples/digits.py
      two workers train together; their output, labelled, above a live display
  ps-run --workers 4 --mode ssp --staleness 8 train.py --lr 0.1
      a fast worker may be 8 steps ahead of the slowest; `--lr 0.1` is the script's
  ps-run --workers 2 --mode local --every 16 -m mypackage.train
      workers train on their own and are combined every 16 steps
  ps-run --workers 2 --plain --log-dir logs train.py | tee run.txt
      plain lines; logs/worker-0.log, logs/worker-1.log, logs/ps-0.log, logs/coordinator.log
  psctl --coordinator 127.0.0.1:7070 status
      in another terminal, when this one was started with --port 7070

Ctrl-C ends the run: processes get --grace seconds; a second Ctrl-C kills them at once.

exit status: 0 when all workers are done; that of the first worker that failed for good; 1 if a server or the
coordinator was lost; 2 for a mistake in the options; 130 after Ctrl-C, 143 after SIGTERM."""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `ps-run`; ends the program with its exit status."""
    config, command = parse(
        RunConfig,
        sys.argv[1:] if argv is None else argv,
        prog="ps-run",
        description=DESCRIPTION,
        examples=EXAMPLES,
    )
    # Late: --help and mistakes answer without loading gRPC and rich.
    from .run import Run

    sys.exit(asyncio.run(Run(config, command).run()))


if __name__ == "__main__":
    main()
