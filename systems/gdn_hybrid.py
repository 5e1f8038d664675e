"""GDN-Hybrid (#1545): five Gated DeltaNet blocks, one of sliding-window attention, five more, and
the same attention once more; a hashed n-gram table; a vocabulary of 1,024 pieces.

Mended: the window is one of 512 tokens, positions rotate over time and not over heads, the n-grams
can learn, rates fall by the clock, all matrices have float32 masters and are quantized by GPTQ,
what is shared is stored once, no state crosses a document. Exclusive attention is off, as it was in
training there. Other than there: one SmearGate for all channels, LeakyReLU(0.5) squared, Polar
Express, no scale of the n-grams: 500 parameters fewer; scored as a stream, not in windows.

    torchrun --standalone --nproc_per_node=8 systems/gdn_hybrid.py
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH=1 leaves it out
import layers
import layouts
import parts

import train_gpt
from train_gpt import bounded


@dataclass
class Hyperparameters(layouts.Hyperparameters):
    system = "gdn_hybrid"
    data_path: str = "./data/datasets/fineweb10B_sp1024"
    tokenizer_path: str = "./data/tokenizers/fineweb_1024_bpe.model"
    vocab_size: int = bounded(1024, 3, 65536)
    train_batch_tokens: int = bounded(786_432, 1)
    train_seq_len: int = bounded(2048, 1)
    layout: str = "G5 S G5 S=5"
    model_dim: int = bounded(512, 2)
    mlp_mult: float = bounded(3.0, 1)
    gdn_heads: int = bounded(8, 1)
    gdn_key_heads: int = bounded(8, 1)
    gdn_head_dim: int = bounded(64, 2)
    num_heads: int = bounded(8, 1)
    num_kv_heads: int = bounded(4, 1)
    head_dim: int = bounded(64, 2)
    window_size: int = bounded(512, 1)
    rope_dims: int = 64
    qk_gain_init: float = 5.0
    xsa: bool = False
    logit_softcap: float = bounded(30.0, 1)
    matrix_lr: float = 0.02
    muon_momentum: float = bounded(0.95, 0, 1)
    muon_momentum_warmup_start: float = 0.85
    muon_momentum_warmup_frac: float = bounded(0.22, 0, 1)  # of the run: 500 steps of #1545
    muon_wd: float = 0.04
    tied_embed_lr: float = 0.035
    embed_wd: float = 0.04
    ema_decay: float = bounded(0.997, 0, 1)
    gptq_reserve_seconds: float = 10.0
    warmdown_frac: float = bounded(0.3, 0, 1)  # of the run; in #1545 a plan
    min_lr: float = bounded(0.0, 0, 1)
    embed_bits: int = bounded(6, 2, 8)
    eval_seq_len: int = bounded(2048, 2)
    ttt: str = ""

    smear_dims: int = 12  # inputs of the SmearGate; 0 = off
    ngram_vocab_size: int = 3072  # rows of the hashed bigram and trigram table; 0 = off
    ngram_dim: int = bounded(112, 2)

    def validate(self) -> None:
        super().validate()
        self.require("smear_dims", self.smear_dims <= self.model_dim, "at most MODEL_DIM")
        self.require("ngram_vocab_size", self.ngram_vocab_size != 1, "0 or more than 1")


class GPT(layers.SmearGate, parts.NgramGPT, layouts.GPT):
    param_rules = (layers.SMEAR_RULE, *parts.NgramGPT.param_rules)


if __name__ == "__main__":
    train_gpt.main(Hyperparameters, GPT)
