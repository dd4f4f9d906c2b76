"""The races of `_resident.c` with their windows held open: built with delays between the steps."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.resident.guests import PATIENCE

ROOT = Path(__file__).parents[2]
NEEDED = ("kvmaio", "devices", "tests", "setup.py", "pyproject.toml", "README.md", "LICENSE")

pytestmark = [pytest.mark.kvm, pytest.mark.slow, pytest.mark.timeout(600 * PATIENCE)]


def run(folder, *command, **environment):
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def stressed(tmp_path_factory):
    """A copy of the project, its C core built with random delays."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler: the C core cannot be built with delays")
    folder = tmp_path_factory.mktemp("stressed")
    for name in NEEDED:
        source = ROOT / name
        if source.is_dir():
            ignore = shutil.ignore_patterns("__pycache__", "*.so")
            shutil.copytree(source, folder / name, symlinks=True, ignore=ignore)
        else:
            shutil.copy(source, folder / name)
    run(folder, "setup.py", "-q", "build_ext", "--inplace", CFLAGS="-DKVMAIO_STRESS")
    where = run(folder, "-c", "import kvmaio.kvm._native as native; print(native.__file__)")
    assert Path(where.strip()).is_relative_to(folder)
    return folder


@pytest.mark.parametrize(
    "tests",
    [("test_wakeups.py", "no_"), ("test_residents.py", "kick or limit or half or cancelled")],
    ids=["wake-ups", "residents"],
)
def test_nothing_is_lost_with_the_windows_open(stressed, tests):
    file, chosen = tests
    options = ("-q", "-p", "no:cacheprovider", "-k", chosen)
    run(stressed, "-m", "pytest", f"tests/resident/{file}", *options, KVMAIO_WAKEUPS="40000")
