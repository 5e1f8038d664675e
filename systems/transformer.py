"""The transformer stack of the best records (#1787, with the SmearGate of #1855): three layers that
loop from 35 % of the run on, gated skips, two residual lanes from layer 8, a sparse gate on each
head; scored as a stream with adapters, and SGD on all that was scored in between; reads CaseOps.

    torchrun --standalone --nproc_per_node=8 systems/transformer.py
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH=1 leaves it out
import layers
import layouts
import parts
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import train_gpt
from train_gpt import SCALAR, ZEROS, bounded


@dataclass
class Hyperparameters(layouts.Hyperparameters):
    system = "transformer"
    layout: str = "A3 (A3)x3 A5"
    mlp_mult: float = bounded(4.0, 1)
    matrix_lr: float = 0.026

    enable_looping_at: float = bounded(0.35, 0, 1)  # progress from which the group loops
    smear_dims: int = 12  # inputs of the SmearGate; 0 = off
    attn_gate_dims: int = bounded(12, 1)  # inputs of the sparse gate on each attention head
    parallel_start_layer: int = 8  # from this block on mixer and MLP have a lane each; 0 = off

    ttt_phases: int = 3  # times that SGD goes over all that was scored before
    ttt_lr: float = 0.001  # of SGD
    ttt_chunk_tokens: int = bounded(32_768, 1)  # of a step of SGD, in rows of TRAIN_SEQ_LEN
    ttt_freeze_blocks: int = 2  # the first ones, which SGD leaves as they are

    def validate(self) -> None:
        super().validate()
        blocks, order = self.block_kinds(), self.order_of_passes()
        self.require("layout", len(order) > 1, "more than one pass")
        start, lanes = self.parallel_start_layer, range(self.parallel_start_layer, len(blocks))
        once = all(order.count(i) == 1 for i in lanes)
        late = start >= len(blocks) / 2 and start in order[len(order) // 2 :]
        self.require(
            "parallel_start_layer",
            start == 0 or once and late,
            "0 or a block of the second half, behind the loop",
        )
        self.require("smear_dims", self.smear_dims <= self.model_dim, "at most MODEL_DIM")
        self.require("attn_gate_dims", self.attn_gate_dims <= self.model_dim, "at most MODEL_DIM")

    def stage_starts(self) -> list[float]:
        return sorted({0.0, self.enable_looping_at})


class GatedAttention(train_gpt.Attention):
    """Each head's output times a gate of its own, of the first few channels of the input."""

    def __init__(self, hp: Hyperparameters, window: int):
        super().__init__(hp, window)
        self.attn_gate = nn.Parameter(torch.empty(hp.num_heads, hp.attn_gate_dims))

    def attend(self, seen: Tensor, T: int, ctx: train_gpt.Context) -> Tensor:
        y, x = super().attend(seen, T, ctx), seen[:, -T:, : self.attn_gate.shape[1]]
        gate = F.linear(x, self.attn_gate.to(x.dtype)).sigmoid()  # [B, T, H]
        return y * gate.unsqueeze(-1)


class LaneBlock(train_gpt.Block):
    """Mixer and MLP read a lane of the stream each, and write to both."""

    def __init__(self, hp: Hyperparameters, mixer: nn.Module):
        super().__init__(hp, mixer)
        self.lanes = nn.Parameter(torch.empty(2, 3))  # a lane: of itself, the mixer, the MLP

    def forward(self, x: tuple[Tensor, Tensor], x0: Tensor, ctx, cache):
        """x: the mixer's lane and the MLP's, [B, T, D] each."""
        first, second = x
        mix_x, mix_x0 = self.resid_mix.to(x0.dtype)
        mixed, cache = self.mix(mix_x * first + mix_x0 * x0, ctx, cache)
        out = self.feed_forward(second)
        (first_own, first_mixer, first_mlp), (second_own, second_mixer, second_mlp) = self.lanes.to(
            x0.dtype
        )
        first = first_own * first + first_mixer * mixed + first_mlp * out
        second = second_own * second + second_mixer * mixed + second_mlp * out
        return (first, second), cache


class PhasedTTT(parts.SgdTTT):
    """Adapters for every document; and TTT_PHASES times, evenly over the text, SGD on everything
    scored so far."""

    read_segment = train_gpt.LoraTTT.read  # with adapters

    def segment_targets(self, n: int) -> int:
        return math.ceil(n / (self.hp.ttt_phases + 1))

    def learn_segment(self, end: int) -> None:
        for first in range(0, end - self.chunk + 1, self.chunk):
            self.learn(first, end, epochs=1)


class GPT(layers.SmearGate, parts.UNet, layouts.LateLoop):
    param_rules = (
        (r"attn_gate$", SCALAR, ZEROS),  # a gate of 1/2
        (r"lanes$", SCALAR, lambda w, hp: w.copy_(torch.tensor([1.1, 1.0, 1.0]))),
        layers.SMEAR_RULE,
        *parts.UNet.param_rules,
    )

    def new_block(self, index: int, mixer: nn.Module) -> train_gpt.Block:
        has_lanes = 0 < self.hp.parallel_start_layer <= index
        return LaneBlock(self.hp, mixer) if has_lanes else super().new_block(index, mixer)

    def new_mixer(self, kind: str) -> nn.Module:
        if kind == "G":
            return super().new_mixer(kind)
        return GatedAttention(self.hp, self.hp.window_size if kind == "S" else sys.maxsize)

    def enter(self, x, earlier: list):
        """Skips go to the first lane; the second starts as the first before its skip."""
        first, second = x if isinstance(x, tuple) else (x, None)
        if second is None and isinstance(self.blocks[self.order[len(earlier)]], LaneBlock):
            second = first
        first = super().enter(first, earlier)
        return first if second is None else (first, second)

    def head(self, x) -> Tensor:
        return super().head((x[0] + x[1]) / 2 if isinstance(x, tuple) else x)

    def learner(self, hp: Hyperparameters):
        return PhasedTTT(self, hp) if hp.ttt == "lora" else None


Validation = parts.CaseOpsValidation

if __name__ == "__main__":
    train_gpt.main(Hyperparameters, GPT, Validation)
