"""Train, quantize, pack and score a Gated DeltaNet / sliding-window hybrid for the 16 MB / 10 minutes competition.

    torchrun --standalone --nproc_per_node=8 train_gpt.py            # 8xH100, the real run
    torchrun --standalone --nproc_per_node=1 train_gpt.py            # one GPU, same mathematics, 8 micro-batches
    PRESET=demo torchrun --standalone --nproc_per_node=1 train_gpt.py    # laptop CPU, minutes, data/prepare.py --demo
    EVAL_ONLY=1 ARTIFACT=final_model.int6.ptz python train_gpt.py    # score a packed artifact in a fresh process

Every hyperparameter is an environment variable. The file is never longer than 1,500 lines. Sections, in run order:
1. Hyperparameters and presets; 2. Device, ranks, logging; 3. Byte accounting; 4. Shards and loader; 5. Kernels;
6. Model; 7. Muon and AdamW; 8. GPTQ; 9. Packing; 10. Evaluation; 11. Test-time training;
12. Audit; 13. Training; 14. Main.
"""

import collections
import copy
import functools
import hashlib
import itertools
import json
import logging
import math
import os
import re
import struct
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple

import brotli
import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

# --- 1. Hyperparameters and presets ----------------------------------------------------------------------------------

@dataclass
class Hyperparameters:
    """One run. Each field is read from the environment under its upper-case name; defaults are the record."""
    preset: str = "record"
    run_id: str = field(default_factory=lambda: str(uuid.uuid4()))  # the log is logs/<run_id>.txt
    seed: int = 1337
    author: str = ""  # for submission.json
    github_id: str = ""
    artifact: str = "final_model.int6.ptz"  # written by training, read by EVAL_ONLY
    eval_only: bool = False
    scores: str = ""  # .npz path: nats, bytes, position of every scored target
    # data
    data_path: str = "./data/datasets/fineweb10B_sp8192"
    tokenizer_path: str = "./data/tokenizers/fineweb_8192_bpe.model"
    vocab_size: int = 8192
    train_batch_tokens: int = 786_432  # per optimizer step, over all ranks
    train_seq_len: int = 2048
    grad_accum_steps: int = 0  # micro-batches per step and rank; 0 = 8 // WORLD_SIZE, as the baseline
    # model
    layout: str = "G5 S G5 S=5"  # see parse_layout
    enable_looping_at: float = 0.0  # progress from which the group of the layout that loops does so
    inst_dim: int = 0  # rank of the instruction added to the stream before each pass of the loop; 0 = off
    unet_skips: bool = False  # gated, from the first half of the passes to the second
    parallel_start_layer: int = 0  # from this block on mixer and MLP have a residual lane each; 0 = off
    ln_scale: bool = False  # block i reads its normalised inputs over sqrt(i + 1)
    model_dim: int = 512
    mlp_mult: float = 2.5
    gdn_heads: int = 8
    gdn_head_dim: int = 64
    allow_neg_eigval: bool = False  # beta in (0, 2) instead of (0, 1)
    num_heads: int = 8
    num_kv_heads: int = 4
    head_dim: int = 64
    window_size: int = 512  # token t sees t-window_size+1 .. t
    rope_dims: int = 16  # rotated dims of each head, the rest is position-free
    rope_base: float = 10_000.0
    qk_gain_init: float = 5.0
    attn_gate_dims: int = 0  # inputs of the sparse gate on each attention head; 0 = off
    xsa: bool = True  # exclusive self-attention: the output has no component along the token's own value
    ngram_vocab_size: int = 0  # rows of the hashed bigram/trigram table; 0 = off
    ngram_dim: int = 112
    smear_dims: int = 12  # inputs of the SmearGate; 0 = off
    tied_embed_init_std: float = 0.005
    logit_softcap: float = 30.0
    # optimizer
    matrix_lr: float = 0.022
    muon_momentum: float = 0.97
    muon_momentum_warmup_start: float = 0.92
    muon_momentum_warmup_frac: float = 0.3  # of the run
    muon_backend_steps: int = 5
    muon_wd: float = 0.095
    tied_embed_lr: float = 0.03
    embed_wd: float = 0.085
    scalar_lr: float = 0.02
    beta1: float = 0.9
    beta2: float = 0.95
    adam_eps: float = 1e-8
    grad_clip_norm: float = 0.3  # 0 = off
    ema_decay: float = 0.9965  # 0 = off
    ema_start: float = 0.0  # progress from which weights are averaged
    # schedule
    iterations: int = 20_000
    max_wallclock_seconds: float = 600.0  # training and its reads of data; 0 = off
    gptq_reserve_seconds: float = 8.0  # of it, kept for the Hessians
    warmdown_frac: float = 0.75
    min_lr: float = 0.1  # floor of the learning-rate multiplier
    curriculum: str = ""  # see stages
    warmup_steps: int = 20  # untimed, on synthetic tokens, undone afterwards
    train_log_every: int = 200
    val_loss_every: int = 0  # steps; 0 = only at the end
    # quantization and packing
    matrix_bits: int = 6
    loop_bits: int = 6  # of the matrices in the group that loops
    matrix_clip_sigmas: float = 12.85
    mlp_clip_sigmas: float = 12.85
    embed_bits: int = 7
    embed_clip_sigmas: float = 15.0
    gptq_calibration_batches: int = 2  # of TRAIN_BATCH_TOKENS
    gptq_phases: int = 1  # 2 = Hessians of the looped blocks once more, with the others quantized
    # evaluation
    eval_mode: str = "stream"  # each document once, from left to right, its memory carried; or sliding
    eval_chunk: int = 64  # tokens of each document that a stream reads at once
    eval_rows: int = 64  # documents that a rank streams at once
    eval_seq_len: int = 2048  # of sliding windows
    eval_stride: int = 64
    val_batch_size: int = 65_536  # tokens of windows per forward and rank
    eval_seconds: float = 600.0  # budget of the final pass; 0 = off
    # test-time training, see Learner
    ttt: str = "lora"  # or sgd, or nothing
    ttt_lr: float = 0.005  # of SGD
    ttt_epochs: int = 3  # of SGD over each chunk
    ttt_chunk_tokens: int = 32_768  # of one step of SGD, in whole rows of TRAIN_SEQ_LEN
    ttt_freeze_blocks: int = 2  # the first ones, which SGD leaves as they are
    ttt_phases: int = 0  # times that SGD goes over all that was scored before
    ttt_lora_lr: float = 0.0001
    ttt_lora_rank: int = 80
    ttt_lora_alpha: float = 144.0
    ttt_lora_wd: float = 0.5

    @classmethod
    def from_env(cls, env, base=None) -> "Hyperparameters":
        """PRESET (or `base`, a Hyperparameters), then one override per field.
        Raises: ValueError naming the variable, what was found and what was expected."""
        preset = env.get("PRESET", "record")
        if preset not in PRESETS:
            raise ValueError(f"PRESET={preset!r}: expected one of {', '.join(PRESETS)}")
        hp = copy.copy(base) if base else cls(**({"preset": preset} | PRESETS[preset]))
        for f in fields(cls):
            name = f.name.upper()
            if f.name != "preset" and name in env:
                try:
                    setattr(hp, f.name, {"0": False, "1": True}[env[name]] if f.type is bool else f.type(env[name]))
                except (KeyError, ValueError):
                    kind = "0 or 1" if f.type is bool else f.type.__name__
                    raise ValueError(f"{name}={env[name]!r}: expected {kind}") from None
        hp.validate()
        return hp

    def validate(self) -> None:
        """Raises: ValueError naming the first impossible field."""
        for f in fields(self):
            value, (low, high) = getattr(self, f.name), BOUNDS.get(f.name, (0, math.inf))
            self.require(f.name, isinstance(value, (int, float) if f.type is float else f.type), f.type.__name__)
            self.require(f.name, f.type not in (int, float) or low <= value <= high, f"{low} to {high}")
        order = parse_layout(self.layout)[1]
        loops = len(order) > len(set(order))
        self.require("num_kv_heads", self.num_heads % self.num_kv_heads == 0, f"to divide NUM_HEADS={self.num_heads}")
        self.require("rope_dims", self.rope_dims in range(0, self.head_dim + 1, 2), f"even, 0 to {self.head_dim}")
        self.require("smear_dims", self.smear_dims <= self.model_dim, f"0 to MODEL_DIM={self.model_dim}")
        self.require("ngram_vocab_size", self.ngram_vocab_size == 0 or self.ngram_vocab_size > 1, "0 or more than 1")
        self.require("eval_stride", self.eval_stride <= self.eval_seq_len, f"at most EVAL_SEQ_LEN={self.eval_seq_len}")
        self.require("attn_gate_dims", self.attn_gate_dims <= self.model_dim, f"0 to MODEL_DIM={self.model_dim}")
        self.require("eval_mode", self.eval_mode in ("sliding", "stream"), "sliding or stream")
        self.require("ttt", self.ttt in ("", "sgd") or (self.ttt, self.eval_mode) == ("lora", "stream"),
                     "sgd, lora with EVAL_MODE=stream, or nothing")
        self.require("unet_skips", not self.unet_skips or len(order) > 1, "0 for a single pass")
        self.require("enable_looping_at", not self.enable_looping_at or loops, "0 without a loop in LAYOUT")
        self.require("inst_dim", not self.inst_dim or loops and not self.enable_looping_at, "0 without a constant loop")
        self.require("gptq_phases", self.gptq_phases in (1, 1 + loops), "1, or 2 with a loop in LAYOUT")
        self.require("parallel_start_layer", self.parallel_start_layer < len(set(order)), "0 or the number of a block")
        self.require("gptq_reserve_seconds", self.gptq_reserve_seconds < self.max_wallclock_seconds or
                     self.max_wallclock_seconds == 0, f"less than MAX_WALLCLOCK_SECONDS={self.max_wallclock_seconds:g}")

    def require(self, name: str, ok: bool, expected: str) -> None:
        if not ok:
            raise ValueError(f"{name.upper()}={getattr(self, name)!r}: expected {expected.replace('to inf', 'or up')}")

BOUNDS = {name: bounds for names, *bounds in (  # smallest and largest value allowed, where they are not 0 and infinity
    ("train_batch_tokens train_seq_len model_dim mlp_mult gdn_heads gdn_head_dim num_heads num_kv_heads head_dim "
     "window_size rope_base ngram_dim logit_softcap iterations muon_backend_steps train_log_every matrix_clip_sigmas "
     "mlp_clip_sigmas embed_clip_sigmas gptq_calibration_batches eval_stride eval_chunk eval_rows val_batch_size "
     "ttt_epochs ttt_chunk_tokens ttt_lora_rank", 1, math.inf), ("eval_seq_len", 2, math.inf),
    ("warmdown_frac min_lr ema_decay ema_start muon_momentum_warmup_frac muon_momentum beta1 beta2 enable_looping_at",
     0, 1), ("matrix_bits loop_bits embed_bits", 2, 8), ("vocab_size", 2, 65536)) for name in names.split()}

def parse_layout(layout: str) -> tuple[list[tuple[str, int, str]], list[int]]:
    """'G5 S G5 S=5' -> a (kind, owner, shared) for each block, and the blocks in the order of their passes.
    G = Gated DeltaNet, S = sliding-window attention, A = full causal attention, lower case = without an MLP; a number
    repeats; `=i` uses the mixer weights of block i (counted from 0), which must be of the same kind, `~i` only those of
    its keys and values; one group may loop: 'A3 (A3)x3 A5'. owner: block i or the block itself; shared: '=', '~', ''.
    Raises: ValueError naming LAYOUT and the offending part."""
    blocks, order = [], []
    groups = re.fullmatch(r"([^()]*)(?:\(([^()]*\w[^()]*)\)x([2-9])([^()]*))?", layout)
    if not groups or not layout.strip():
        raise ValueError(f"LAYOUT={layout!r}: expected at least one block and at most one group, (blocks)x2 to x9")
    for group, passes in (groups[1], 1), (groups[2] or "", int(groups[3] or 1)), (groups[4] or "", 1):
        first = len(blocks)
        for part in group.split():
            match = re.fullmatch(r"([GSAgsa])([1-9][0-9]?)?(?:([=~])([0-9]{1,4}))?", part)
            if not match:
                raise ValueError(f"LAYOUT={layout!r}: {part!r} is not G, S or A, a count to 99, =block or ~block")
            for _ in range(int(match[2] or 1)):
                owner = int(match[4] or len(blocks))
                if match[3] and (match[1].upper(), owner, "") not in [(kind.upper(), *rest) for kind, *rest in blocks]:
                    raise ValueError(f"LAYOUT={layout!r}: {part!r} reuses block {owner}, not an earlier {match[1]}")
                blocks.append((match[1], owner, match[3] or ""))
        order += [*range(first, len(blocks))] * passes
    return blocks, order

