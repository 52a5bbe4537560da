"""Generate `client/paramesh/v1` from `protos/`; with `--check`, fail on drift.

    python tools/gen_protos.py           write the generated files
    python tools/gen_protos.py --check   compare, write nothing, exit 1 on a difference

Run it with the interpreter of `.venv-protos` (the Makefile does), which holds the
*oldest* grpcio-tools we support: the generator's version is the floor of grpcio and
protobuf for every user.
"""

import argparse
import filecmp
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos"
TARGET = ROOT / "client" / "paramesh" / "v1"


def generate(out: Path) -> None:
    """Run protoc over every file of the contract, into `out`/paramesh/v1."""
    files = sorted(str(p.relative_to(PROTOS)) for p in PROTOS.rglob("*.proto"))
    bin_dir = Path(sys.executable).parent
    subprocess.run(
        [
            sys.executable,
            "-m",
            "grpc_tools.protoc",
            f"-I{PROTOS}",
            f"--python_out={out}",
            f"--grpc_python_out={out}",
            f"--plugin=protoc-gen-mypy={bin_dir / 'protoc-gen-mypy'}",
            f"--plugin=protoc-gen-mypy_grpc={bin_dir / 'protoc-gen-mypy_grpc'}",
            f"--mypy_out=quiet:{out}",
            f"--mypy_grpc_out=quiet:{out}",
            *files,
        ],
        check=True,
    )
    package = out / "paramesh" / "v1"
    (package / "__init__.py").write_text('"""Generated from `protos/`; see `tools/gen_protos.py`."""\n')


def main() -> int:
    """Generate, then copy or compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare only")
    check = parser.parse_args().check
    with tempfile.TemporaryDirectory() as tmp:
        generate(Path(tmp))
        fresh = Path(tmp) / "paramesh" / "v1"
        names = {p.name for p in fresh.iterdir()}
        stale = {p.name for p in TARGET.glob("*.py*") if p.is_file()} - names
        _, differ, missing = filecmp.cmpfiles(fresh, TARGET, names, shallow=False)
        if check:
            for name in sorted({*differ, *missing, *stale}):
                print(f"drift: client/paramesh/v1/{name} (run `make protos`)", file=sys.stderr)
            return 1 if differ or missing or stale else 0
        TARGET.mkdir(parents=True, exist_ok=True)
        for name in stale:
            (TARGET / name).unlink()
        for name in names:
            (TARGET / name).write_bytes((fresh / name).read_bytes())
    return 0


if __name__ == "__main__":
    sys.exit(main())
