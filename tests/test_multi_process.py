"""Processes that know only their parts clip by one norm and skip the same steps."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLE = Path(__file__).parents[1] / "examples" / "multi_process.py"


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_do_what_one_does(tmp_path, processes):
    command = [
        sys.executable,
        EXAMPLE,
        "--processes",
        str(processes),
        "--steps",
        "10",
        "--seed",
        "3",
        "--out",
        tmp_path / "out",
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONWARNINGS": "error"})
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith("process")]
    assert [row[1] for row in rows] == [str(i) for i in range(processes)]
    found = [json.loads((tmp_path / "out" / f"process{i}.json").read_text()) for i in range(processes)]
    for row, own in zip(rows, found, strict=True):
        assert own == found[0]  # to the bit: all of them decide from the same numbers
        assert own["clip/skipped_steps"] == 1 and own["clip/steps"] == 9 and own["clip/clipped_steps"] > 0
        assert own["clip/nonfinite_steps"] == 0 and np.isfinite(own["params"]).all()
        assert float(row[-1]) < 1e-6
