"""Runs an example in a process of its own or, to shorten one of its tables, in this one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def as_script(name, *arguments):
    """What `python examples/NAME.py ARGUMENTS` prints."""
    command = [sys.executable, EXAMPLES / f"{name}.py", *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONWARNINGS": "error"}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def in_process(module, out, *options, **replaced):
    """The numbers that an example saves, with some of its names replaced."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, value in replaced.items():
            monkeypatch.setattr(module, name, value)
        monkeypatch.setattr(
            sys, "argv", [f"{module.__name__}.py", "--out", str(out), *map(str, options)]
        )
        module.main()
    return json.loads((out / "results.json").read_text())


def help_of(module, capsys):
    """What an example says to `--help`."""
    with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(SystemExit):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", "--help"])
        module.main()
    return capsys.readouterr().out
