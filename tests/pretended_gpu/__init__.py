"""GPUs that are not there: everything up to the launch is real, and a driver that only pretends takes it.

Triton's own binder, compiler (the assembler only if asked) and launcher run, as on a GPU. `driver.c`, built with
the C compiler that Triton needs anyway, stands in for the CUDA driver: it refuses what a real one refuses and
computes nothing. `tensors.py` lets CPU tensors say that they lie on a GPU. So whatever fails here fails on the
first real run, too; that a kernel computes the right numbers is shown elsewhere (Triton's interpreter, a real
GPU).

    with pretended_gpus(GPUS["H100"]) as driver:
        q = torch.randn(1, 8, 128, 64, dtype=torch.bfloat16, device="cuda")
        fastattn.attention(q, q, q, backend="triton")
        driver.launches()

Only for a process of its own: Triton keeps the driver that it has loaded. TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch

SOURCE = Path(__file__).with_name("driver.c")


class Gpu(NamedTuple):
    """Compute capability, multiprocessors, and shared memory in bytes: the most a program may ask for, and what a
    multiprocessor has (CUDA C++ Programming Guide, "Compute Capabilities")."""

    name: str
    major: int
    minor: int
    processors: int
    shared_optin: int
    shared_per_processor: int


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100", 8, 0, 108, 163 * 1024, 164 * 1024),
        Gpu("RTX 3090", 8, 6, 82, 99 * 1024, 100 * 1024),
        Gpu("RTX 4090", 8, 9, 128, 99 * 1024, 100 * 1024),
        Gpu("H100", 9, 0, 132, 227 * 1024, 228 * 1024),
        Gpu("B200", 10, 0, 148, 227 * 1024, 228 * 1024),
        Gpu("RTX 5090", 12, 0, 170, 99 * 1024, 100 * 1024),
    )
}


def obstacle() -> str | None:
    """Why no GPU can be pretended here; None if one can."""
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0", "false", "off"):
        return "TRITON_INTERPRET is set: nothing would be launched"
    if torch.version.cuda or torch.version.hip:
        return "PyTorch is built for real GPUs here: two drivers would mix"
    return None if compiler() else "there is no C compiler (gcc, clang or $CC)"


def compiler() -> str | None:
    """The C compiler that Triton would use."""
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")


class _Limits(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in Gpu._fields[1:]]


class Launch(ctypes.Structure):
    """What the driver saw last: the grid, threads and bytes of shared memory of a program."""

    _fields_ = [("grid", ctypes.c_uint * 3), ("threads", ctypes.c_uint), ("shared", ctypes.c_uint)]


class Driver:
    """The pretended driver, loaded: what it was told and what it saw."""

    def __init__(self, library: ctypes.CDLL):
        self._library = library
        self._library.pretend_launches.restype = ctypes.c_long
        self._library.pretend_last_launch.restype = ctypes.POINTER(Launch)
        self.gpus: tuple[Gpu, ...] = ()

    def set_gpus(self, gpus: tuple[Gpu, ...]) -> None:
        self.gpus = gpus
        self._library.pretend_gpus(len(gpus), (_Limits * len(gpus))(*(gpu[1:] for gpu in gpus)))
        self.set_device(0)

    def set_device(self, device: int) -> int:
        """Make this GPU the current one; returns which was. -1 changes nothing, as in torch."""
        return self._library.pretend_current(device) if device >= 0 else self.device()

    def device(self) -> int:
        before = self._library.pretend_current(0)
        self._library.pretend_current(before)
        return before

    def allow_host_memory(self) -> None:
        """Kernels may get tensors of the host: to time what leads to a launch."""
        self._library.pretend_host_memory(1)

    def launches(self) -> int:
        return self._library.pretend_launches()

    def last_launch(self) -> Launch:
        return self._library.pretend_last_launch().contents


def build(folder: Path) -> Path:
    """driver.c as a library in this folder, under the name by which Triton asks for it."""
    import triton.backends.nvidia

    include = Path(triton.backends.nvidia.__file__).parent / "include"
    place = folder / hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    library = place / "libcuda.so.1"
    if not library.exists():
        place.mkdir(parents=True, exist_ok=True)
        # Written to another file and renamed: another process may look for the library meanwhile.
        partial = library.with_suffix(f".{os.getpid()}")
        command = [compiler(), "-shared", "-fPIC", "-O1", "-Wl,-soname,libcuda.so.1", f"-I{include}"]
        subprocess.run([*command, str(SOURCE), "-o", str(partial)], check=True)
        partial.replace(library)
    return library


def cache_folder() -> Path:
    """What was compiled for pretended GPUs: $XDG_CACHE_HOME/fastattn/pretended_gpu, by default below ~/.cache. All
    processes that pretend share it, with any Triton."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastattn" / "pretended_gpu"


# The stages of Triton's compiler that follow its front end.
STAGES = ("ttir", "ttgir", "llir", "ptx", "cubin")


def _instead(stage: str) -> Callable[..., object]:
    """What stands in for a stage of the compiler that is left out. It tells the launcher what the stage would."""
    known = {
        "llir": {
            "shared": 0, "tmem_size": 0, "global_scratch_size": 0, "global_scratch_align": 1,
            "profile_scratch_size": 0, "profile_scratch_align": 1,
        },
        "ptx": {"name": "pretended"},
    }  # fmt: skip
    results = {"llir": "", "ptx": "", "cubin": b"\x7fELF, pretended"}

    def stand_in(module: object, metadata: dict[str, object], *_: object) -> object:
        metadata.update(known.get(stage, {}))
        return results.get(stage, module)

    return stand_in


