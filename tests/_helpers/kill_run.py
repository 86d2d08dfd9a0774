"""Start a recipe on tiny data, end it with a signal at a chosen moment, and resume it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
from forked import run_forked
from paths import RECIPES
from safetensors.torch import load_file

VISION = ["--epochs", 4, "--start", 2, "--decay_milestones", 2, "--ratio", 20, "--resume", "auto"]
VISION += ["--mixed_precision", "no"]
TEXT = [
    "--eval_test_every",
    1,
    "--epochs",
    3,
    "--start",
    1,
    "--batch_size",
    8,
    "--hidden_size",
    8,
    "--lr",
    0.01,
]
TEXT += [
    "--model",
    "bilstm",
    "--warmup",
    0,
    "--embedding_size",
    8,
    "--mixed_precision",
    "no",
    "--resume",
    "auto",
]
# Runs the recipe with signals to itself at named moments: `moment:count:signal` in KILL_AT.
MOMENTS = """
import os, runpy, signal, sys
moment, count, number = os.environ["KILL_AT"].split(":")
left = [int(count)]
def strike(*_):
    left[0] -= 1
    if left[0] == 0 and os.environ.get("RANK", "0") == os.environ.get("KILL_RANK", "0"):
        os.kill(os.getpid(), int(number))
def before(owner, name):
    plain = getattr(owner, name)
    def struck(*args, **kwargs):
        strike()
        return plain(*args, **kwargs)
    setattr(owner, name, struck)
import torch, safetensors.torch
from ldam_plugins.metrics import MetricAccumulator
from ldam_plugins.integrations.transformers import callback as hf_plugin
from ldam_plugins.training import history as run_files
if moment == "step":
    from torch.optim.optimizer import register_optimizer_step_pre_hook
    register_optimizer_step_pre_hook(strike)
if moment == "evaluation":
    before(MetricAccumulator, "update")
if moment == "history":
    before(run_files.HistoryWriter, "append")
if moment == "checkpoint":  # files of a checkpoint that torch writes: some are there, some not
    before(torch, "save")
sys.path.insert(0, os.path.dirname(sys.argv[1]))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def launch(recipe, flags, *, processes=1, environment=(), wait=True):
    """Run a recipe's command line; returns the finished (or, without ``wait``, running) process."""
    command = [sys.executable]
    if processes > 1:
        # torchrun takes --start for an abbreviation of an option of its own.
        command += ["-m", "accelerate.commands.launch", "--multi_gpu", "--main_process_port", "0"]
        command += ["--num_processes", str(processes)]
    moments = dict(environment)
    script = RECIPES / f"{recipe}_lt.py"
    if "KILL_AT" in moments:
        driver = Path(moments["DRIVER"])
        driver.write_text(MOMENTS)
        command += [str(driver)]
    command += [str(script), *map(str, flags)]
    running = subprocess.Popen(
        command,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", **moments},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    if not wait:
        return running
    output, _ = running.communicate(timeout=600)
    return subprocess.CompletedProcess(command, running.returncode, output)


def fork(recipe, flags, *, environment=()):
    """The same for one process, in a fork instead of an interpreter of its own."""
    flags = list(flags)
    out = Path(flags[flags.index("--output_dir") + 1])
    script, moments = RECIPES / f"{recipe}_lt.py", dict(environment)
    if "KILL_AT" in moments:
        driver = Path(moments["DRIVER"])
        driver.write_text(MOMENTS)
        script, flags = driver, [script, *flags]
    moments = {"ACCELERATE_USE_CPU": "true", **moments}
    return run_forked(script, flags, out.with_suffix(".log"), environment=moments)


def kill_after(recipe, flags, seconds, *, processes=1, environment=()):
    """SIGKILL the run and all its processes after a time; returns whether it was still running."""
    running = launch(recipe, flags, processes=processes, environment=environment, wait=False)
    try:
        running.communicate(timeout=seconds)
        return False
    except subprocess.TimeoutExpired:
        # Launchers start their processes in sessions of their own, so a group would not do.
        family = [
            *psutil.Process(running.pid).children(recursive=True),
            psutil.Process(running.pid),
        ]
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family[:-1], timeout=30)
        running.communicate()
        return True


def killed_at(
    recipe, moment, flags, tmp_path, number=signal.SIGKILL, device=(), start=launch, **more
):
    environment = {"KILL_AT": f"{moment}:{int(number)}", "DRIVER": str(tmp_path / "driver.py")}
    environment |= dict(device)
    return start(recipe, flags, environment=environment, **more)


def finish(recipe, flags, start=launch, **more):
    done = start(recipe, flags, **more)
    assert done.returncode == 0, done.stdout[-3000:]


def result(out):
    """Weights of the exported model and what was measured."""
    measured = json.loads((out / "metrics.json").read_text())["test"]
    return load_file(out / "model" / "model.safetensors"), measured