SP1024 = dict(vocab_size=1024, data_path="./data/datasets/fineweb10B_sp1024",
              tokenizer_path="./data/tokenizers/fineweb_1024_bpe.model")

PRESETS: dict[str, dict] = {
    "record": {},
    "demo": dict(  # two CPU cores, minutes, 2 MB of Python documentation: data/prepare.py --demo
        data_path="./data/datasets/demo", tokenizer_path="./data/tokenizers/demo_1024_bpe.model", vocab_size=1024,
        train_batch_tokens=2048, train_seq_len=512, grad_accum_steps=1, eval_seq_len=512, val_batch_size=2048,
        layout="G2 S G2 S=2", model_dim=128, mlp_mult=3.0, gdn_heads=2, num_heads=2, num_kv_heads=1, window_size=256,
        ngram_vocab_size=4096, ngram_dim=64, max_wallclock_seconds=150.0, gptq_reserve_seconds=6.0, warmup_steps=2,
        ema_decay=0.95, train_log_every=50, gptq_calibration_batches=24, matrix_clip_sigmas=6.0, mlp_clip_sigmas=6.0,
        embed_bits=8, embed_clip_sigmas=12.0, eval_rows=8, ttt_lora_lr=0.003, ttt_lora_rank=8, ttt_lora_alpha=16.0),
    "baseline": SP1024 | dict(  # the competition's naive baseline: its shape, trained and packed as the others
        layout="A9", unet_skips=True, mlp_mult=2.0, rope_dims=64, qk_gain_init=1.5, xsa=False, smear_dims=0,
        train_seq_len=1024, eval_seq_len=1024, eval_mode="sliding", ttt=""),
    "kv_share": dict(  # #1734: pairs of blocks share the weights of their keys and values
        layout="G G~0 G G~2 G G~4 G G~6 G G~8", model_dim=544, mlp_mult=3.0, ngram_vocab_size=3072, train_seq_len=1024,
        eval_seq_len=1024, eval_mode="sliding", ttt="sgd"),
    "pure_gdn": SP1024 | dict(  # #875: batch and chunk grow with the clock, the state passes from chunk to chunk
        layout="G7 S", model_dim=384, mlp_mult=4.0, gdn_heads=6, num_heads=6, num_kv_heads=6, window_size=256,
        smear_dims=0, train_batch_tokens=196_608, train_seq_len=1024, eval_seq_len=1024, grad_accum_steps=3,
        curriculum="0:1x64 0.15:2x128 0.45:3x256", matrix_bits=8, gptq_calibration_batches=8, ttt=""),
    "crawler": SP1024 | dict(  # #1047: flat blocks around a looped one with a delta-rule memory
        layout="A2 (A g)x4 A2", inst_dim=32, unet_skips=True, ln_scale=True, mlp_mult=3.2, gdn_heads=4,
        gdn_head_dim=128, qk_gain_init=1.5, ngram_vocab_size=2048, ngram_dim=128, matrix_lr=0.03, muon_momentum=0.99,
        ema_decay=0.99, ema_start=0.9, gptq_reserve_seconds=30.0, gptq_phases=2, loop_bits=8, ttt=""),
    "transformer": dict(ttt_phases=3, ttt_lr=0.001,  # #1787, with the SmearGate of #1855
        layout="A3 (A3)x3 A5", enable_looping_at=0.35, unet_skips=True, parallel_start_layer=8, ln_scale=True,
        mlp_mult=4.0, attn_gate_dims=12, matrix_lr=0.026, matrix_clip_sigmas=13.0, mlp_clip_sigmas=12.5),
}

# --- 2. Device, ranks, logging ---------------------------------------------------------------------------------------

RANK = int(os.environ.get("RANK", 0))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
DEVICE = torch.device("cuda", LOCAL_RANK) if torch.cuda.is_available() else torch.device("cpu")
COMPUTE_DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32  # fp32 masters are cast where used
SIZE_LIMIT = 16_000_000  # bytes, decimal: artifact + this file

log = logging.getLogger("train_gpt")

def all_reduce(x: Tensor, op=dist.ReduceOp.SUM) -> Tensor:
    """In place over all ranks; one rank skips it."""
    if WORLD_SIZE > 1:
        dist.all_reduce(x, op)
    return x

def init_log(hp: Hyperparameters) -> None:
    """Rank 0 logs to stdout and to logs/<run_id>.txt, which starts with this source and the versions it runs on."""
    log.setLevel(logging.INFO if RANK == 0 else logging.ERROR)
    log.propagate = False
    log.handlers = [logging.StreamHandler(sys.stdout)]
    if RANK != 0:
        return
    path = Path("logs") / f"{hp.run_id}.txt"
    for file in path, hp.artifact, hp.scores:  # a missing folder must not show when training is over
        Path(file).parent.mkdir(parents=True, exist_ok=True)
    gpus = subprocess.run(["nvidia-smi"], capture_output=True, text=True).stdout if DEVICE.type == "cuda" else "no GPU"
    versions = f"Running Python {sys.version}\nRunning PyTorch {torch.__version__}\n{gpus}"
    path.write_text(f"\n{'=' * 100}\n".join([Path(__file__).read_text(), versions, ""]))
    log.addHandler(logging.FileHandler(path))
    log.info(f"{path} world_size:{WORLD_SIZE} device:{DEVICE.type} dtype:{COMPUTE_DTYPE}")

# --- 3. Byte accounting ----------------------------------------------------------------------------------------------

def build_sentencepiece_luts(sp: spm.SentencePieceProcessor, vocab_size: int, device) -> tuple[Tensor, Tensor, Tensor]:
    """Per piece, as the competition counts: bytes without the leading space, if it has one, if it is a boundary. [V].
    Control, unknown and unused pieces are 0 bytes and a boundary; byte-fallback pieces are 1; any other piece is its
    UTF-8 length without its leading U+2581, the space itself is added by `token_bytes`, and only there.
    Raises: ValueError if the tokenizer has another size, another BOS, or no piece for U+2581 alone."""
    if sp.vocab_size() != vocab_size or sp.bos_id() != BOS_ID:
        raise ValueError(f"TOKENIZER_PATH: {sp.vocab_size()} pieces and BOS {sp.bos_id()}, "
                         f"expected VOCAB_SIZE={vocab_size} and BOS {BOS_ID}")
    if sp.piece_to_id("\u2581") == sp.unk_id():
        raise ValueError("TOKENIZER_PATH: no piece for U+2581 alone: the bytes of spaces would be counted three times")
    rows = []
    for i in range(vocab_size):
        piece = sp.id_to_piece(i)
        boundary = sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i)
        plain = not boundary and not sp.is_byte(i)
        base = len(piece.removeprefix("\u2581").encode()) if plain else int(not boundary)
        rows.append((base, plain and piece.startswith("\u2581"), boundary))
    base, space, boundary = torch.tensor(rows, dtype=torch.int32, device=device).T
    return base, space.bool(), boundary.bool()

def token_bytes(luts: tuple[Tensor, Tensor, Tensor], prev_ids: Tensor, target_ids: Tensor) -> Tensor:
    """UTF-8 bytes of each target, int32: a leading space counts unless the previous token is a boundary."""
    base_bytes, has_leading_space, is_boundary = luts
    return base_bytes[target_ids] + (has_leading_space[target_ids] & ~is_boundary[prev_ids])

def decode_case(text: str) -> str:
    """Undoes CaseOps (#1729): U+E001 and U+E003 raise the next letter, U+E002 the next word, U+E004 quotes."""
    return re.sub("\ue004(.?)|\ue002([A-Za-z]*)|[\ue001\ue003]([A-Za-z]?)",
                  lambda found: found[1] or (found[2] or found[3] or "").upper(), text)

# --- 4. Shards and loader --------------------------------------------------------------------------------------------

BOS_ID = 1  # starts every document
HEADER_BYTES = 256 * 4
MAGIC, VERSION = 20240520, 1  # of the competition's shards

def load_data_shard(path) -> Tensor:
    """Memory-mapped tokens of one shard, uint16 [count].
    Raises: FileNotFoundError, or ValueError naming the file if its magic, version, count or size is wrong."""
    size = os.path.getsize(path)
    if size < HEADER_BYTES:
        raise ValueError(f"{path}: {size} bytes, expected a header of {HEADER_BYTES}")
    magic, version, count = np.fromfile(path, dtype="<i4", count=3).tolist()
    if (magic, version) != (MAGIC, VERSION):
        raise ValueError(f"{path}: magic {magic} version {version}, expected magic {MAGIC} version {VERSION}")
    expected = HEADER_BYTES + 2 * max(count, 1)
    if count < 1 or size != expected:
        raise ValueError(f"{path}: {size} bytes, expected {expected} for the {count} tokens of its header")
    return torch.from_numpy(np.memmap(path, dtype="<u2", mode="c", offset=HEADER_BYTES, shape=(count,)))

class TokenStream:
    """All shards of a split as one ring of tokens, in the order of their names."""
    def __init__(self, data_path: str, split: str, vocab_size: int):
        self.paths = [p for p in sorted(Path(data_path).glob(f"fineweb_{split}_*.bin")) if "_bytes_" not in p.name]
        if not self.paths:
            raise FileNotFoundError(f"DATA_PATH={data_path}: no file fineweb_{split}_*.bin in it")
        for i, path in enumerate(self.paths):
            if path.name != (expected := f"fineweb_{split}_{i:06d}.bin"):
                raise FileNotFoundError(f"DATA_PATH={data_path}: {path.name} where {expected} was expected")
        self.shards, self.vocab_size = [load_data_shard(path) for path in self.paths], vocab_size
        self.starts = np.cumsum([0] + [len(shard) for shard in self.shards]).tolist()
        if self.shards[0][0].item() != BOS_ID:
            raise ValueError(f"{self.paths[0]}: starts with token {self.shards[0][0]}, expected BOS={BOS_ID}")

    def __len__(self) -> int:
        return self.starts[-1]

    def read(self, start: int, count: int) -> Tensor:
        """Tokens start .. start+count-1 of the ring, int64 [count].
        Raises: ValueError naming the shard that holds an id outside the vocabulary."""
        pieces = []
        while count > 0:
            start %= len(self)
            i = int(np.searchsorted(self.starts, start, side="right")) - 1
            piece = self.shards[i][start - self.starts[i]:][:count].long()
            if piece.max() >= self.vocab_size:
                raise ValueError(f"{self.paths[i]}: token {piece.max()}, expected below VOCAB_SIZE={self.vocab_size}")
            pieces.append(piece)
            start, count = start + len(piece), count - len(piece)
        return torch.cat(pieces)

class TrainLoader:
    """Micro-batches in stream order, one read ahead by a thread. position: token at which the next one begins."""
    def __init__(self, stream: TokenStream, hp: Hyperparameters, position: int = 0):
        self.stream, self.position, self.T = stream, position, hp.train_seq_len
        self.span = hp.train_batch_tokens // (grad_accum_steps(hp) * WORLD_SIZE)  # tokens of a rank's micro-batch
        self.pool, self.last_read = ThreadPoolExecutor(1), 0.0  # perf_counter() of the last look at training data
        self.ahead = self.pool.submit(self.read, position)

    def read(self, position: int) -> tuple[Tensor, Tensor]:
        """This rank's share of the micro-batch at `position`: inputs and targets, int64 [B, T] each."""
        tokens = self.stream.read(position + RANK * self.span, self.span + 1)
        pair = tokens[:-1].view(-1, self.T), tokens[1:].view(-1, self.T)
        self.last_read = time.perf_counter()
        return tuple(t.pin_memory() for t in pair) if DEVICE.type == "cuda" else pair

    def next(self) -> tuple[Tensor, Tensor]:
        x, y = self.ahead.result()
        self.position += WORLD_SIZE * self.span
        self.ahead = self.pool.submit(self.read, self.position)
        return x.to(DEVICE, non_blocking=True), y.to(DEVICE, non_blocking=True)

    def close(self) -> None:
        """No training data after this: a later `next` raises RuntimeError, any other read of the stream IndexError."""
        self.pool.shutdown()
        self.stream.shards.clear()

def documents(tokens: np.ndarray) -> list[np.ndarray]:  # of a stream, each from its BOS on
    return np.split(tokens, np.flatnonzero(tokens == BOS_ID))[1:]

def grad_accum_steps(hp: Hyperparameters) -> int:
    """Raises: ValueError if the batch does not split evenly over micro-batches and ranks."""
    steps = hp.grad_accum_steps or 8 // WORLD_SIZE
    hp.require("grad_accum_steps", hp.grad_accum_steps or 8 % WORLD_SIZE == 0, f"1 or more at WORLD_SIZE={WORLD_SIZE}")
    hp.require("train_batch_tokens", hp.train_batch_tokens % (steps * WORLD_SIZE * hp.train_seq_len) == 0, "a multiple "
               f"of {steps} micro-batches x {WORLD_SIZE} ranks x TRAIN_SEQ_LEN={hp.train_seq_len}")
    return steps

