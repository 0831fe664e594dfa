"""A process raises its own limit of open files, as far as the system lets it."""

import subprocess
import sys

import pytest

_RAISE = """
import resource, sys
from fedtune.file_limit import raise_file_limit
soft, hard = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
print(raise_file_limit(), *resource.getrlimit(resource.RLIMIT_NOFILE))
"""


@pytest.mark.parametrize(("soft", "hard", "raised"), [(64, 512, 512), (512, 512, 512)])
def test_the_limit_of_open_files_rises_to_what_the_process_may_have(soft: int, hard: int, raised: int) -> None:
    command = [sys.executable, "-c", _RAISE, str(soft), str(hard)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert [int(word) for word in done.stdout.split()] == [raised, raised, hard]
