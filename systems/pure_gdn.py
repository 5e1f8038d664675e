"""Pure Neural GDN (#875): delta-rule blocks and one of attention. Batch and chunk grow with the
elapsed share of the run, and the recurrent state is carried from chunk to chunk of a sequence
(truncated backpropagation).

    torchrun --standalone --nproc_per_node=8 systems/pure_gdn.py
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH=1 leaves it out
import parts  # noqa: F401  (makes train_gpt importable)
from torch import Tensor

import train_gpt
from train_gpt import bounded


class Stage(NamedTuple):
    start: float  # progress from which it holds
    micro_steps: int  # micro-batches of a step
    chunk: int  # tokens of a backward pass


@dataclass
class Hyperparameters(train_gpt.Hyperparameters):
    system = "pure_gdn"
    data_path: str = "./data/datasets/fineweb10B_sp1024"
    tokenizer_path: str = "./data/tokenizers/fineweb_1024_bpe.model"
    vocab_size: int = bounded(1024, 3, 65536)
    train_batch_tokens: int = bounded(196_608, 1)
    train_seq_len: int = bounded(1024, 1)
    grad_accum_steps: int = 3
    layout: str = "G7 S"
    model_dim: int = bounded(384, 2)
    mlp_mult: float = bounded(4.0, 1)
    gdn_heads: int = bounded(6, 1)
    gdn_key_heads: int = bounded(6, 1)
    num_heads: int = bounded(6, 1)
    num_kv_heads: int = bounded(6, 1)
    window_size: int = bounded(256, 1)
    artifact_target_bytes: int = bounded(10_700_000, 0, train_gpt.SIZE_LIMIT)
    matrix_bits: int = bounded(8, 2, 8)
    gptq_calibration_batches: int = bounded(8, 1)
    eval_seq_len: int = bounded(1024, 2)
    ttt: str = ""

    curriculum: str = "0:1x64 0.15:2x128 0.45:3x256"  # progress:micro-batches x tokens of a chunk

    def validate(self) -> None:
        super().validate()
        self.require("grad_accum_steps", self.grad_accum_steps > 0, "1 or more")
        self.stages()

    def stages(self) -> list[Stage]:
        """Raises: ValueError naming CURRICULUM."""
        number = r"([1-9][0-9]{0,8})"
        form = rf"(0(?:\.[0-9]{{1,9}})?):{number}x{number}"
        found = [re.fullmatch(form, part) for part in self.curriculum.split()]
        stages = [Stage(float(m[1]), int(m[2]), int(m[3])) for m in found if m]
        starts, most, T = [s.start for s in stages], self.grad_accum_steps, self.train_seq_len
        well_formed = stages and all(found) and starts == sorted({0.0, *starts})
        fits = all(s.micro_steps <= most and T % s.chunk == 0 for s in stages)
        expected = (
            f"0:COUNTxTOKENS and later stages such as 0.5:COUNTxTOKENS, COUNT up to {most}, "
            f"TOKENS that divide TRAIN_SEQ_LEN={T}"
        )
        self.require("curriculum", well_formed and fits, expected)
        return stages

    def stage_at(self, progress: float) -> Stage:
        return max(stage for stage in self.stages() if stage.start <= progress)

    def stage_starts(self) -> list[float]:
        return [stage.start for stage in self.stages()]

    def micro_steps_at(self, progress: float) -> int:
        return self.stage_at(progress).micro_steps


class GPT(train_gpt.GPT):
    def set_progress(self, progress: float) -> None:
        super().set_progress(progress)
        self.chunk = self.hp.stage_at(progress).chunk

    def passes(self, x: Tensor, y: Tensor):
        """The state goes on from chunk to chunk, gradients do not."""
        cache = self.new_cache(len(x))
        for x_chunk, y_chunk in zip(x.split(self.chunk, 1), y.split(self.chunk, 1), strict=True):
            nats, cache = self(x_chunk, y_chunk, cache)
            yield nats


if __name__ == "__main__":
    train_gpt.main(Hyperparameters, GPT)
