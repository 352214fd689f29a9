"""Processes that know only their parts clip by one norm and skip the same steps."""

import json

import numpy as np
import pytest
from run_example import as_script


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_do_what_one_does(tmp_path, processes):
    stdout = as_script(
        "multi_process",
        "--processes",
        processes,
        "--steps",
        10,
        "--seed",
        3,
        "--out",
        tmp_path / "out",
    )
    rows = [line.split() for line in stdout.splitlines() if line.startswith("process")]
    assert [row[1] for row in rows] == [str(i) for i in range(processes)]
    found = [
        json.loads((tmp_path / "out" / f"process{i}.json").read_text()) for i in range(processes)
    ]
    for row, own in zip(rows, found, strict=True):
        assert own == found[0]  # to the bit: all of them decide from the same numbers
        assert (
            own["clip/skipped_steps"] == 1
            and own["clip/steps"] == 9
            and own["clip/clipped_steps"] > 0
        )
        assert own["clip/nonfinite_steps"] == 0 and np.isfinite(own["params"]).all()
        assert float(row[-1]) < 1e-6
