"""Three Gated DeltaNet blocks around eight of full attention (#1895): four values share two keys,
each attention head may look at a sink, three layers loop from 40 % of the run on, the last three
blocks have mixer and MLP side by side; scored as a stream, from which SGD trains the MLPs.

Mended: the convolutions are trained; no state, attention or convolution crosses a document. Other
than there: a sink has no position, which costs 512 parameters; queries, keys and values of a delta
rule are orthogonalised apart; what is no matrix is not decayed; frequent tokens are those of the
calibration; all tensors are rounded to the steps that the bytes allow, not at 13 or 20 deviations;
weights get no noise late in training, which was too small to matter.

    torchrun --standalone --nproc_per_node=8 systems/hybrid_1895.py
"""

import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH=1 leaves it out
import layers
import layouts
import numpy as np
import parts
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import train_gpt
from train_gpt import SCALAR, ZEROS, bounded


@dataclass
class Hyperparameters(layouts.Hyperparameters):
    system = "hybrid_1895"
    kinds = "GA"  # a sink would leave a window

    data_path: str = "./data/datasets/fineweb10B_sp8192"
    tokenizer_path: str = "./data/tokenizers/fineweb_8192_bpe.model"
    vocab_size: int = bounded(8192, 3, 65536)
    train_batch_tokens: int = bounded(720_896, 1)
    train_seq_len: int = bounded(4096, 1)
    layout: str = "G2 A (A3)x3 A4 G"
    model_dim: int = bounded(512, 2)
    mlp_mult: float = bounded(4.125, 1)
    gdn_heads: int = bounded(4, 1)
    gdn_key_heads: int = bounded(2, 1)
    gdn_head_dim: int = bounded(64, 2)
    num_heads: int = bounded(8, 1)
    num_kv_heads: int = bounded(4, 1)
    head_dim: int = bounded(64, 2)
    rope_dims: int = 16
    qk_gain_init: float = 5.25
    xsa: bool = True
    logit_softcap: float = bounded(20.0, 1)
    matrix_lr: float = 0.0275
    muon_momentum: float = bounded(0.985, 0, 1)
    muon_momentum_warmup_start: float = 0.92
    muon_momentum_warmup_frac: float = bounded(0.28, 0, 1)  # of the run: 1,500 steps of #1895
    muon_wd: float = 0.105
    ema_decay: float = bounded(0.997, 0, 1)
    gptq_reserve_seconds: float = 9.0
    warmdown_frac: float = bounded(0.85, 0, 1)
    min_lr: float = bounded(0.1, 0, 1)
    matrix_bits: int = bounded(6, 2, 8)
    embed_bits: int = bounded(7, 2, 8)
    gptq_calibration_batches: int = bounded(1, 1)
    eval_mode: str = "stream"
    eval_chunk: int = bounded(512, 1)
    eval_rows: int = bounded(8, 1)  # of a rank; 80 begin in a chunk of TTT
    eval_seq_len: int = bounded(4096, 2)

    conv_size: int = bounded(2, 1, 4)  # tokens that a convolution of Gated DeltaNet sees
    o_norm: bool = False  # whether outputs of Gated DeltaNet are normalised
    enable_looping_at: float = bounded(0.4, 0, 1)  # progress from which the group loops
    parallel_start_layer: int = 8  # from this block on mixer and MLP read the same; 0 = off
    attn_out_bits: int = bounded(7, 2, 8)  # of the output projections of attention
    frequent_bits: int = bounded(8, 2, 8)  # of the rows of frequent tokens in the table
    frequent_tokens: int = 4025  # how many these are
    frequent: str = ""  # which, found at calibration: a bit a token, hexadecimal; "": the first

    ttt: str = "sgd"  # see MlpTTT; "" = nothing is learned
    ttt_lr: float = 0.017  # of SGD
    ttt_epochs: int = bounded(5, 1)  # over each chunk
    ttt_chunk_tokens: int = bounded(65_536, 1)  # of a step, in rows of TRAIN_SEQ_LEN

    ttt_kinds = ("", "sgd")

    def validate(self) -> None:
        super().validate()
        self.require("layout", len(self.order_of_passes()) > 1, "more than one pass")
        self.require("rope_dims", self.rope_dims < self.head_dim, "less than HEAD_DIM")
        is_power = self.head_dim & (self.head_dim - 1) == 0
        self.require("head_dim", is_power, "a power of 2")
        digits = 2 * math.ceil(self.vocab_size / 8)
        is_mask = re.fullmatch(f"([0-9a-f]{{{digits}}})?", self.frequent)
        self.require("frequent", is_mask, f"{digits} hexadecimal digits, or none")

    def stage_starts(self) -> list[float]:
        return sorted({0.0, self.enable_looping_at})

    def is_frequent(self) -> Tensor:  # [V] of booleans
        if not self.frequent:
            return torch.arange(self.vocab_size) < self.frequent_tokens
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(self.frequent), np.uint8))
        return torch.from_numpy(bits[: self.vocab_size] > 0)


