"""Scripts run in processes that begin with torch and its like imported.

A new interpreter spends seconds on the imports of a recipe before the recipe begins, each time.
Here one server for all tests of a process does them once, before anything has been computed, and
every script runs in a fork of it: a process of its own, with its own memory and environment.
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
RUNS = ["text_lt", "vision_lt", "ldam_plugins.reports.plots"]
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
    """Run a script in one process, or in several as torchrun does; the files of output are ``log``.

    Returns:
        The exit status, negative for a signal, and output, of the first process that failed, or
        else of the first.
    """
    start_server()
    environments = [{**os.environ, "OMP_NUM_THREADS": "1", **dict(environment)}]
    if processes > 1:
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        environments = [environments[0] | rank(i, processes, store) for i in range(processes)]
    logs = [Path(f"{log}.{i}") for i in range(processes)]
    words = [str(script), list(map(str, arguments))]
    running = [
        FORKS.Process(target=be, args=(*words, *rest), daemon=True)
        for rest in zip(environments, logs, strict=True)
    ]
    for process in running:
        process.start()
    until, first = time.monotonic() + timeout, running[0]
    try:
        left = {process.sentinel: process for process in running}
        while left:
            ended = [left.pop(one) for one in wait(list(left), max(0, until - time.monotonic()))]
            if not ended:
                raise TimeoutError(f"{script}: {timeout} seconds; {logs[0].read_text()[-3000:]}")
            for process in ended:
                process.join()
            failed = [process for process in ended if process.exitcode]
            if failed:
                first = failed[0]
                break
    finally:
        for process in running:
            process.kill()
            process.join()
    output = logs[running.index(first)].read_text()
    return subprocess.CompletedProcess(words, first.exitcode, output)


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
