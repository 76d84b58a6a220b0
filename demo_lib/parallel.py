"""Data parallel training: the processes that torchrun starts share each batch, and train as one process would.

All draw the same batches, each computes with its rows, and sums go over all: of gradients, losses and batch norm. A
step is that of one process but for rounding; in float64, so is a whole training. In float32 and bfloat16, training lets
such differences grow to those between one process's training in float32 and in float64.
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from demo_lib.config import DemoError
from demo_lib.identity import torchrun_processes

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


@contextmanager
def joined(device: torch.device, batch_size: int) -> Iterator[int]:
    """Join the processes that torchrun started, and give this one's rank, from 0; without torchrun, it is 0.

    They talk by nccl on cuda, where each takes a GPU of its own, and by gloo on cpu. Fewer images in a batch than
    processes, too few GPUs, a PyTorch without nccl, and another device are a DemoError.
    """
    count = torchrun_processes()
    if count == 1:
        yield 0
        return
    if batch_size < count:
        raise DemoError(f"batch_size = {batch_size} leaves some of the {count} processes without images: raise it.")
    if device.type == "cuda":
        _take_gpu()
    elif device.type != "cpu":
        raise DemoError(f"processes can't train together on {device.type}: add --device cpu, or leave out torchrun.")
    # An optimizer imports it, and then it keeps a group that is there, whose threads abort when Python ends.
    import torch.distributed.nn  # noqa: F401

    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()


def _take_gpu() -> None:
    if not dist.is_nccl_available():
        raise DemoError("this PyTorch has no nccl, by which GPUs talk: add --device cpu.")
    wanted, there = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
    if there < wanted:
        todo = f"give --nproc-per-node {there}, or --device cpu"
        raise DemoError(f"{wanted} processes need a GPU each, and this machine has {there}: {todo}.")
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))


def joined_processes() -> int:
    """Return how many processes train together: 1 outside of `joined`."""
    return dist.get_world_size() if dist.is_initialized() else 1


def part(batch: Tensor) -> Tensor:
    """Return this process's share of a batch that all processes have: its rows, all of them in one process.

    Shares differ by one row at most; where there are fewer rows than processes, some are empty.
    """
    return batch.tensor_split(joined_processes())[dist.get_rank()] if joined_processes() > 1 else batch


def sum_over_processes(tensor: Tensor) -> Tensor:
    """Add up the processes' tensors of one shape in place, and return the tensor; all get the same bits.

    A process that is gone is a DemoError in the others.
    """
    if joined_processes() > 1:
        with _all_there():
            dist.all_reduce(tensor)
    return tensor


@contextmanager
def _all_there() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        todo = f"see what it printed, and start again ({str(error).partition('. ')[0]})"
        raise DemoError(f"another process of this training is gone: {todo}.") from None


def sum_gradients(model: nn.Module) -> None:
    """Add up the gradients of the model's weights over the processes, all in one message."""
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    if joined_processes() > 1:
        total = sum_over_processes(torch.cat([gradient.flatten() for gradient in gradients]))
        for gradient, summed in zip(gradients, total.split([each.numel() for each in gradients]), strict=True):
            gradient.copy_(summed.view_as(gradient))


def refuse_differences(**mine: Any) -> None:
    """Raise a DemoError if the processes, which may be on several machines, have other values."""
    if joined_processes() > 1:
        theirs: list[dict] = [{}] * joined_processes()
        with _all_there():
            dist.all_gather_object(theirs, mine)
        if different := [name for name in mine if any(other[name] != mine[name] for other in theirs)]:
            raise DemoError(f"the processes of torchrun differ in their {different[0]}: give all of them the same.")


def global_batch(size: int) -> AbstractContextManager:
    """Let a model treat this process's share of a batch of `size` images as a part of that batch.

    Batch norm takes mean and variance over all processes, as nn.SyncBatchNorm, which works on CUDA only. Dropout draws
    for the whole batch, so that equal seeds drop the same features however many processes there are.
    """
    return _GlobalBatch(size) if joined_processes() > 1 else nullcontext()


class _GlobalBatch(TorchFunctionMode):
    """Calls of F.batch_norm and F.dropout come here first, whatever model they are from."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        ours = {F.batch_norm: self.batch_norm, F.dropout: self.dropout}
        return ours.get(func, func)(*args, **(kwargs or {}))

    def batch_norm(
        self,
        values: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        weight: Tensor,
        bias: Tensor,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        """Do as F.batch_norm, on values of shape (B, C, H, W); below float32, compute in float32."""
        if not training:
            return F.batch_norm(values, running_mean, running_var, weight, bias, False, momentum, eps)
        exact = values if values.dtype == torch.float64 else values.float()
        count, dims = self.size * values.shape[2] * values.shape[3], (0, 2, 3)
        mean = _Sum.apply(exact.sum(dims)) / count
        centred = exact - mean.view(-1, 1, 1)
        variance = _Sum.apply(centred.square().sum(dims)) / count
        with torch.no_grad():
            running_mean.lerp_(mean, momentum)
            running_var.lerp_(variance * count / (count - 1), momentum)
        scale = weight * (variance + eps).rsqrt()
        return torch.addcmul(bias.view(-1, 1, 1), centred, scale.view(-1, 1, 1)).to(values.dtype)

    def dropout(self, values: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        """Do as F.dropout, with this process's rows of the whole batch's mask."""
        whole = values.new_ones((self.size, *values.shape[1:]))
        return values * part(F.dropout(whole, p, training))


class _Sum(torch.autograd.Function):
    """The sum over the processes; its gradient is the sum of theirs, as the loss is the sum of their losses."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return sum_over_processes(tensor.clone())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return sum_over_processes(gradient.clone())
