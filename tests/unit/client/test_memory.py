"""malloc settings: applied on glibc, and left alone where the user has set them."""

import os
import subprocess
import sys

import pytest

CODE = """
import sys, paramesh.memory as m
assert m.keep_big_buffers() is (sys.argv[1] == "True"), "settings"
def faults():
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
bytearray(8 << 20)
before = faults()
for _ in range(50):
    held = [b"x" * ((2 << 20) + i) for i in range(8)]
print(faults() - before)
"""


def run(**environ: str) -> int:
    wanted = environ.pop("WANTED")
    env = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")} | environ
    done = subprocess.run(
        [sys.executable, "-c", CODE, wanted], env=env, capture_output=True, text=True, timeout=60, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif("glibc" not in str(os.confstr("CS_GNU_LIBC_VERSION")), reason="glibc only")
def test_frames_do_not_fault_their_pages_anew():
    kept, default = run(WANTED="True"), run(WANTED="False", PARAMESH_MALLOC="0")
    assert default > 50 * 100, "without the settings every 2 MiB block is faulted in again"
    assert kept < default / 10


def test_the_users_own_settings_win():
    run(WANTED="False", MALLOC_TOP_PAD_="1048576")


def test_what_is_imported_is_not_looked_at_again():
    code = "import gc, paramesh.memory as m; m.keep_imports(); print(gc.get_freeze_count() > 1000)\n"
    code += "print(len(gc.get_objects()) < 1000)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["True", "True"]
