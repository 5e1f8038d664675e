"""K_KVShare_Wider (#1698, #1734): ten Gated DeltaNet blocks, 544 wide, the keys' and values'
projections and convolutions shared in pairs; a hashed n-gram table; scored in sliding windows by
weights that SGD trains on what has been scored.

    torchrun --standalone --nproc_per_node=8 systems/kv_share.py
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
    system = "kv_share"
    layout: str = "G10"
    model_dim: int = bounded(544, 2)
    mlp_mult: float = bounded(3.0, 1)
    gdn_heads: int = bounded(8, 1)
    gdn_key_heads: int = bounded(8, 1)
    train_seq_len: int = bounded(1024, 1)
    eval_mode: str = "sliding"
    eval_seq_len: int = bounded(1024, 2)

    ngram_vocab_size: int = 3072  # rows of the hashed bigram and trigram table; 0 = off
    ngram_dim: int = bounded(112, 2)

    ttt: str = "sgd"  # see parts.SgdTTT; "" = nothing is learned
    ttt_lr: float = 0.005  # of SGD
    ttt_epochs: int = bounded(3, 1)  # over each chunk
    ttt_chunk_tokens: int = bounded(32_768, 1)  # of a step, in rows of TRAIN_SEQ_LEN
    ttt_freeze_blocks: int = 2  # the first ones, which keep their weights

    ttt_kinds = ("", "sgd")

    def validate(self) -> None:
        super().validate()
        kinds = self.block_kinds()
        in_pairs = {*kinds} == {"G"} and len(kinds) % 2 == 0
        self.require("layout", in_pairs, "an even number of blocks G")
        self.require("ngram_vocab_size", self.ngram_vocab_size != 1, "0 or more than 1")


class GPT(parts.NgramGPT):
    def build(self, hp: Hyperparameters) -> None:
        """The second mixer of each pair gets the first one's keys and values on its own input."""
        super().build(hp)
        for owner, follower in zip(self.blocks[::2], self.blocks[1::2], strict=True):
            for name in ("k_proj", "v_proj", "k_conv1d", "v_conv1d"):
                setattr(follower.mixer, name, getattr(owner.mixer, name))

    def learner(self, hp: Hyperparameters):
        return parts.SgdTTT(self, hp) if hp.ttt == "sgd" else None


if __name__ == "__main__":
    train_gpt.main(Hyperparameters, GPT)
