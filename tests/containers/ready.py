"""Makes the best backend that this machine can have ready, and prints its name; `--end` ends what that started.

    backend=$(python -m tests.containers.ready)

Docker compose if there is an engine or one can be brought; else network namespaces; else exit status 1.
"""

from __future__ import annotations

import sys

import pytest

from tests.containers import engine, netns


def main() -> int:
    """Try one after the other."""
    if "--end" in sys.argv:
        engine.stop_private()
        return 0
    try:
        engine.ready()
        print("compose")
        return 0
    except (pytest.UsageError, RuntimeError, OSError) as error:
        print(f"docker compose cannot be had here: {error}", file=sys.stderr)
    if why := netns.available():
        print(f"network namespaces cannot be had here: {why}", file=sys.stderr)
        return 1
    print("netns")
    return 0


if __name__ == "__main__":
    sys.exit(main())
