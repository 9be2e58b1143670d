"""The configurations for `accelerate launch` that lie beside the recipes, as accelerate itself reads them."""

import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env

FILES = sorted((Path(__file__).parents[2] / "recipes" / "accelerate").glob("*.yaml"))


def launched(file: Path, *words: str) -> tuple[Any, dict[str, str]]:
    """What `accelerate launch` makes of a file and of words before the script, and the environment of its processes."""
    parsed = launch_command_parser().parse_args(["--config_file", str(file), *words, "train.py"])
    with mock.patch.dict(os.environ):
        told, _, _ = _validate_launch_command(parsed)
        return told, prepare_multi_gpu_env(told)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_accelerate_knows_every_key(file: Path) -> None:
    config = load_config_from_file(str(file))  # it refuses unknown keys
    assert isinstance(config, ClusterConfig) and not config.use_cpu
    assert config.num_processes == 8 * config.num_machines
    assert f"--config_file recipes/accelerate/{file.name}" in file.read_text()


def test_there_is_one_for_8_gpus_for_shards_and_for_2_nodes() -> None:
    assert [file.stem for file in FILES] == ["2_nodes", "8_gpus", "8_gpus_fsdp2"]


def test_8_gpus_run_8_processes_of_one_machine() -> None:
    told, environment = launched(FILES[1])
    assert told.nproc_per_node == "8" and told.num_machines == 1 and told.multi_gpu
    assert "ACCELERATE_USE_FSDP" not in environment


def test_2_nodes_run_8_processes_each_and_meet_at_the_first() -> None:
    for rank in (0, 1):
        told, _ = launched(FILES[0], "--main_process_ip", "10.0.0.1", "--machine_rank", str(rank))
        assert (told.nnodes, told.nproc_per_node, str(told.node_rank)) == ("2", "8", str(rank))
        assert told.rdzv_endpoint == "10.0.0.1:29500"


def test_shards_are_fsdp2_over_the_blocks_that_a_model_names() -> None:
    told, environment = launched(FILES[2])
    assert told.use_fsdp and told.nproc_per_node == "8"
    with mock.patch.dict(os.environ, environment):
        plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward
    assert not plugin.cpu_ram_efficient_loading and plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"
    assert load_config_from_file(str(FILES[2])).distributed_type == DistributedType.FSDP
