"""Scripts in processes of their own that begin with what a recipe imports imported already.

A new interpreter spends seconds on the imports of a recipe before the recipe begins, each time.
Here one server for all tests of a worker does them once, before anything has been computed, and
every script runs in a fork of it, with memory and environment of its own.
"""

from __future__ import annotations

import gc
import os
import runpy
import subprocess
import sys
import time
from multiprocessing import forkserver, get_context
from multiprocessing.connection import wait
from pathlib import Path
from unittest.mock import patch

from paths import HELPERS, RECIPES
from torch.distributed import TCPStore

FORKS = get_context("forkserver")
RUNS = ["text_lt", "vision_lt", "ldam_plugins.reports.plots", "sklearn.datasets"]
FORKS.set_forkserver_preload([*RUNS, "torch.distributed.fsdp"])


def start_server():
    """The server takes its path from the environment that it is started in."""
    paths = [str(RECIPES), str(HELPERS), *sys.path]
    with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(paths)):
        forkserver.ensure_running()


def be(script, arguments, environment, log):
    """In the fork: what ``python script arguments`` does."""
    with open(log, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
    gc.freeze()  # a training run looks for garbage: among what it has made only
    sys.argv = [script, *arguments]
    sys.path.insert(0, os.path.dirname(script))
    runpy.run_path(script, run_name="__main__")


def run_forked(script, arguments, log, *, environment=(), processes=1, timeout=600):
    """Run a script in a fork, or in several that know of each other as torchrun's do.

    Args:
        script: Path.
        arguments: Words of its command line.
        log: Where the output goes, with the number of the process as suffix.
        environment: Variables that differ from those of this process.
        processes: How many.
        timeout: Seconds after which all are killed and ``TimeoutError`` is raised.

    Returns:
        Exit status (negative for a signal) and output of the first process that failed, which ends
        the others, or else of process 0.
    """
    start_server()
    given = {**os.environ, "OMP_NUM_THREADS": "1", **dict(environment)}
    ranks = [{}]
    if processes > 1:
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        ranks = [rank(index, processes, store) for index in range(processes)]
    words, logs = (str(script), [str(word) for word in arguments]), []
    running = []
    try:
        for index, variables in enumerate(ranks):
            logs.append(Path(f"{log}.{index}"))
            process = FORKS.Process(target=be, args=(*words, given | variables, logs[-1]))
            process.start()
            running.append(process)
        shown = running.index(first_failed(running, time.monotonic() + timeout) or running[0])
    finally:
        for process in running:
            process.kill()
            process.join()
    status, output = running[shown].exitcode, logs[shown].read_text()
    return subprocess.CompletedProcess(words, status, output, output)


def first_failed(running, until):
    """Wait for processes, at most to the first that fails; returns it, or None."""
    left = {process.sentinel: process for process in running}
    while left:
        ended = [left.pop(sentinel) for sentinel in wait([*left], until - time.monotonic())]
        if not ended:
            raise TimeoutError(f"{len(left)} of {len(running)} processes did not end in time")
        for process in ended:
            process.join()
            if process.exitcode:
                return process
    return None


def rank(index, processes, store):
    """The variables that torchrun gives one of its processes."""
    return {
        "RANK": str(index),
        "LOCAL_RANK": str(index),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # all are clients of the store made here
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
