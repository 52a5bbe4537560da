"""What a worker process runs: BODY FOLDER INDEX ARGS, where BODY is `package.module:function`."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.cluster.desk import Desk


def main() -> None:
    """Import the body and run it at its desk."""
    body, folder, index, args = sys.argv[1:]
    module, _, function = body.partition(":")
    desk = Desk(Path(folder), int(index), json.loads(args))
    desk.emit("hello", incarnation=desk.incarnation)
    getattr(importlib.import_module(module), function)(desk)
    desk.emit("bye")


if __name__ == "__main__":
    main()