@contextlib.contextmanager
def pretended_driver(*gpus: Gpu, folder: Path | None = None, until: str = "ptx") -> Iterator[Driver]:
    """Inside the block torch.cuda and Triton find these GPUs in this machine; `folder` keeps the built driver.

    until: the last stage of the compiler that runs, one of STAGES. Shared memory is 0 before "llir". With "cubin"
    kernels become machine code, and say how many registers they spill (`kernel.n_spills`); before it 0."""
    if reason := obstacle():
        raise RuntimeError(reason)
    library = build(folder or Path(tempfile.gettempdir()) / f"pretended_gpu_{os.getuid()}")
    # Loaded before Triton asks for a library of that name, so that it gets this one.
    driver = Driver(ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL))
    driver.set_gpus(gpus)
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, {"TRITON_LIBCUDA_PATH": str(library.parent)}))
        for name, function in _torch_cuda(driver).items():
            stack.enter_context(mock.patch.object(torch.cuda, name, function))
        # Imported late: these read TRITON_LIBCUDA_PATH and torch.cuda.
        from triton.backends.nvidia.compiler import CUDABackend
        from triton.backends.nvidia.driver import CudaDriver
        from triton.runtime import driver as triton_driver

        for stage in STAGES[STAGES.index(until) + 1 :]:
            stack.enter_context(mock.patch.object(CUDABackend, f"make_{stage}", staticmethod(_instead(stage))))
        # What is kept in place of machine code must never be taken for it: Triton's cache knows it by another key.
        if until != STAGES[-1]:
            key = CUDABackend.hash
            stack.enter_context(
                mock.patch.object(CUDABackend, "hash", lambda self: f"{key(self)}, pretended after {until}")
            )
        if "TRITON_CACHE_DIR" not in os.environ:
            stack.enter_context(mock.patch.dict(os.environ, {"TRITON_CACHE_DIR": str(cache_folder())}))
        cuda = CudaDriver()
        cuda.get_current_stream = lambda device=None: (driver.device() if device is None else device) + 1
        triton_driver.set_active(cuda)
        yield driver


@contextlib.contextmanager
def pretended_gpus(*gpus: Gpu, folder: Path | None = None, until: str = "ptx") -> Iterator[Driver]:
    """Inside the block tensors lie on these GPUs, too."""
    from fastattn.core import intact
    from fastattn.ground import modes
    from tests.pretended_gpu.tensors import GpuTensor, OnGpu, made_on_host

    with contextlib.ExitStack() as stack:
        driver = stack.enter_context(pretended_driver(*gpus, folder=folder, until=until))
        for name in ("tensor", "as_tensor"):
            stack.enter_context(mock.patch.object(torch, name, made_on_host(getattr(torch, name))))
        # What fastattn makes outside of the caller's modes lies on the GPU, too.
        off = modes._disable_current_modes
        stack.enter_context(mock.patch.object(modes, "_disable_current_modes", lambda: _still(off, OnGpu)))
        # A tensor on the pretended GPU may be kept, as one on a real GPU may.
        plain = modes.lasts
        for module in [m for m in sys.modules.values() if getattr(m, "lasts", None) is plain]:
            stack.enter_context(mock.patch.object(module, "lasts", lambda t: isinstance(t, GpuTensor) or plain(t)))
        # A parameter there is a plain one.
        stack.enter_context(mock.patch.object(intact, "PLAIN", (*intact.PLAIN, GpuTensor)))
        stack.enter_context(OnGpu())
        yield driver


@contextlib.contextmanager
def _still(modes_off: Any, mode: Any) -> Iterator[None]:
    with modes_off(), mode():
        yield


def _torch_cuda(driver: Driver) -> dict[str, object]:
    """What torch.cuda answers with these GPUs, as far as Triton and fastattn ask."""

    def number(device: object = None) -> int:
        if isinstance(device, str):
            device = torch.device(device)
        index = device.index if isinstance(device, torch.device) else device
        return driver.device() if index is None else index

    def properties(device: object = None) -> SimpleNamespace:
        gpu = driver.gpus[number(device)]
        return SimpleNamespace(
            name=gpu.name, major=gpu.major, minor=gpu.minor, multi_processor_count=gpu.processors,
            total_memory=24 * 2**30, shared_memory_per_block_optin=gpu.shared_optin, warp_size=32,
        )  # fmt: skip

    return {
        "_lazy_init": lambda: None,
        "_exchange_device": driver.set_device,
        "_maybe_exchange_device": driver.set_device,
        "set_device": lambda device: driver.set_device(number(device)),
        "current_device": driver.device,
        "current_stream": lambda device=None: SimpleNamespace(cuda_stream=number(device) + 1),
        "device_count": lambda: len(driver.gpus),
        "get_device_capability": lambda device=None: driver.gpus[number(device)][1:3],
        "get_device_name": lambda device=None: driver.gpus[number(device)].name,
        "get_device_properties": properties,
        "is_available": lambda: True,
        "synchronize": lambda device=None: None,
    }
