"""Mixers and a gate that the record lacks; counted with each system that imports them."""

import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt  # noqa: E402  (the path comes first)
from train_gpt import SCALAR, ZEROS, last, norm, rotary, shift  # noqa: E402

# as nn.Conv1d starts
CONV_RULE = (
    r"conv1d$",
    SCALAR,
    lambda w, hp: w.uniform_(-(w.shape[1] ** -0.5), w.shape[1] ** -0.5),
)


# as fla's Gated DeltaNet and Mamba-2 start: softplus(dt_bias) is log-uniform in [1e-3, 1e-1]
A_RULE = r"A_log$", SCALAR, lambda w, hp: w.uniform_(1, 16).log_()
DT_RULE = (
    r"dt_bias$",
    SCALAR,
    lambda w, hp: w.uniform_(math.log(1e-3), math.log(1e-1)).exp_().expm1_().log_(),
)


class DeltaNet(train_gpt.GatedDeltaNet):
    """With convolutions over CONV_SIZE tokens, 0 = none; with O_NORM=0 the outputs are not
    normalised."""

    def __init__(self, hp):
        super().__init__(hp)
        for name, heads in zip("qkv", self.qkv_heads, strict=True):
            shape = heads * self.head_dim, hp.conv_size
            taps = nn.Parameter(torch.empty(shape)) if hp.conv_size else None
            setattr(self, f"{name}_conv1d", taps)
        if not hp.o_norm:
            self.o_norm = None

    def activate(self, qkv: Tensor) -> Tensor:  # behind the convolutions
        return F.silu(qkv)

    def forward(self, seen: Tensor, T: int, ctx: train_gpt.Context, state: Tensor | None):
        def heads(x):
            return last(x, T).unflatten(-1, (-1, self.head_dim))  # [B, T, heads, K]

        qkv = train_gpt.joint_product(seen, self.q_proj, self.k_proj, self.v_proj)
        if self.q_conv1d is not None:
            taps = torch.cat((self.q_conv1d, self.k_conv1d, self.v_conv1d))
            qkv = train_gpt.short_conv(qkv, taps, ctx)
        q, k, *v = heads(self.activate(qkv)).split(self.qkv_heads[0], 2)
        q, k, v = F.normalize(q, dim=-1), F.normalize(k, dim=-1), torch.cat(v, 2)
        gate, a, b = train_gpt.products(seen, self.g_proj, self.a_proj, self.b_proj)
        g = -self.A_log.exp() * F.softplus(last(a, T).float() + self.dt_bias)  # [B, T, H]
        g = g.masked_fill(last(ctx.same_doc, T)[..., :1] == 0, train_gpt.RESET_LOG_DECAY)
        beta = last(b, T).float().sigmoid()
        o, state = train_gpt.gated_delta_rule(q, k, v, g, beta, state)
        o = o if self.o_norm is None else norm(o, self.o_norm)
        return self.o_proj((o * F.silu(heads(gate))).flatten(2)), state


def sink_attention(q, k, v, sink: Tensor, doc: Tensor, most: int) -> Tensor:
    """As train_gpt.window_attention without a window; before the first token of each document
    stands one more key, whose value is zero. sink: [Hkv, D], this key."""
    attend = varlen_sink_attention if q.is_cuda else masked_sink_attention
    return attend(q, k, v, sink, doc, most)


def masked_sink_attention(q, k, v, sink: Tensor, doc: Tensor, most: int) -> Tensor:
    B, T = doc.shape
    seen = doc.new_ones(T, T, dtype=torch.bool).tril() & (doc[:, :, None] == doc[:, None, :])
    seen = F.pad(seen, (1, 0), value=True)[:, None]  # [B, 1, T, 1 + T]
    k, v = torch.cat((sink.expand(B, 1, -1, -1), k), 1), F.pad(v, (0, 0, 0, 0, 1, 0))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True).transpose(1, 2)


def varlen_sink_attention(q, k, v, sink: Tensor, doc: Tensor, most: int) -> Tensor:
    """All rows as one packed sequence, with `most` more keys: each document, also one that is only
    room, has one more key than queries. Where there are fewer queries than keys, the last of both
    stand at the same place, so that a query sees the sink and the tokens up to its own."""
    B, T = doc.shape
    cu_seqlens = train_gpt.document_bounds(doc, most)
    cu_keys = cu_seqlens + torch.arange(most + 1, dtype=torch.int32, device=doc.device)
    tokens = torch.arange(B * T, dtype=torch.int32, device=doc.device)
    places = tokens + torch.searchsorted(cu_seqlens, tokens, right=True)  # of tokens among keys
    keys = sink.repeat(B * T + most, 1, 1).index_copy(0, places, k.flatten(0, 1))
    values = torch.zeros_like(keys).index_copy(0, places, v.flatten(0, 1))
    q = q.flatten(0, 1)
    how = dict(window_size=(-1, 0), enable_gqa=True)
    y = train_gpt.varlen_attn(q, keys, values, cu_seqlens, cu_keys, T, T + 1, **how)
    return y.unflatten(0, (B, T))


class SinkAttention(train_gpt.Attention):
    """Full attention that may look at nothing: each kv head has one learned key without a value. It
    has no position either: queries meet it in the dimensions that are not rotated, so that a
    document scores the same at any place."""

    def __init__(self, hp):
        super().__init__(hp, sys.maxsize)
        self.sink = nn.Parameter(torch.empty(hp.num_kv_heads, hp.head_dim - hp.rope_dims))

    def attend(self, seen: Tensor, T: int, ctx: train_gpt.Context) -> Tensor:
        linears = self.q_proj, self.k_proj, self.v_proj
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in train_gpt.products(seen, *linears))
        q, k = rotary(norm(q), ctx) * self.q_gain.to(q.dtype)[:, None], rotary(norm(k), ctx)
        sink = F.pad(self.sink, (self.head_dim - self.sink.shape[1], 0)).to(q.dtype)
        y = last(sink_attention(q, k, v, sink, ctx.doc, ctx.most), T)
        if self.xsa:
            own = F.normalize(last(v, T), dim=-1).unsqueeze(3)  # [B, T, Hkv, 1, D]
            y = y.unflatten(2, (v.shape[2], -1))  # [B, T, Hkv, group, D]
            y = (y - (y * own).sum(-1, keepdim=True) * own).flatten(2, 3)
        return y


# off at the start
SMEAR_RULE = r"smear_(gate|lambda)$", SCALAR, ZEROS


class SmearGate(train_gpt.GPT):
    """The embedding gets some of the token before, by a gate of its first SMEAR_DIMS channels
    (#1855); 0 = off."""

    param_rules = (SMEAR_RULE, *train_gpt.PARAM_RULES)

    def build(self, hp) -> None:
        super().build(hp)
        if hp.smear_dims:
            self.smear_gate = nn.Parameter(torch.empty(hp.smear_dims))
            self.smear_lambda = nn.Parameter(torch.empty(()))

    def embed(self, ids: Tensor, ctx: train_gpt.Context) -> Tensor:
        x = super().embed(ids, ctx)
        if self.hp.smear_dims:
            gate = (x[..., : self.hp.smear_dims] @ self.smear_gate.to(x.dtype)).sigmoid()
            smear = self.smear_lambda.to(x.dtype) * gate.unsqueeze(-1)
            x = x + smear * ctx.same_doc[..., :1] * shift(x, 1)
        return x
