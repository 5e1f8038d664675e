"""Train, quantize, pack and score a Gated DeltaNet / sliding-window hybrid in 16 MB and 10 minutes.

    torchrun --standalone --nproc_per_node=8 train_gpt.py     # 8xH100, the real run
    PRESET=demo python train_gpt.py                           # a CPU, after data/prepare.py --demo
    EVAL_ONLY=1 ARTIFACT=final_model.int6.ptz python train_gpt.py  # score an artifact

Every hyperparameter is an environment variable. All that makes the score is here; what proves it
is in tools/, other systems are in systems/. Sections, in run order:
1. Hyperparameters; 2. Ranks and log; 3. Byte accounting; 4. Shards; 5. Kernels; 6. Model;
7. Optimizer; 8. GPTQ; 9. Packing; 10. Scoring; 11. Test-time training; 12. Training; 13. Main.
"""

import collections
import copy
import fcntl
import functools
import hashlib
import heapq
import itertools
import json
import logging
import math
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from operator import call
from pathlib import Path
from typing import NamedTuple

import brotli
import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from constriction import stream as coding
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

# --- 1. Hyperparameters ---
# what EVAL_ONLY may set: how an artifact is scored
SCORING = re.compile(r"run_id|seed|artifact|scores|(data|tokenizer)_path|(eval|ttt|val_batch).*")
SIZE_LIMIT = 16_000_000  # bytes, decimal: artifact and code
SAMPLE_TOKENS = 16_384  # scored for tools/verify.py

class Refused(SystemExit, ValueError):
    """Settings, files or a result that will not do: ends the program with a line for each."""

def each(work, items, ranks: int = 1) -> list:
    """What it returns for every item. Raises: Refused with all complaints, of all `ranks`."""
    results, complaints = [], []
    for item in items:
        try:
            results.append(work(item))
        except (Refused, OSError) as error:
            complaints += str(error).splitlines()
    told = [complaints] * ranks
    if ranks > 1:
        dist.all_gather_object(told, complaints)
    if any(told):
        raise Refused("\n".join(dict.fromkeys(sum(told, []))) if ranks < 2 or not world.rank else 1)
    return results

def bounded(default, low: float, high: float = math.inf):  # other bounds than 0 and infinity
    return field(default=default, metadata=dict(bounds=(low, high)))

@dataclass
class Hyperparameters:
    """One run, each field an environment variable. The defaults are the record's."""
    system = "record"  # systems/NAME.py sets it to NAME
    kinds = "GSA"  # of the blocks that a layout may have
    ttt_kinds = ("", "lora")

    preset: str = "record"  # the defaults, or presets/SYSTEM.PRESET.json
    run_id: str = field(default_factory=lambda: os.urandom(8).hex())  # the log is logs/<run_id>.txt
    seed: int = bounded(1337, 0, 10**18)
    artifact: str = "final_model.int6.ptz"  # written by training, read by EVAL_ONLY
    eval_only: bool = False
    scores: str = ""  # .npz path: nats, bytes, position of every target
    # data
    data_path: str = "./data/datasets/fineweb10B_sp8192"
    tokenizer_path: str = "./data/tokenizers/fineweb_8192_bpe.model"
    vocab_size: int = bounded(8192, 3, 65536)
    train_batch_tokens: int = bounded(786_432, 1)  # of an optimizer step, over all ranks
    train_seq_len: int = bounded(2048, 1)
    grad_accum_steps: int = 0  # micro-batches per step and rank; 0 = 8 // WORLD_SIZE
    # model
    layout: str = "G3 S G3 S G3 S"  # see block_kinds
    model_dim: int = bounded(512, 2)
    mlp_mult: float = bounded(4.0, 1)
    gdn_heads: int = bounded(4, 1)
    gdn_key_heads: int = bounded(2, 1)
    gdn_head_dim: int = bounded(64, 2)
    num_heads: int = bounded(8, 1)
    num_kv_heads: int = bounded(4, 1)
    head_dim: int = bounded(64, 2)
    window_size: int = bounded(512, 1)  # token t sees t - window_size + 1 .. t
    rope_dims: int = 16  # rotated dims of each head
    rope_base: float = bounded(10_000.0, 1)
    qk_gain_init: float = 5.0
    xsa: bool = True  # see Attention
    tied_embed_init_std: float = 0.005
    logit_softcap: float = bounded(30.0, 1)
    # optimizer
    matrix_lr: float = 0.022
    muon_momentum: float = bounded(0.97, 0, 1)
    muon_momentum_warmup_start: float = 0.92
    muon_momentum_warmup_frac: float = bounded(0.3, 0, 1)  # of the run
    muon_backend_steps: int = bounded(5, 1)
    muon_wd: float = 0.095
    tied_embed_lr: float = 0.03
    embed_wd: float = 0.085
    scalar_lr: float = 0.02
    beta1: float = bounded(0.9, 0, 1)
    beta2: float = bounded(0.95, 0, 1)
    adam_eps: float = 1e-8
    grad_clip_norm: float = 0.3  # 0 = off
    ema_decay: float = bounded(0.9965, 0, 1)  # of the average of the weights; 0 = off
    # schedule
    iterations: int = bounded(20_000, 1)  # the clock stops earlier
    max_wallclock_seconds: float = 600.0  # of training and its reads of data; 0 = off
    gptq_reserve_seconds: float = 8.0  # of these, kept for the Hessians
    warmdown_frac: float = bounded(0.75, 0, 1)  # of the run
    min_lr: float = bounded(0.1, 0, 1)  # floor of the learning-rate multiplier
    warmup_steps: int = 20  # untimed, on random tokens, then undone
    train_log_every: int = bounded(200, 1)
    val_loss_every: int = 0  # steps; 0 = only at the end
    # quantization and packing
    artifact_target_bytes: int = bounded(15_970_000, 0, SIZE_LIMIT)  # with the code
    rounding_step: float = bounded(0.02, 1e-6)  # see quantize, fit
    matrix_bits: int = bounded(6, 2, 8)
    embed_bits: int = bounded(7, 2, 8)
    gptq_calibration_batches: int = bounded(2, 1)  # of TRAIN_BATCH_TOKENS
    # evaluation
    eval_mode: str = "stream"  # documents with their cache carried; or "sliding" windows
    eval_chunk: int = bounded(64, 1)  # tokens of a document that are read at once
    eval_rows: int = bounded(64, 1)  # documents that a rank streams at once
    eval_seq_len: int = bounded(2048, 2)  # of windows; of what full attention keeps in a stream
    eval_stride: int = bounded(64, 1)
    val_batch_size: int = bounded(65_536, 1)  # tokens of windows in a forward of one rank
    eval_seconds: float = 600.0  # budget of the final pass; 0 = off
    # test-time training
    ttt: str = "lora"  # see LoraTTT; "": nothing is learned
    ttt_lora_lr: float = 0.0001
    ttt_lora_rank: int = bounded(80, 1)
    ttt_lora_alpha: float = 144.0
    ttt_lora_wd: float = 0.5

    @classmethod
    def from_env(cls, env, artifact=None) -> "Hyperparameters":
        """PRESET, or those of an artifact, then overrides; of an artifact only those of SCORING.
        Raises: Refused, for each the variable, what was found and what was expected."""
        hp, preset = copy.copy(artifact) or cls(), env.get("PRESET", "record")
        if preset != "record" and not artifact:
            file = Path(__file__).resolve().parent / "presets" / f"{cls.system}.{preset}.json"
            try:
                hp = cls(preset=preset, **json.loads(file.read_text()))
            except (OSError, TypeError, ValueError) as error:
                raise Refused(f"PRESET={preset!r}: no preset {file}: {error}") from None

        def override(f) -> None:
            name, text, before = f.name.upper(), env[f.name.upper()], getattr(hp, f.name)
            try:
                value = {"0": False, "1": True}[text] if f.type is bool else f.type(text)
            except (KeyError, ValueError):
                kind = "0 or 1" if f.type is bool else f.type.__name__
                raise Refused(f"{name}={text!r}: expected {kind}") from None
            if artifact and value != before and not SCORING.fullmatch(f.name):
                raise Refused(f"{name}={text!r}: expected {before!r}, as the artifact has it")
            setattr(hp, f.name, value)

        given = [f for f in fields(cls) if f.name != "preset" and f.name.upper() in env]
        each(call, (lambda: each(override, given), hp.validate))
        return hp

    def validate(self) -> None:
        """Raises: Refused naming the impossible fields."""
        each(self.check_bounds, fields(self))
        self.block_kinds()
        each(lambda rule: self.require(*rule), (
            ("num_kv_heads", self.num_heads % self.num_kv_heads == 0, "to divide NUM_HEADS"),
            ("gdn_key_heads", self.gdn_heads % self.gdn_key_heads == 0, "to divide GDN_HEADS"),
            ("rope_dims", self.rope_dims in range(0, self.head_dim + 1, 2), "even, up to HEAD_DIM"),
            ("gptq_reserve_seconds", self.train_seconds() > 0, "less than MAX_WALLCLOCK_SECONDS"),
            ("artifact", re.search(r"[^/](?<!\.npz)$", self.artifact), "a file, not in .npz"),
            ("scores", re.search(r"^$|(?<!\.sample)\.npz$", self.scores), "a name in .npz"),
            ("eval_mode", self.eval_mode in ("sliding", "stream"), "sliding or stream"),
            ("eval_stride", self.eval_stride <= self.eval_seq_len, "at most EVAL_SEQ_LEN"),
            ("ttt", self.ttt in self.ttt_kinds, f"one of {self.ttt_kinds}"),
            ("ttt", self.ttt != "lora" or self.eval_mode != "sliding", "no lora if sliding"),
        ))

    def check_bounds(self, f) -> None:
        value, (low, high) = getattr(self, f.name), f.metadata.get("bounds", (0, math.inf))
        is_type = isinstance(value, (int, float) if f.type is float else f.type)
        self.require(f.name, is_type, f.type.__name__)
        fits = f.type not in (int, float) or low <= value <= high and value < math.inf
        self.require(f.name, fits, f"{low:g} to {high:g}".replace("to inf", "or more"))

    def require(self, name: str, ok: bool, expected: str) -> None:
        if not ok:
            raise Refused(f"{name.upper()}={getattr(self, name)!r}: expected {expected}")

    def micro_steps(self) -> int:  # of a rank. Raises: Refused if a batch does not split evenly
        steps, T = self.grad_accum_steps or max(1, 8 // world.size), self.train_seq_len
        self.require("train_batch_tokens", self.train_batch_tokens % (steps * world.size * T) == 0,
                     f"a multiple of {steps} micro-batches x {world.size} ranks x {T} tokens")
        return steps
    def micro_rows(self) -> int:
        return self.train_batch_tokens // (self.micro_steps() * world.size * self.train_seq_len)

    def block_kinds(self) -> list[str]:
        """Of LAYOUT: G = Gated DeltaNet, S = sliding-window attention, A = full causal attention; a
        number repeats: 'G3 S' -> G, G, G, S. Raises: Refused."""
        form = f"([{self.kinds}])([1-9][0-9]?)?"
        found = [re.fullmatch(form, part) for part in self.layout.split()]
        self.require("layout", found and all(found), f"{self.kinds} with counts, such as G3 S")
        return [part[1] for part in found for _ in range(int(part[2] or 1))]

    # Schedules. Progress is the fraction of the run completed, by the clock or by steps.
    def train_seconds(self) -> float:
        return (self.max_wallclock_seconds or math.inf) - self.gptq_reserve_seconds
    def progress(self, step: int, seconds: float) -> float:
        return min(1.0, max(step / self.iterations, seconds / self.train_seconds()))
    def stage_starts(self) -> list[float]:  # where shapes or passes change
        return [0.0]
    def micro_steps_at(self, progress: float) -> int:
        return self.micro_steps()
    def lr_multiplier(self, progress: float) -> float:  # 1, then linear to 0, but not below MIN_LR
        return min(1.0, max((1.0 - progress) / max(self.warmdown_frac, 1e-9), self.min_lr))
    def momentum_at(self, progress: float) -> float:
        frac, start = self.muon_momentum_warmup_frac, self.muon_momentum_warmup_start
        ramp = min(1.0, progress / frac) if frac else 1.0
        return start + ramp * (self.muon_momentum - start)
    def ema_decay_at(self, progress: float, step: int) -> float:  # first steps are forgotten sooner
        return min(self.ema_decay, (1 + step) / (10 + step))

# --- 2. Ranks and log ---
class World:
    """The ranks of this run, this process among them, and where it computes."""
    def __init__(self, env):
        self.rank, self.size = int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1))
        cuda, local = torch.cuda.is_available(), int(env.get("LOCAL_RANK", 0))
        self.device = torch.device("cuda", local) if cuda else torch.device("cpu")
        self.dtype = torch.bfloat16 if cuda else torch.float32  # of activations
    on_cuda = property(lambda self: self.device.type == "cuda")
    def all_reduce(self, x: Tensor, op=dist.ReduceOp.SUM) -> Tensor:  # in place
        if self.size > 1:
            dist.all_reduce(x, op)
        return x
    def largest(self, *values: float) -> list[float]:  # of all ranks
        return self.all_reduce(torch.tensor(values, dtype=torch.double), dist.ReduceOp.MAX).tolist()