class DeltaNet(layers.DeltaNet):
    """With positive features: all queries and keys meet at less than a right angle."""

    def activate(self, qkv: Tensor) -> Tensor:
        qk, v = qkv.tensor_split([-len(self.v_proj.weight)], -1)
        return torch.cat((F.elu(qk) + 1, F.silu(v)), -1)


class ParallelBlock(train_gpt.Block):
    """Mixer and MLP read the same stream."""

    def forward(self, x: Tensor, x0: Tensor, ctx: train_gpt.Context, cache):
        mix_x, mix_x0 = self.resid_mix.to(x.dtype)
        x = mix_x * x + mix_x0 * x0
        y, cache = self.mix(x, ctx, cache)
        return x + y + self.feed_forward(x), cache


class MlpTTT(parts.SgdTTT):
    """Only the MLPs learn."""

    def learns(self, name: str) -> bool:
        return ".mlp" in name


def hadamard(n: int) -> Tensor:
    """Orthogonal, symmetric, all entries of one size: [n, n], n a power of 2."""
    H = torch.ones(1, 1)
    while len(H) < n:
        H = torch.cat((torch.cat((H, H), 1), torch.cat((H, -H), 1)))
    return H / n**0.5


class GPT(parts.UNet, layouts.LateLoop):
    param_rules = (
        (r"sink$", SCALAR, ZEROS),
        layers.CONV_RULE,
        (r"A_log$", SCALAR, lambda w, hp: w.uniform_(0, math.log(8))),
        layers.DT_RULE,
        *parts.UNet.param_rules,
    )

    def new_mixer(self, kind: str) -> nn.Module:
        return DeltaNet(self.hp) if kind == "G" else layers.SinkAttention(self.hp)

    def new_block(self, index: int, mixer: nn.Module) -> train_gpt.Block:
        is_parallel = 0 < self.hp.parallel_start_layer <= index
        return ParallelBlock(self.hp, mixer) if is_parallel else super().new_block(index, mixer)

    @torch.no_grad()
    def rotate_values(self) -> None:
        """By a Hadamard matrix in each head, undone in the output projection: the function stays,
        outliers are spread over a head before both are rounded."""
        R = hadamard(self.hp.head_dim).to(self.tok_emb.weight)
        for mixer in self.modules():
            if isinstance(mixer, layers.SinkAttention):
                v, o = mixer.v_proj.weight, mixer.o_proj.weight
                v.copy_((R @ v.unflatten(0, (-1, len(R)))).flatten(0, 1))  # [Hkv, head_dim, D]
                o.copy_((o.unflatten(1, (-1, len(R))) @ R).flatten(1))  # [D, H, head_dim]

    def set_frequent(self, batches: list) -> None:
        """To the commonest inputs, on all ranks."""
        V, n = self.hp.vocab_size, self.hp.frequent_tokens
        counts = sum(torch.bincount(x.flatten(), minlength=V) for x, _ in batches)
        commonest = train_gpt.world.all_reduce(counts).argsort(descending=True, stable=True)[:n]
        is_frequent = np.isin(np.arange(V), commonest.cpu())
        self.hp.frequent = np.packbits(is_frequent).tobytes().hex()

    def calibrate(self, batches: list) -> dict[str, Tensor]:
        self.set_frequent(batches)
        self.rotate_values()
        return super().calibrate(batches)

    def bits(self, name: str) -> int | Tensor:  # of the table: int64 [V]
        hp, bits = self.hp, super().bits(name)
        if name == "tok_emb.weight":
            rows = torch.where(hp.is_frequent(), hp.frequent_bits, bits)
            return rows.to(train_gpt.world.device)
        owner = self.get_submodule(name.rpartition(".")[0].rpartition(".")[0])
        is_output = isinstance(owner, layers.SinkAttention) and name.endswith("o_proj.weight")
        return hp.attn_out_bits if is_output else bits

    def learner(self, hp: Hyperparameters):
        return MlpTTT(self, hp) if hp.ttt == "sgd" else None


if __name__ == "__main__":
    train_gpt.main(Hyperparameters, GPT)
