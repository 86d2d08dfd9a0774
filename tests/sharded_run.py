"""Updates of the vision recipe on a model sharded by FSDP2 over CPU processes; run by torchrun."""

import os
import sys

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ldam_plugins import ClassCounts, DeferredSchedule, create_loss, use_cosine_head
from ldam_plugins.heads import fold_cosine_head
from ldam_plugins.hf_setup import fold_when_saved
from ldam_plugins.schedules import Progress
from ldam_plugins.updates import Update

COUNTS = ClassCounts([400, 60, 9, 2, 1])
UPDATES = 6
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def make_model(shard):
    """A small model with a cosine head."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, len(COUNTS)))
    use_cosine_head(model)
    if shard:
        mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
        fully_shard(model[2], mesh=mesh)
        fully_shard(model, mesh=mesh)
    fold_when_saved(model)
    return model


def train(accelerator, name, micro, shard):
    """The model after three updates before the switch and three after it."""
    model, criterion = make_model(shard), create_loss(name, COUNTS)
    schedule = DeferredSchedule("drw", start=0.5, beta=0.99)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    update = Update(accelerator, model, criterion, optimizer)
    generator = torch.Generator().manual_seed(0)
    for step in range(UPDATES):
        images = torch.randn(48, 6, generator=generator)
        target = torch.randint(len(COUNTS), (48,), generator=generator).sort().values
        cuts = accelerator.num_processes * micro
        parts = zip(images.tensor_split(cuts), target.tensor_split(cuts), strict=True)
        mine = list(parts)[accelerator.process_index :: accelerator.num_processes]
        progress = Progress(step, UPDATES, UPDATES // 2)
        criterion.weight.copy_(schedule.class_weights(COUNTS, progress))
        update(mine)
    return model


def loaded(state):
    """What a sharded model of other weights holds after it took in a whole state dict."""
    model = make_model(shard=True)
    nn.init.ones_(model[2].weight)
    set_model_state_dict(
        model, state, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    )
    return get_model_state_dict(model, options=WHOLE)


def refusal(model):
    try:
        fold_cosine_head(model)
    except ValueError as error:
        return str(error)
    return ""


def main(path):
    accelerator = Accelerator(cpu=True)
    found = {}
    for name in ("ce", "ldam"):
        for micro in (1, 4):
            model = train(accelerator, name, micro, shard=True)
            found[name, micro] = get_model_state_dict(model, options=WHOLE)
    found["loaded"] = loaded(dict(found["ldam", 4]))
    found["refusal"] = refusal(model)
    if accelerator.is_main_process:
        torch.save(found, path)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
    # Caches of DTensor keep the process group alive, and its threads abort an interpreter that
    # ends while one of them frees the tensors of a collective.
    os._exit(0)