def stages(hp: Hyperparameters) -> list[tuple[float, int, int]]:
    """(progress from which it holds, micro-batches a step, tokens a backward pass) of each stage. CURRICULUM, such as
    '0:1x64 0.15:2x128': between the passes over a sequence memory is carried. Raises: ValueError naming CURRICULUM."""
    most, T = grad_accum_steps(hp), hp.train_seq_len
    parts, form = (hp.curriculum or f"0:{most}x{T}").split(), r"(0|0?\.[0-9]{1,9}):([0-9]{1,9})x([0-9]{1,9})"
    plan = [(float(m[1]), int(m[2]), int(m[3])) for m in (re.fullmatch(form, part) for part in parts) if m]
    shares = [share for share, _, _ in plan]
    hp.require("curriculum", len(plan) == len(parts) and shares == sorted({0.0, *shares}) and
               all(1 <= n <= most and chunk and T % chunk == 0 for _, n, chunk in plan),
               f"share:COUNTxTOKENS, shares rising from 0, counts up to {most}, TOKENS that divide TRAIN_SEQ_LEN={T}")
    return plan

# --- 5. Kernels ------------------------------------------------------------------------------------------------------
# The only places where CPU and CUDA differ. The plain torch side is the CPU path and the oracle of the tests.

def gated_delta_rule(q, k, v, g, beta, initial_state=None) -> tuple[Tensor, Tensor]:
    """S <- exp(g) S; S <- S + beta k (v - S^T k)^T; o = S^T q / sqrt(K), per token and head (arXiv:2412.06464).
    q, k: [B, T, H, K], normalised. v: [B, T, H, V]. g: [B, T, H], log decay <= 0. beta: [B, T, H].
    initial_state: [B, H, K, V] float32, zeros if None.
    Returns o: [B, T, H, V] in v's dtype and the final state: [B, H, K, V] float32."""
    B, _, H, K = k.shape
    if initial_state is None:
        initial_state = k.new_zeros(B, H, K, v.shape[-1], dtype=torch.float32)
    return (fla_gated_delta_rule if k.is_cuda else torch_gated_delta_rule)(q, k, v, g, beta, initial_state)[:2]

def torch_gated_delta_rule(q, k, v, g, beta, initial_state, chunk: int = 64) -> tuple[Tensor, Tensor]:
    """The chunked form in plain torch: chunk by chunk, all tokens of one at once. 64 is the fastest on a CPU.
    float32 inside, or float64 for float64 inputs."""
    inner = torch.promote_types(v.dtype, torch.float32)
    inputs = q * k.shape[-1] ** -0.5, k, v, g, beta.unsqueeze(-1)
    S, out = initial_state.to(inner), []
    for q_n, k_n, v_n, g_n, beta_n in zip(*(x.to(inner).transpose(1, 2).split(chunk, 2) for x in inputs), strict=True):
        # from the column's token to the row's, summed from there: a difference of sums would mix roundings of documents
        past = torch.ones(g_n.shape[-1], g_n.shape[-1], dtype=torch.bool, device=g.device).tril(-1)
        decay = (g_n.unsqueeze(-1) * past).cumsum(-2).masked_fill(past.mT, -torch.inf).exp()
        from_start = g_n.cumsum(-1).exp().unsqueeze(-1)
        # the writes of a chunk solve (I + A) U = beta (V - K S): each sees what the earlier ones wrote along its key
        A, values = (k_n @ k_n.mT) * decay * beta_n, beta_n * (v_n - from_start * (k_n @ S))
        U = torch.linalg.solve_triangular(A, values, upper=False, unitriangular=True)
        out.append(from_start * (q_n @ S) + ((q_n @ k_n.mT) * decay) @ U)
        S = from_start[..., -1:, :] * S + (k_n * decay[..., -1, :, None]).mT @ U
    return torch.cat(out, 2).transpose(1, 2).to(v.dtype), S

# fla's chunk op would break fullgraph; a custom op is opaque. Imported when used: without a GPU it warns, for seconds.

@torch.library.custom_op("train_gpt::gated_delta_rule", mutates_args=())
def fla_gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor,
                         initial_state: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """fla's Triton chunk kernels. Returns o, final state, and for the backward the summed decay and WY matrix."""
    from fla.ops.gated_delta_rule.chunk import chunk_gated_delta_rule_fwd
    q, k, v, g, beta, initial_state = (x.contiguous() for x in (q, k, v, g, beta, initial_state))
    g_sum, o, A, final_state, _, _ = chunk_gated_delta_rule_fwd(
        q, k, v, g, beta, scale=k.shape[-1] ** -0.5, initial_state=initial_state, output_final_state=True)
    return o.to(v.dtype), final_state, g_sum, A

@torch.library.custom_op("train_gpt::gated_delta_rule_backward", mutates_args=())
def fla_gated_delta_rule_backward(
        q: Tensor, k: Tensor, v: Tensor, g_sum: Tensor, beta: Tensor, A: Tensor, initial_state: Tensor, do: Tensor,
        d_state: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g, beta and the initial state."""
    from fla.ops.gated_delta_rule.chunk import chunk_gated_delta_rule_bwd
    q, k, v, beta, initial_state, do, d_state = (x.contiguous() for x in (q, k, v, beta, initial_state, do, d_state))
    dq, dk, dv, dbeta, dg, dh0, _, _ = chunk_gated_delta_rule_bwd(
        q, k, v, g_sum, beta, A, scale=k.shape[-1] ** -0.5, initial_state=initial_state, do=do, dht=d_state)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dg.to(g_sum.dtype), dbeta.to(beta.dtype), dh0

fla_gated_delta_rule.register_fake(lambda q, k, v, g, beta, initial_state: (
    v.new_empty(v.shape), initial_state.new_empty(initial_state.shape), g.new_empty(g.shape),
    k.new_empty(*k.shape[:3], 64)))
fla_gated_delta_rule_backward.register_fake(lambda q, k, v, g_sum, beta, A, initial_state, do, d_state: tuple(
    x.new_empty(x.shape) for x in (q, k, v, g_sum, beta, initial_state)))
fla_gated_delta_rule.register_autograd(
    lambda ctx, do, d_state, *_: fla_gated_delta_rule_backward(*ctx.saved_tensors, do, d_state),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(
        *inputs[:3], output[2], inputs[4], output[3], inputs[5]))

def window_attention(q, k, v, window: int, doc=None) -> Tensor:
    """Causal attention inside documents: token t sees t-window+1 .. t, as far as they have its document number.
    q and result: [B, T, H, D]. k, v: [B, T, Hkv, D], Hkv divides H. doc: [B, T], rising; None = one document a row."""
    if doc is None:
        doc = torch.zeros(q.shape[:2], dtype=torch.long, device=q.device)
    return (varlen_window_attention if q.is_cuda else masked_window_attention)(q, k, v, window, doc)

def masked_window_attention(q, k, v, window: int, doc: Tensor) -> Tensor:
    t = torch.arange(q.shape[1], device=q.device)
    seen = (t[:, None] >= t) & (t[:, None] - t < window) & (doc[:, :, None] == doc[:, None, :])
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen.unsqueeze(1), enable_gqa=True).transpose(1, 2)

def varlen_window_attention(q, k, v, window: int, doc: Tensor) -> Tensor:
    """FlashAttention over all documents of all rows as one packed sequence, its number of segments fixed."""
    B, T = doc.shape
    starts = F.pad(doc[:, 1:] != doc[:, :-1], (1, 0), value=True).flatten()
    room = B * T // 64 + B + 64  # FineWeb's documents average over 1,000 tokens
    torch._assert_async(starts.sum() <= room, "window_attention: documents are shorter than 64 tokens on average")
    cu_seqlens = torch.nonzero_static(starts, size=room + 1, fill_value=B * T).flatten().int()
    out = varlen_attn(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), cu_seqlens, cu_seqlens, T, T,
                      window_size=(window - 1 if window < T else -1, 0), enable_gqa=True)
    return out.unflatten(0, (B, T))

# --- 6. Model --------------------------------------------------------------------------------------------------------

# at a document's first token: exp(-60) of the old state is nothing in float32, and fla's sums of decay lose only 1e-5
RESET_LOG_DECAY = -60.0

class Context(NamedTuple):
    """What every layer needs to know of the tokens besides their embedding."""
    doc: Tensor  # [B, T] document number; BOS starts a new one, 0 = no token
    same_doc: Tensor  # [B, T, 3]: is the token 1, 2, 3 earlier of the same document
    cos: Tensor  # [1, T, 1, rope_dims // 2]
    sin: Tensor

    def last(self, n: int) -> "Context":
        return Context(*(x[:, -n:] for x in self))

def shift(x: Tensor, n: int) -> Tensor:
    """x of the token n earlier, zeros before the first; over dim 1."""
    return F.pad(x, (0, 0) * (x.ndim - 2) + (n, 0))[:, : x.shape[1]]

def recall(x: Tensor, memory: list[Tensor] | None, reach: int) -> Tensor:
    """x: [B, T, ...] behind the `reach` inputs before it, which are the first entry of memory; what it has to hold for
    the next tokens becomes the last entry. Gradients end there."""
    if memory is None:
        return x
    x = torch.cat((memory.pop(0), x), 1)
    memory.append(x[:, x.shape[1] - reach :].detach().contiguous())  # as laid out at first: one graph
    return x

def make_context(ids: Tensor, rope_dims: int, rope_base: float, dtype: torch.dtype) -> Context:
    """ids: [B, T]; -1 = no token."""
    doc = torch.where(ids < 0, 0, (ids == BOS_ID).long().cumsum(1) + 1)
    same_doc = torch.stack([(shift(doc, n) == doc).to(dtype) for n in (1, 2, 3)], -1)  # shift pads with 0
    frequencies = rope_base ** -torch.linspace(0, 1, rope_dims // 2 + 1, device=ids.device)[:-1]
    angles = torch.arange(ids.shape[1], device=ids.device)[None, :, None, None] * frequencies
    return Context(doc, same_doc, angles.cos().to(dtype), angles.sin().to(dtype))

def norm(x: Tensor, weight: Tensor | None = None) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight.to(x.dtype) if weight is not None else None, eps=1e-5)

def rotary(x: Tensor, ctx: Context) -> Tensor:
    """Rotates the first rope_dims of each head by the token's position in the row. x: [B, T, H, D]."""
    n = ctx.cos.shape[-1]
    x1, x2, rest = x.split((n, n, x.shape[-1] - 2 * n), -1)
    return torch.cat((x1 * ctx.cos + x2 * ctx.sin, x2 * ctx.cos - x1 * ctx.sin, rest), -1)

class Linear(nn.Linear):
    """No bias; float32 master weight, cast to the input's dtype. lora: A [B, r, n_in], B [B, n_out, r] and a scale."""
    def __init__(self, n_in: int, n_out: int):
        super().__init__(n_in, n_out, bias=False)
        self.lora = None

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight.to(x.dtype))
        if self.lora:
            A, B, scale = self.lora
            y = y + scale * (x @ A.to(x.dtype).mT) @ B.to(x.dtype).mT
        return y

def short_conv(x: Tensor, weight: Tensor, ctx: Context) -> Tensor:
    """Causal depthwise convolution over 4 tokens of the document, then SiLU. weight: [n, 4], last tap = own token."""
    taps = weight.to(x.dtype).unbind(-1)
    y = x * taps[3]
    for n in (1, 2, 3):
        y = torch.addcmul(y, shift(x, n) * ctx.same_doc[..., n - 1 : n], taps[3 - n])
    return F.silu(y)

class GatedDeltaNet(nn.Module):
    """arXiv:2412.06464, with the names of fla.layers.GatedDeltaNet (expand_v = 1)."""
    def __init__(self, hp: Hyperparameters):
        super().__init__()
        n = hp.gdn_heads * hp.gdn_head_dim
        self.head_dim, self.reach, self.beta_max = hp.gdn_head_dim, 3, 2.0 if hp.allow_neg_eigval else 1.0
        self.q_proj, self.k_proj, self.v_proj, self.g_proj = (Linear(hp.model_dim, n) for _ in range(4))
        self.a_proj, self.b_proj = (Linear(hp.model_dim, hp.gdn_heads) for _ in range(2))
        self.q_conv1d, self.k_conv1d, self.v_conv1d = (nn.Parameter(torch.empty(n, 4)) for _ in range(3))
        self.A_log = nn.Parameter(torch.empty(hp.gdn_heads))
        self.dt_bias = nn.Parameter(torch.empty(hp.gdn_heads))
        self.o_norm = nn.Parameter(torch.empty(hp.gdn_head_dim))
        self.o_proj = Linear(n, hp.model_dim)

    def forward(self, x: Tensor, ctx: Context, memory: list[Tensor] | None = None) -> Tensor:
        T, before = x.shape[1], recall(x, memory, self.reach)
        ctx = ctx.last(before.shape[1])
        q, k, v = (short_conv(proj(before), conv, ctx)[:, -T:].unflatten(-1, (-1, self.head_dim)) for proj, conv in (
            (self.q_proj, self.q_conv1d), (self.k_proj, self.k_conv1d), (self.v_proj, self.v_conv1d)))
        g = -self.A_log.exp() * F.softplus(self.a_proj(x).float() + self.dt_bias)
        g = g.masked_fill(ctx.same_doc[:, -T:, :1] == 0, RESET_LOG_DECAY)
        beta = self.beta_max * self.b_proj(x).float().sigmoid()
        o, state = gated_delta_rule(F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, g, beta,
                                    memory.pop(0) if memory is not None else None)
        if memory is not None:
            memory.append(state.detach())
        gate = F.silu(self.g_proj(x)).unflatten(-1, (-1, self.head_dim))
        return self.o_proj((norm(o, self.o_norm) * gate).flatten(2))

