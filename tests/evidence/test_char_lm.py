"""The tests of examples/char_lm, in a process of their own: its modules have names that other
examples may have, too.
"""

import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[2] / "examples" / "char_lm" / "train_test.py"


def test_char_lm_does_what_it_says():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", TESTS, "-p", "no:cacheprovider"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