world = World(os.environ)
log = logging.getLogger("train_gpt")

def write_whole(path, write) -> None:
    """On rank 0 write(file), under another name: what has its name is complete."""
    if not world.rank:
        with open(f"{path}.tmp", "wb") as file:
            write(file)
        os.replace(f"{path}.tmp", path)

def claim_outputs(hp, model) -> list:
    """Tries where the run will write. While what it returns is open, no other run writes there."""
    sizes = [p.numel() for p in model.parameters() if not hp.eval_only]
    needed, held = SIZE_LIMIT + 32 * sum(sizes), []
    for path in {Path(hp.artifact), Path(hp.scores or hp.artifact)}:
        path.parent.mkdir(parents=True, exist_ok=True)
        magic = b"PK" if path.suffix == ".npz" else ARTIFACT_MAGIC[:2]
        if path.exists() and not (path.is_file() and path.open("rb").read(2) == magic):
            raise Refused(f"{path}: exists and is no artifact or score file: give another name")
        if (free := shutil.disk_usage(path.parent).free) < needed:
            raise Refused(f"{path}: {free} bytes are free there, {needed} are needed")
        held.append(open(path.with_name(f".{path.name}.lock"), "w"))
        try:
            fcntl.flock(held[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Refused(f"{path}: another run writes it: wait, or give another name") from None
    return held

def code_files() -> list[Path]:
    """What is counted besides the artifact: this file, and what is loaded from systems/."""
    here = Path(__file__).resolve()
    loaded = {Path(getattr(m, "__file__", None) or here).resolve() for m in sys.modules.values()}
    return [here, *sorted(path for path in loaded if path.parent == here.parent / "systems")]

def init_log(hp) -> None:
    """Rank 0 logs to stdout and appends code, versions, lines to logs/<run_id>.txt."""
    log.setLevel(logging.ERROR if world.rank else logging.INFO)
    log.propagate = False
    log.handlers = [logging.StreamHandler(sys.stdout)]
    if world.rank:
        return
    path = Path(f"logs/{hp.run_id}.txt")
    path.parent.mkdir(parents=True, exist_ok=True)
    versions = f"Running Python {sys.version}\nRunning PyTorch {torch.__version__}\n"
    if world.on_cuda and shutil.which("nvidia-smi"):
        versions += subprocess.run(["nvidia-smi"], capture_output=True, text=True).stdout
    parts = [*[""] * path.is_file(), *(file.read_text() for file in code_files()), versions, ""]
    path.open("a").write(f"\n{'=' * 100}\n".join(parts))
    log.addHandler(logging.FileHandler(path))
    log.info(f"{path} world_size:{world.size} device:{world.device.type} dtype:{world.dtype}")
    for name, value in dict(system=hp.system, **asdict(hp)).items():
        log.info(f"  {name}: {value}")

# --- 3. Byte accounting ---
BOS_ID = 1  # starts every document

def build_sentencepiece_luts(sp: spm.SentencePieceProcessor, vocab_size: int, device):
    """As the competition counts. Returns three tables over the pieces, [V]: bytes without a leading
    space, int32; whether a piece has one; whether it is a boundary.
    Control, unknown and unused pieces are 0 bytes and a boundary, byte-fallback pieces 1 byte, any
    other its UTF-8 length without its leading U+2581: `token_bytes` adds the space, nothing else.
    Raises: Refused for another size or BOS, and without a piece for U+2581 alone."""
    if sp.vocab_size() != vocab_size or sp.bos_id() != BOS_ID:
        found = f"{sp.vocab_size()} pieces, BOS {sp.bos_id()}"
        raise Refused(f"TOKENIZER_PATH: {found}; expected VOCAB_SIZE={vocab_size}, BOS {BOS_ID}")
    if sp.piece_to_id("\u2581") == sp.unk_id():
        raise Refused("TOKENIZER_PATH: no piece for U+2581 alone: a space would be 3 bytes")
    rows = []
    for i in range(vocab_size):
        piece = sp.id_to_piece(i)
        is_boundary = sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i)
        plain = not is_boundary and not sp.is_byte(i)
        base = len(piece.removeprefix("\u2581").encode()) if plain else int(not is_boundary)
        rows.append((base, plain and piece.startswith("\u2581"), is_boundary))
    base, space, boundary = torch.tensor(rows, dtype=torch.int32, device=device).T
    return base, space.bool(), boundary.bool()

def token_bytes(luts, prev_ids: Tensor, target_ids: Tensor) -> Tensor:
    """UTF-8 bytes of each target, int32: a leading space counts unless behind a boundary."""
    assert prev_ids.shape == target_ids.shape
    base_bytes, has_leading_space, is_boundary = luts
    return base_bytes[target_ids] + (has_leading_space[target_ids] & ~is_boundary[prev_ids])

# --- 4. Shards ---
HEADER_BYTES = 256 * 4
MAGIC_AND_VERSION = [20240520, 1]  # of the competition's shards

def load_data_shard(path) -> Tensor:
    """Memory-mapped, uint16 [count]. Raises: OSError, or Refused naming the file."""
    *start, count = [*np.fromfile(path, "<i4", 3).tolist(), 0, 0, 0][:3]
    size, expected = os.path.getsize(path), HEADER_BYTES + 2 * max(count, 1)
    if start != MAGIC_AND_VERSION:
        raise Refused(f"{path}: {size} bytes, starts with {start}, expected {MAGIC_AND_VERSION}")
    if size != expected or count < 1:
        raise Refused(f"{path}: {size} bytes, expected {expected} for its {count} tokens")
    tokens = np.memmap(path, dtype="<u2", mode="c", offset=HEADER_BYTES, shape=(count,))
    return torch.from_numpy(tokens)

class TokenStream:
    """All shards of a split as one ring of tokens, in the order of their names."""
    def __init__(self, data_path: str, split: str, vocab_size: int):
        self.paths = sorted(Path(data_path).glob(f"fineweb_{split}_[0-9]*.bin"))
        wanted = {f"fineweb_{split}_{i:06d}.bin" for i in range(max(1, len(self.paths)))}
        if missing := wanted - {path.name for path in self.paths}:
            raise Refused(f"DATA_PATH={data_path}: no file {min(missing)}: run data/prepare.py")
        self.shards, self.vocab_size = [load_data_shard(path) for path in self.paths], vocab_size
        self.starts = np.cumsum([0] + [len(shard) for shard in self.shards]).tolist()
        if (first := self.shards[0][0].item()) != BOS_ID:
            raise Refused(f"{self.paths[0]}: starts with token {first}, expected BOS={BOS_ID}")
    def __len__(self) -> int:
        return self.starts[-1]
    def read(self, start: int, count: int, dtype=np.int64) -> Tensor:
        """Tokens from `start` on, [count]. Raises: Refused for an id that is too large."""
        pieces = []
        while count > 0:
            start %= len(self)
            i = int(np.searchsorted(self.starts, start, side="right")) - 1
            piece = self.shards[i].numpy()[start - self.starts[i] :][:count]
            if (largest := piece.max()) >= self.vocab_size:
                raise Refused(f"{self.paths[i]}: token {largest}, not below VOCAB_SIZE")
            pieces.append(piece)
            start, count = start + len(piece), count - len(piece)
        return torch.from_numpy(np.concatenate(pieces).astype(dtype))
    def most_documents(self, span: int) -> int:
        """In the fullest `span` tokens. Reads the whole split, shared by the ranks."""
        piece = min(1 << 22, len(self))
        starts = range(world.rank * piece, len(self), world.size * piece)
        most = each(lambda start: count_documents(self.read(start, piece + span, np.uint16), span),
                    starts, world.size)
        return int(*world.largest(max(most, default=0)))

def count_documents(tokens: Tensor, span: int) -> int:  # in the fullest `span` tokens in a row
    begins = np.flatnonzero(tokens.cpu().numpy() == BOS_ID)
    return int((np.searchsorted(begins, begins + span) - np.arange(len(begins))).max(initial=0))
def digest(path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()

def described(hp) -> dict[Path, str]:
    """sha256 of shards and tokenizer, as data/prepare.py wrote them; {} if it did not."""
    file = Path(hp.data_path, "stats.json")
    try:
        told = json.loads(file.read_text()) if file.is_file() else {}
        sums = {file.with_name(k): v["sha256"] for k, v in told.get("files", {}).items()}
        return sums and sums | {Path(hp.tokenizer_path): told["tokenizer_sha256"]}
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise Refused(f"{file}: not what data/prepare.py writes: {error!r}") from None

def check_files(hp) -> None:
    """The ranks share them. Raises: OSError, Refused naming those that are not as described."""
    sums = described(hp)
    paths = sorted({*sums, *Path(hp.data_path).glob("fineweb_*.bin")}) if sums else []
    paths = [path for path in paths if "_train_" not in path.name or not hp.eval_only]
    paths = paths[world.rank :: world.size]
    wrong = [str(path) for path in paths if not path.is_file() or digest(path) != sums.get(path)]
    if wrong:
        raise Refused(f"not as {hp.data_path}/stats.json describes them: {', '.join(wrong)}: make "
                      "it again, or remove it if you cut them between characters")

class TrainLoader:
    """Micro-batches in stream order."""
    def __init__(self, stream: TokenStream, hp, position: int = 0):
        self.stream, self.seq_len = stream, hp.train_seq_len
        self.span = hp.micro_rows() * hp.train_seq_len  # tokens of a micro-batch
        self.position = position  # of the next micro-batch
        self.last_read = 0.0  # when training data was last read

    def next(self) -> Tensor:
        """This rank's share of the next micro-batch: inputs and targets, int64 [2, B, T]."""
        tokens = self.stream.read(self.position + world.rank * self.span, self.span + 1)
        self.position += world.size * self.span
        self.last_read = time.perf_counter()
        both = torch.stack((tokens[:-1], tokens[1:])).view(2, -1, self.seq_len)
        return (both.pin_memory() if world.on_cuda else both).to(world.device, non_blocking=True)
    def close(self) -> None:  # no training data after this: `next` fails
        self.stream.shards.clear()

# --- 5. Kernels ---
# The only computations that differ on CUDA. Plain torch is the CPU path and the tests' oracle.
def gated_delta_rule(q, k, v, g, beta, initial_state=None) -> tuple[Tensor, Tensor]:
    """S <- exp(g) S; S <- S + beta k (v - S^T k)^T; o = S^T q / sqrt(K), per token and head
    (arXiv:2412.06464). q, k: [B, T, Hk, K], normalised, each of H // Hk heads. v: [B, T, H, V].
    beta: [B, T, H]. g: [B, T, H], log decay <= 0. initial_state: [B, H, K, V] float32, zeros if
    None. Returns o, like v, and the final state, like the initial one."""
    assert q.shape == k.shape and g.shape == beta.shape == v.shape[:3]
    if initial_state is None:
        initial_state = torch.zeros(len(v), v.shape[2], k.shape[3], v.shape[3], device=v.device)
    rule = fla_gated_delta_rule if k.is_cuda else torch_gated_delta_rule
    return rule(q, k, v, g, beta, initial_state)[:2]

def torch_gated_delta_rule(q, k, v, g, beta, initial_state, chunk: int = 32):
    """In float32, or float64 of such inputs; only what needs the state is in turn."""
    (B, T, H, _), K, inner = v.shape, k.shape[-1], torch.promote_types(v.dtype, torch.float32)
    q, k = (x.repeat_interleave(H // x.shape[2], 2) for x in (q, k))
    inputs = q * K**-0.5, k, v, g[..., None], beta[..., None]
    padded = (F.pad(x.to(inner), (0, 0, 0, 0, 0, -T % chunk)) for x in inputs)  # changes no state
    chunks = (x.unflatten(1, (-1, chunk)).movedim((1, 3), (0, 2)).flatten(1, 2) for x in padded)
    q, k, values, g, beta = chunks  # [N, B * H, C, ...]
    # decay[i, j] = exp(sum of g over j+1 .. i), summed from j on: a difference of two sums
    # would carry rounding errors from one document into the next
    past, eye = g.new_ones(chunk, chunk).tril(-1), torch.eye(chunk).to(g)
    decay, from_start = (g * past).cumsum(-2).exp().tril(), g.cumsum(-2).exp()
    # the writes of a chunk solve (I + A) U = beta (V - K S): each sees the earlier ones
    A = (k @ k.mT) * (decay * beta)
    inverse = torch.linalg.solve_triangular(A, eye, upper=False, unitriangular=True) * beta.mT
    U, W, k_end = inverse @ values, (inverse * from_start.mT) @ k, k * decay[..., -1, :, None]
    S, states, writes = initial_state.to(inner).flatten(0, 1), [], []
    for U_n, W_n, k_n, kept in zip(U, W, k_end.mT, from_start[:, :, -1:], strict=True):
        states.append(S)
        writes.append(torch.baddbmm(U_n, W_n, S, alpha=-1))
        S = torch.baddbmm(kept * S, k_n, writes[-1])
    o = from_start * (q @ torch.stack(states)) + (q @ k.mT * decay) @ torch.stack(writes)
    o = o.unflatten(1, (B, H)).movedim((0, 2), (1, 3)).flatten(1, 2)[:, :T]
    return o.to(v.dtype), S.unflatten(0, (B, H))

# fla's functions would break fullgraph; a custom op is opaque. Importing them takes seconds.
custom_op = functools.partial(torch.library.custom_op, mutates_args=())

@custom_op("train_gpt::gated_delta_rule")
def fla_gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor,
                         initial_state: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """fla's Triton kernels, in chunks of 64. Returns o, the final state, and for the backward the
    summed decay [B, T, H] and the WY matrix [B, T, H, 64]."""
    from fla.ops.gated_delta_rule.chunk import chunk_gated_delta_rule_fwd
    q, k, v, g, beta, initial_state = (x.contiguous() for x in (q, k, v, g, beta, initial_state))
    g_sum, o, A, final_state, _, _ = chunk_gated_delta_rule_fwd(
        q, k, v, g, beta, k.shape[-1] ** -0.5, initial_state, output_final_state=True)
    return o.to(v.dtype), final_state, g_sum, A

@custom_op("train_gpt::gated_delta_rule_backward")
def fla_gated_delta_rule_backward(
        q: Tensor, k: Tensor, v: Tensor, g_sum: Tensor, beta: Tensor, A: Tensor,
        initial_state: Tensor, do: Tensor, d_state: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g, beta and the initial state."""
    from fla.ops.gated_delta_rule.chunk import chunk_gated_delta_rule_bwd
    q, k, v, beta, initial_state, do, d_state = (
        x.contiguous() for x in (q, k, v, beta, initial_state, do, d_state))
    dq, dk, dv, dbeta, dg, d_initial, _, _ = chunk_gated_delta_rule_bwd(
        q, k, v, g_sum, beta, A, k.shape[-1] ** -0.5, initial_state, do=do, dht=d_state)
    return (dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dg.to(g_sum.dtype),
            dbeta.to(beta.dtype), d_initial)

@fla_gated_delta_rule.register_fake
def _(q, k, v, g, beta, initial_state):
    return *(x.new_empty(x.shape) for x in (v, initial_state, g)), k.new_empty(*g.shape, 64)
@fla_gated_delta_rule_backward.register_fake
def _(q, k, v, g_sum, beta, A, initial_state, *_):
    return tuple(x.new_empty(x.shape) for x in (q, k, v, g_sum, beta, initial_state))

def save_for_delta_backward(ctx, inputs, output) -> None:
    q, k, v, _, beta, initial_state = inputs
    ctx.save_for_backward(q, k, v, output[2], beta, output[3], initial_state)
fla_gated_delta_rule.register_autograd(
    lambda ctx, do, d_state, *_: fla_gated_delta_rule_backward(*ctx.saved_tensors, do, d_state),
    setup_context=save_for_delta_backward)

@custom_op("train_gpt::short_conv")
def fla_short_conv(x: Tensor, weight: Tensor, bounds: Tensor, chunks: Tensor) -> Tensor:
    """fla's Triton kernel for `short_conv`, in the documents that bounds and chunks describe."""
    from fla.modules.causal_conv1d import causal_conv1d_fwd
    return causal_conv1d_fwd(x.flatten(0, 1)[None], weight, None, None, cu_seqlens=bounds,
                             chunk_indices=chunks)[0].view(x.shape)

@custom_op("train_gpt::short_conv_backward")
def fla_short_conv_backward(x: Tensor, weight: Tensor, bounds: Tensor, chunks: Tensor,
                            dy: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight."""
    from fla.modules.causal_conv1d import causal_conv1d_bwd
    dx, dw, *_ = causal_conv1d_bwd(x.flatten(0, 1)[None], dy.flatten(0, 1)[None], None, weight,
                                   cu_seqlens=bounds, chunk_indices=chunks)
    return dx.view(x.shape), dw

fla_short_conv.register_fake(lambda x, *_: x.new_empty(x.shape))
fla_short_conv_backward.register_fake(
    lambda x, weight, *_: (x.new_empty(x.shape), weight.new_empty(weight.shape)))
fla_short_conv.register_autograd(
    lambda ctx, dy: (*fla_short_conv_backward(*ctx.saved_tensors, dy), None, None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))

def window_attention(q, k, v, window: int, doc: Tensor, most: int) -> Tensor:
    """Causal attention inside documents: token t sees t - window + 1 .. t of its own document.
    q, result: [B, T, H, D]. k, v: [B, T, Hkv, D], Hkv divides H. doc: [B, T], its number, rising.
    most: documents in all rows, at most."""
    attend = varlen_window_attention if q.is_cuda else masked_window_attention
    return attend(q, k, v, window, doc, most)

def masked_window_attention(q, k, v, window: int, doc: Tensor, most: int) -> Tensor:
    near = doc.new_ones(2 * doc.shape[1:], dtype=torch.bool).tril().triu(1 - window)  # [T, T]
    seen = near & (doc[:, :, None] == doc[:, None, :])  # [B, T, T]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None], enable_gqa=True)
    return y.transpose(1, 2)

def varlen_window_attention(q, k, v, window: int, doc: Tensor, most: int) -> Tensor:
    """FlashAttention over all rows as one packed sequence; room that is not used costs a little."""
    (B, T), bounds = doc.shape, document_bounds(doc, most)
    y = varlen_attn(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), bounds, bounds, T, T,
                    window_size=(window - 1 if window < T else -1, 0), enable_gqa=True)
    return y.unflatten(0, (B, T))

def document_bounds(doc: Tensor, most: int) -> Tensor:
    """Where all rows' documents start; the rest, at least the last, is the end: int32 [most + 1]"""
    starts = F.pad(doc[:, 1:] != doc[:, :-1], (1, 0), value=True).flatten()
    torch._assert_async(starts.sum() <= most, "more documents than expected")
    return torch.nonzero_static(starts, size=most + 1, fill_value=doc.numel()).flatten().int()

def conv_chunks(bounds: Tensor, tokens: int, size: int = 64) -> Tensor:
    """The chunks of fla's convolution: [as many as there can be, 2], document and number in it.
    What is left over has numbers behind the last document's end."""
    ends = ((bounds.diff() + size - 1) // size).cumsum(0)  # chunks up to each document's end
    chunk = torch.arange(tokens // size + len(ends), device=bounds.device)
    doc = torch.searchsorted(ends, chunk, right=True).clamp(max=len(ends) - 1)
    return torch.stack((doc, chunk - F.pad(ends, (1, 0))[doc]), -1)

# --- 6. Model ---
# Log decay at a document's first token: exp(-60) of the old state is nothing in float32, and fla's
# sums of decay lose only 1e-5.
RESET_LOG_DECAY = -60.0
CONV_SIZE = 4  # tokens that a short convolution sees, as in fla

class Context(NamedTuple):
    """What every layer knows of the tokens besides their embedding."""
    doc: Tensor  # [B, T] number of the document, BOS starts a new one; 0 = no token
    same_doc: Tensor  # [B, T, 3] 1 where the token 1, 2, 3 earlier is of the same document, else 0
    cos: Tensor  # [1, T, 1, rope_dims // 2]
    sin: Tensor
    most: int  # documents in all rows together
    def last(self, n: int) -> "Context":  # of the last n tokens
        return Context(*(last(x, n) for x in self[:4]), self.most)

class LayerCache(NamedTuple):  # what a mixer keeps for the tokens to come
    inputs: Tensor  # [B, reach, D], the last ones
    state: Tensor | None  # [B, H, K, V] float32, of Gated DeltaNet
class Cache(NamedTuple):  # what a forward leaves for the next
    ids: Tensor  # [B, reach], the last tokens; -1 = none yet
    layers: list[LayerCache]  # of each pass, in order

def shift(x: Tensor, n: int) -> Tensor:  # x of the token n earlier, zeros before the first; dim 1
    return F.pad(x, (0, 0) * (x.ndim - 2) + (n, 0))[:, : x.shape[1]]
def last(x: Tensor, n: int) -> Tensor:  # of dim 1; [-n:] of all would be a copy in the backward
    return x[:, x.shape[1] - n :]
def tail(x: Tensor, n: int) -> Tensor:  # last n of dim 1; of the same strides, for one graph
    return last(x, n).detach().clone(memory_format=torch.contiguous_format)
def make_context(ids: Tensor, hp, most: int | None = None) -> Context:  # ids: [B, T]; -1 = none
    doc = torch.where(ids < 0, 0, (ids == BOS_ID).long().cumsum(1) + 1)
    same_doc = torch.stack([(shift(doc, n) == doc).to(world.dtype) for n in (1, 2, 3)], -1)
    exponents = torch.linspace(0, 1, hp.rope_dims // 2 + 1, device=ids.device)[:-1]
    angles = torch.arange(ids.shape[1], device=ids.device)[None, :, None, None]
    angles = angles * hp.rope_base**-exponents
    cos, sin = angles.cos().to(world.dtype), angles.sin().to(world.dtype)
    return Context(doc, same_doc, cos, sin, most or ids.numel())

def norm(x, weight=None) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight if weight is None else weight.to(x.dtype), eps=1e-5)
def rotary(x: Tensor, ctx: Context) -> Tensor:
    """Rotates the first rope_dims of each head by the position in the row. x: [B, T, H, D]."""
    n = ctx.cos.shape[-1]
    x1, x2, rest = x.split((n, n, x.shape[-1] - 2 * n), -1)
    return torch.cat((x1 * ctx.cos + x2 * ctx.sin, x2 * ctx.cos - x1 * ctx.sin, rest), -1)

def short_conv(x: Tensor, weight: Tensor, ctx: Context) -> Tensor:
    """Causal, depthwise, inside documents. x: [B, T, n]; weight: [n, up to 4], last the own tap."""
    if x.is_cuda:
        bounds = document_bounds(ctx.doc, ctx.most)
        return fla_short_conv(x, weight, bounds, conv_chunks(bounds, ctx.doc.numel()))
    *earlier, own = weight.to(x.dtype).unbind(-1)
    y = x * own
    for n, tap in enumerate(reversed(earlier), 1):
        y = torch.addcmul(y, shift(x, n) * ctx.same_doc[..., n - 1 : n], tap)
    return y

class Linear(nn.Linear):
    """No bias; the float32 master weight is cast to the input's dtype."""
    def __init__(self, n_in: int, n_out: int):
        super().__init__(n_in, n_out, bias=False)
        self.lora = None  # or an adapter of each row: A [B, r, n_in], B [B, n_out, r], their scale

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight.to(x.dtype))
        if self.lora:
            A, B, scale = self.lora
            assert len(A) == len(B) == len(x)  # one would be broadcast over all rows
            y = y + scale * (x @ A.to(x.dtype).mT) @ B.to(x.dtype).mT
        return y

def joint_product(x: Tensor, *linears: Linear) -> Tensor:
    """x through each, side by side; compiled, and without adapters, one product: x is read once."""
    if not torch.compiler.is_compiling() or any(linear.lora for linear in linears):
        return torch.cat([linear(x) for linear in linears], -1)  # collect_hessians sees each
    return F.linear(x, torch.cat([linear.weight for linear in linears]).to(x.dtype))
def products(x: Tensor, *linears: Linear) -> tuple[Tensor, ...]:
    return joint_product(x, *linears).split([len(linear.weight) for linear in linears], -1)

class GatedDeltaNet(nn.Module):
    """arXiv:2412.06464, as fla.layers.GatedDeltaNet has it (expand_v = 1), grouped values."""
    def __init__(self, hp):
        super().__init__()
        D, H, K = hp.model_dim, hp.gdn_heads, hp.gdn_head_dim
        self.head_dim, self.reach, self.state_shape = K, CONV_SIZE - 1, (H, K, K)  # of the cache
        self.qkv_heads = heads = hp.gdn_key_heads, hp.gdn_key_heads, H
        self.q_proj, self.k_proj, self.v_proj = (Linear(D, n * K) for n in heads)
        self.g_proj, self.a_proj, self.b_proj = Linear(D, H * K), Linear(D, H), Linear(D, H)
        self.q_conv1d, self.k_conv1d, self.v_conv1d = (
            nn.Parameter(torch.empty(n * K, CONV_SIZE)) for n in heads)
        self.A_log, self.dt_bias = (nn.Parameter(torch.empty(H)) for _ in range(2))
        self.o_norm = nn.Parameter(torch.empty(K))
        self.o_proj = Linear(H * K, D)

    def forward(self, seen: Tensor, T: int, ctx: Context, state: Tensor | None):
        """A mixer reads seen: [B, T or reach + T, D], inputs of T tokens and, with a cache, of the
        `reach` before them; ctx of all these; the state, of state_shape, before the T tokens.
        Returns [B, T, D] and the state after them. It must not look across documents."""
        def heads(x):
            return last(x, T).unflatten(-1, (-1, self.head_dim))  # [B, T, H, K]
        qkv = joint_product(seen, self.q_proj, self.k_proj, self.v_proj)
        taps = torch.cat((self.q_conv1d, self.k_conv1d, self.v_conv1d))
        # equal pieces: torch.compile recomputes them
        q, k, *v = heads(F.silu(short_conv(qkv, taps, ctx))).split(self.qkv_heads[0], 2)
        q, k, v = F.normalize(q, dim=-1), F.normalize(k, dim=-1), torch.cat(v, 2)
        gate, a, b = products(seen, self.g_proj, self.a_proj, self.b_proj)
        g = -self.A_log.exp() * F.softplus(last(a, T).float() + self.dt_bias)  # [B, T, H]
        g = g.masked_fill(last(ctx.same_doc, T)[..., :1] == 0, RESET_LOG_DECAY)
        beta = last(b, T).float().sigmoid()
        o, state = gated_delta_rule(q, k, v, g, beta, state)
        return self.o_proj((norm(o, self.o_norm) * F.silu(heads(gate))).flatten(2)), state

class Attention(nn.Module):
    """Full or in a window: grouped queries, partial rotary, QK norm with one gain per head (#1394),
    exclusive self-attention (#1493): no output has a component along the token's own value."""
    def __init__(self, hp, window: int):
        super().__init__()
        D, H, Hkv = hp.model_dim, hp.num_heads, hp.num_kv_heads
        self.head_dim, self.window, self.xsa = hp.head_dim, window, hp.xsa
        # the cache: inputs in the window; full attention is cut off somewhere
        self.reach, self.state_shape = min(window, hp.eval_seq_len) - 1, None
        self.q_proj, self.k_proj, self.v_proj = (
            Linear(D, n * hp.head_dim) for n in (H, Hkv, Hkv))
        self.q_gain = nn.Parameter(torch.empty(H))
        self.o_proj = Linear(H * hp.head_dim, D)
    def forward(self, seen: Tensor, T: int, ctx: Context, state: None):  # as GatedDeltaNet.forward
        return self.o_proj(self.attend(seen, T, ctx).flatten(2)), None
    def attend(self, seen: Tensor, T: int, ctx: Context) -> Tensor:  # [B, T, H, D]
        q, k, v = (y.unflatten(-1, (-1, self.head_dim))  # [B, T or reach + T, heads, D]
                   for y in products(seen, self.q_proj, self.k_proj, self.v_proj))
        q = rotary(norm(q), ctx) * self.q_gain.to(q.dtype)[:, None]
        y = window_attention(q, rotary(norm(k), ctx), v, self.window, ctx.doc, ctx.most)
        y, v = last(y, T), last(v, T)
        if self.xsa:
            own = F.normalize(v, dim=-1).unsqueeze(3)  # [B, T, Hkv, 1, D]
            y = y.unflatten(2, (v.shape[2], -1))  # [B, T, Hkv, group, D]
            y = (y - (y * own).sum(-1, keepdim=True) * own).flatten(2, 3)
        return y

class Block(nn.Module):
    """Mixer and MLP, each on the normalised stream and scaled per channel; x0 is mixed in first."""
    def __init__(self, hp, mixer: nn.Module):
        super().__init__()
        D, hidden = hp.model_dim, int(hp.mlp_mult * hp.model_dim)
        self.mixer = mixer
        self.mlp = nn.ModuleDict(dict(up_proj=Linear(D, hidden), down_proj=Linear(hidden, D)))
        self.norm_scale = 1.0  # of the inputs of both
        self.resid_mix = nn.Parameter(torch.empty(2, D))  # of the stream, of x0
        self.mixer_scale, self.mlp_scale = (nn.Parameter(torch.empty(D)) for _ in range(2))

    def mix(self, x: Tensor, ctx: Context, cache: LayerCache | None):
        """x: [B, T, D]. Returns what the mixer adds to it, and the cache after these tokens."""
        seen, state = self.norm_scale * norm(x), None
        if cache is not None:
            seen, state = torch.cat((cache.inputs, seen), 1), cache.state
        y, state = self.mixer(seen, x.shape[1], ctx.last(seen.shape[1]), state)
        if cache is not None:
            state = None if state is None else state.detach()
            cache = LayerCache(tail(seen, self.mixer.reach), state)
        return self.mixer_scale.to(x.dtype) * y, cache

    def feed_forward(self, x: Tensor) -> Tensor:  # LeakyReLU(0.5), squared (#1394)
        hidden = F.leaky_relu(self.mlp.up_proj(self.norm_scale * norm(x)), 0.5).square()
        return self.mlp_scale.to(x.dtype) * self.mlp.down_proj(hidden)

    def forward(self, x: Tensor, x0: Tensor, ctx: Context, cache: LayerCache | None):
        """x, x0: [B, T, D]. Returns the stream, [B, T, D], and the mixer's new cache."""
        mix_x, mix_x0 = self.resid_mix.to(x.dtype)
        x = mix_x * x + mix_x0 * x0
        y, cache = self.mix(x, ctx, cache)
        x = x + y
        return x + self.feed_forward(x), cache

MATRIX = "matrix"  # Muon; GPTQ at MATRIX_BITS
EMBED = "embed"  # AdamW with decay; GPTQ at EMBED_BITS
SCALAR = "scalar"  # AdamW without decay; float16 in the artifact
ZEROS, ONES = (lambda w, hp: w.zero_()), (lambda w, hp: w.fill_(1.0))
# (pattern, kind, start): the first that matches a name wins
PARAM_RULES = (
    (r"tok_emb\.weight$", EMBED, lambda w, hp: w.normal_(std=hp.tied_embed_init_std)),
    (r"(o|down)_proj\.weight$", MATRIX, ZEROS),
    (r"(q|k|v|g|up)_proj\.weight$", MATRIX, lambda w, hp: nn.init.orthogonal_(w)),
    (r"(a|b)_proj\.weight$", SCALAR, lambda w, hp: nn.init.kaiming_uniform_(w, 5**0.5)),
    (r"conv1d$", SCALAR, lambda w, hp: w.uniform_(-0.5, 0.5)),
    # memories of 1 to 1,000 tokens: A, softplus(dt_bias) evenly over Mamba-2's range
    (r"A_log$", SCALAR, lambda w, hp: w.copy_(torch.linspace(1, 16, len(w))).log_()),
    (r"dt_bias$", SCALAR, lambda w, hp: w.copy_(torch.logspace(-3, -1, len(w))).expm1_().log_()),
    (r"q_gain$", SCALAR, lambda w, hp: w.fill_(hp.qk_gain_init)),
    (r"resid_mix$", SCALAR, lambda w, hp: w.copy_(torch.tensor([[1.0], [0.0]]))),
    (r"(_scale|o_norm)$", SCALAR, ONES),
)

class GPT(nn.Module):
    """One forward for training, calibration and scoring; a system overrides the small methods."""
    param_rules = PARAM_RULES

    def __init__(self, hp):
        super().__init__()
        self.hp = hp
        self.most_documents = {}  # in all rows, by a forward's [rows, tokens]
        self.build(hp)
        self.kinds = self.init_weights()  # of each parameter, by name
        if world.on_cuda:
            torch._dynamo.config.recompile_limit = 64  # a graph for each shape, with adapters
            self.compile(fullgraph=True, dynamic=False)

    def build(self, hp) -> None:
        self.tok_emb = nn.Embedding(hp.vocab_size, hp.model_dim)
        mixers = [self.new_mixer(kind) for kind in hp.block_kinds()]
        self.blocks = nn.ModuleList(self.new_block(i, mixer) for i, mixer in enumerate(mixers))
        self.order = [*range(len(mixers))]  # of passes
        self.reach = max(CONV_SIZE - 1, *(mixer.reach for mixer in mixers))
        self.lm_head = Linear(hp.model_dim, hp.vocab_size)
        self.lm_head.weight = self.tok_emb.weight

    def new_mixer(self, kind: str) -> nn.Module:
        if kind == "G":
            return GatedDeltaNet(self.hp)
        return Attention(self.hp, dict(S=self.hp.window_size, A=sys.maxsize)[kind])
    def new_block(self, index: int, mixer: nn.Module) -> Block:
        return Block(self.hp, mixer)

    @torch.no_grad()
    def init_weights(self) -> dict[str, str]:
        """Returns the kind of every parameter. Raises: LookupError."""
        kinds = {}
        for name, p in self.named_parameters():
            rule = next((rule for rule in self.param_rules if re.search(rule[0], name)), None)
            if not rule:
                raise LookupError(f"parameter {name} matches no rule in param_rules")
            _, kinds[name], init = rule
            init(p, self.hp)
        return kinds

    def embed(self, ids: Tensor, ctx: Context) -> Tensor:  # [B, T] -> [B, T, D]
        return self.tok_emb(ids).to(ctx.cos.dtype)
    def head(self, x: Tensor) -> Tensor:  # softcapped logits, float32
        cap = self.hp.logit_softcap
        return cap * torch.tanh(self.lm_head(norm(x)).float() / cap)

    def new_cache(self, rows: int) -> Cache:  # of texts not begun
        zeros, layers = self.tok_emb.weight.new_zeros, []
        for mixer in (self.blocks[i].mixer for i in self.order):
            inputs = zeros(rows, mixer.reach, self.hp.model_dim, dtype=world.dtype)
            state = mixer.state_shape and zeros(rows, *mixer.state_shape)
            layers.append(LayerCache(inputs, state))
        return Cache(zeros(rows, self.reach, dtype=torch.int64) - 1, layers)

    def forward(self, input_ids: Tensor, targets: Tensor | None = None, cache: Cache | None = None):
        """input_ids, targets: [B, T] int64. Returns logits: [B, T, V] float32 or, with targets,
        -ln p of each: [B, T] float32; with the cache of the tokens before, this and a new one."""
        assert cache is None or len(cache.layers) == len(self.order)
        B, T = input_ids.shape
        ids = input_ids if cache is None else torch.cat((cache.ids, input_ids), 1)  # [B, reach + T]
        ctx = make_context(ids, self.hp, self.most_documents.get((B, T)))
        x = x0 = norm(last(self.embed(ids.clamp(min=0), ctx), T))  # [B, T, D]
        streams, layers = [], []
        for step, i in enumerate(self.order):
            x = self.enter(x, streams)
            x, layer = self.blocks[i](x, x0, ctx, None if cache is None else cache.layers[step])
            streams.append(x)
            layers.append(layer)
        out = self.head(x)
        if targets is not None:
            nats = F.cross_entropy(out.flatten(0, 1), targets.flatten(), reduction="none")
            out = nats.view_as(targets)
        return out if cache is None else (out, Cache(tail(ids, self.reach), layers))
    def enter(self, x: Tensor, earlier: list[Tensor]) -> Tensor:
        """The stream as the next block gets it; earlier: after each pass so far."""
        return x
    def set_progress(self, progress: float) -> None:  # before each step; 1 at the end
        pass
    def passes(self, x: Tensor, y: Tensor):  # yields the nats for each backward pass, [B, T]
        yield self(x, y)
    def calibrate(self, batches: list) -> dict[str, Tensor]:
        return collect_hessians(self, batches)
    def bits(self, name: str) -> int:
        return self.hp.embed_bits if self.kinds[name] == EMBED else self.hp.matrix_bits
    def learner(self, hp):
        return LoraTTT(self, hp) if hp.ttt == "lora" else None

def accumulate(model: GPT, batch: list) -> Tensor:
    """Adds up the gradients of the mean loss over all micro-batches. Returns that loss."""
    total = torch.zeros((), device=world.device)
    for x, y in batch:
        for nats in model.passes(x, y):
            loss = nats.sum() / (y.numel() * len(batch))
            loss.backward()
            total += loss.detach()
    return total

# --- 7. Optimizer ---
# optimal_composition(l=1e-3, num_iters=5, safety_factor=2e-2, cushion=2), arXiv:2505.16932
POLAR_EXPRESS = (
    (8.1565545, -22.4832929, 15.8787699),
    (4.0429299, -2.8089175, 0.5000178),
    (3.8916678, -2.7724842, 0.5060648),
    (3.2857537, -2.3681295, 0.4644902),
    (2.3465413, -1.7097828, 0.4232355),
)
def polar_express(G: Tensor, steps: int = 5) -> Tensor:
    """Nearly the nearest semi-orthogonal matrices: singular values in [1e-3, 1] of the norm go to
    [0.859, 1.141]. G: [..., rows, cols]. Returns that shape in the compute dtype."""
    tall = G.shape[-2] > G.shape[-1]
    X = F.normalize((G.mT if tall else G).to(world.dtype), dim=(-2, -1), eps=1e-7)
    for a, b, c in (POLAR_EXPRESS + POLAR_EXPRESS[-1:] * steps)[:steps]:
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return X.mT if tall else X

def reduce_gradients(params: list[Tensor], clip_norm: float) -> Tensor:
    """Averages .grad over ranks, then clips. Returns the norm before clipping."""
    if world.size > 1:
        grads = [p.grad for p in params]
        flat = world.all_reduce(nn.utils.parameters_to_vector(grads))
        nn.utils.vector_to_parameters(flat.div_(world.size), grads)
    return nn.utils.clip_grad_norm_(params, clip_norm)

class Muon:
    """Muon (arXiv:2502.16982) for matrices, AdamW for the rest; without DDP: gradients are reduced
    here. Matrices of equal shape are stacked, split over the ranks, and gathered."""
    def __init__(self, model: GPT, hp):
        self.model, self.hp, self.lr_multiplier = model, hp, 0.0  # the last one used
        owned = collections.defaultdict(list)
        for name, p in model.named_parameters():
            owned[model.kinds[name]].append(p)
        embed = dict(params=owned[EMBED], base_lr=hp.tied_embed_lr, weight_decay=hp.embed_wd)
        scalar = dict(params=owned[SCALAR], base_lr=hp.scalar_lr, weight_decay=0.0)
        self.adamw = torch.optim.AdamW([embed, scalar], betas=(hp.beta1, hp.beta2),
                                       eps=hp.adam_eps, fused=world.on_cuda)
        self.stacks = collections.defaultdict(list)  # matrices, by shape
        for p in owned[MATRIX]:
            self.stacks[tuple(p.shape)].append(p)
        self.momentum = {  # of this rank's share of each stack
            shape: torch.zeros(math.ceil(len(params) / world.size), *shape, device=world.device)
            for shape, params in self.stacks.items()}

    @torch.no_grad()
    def step(self, lr_multiplier: float, momentum: float) -> Tensor:
        """One update from .grad, which it clears. Returns the gradient norm before clipping."""
        self.lr_multiplier, params = lr_multiplier, [*self.model.parameters()]
        grad_norm = reduce_gradients(params, self.hp.grad_clip_norm or math.inf)
        for group in self.adamw.param_groups:
            group["lr"] = group["base_lr"] * lr_multiplier
        self.adamw.step()
        lr = self.hp.matrix_lr * lr_multiplier
        for shape, params in self.stacks.items():
            grads = torch.stack([p.grad for p in params])
            update = self.orthogonal_update(grads, self.momentum[shape], momentum)
            torch._foreach_mul_(params, 1 - lr * self.hp.muon_wd)
            torch._foreach_add_(params, update[: len(params)].float().unbind(), alpha=-lr)
        self.model.zero_grad()
        return grad_norm

    def orthogonal_update(self, grads: Tensor, buffer: Tensor, momentum: float) -> Tensor:
        """grads: [n, rows, cols], averaged. buffer: [share, rows, cols], this rank's momentum, is
        brought up to date. Returns the updates of all ranks: [>= n, rows, cols]."""
        share, (rows, cols) = len(buffer), grads.shape[1:]
        padding = share * world.size - len(grads)
        grads = F.pad(grads, (0, 0, 0, 0, 0, padding))[world.rank * share :][:share]
        buffer.mul_(momentum).add_(grads)
        update = grads + momentum * buffer  # Nesterov
        update = F.normalize(update, dim=-1, eps=1e-7)  # MuonEq-R: rows of one length
        update = polar_express(update, self.hp.muon_backend_steps) * max(1, rows / cols) ** 0.5
        if world.size == 1:
            return update
        gathered = update.new_empty(share * world.size, rows, cols)
        dist.all_gather_single(gathered, update.contiguous())
        return gathered

    def reached(self) -> int:  # parameters with a momentum: a gradient has reached them
        count = world.all_reduce(sum(m.flatten(1).any(1).sum() for m in self.momentum.values()))
        return count.item() + sum(s["exp_avg"].any().item() for s in self.adamw.state.values())

# --- 8. GPTQ ---
def collect_hessians(model: GPT, batches: list) -> dict:
    """X^T X per token of the inputs X of every matrix, by its name: float32 [cols, cols]."""
    names = {p: name for name, p in model.named_parameters() if model.kinds[name] != SCALAR}
    hessians = collections.defaultdict(float)
    def hook(module, inputs, _):
        if isinstance(module, Linear) and module.weight in names:
            X = inputs[0].flatten(0, -2).float()
            hessians[names[module.weight]] += X.mT @ X
    with torch.no_grad(), nn.modules.module.register_module_forward_hook(hook):
        for x, _ in batches:
            model.forward(x)  # not compiled: hooks are seen
    tokens = world.size * sum(x.numel() for x, _ in batches)
    return {name: world.all_reduce(H) / tokens for name, H in hessians.items()}

def gptq_quantize(W: Tensor, H: Tensor, bits: int, clip_sigmas: float):
    """GPTQ (arXiv:2210.17323) with activation order, SDClip (#1394). W: [rows, cols] float32.
    H: [cols, cols], X^T X of the inputs. Returns q: int8 [rows, cols], scale: float16 [rows]."""
    assert H.shape == 2 * W.shape[1:]
    qmax = 2 ** (bits - 1) - 1
    scale = (clip_sigmas * W.std(1) / qmax).clamp(2**-24, 65504).half()
    dead = H.diagonal() == 0
    W, H = W.masked_fill(dead, 0), H.float() + dead.float().diag()
    order = H.diagonal().argsort(descending=True)
    W, H = W[:, order], H[order][:, order]
    damp = 0.01 * H.diagonal().mean()  # "percdamp"
    H.diagonal().add_(damp)
    while torch.linalg.cholesky_ex(H).info > 0 and damp < math.inf:
        H.diagonal().add_(damp := 10 * damp)
    Hinv = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    Q, E = W.new_empty(2, *W.shape)
    for start in range(0, len(H), 128):  # lazy batches
        end = start + 128
        for j, w in enumerate(W[:, start:end].unbind(1), start):
            Q[:, j] = (w / scale).round().clamp(-qmax, qmax)
            E[:, j] = (w - Q[:, j] * scale) / Hinv[j, j]
            W[:, j + 1 : end] -= torch.outer(E[:, j], Hinv[j, j + 1 : end])
        W[:, end:] -= E[:, start:end] @ Hinv[start:end, end:]
    return Q[:, order.argsort()].to(torch.int8), scale

@torch.no_grad()
def quantize(model: GPT, hessians: dict[str, Tensor], step: float) -> dict:
    """(q, scale) of every matrix and embedding, by name. step: of rounding times RMS of the inputs,
    the same for all: anywhere a byte takes as much off the error of the outputs."""
    quantized = {}
    for name, W in model.named_parameters():
        if model.kinds[name] == SCALAR:
            continue
        H, bits = hessians[name], model.bits(name)
        qmax = 2 ** (torch.as_tensor(bits).min() - 1) - 1  # of the coarsest rows
        uses = 1 + (W is model.tok_emb.weight)  # head and input
        clip_sigmas = qmax * step / (W.std(1) * (uses * H.diagonal().mean()).sqrt())  # [rows]
        quantized[name] = gptq_quantize(W, H, bits, clip_sigmas.clamp(6.0, 1e4))
    return quantized

# --- 9. Packing ---
# ARTIFACT_MAGIC, sha256 of what follows, length of a part packed by brotli, this part: a line of
# JSON (system, hyperparameters, counts of the values of each quantized tensor), float16 of their
# scales and of the rest; then the range code of the values.
ARTIFACT_MAGIC = b"GDNSWA18"
MAX_PART_BYTES = 1 << 26  # unpacked
OF_A_PROCESS = ("run_id", "artifact", "eval_only", "scores")  # not in an artifact

def coding_model(counts: list[int]):  # by how often each of 256 values comes
    return coding.model.Categorical(np.array(counts) / (sum(counts) or 1), perfect=False)
def range_code(ints: list[np.ndarray]) -> tuple[list, bytes]:
    """ints: int8. How often 0 .. 127, -128 .. -1 come in each: [tensors][256]; and the code."""
    coder, ints = coding.queue.RangeEncoder(), [q.ravel().view(np.uint8) for q in ints]
    counts = [np.bincount(q, minlength=256).tolist() for q in ints]
    for q, count in zip(ints, counts, strict=True):
        coder.encode(q.astype(np.int32), coding_model(count))
    return counts, coder.get_compressed().astype("<u4").tobytes()

def save_artifact(path, model: GPT, hp: Hyperparameters, quantized: dict) -> int:
    """Packs the model, quantized by `quantize`. Returns bytes."""
    config = {name: value for name, value in asdict(hp).items() if name not in OF_A_PROCESS}
    counts, code = range_code([q.cpu().numpy() for q, _ in quantized.values()])
    head = json.dumps(dict(system=hp.system, config=config, counts=counts)).encode()
    halves = [quantized[name][1] if name in quantized else p.detach().half()
              for name, p in model.named_parameters()]
    values = b"".join(half.cpu().numpy().tobytes() for half in halves)
    part = brotli.compress(head + b"\n" + values, quality=11, lgwin=24)
    data = len(part).to_bytes(4, "little") + part + code
    whole = ARTIFACT_MAGIC + hashlib.sha256(data).digest() + data
    write_whole(path, lambda file: file.write(whole))
    return len(whole)

def load_artifact(path, device, hp_class=Hyperparameters, model_class=GPT, **changes):
    """A fresh model with the artifact's weights, and its hyperparameters; changes: to the model's.
    Raises: Refused naming the file and what is wrong with it."""
    [raw] = each(Path.read_bytes, [Path(path)])
    magic, sha256, data = raw[:8], raw[8:40], raw[40:]
    if magic != ARTIFACT_MAGIC or hashlib.sha256(data).digest() != sha256:
        raise Refused(f"ARTIFACT={path}: damaged, or no artifact: {len(raw)} bytes")
    try:
        end = 4 + int.from_bytes(data[:4], "little")
        part = brotli.Decompressor().process(data[4:end], output_buffer_limit=MAX_PART_BYTES)
        text, values = part.split(b"\n", 1)
        head, code = json.loads(text), data[end:]
        if head["system"] != hp_class.system:
            raise Refused(f"its system is {head['system']}, not {hp_class.system}")
        hp = hp_class(**head["config"])
        hp.validate()
        model = model_class(replace(hp, **changes))
        params = dict(model.named_parameters())
        sizes = {name: p.numel() for name, p in params.items() if model.kinds[name] != SCALAR}
        halves = [len(p) if name in sizes else p.numel() for name, p in params.items()]
        coder = coding.queue.RangeDecoder(np.frombuffer(code, "<u4"))
        ints = [coder.decode(coding_model(count), size).astype(np.int8)
                for count, size in zip(head["counts"], sizes.values(), strict=True)]
        fits = len(values) == 2 * sum(halves) and head.keys() == {"system", "config", "counts"}
        if not fits or range_code(ints) != (head["counts"], code):
            raise Refused("its values are not those of the model it describes")
    except Exception as error:  # of any library
        raise Refused(f"{path}: damaged, or of another program: {error}") from None
    q = dict(zip(sizes, map(torch.from_numpy, ints), strict=True))
    h = torch.tensor(np.frombuffer(values, "<f2")).split(halves)
    with torch.no_grad():
        for (name, p), half in zip(params.items(), h, strict=True):
            value = q[name].view(p.shape) * half.float()[:, None] if name in q else half
            p.copy_(value.view(p.shape))
    return model.to(device), hp

def fit(hp, model: GPT, hessians: dict) -> None:
    """Packs until artifact and code have ARTIFACT_TARGET_BYTES, or up to 0.1 % less: at twice the
    step a value has a bit less. 0: until they are in SIZE_LIMIT. Raises: Refused."""
    step, target = hp.rounding_step, hp.artifact_target_bytes or SIZE_LIMIT
    size, doublings, slope = 0, 0.0, sum(p.numel() for p in model.parameters())
    for slack in [0.001] * 9 + [0.02, 1]:  # bytes jump
        packed = save_artifact(hp.artifact, model, hp, quantize(model, hessians, step))
        before, size = size, packed + sum(path.stat().st_size for path in code_files())
        log.info(f"pack: rounding_step:{step:.6g} bytes_total:{size} target:{target}")
        if size <= target and (size == before or size >= (1 - slack) * hp.artifact_target_bytes):
            return
        if doublings:
            slope = max(8 * (before - size) / doublings, slope / 8)  # some are clipped
        doublings = np.clip(8 * (size - (1 - slack / 2) * target) / slope, -4, 4)
        step *= 2**doublings
    raise Refused(f"ARTIFACT_TARGET_BYTES={target}: artifact and code still have {size} bytes")

# --- 10. Scoring ---
class Reading(NamedTuple):  # target i is token i + 1; (0, 0, 0) is nothing
    start: int  # tokens start .. end - 1 are read
    end: int
    first: int  # targets first .. end - 1 are scored
class Plan(NamedTuple):  # how a text is read
    units: list[list[Reading]]  # readings that follow each other in one row
    rows: int  # of a rank, read at once
    length: int  # tokens of a reading at most
    cached: bool  # whether readings continue the one before

def window_plan(tokens, hp, stride: int) -> Plan:
    """Windows of EVAL_SEQ_LEN tokens; each scores what the one before left."""
    n = len(tokens) - 1
    T = min(hp.eval_seq_len, n)
    ends = itertools.pairwise([0, *range(T, n, stride), n])
    units = [[Reading(max(0, end - T), end, first)] for first, end in ends]
    return Plan(units, max(1, hp.val_batch_size // T), T, cached=False)

def stream_plan(tokens, hp) -> Plan:
    """Each document from left to right, in chunks of EVAL_CHUNK."""
    n, chunk = len(tokens) - 1, hp.eval_chunk
    starts = [0, *(1 + (tokens[1:n] == BOS_ID).nonzero().flatten()).tolist(), n]
    units = [[Reading(i, min(i + chunk, end), i) for i in range(start, end, chunk)]
             for start, end in itertools.pairwise(starts)]
    return Plan(units, hp.eval_rows, min(chunk, n), cached=True)
def final_plan(tokens, hp) -> Plan:
    streams = hp.eval_mode == "stream"
    return stream_plan(tokens, hp) if streams else window_plan(tokens, hp, hp.eval_stride)

def steps_of(plan: Plan, device) -> Tensor:
    """Start, end and first of what each row reads in each step: [steps, ranks, rows, 3]. A unit
    goes to the row that has least to read."""
    rows = [[] for _ in range(world.size * plan.rows)]
    shortest = [(0, i) for i in range(len(rows))]  # a heap
    for unit in plan.units:
        length, i = shortest[0]
        rows[i] += unit
        heapq.heapreplace(shortest, (length + len(unit), i))
    steps = [*itertools.zip_longest(*rows, fillvalue=Reading(0, 0, 0))]
    return torch.tensor(steps, device=device).unflatten(1, (world.size, plan.rows))

def reserve(model: GPT, tokens: Tensor, plan: Plan) -> Plan:
    """Tells the model how many documents a forward has at most: in each row as many as anywhere in
    the text. Returns the plan."""
    steps = 1 + plan.cached * math.ceil(model.reach / plan.length)  # whose tokens a row has
    ring = torch.cat((tokens, tokens[: plan.length]))
    most = steps * count_documents(ring, plan.length) + 1 + plan.cached
    shape, known = (plan.rows, plan.length), model.most_documents
    known[shape] = max(plan.rows * most, known.get(shape, 0))
    return plan

def score(model, tokens: Tensor, plan: Plan, learner=None):
    """tokens: int64 [N]. Returns for all ranks -ln p of every target tokens[1:] that the plan has,
    float64 [N - 1], else 0, and how often each was scored, int32 [N - 1].
    learner: a LoraTTT, told of every step. Raises: Refused if a score is not finite."""
    n, device = len(tokens) - 1, tokens.device
    nats = torch.zeros(n + 1, dtype=torch.float64, device=device)  # place n: what is not scored
    count = torch.zeros_like(nats, dtype=torch.int32)
    steps = steps_of(plan, device)[:, world.rank]  # [steps, rows, 3]
    places = torch.arange(plan.length, device=device)
    cache = model.new_cache(plan.rows) if plan.cached else None
    began = told = time.perf_counter()
    for number, step in enumerate(steps, 1):
        start, end, first = step.unsqueeze(-1).unbind(1)  # [rows, 1] each
        index = start + places  # [rows, length], of targets
        scored, here = (index >= first) & (index < end), index % n  # the rest is not scored
        with torch.set_grad_enabled(bool(learner)):
            out = model(tokens[here], tokens[here + 1], cache)
        out, cache = out if plan.cached else (out, None)
        place = torch.where(scored, index, n).flatten()  # no index of booleans: the CPU would wait
        nats[place] = out.detach().flatten().double()
        count.index_add_(0, place, scored.flatten().int())
        if learner:
            learner.after_step(step, out, scored, number / len(steps))
        if (now := time.perf_counter()) - told > 15:
            log.info(f"targets:{number * n // len(steps)}/{n} time:{now - began:.0f}s")
            told = now
    nats, count = world.all_reduce(nats[:n]), world.all_reduce(count[:n])  # exact: others are zero
    if not nats.isfinite().all():
        raise Refused(f"{(~nats.isfinite()).sum()} of {n} scores are not finite")
    return nats, count

class Validation:
    """The validation split, its documents and their bytes."""
    def __init__(self, hp):
        stream = TokenStream(hp.data_path, "val", hp.vocab_size)
        ids = stream.read(0, len(stream))
        self.paths, self.tokens = stream.paths, ids.to(world.device)  # int64 [N]
        self.starts = np.flatnonzero(ids.numpy() == BOS_ID)  # of documents
        try:
            sp = spm.SentencePieceProcessor(model_file=str(Path(hp.tokenizer_path)))
        except Exception as error:  # of its library
            raise Refused(f"TOKENIZER_PATH={hp.tokenizer_path}: {error}") from None
        self.count_bytes(hp, sp)
        self.bytes = self.target_bytes.sum(dtype=torch.int64).item()
        if not self.bytes:
            raise Refused(f"{self.paths[0]}: {len(ids)} tokens, expected some with text")
        self.is_official = len(self.starts) == 50_000 and 151_020_000 <= self.bytes <= 151_090_000
        texts = sp.decode([part.tolist() for part in np.split(ids.numpy(), self.starts)[1:]])
        self.text_bytes = np.array([len(self.original(text).encode()) for text in texts])

    def count_bytes(self, hp, sp) -> None:
        """Of each target, by the table: int32 [N - 1]."""
        sidecar = any(Path(hp.data_path).glob("fineweb_val_bytes_*.bin"))
        if sidecar or sp.id_to_piece(4) == "\ue001":
            raise Refused(f"DATA_PATH={hp.data_path}: CaseOps, only read by systems/transformer.py")
        luts = build_sentencepiece_luts(sp, hp.vocab_size, world.device)
        self.target_bytes = token_bytes(luts, self.tokens[:-1], self.tokens[1:])
    original = staticmethod(lambda text: text)  # of a decoded document

def validate(model, validation, plan: Plan, label: str, learner=None, timing=""):
    """Logs the score. Returns val_loss (nats), val_bpb, seconds, and nats and count of `score`."""
    start = time.perf_counter()
    how = learner.score if learner else functools.partial(score, model)
    nats, count = how(validation.tokens, plan)
    total, seconds = nats.sum().item(), time.perf_counter() - start
    loss, bpb = total / len(nats), total / math.log(2) / validation.bytes
    timing = timing or f"eval_time:{1000 * seconds:.0f}ms"
    log.info(f"{label} val_loss:{loss:.4f} val_bpb:{bpb:.4f} {timing}")
    return dict(val_loss=loss, val_bpb=bpb, seconds=seconds, nats=nats, count=count)

# --- 11. Test-time training ---
class LoraTTT:
    """#1787: each row of a stream has adapters on every Linear; after each chunk is scored, they
    take a step of AdamW on it: a score is final before anything is learned from it. Where a
    document ends, B is zeroed; A and the moments stay warm. One object for one pass."""
    adapters = {}  # A, B and scale of each Linear
    updates, longest = 0, 0.0  # longest: seconds of an update
    def __init__(self, model: GPT, hp):
        self.model, self.hp = model, hp
    def score(self, tokens, plan):  # as the function
        self.start = self.now = time.perf_counter()
        result = self.read(tokens, plan)
        log.info(f"ttt_{self.hp.ttt} targets:{len(tokens) - 1} updates:{self.updates}")
        return result

    def in_time(self, share: float) -> bool:
        """Whether all ranks (all must ask), after one more update, have used at most `share`, the
        part of the pass done, of 95 % of EVAL_SECONDS: 5 % are for a GPU's queue."""
        self.now = time.perf_counter()
        [spent] = world.largest(self.now - self.start + self.longest)
        return spent <= 0.95 * (self.hp.eval_seconds or math.inf) * share

    def update(self, optimizer) -> None:
        optimizer.step()
        optimizer.zero_grad()
        self.updates += 1
        self.longest = max(self.longest, time.perf_counter() - self.now)

    def read(self, tokens, plan):
        self.tokens, self.adapters = tokens, self.adapters or self.new_adapters(plan.rows)
        learned = [p for A, B, _ in self.adapters.values() for p in (A, B)]
        self.adamw = torch.optim.AdamW(learned, self.hp.ttt_lora_lr, betas=(0.0, 0.99), eps=1e-10,
                                       weight_decay=self.hp.ttt_lora_wd, fused=world.on_cuda)
        self.attach(True)
        result = score(self.model, tokens, plan, self)
        self.attach(False)
        return result

    def new_adapters(self, rows: int) -> dict:
        adapters, r = {}, self.hp.ttt_lora_rank
        generator = torch.Generator(world.device).manual_seed(self.hp.seed)
        for linear in (m for m in self.model.modules() if isinstance(m, Linear)):
            n_out, n_in = linear.weight.shape
            A = torch.empty(rows, r, n_in, device=world.device)
            A.uniform_(-(n_in**-0.5), n_in**-0.5, generator=generator)
            B = torch.zeros(rows, n_out, r, device=world.device)
            adapters[linear] = A.requires_grad_(), B.requires_grad_(), self.hp.ttt_lora_alpha / r
        return adapters
    def attach(self, adapters: bool) -> None:  # they learn, or the weights may
        self.model.requires_grad_(not adapters)
        for linear, lora in self.adapters.items():
            linear.lora = lora if adapters else None

    @torch.enable_grad()
    def after_step(self, step, nats, scored, share: float) -> None:
        """step: [rows, 3], the readings; nats, scored: [rows, T], and which of them count."""
        if self.in_time(share):
            means = (nats * scored).sum(1) / scored.sum(1).clamp(min=1)  # [rows]
            means.sum().backward()
            self.update(self.adamw)
        goes_on = (self.tokens[step[:, 1]] != BOS_ID).float()[:, None, None]  # [rows, 1, 1]
        for _, B, _ in self.adapters.values():
            B.data.mul_(goes_on)

# --- 12. Training ---
@dataclass
class Audit:
    """What only the run can say of itself; tools/verify.py does the rest."""
    checks: dict = field(default_factory=dict)
    def check(self, name: str, passed, **figures) -> None:  # what fails on one rank fails on all
        passed = world.largest(not passed) == [0.0]
        self.checks[name] = dict(passed=passed, **figures)
        log.info(f"audit: {name} {'passed' if passed else 'FAILED'} {json.dumps(figures)}")
    def verdict(self) -> None:  # raises Refused if one failed
        if failed := [name for name, check in self.checks.items() if not check["passed"]]:
            raise Refused("\n".join(f"audit failed: {name} {self.checks[name]}" for name in failed))

def fingerprint(model: GPT) -> str:  # of all weights, bit for bit, and of the order of passes
    weights = b"".join(p.detach().cpu().numpy().tobytes() for p in model.parameters())
    return hashlib.sha256(weights + str(model.order).encode()).hexdigest()[:16]

def warm_up(hp, model) -> None:
    """Compiles training on random tokens, outside the clock, then puts the weights back."""
    saved, optimizer = copy.deepcopy(model.state_dict()), Muon(model, hp)
    shape = 2, hp.micro_rows(), hp.train_seq_len
    x, y = torch.randint(BOS_ID + 1, hp.vocab_size, shape, device=world.device)  # no documents
    for progress in hp.stage_starts():
        model.set_progress(progress)
        for step in range(1, hp.warmup_steps + 1):
            accumulate(model, [(x, y)] * hp.micro_steps_at(progress))
            optimizer.step(1.0, hp.muon_momentum)
            log.info(f"warmup_step:{step}/{hp.warmup_steps} progress:{progress:g}")
    collect_hessians(model, [(x, y)])
    model.load_state_dict(saved)
    model.set_progress(1.0)
def timing_of(step: int, seconds: float) -> str:
    return f"train_time:{1000 * seconds:.0f}ms step_avg:{1000 * seconds / max(step, 1):.2f}ms"
def save_state(path, hp, model, **more) -> None:  # what tools/ go on from
    state = dict(system=hp.system, config=asdict(hp), weights=dict(model.named_parameters()))
    write_whole(path, lambda file: torch.save(state | more, file))
def between_steps(step: int, tokens: int, start: float, *state) -> tuple[int, int, float]:
    """Sees all that later steps depend on: tools/resumable.py keeps and restores it."""
    return step, tokens, start

def train(hp, model, stream: TokenStream, validation, audit):
    """Leaves the averaged weights in the model. Returns the Hessians and figures."""
    log.info(f"train_loader:dataset:{Path(hp.data_path).name} train_shards:{len(stream.paths)} "
             f"tokens:{len(stream)} grad_accum_steps:{hp.micro_steps()}")
    rows, T = hp.micro_rows(), hp.train_seq_len
    model.most_documents[rows, T] = rows + stream.most_documents(rows * T)
    blocks = reserve(model, validation.tokens, window_plan(validation.tokens, hp, hp.eval_seq_len))
    untrained = fingerprint(model)
    warm_up(hp, model)
    audit.check("warm_up", fingerprint(model) == untrained, weights=untrained)
    optimizer, step, tokens = Muon(model, hp), 0, 0
    params = [p.detach() for p in model.parameters()]
    average = [p.clone() for p in params]  # exponential moving average, float32
    recent = collections.deque(maxlen=10)  # seconds of the last steps: the next must fit
    start = time.perf_counter()  # moved forward by what does not count
    loader = TrainLoader(stream, hp)
    while True:
        step, tokens, start = between_steps(step, tokens, start, model, optimizer, average, loader)
        # of the slowest rank, or ranks would stop at different steps
        seconds, longest = world.largest(time.perf_counter() - start, max(recent, default=0.0))
        progress = hp.progress(step, seconds)
        model.set_progress(progress)
        out_of_time = seconds + longest > hp.train_seconds()
        last = step >= hp.iterations or out_of_time
        if last or (hp.val_loss_every and step % hp.val_loss_every == 0):
            raw = validate(model, validation, blocks, f"step:{step}/{hp.iterations}",
                           timing=timing_of(step, seconds))
            start += raw["seconds"]
        if last:
            break
        batch = [loader.next() for _ in range(hp.micro_steps_at(progress))]
        tokens += len(batch) * world.size * loader.span
        loss = accumulate(model, batch)
        grad_norm = optimizer.step(hp.lr_multiplier(progress), hp.momentum_at(progress))
        torch._foreach_lerp_(average, params, 1 - hp.ema_decay_at(progress, step))
        step += 1
        loss, grad_norm = torch.stack((world.all_reduce(loss) / world.size, grad_norm)).tolist()
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            raise Refused(f"step {step}: loss {loss}, gradient norm {grad_norm}: try lower rates")
        now = time.perf_counter() - start
        recent.append(now - seconds)
        if step <= 10 or step % hp.train_log_every == 0:
            log.info(f"step:{step}/{hp.iterations} train_loss:{loss:.4f} {timing_of(step, now)}")
    if out_of_time:
        log.info(f"stopping_early: wallclock_cap {timing_of(step, seconds)} step:{step}")
    torch._foreach_copy_(params, average)
    model.set_progress(1.0)
    batches = [loader.next() for _ in range(hp.gptq_calibration_batches * hp.micro_steps())]
    tokens += hp.gptq_calibration_batches * hp.train_batch_tokens
    loader.close()  # no training data from here on
    hessians = model.calibrate(batches)
    if world.on_cuda:
        torch.cuda.synchronize()
        log.info(f"peak memory allocated: {torch.cuda.max_memory_allocated() >> 20} MiB")
    total, last_read = time.perf_counter() - start, loader.last_read - start
    log.info(f"train+hessians:{1000 * total:.0f}ms last_read:{1000 * last_read:.0f}ms")
    # behind a weight that starts at zero the first gradient comes in the second step
    never_reached = len(params) - optimizer.reached()
    audit.check("gradients", never_reached == 0 or step < 2, never_reached=never_reached)
    return hessians, dict(step_stop=step, raw_val_bpb=raw["val_bpb"], tokens_needed=tokens,
                          tokens_read=loader.position, wallclock_seconds=round(total, 3),
                          lr_multiplier_at_stop=optimizer.lr_multiplier, trained_order=model.order,
                          last_read_seconds=round(last_read, 3))

# --- 13. Main ---
def check_bytes(audit, hp, validation) -> None:
    """By the table as decoded, of each document."""
    per_token = F.pad(validation.target_bytes, (1, 0)).cpu().numpy()  # of the first BOS: 0
    counted, text = np.add.reduceat(per_token, validation.starts), validation.text_bytes
    decoded, wrong = int(text.sum()), np.flatnonzero(counted != text)
    first = [f"document {i + 1}: {counted[i]} bytes by the table, {text[i]} decoded: it ends in "
             "half a character, or pieces have spaces inside" for i in wrong[:1]]
    other = len(text) == 50_000 and "fineweb" in hp.data_path and not validation.is_official
    audit.check("bytes", not first and decoded == validation.bytes and not other, first=first,
                table=validation.bytes, decoded=decoded, wrong_documents=len(wrong))

def pack(hp, model, validation, hessians: dict) -> dict:
    """Writes the artifact. Returns pre_quant_val_bpb, of the weights before."""
    if not world.rank:  # other ranks' may differ in the last bit
        fit(hp, model, hessians)
    plan = window_plan(validation.tokens, hp, hp.eval_seq_len)
    ema = validate(model, validation, plan, "diagnostic pre-quantization post-ema")
    return dict(pre_quant_val_bpb=ema["val_bpb"])

def evaluate(hp, model_class, validation, audit) -> dict:
    """Scores the artifact as it lies on disk. Returns figures."""
    model, _ = load_artifact(hp.artifact, world.device, type(hp), model_class,
                             eval_seq_len=hp.eval_seq_len)  # what full attention sees
    weights, tokens = fingerprint(model), validation.tokens
    plan = reserve(model, tokens, final_plan(tokens, hp))
    blocks = reserve(model, tokens, window_plan(tokens, hp, hp.eval_seq_len))
    learner = model.learner(replace(hp, eval_seconds=0.0))
    length = getattr(learner, "warm_up_tokens", max(hp.eval_seq_len, hp.eval_chunk) + 2)
    noise = torch.randint(BOS_ID + 1, hp.vocab_size, (length,), device=world.device)
    noise[length * 3 // 4] = BOS_ID  # a document behind what SGD learns from
    how = learner.score if learner else functools.partial(score, model)
    how(noise, final_plan(noise, hp))  # compiles outside the clock
    bits, mode = f"final_int{hp.matrix_bits}", hp.eval_mode.replace("sliding", "sliding_window")
    validate(model, validation, blocks, f"{bits}_roundtrip")
    label = f"{bits}_{mode}{hp.ttt and '_ttt_' + hp.ttt}"
    final = validate(model, validation, plan, label, model.learner(hp))
    log.info(f"{label}_exact val_loss:{final['val_loss']:.8f} val_bpb:{final['val_bpb']:.8f}")
    write_scores(hp, model, validation, final["nats"])
    count, after = final["count"], fingerprint(model)
    audit.check("once", (count == 1).all(), targets=len(count), scored=count.sum().item())
    fresh = fingerprint(load_artifact(hp.artifact, world.device, type(hp), model_class)[0])
    audit.check("ledger", weights == after == fresh, artifact=weights, after_the_pass=after)
    return dict(val_bpb=final["val_bpb"], val_loss=final["val_loss"], scored_order=model.order,
                eval_time_seconds=round(final["seconds"], 3))

def write_scores(hp, model, validation, nats: Tensor) -> None:
    """SCORES, and a sample for tools/verify.py: documents as scored, and without learning."""
    ends = [*validation.starts[1:], len(validation.tokens)]
    n = int(max(2, max([end for end in ends if end <= SAMPLE_TOKENS], default=ends[0])))
    tokens = validation.tokens[:n]
    unlearned = score(model, tokens, final_plan(tokens, hp))[0] if hp.ttt else nats[: n - 1]
    scores = dict(nats=nats.cpu().numpy(), bytes=validation.target_bytes.cpu().numpy(),
                  position=np.arange(1, len(nats) + 1))
    sample = {name: values[: n - 1] for name, values in scores.items()}
    sample |= dict(unlearned=unlearned.cpu().numpy(), device=world.device.type,
                   artifact=digest(hp.artifact))
    write_whole(f"{hp.artifact}.sample.npz", lambda file: np.savez(file, **sample))
    if hp.scores:
        write_whole(hp.scores, lambda file: np.savez(file, **scores))

def finish(hp, model_class, validation, audit, figures: dict) -> None:
    """Scores the artifact and logs all figures. Raises: Refused if a check has failed."""
    figures |= evaluate(hp, model_class, validation, audit)
    sizes = dict(bytes_code=sum(path.stat().st_size for path in code_files()),
                 bytes_model=os.path.getsize(hp.artifact))
    sizes["bytes_total"] = total = sum(sizes.values())
    log.info(f"Total submission size int{hp.matrix_bits}+range: {total} bytes")
    audit.check("size", total <= SIZE_LIMIT, **sizes, head_room=SIZE_LIMIT - total)
    used = dict(training_of=(figures.get("wallclock_seconds", 0), hp.max_wallclock_seconds),
                evaluation_of=(figures["eval_time_seconds"], hp.eval_seconds))
    audit.check("time", all(spent <= limit or not limit for spent, limit in used.values()), **used)
    run = {name: getattr(hp, name) for name in "run_id system preset layout seed data_path".split()}
    run |= dict(hardware=f"{world.size}x{torch.cuda.get_device_name() if world.on_cuda else 'CPU'}",
                pytorch_version=torch.__version__, documents=len(validation.starts),
                bytes=validation.bytes, official=validation.is_official,
                artifact_sha256=digest(hp.artifact))
    log.info(f"figures: {json.dumps(run | figures | sizes | dict(checks=audit.checks))}")
    audit.verdict()

def main(hp_class=Hyperparameters, model_class=GPT, validation_class=Validation) -> None:
    """systems/NAME.py calls it with classes of its own."""
    audit, hp, figures = Audit(), hp_class.from_env(os.environ), {}
    if world.on_cuda:
        torch.cuda.set_device(world.device)
    if world.size > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if world.on_cuda else "gloo")
    torch.manual_seed(hp.seed)
    if hp.eval_only:
        model, saved = load_artifact(hp.artifact, world.device, hp_class, model_class)
        own = {name: getattr(hp, name) for name in OF_A_PROCESS}
        hp = hp_class.from_env(os.environ, artifact=replace(saved, **own))
    else:
        model = model_class(hp).to(world.device)
    _, (validation, stream), _locks = each(call, (
        lambda: hp.eval_only or hp.micro_steps(),
        lambda: check_files(hp) or each(call, (
            lambda: validation_class(hp),
            lambda: not hp.eval_only and TokenStream(hp.data_path, "train", hp.vocab_size))),
        lambda: world.rank or claim_outputs(hp, model)), world.size)
    each(init_log, [hp])
    log.info(f"val_loader:shards:{len(validation.paths)} tokens:{len(validation.target_bytes)} "
             f"bytes:{validation.bytes} documents:{len(validation.starts)}")
    check_bytes(audit, hp, validation)
    if stream:
        audit.verdict()  # before ten minutes are spent
        log.info(f"model_params:{sum(p.numel() for p in model.parameters())}")
        hessians, figures = train(hp, model, stream, validation, audit)
        save_state(f"{hp.artifact}.trained.pt", hp, model, hessians=hessians, figures=figures,
                   checks=audit.checks)  # if packing fails, tools/repack.py goes on from here
        figures |= pack(hp, model, validation, hessians)
    finish(hp, model_class, validation, audit, figures)
    if world.size > 1:
        dist.destroy_process_group()

if __name__ == "__main__":
    main()
