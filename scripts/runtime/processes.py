"""Several processes, started by torchrun: joining and leaving."""

from __future__ import annotations

import logging
import os
from datetime import timedelta

import ignite.distributed as idist
import torch
import torch.distributed as dist

TIMEOUT = timedelta(minutes=30)
"""How long a process waits for the others: reading and checking a large collection is done by the first one alone."""
MEETING_TIMEOUT = timedelta(days=30)
"""How long a process that has done its work waits for the others to do theirs."""


def join_processes(device: str, val_groups: int) -> None:
    """Join the processes that torchrun started: through NCCL on GPUs, else gloo.

    Args:
        device: this process's device.
        val_groups: validation groups, of which every process needs one.

    Raises:
        ValueError: not started by torchrun, more processes than GPUs, or more than validation groups.
    """
    if "RANK" not in os.environ:
        raise ValueError(
            "multi_gpu_train.json needs torchrun: torchrun --standalone --nproc_per_node=N -m monai.bundle"
        )
    if val_groups < int(os.environ["WORLD_SIZE"]):
        raise ValueError(f"--val_groups {val_groups} is less than one for each of {os.environ['WORLD_SIZE']} processes")
    local_rank, on_gpu = int(os.environ["LOCAL_RANK"]), str(device).startswith("cuda")
    if on_gpu:
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"{os.environ['LOCAL_WORLD_SIZE']} processes, but {torch.cuda.device_count()} GPUs are visible: "
                "lower --nproc_per_node or check CUDA_VISIBLE_DEVICES"
            )
        torch.cuda.set_device(local_rank)
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=TIMEOUT)
    idist.sync()  # lets Ignite know; without it its handlers wait for each other forever
    if idist.get_rank() > 0:
        logging.getLogger().setLevel(logging.WARNING)


def leave_processes() -> None:
    """Leave the group at the end of a run, together: a process that leaves while others still talk to it may abort."""
    dist.barrier()
    dist.destroy_process_group()


def usable_device(name: str | torch.device) -> torch.device:
    """The device of this name.

    Raises:
        ValueError: no such kind of device, or a GPU that PyTorch does not see.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"no device is called {name}: give cuda, cuda:1 or cpu") from error
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(
            f"PyTorch sees {count} GPUs, so there is no {device}: give cpu or one that is there, or check the driver, "
            "CUDA_VISIBLE_DEVICES, and whether PyTorch was built for GPUs"
        )
    return device


def local_device() -> str:
    """A GPU for this process, if there is any; torchrun's processes on a machine take turns."""
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"


def meet_processes() -> None:
    """Return when all of torchrun's processes, if there are several, have come here.

    They are not joined before, so that none waits for another while there is work.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    dist.init_process_group("gloo", timeout=MEETING_TIMEOUT)
    dist.barrier()
    dist.destroy_process_group()