class Attention(nn.Module):
    """Sliding-window (or full causal) attention: grouped queries, QK norm and gain, rotary, exclusive values."""
    def __init__(self, hp: Hyperparameters, window: int):
        super().__init__()
        self.head_dim, self.window, self.xsa = hp.head_dim, window, hp.xsa
        self.reach = min(window, hp.eval_seq_len) - 1  # memory of full attention ends somewhere
        self.q_proj = Linear(hp.model_dim, hp.num_heads * hp.head_dim)
        self.k_proj = Linear(hp.model_dim, hp.num_kv_heads * hp.head_dim)
        self.v_proj = Linear(hp.model_dim, hp.num_kv_heads * hp.head_dim)
        self.q_gain = nn.Parameter(torch.empty(hp.num_heads))
        self.attn_gate = nn.Parameter(torch.empty(hp.num_heads, hp.attn_gate_dims)) if hp.attn_gate_dims else None
        self.o_proj = Linear(hp.num_heads * hp.head_dim, hp.model_dim)

    def forward(self, x: Tensor, ctx: Context, memory: list[Tensor] | None = None) -> Tensor:
        before = recall(x, memory, self.reach)
        ctx = ctx.last(before.shape[1])
        q, k, v = (proj(before).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q = rotary(norm(q), ctx) * self.q_gain.to(x.dtype)[:, None]
        y = window_attention(q, rotary(norm(k), ctx), v, self.window, ctx.doc)
        y, v = y[:, -x.shape[1] :], v[:, -x.shape[1] :]
        if self.xsa:
            y, own = y.unflatten(2, (v.shape[2], -1)), F.normalize(v, dim=-1).unsqueeze(3)  # [B, T, Hkv, group, D]
            y = (y - (y * own).sum(-1, keepdim=True) * own).flatten(2, 3)
        if self.attn_gate is not None:
            y = y * F.linear(x[..., : self.attn_gate.shape[1]], self.attn_gate.to(x.dtype)).sigmoid().unsqueeze(-1)
        return self.o_proj(y.flatten(2))

class NgramEmbedding(nn.Module):
    """One hashed table looked up by bigram and trigram, summed and projected; history ends at the document's start."""
    def __init__(self, hp: Hyperparameters):
        super().__init__()
        self.table = nn.Parameter(torch.empty(hp.ngram_vocab_size, hp.ngram_dim))
        self.proj = Linear(hp.ngram_dim, hp.model_dim)

    def forward(self, ids: Tensor, ctx: Context) -> Tensor:
        missing = len(self.table) - 1
        bigram = (36313 * ids) ^ (27191 * shift(ids, 1))
        keys = torch.stack((bigram, bigram ^ (51497 * shift(ids, 2))), -1) % missing
        rows = F.embedding(torch.where(ctx.same_doc[..., :2] > 0, keys, missing), self.table).sum(-2)
        return self.proj(rows.to(ctx.cos.dtype))

class Block(nn.Module):
    """Mixer and MLP, each on the normalised stream and scaled per channel; x0 (the embedding) is mixed in first."""
    def __init__(self, hp: Hyperparameters, mixer: nn.Module, index: int, has_mlp: bool):
        super().__init__()
        D, hidden = hp.model_dim, int(hp.mlp_mult * hp.model_dim)
        mlp = nn.ModuleDict(dict(up_proj=Linear(D, hidden), down_proj=Linear(hidden, D))) if has_mlp else None
        self.mixer, self.mlp = mixer, mlp
        self.norm_scale = (index + 1) ** -0.5 if hp.ln_scale else 1.0
        self.resid_mix = nn.Parameter(torch.empty(2, hp.model_dim))
        self.mixer_scale = nn.Parameter(torch.empty(hp.model_dim))
        self.mlp_scale = nn.Parameter(torch.empty(hp.model_dim)) if has_mlp else None
        self.lanes = nn.Parameter(torch.empty(2, 3)) if 0 < hp.parallel_start_layer <= index else None

    def mlp_out(self, x: Tensor) -> Tensor | float:
        """LeakyReLU(0.5)^2."""
        if self.mlp is None:
            return 0.0
        hidden = F.leaky_relu(self.mlp.up_proj(self.norm_scale * norm(x)), 0.5).square()
        return self.mlp_scale.to(x.dtype) * self.mlp.down_proj(hidden)

    def forward(self, x: Tensor, lane: Tensor | None, x0: Tensor, ctx: Context, memory) -> tuple[Tensor, Tensor | None]:
        """x, x0: [B, T, D]; lane: the MLP's own residual stream, where there is one. Returns both as they go on."""
        mix_x, mix_x0 = self.resid_mix.to(x.dtype)
        u = mix_x * x + mix_x0 * x0
        mixed = self.mixer_scale.to(x.dtype) * self.mixer(self.norm_scale * norm(u), ctx, memory)
        if self.lanes is None:
            return u + mixed + self.mlp_out(u + mixed), lane
        out, ((a, b, c), (d, e, f)) = self.mlp_out(lane), self.lanes.to(x.dtype)
        return a * x + b * mixed + c * out, d * lane + e * mixed + f * out

class GPT(nn.Module):
    """The whole network; the one forward of training, calibration and scoring."""
    def __init__(self, hp: Hyperparameters):
        super().__init__()
        self.hp = hp
        self.tok_emb = nn.Embedding(hp.vocab_size, hp.model_dim)
        self.ngram = NgramEmbedding(hp) if hp.ngram_vocab_size else None
        if hp.smear_dims:
            self.smear_gate = nn.Parameter(torch.empty(hp.smear_dims))
            self.smear_lambda = nn.Parameter(torch.empty(()))
        layout, self.order = parse_layout(hp.layout)
        self.orders = [*range(len(layout))], self.order  # of the passes, before and after ENABLE_LOOPING_AT
        looped = {i for i in self.order if self.order.count(i) > 1}
        self.loop_start, self.looped = min(looped, default=-1), ("inst_", *(f"blocks.{i}." for i in looped))
        mixers: list[nn.Module] = []
        for kind, owner, shared in layout:
            window = hp.window_size if kind in "Ss" else sys.maxsize
            mixers.append(mixers[owner] if shared == "=" else
                          GatedDeltaNet(hp) if kind in "Gg" else Attention(hp, window))
            for name in ("k_proj", "v_proj", "k_conv1d", "v_conv1d") if shared == "~" else ():
                if hasattr(mixers[owner], name):
                    setattr(mixers[-1], name, getattr(mixers[owner], name))
        self.blocks = nn.ModuleList(Block(hp, mixer, i, layout[i][0].isupper()) for i, mixer in enumerate(mixers))
        self.reach = max(3, *(mixer.reach for mixer in mixers))
        if hp.inst_dim:
            self.inst_in = Linear(hp.model_dim, hp.inst_dim)
            self.inst_out = nn.ModuleList(Linear(hp.inst_dim, hp.model_dim) for i in self.order if i == self.loop_start)
        if hp.unet_skips:
            self.skips = nn.Parameter(torch.empty(2, len(self.order) // 2, hp.model_dim))
        self.lm_head = Linear(hp.model_dim, hp.vocab_size)
        self.lm_head.weight = self.tok_emb.weight
        self.kinds = init_weights(self, hp)

    def embed(self, ids: Tensor, ctx: Context) -> Tensor:
        x = self.tok_emb(ids).to(ctx.cos.dtype)
        if self.ngram is not None:
            x = x + self.ngram(ids, ctx)
        if self.hp.smear_dims:
            gate = (x[..., : self.hp.smear_dims] @ self.smear_gate.to(x.dtype)).sigmoid().unsqueeze(-1)
            x = x + self.smear_lambda.to(x.dtype) * gate * ctx.same_doc[..., :1] * shift(x, 1)
        return norm(x)

    def new_memory(self, rows: int) -> list[Tensor]:
        """For forward, of `rows` sequences not begun: ids, then inputs and state of the mixers, in order."""
        device, memory = self.tok_emb.weight.device, []
        memory.append(torch.full((rows, self.reach), -1, device=device))
        for mixer in (self.blocks[i].mixer for i in self.order):
            memory.append(torch.zeros(rows, mixer.reach, self.hp.model_dim, dtype=COMPUTE_DTYPE, device=device))
            if isinstance(mixer, GatedDeltaNet):
                memory.append(torch.zeros(rows, self.hp.gdn_heads, mixer.head_dim, mixer.head_dim, device=device))
        return memory

    def forward(self, input_ids: Tensor, memory: list[Tensor] | None = None) -> Tensor:
        """input_ids: [B, T] int64 -> logits [B, T, V] float32. memory: see new_memory; brought up to date in place."""
        ids = recall(input_ids, memory, self.reach)
        ctx = make_context(ids, self.hp.rope_dims, self.hp.rope_base, COMPUTE_DTYPE)
        x = x0 = self.embed(ids.clamp(min=0), ctx)[:, -input_ids.shape[1] :]
        lane, skips, half, loop = None, [], len(self.order) // 2, 0
        for step, i in enumerate(self.order):
            if lane is None and self.blocks[i].lanes is not None:
                lane = x  # skips go to the first lane only
            if skips and step >= half:
                weight, gate = self.skips[:, step - half].to(x.dtype)
                x = torch.lerp(weight * skips.pop(), x, gate.sigmoid())
            if self.hp.inst_dim and i == self.loop_start:
                x = x + self.inst_out[loop](self.inst_in(x))
                loop += 1
            x, lane = self.blocks[i](x, lane, x0, ctx, memory)
            if self.hp.unet_skips and step < half:
                skips.append(x)
        x = x if lane is None else (x + lane) / 2
        cap = self.hp.logit_softcap
        return cap * torch.tanh(self.lm_head(norm(x)).float() / cap)

def token_nats(model: nn.Module, x: Tensor, y: Tensor, *memory) -> Tensor:
    """-ln p(target), float32 [B, T]; x, y: [B, T] inputs and targets."""
    return F.cross_entropy(model(x, *memory).flatten(0, 1), y.flatten(), reduction="none").view_as(y)

# (pattern, kind, init): the first that matches a parameter's name decides its optimizer, its precision and its start.
# matrix: Muon, GPTQ at MATRIX_BITS or LOOP_BITS. embed: AdamW, GPTQ. scalar: AdamW, no decay, float16.
PARAM_RULES = (
    (r"tok_emb\.weight$", "embed", lambda w, hp: w.normal_(std=hp.tied_embed_init_std)),
    (r"ngram\.table$", "embed", lambda w, hp: w.zero_()),  # under a projection that is not zero: both can learn
    (r"((o|down)_proj|inst_out\.\d+)\.weight$", "matrix", lambda w, hp: w.zero_()),
    (r"((q|k|v|g|up)_proj|ngram\.proj|inst_in)\.weight$", "matrix", lambda w, hp: nn.init.orthogonal_(w)),
    (r"(a|b)_proj\.weight$", "scalar", lambda w, hp: w.uniform_(-w.shape[1] ** -0.5, w.shape[1] ** -0.5)),
    (r"conv1d$", "scalar", lambda w, hp: w.uniform_(-0.5, 0.5)),
    (r"A_log$", "scalar", lambda w, hp: w.uniform_(1, 16).log_()),
    # softplus(dt_bias) log-uniform in [1e-3, 1e-1], as in Mamba-2 and fla
    (r"dt_bias$", "scalar", lambda w, hp: w.uniform_(math.log(1e-3), math.log(1e-1)).exp_().expm1_().log_()),
    (r"q_gain$", "scalar", lambda w, hp: w.fill_(hp.qk_gain_init)),
    (r"resid_mix$", "scalar", lambda w, hp: w.copy_(torch.tensor([[1.0], [0.0]]))),
    (r"(_scale|o_norm)$", "scalar", lambda w, hp: w.fill_(1.0)),
    (r"skips$", "scalar", lambda w, hp: w.copy_(torch.tensor([1.0, 0.0])[:, None, None])),  # weight, gate
    (r"lanes$", "scalar", lambda w, hp: w.copy_(torch.tensor([1.1, 1.0, 1.0]))),  # of itself, the mixer, the MLP
    (r"smear_(gate|lambda)$|attn_gate$", "scalar", lambda w, hp: w.zero_()),  # a zero weight behind a gate of 1/2
)

@torch.no_grad()
def init_weights(model: nn.Module, hp: Hyperparameters) -> dict[str, str]:
    """Returns the kind of every parameter by name. Raises: LookupError for one that no rule names."""
    kinds = {}
    for name, p in model.named_parameters():
        rule = next((rule for rule in PARAM_RULES if re.search(rule[0], name)), None)
        if not rule:
            raise LookupError(f"parameter {name} matches no rule in PARAM_RULES")
        _, kinds[name], init = rule
        init(p, hp)
    return kinds

# --- 7. Muon and AdamW -----------------------------------------------------------------------------------------------

# optimal_composition(l=1e-3, num_iters=5, safety_factor=2e-2, cushion=2) of the Polar Express paper, arXiv:2505.16932
POLAR_EXPRESS = ((8.156554524902461, -22.48329292557795, 15.878769915207462),
                 (4.042929935166739, -2.808917465908714, 0.5000178451051316),
                 (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
                 (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
                 (2.3465413258596377, -1.7097828382687081, 0.42323551169305323))

def polar_express(G: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrices, nearly: singular values in [1e-3, 1] of the norm go to [0.859, 1.141].
    G: [..., rows, cols]. Steps after the fifth repeat the last tuple. Returns G's shape, in COMPUTE_DTYPE."""
    tall = G.shape[-2] > G.shape[-1]
    X = F.normalize((G.mT if tall else G).to(COMPUTE_DTYPE), dim=(-2, -1), eps=1e-7)
    for a, b, c in (POLAR_EXPRESS + POLAR_EXPRESS[-1:] * max(0, steps - 5))[:steps]:
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return X.mT if tall else X

def reduce_gradients(params: list[Tensor], clip_norm: float) -> Tensor:
    """Averages .grad over ranks, clips. Returns the norm before clipping."""
    grads = [p.grad for p in params]
    if WORLD_SIZE > 1:
        flat = all_reduce(torch.cat([grad.flatten() for grad in grads])).div_(WORLD_SIZE)
        for grad, reduced in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(reduced.view_as(grad))
    return nn.utils.clip_grad_norm_(params, clip_norm)

class Muon:
    """Owns every parameter: Muon (arXiv:2502.16982) for matrices, AdamW for the rest. Reduces gradients: no DDP.
    Matrices of a shape are stacked; each rank orthogonalises its share of the stack and the updates are gathered."""
    def __init__(self, model: nn.Module, hp: Hyperparameters):
        self.model, self.hp, self.lr_multiplier = model, hp, 0.0  # the last one used
        kinds = {kind: [p for name, p in model.named_parameters() if model.kinds[name] == kind]
                 for kind in ("matrix", "embed", "scalar")}
        groups = [dict(params=kinds["embed"], base_lr=hp.tied_embed_lr, weight_decay=hp.embed_wd),
                  dict(params=kinds["scalar"], base_lr=hp.scalar_lr, weight_decay=0.0)]
        self.adamw = torch.optim.AdamW(groups, betas=(hp.beta1, hp.beta2), eps=hp.adam_eps, fused=DEVICE.type == "cuda")
        self.stacks: dict[tuple[int, int], list[Tensor]] = collections.defaultdict(list)
        for p in kinds["matrix"]:
            self.stacks[tuple(p.shape)].append(p)
        self.momentum = {shape: torch.zeros(-(-len(params) // WORLD_SIZE), *shape, device=DEVICE)
                         for shape, params in self.stacks.items()}  # of this rank's share of each stack

    @torch.no_grad()
    def step(self, lr_multiplier: float, momentum: float) -> Tensor:
        """One update from the gradients in .grad, which it clears. Returns the gradient norm before clipping."""
        self.lr_multiplier = lr_multiplier
        grad_norm = reduce_gradients([*self.model.parameters()], self.hp.grad_clip_norm or math.inf)
        for group in self.adamw.param_groups:
            group["lr"] = group["base_lr"] * lr_multiplier
        self.adamw.step()
        lr = self.hp.matrix_lr * lr_multiplier
        for shape, params in self.stacks.items():
            update = self.orthogonal_update(torch.stack([p.grad for p in params]), self.momentum[shape], momentum)
            torch._foreach_mul_(params, 1 - lr * self.hp.muon_wd)
            torch._foreach_add_(params, update[: len(params)].float().unbind(), alpha=-lr)
        self.model.zero_grad()
        return grad_norm

    def orthogonal_update(self, grads: Tensor, buffer: Tensor, momentum: float) -> Tensor:
        """grads: [n, rows, cols], averaged. Updates this rank's momentum, gathers all updates: [>= n, ...]."""
        share, (rows, cols) = len(buffer), grads.shape[1:]
        grads = F.pad(grads, (0, 0, 0, 0, 0, share * WORLD_SIZE - len(grads)))[RANK * share :][:share]
        buffer.mul_(momentum).add_(grads)
        update = F.normalize(grads + momentum * buffer, dim=-1, eps=1e-7)  # Nesterov, then MuonEq-R: rows of one length
        update = polar_express(update, self.hp.muon_backend_steps) * max(1, rows / cols) ** 0.5
        if WORLD_SIZE == 1:
            return update
        gathered = update.new_empty(share * WORLD_SIZE, rows, cols)
        dist.all_gather_into_tensor(gathered, update.contiguous())
        return gathered

    def reached(self) -> int:
        """How many parameters a gradient has ever reached: those whose momentum is not zero."""
        matrices = sum(buffer.flatten(1).any(1).sum().item() for buffer in self.momentum.values())
        matrices = all_reduce(torch.tensor(matrices, device=DEVICE)).item()
        return matrices + sum(state["exp_avg"].any().item() for state in self.adamw.state.values())

# --- 8. GPTQ ---------------------------------------------------------------------------------------------------------

def collect_hessians(model: GPT, batches: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """X^T X of every matrix's input over `batches`, float32 [cols, cols], summed over ranks, by parameter name. The
    n-gram table is looked up: the error of its rows reaches the model through the projection P, so it gets P^T P."""
    names = {id(p): name for name, p in model.named_parameters() if model.kinds[name] != "scalar"}
    hessians = collections.defaultdict(float)

    def hook(module, inputs, _):
        if isinstance(module, Linear) and id(module.weight) in names:
            X = inputs[0].flatten(0, -2).float()
            hessians[names[id(module.weight)]] += X.mT @ X

    with torch.no_grad(), nn.modules.module.register_module_forward_hook(hook):
        for x, _ in batches:
            model(x)
    hessians = {name: all_reduce(hessian) for name, hessian in hessians.items()}
    if model.ngram is not None:
        hessians["ngram.table"] = model.ngram.proj.weight.detach().mT @ model.ngram.proj.weight.detach()
    return hessians

def gptq_quantize(W: Tensor, H: Tensor, bits: int, clip_sigmas: float) -> tuple[Tensor, Tensor]:
    """GPTQ (arXiv:2210.17323) with activation order; scale of a row = clip_sigmas * std / qmax (SDClip).
    W: [rows, cols] float32. H: [cols, cols], X^T X of the inputs. With the identity this is round-to-nearest.
    Returns q: int8 [rows, cols] in [-qmax, qmax], scale: float16 [rows]; W is about q * scale."""
    qmax = 2 ** (bits - 1) - 1
    scale = (clip_sigmas * W.std(dim=1) / qmax).clamp_min(2**-24).half()  # rounded first: the loader sees float16
    W, H = W.clone(), H.float().clone()
    dead = H.diagonal() == 0
    H.diagonal()[dead] = 1.0
    W[:, dead] = 0.0
    order = H.diagonal().argsort(descending=True)
    W, H = W[:, order], H[order][:, order]
    H.diagonal().add_(0.01 * H.diagonal().mean())  # damping keeps the factorisation stable
    Hinv = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    Q = torch.empty_like(W)
    for j, w in enumerate(W.unbind(1)):
        Q[:, j] = (w / scale.float()).round().clamp(-qmax, qmax)
        err = (w - Q[:, j] * scale.float()) / Hinv[j, j]
        W[:, j + 1 :] -= torch.outer(err, Hinv[j, j + 1 :])
    return Q[:, order.argsort()].to(torch.int8), scale

def precision(model: GPT, hp: Hyperparameters, name: str) -> tuple[int, float]:
    """Bits and clip_sigmas of a quantized parameter."""
    if model.kinds[name] == "embed":
        return hp.embed_bits, hp.embed_clip_sigmas
    bits = hp.loop_bits if name.startswith(model.looped) else hp.matrix_bits
    return bits, hp.mlp_clip_sigmas if ".mlp." in name else hp.matrix_clip_sigmas

@torch.no_grad()
def quantize(model: GPT, hp: Hyperparameters, hessians: dict[str, Tensor] | None = None, skip=()) -> dict:
    """(q, scale) of every matrix and embedding by name but for `skip`; without Hessians by rounding to nearest.
    Raises: KeyError for a matrix that has no Hessian."""
    def hessian(name, W):
        return torch.eye(W.shape[1], device=W.device) if hessians is None else hessians[name]

    return {name: gptq_quantize(W.float(), hessian(name, W), *precision(model, hp, name))
            for name, W in model.named_parameters() if model.kinds[name] != "scalar" and name not in skip}

def loop_aware_hessians(model: GPT, hp: Hyperparameters, hessians: dict[str, Tensor], batches) -> dict[str, Tensor]:
    """Those of the looped blocks collected again behind the other blocks as they will ship (#1047, there unused)."""
    looped = {name for name in hessians if name.startswith(model.looped)}
    flat = dequantized(model, quantize(model, hp, hessians, skip=looped))
    return hessians | {name: H for name, H in collect_hessians(flat, batches).items() if name in looped}

@torch.no_grad()
def output_errors(model: GPT, quantized: dict, hessians: dict[str, Tensor]) -> dict[str, float]:
    """Squared error of each quantized tensor's outputs on the inputs that its Hessian was collected from."""
    errors = {name: p - dequantize(*quantized[name]) for name, p in model.named_parameters() if name in hessians}
    return {name: (E @ hessians[name] * E).sum().item() for name, E in errors.items()}

@torch.no_grad()
def dequantized(model: GPT, quantized: dict) -> GPT:
    """A copy of the model with the weights that the artifact will hold."""
    copied = copy.deepcopy(model)
    for name, p in copied.named_parameters():
        p.copy_(dequantize(*quantized[name]) if name in quantized else p.half())
    return copied

def dequantize(q: Tensor, scale: Tensor) -> Tensor:
    return q.float() * scale.float().unsqueeze(1)

# --- 9. Packing ------------------------------------------------------------------------------------------------------
# ARTIFACT_HEADER, then compressed: length of a JSON text, this text (hyperparameters, tensor table), int8 values of
# quantized tensors, float16 values of scales and the rest. Nothing in it is executed.

ARTIFACT_MAGIC = b"GDNSWA16"
ARTIFACT_HEADER = struct.Struct("<8sQQ32s")  # magic, compressed bytes, body bytes, sha256 of the compressed
MAX_BODY_BYTES = 1 << 30

def tensor_table(model: GPT) -> list[list]:
    """[name, shape, quantized?] of every tensor of an artifact, in its order; shared weights stand once."""
    return [[name, list(p.shape), model.kinds[name] != "scalar"] for name, p in model.named_parameters()]

def save_artifact(path, model: GPT, hp: Hyperparameters, quantized: dict | None = None) -> int:
    """Packs the model; `quantized` as from `quantize`, None = round to nearest. Returns the file's bytes."""
    quantized = quantize(model, hp) if quantized is None else quantized
    table, params = tensor_table(model), dict(model.named_parameters())
    run = "run_id author github_id artifact eval_only scores".split()  # where it writes and how it is called
    config = {name: value for name, value in asdict(hp).items() if name not in run}
    head = json.dumps(dict(config=config, tensors=table), separators=(",", ":")).encode()
    ints = [quantized[name][0] for name, _, is_int in table if is_int]
    halves = [quantized[name][1] if is_int else params[name].detach().half() for name, _, is_int in table]
    body = struct.pack("<I", len(head)) + head + b"".join(x.cpu().numpy().tobytes() for x in ints + halves)
    data = brotli.compress(body, quality=11, lgwin=24)
    header = ARTIFACT_HEADER.pack(ARTIFACT_MAGIC, len(data), len(body), hashlib.sha256(data).digest())
    Path(f"{path}.tmp").write_bytes(header + data)
    os.replace(f"{path}.tmp", path)
    return os.path.getsize(path)

def load_artifact(path, device) -> tuple[GPT, Hyperparameters]:
    """A fresh model with the artifact's weights, and the hyperparameters it was trained with.
    Raises: FileNotFoundError, or ValueError naming the file and what is wrong with it."""
    raw = Path(path).read_bytes()
    if len(raw) < ARTIFACT_HEADER.size or not raw.startswith(ARTIFACT_MAGIC):
        raise ValueError(f"{path}: not an artifact of this program (no {ARTIFACT_MAGIC!r} at its start)")
    _, size, body_size, digest = ARTIFACT_HEADER.unpack_from(raw)
    data = raw[ARTIFACT_HEADER.size :]
    if len(data) != size or hashlib.sha256(data).digest() != digest or body_size > MAX_BODY_BYTES:
        raise ValueError(f"{path}: damaged: {len(data)} bytes of data, expected {size} with their sha256")
    try:
        body = brotli.Decompressor().process(data, output_buffer_limit=body_size + 1)
        end = 4 + struct.unpack_from("<I", body)[0]
        head = json.loads(body[4:end])
        hp = Hyperparameters(**head["config"])
        hp.validate()
        with torch.device("meta"):  # nothing is allocated before the description is known to fit the file
            table = tensor_table(GPT(hp))
        ints = [math.prod(shape) for _, shape, is_int in table if is_int]
        halves = [shape[0] if is_int else math.prod(shape) for _, shape, is_int in table]
        size_of_body = end + sum(ints) + 2 * sum(halves)
        if head != dict(config=head["config"], tensors=table) or not len(body) == body_size == size_of_body:
            raise ValueError("its tensors are not those of the model it describes")
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError, struct.error, brotli.error) as error:
        raise ValueError(f"{path}: damaged: {error}") from None
    model = GPT(hp)
    q = iter(torch.frombuffer(bytearray(body[end : end + sum(ints)]), dtype=torch.int8).split(ints))
    h = iter(torch.frombuffer(bytearray(body[end + sum(ints) :]), dtype=torch.float16).split(halves))
    with torch.no_grad():
        for (_, shape, is_int), p in zip(table, model.parameters(), strict=True):
            p.copy_(dequantize(next(q).view(shape), next(h)) if is_int else next(h).view(shape))
    return model.to(device), hp

# --- 10. Evaluation --------------------------------------------------------------------------------------------------

def readings(tokens: Tensor, hp: Hyperparameters, stride: int) -> list[list[tuple[int, int, int]]]:
    """(start, end, first) of windows of EVAL_SEQ_LEN, or without a stride of the chunks of each document: tokens start
    to end-1 are read and their targets from first on scored, each once in all. Target i is token i+1."""
    n, T, chunk = len(tokens) - 1, hp.eval_seq_len, hp.eval_chunk
    if stride:
        ends = [*range(min(T, n), n, stride), n]
        return [[(max(0, end - T), end, first)] for first, end in itertools.pairwise([0, *ends])]
    documents = itertools.pairwise([0, *(1 + (tokens[1:n] == BOS_ID).nonzero().flatten()).tolist(), n])
    return [[(i, min(i + chunk, end), i) for i in range(start, end, chunk)] for start, end in documents]

def reading_plan(tokens: Tensor, hp: Hyperparameters, stride: int, segment: int) -> list[tuple[Tensor, int]]:
    """The reading of each row of this rank in each step, or (0, 0, 0): [steps, rows, 3], and where its targets end; for
    what begins in the same `segment` targets. A document goes to the row, of all ranks, that has least to read."""
    plans, length = [], min(hp.eval_seq_len if stride else hp.eval_chunk, len(tokens) - 1)
    for _, group in itertools.groupby(readings(tokens, hp, stride), lambda parts: parts[0][2] // segment):
        rows = [[] for _ in range(WORLD_SIZE * (max(1, hp.val_batch_size // length) if stride else hp.eval_rows))]
        for i, parts in enumerate(group):
            (rows[i % len(rows)] if stride else min(rows, key=len)).extend(parts)
        steps = torch.tensor([*itertools.zip_longest(*rows, fillvalue=(0, 0, 0))], device=tokens.device)
        plans.append((steps.unflatten(1, (WORLD_SIZE, -1))[:, RANK], parts[-1][1]))
    return plans

def score(nats_of, tokens: Tensor, hp: Hyperparameters, stride: int, ttt: str = "") -> tuple[Tensor, Tensor]:
    """-ln p of every target tokens[1:], float64 [N-1], and how often each was scored, int32 [N-1]; for all ranks.
    nats_of: of `scorer`. tokens: int64 [N] on DEVICE. stride: 0 = a stream of documents. ttt: see Learner."""
    nats = torch.zeros(len(tokens) - 1, dtype=torch.float64, device=tokens.device)
    count = torch.zeros(len(tokens) - 1, dtype=torch.int32, device=tokens.device)
    segment = hp.ttt_chunk_tokens if ttt == "sgd" else -(-len(nats) // (hp.ttt_phases + 1 if ttt else 1))
    plans = reading_plan(tokens, hp, stride, segment)
    places = torch.arange(min(hp.eval_seq_len if stride else hp.eval_chunk, len(nats)), device=tokens.device)
    learner = Learner(nats_of, tokens, hp, ttt, plans, count) if ttt else None
    for plan, end in plans:
        memory = [] if stride else [nats_of.model.new_memory(plan.shape[1])]
        for step in plan:
            index = step[:, :1] + places
            scored, here = (index >= step[:, 2:]) & (index < step[:, 1:2]), index.clamp(max=len(nats) - 1)
            with torch.set_grad_enabled(ttt == "lora"):
                out = nats_of(tokens[here], tokens[here + 1], *memory)
            nats[index[scored]] = out.detach()[scored].double()
            count.index_add_(0, index[scored], torch.ones_like(index[scored], dtype=torch.int32))
            if learner:
                learner.learn(step, out, scored)
        if learner:
            learner.end_segment(end)
    all_reduce(nats)  # every target is zero on all ranks but one: the sum is exact
    if not nats.isfinite().all():
        raise FloatingPointError(f"{(~nats.isfinite()).sum()} of {len(nats)} validation scores are not finite")
    return nats, all_reduce(count)

class Validation:
    """The validation split: its tokens, the bytes of its targets, and bits per byte from their nats."""
    def __init__(self, hp: Hyperparameters):
        stream = TokenStream(hp.data_path, "val", hp.vocab_size)
        if len(stream) < 2:
            raise ValueError(f"{stream.paths[0]}: {len(stream)} tokens, expected at least 2")
        self.paths, self.tokens = stream.paths, stream.read(0, len(stream)).to(DEVICE)
        self.documents = documents(self.tokens.cpu().numpy())
        sp = spm.SentencePieceProcessor(model_file=hp.tokenizer_path)
        luts = build_sentencepiece_luts(sp, hp.vocab_size, DEVICE)
        self.target_bytes = token_bytes(luts, self.tokens[:-1], self.tokens[1:])
        sidecar = sorted(Path(hp.data_path).glob("fineweb_val_bytes_*.bin"))  # bytes of each token's original text
        if bool(sidecar) != (sp.id_to_piece(4) == "\ue001"):
            raise ValueError(f"DATA_PATH={hp.data_path}: {len(sidecar)} files fineweb_val_bytes_*.bin, expected some "
                             "if and only if the tokenizer has the operators of CaseOps")
        if sidecar:
            self.target_bytes = torch.cat([load_data_shard(path).int() for path in sidecar]).to(DEVICE)[1:]
            if len(self.target_bytes) != len(self.tokens) - 1:
                raise ValueError(f"{sidecar[0]}: {len(self.target_bytes) + 1} entries, {len(self.tokens)} tokens")
        texts = sp.decode([document.tolist() for document in self.documents])
        self.text_bytes = np.array([len((decode_case(text) if sidecar else text).encode()) for text in texts])
        self.bytes = self.target_bytes.sum(dtype=torch.int64).item()
        self.is_official = len(self.documents) == 50_000 and 151_020_000 <= self.bytes <= 151_090_000  # any tokenizer

# --- 11. Test-time training ------------------------------------------------------------------------------------------

class Learner:
    """Learns from what `score` has scored, by the same forward; afterwards the weights are as they were. sgd (#1734):
    weights but for the first blocks', after a segment, by chunks of TTT_CHUNK_TOKENS. lora (#1787): adapters of a row,
    after a step; A stays warm, B is zero again where a document begins. Either also in phases: SGD on all chunks scored
    so far. Nothing is learned when EVAL_SECONDS would not suffice."""
    def __init__(self, nats_of, tokens: Tensor, hp: Hyperparameters, ttt: str, plans: list, count: Tensor):
        self.nats_of, self.tokens, self.hp, self.ttt, self.count = nats_of, tokens, hp, ttt, count
        self.model, self.saved = nats_of.model, copy.deepcopy(nats_of.model.state_dict())
        self.start, self.steps = time.perf_counter(), sum(len(plan) for plan, _ in plans)
        self.done, self.scored, self.updates, self.longest, self.adapters = 0, 0, 0, 0.0, {}
        frozen = tuple(f"blocks.{i}." for i in range(hp.ttt_freeze_blocks))
        self.weights = [p for name, p in self.model.named_parameters() if not name.startswith(frozen)]
        self.sgd = torch.optim.SGD(self.weights, momentum=0.9)
        rows, r, generator = plans[0][0].shape[1], hp.ttt_lora_rank, torch.Generator(DEVICE).manual_seed(hp.seed)
        for linear in (module for module in self.model.modules() if ttt == "lora" and isinstance(module, Linear)):
            n_out, n_in = linear.weight.shape
            A, B = (torch.zeros(rows, *shape, device=DEVICE) for shape in ((r, n_in), (n_out, r)))
            A.uniform_(-(n_in**-0.5), n_in**-0.5, generator=generator)
            self.adapters[linear] = A.requires_grad_(), B.requires_grad_(), hp.ttt_lora_alpha / r
        self.adamw = torch.optim.AdamW([p for A, B, _ in self.adapters.values() for p in (A, B)] or self.weights,
                                       hp.ttt_lora_lr, betas=(0.0, 0.99), eps=1e-10, weight_decay=hp.ttt_lora_wd)
        self.attach(ttt == "lora")

    def attach(self, adapters: bool) -> None:  # either the adapters take part and learn, or the weights learn
        self.model.requires_grad_(not adapters)
        for linear, lora in self.adapters.items():
            linear.lora = lora if adapters else None

    def in_time(self) -> bool:
        """Is the slowest rank, with one update more, ahead of a pace that would score all in EVAL_SECONDS?"""
        self.now = time.perf_counter()
        spent = torch.tensor(self.now - self.start + self.longest, dtype=torch.double, device=DEVICE)
        pace = 0.95 * (self.hp.eval_seconds or math.inf) * self.done / self.steps
        return all_reduce(spent, dist.ReduceOp.MAX).item() <= pace

    def update(self, optimizer) -> None:
        optimizer.step()
        optimizer.zero_grad()
        self.updates, self.longest = self.updates + 1, max(self.longest, time.perf_counter() - self.now)

    @torch.enable_grad()
    def learn(self, step: Tensor, out: Tensor, scored: Tensor) -> None:
        """step: [rows, 3], what was read; out, scored: [rows, T], its nats and which of them count."""
        self.done += 1
        if self.adapters and self.in_time():
            ((out * scored).sum(1) / scored.sum(1).clamp(min=1)).sum().backward()
            self.update(self.adamw)
        for _, B, _ in self.adapters.values():
            B.data.mul_((self.tokens[step[:, 1]] != BOS_ID)[:, None, None])

    @torch.enable_grad()
    def end_segment(self, end: int) -> None:
        """All targets before `end` are scored: SGD on the chunks of this segment, and of a phase that begins."""
        targets, T, phases = len(self.count), self.hp.train_seq_len, self.hp.ttt_phases + 1
        n = max(1, self.hp.ttt_chunk_tokens // (WORLD_SIZE * T)) * WORLD_SIZE * T
        spans = [(self.scored // n * n, targets, self.hp.ttt_epochs)] if self.ttt == "sgd" else []
        spans += [(0, end, 1)] if phases * end // targets > phases * self.scored // targets else []
        self.scored = end
        self.attach(False)
        for begin, horizon, epochs in spans if end < targets else ():
            for first, _ in itertools.product(range(begin, end - n + 1, n), range(epochs)):
                index = torch.arange(first, first + n, device=DEVICE)
                if all_reduce(self.count[index]).min() < 1:
                    raise RuntimeError(f"test-time training on targets {first} to {first + n - 1}: not all are scored")
                if self.in_time():
                    rows = index.view(WORLD_SIZE, -1, T)[RANK]
                    accumulate(self.model, self.nats_of, [(self.tokens[rows], self.tokens[rows + 1])], T)
                    reduce_gradients(self.weights, 1.0)
                    self.sgd.param_groups[0]["lr"] = self.hp.ttt_lr * (1 + math.cos(math.pi * first / horizon)) / 2
                    self.update(self.sgd)
        self.adamw.state.clear()  # rows that had nothing more to read forgot the size of their gradients
        self.attach(self.ttt == "lora" and end < targets)
        if end == targets:
            self.model.load_state_dict(self.saved)
            log.info(f"ttt_{self.ttt} targets:{targets} steps:{self.steps} updates:{self.updates}")

# --- 12. Audit -------------------------------------------------------------------------------------------------------

class Audit:
    """Named checks with their figures; `at`: seconds since the process began. A failed one: no submission.json."""
    def __init__(self):
        self.checks, self.start = {}, time.perf_counter()

    def check(self, name: str, passed, **figures) -> None:
        """One log line. What fails on one rank fails on all."""
        passed = all_reduce(torch.tensor(int(passed), device=DEVICE), dist.ReduceOp.MIN).item() == 1
        figures["at"] = round(time.perf_counter() - self.start, 3)
        self.checks[name] = dict(passed=passed, **figures)
        log.info(f"audit: {name} {'passed' if passed else 'FAILED'} {json.dumps(figures)}")

    def verdict(self) -> None:
        """Raises: RuntimeError naming the checks that failed."""
        if failed := [name for name, check in self.checks.items() if not check["passed"]]:
            raise RuntimeError(f"audit failed: {', '.join(failed)}; submission.json was not written")

def audit_data(audit: Audit, hp: Hyperparameters, validation: Validation, stream: TokenStream | None) -> None:
    """Bytes of each validation document against its decoded text; whole validation documents in the training shards."""
    on_disk = {split: sorted(Path(hp.data_path).glob(f"fineweb_{split}_[0-9]*.bin")) for split in ("train", "val")}
    text = b"".join(path.read_bytes()[HEADER_BYTES:] for path in on_disk["val"])
    tokens = validation.tokens.cpu().numpy()
    audit.check("text", text == tokens.astype("<u2").tobytes(), sha256=hashlib.sha256(text).hexdigest())
    per_token = F.pad(validation.target_bytes, (1, 0)).cpu().numpy()
    counted, decoded = np.add.reduceat(per_token, np.flatnonzero(tokens == BOS_ID)), validation.text_bytes
    wrong, total = int((counted != decoded).sum()), int(decoded.sum())
    official = len(decoded) == 50_000 and "fineweb" in hp.data_path
    audit.check("bytes", wrong == 0 and total == validation.bytes and (validation.is_official or not official),
                table=validation.bytes, decoded=total, documents=len(decoded), wrong_documents=wrong)
    if not stream:
        return
    known = {document.astype(np.uint16).tobytes(): i for i, document in enumerate(validation.documents)}
    repeated = torch.zeros(len(validation.documents), dtype=torch.int32, device=DEVICE)
    for shard in stream.shards[RANK::WORLD_SIZE]:
        found = known.keys() & {document.tobytes() for document in documents(shard.numpy())}
        repeated[[known[document] for document in found]] = 1
    repeated = all_reduce(repeated, dist.ReduceOp.MAX).sum().item()
    complete = 2 * len(stream) == sum(path.stat().st_size - HEADER_BYTES for path in on_disk["train"])
    # FineWeb repeats pages; the leaks that were found held 80 % of the validation documents
    audit.check("data", repeated <= 0.05 * len(decoded) and complete, shards=len(stream.shards),
                tokens=len(stream), validation_documents_in_training=repeated)

def fingerprint(model: nn.Module) -> str:  # of all weights, bit for bit
    return hashlib.sha256(b"".join(p.detach().cpu().numpy().tobytes() for p in model.parameters())).hexdigest()[:16]

@torch.no_grad()
def probe(audit: Audit, hp: Hyperparameters, tokens: Tensor, model: GPT, nats_of, nats: Tensor, stride: int) -> None:
    """The pass by which `nats_of` gave the validation `tokens` their `nats`, against the artifact's `model` and on
    rewritten text: scores depend on artifact and earlier tokens of the document only, and form a distribution."""
    T, V, exact, bos = hp.eval_seq_len, hp.vocab_size, DEVICE.type == "cpu", torch.full((1,), BOS_ID, device=DEVICE)
    chunks = 1 if hp.ttt else max(1, min(T, model.hp.eval_seq_len) // hp.eval_chunk)  # before anything is learned
    plan = [(parts[0][0], parts[:chunks][-1][1], parts[0][2]) for parts in readings(tokens, hp, stride)]
    plan = [part for part in plan if part[1] <= hp.ttt_chunk_tokens or not hp.ttt] or plan[:1]
    again = [(token_nats(model, tokens[None, start:end], tokens[None, start + 1 : end + 1])[0, first - start :]
              - nats[first:end]).double() for start, end, first in plan[:: -(-len(plan) // 5)]]
    moved = torch.cat(again).mean().abs().item()
    audit.check("reproduced", moved <= (1e-5 if exact else 1e-2), windows=len(again), mean_nats_moved_by=moved)

    step = stride or hp.eval_chunk
    n = (zone := T + 3 * step) + 1 + (3 * hp.ttt_chunk_tokens if hp.ttt == "sgd" or hp.ttt_phases else 0)
    text = tokens.repeat(-(-n // len(tokens)))[:n]
    text[:zone][text[:zone] == BOS_ID] = 2  # a document that began before: a BOS would wipe out a state that leaks
    text[zone :: max(8, hp.ttt_chunk_tokens // 16)] = BOS_ID  # then segments of documents, and SGD between them
    other = torch.where(text > 2, text - 1, V - 1)
    path = functools.partial(score, nats_of, hp=replace(hp, eval_seconds=0.0, eval_rows=1), stride=stride)
    cuts = sorted({min(48, T), T + step // 2 + 1, n * 3 // 4})  # in the first window, in a later one, far on
    before, *after = (path(torch.cat((text[:k], other[k:])), ttt=hp.ttt)[0] for k in (n, *cuts))
    moved = max((rewritten - before)[: k - 1].abs().max().item() for k, rewritten in zip(cuts, after, strict=True))
    audit.check("causality", moved == 0, rewritten_from=cuts, earlier_scores_moved_by=moved)

    n = min(T, 40 if exact else 80)  # across a border between chunks
    rows = text[:n].repeat(n + 1, 1)
    rows[1:].diagonal().copy_(other[:n])
    logits = model(rows)
    moved = (logits[1:] - logits[:1]).abs().amax(-1).tril(-1).max().item()  # row i has another token i
    audit.check("target", moved <= (1e-4 if exact else 0.1), targets=n, distribution_before_it_moved_by=moved)

    border = WORLD_SIZE * (size := min(T // (4 * WORLD_SIZE) + 5, T))  # one document of every row of every rank
    text[::size] = other[::size] = BOS_ID  # all end within chunks
    one, two = (path(torch.cat((first[:border], text[border:])))[0] for first in (text, other))
    moved = (one - two)[border:].abs().mean().item()
    audit.check("isolation", moved <= (0 if exact else 0.02), next_document_moved_by=moved)  # fla's sums are rounded

    n = min(T, 8) if exact else T  # on CUDA the shape of the final pass, already compiled
    x = torch.cat((bos, text))[:n].repeat(max(1, hp.val_batch_size // n), 1)
    ids = torch.arange(V, device=DEVICE).split(len(x))
    nats = [nats_of(x, F.pad(part, (0, len(x) - len(part)))[:, None].repeat(1, n))[: len(part)] for part in ids]
    total = torch.logsumexp(-torch.cat(nats).double(), 0).abs().max().item()
    audit.check("normalisation", total <= (1e-4 if exact else 1e-2), positions=n, log_of_summed_probabilities=total)

# --- 13. Training ----------------------------------------------------------------------------------------------------

def train_budget(hp: Hyperparameters) -> float:
    """Seconds for optimizer steps; what is left of MAX_WALLCLOCK_SECONDS is for the Hessians."""
    return hp.max_wallclock_seconds - hp.gptq_reserve_seconds if hp.max_wallclock_seconds > 0 else math.inf

def training_progress(hp: Hyperparameters, step: int, seconds: float) -> float:  # all schedules are functions of it
    return min(1.0, max(step / hp.iterations, seconds / train_budget(hp)))

def lr_multiplier(hp: Hyperparameters, progress: float) -> float:
    """1, then linear to 0 over the last WARMDOWN_FRAC, but not below MIN_LR."""
    return min(1.0, max((1.0 - progress) / max(hp.warmdown_frac, 1e-9), hp.min_lr))

def muon_momentum(hp: Hyperparameters, progress: float) -> float:
    ramp = min(1.0, progress / hp.muon_momentum_warmup_frac) if hp.muon_momentum_warmup_frac else 1.0
    return hp.muon_momentum_warmup_start + ramp * (hp.muon_momentum - hp.muon_momentum_warmup_start)

def scorer(model: GPT):
    """(x, y, memory) -> nats [B, T]; the one compiled function of training and scoring on CUDA, eager on a CPU."""
    nats_of = functools.partial(token_nats, model)
    nats_of = torch.compile(nats_of, fullgraph=True, dynamic=False) if DEVICE.type == "cuda" else nats_of
    nats_of.model = model
    return nats_of

def timing_of(step: int, seconds: float) -> str:
    return f"train_time:{1000 * seconds:.0f}ms step_avg:{1000 * seconds / max(step, 1):.2f}ms"

def validate(hp: Hyperparameters, nats_of, validation: Validation, label: str, *how, timing="") -> dict:
    """Scores and logs `label val_loss:.. val_bpb:..`; how: stride and ttt of `score`, or windows do not overlap."""
    start = time.perf_counter()
    nats, count = score(nats_of, validation.tokens, hp, *(how or (hp.eval_seq_len,)))
    total = nats.sum().item()
    loss, bpb, seconds = total / len(nats), total / math.log(2) / validation.bytes, time.perf_counter() - start
    log.info(f"{label} val_loss:{loss:.4f} val_bpb:{bpb:.4f} {timing or f'eval_time:{1000 * seconds:.0f}ms'}")
    return dict(val_loss=loss, val_bpb=bpb, seconds=seconds, nats=nats, count=count)

def accumulate(model: GPT, nats_of, batch: list[tuple[Tensor, Tensor]], chunk: int) -> Tensor:
    """Adds the gradients of all micro-batches, each in passes over `chunk` tokens: memory is carried from one to the
    next, gradients are not. Returns the mean loss."""
    loss = torch.zeros((), device=DEVICE)
    for x, y in batch:
        memory = [model.new_memory(len(x))] if chunk < x.shape[1] else []
        for part in zip(x.split(chunk, 1), y.split(chunk, 1), strict=True):
            part_loss = nats_of(*part, *memory).sum() / (y.numel() * len(batch))
            part_loss.backward()
            loss += part_loss.detach()
    return loss

def warm_up(hp: Hyperparameters, model: GPT, nats_of) -> None:
    """Compiles every kernel and graph on random tokens, outside the clock, then puts the weights back."""
    saved = copy.deepcopy(model.state_dict())
    optimizer = Muon(model, hp)  # thrown away, with its state
    shape = (hp.train_batch_tokens // (grad_accum_steps(hp) * WORLD_SIZE * hp.train_seq_len), hp.train_seq_len)
    orders = model.orders if hp.enable_looping_at else model.orders[1:]
    for model.order, (_, micro_steps, chunk) in itertools.product(orders, stages(hp)):
        for step in range(1, hp.warmup_steps + 1):
            ids = torch.randint(hp.vocab_size, (micro_steps, 2, *shape), device=DEVICE)
            accumulate(model, nats_of, [(x, y) for x, y in ids], chunk)
            optimizer.step(1.0, hp.muon_momentum)
            log.info(f"warmup_step:{step}/{hp.warmup_steps} passes:{len(model.order)} chunk:{chunk}")
    collect_hessians(model, [(torch.randint(hp.vocab_size, shape, device=DEVICE), None)])
    model.load_state_dict(saved)

def train(hp: Hyperparameters, model: GPT, stream: TokenStream, validation: Validation, audit: Audit) -> dict:
    """Trains inside the budget, leaves the averaged weights in the model and returns the Hessians and the figures.
    Raises: FloatingPointError when the loss is not finite, before anything is written."""
    log.info(f"train_loader:dataset:{os.path.basename(os.path.normpath(hp.data_path))} "
             f"train_shards:{len(stream.paths)} tokens:{len(stream)} grad_accum_steps:{grad_accum_steps(hp)}")
    nats_of = scorer(model)
    untrained = fingerprint(model)
    warm_up(hp, model, nats_of)
    audit.check("warm_up", fingerprint(model) == untrained, weights=untrained)
    optimizer, params = Muon(model, hp), [p.detach() for p in model.parameters()]
    average = [p.clone() for p in params]  # exponential moving average of the weights, float32
    step, seconds, tokens = 0, 0.0, 0
    log.info(f"gptq:reserving {hp.gptq_reserve_seconds:g}s, effective={1000 * train_budget(hp):.0f}ms")
    recent = collections.deque(maxlen=10)  # seconds of the last steps: the next one must fit into the budget
    start = time.perf_counter()  # moved forward by what does not count; every step ends in sync with the GPU
    loader, plan = TrainLoader(stream, hp), stages(hp)
    while True:
        # all ranks follow the slowest one's clock, or they would stop, and anneal, at different steps
        times = torch.tensor([time.perf_counter() - start, max(recent, default=0.0)], dtype=torch.double, device=DEVICE)
        seconds, longest = all_reduce(times, dist.ReduceOp.MAX).tolist()
        progress = training_progress(hp, step, seconds)
        out_of_time = seconds + longest > train_budget(hp)
        last = step >= hp.iterations or out_of_time
        if last or (hp.val_loss_every and step % hp.val_loss_every == 0):
            paused = time.perf_counter()
            raw = validate(hp, nats_of, validation, f"step:{step}/{hp.iterations}", timing=timing_of(step, seconds))
            start += time.perf_counter() - paused
        if last:
            break

        before, model.order = model.order, model.orders[progress >= hp.enable_looping_at]
        if len(model.order) > len(before):
            log.info(f"layer_loop:enabled step:{step} frac:{progress:.3f} passes:{model.order}")
        _, micro_steps, chunk = max(stage for stage in plan if stage[0] <= progress)
        loss = accumulate(model, nats_of, [loader.next() for _ in range(micro_steps)], chunk)
        tokens += micro_steps * WORLD_SIZE * loader.span
        grad_norm = optimizer.step(lr_multiplier(hp, progress), muon_momentum(hp, progress))
        decay = min(hp.ema_decay, (1 + step) / (10 + step)) if progress >= hp.ema_start else 0.0  # forgets the start
        torch._foreach_lerp_(average, params, 1 - decay)
        step += 1

        loss = all_reduce(loss).item() / WORLD_SIZE
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            raise FloatingPointError(f"step {step}: train_loss {loss}, gradient norm {grad_norm:g}; nothing was saved")
        now = time.perf_counter() - start
        recent.append(now - seconds)
        if step <= 10 or step % hp.train_log_every == 0:
            log.info(f"step:{step}/{hp.iterations} train_loss:{loss:.4f} {timing_of(step, now)}")

    if out_of_time:
        log.info(f"stopping_early: wallclock_cap train_time:{1000 * seconds:.0f}ms step:{step}/{hp.iterations}")
    raw_weights, looped, model.order = [p.clone() for p in params], model.order == model.orders[1], model.orders[1]
    torch._foreach_copy_(params, average)
    batches = [loader.next() for _ in range(hp.gptq_calibration_batches * grad_accum_steps(hp))]
    loader.close()  # from here on there is no training data
    hessians = collect_hessians(model, batches)
    hessians = loop_aware_hessians(model, hp, hessians, batches) if hp.gptq_phases == 2 else hessians
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        log.info(f"peak memory allocated: {torch.cuda.max_memory_allocated() >> 20} MiB "
                 f"reserved: {torch.cuda.max_memory_reserved() >> 20} MiB")
    total, last_read = round(time.perf_counter() - start, 3), round(loader.last_read - start, 3)
    log.info(f"train+hessians:{1000 * total:.0f}ms last_read:{1000 * last_read:.0f}ms")
    tokens += hp.gptq_calibration_batches * hp.train_batch_tokens
    lr, due = optimizer.lr_multiplier, progress - 1 / max(step, 1)  # what begins later may have had no step
    audit.check("schedule", lr <= lr_multiplier(hp, 1 - 2 / max(step, 1)) + 0.05 and tokens == loader.position and
                (looped or hp.enable_looping_at > due), lr_multiplier_at_stop=lr, looped=looped,
                tokens_read=loader.position, of_them_needed=tokens)
    distance = torch.stack(torch._foreach_norm(torch._foreach_sub(params, raw_weights))).norm().item()
    audit.check("ema", (distance > 0) == (hp.ema_decay > 0) or hp.ema_start > due, distance=distance)
    dead = len(params) - optimizer.reached()
    audit.check("gradients", dead == 0 or step < 2, parameters=len(params), never_reached=dead)
    return dict(hessians=hessians, step_stop=step, wallclock_seconds=total, last_read_seconds=last_read,
                raw_val_bpb=raw["val_bpb"])

# --- 14. Main --------------------------------------------------------------------------------------------------------

def pack(hp: Hyperparameters, model: GPT, validation: Validation, hessians: dict, audit: Audit) -> dict:
    """Quantizes the averaged weights with GPTQ and writes the artifact; then scores them as they were before."""
    quantized, nearest = quantize(model, hp, hessians), quantize(model, hp)
    if RANK == 0:
        save_artifact(hp.artifact, model, hp, quantized)  # before the next check, where ranks wait for each other
    ours, rounding = (output_errors(model, q, hessians) for q in (quantized, nearest))
    # the n-gram table's Hessian may be the identity, for which GPTQ is rounding
    no_better = [name for name in ours if ours[name] >= rounding[name] and name != "ngram.table"]
    audit.check("gptq", ours.keys() == quantized.keys() and not no_better, tensors=len(quantized), hessians=len(ours),
                no_better=no_better, output_error_over_rounding=sum(ours.values()) / sum(rounding.values()))
    ema = validate(hp, scorer(model), validation, "diagnostic pre-quantization post-ema")
    shipped = fingerprint(dequantized(model, quantized)) if RANK == 0 else None  # another rank's may differ in a bit
    return dict(pre_quant_val_bpb=ema["val_bpb"], shipped=shipped)

def audit_limits(audit: Audit, hp: Hyperparameters, figures: dict) -> dict:
    """Bytes on disk and seconds against what is allowed. Returns the sizes."""
    label, code, model = f"int{hp.matrix_bits}+brotli", os.path.getsize(__file__), os.path.getsize(hp.artifact)
    log.info(f"Serialized model {label}: {model} bytes\nTotal submission size {label}: {code + model} bytes")
    sizes = dict(bytes_code=code, bytes_model=model, bytes_total=code + model)
    audit.check("size", code + model <= SIZE_LIMIT, **sizes, head_room=SIZE_LIMIT - code - model)
    training, evaluation = figures.get("wallclock_seconds", 0), figures["eval_time_seconds"]
    used = (training, hp.max_wallclock_seconds), (evaluation, hp.eval_seconds)
    audit.check("time", all(seconds <= budget or budget == 0 for seconds, budget in used), training_of=used[0],
                evaluation_of=used[1], last_read=figures.get("last_read_seconds"))
    return sizes

def evaluate(hp: Hyperparameters, validation: Validation, audit: Audit, shipped: str | None = None) -> dict:
    """Scores the artifact as it lies on disk. shipped: fingerprint of the weights that this run packed, if it did."""
    model, saved = load_artifact(hp.artifact, DEVICE)
    nats_of, weights = scorer(model), fingerprint(model)
    mode, stride = ("sliding_window", hp.eval_stride) if hp.eval_mode == "sliding" else ("stream", 0)
    label = f"final_int{saved.matrix_bits}_{mode}" + (f"_ttt_{hp.ttt}" if hp.ttt else "")
    length = 2 + (2 * hp.ttt_chunk_tokens if hp.ttt == "sgd" or hp.ttt_phases else hp.eval_seq_len)
    noise = torch.randint(hp.vocab_size, (length,), device=DEVICE)
    score(nats_of, noise, replace(hp, eval_seconds=0.0), stride, hp.ttt)  # compiles outside the clock
    validate(hp, nats_of, validation, f"final_int{saved.matrix_bits}_roundtrip")
    final = validate(hp, nats_of, validation, label, stride, hp.ttt)
    log.info(f"{label}_exact val_loss:{final['val_loss']:.8f} val_bpb:{final['val_bpb']:.8f}")
    if hp.scores and RANK == 0:
        np.savez(hp.scores, nats=final["nats"].cpu().numpy(), bytes=validation.target_bytes.cpu().numpy(),
                 position=np.arange(1, len(validation.tokens)))
    count, expected = final["count"], sum(path.stat().st_size - HEADER_BYTES for path in validation.paths) // 2 - 1
    audit.check("once", len(count) == expected and (count == 1).all(), targets=expected, scored=count.sum().item())
    fresh, after = load_artifact(hp.artifact, DEVICE)[0], fingerprint(model)
    audit.check("ledger", weights == after == fingerprint(fresh) and shipped in (None, weights), artifact=weights,
                packed=shipped, after_the_pass=after)
    implied = final["val_loss"] / math.log(2) * expected / final["val_bpb"]
    audit.check("identity", abs(implied - validation.text_bytes.sum()) < 1, implied_bytes=implied)
    probe(audit, hp, validation.tokens, fresh, nats_of, final["nats"], stride)
    return dict(val_bpb=final["val_bpb"], val_loss=final["val_loss"], eval_time_seconds=round(final["seconds"], 3))

def write_submission(hp: Hyperparameters, validation: Validation, figures: dict, audit: Audit) -> None:
    """submission.json: scores of the official validation split, within 600 s, at the top; any other in `own_text`."""
    scores = {name: figures.pop(name) for name in "val_bpb val_loss raw_val_bpb pre_quant_val_bpb".split()}
    own_text = dict(data_path=hp.data_path, documents=len(validation.documents), bytes=validation.bytes, **scores)
    in_time = max(figures["wallclock_seconds"], figures["eval_time_seconds"]) <= 600
    compliance = dict(within_600_seconds_each=in_time, full_validation_split=validation.is_official)
    official = all(compliance.values())
    submission = dict(
        author=hp.author or None, github_id=hp.github_id or None, name=f"{hp.preset}: {hp.layout}",
        date=time.strftime("%Y-%m-%d", time.gmtime()), track="10min_16mb", preset=hp.preset, run_id=hp.run_id,
        seed=hp.seed, hardware=f"{WORLD_SIZE}x{torch.cuda.get_device_name() if DEVICE.type == 'cuda' else 'CPU'}",
        pytorch_version=torch.__version__, **(scores if official else dict.fromkeys(scores)),
        own_text=None if official else own_text, **figures,
        compliance=compliance | {name: check["passed"] for name, check in audit.checks.items()})
    Path("submission.json").write_text(json.dumps(submission, indent=2) + "\n")

def main() -> None:
    audit, hp = Audit(), Hyperparameters.from_env(os.environ)
    if DEVICE.type == "cuda":
        torch.cuda.set_device(DEVICE)
        torch._dynamo.config.recompile_limit = 64  # one graph each with memory, adapters, gradients, and for each shape
    if WORLD_SIZE > 1:
        dist.init_process_group("nccl" if DEVICE.type == "cuda" else "gloo")
    init_log(hp)
    torch.manual_seed(hp.seed)
    if hp.eval_only:
        model, saved = load_artifact(hp.artifact, DEVICE)
        hp, stream = Hyperparameters.from_env(os.environ, base=replace(saved, run_id=hp.run_id)), None
        names = [f.name for f in fields(hp)]
        for name in names[names.index("layout") : names.index("logit_softcap") + 1]:
            hp.require(name, getattr(hp, name) == getattr(saved, name), f"{getattr(saved, name)}, as the artifact says")
    else:
        stages(hp)  # refused before the data are read
        model, stream = GPT(hp).to(DEVICE), TokenStream(hp.data_path, "train", hp.vocab_size)
    validation, figures = Validation(hp), {}
    for name, value in asdict(hp).items():
        log.info(f"  {name}: {value}")
    log.info(f"val_bpb:enabled tokenizer_kind=sentencepiece tokenizer_path={hp.tokenizer_path}")
    log.info(f"val_loader:shards:{len(validation.paths)} tokens:{len(validation.target_bytes)} "
             f"documents:{len(validation.documents)} bytes:{validation.bytes} official:{validation.is_official}")
    log.info(f"model_params:{sum(p.numel() for p in model.parameters())}")
    audit_data(audit, hp, validation, stream)
    if stream:
        audit.verdict()  # before ten minutes are spent
        if RANK == 0:
            Path("submission.json").unlink(missing_ok=True)  # an earlier run's must not pass for this one's
        figures |= train(hp, model, stream, validation, audit)
        figures |= pack(hp, model, validation, figures.pop("hessians"), audit)
    figures |= evaluate(hp, validation, audit, figures.pop("shipped", None))
    figures |= audit_limits(audit, hp, figures)
    log.info(f"audit: {json.dumps(audit.checks)}")
    audit.verdict()
    if stream and RANK == 0:
        write_submission(hp, validation, figures, audit)
    if WORLD_SIZE > 1:
        dist.destroy_process_group()

if __name__ == "__main__":
    main()
