"""Which device a run uses, and how it is named in manifests.

device = pick_device("auto"); print(describe_device(device))
"""

import math
import os
import platform
import resource
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, reduce

from distill.console import quiet_libraries
from distill.errors import UserError

MOST_THREADS = 4096  # of a recipe's `threads` too
LEAST_PIECE = 64  # rows: a forward pass over fewer takes nearly as long


def pick_device(name: str = "auto", threads: int = 0) -> torch.device:
    """The device of a recipe's `device`, with CPU threads shared fairly between local processes.

    `threads` 0 takes what the environment says (`asked_threads`), else every core.

    Raises UserError where CUDA is asked for and absent.
    """
    quiet_libraries()
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda: torch sees no CUDA GPU; set device=auto or cpu")
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    asked = threads or asked_threads()
    torch.set_num_threads(asked or max(1, cores() // local_processes))
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def asked_threads() -> int:
    """CPU threads by DISTILL_THREADS, OMP_NUM_THREADS or MKL_NUM_THREADS, the first that is set; 0 for none.

    Raises UserError for a DISTILL_THREADS that is no number; what the others hold besides one is for their libraries.
    """
    for name in ("DISTILL_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        text = (
            os.environ.get(name, "").partition(",")[0].strip()
        )  # OMP has a number for each level of nesting
        if text.isdecimal() and 0 < int(text[:9]) <= MOST_THREADS:
            if not (name == "OMP_NUM_THREADS" and text == "1" and _launcher_chose()):
                return int(text)
        elif name == "DISTILL_THREADS" and text not in ("", "0"):
            raise UserError(
                f"{name}={text[:40]}: give the number of CPU threads, 1 to {MOST_THREADS}, or unset it"
            )
    return 0


def _launcher_chose() -> bool:
    """Whether OMP_NUM_THREADS=1 is torchrun's default for several processes, and not what the user had set."""
    if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) == 1 or "TORCHELASTIC_RUN_ID" not in os.environ:
        return False
    try:
        started_with = Path(f"/proc/{os.getppid()}/environ").read_bytes()
    except OSError:
        return False
    return b"OMP_NUM_THREADS=" not in started_with


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processes(device: torch.device) -> PartialState:
    """The processes of this launch (one, without a launcher). They may wait for each other for days."""
    return PartialState(cpu=device.type == "cpu", timeout=timedelta(days=30))


def main_decides(ranks: PartialState, decide: Callable[[], bool]) -> bool:
    """`decide()` of the main process, known to all: the others must not look at a folder it is changing."""
    answer = [ranks.is_main_process and decide()]
    if ranks.num_processes > 1:
        broadcast_object_list(answer)
    return answer[0]


def from_all(value: Any) -> list[Any]:
    """`value` of every process of this launch, in order of rank; [value] for a single one."""
    if PartialState().num_processes == 1:
        return [value]
    return gather_object([value])


def share_of(pieces: Sequence[Any]) -> list[Any]:
    """This process's of `pieces`, dealt in turn; all of them where there are fewer than processes."""
    state = PartialState()
    return list(
        pieces[state.process_index :: state.num_processes] if len(pieces) >= state.num_processes else pieces
    )


def dealt(pieces: Sequence[Any], work: Callable[[Any], Any]) -> list[Any]:
    """`work(piece)` of every piece, in their order, on every process; each did its share of them.

    Every process of the launch comes here with the same pieces. What is added up from the results is the same
    however many processes there are, to the last bit: the pieces are, and their order.
    """
    state = PartialState()
    rank, world = state.process_index, state.num_processes
    # There and back, so that of pieces that fall in size nobody gets the larger one each time.
    owner = [i % world if i // world % 2 == 0 else world - 1 - i % world for i in range(len(pieces))]
    done = {i: work(piece) for i, piece in enumerate(pieces) if owner[i] == rank}
    everyone = from_all(done)
    return [everyone[owner[i]][i] for i in range(len(pieces))]


def even_size(count: int, most: int) -> int:
    """How many of `count` rows make a piece, at most `most`: an even number of pieces of one size, so that two
    processes have the same work; one piece where two would have less than LEAST_PIECE rows each.
    """
    pieces = max(1, math.ceil(count / most))
    if pieces % 2 and count >= (pieces + 1) * LEAST_PIECE:
        pieces += 1
    return max(1, math.ceil(count / pieces))


def summed(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of a CPU tensor over all processes, on the CPU; all of them call it with one shape."""
    state = PartialState()
    return tensor if state.num_processes == 1 else reduce(tensor.to(state.device), "sum").cpu()


def main_alone(work: Callable[[], Any]) -> Any:
    """`work()` of the main process, known to all: what is timed, or cannot be dealt."""
    state = PartialState()
    found = [work() if state.is_main_process else None]
    if state.num_processes > 1:
        broadcast_object_list(found)
    return found[0]


def peak_memory(device: torch.device) -> int:
    """Bytes at the highest: of the device where it is a GPU, else of this process since it started."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def device_memory(device: torch.device) -> int:
    """Bytes the device has: of the GPU, or main memory within the limit of this container."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = Path(path).read_text().strip() if Path(path).is_file() else "max"
        if text.isdigit():
            total = min(total, int(text))
    return total


def free_memory(device: torch.device) -> int | None:
    """Bytes nobody uses at this moment, or None where that is not told."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    info = Path("/proc/meminfo")
    for line in info.read_text().splitlines() if info.is_file() else ():
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    return None


# Dense matrix products, FLOP/s in 16 bits and in 8, from NVIDIA's datasheets (without sparsity).
_PEAKS = {
    "H200": (989e12, 1979e12), "H100": (989e12, 1979e12), "A100": (312e12, None), "L40S": (362e12, 733e12),
    "L4": (121e12, 242e12), "A10": (125e12, None), "T4": (65e12, None), "V100": (125e12, None),
    "RTX 4090": (165e12, 330e12), "RTX 3090": (71e12, None),
}  # fmt: skip


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Peak FLOP/s of the device in Accelerate's mixed precision `precision`; None where no datasheet is known."""
    if device.type != "cuda" or precision == "no":
        return None
    name = torch.cuda.get_device_name(device)
    half, eighth = next((peaks for known, peaks in _PEAKS.items() if known in name), (None, None))
    return eighth if precision == "fp8" else half


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
