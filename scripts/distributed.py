"""Several training processes, started by torchrun: joining and leaving."""

from __future__ import annotations

import logging
import os
from datetime import timedelta

import ignite.distributed as idist
import torch
import torch.distributed as dist

TIMEOUT = timedelta(minutes=30)
"""How long a process waits for the others: reading and checking a large collection is done by the first one alone."""


def join_processes() -> None:
    """Join the processes that torchrun started: NCCL where there are GPUs, else gloo.

    Raises:
        ValueError: not started by torchrun, or more processes than GPUs.
    """
    if "RANK" not in os.environ:
        raise ValueError(
            "multi_gpu_train.json needs torchrun: torchrun --standalone --nproc_per_node=N -m monai.bundle"
        )
    local_rank = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"{os.environ['LOCAL_WORLD_SIZE']} processes, but {torch.cuda.device_count()} GPUs are visible: "
                "lower --nproc_per_node or check CUDA_VISIBLE_DEVICES"
            )
        torch.cuda.set_device(local_rank)
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT)
    idist.sync()  # lets Ignite know; without it its handlers wait for each other forever
    if idist.get_rank() > 0:
        logging.getLogger().setLevel(logging.WARNING)


def leave_processes() -> None:
    """Leave the group at the end of a run."""
    dist.destroy_process_group()
