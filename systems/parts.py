"""What several systems have that the record lacks; counted with each that imports it."""

import copy
import itertools
import math
import re
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt  # noqa: E402  (the path comes first)
from train_gpt import EMBED, MATRIX, SCALAR, ZEROS, Refused, shift, world  # noqa: E402


class UNet(train_gpt.GPT):
    """Gated skips from the first half of the passes to the second (#1787), and LN scale: block i
    reads its normalised inputs over sqrt(i + 1)."""

    ln_scale = True
    param_rules = (  # of each skip and channel: weight, gate
        (r"skips$", SCALAR, lambda w, hp: w.copy_(torch.tensor([1.0, 0.0])[:, None, None])),
        *train_gpt.PARAM_RULES,
    )

    def build(self, hp) -> None:
        super().build(hp)
        for i, block in enumerate(self.blocks if self.ln_scale else ()):
            block.norm_scale = (i + 1) ** -0.5
        self.skips = nn.Parameter(torch.empty(2, len(self.order) // 2, hp.model_dim))

    def enter(self, x: Tensor, earlier: list[Tensor]) -> Tensor:
        """The last pass of the first half joins the first of the second, and so on outwards."""
        step, half = len(earlier), len(self.order) // 2
        if half <= step < 2 * half:
            weight, gate = self.skips[:, step - half].to(x.dtype)
            x = torch.lerp(weight * earlier[2 * half - 1 - step], x, gate.sigmoid())
        return x


class NgramEmbedding(nn.Module):
    """One hashed table, looked up by bigram and trigram, summed and projected; history ends at the
    document's start."""

    def __init__(self, hp):
        super().__init__()
        self.table = nn.Parameter(torch.empty(hp.ngram_vocab_size, hp.ngram_dim))
        self.proj = train_gpt.Linear(hp.ngram_dim, hp.model_dim)

    def forward(self, ids: Tensor, ctx: train_gpt.Context) -> Tensor:
        """ids: [B, T] -> [B, T, D]."""
        missing = len(self.table) - 1  # the row of an n-gram that begins before the document
        bigram = (36313 * ids) ^ (27191 * shift(ids, 1))
        trigram = bigram ^ (51497 * shift(ids, 2))
        rows = torch.stack((bigram, trigram), -1) % missing
        rows = torch.where(ctx.same_doc[..., :2] > 0, rows, missing)
        return self.proj(F.embedding(rows, self.table).sum(-2).to(ctx.cos.dtype))


class NgramGPT(train_gpt.GPT):
    """With NGRAM_VOCAB_SIZE rows of n-grams in the embedding; 0 = none."""

    # the table starts at zero, the projection does not: both can learn
    param_rules = (
        (r"ngram\.table$", EMBED, ZEROS),
        (r"ngram\.proj\.weight$", MATRIX, lambda w, hp: nn.init.orthogonal_(w)),
        *train_gpt.PARAM_RULES,
    )

    def build(self, hp) -> None:
        super().build(hp)
        self.ngram = NgramEmbedding(hp) if hp.ngram_vocab_size else None

    def embed(self, ids: Tensor, ctx: train_gpt.Context) -> Tensor:
        x = super().embed(ids, ctx)
        return x if self.ngram is None else x + self.ngram(ids, ctx)

    def calibrate(self, batches: list) -> dict[str, Tensor]:
        """The table is looked up: an error of its rows reaches the model through the projection P,
        so that its Hessian is P^T P."""
        hessians = super().calibrate(batches)
        if self.ngram is not None:
            P = self.ngram.proj.weight.detach()
            hessians["ngram.table"] = P.mT @ P
        return hessians


class SgdTTT(train_gpt.LoraTTT):
    """No adapters: whenever another TTT_CHUNK_TOKENS targets are scored, TTT_EPOCHS steps of SGD on
    them, with momentum, clipping, and a learning rate that falls as a cosine over the text (#1734).
    Afterwards the weights are as they were."""

    learned = 0  # targets
    warm_up_tokens = property(lambda self: 2 * self.hp.ttt_chunk_tokens + 2)  # it learns once

    def score(self, tokens: Tensor, plan: train_gpt.Plan) -> tuple[Tensor, Tensor]:
        saved = copy.deepcopy(self.model.state_dict())
        result = super().score(tokens, plan)
        self.model.load_state_dict(saved)
        return result

    def learns(self, name: str) -> bool:  # a parameter
        frozen = tuple(f"blocks.{i}." for i in range(self.hp.ttt_freeze_blocks))
        return not name.startswith(frozen)

    def segment_targets(self, n: int) -> int:
        """Targets of a segment, of n in all: it is scored whole, then learned from."""
        return self.hp.ttt_chunk_tokens

    def read_segment(self, tokens: Tensor, plan: train_gpt.Plan) -> tuple[Tensor, Tensor]:
        return train_gpt.score(self.model, tokens, plan)

    def read(self, tokens: Tensor, plan: train_gpt.Plan) -> tuple[Tensor, Tensor]:
        self.weights = [p for name, p in self.model.named_parameters() if self.learns(name)]
        self.sgd = torch.optim.SGD(self.weights, momentum=0.9)
        rows = max(1, self.hp.ttt_chunk_tokens // (world.size * self.hp.train_seq_len))
        self.chunk = rows * world.size * self.hp.train_seq_len
        self.model.most_documents[rows, self.hp.train_seq_len] = self.chunk // world.size
        self.tokens, n = tokens, len(tokens) - 1
        nats = torch.zeros(n, dtype=torch.float64, device=world.device)
        self.count = torch.zeros(n, dtype=torch.int32, device=world.device)
        size = self.segment_targets(n)
        for _, units in itertools.groupby(plan.units, lambda unit: unit[0].first // size):
            segment = plan._replace(units=list(units))
            self.begun, end = segment.units[0][0].first / n, segment.units[-1][-1].end
            self.part = end / n - self.begun
            more_nats, more_count = self.read_segment(tokens, segment)
            nats += more_nats
            self.count += more_count
            if end < n:  # at the end it would help nothing
                self.learn_segment(end)
        return nats, self.count

    def in_time(self, share: float) -> bool:  # of the segment
        return super().in_time(self.begun + self.part * share)

    def learn_segment(self, end: int) -> None:
        """All targets before `end` are scored."""
        for first in range(self.learned, end - self.chunk + 1, self.chunk):
            self.learn(first, len(self.count), self.hp.ttt_epochs)
            self.learned = first + self.chunk

    @torch.enable_grad()
    def learn(self, first: int, horizon: int, epochs: int) -> None:
        """Steps on the targets first .. first + chunk - 1; the cosine ends at `horizon`.

        Raises: RuntimeError if one of them is not scored yet."""
        index = torch.arange(first, first + self.chunk, device=world.device)
        if self.count[index].min() < 1:
            raise RuntimeError(
                f"test-time training on targets {first} to {index[-1]}: not all are scored"
            )
        rows = index.view(world.size, -1, self.hp.train_seq_len)[world.rank]
        batch = [(self.tokens[rows], self.tokens[rows + 1])]
        cosine = (1 + math.cos(math.pi * first / horizon)) / 2
        for _ in range(epochs):
            if self.in_time(1.0):
                train_gpt.accumulate(self.model, batch)
                train_gpt.reduce_gradients(self.weights, 1.0)
                self.sgd.param_groups[0]["lr"] = self.hp.ttt_lr * cosine
                self.update(self.sgd)


def decode_case(text: str) -> str:
    """Undoes CaseOps (#1729): U+E001 and U+E003 raise the next letter, U+E002 the next word,
    U+E004 quotes."""

    def original(found: re.Match) -> str:
        quoted, word, letter = found.groups()
        return quoted or (word or letter or "").upper()

    return re.sub("\ue004(.?)|\ue002([A-Za-z]*)|[\ue001\ue003]([A-Za-z]?)", original, text)


class CaseOpsValidation(train_gpt.Validation):
    """Text with case written as operators, if the tokenizer has them. The bytes are those of the
    original; fineweb_val_bytes_*.bin has them for each token."""

    def count_bytes(self, hp, sp) -> None:
        files = sorted(Path(hp.data_path).glob("fineweb_val_bytes_*.bin"))
        if bool(files) != (sp.id_to_piece(4) == "\ue001"):
            raise Refused(
                f"DATA_PATH={hp.data_path}: {len(files)} files fineweb_val_bytes_*.bin, "
                "expected some if and only if the tokenizer has the operators of CaseOps"
            )
        self.cased = bool(files)
        if not files:
            super().count_bytes(hp, sp)
            return
        train_gpt.build_sentencepiece_luts(sp, hp.vocab_size, "cpu")  # for what it refuses
        sizes = torch.cat([train_gpt.load_data_shard(path).int() for path in files])
        if len(sizes) != len(self.tokens):
            raise Refused(f"{files[0]}: {len(sizes)} entries, {len(self.tokens)} tokens")
        self.target_bytes = sizes[1:].to(world.device)

    def original(self, text: str) -> str:
        return decode_case(text) if self.cased else text
