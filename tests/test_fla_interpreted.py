"""The fla Triton kernels that CUDA runs, both ways, through our custom op, against plain torch.

Without a GPU the kernels run in Triton's interpreter (TRITON_INTERPRET=1), which needs two things
that a GPU gives: a driver to ask about the device, and loop counters with tensor methods, so a copy
of fla drops one cast of them. Slow per token, exact in float32, and it covers what a mock cannot:
argument order, scaling, layout, the saved tensors.
"""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

SCRIPT = """
import types
import torch, triton
from triton.backends.compiler import GPUTarget

class Driver:  # an H100, as far as fla asks
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_active_torch_device = staticmethod(lambda: torch.device("cpu"))
    get_device_interface = staticmethod(lambda: torch.cpu)
    get_benchmarker = staticmethod(lambda: lambda fn, quantiles=None, **_: (fn(), 3 * [1.0])[1])
    get_empty_cache_for_benchmark = staticmethod(lambda: torch.empty(1))
    clear_cache = staticmethod(lambda cache: None)
    utils = types.SimpleNamespace(get_device_properties=lambda device: dict(
        max_shared_mem=232448, multiprocessor_count=132, max_num_regs=65536, warpSize=32))

triton.runtime.driver.set_active(Driver())
properties = types.SimpleNamespace(name="NVIDIA H100", major=9, minor=0, multi_processor_count=132,
                                   total_memory=80 << 30, shared_memory_per_block_optin=232448)
torch.cuda.get_device_name = lambda *_: properties.name
torch.cuda.get_device_properties = lambda *_: properties
torch.cuda.get_device_capability = lambda *_: (9, 0)
torch.cuda.current_device = lambda: 0
torch.cuda.device_count = lambda: 1

import torch.nn.functional as F
import train_gpt as t

torch.manual_seed(0)
B, T, H, K = 2, 100, 2, 16
q, k = (F.normalize(torch.randn(B, T, H, K), dim=-1) for _ in range(2))
v, state = torch.randn(B, T, H, K), torch.randn(B, H, K, K)
g, beta = -torch.rand(B, T, H), torch.rand(B, T, H)
g[:, 50] = t.RESET_LOG_DECAY  # a document starts
inputs = [x.requires_grad_() for x in (q, k, v, g, beta, state)]
weights = torch.randn(B, T, H, K), torch.randn(B, H, K, K)

def run(function):
    o, final_state = function(*inputs)[:2]
    loss = (o * weights[0]).sum() + (final_state * weights[1]).sum()
    return [o, final_state, *torch.autograd.grad(loss, inputs)]

names = "o state dq dk dv dg dbeta dstate".split()
torch_results, fla_results = run(t.torch_gated_delta_rule), run(t.fla_gated_delta_rule)
for name, ours, fla in zip(names, torch_results, fla_results, strict=True):
    print(name, ((ours - fla).norm() / ours.norm()).item())
"""


@pytest.mark.skipif(platform.system() != "Linux", reason="Triton is for Linux")
def test_fla_kernels_through_the_custom_op_equal_the_oracle(tmp_path):
    package = Path(importlib.util.find_spec("fla").submodule_search_locations[0])
    shutil.copytree(package, tmp_path / "fla")
    for folder in ("common", "gated_delta_rule"):
        for path in (tmp_path / "fla" / "ops" / folder).glob("*.py"):
            path.write_text(path.read_text().replace("= i_t.to(tl.int64)", "= i_t"))
    env = os.environ | dict(
        TRITON_INTERPRET="1", PYTHONPATH=f"{tmp_path}:{ROOT}", HOME=str(tmp_path)
    )
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=env, cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-2000:]
    errors = {
        name: float(error) for name, error in (line.split() for line in result.stdout.splitlines())
    }
    assert set(errors) == set("o state dq dk dv dg dbeta dstate".split())
    assert max(errors.values()) < 1e-5, errors
