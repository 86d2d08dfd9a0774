"""Updates of the vision recipe on a model sharded by FSDP2 over CPU processes, which run this."""

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
from torch.nn.parallel import DistributedDataParallel

from ldam_plugins import ClassCounts, DeferredSchedule, create_loss, use_cosine_head
from ldam_plugins.heads import fold_cosine_head
from ldam_plugins.heads.folding import fold_when_saved
from ldam_plugins.schedules import Progress
from ldam_plugins.training.step import TrainStep

COUNTS = ClassCounts([400, 60, 9, 2, 1])
UPDATES = 6
RUNS = {"ce": ("ce", 0.0), "ldam": ("ldam", 0.0), "ldam, SAM": ("ldam", 0.3)}
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def plain_model():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, len(COUNTS)))


def make_model(shard):
    """A small model with a cosine head."""
    model = use_cosine_head(plain_model())
    if shard:
        mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
        fully_shard(model[2], mesh=mesh)
        fully_shard(model, mesh=mesh)
    fold_when_saved(model)
    return model


def train(accelerator, run, micro, shard):
    """The model after three updates before the switch and three after it."""
    name, rho = RUNS[run]
    model, criterion = make_model(shard), create_loss(name, COUNTS)
    schedule = DeferredSchedule("drw", start=0.5, beta=0.99)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    update = TrainStep(accelerator, model, criterion, optimizer)
    generator = torch.Generator().manual_seed(0)
    for step in range(UPDATES):
        images = torch.randn(48, 6, generator=generator)
        target = torch.randint(len(COUNTS), (48,), generator=generator).sort().values
        cuts = accelerator.num_processes * micro
        parts = zip(images.tensor_split(cuts), target.tensor_split(cuts), strict=True)
        mine = list(parts)[accelerator.process_index :: accelerator.num_processes]
        progress = Progress(step, UPDATES, UPDATES // 2)
        criterion.weight.copy_(schedule.class_weights(COUNTS, progress))
        update(mine, rho=rho)
    return model


def loaded(state):
    """What a sharded model of other weights holds after it took in a whole state dict."""
    model = make_model(shard=True)
    nn.init.ones_(model[2].weight)
    set_model_state_dict(
        model, state, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    )
    return get_model_state_dict(model, options=WHOLE)


def refusal(function, *arguments):
    try:
        function(*arguments)
    except ValueError as error:
        return str(error)
    return ""


def ddp(model):
    return DistributedDataParallel(model, find_unused_parameters=True)


def sharded(model, reshard=False):
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    return fully_shard(model, mesh=mesh, reshard_after_forward=reshard)


def gradients(wrap, rank, chunked, parts=1):
    """What the second backward pass of a wrapped model leaves."""
    model = wrap(use_cosine_head(plain_model(), chunked=chunked))
    criterion = create_loss("ldam", COUNTS)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(2):
        model.zero_grad()
        images = torch.randn(4, 6, generator=generator)
        criterion(model(images), torch.randint(len(COUNTS), (4,), generator=generator)).backward()
    found = [parameter.grad for parameter in model.parameters()]
    return [g.full_tensor() if hasattr(g, "full_tensor") else g for g in found]


def first_step(wrapped):
    """A head put on the model inside a wrapper, and one batch."""
    use_cosine_head(wrapped.module)
    wrapped(torch.randn(4, 6))


def of_wrappers(rank):
    """Gradients by wrapper and kind of head, and what is refused."""
    found = {
        (name, chunked): gradients(wrap, rank, chunked)
        for name, wrap in (("ddp", ddp), ("fsdp2", sharded))
        for chunked in (False, True)
    }
    resharded = lambda model: sharded(model, reshard=True)  # noqa: E731
    found["resharded"] = refusal(gradients, resharded, rank, True)
    for name, wrap in (("ddp", ddp), ("fsdp2", sharded)):
        found["late", name] = refusal(use_cosine_head, wrap(plain_model()))
    found["late", "inside"] = refusal(first_step, ddp(plain_model()))
    return found


def main(path):
    accelerator = Accelerator(cpu=True)
    found = {}
    for name in RUNS:
        for micro in (1, 4):
            model = train(accelerator, name, micro, shard=True)
            found[name, micro] = get_model_state_dict(model, options=WHOLE)
    found["loaded"] = loaded(dict(found["ldam", 4]))
    found["refusal"] = refusal(fold_cosine_head, model)
    found["wrapped"] = of_wrappers(accelerator.process_index)
    if accelerator.is_main_process:
        torch.save(found, path)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
    # Caches of DTensor keep the process group alive, and its threads abort an interpreter that
    # ends while one of them frees the tensors of a collective.
    os._exit(0)
