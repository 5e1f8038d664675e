"""Crawler (#990, #1028, #1047): flat blocks around one that loops, followed in each loop by a
delta-rule memory, which starts anew; an instruction is added to the stream before each loop. What
loops is kept in 8 bits, calibrated once more behind the other blocks as they will ship.

    torchrun --standalone --nproc_per_node=8 systems/crawler.py
"""

import copy
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH=1 leaves it out
import layouts
import parts
import torch
from torch import Tensor, nn

import train_gpt
from train_gpt import MATRIX, SCALAR, ZEROS, bounded


@dataclass
class Hyperparameters(layouts.Hyperparameters):
    system = "crawler"
    data_path: str = "./data/datasets/fineweb10B_sp1024"
    tokenizer_path: str = "./data/tokenizers/fineweb_1024_bpe.model"
    vocab_size: int = bounded(1024, 3, 65536)
    layout: str = "A2 (A G)x4 A2"  # a G has no MLP here
    mlp_mult: float = bounded(3.2, 1)
    gdn_heads: int = bounded(4, 1)
    gdn_key_heads: int = bounded(4, 1)
    gdn_head_dim: int = bounded(128, 2)
    qk_gain_init: float = 1.5
    matrix_lr: float = 0.03
    muon_momentum: float = bounded(0.99, 0, 1)
    ema_decay: float = bounded(0.99, 0, 1)
    gptq_reserve_seconds: float = 30.0
    artifact_target_bytes: int = bounded(7_400_000, 0, train_gpt.SIZE_LIMIT)
    ttt: str = ""

    inst_dim: int = bounded(32, 2)  # rank of the instructions
    ngram_vocab_size: int = bounded(2048, 2)  # rows of the hashed bigram and trigram table
    ngram_dim: int = bounded(128, 2)
    ema_start: float = bounded(0.9, 0, 1)  # progress from which weights are averaged
    loop_bits: int = bounded(8, 2, 8)  # of the matrices that loop

    def validate(self) -> None:
        super().validate()
        loops = len(self.order_of_passes()) > len(self.block_kinds())
        self.require("layout", loops, "a group that loops")

    def ema_decay_at(self, progress: float, step: int) -> float:
        return super().ema_decay_at(progress, step) if progress >= self.ema_start else 0.0


class MemoryBlock(train_gpt.Block):
    """A delta-rule memory without an MLP behind it."""

    def __init__(self, hp: Hyperparameters, mixer: nn.Module):
        super().__init__(hp, mixer)
        del self.mlp, self.mlp_scale

    def feed_forward(self, x: Tensor) -> float:
        return 0.0


class GPT(parts.NgramGPT, parts.UNet, layouts.GPT):
    param_rules = (
        (r"inst_out\.\d+\.weight$", MATRIX, ZEROS),
        (r"inst_in\.weight$", MATRIX, lambda w, hp: nn.init.orthogonal_(w)),
        *parts.NgramGPT.param_rules,
        *parts.UNet.param_rules,
    )

    def new_block(self, index: int, mixer: nn.Module) -> train_gpt.Block:
        is_memory = isinstance(mixer, train_gpt.GatedDeltaNet)
        return MemoryBlock(self.hp, mixer) if is_memory else super().new_block(index, mixer)

    def build(self, hp: Hyperparameters) -> None:
        super().build(hp)
        looped = {i for i in self.order if self.order.count(i) > 1}
        self.loops = [step for step, i in enumerate(self.order) if i == min(looped)]  # their starts
        self.looped_names = ("inst_", *(f"blocks.{i}." for i in looped))
        self.inst_in = train_gpt.Linear(hp.model_dim, hp.inst_dim)
        outs = (train_gpt.Linear(hp.inst_dim, hp.model_dim) for _ in self.loops)
        self.inst_out = nn.ModuleList(outs)

    def enter(self, x: Tensor, earlier: list[Tensor]) -> Tensor:
        x = super().enter(x, earlier)
        if len(earlier) in self.loops:
            x = x + self.inst_out[self.loops.index(len(earlier))](self.inst_in(x))
        return x

    def bits(self, name: str) -> int:
        return self.hp.loop_bits if name.startswith(self.looped_names) else super().bits(name)

    @torch.no_grad()
    def with_weights_of(self, quantized: dict) -> "GPT":
        """A copy with what the artifact will have of these, and of all that is not quantized."""
        model = copy.deepcopy(self)
        for name, p in model.named_parameters():
            if name in quantized:
                q, scale = quantized[name]
                p.copy_(q * scale.float()[:, None])
            elif self.kinds[name] == SCALAR:
                p.copy_(p.half())
        return model

    def calibrate(self, batches: list) -> dict[str, Tensor]:
        """The Hessians of what loops are collected again, behind all else as it will ship."""
        hessians = super().calibrate(batches)
        flat = train_gpt.quantize(self, hessians, self.hp.rounding_step)
        flat = {name: q for name, q in flat.items() if not name.startswith(self.looped_names)}
        again = train_gpt.collect_hessians(self.with_weights_of(flat), batches)
        return hessians | {name: again[name] for name in hessians.keys() - flat.keys()}


if __name__ == "__main__":
    train_gpt.main(Hyperparameters, GPT)
