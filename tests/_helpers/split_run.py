"""Updates of the vision recipe on a batch cut over micro-batches and processes, which run this."""

import sys

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from paths import RECIPES
from torch import nn

sys.path.insert(0, str(RECIPES))

import vision_lt

from ldam_plugins import ClassCounts, create_loss, list_losses
from ldam_plugins.training import TrainStep, evaluate, micro_batches, unpadded_batches
from ldam_plugins.training.auto_tune import Tuned, settle

COUNTS = ClassCounts([400, 60, 9, 2])
BATCHES = 3


def data(soft, rows=64):
    """Batches whose classes are sorted, so that every part holds another mix of them."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(BATCHES, rows, 6, generator=generator, dtype=torch.float64)
    target = torch.multinomial(
        torch.tensor([0.5, 0.3, 0.15, 0.05]), BATCHES * rows, True, generator=generator
    )
    target = target.view(BATCHES, rows).sort(dim=1).values
    return images, nn.functional.one_hot(target, 4).double() * 0.9 + 0.025 if soft else target


def train(accelerator, name, weighted, soft, rho, micro, dtype):
    """Parameters after three updates of SGD, and their moving average."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).to(dtype)
    criterion = create_loss(name, COUNTS).to(dtype)
    if weighted:
        criterion.weight.copy_(COUNTS.weights(0.99, dtype=torch.float64))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    net, optimizer = accelerator.prepare(model, optimizer)
    criterion = criterion.to(accelerator.device)
    images, target = (part.to(accelerator.device) for part in data(soft))
    target = target.to(dtype) if soft else target
    average = vision_lt.ModelEmaV3(model, decay=0.5)
    update = TrainStep(accelerator, net, criterion, optimizer)
    for batch, aims in zip(images.to(dtype), target, strict=True):
        parts = zip(
            batch.tensor_split(accelerator.num_processes * micro),
            aims.tensor_split(accelerator.num_processes * micro),
            strict=True,
        )
        mine = list(parts)[accelerator.process_index :: accelerator.num_processes]
        update(mine, rho=rho)
        average.update(model)
    accelerator.free_memory()
    ends = (*model.parameters(), *average.module.parameters())
    return torch.cat([p.detach().flatten() for p in ends])


def train_epoch(accelerator, name, weighted, soft, rho, rows, micro):
    """Parameters after an epoch of the recipe's loop on samples that divide by nothing."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    criterion = create_loss(name, COUNTS).double()
    if weighted:
        criterion.weight.copy_(COUNTS.weights(0.99, dtype=torch.float64))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    images, target = data(False, rows=rows)
    samples = torch.utils.data.TensorDataset(images[0], target[0].sort(descending=True).values)
    size = 24 // (accelerator.num_processes * micro)
    loader = torch.utils.data.DataLoader(samples, batch_size=size)
    net, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    criterion = criterion.to(accelerator.device)
    options = vision_lt.VisionOptions(batch_size=size, smoothing=0.1 if soft else 0.0)
    mix = vision_lt.make_target(options, COUNTS)
    batches = unpadded_batches(accelerator, loader, batch_size=size, samples=rows)
    update = TrainStep(accelerator, net, criterion, optimizer)
    for group in micro_batches(batches, micro):
        parts = [mix(x, y) for x, y in group]
        parts = [(x, y.double() if soft else y) for x, y in parts]
        update(parts, rho=rho)
    accelerator.free_memory()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def cases():
    """Loss, class weights, soft targets, and how far sharpness-aware steps look."""
    for name in list_losses():
        for weighted in (False, True):
            for soft in (False, True):
                yield name, weighted, soft, 0.0
        if name in ("ce", "ldam"):  # the steps know nothing of the loss
            yield name, True, False, 0.3


def precisions(case):
    """The arithmetic is the same in both, so float32 is tried on two losses only."""
    return (torch.float64, torch.float32) if case[0] in ("ce", "ldam") else (torch.float64,)


def epochs(whole):
    """Cases of an epoch whose last update has 13 samples of 24 (37 rows) or only 1 (25)."""
    for case in cases():
        if whole or (case[1] and case[0] in ("ce", "ldam")):
            for rows in (37, 25) if whole else (37,):
                yield *case, rows


def everything(micros, whole=False):
    accelerator = Accelerator(cpu=True)
    results = {"processes": accelerator.num_processes}
    for micro in micros:
        for case in cases():
            for dtype in precisions(case):
                results[(*case, micro, dtype)] = train(accelerator, *case, micro, dtype)
    for micro in micros:
        for case in epochs(whole):
            results[("epoch", *case, micro)] = train_epoch(accelerator, *case, micro)
    logits = 3 * torch.randn(37, 4, generator=torch.Generator().manual_seed(2))
    images = torch.utils.data.TensorDataset(logits, torch.arange(37) % 4)
    loader = accelerator.prepare(torch.utils.data.DataLoader(images, batch_size=5))
    groups = [f"camera {row // 3}" for row in range(37)]  # in the order of the loader
    results["test"] = evaluate(
        accelerator, nn.Identity(), loader, COUNTS, groups=groups, detailed=True
    )
    pair = torch.utils.data.TensorDataset(logits[:, :2], torch.arange(37) % 2)
    loader = accelerator.prepare(torch.utils.data.DataLoader(pair, batch_size=5))
    results["two"] = evaluate(
        accelerator, nn.Identity(), loader, ClassCounts([9, 4]), detailed=True
    )
    mine = Tuned("no" if accelerator.process_index else "bf16")
    results["tuned"] = gather_object([settle("none", lambda: mine, mine, resume=False).precision])
    return results


if __name__ == "__main__":
    found = everything([int(micro) for micro in sys.argv[2].split(",")], sys.argv[3] == "whole")
    if int(torch.distributed.get_rank()) == 0:
        torch.save(found, sys.argv[1])
    # A process that ends with its threads of gloo running may be aborted.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
