"""What CPU processes are told that accelerate is configured for."""

from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin


def choose(shards: bool) -> None:
    """Let accelerate shard (FSDP2) or make replicas.

    Its shards are for accelerators, and of CPU processes it quietly makes replicas: its state is told what it would
    find on those.
    """
    AcceleratorState._reset_state()
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_CPU
    Accelerator()
    if shards:
        AcceleratorState._shared_state["fsdp_plugin"] = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
        )
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
