"""Cells of a grid whose recipe takes no time, for the tests of what runs cells."""

import json
import time

import psutil

from ldam_plugins.benchmark.local import CellTask

# A recipe that does what its --mode says, in a fraction of a second. `signal:NUMBER:PID` sends the
# signal when it runs first, 0 standing for the process that waits for it, and then hangs.
RECIPE = """
import json, os, pathlib, signal, sys, time
words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
out, mode = pathlib.Path(words["--output_dir"]), words["--mode"]
begun = (out / "calls.txt").exists()
(out / "began.json").write_text(json.dumps({"pid": os.getpid(), "environment": dict(os.environ)}))
with (out / "calls.txt").open("a") as calls:
    calls.write(words["--resume"] + "\\n")
if mode == "fail":
    print("step 1\\rstep 2\\rstep 3", flush=True)
    raise ValueError("`x` must be y")
if mode.startswith("signal:") and not begun:
    _, number, pid = mode.split(":")
    os.kill(int(pid) or os.getppid(), int(number))
    time.sleep(300)
if mode == "silent":
    sys.exit()
if mode == "hang":
    time.sleep(300)
if mode.startswith("meet:"):
    while not (out.parent / mode[5:] / "began.json").exists():
        time.sleep(0.01)
options = {"mode": mode, "resume": "auto", "output_dir": str(out)}
(out / "metrics.json").write_text(json.dumps({"options": options}))
if mode == "late":
    sys.exit(3)
"""


def cells_in(tmp_path):
    """A function that makes runs of the small recipe."""
    recipe = tmp_path / "small.py"
    recipe.write_text(RECIPE)

    def make(mode="finish", name="a", **options):
        return CellTask(
            name=name,
            recipe=recipe,
            arguments=("--mode", mode),
            folder=tmp_path / "cells" / name,
            options={"mode": mode, "resume": "no", "output_dir": "elsewhere", **options},
            defaults={"mode": "finish"},
        )

    return make


def calls(run):
    path = run.folder / "calls.txt"
    return len(path.read_text().splitlines()) if path.exists() else 0


def began(run):
    path = run.folder / "began.json"
    until = time.monotonic() + 60
    while time.monotonic() < until:
        if path.exists() and path.read_text():
            return json.loads(path.read_text())
        time.sleep(0.01)
    raise AssertionError(f"{run} did not begin")


def gone(pid):
    until = time.monotonic() + 60
    while time.monotonic() < until:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.01)
    return False
