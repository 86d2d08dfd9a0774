"""The launch configurations are ones that Accelerate reads, and say what their names do."""

import os
import subprocess
import sys

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from paths import RECIPES

FOLDER = RECIPES / "accelerate"
KINDS = {
    "one_gpu": (DistributedType.NO, 1, 1),
    "cpu": (DistributedType.MULTI_GPU, 2, 1),  # what Accelerate starts several processes for
    "ddp": (DistributedType.MULTI_GPU, 4, 1),
    "multi_node": (DistributedType.MULTI_GPU, 16, 2),
    "fsdp2": (DistributedType.FSDP, 4, 1),
    "deepspeed_zero2": (DistributedType.DEEPSPEED, 4, 1),
}


def test_every_configuration_is_checked():
    assert {file.stem for file in FOLDER.glob("*.yaml")} == set(KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_accelerate_reads_it(name):
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))  # refuses keys it does not know
    assert isinstance(config, ClusterConfig)
    found = (DistributedType(config.distributed_type), config.num_processes, config.num_machines)
    assert found == KINDS[name]


@pytest.mark.parametrize("name", ["fsdp2", "deepspeed_zero2", "multi_node"])
def test_the_launcher_takes_it(name, monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    arguments = ["--config_file", str(FOLDER / f"{name}.yaml"), "recipe.py", "--lr", "0.1"]
    args, config, _ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    assert args.training_script_args == ["--lr", "0.1"]
    assert args.num_processes == KINDS[name][1] == config.num_processes
    chosen = {"fsdp2": args.use_fsdp, "multi_node": args.multi_gpu}.get(name, args.use_deepspeed)
    assert chosen
    if name == "fsdp2":
        assert str(args.fsdp_version) == "2"
    if name.startswith("deepspeed"):
        assert args.zero_stage == int(name[-1])


def test_the_cpu_one_starts_two_processes_that_know_of_each_other(tmp_path):
    script = tmp_path / "count.py"
    script.write_text(
        "from pathlib import Path\nfrom accelerate import Accelerator\n"
        "rank, ranks = (lambda a: (a.process_index, a.num_processes))(Accelerator(cpu=True))\n"
        f"Path({str(tmp_path)!r}, f'{{rank}}_of_{{ranks}}').touch()\n"
    )
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    config = ["--config_file", str(FOLDER / "cpu.yaml")]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    subprocess.run([*launcher, *config, str(script)], env=environment, check=True, timeout=300)
    assert sorted(path.name for path in tmp_path.glob("*_of_*")) == ["0_of_2", "1_of_2"]
