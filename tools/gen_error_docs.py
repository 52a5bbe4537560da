"""Write the table of error reasons into docs/operations.md, from `paramesh.errors.REASONS`.

    python tools/gen_error_docs.py            # rewrite the table
    python tools/gen_error_docs.py --check    # exit 1 if it is not current

The meaning, the class and the status code of a reason come from the code. What a person does
about it stands in `REMEDIES` here; a reason that the library settles by itself needs none.
"""

from __future__ import annotations

import argparse
import pathlib
import sys

from paramesh import errors

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "operations.md"
BEGIN, END = "<!-- error reasons: begin -->", "<!-- error reasons: end -->"

BY_ITSELF = {
    errors.Action.REFRESH: "Nothing: the library fetches the map and repeats.",
    errors.Action.BACK_OFF: "Nothing: the library waits and repeats.",
    errors.Action.REJOIN: "Nothing if rare: the library joins as a new client. Often: see the worker's log.",
    errors.Action.SUPPLY: "Nothing: the library sends what is missing and repeats.",
}
"""What happens without a person, for reasons that have no remedy of their own."""

REMEDIES = {
    "WRONG_PARTITION": "A bug or a foreign client: compare versions of the two sides.",
    "PARTITION_OFFLINE": "Every complete copy is lost, with its values. `psctl restore`, or start the job anew.",
    "NOT_READY": "Nothing at start. If it stays: start more `ps-server` processes.",
    "WRONG_CLUSTER": "Correct `PARAMESH_COORDINATOR` or `PARAMESH_JOB`.",
    "OLD_GENERATION": "Nothing under `ps-worker` and `ps-run`, which start it anew. Start others again.",
    "DAMAGED": "Take another checkpoint: `psctl checkpoints --verify` says which are whole.",
    "STALE_TERM": "Two coordinators ran on one store. Stop the older one.",
    "VERSION": "Install the same release of Paramesh on both sides.",
    "NODE_NAME": "Give the process another name, or replace the one that holds it.",
    "ADDRESS": "Advertise an address that the coordinator can dial.",
    "UNAUTHENTICATED": "Give the process a valid token (`--token-file`, `PARAMESH_TOKEN`): "
    "[tokens](security.md#tokens).",
    "PERMISSION_DENIED": "Use a certificate or token of the role, job and name: [who may do what](security.md#roles).",
    "INCARNATION": "A bug or a foreign client.",
    "UNKNOWN_NODE": "Look at `psctl status`: the name may be misspelt.",
    "SEQ_REUSED": "A bug or a foreign client: one sequence number stands for one payload.",
    "SEQ_TOO_OLD": "A bug or a foreign client: the update was applied long ago.",
    "SEQ_TOO_FAR": "A bug or a foreign client: at most five updates may be in flight.",
    "FLOOR": "A bug or a foreign client: a floor is a log position that the client was told of.",
    "TOO_LATE": "Nothing: with backup workers a late contribution is dropped and its samples return.",
    "STEP_OUT_OF_RANGE": "Restart the worker; if it comes back, report it.",
    "CLOCK": "A bug or a foreign client: clocks are contiguous.",
    "LEASE": "Train only on what `paramesh.DataLoader` gave to this worker.",
    "SAMPLE_RANGE": "A bug or a foreign client: a range is [begin, end) with begin < end.",
    "SAMPLE_OUT_OF_RANGE": "A bug or a foreign client: an epoch ends with its dataset.",
    "UNKNOWN_TABLE": "Check the name with `psctl tables`.",
    "UNKNOWN_GROUP": "Restart the worker; a group opens when its optimizer is made.",
    "TENSOR_MISMATCH": "All workers must run the same model: the message names the first difference.",
    "DTYPE": "Use float32, float64, float16, bfloat16, complex64 or complex128, the same everywhere.",
    "SHAPE": "Give the tensor the shape that the table has.",
    "PAYLOAD_SIZE": "A bug or a foreign client: the bytes do not fill what was declared.",
    "CODEC": "Use a codec of this release.",
    "NON_FINITE": "Look for the cause: learning rate, loss, data. Under AMP use a `GradScaler`. Or skip such steps: "
    '[`non_finite="skip"`](guarantees.md#nan-and-infinity).',
    "NAME": "Rename the parameter, the key or the process.",
    "SCHEMA": "The name is taken by something else; use the same settings on every worker.",
    "QUOTA": "The message names the limit.",
    "UNSUPPORTED_OPTIMIZER": "Use one of the list in [pytorch-notes](pytorch-notes.md#optimizers).",
    "HYPER_PARAMETER": "Correct the value that the message names.",
    "MISSING_FIELD": "A bug or a foreign client.",
    "WEIGHT": "Correct what is given to `step(weight=...)`.",
    "PARAMETERS_CHANGED": "If it was meant, call `paramesh.assign(model)`; else change nothing by hand.",
    "PATH": "Use a path inside the folder that the option names.",
    "FORMAT": "Use a format that the message names.",
    "NOT_FOUND": "Check the name.",
    "UNIMPLEMENTED": "Not in this release: see [what is not there yet](../README.md#not-there-yet).",
    "DEADLINE": "The message says what was waited for and for how long.",
    "INTERNAL": "Find the id of the message in the server's log, and report it.",
    "STATE_TOO_LARGE": "Keep less in `paramesh.state`; weights belong in a checkpoint.",
    "CONFIG": "Correct the flag or the variable that the message names.",
    "UNREACHABLE": "Check that the process runs and that its address is right.",
    "FORKED": "Use Paramesh in the process that joined; DataLoader workers need nothing of it.",
    "CRC": "Nothing if it is rare: the library repeats. Often: suspect memory or network.",
}


def code_names() -> dict[int, str]:
    """Return the names of the status codes that `paramesh.errors` numbers."""
    return {value: name for name, value in vars(errors).items() if name.isupper() and isinstance(value, int)}


def remedy(name: str) -> str:
    """Return what a person does about a reason.

    Raises:
        KeyError: neither the table here nor the reason's action says.
    """
    return REMEDIES.get(name) or BY_ITSELF[errors.REASONS[name].action]


def table() -> str:
    """Return the Markdown table of all reasons, in the order of the code."""
    names = code_names()
    rows = ["| reason | status | class | means | what to do |", "| --- | --- | --- | --- | --- |"]
    for name, row in errors.REASONS.items():
        cells = (f"`{name}`", names[row.code], f"`{row.error.__name__}`", row.meaning, remedy(name))
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)


def render(page: str) -> str:
    """Return the page with the table between its two marks replaced."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def main() -> int:
    """Rewrite the page, or compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if not current")
    check = parser.parse_args().check
    page = PAGE.read_text(encoding="utf-8")
    current = render(page) == page
    if not check:
        PAGE.write_text(render(page), encoding="utf-8")
    elif not current:
        print(f"{PAGE.name} is not current: run python tools/gen_error_docs.py", file=sys.stderr)
    return 0 if current or not check else 1


if __name__ == "__main__":
    sys.exit(main())
