"""Makes Triton, fla and Inductor believe that a certain GPU is there. Nothing can run on it."""

import types
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget


class Card(NamedTuple):
    name: str
    arch: int  # 90 = compute capability 9.0
    shared: int  # bytes of shared memory that a block may have
    processors: int
    memory: int  # GiB


CARDS = {
    card.arch: card
    for card in (
        Card("NVIDIA A100-SXM4-80GB", 80, 166_912, 108, 80),
        Card("NVIDIA GeForce RTX 3090", 86, 101_376, 82, 24),
        Card("NVIDIA GeForce RTX 4090", 89, 101_376, 128, 24),
        Card("NVIDIA H100 80GB HBM3", 90, 232_448, 132, 80),
        Card("NVIDIA GeForce RTX 5090", 120, 101_376, 170, 32),
    )
}
H100 = CARDS[90]


def pretend(card: Card, device: str) -> None:
    """device: where tensors lie, for who asks Triton: `cuda` if they are fake, else `cpu`."""
    capability = divmod(card.arch, 10)
    limits = dict(
        max_shared_mem=card.shared,
        multiprocessor_count=card.processors,
        max_num_regs=65_536,
        warpSize=32,
    )

    class Driver:
        get_current_target = staticmethod(lambda: GPUTarget("cuda", card.arch, 32))
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device=0: 0)
        get_active_torch_device = staticmethod(lambda: torch.device(device))
        get_device_interface = staticmethod(lambda: getattr(torch, device))
        get_benchmarker = staticmethod(
            lambda: lambda fn, quantiles=None, **_: (fn(), [1.0, 1.0, 1.0])[1]
        )
        get_empty_cache_for_benchmark = staticmethod(lambda: torch.empty(1))
        clear_cache = staticmethod(lambda cache: None)
        utils = types.SimpleNamespace(get_device_properties=lambda device: limits)

    triton.runtime.driver.set_active(Driver())
    threads = 2048 if card.arch in (80, 90) else 1536
    properties = types.SimpleNamespace(
        name=card.name,
        major=capability[0],
        minor=capability[1],
        multi_processor_count=card.processors,
        total_memory=card.memory << 30,
        warp_size=32,
        shared_memory_per_block=49_152,
        shared_memory_per_block_optin=card.shared,
        shared_memory_per_multiprocessor=card.shared + 1024,
        max_threads_per_multi_processor=threads,
        max_threads_per_block=1024,
        regs_per_multiprocessor=65_536,
        L2_cache_size=50 << 20,
        gcnArchName="",
        clock_rate=1_980_000,
        memory_clock_rate=2_619_000,
        memory_bus_width=5120,
    )
    answers = dict(
        device_count=1,
        current_device=0,
        get_device_name=card.name,
        get_device_properties=properties,
        get_device_capability=capability,
    )
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
