"""Generate the code of `protos/`; with `--check`, fail on drift.

    python tools/gen_protos.py           write the generated files
    python tools/gen_protos.py --check   compare, write nothing, exit 1 on a difference

`protos/paramesh` becomes `client/paramesh/v1`; `protos/third_party/etcd` becomes
`coordinator/paramesh_coordinator/store/etcdv3`.

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
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos"


class Package(NamedTuple):
    """A folder of the contract and the Python package that comes of it."""

    folder: str
    root: str
    """Source root of the package."""
    package: str
    """Under the root; where protoc is made to believe that the files are, since imports follow it."""

    @property
    def target(self) -> Path:
        """Where the generated code is checked in."""
        return ROOT / self.root / self.package


PACKAGES = (
    Package("paramesh/v1", "client", "paramesh/v1"),
    Package("third_party/etcd", "coordinator", "paramesh_coordinator/store/etcdv3"),
)


def generate(out: Path) -> None:
    """Run protoc over every file of the contract, into packages under `out`."""
    bin_dir = Path(sys.executable).parent
    for package in PACKAGES:
        source = PROTOS / package.folder
        files = sorted(f"{package.package}/{p.relative_to(source)}" for p in source.rglob("*.proto"))
        subprocess.run(
            [
                sys.executable,
                "-m",
                "grpc_tools.protoc",
                f"-I{package.package}={source}",
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
        told = '"""Generated from `protos/`; see `tools/gen_protos.py`."""\n'
        (out / package.package / "__init__.py").write_text(told)


def compare(package: Package, fresh: Path, *, check: bool) -> bool:
    """Copy one package to where it belongs, or say what differs; whether all is well."""
    target = package.target
    names = {p.name for p in fresh.iterdir()}
    stale = {p.name for p in target.glob("*.py*") if p.is_file()} - names
    if check:
        _, differ, missing = filecmp.cmpfiles(fresh, target, names, shallow=False)
        for name in sorted({*differ, *missing, *stale}):
            print(f"drift: {package.root}/{package.package}/{name} (run `make protos`)", file=sys.stderr)
        return not (differ or missing or stale)
    target.mkdir(parents=True, exist_ok=True)
    for name in stale:
        (target / name).unlink()
    for name in names:
        (target / name).write_bytes((fresh / name).read_bytes())
    return True


def main() -> int:
    """Generate, then copy or compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare only")
    check = parser.parse_args().check
    with tempfile.TemporaryDirectory() as tmp:
        generate(Path(tmp))
        well = [compare(p, Path(tmp) / p.package, check=check) for p in PACKAGES]
    return 0 if all(well) else 1


if __name__ == "__main__":
    sys.exit(main())
