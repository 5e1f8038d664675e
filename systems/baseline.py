"""The competition's naive baseline: its shape, trained, quantized and packed as the record is.

torchrun --standalone --nproc_per_node=8 systems/baseline.py
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH=1 leaves it out
import parts

import train_gpt
from train_gpt import bounded


@dataclass
class Hyperparameters(train_gpt.Hyperparameters):
    system = "baseline"
    data_path: str = "./data/datasets/fineweb10B_sp1024"
    tokenizer_path: str = "./data/tokenizers/fineweb_1024_bpe.model"
    vocab_size: int = bounded(1024, 3, 65536)
    train_seq_len: int = bounded(1024, 1)
    layout: str = "A9"
    mlp_mult: float = bounded(2.0, 1)
    rope_dims: int = 64
    qk_gain_init: float = 1.5
    xsa: bool = False
    artifact_target_bytes: int = bounded(7_400_000, 0, train_gpt.SIZE_LIMIT)
    eval_mode: str = "sliding"
    eval_seq_len: int = bounded(1024, 2)
    ttt: str = ""

    def validate(self) -> None:
        super().validate()
        self.require("layout", len(self.block_kinds()) > 1, "more than one block")


class GPT(parts.UNet):
    ln_scale = False


if __name__ == "__main__":
    train_gpt.main(Hyperparameters, GPT)
