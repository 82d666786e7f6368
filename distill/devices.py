"""Which device a run uses, and how it is named in manifests.

device = pick_device("auto"); print(describe_device(device))
"""

import os
import platform
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from distill.errors import UserError
from distill.models import quiet_libraries


def pick_device(name: str = "auto", threads: int = 0) -> torch.device:
    """The device of a recipe's `device`, with CPU threads shared fairly between local processes.

    Raises UserError where CUDA is asked for and absent.
    """
    quiet_libraries()
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda: torch sees no CUDA GPU; set device=auto or cpu")
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(threads or max(1, cores // local_processes))
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def processes(device: torch.device) -> PartialState:
    """The processes of this launch (one, without a launcher). They may wait for each other for days."""
    return PartialState(cpu=device.type == "cpu", timeout=timedelta(days=30))


def main_decides(ranks: PartialState, decide: Callable[[], bool]) -> bool:
    """`decide()` of the main process, known to all: the others must not look at a folder it is changing."""
    answer = [ranks.is_main_process and decide()]
    if ranks.num_processes > 1:
        broadcast_object_list(answer)
    return answer[0]


def describe_device(device: torch.device, processes: int = 1) -> str:
    """For people: the GPU's name, or the CPU's with its thread count."""
    times = f"{processes} x " if processes > 1 else ""
    if device.type == "cuda":
        return times + torch.cuda.get_device_name(device)
    return f"{times}cpu ({_cpu_name()}, {torch.get_num_threads()} threads)"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
