"""Training and evaluation of a network: plain PyTorch that yields one record per logging point."""

from collections.abc import Iterator
from dataclasses import dataclass

from demo_lib.config import DemoError, TrainConfig
from demo_lib.data import FashionData, Split, batches
from demo_lib.parallel import global_batch, part, refuse_differences, sum_gradients, sum_over_processes

import joblib
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

# PyTorch counts all cores of the machine, where a container may have few of them.
torch.set_num_threads(min(torch.get_num_threads(), joblib.cpu_count()))


@dataclass(frozen=True)
class Record:
    """One logging point: the global optimizer step, the epoch (from 1) and the metrics by name."""

    step: int
    epoch: int
    metrics: dict[str, float]
    weights: dict[str, Tensor] | None = None  # on the CPU; only if the validation accuracy is the best so far


def pick_device(config: TrainConfig) -> torch.device:
    """Return the configuration's device, for auto the first here of cuda, mps, cpu; a DemoError if it is not here."""
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    there = [name for name in here if here[name]]
    if config.device not in ("auto", *there):
        raise DemoError(f"device = {config.device!r} is not on this machine: choose auto or one of {', '.join(there)}.")
    return torch.device(there[0] if config.device == "auto" else config.device)


def fit(model: nn.Module, data: FashionData, config: TrainConfig) -> Iterator[Record]:
    """Train the model in place, yielding a record every `config.log_every` steps and one after each epoch.

    Records within an epoch hold `train_loss`, the mean since the record before; the record that ends an epoch also
    holds `val_loss`, `val_accuracy` and `learning_rate`. AdamW with a one-cycle learning rate (Smith and Topin 2018,
    arXiv:1708.07120). Same configuration, data and number of CPU threads: the same metrics to the bit on a CPU.
    Processes that have `joined` share each batch, and all of them get the same records.
    """
    refuse_differences(configuration=config, data=data.digest)
    device = pick_device(config)
    model.to(device).to(memory_format=torch.channels_last)
    train, validation = data.train.to(device), data.validation.to(device)
    generator = torch.Generator().manual_seed(config.seed)
    torch.manual_seed(config.seed)  # dropout draws from the global generator
    steps_per_epoch = -(-len(train) // config.batch_size)
    rate, steps = config.learning_rate, config.epochs * steps_per_epoch
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=config.weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, anneal_strategy="linear")
    step, losses, best = 0, [], -1.0
    for epoch in range(1, config.epochs + 1):
        for images, labels in batches(train, config.batch_size, generator, flip=config.flip):
            learning_rate = schedule.get_last_lr()[0]
            losses.append(_step(model, images, labels, optimizer, schedule))
            step += 1
            if step % config.log_every == 0 and step % steps_per_epoch:
                yield Record(step, epoch, {"train_loss": _mean(losses)})
        metrics = {f"val_{name}": value for name, value in evaluate(model, validation).items()}
        metrics |= {"train_loss": _mean(losses), "learning_rate": float(learning_rate)}
        weights = None
        if metrics["val_accuracy"] > best:
            best = metrics["val_accuracy"]
            weights = {name: weight.detach().cpu().clone() for name, weight in model.state_dict().items()}
        yield Record(step, epoch, metrics, weights)
    model.to(memory_format=torch.contiguous_format)  # torch.export warns of any other


def evaluate(model: nn.Module, split: Split) -> dict[str, float]:
    """Return the mean cross-entropy (`loss`) and the share of right answers (`accuracy`) on the split, in float32."""
    logits = predict(model, split)
    labels = split.labels.to(logits.device)
    right = (logits.argmax(dim=1) == labels).float().mean()
    return {"loss": F.cross_entropy(logits, labels).item(), "accuracy": right.item()}


@torch.inference_mode()
def predict(model: nn.Module, split: Split, batch_size: int = 500) -> Tensor:
    """Return the model's logits for the split, float32 of shape (N, 10), on the model's device."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    parts = (
        images.contiguous(memory_format=torch.channels_last) for images, _ in batches(split.to(device), batch_size)
    )
    logits = torch.cat([model(images) for images in parts])
    model.train(was_training)
    return logits


def _step(model: nn.Module, images: Tensor, labels: Tensor, optimizer: Optimizer, schedule: LRScheduler) -> Tensor:
    """Take one optimizer step and return this process's share of its loss.

    It is still on the device: reading it would wait for a GPU.
    """
    model.train()
    size, images, labels = len(labels), part(images), part(labels)
    with global_batch(size), torch.autocast(images.device.type, torch.bfloat16, enabled=_has_bfloat16(images.device)):
        logits = model(images.contiguous(memory_format=torch.channels_last))
        loss = F.cross_entropy(logits, labels, reduction="sum") / size
    optimizer.zero_grad()
    loss.backward()
    sum_gradients(model)
    optimizer.step()
    schedule.step()
    return loss.detach()


def _has_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 is fast here; emulated, it is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16", False)


def _mean(losses: list[Tensor]) -> float:
    """Return the mean of the losses gathered so far and empty the list."""
    mean = sum_over_processes(torch.stack(losses)).mean().item()
    losses.clear()
    return mean
