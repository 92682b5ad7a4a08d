"""What a run was made with: versions of the libraries, and the machine."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

_PACKAGES = ("moe-compressor", "torch", "transformers", "tokenizers", "safetensors", "lm-eval", "datasets", "numpy")


def versions(plugins: Mapping[str, str]) -> dict[str, str]:
    """Python and every library that can change a figure, and the distributions that plugins came from."""
    return {**_libraries(), **plugins}


@cache
def _libraries() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            from compressor._version import __version__

            if package == "moe-compressor":
                found[package] = __version__
    return found


def gpus() -> tuple[str, ...]:
    """The GPUs of this machine: cuda:0, cuda:1, …"""
    return tuple(f"cuda:{number}" for number in range(torch.cuda.device_count()))


def hardware(*devices: str) -> dict[str, Any]:
    """The processor, its threads and memory (bytes), and the accelerators in use."""
    names = [torch.cuda.get_device_name(device) for device in devices if device.startswith("cuda")]
    return {
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "device": ", ".join(devices),
        "accelerator": ", ".join(names) or None,
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def available_memory() -> int:
    """Bytes of memory available to each process of a run here, by the system, and its control group if there is one."""
    found = [int(psutil.virtual_memory().available)]
    with suppress(OSError, ValueError):
        limit, used = (Path("/sys/fs/cgroup", name).read_text().strip() for name in ("memory.max", "memory.current"))
        found.append(int(limit) - int(used))
    return min(found) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def available_on(device: str) -> int | None:
    """Bytes of memory that are free on an accelerator; None where there is none, or it does not tell."""
    if not device.startswith("cuda") or not torch.cuda.is_available():
        return None
    return int(torch.cuda.mem_get_info(device)[0])
