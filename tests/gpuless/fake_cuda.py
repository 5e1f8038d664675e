"""Lets a torch built for CPUs trace programs for `cuda` under FakeTensorMode, backward passes too.

    import fake_cuda  # before torch
    fake_cuda.pretend(train_gpt.world, ranks=8)  # what the program asks of its device

Fake tensors have a device, shape, strides and dtype, but no values. On `cuda` a CPU build lacks two
things for them: a guard, which switches devices, and the hooks by which autograd's engine and
generators find an accelerator. Both are registered here by a small library that g++ builds once,
in seconds. Nothing can run on such a device. A torch built for CUDA has both already.
"""

import ctypes
import hashlib
import importlib.util
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

SOURCE = r"""
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

using c10::Device, c10::DeviceIndex, c10::DeviceType, c10::Stream;
const Device zero(DeviceType::CUDA, 0);

struct CUDAHooks : at::CUDAHooksInterface {  // found by this name
  CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  at::Generator getNewGenerator(DeviceIndex) const override {  // fake tensors draw nothing from it
    return at::make_generator<at::CPUGeneratorImpl>();
  }
};

struct Guard : c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Stream stream() const { return Stream(Stream::DEFAULT, zero); }
  Device exchangeDevice(Device) const override { return zero; }
  Device getDevice() const override { return zero; }
  Stream getStream(Device) const noexcept override { return stream(); }
  Stream getDefaultStream(Device) const override { return stream(); }
  Stream exchangeStream(Stream) const noexcept override { return stream(); }
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};

using at::CUDAHooksRegistry;
namespace at { REGISTER_CUDA_HOOKS(CUDAHooks) }
C10_REGISTER_GUARD_IMPL(CUDA, Guard);
"""


def build(torch: Path, library: Path) -> None:
    """torch: the folder of the package. Raises: CalledProcessError if g++ refuses."""
    library.parent.mkdir(exist_ok=True)
    unfinished = f"{library}.{os.getpid()}"  # another process may build it at the same time
    headers = (torch / "include", sysconfig.get_paths()["include"])
    subprocess.run(
        ["g++", "-std=c++20", "-shared", "-fPIC", "-x", "c++", "-", "-o", unfinished]
        + [f"-I{folder}" for folder in headers]
        + [f"-L{torch}/lib", f"-Wl,-rpath,{torch}/lib", "-ltorch_cpu", "-lc10"],
        input=SOURCE,
        text=True,
        check=True,
    )
    os.replace(unfinished, library)


def load() -> None:
    """Builds the library if there is none for this torch, and loads it."""
    torch = Path(importlib.util.find_spec("torch").submodule_search_locations[0])
    version = (torch / "version.py").read_text()
    if "cuda: Optional[str] = None" not in version:
        return
    tag = hashlib.sha256((SOURCE + version + sys.version).encode()).hexdigest()[:16]
    library = Path(__file__).parent / "__pycache__" / f"fake_cuda_{tag}.so"
    if not library.exists():
        build(torch, library)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def pretend(world, ranks: int = 8, rank: int = 0) -> None:
    """Makes `world`, of train_gpt, that of one of `ranks` GPUs."""
    import torch

    world.device, world.dtype = torch.device("cuda", 0), torch.bfloat16
    world.rank, world.size = rank, ranks


assert "torch" not in sys.modules, "import fake_cuda before torch"
load()
