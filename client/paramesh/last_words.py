"""The end of a supervised training process: what ended it, told to its supervisor; Ctrl-C without a traceback.

`ps-worker` and `ps-run` name a file in PARAMESH_ERROR_FILE. An exception that nobody caught is written there
as one JSON object, so that the supervisor knows which errors a restart cannot mend without reading tracebacks:

    {"pid": 12, "kind": "PartitionOffline", "reason": "PARTITION_OFFLINE", "message": "...", "of_the_script": false}

Only the standard library is used, and nothing of it that Python has not loaded at its start.
"""

from __future__ import annotations

import os
import sys
import types

__all__ = ["install"]

LONGEST_MESSAGE = 2000
"""Characters of a message that are kept: the supervisor says it in one line."""


def install(path: str) -> None:
    """Put the hook before what `sys.excepthook` is now.

    Args:
        path: the file to write to, from PARAMESH_ERROR_FILE.
    """
    previous, pid = sys.excepthook, os.getpid()

    def hook(kind: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
        if os.getpid() == pid:  # A fork's end is not this process's.
            if issubclass(kind, KeyboardInterrupt):
                # The supervisor passed a Ctrl-C on. Where it came is all that is worth saying, once per process.
                sys.stderr.write(f"interrupted{_where(trace)}\n")
                return
            _write(path, error)
        previous(kind, error, trace)

    sys.excepthook = hook


def _where(trace: types.TracebackType | None) -> str:
    """The innermost line of the user's own script in a traceback; empty if it has none."""
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    where = ""
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == script:
            where = f" at {os.path.basename(script)}:{trace.tb_lineno}"
        trace = trace.tb_next
    return where


def _write(path: str, error: BaseException) -> None:
    import json

    said = {
        "pid": os.getpid(),
        "kind": type(error).__name__,
        "reason": str(getattr(error, "reason", "")) if _is_ours(error) else "",
        "message": str(error)[:LONGEST_MESSAGE],
        "of_the_script": isinstance(error, (SyntaxError, ImportError)),
    }
    try:
        # Not created: the supervisor made it, and whoever inherited the variable from elsewhere writes nothing.
        descriptor = os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC)
    except OSError:
        return
    try:
        os.write(descriptor, json.dumps(said).encode())
    except OSError:
        pass
    finally:
        os.close(descriptor)


def _is_ours(error: BaseException) -> bool:
    # By what is loaded: an error of ours cannot have been raised without the module.
    errors = sys.modules.get("paramesh.errors")
    return errors is not None and isinstance(error, errors.ParameshError)
