"""Which device trains, what it can do, and how its memory is kept. Knows no model."""

import ctypes
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dinosearch.errors import UsageError
from dinosearch.pretrain.distributed import Team

_HUGE = 2 << 20
_ADVICE = (14, 25)  # MADV_HUGEPAGE for what comes, MADV_COLLAPSE for what is there, from Linux 6.1 on: mman.h


def choose_device(wanted: str) -> torch.device:
    """auto → the GPU if there is one, else the CPU. Raises UsageError for a device that is not there."""
    mps = torch.backends.mps.is_available()
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise UsageError(f"no device {wanted!r}: choose auto, cpu, cuda, cuda:N or mps") from None
    n_cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not {"cpu": True, "mps": mps, "cuda": (device.index or 0) < n_cuda}.get(device.type, False):
        raise UsageError(f"this machine has no {wanted}: leave --device out, or choose cpu")
    return device


def describe_machine(device: torch.device, team: Team) -> str:
    """What decides about the last bits of a result, for people."""
    processes = f"{team.size} processes with " if team.size > 1 else ""
    named, numbers = str(device), ""
    if device.type == "cuda":
        named = f"{device} ({torch.cuda.get_device_name(device)})"
    elif device.type == "cpu":
        n_threads = torch.get_num_threads()
        named = f"{n_threads} CPU thread{'s' * (n_threads != 1)}"
        numbers = " in bf16" if has_bf16(device) else " in fp32"
    return f"{processes}{named}, torch {torch.__version__}{numbers}"


def keep_freed_memory() -> None:
    """Let glibc keep what a step has freed for the next, instead of handing it back to the system page by page.

    Steps allocate tensors of the same sizes again and again, and fresh pages have to be cleared each time. Does nothing
    beside other C libraries.
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mmap_threshold, trim_threshold, top_pad = -3, -1, -2  # malloc.h
        mallopt(mmap_threshold, 2**30)
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(top_pad, 2**26)


def use_huge_pages() -> None:
    """Have Linux keep the heap, as large as it is now, in pages of 2 MB.

    A product reads its matrices across, and with pages of 4 KB the processor looks most of them up anew. To be called
    when steps have taken what memory they need. What the system cannot do, it leaves undone.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    try:
        lines = Path("/proc/self/maps").read_bytes().splitlines()  # names of mapped files may be in any encoding
    except OSError:
        return
    for line in lines:
        if line.endswith(b"[heap]"):
            start, end = (int(address, 16) for address in line.split()[0].split(b"-"))
            start, end = -(-start // _HUGE) * _HUGE, end // _HUGE * _HUGE
            for advice in _ADVICE:
                libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(max(0, end - start)), advice)


def has_bf16(device: torch.device) -> bool:
    """The device multiplies bfloat16 matrices in hardware."""
    if device.type == "cpu":
        capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # absent from older torch
        return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "amx_tile", "bf16"))
    return device.type == "cuda" and torch.cuda.is_bf16_supported()
