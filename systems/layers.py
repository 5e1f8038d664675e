"""Mixers that the record lacks, and a loop that begins late; counted with each system that imports
them."""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt  # noqa: E402  (the path comes first)
from train_gpt import Linear, norm, shift  # noqa: E402


class LateLoop(train_gpt.GPT):
    """The group of the layout loops from progress ENABLE_LOOPING_AT on; until then each block is
    passed through once."""

    def build(self, hp) -> None:
        super().build(hp)
        self.looped_order = self.order

    def set_looping(self, on: bool) -> None:
        order = self.looped_order if on else sorted({*self.looped_order})
        if len(order) > len(self.order):
            train_gpt.log.info(f"layer_loop:enabled passes:{order}")
        self.order = order

    def set_progress(self, progress: float) -> None:
        self.set_looping(progress >= self.hp.enable_looping_at)


def causal_conv(x: Tensor, taps: Tensor, ctx: train_gpt.Context) -> Tensor:
    """Depthwise, inside documents, without an activation. x: [B, T, n]; taps: [n, 1 to 4], the last
    of the token itself."""
    *earlier, own = taps.to(x.dtype).unbind(-1)
    y = x * own
    for n, tap in enumerate(reversed(earlier), 1):
        y = torch.addcmul(y, shift(x, n) * ctx.same_doc[..., n - 1 : n], tap)
    return y


class GroupedDeltaNet(train_gpt.GatedDeltaNet):
    """GDN_KEY_HEADS queries and keys, each for as many of the GDN_HEADS values, 0 = one for each;
    convolutions over CONV_SIZE tokens, 0 = none; with O_NORM=0 the outputs are not normalised."""

    feature = staticmethod(F.silu)  # of queries and keys

    def __init__(self, hp):
        super().__init__(hp)
        D, H, K = hp.model_dim, hp.gdn_heads, hp.gdn_head_dim
        key_heads = hp.gdn_key_heads or H
        self.q_proj, self.k_proj = Linear(D, key_heads * K), Linear(D, key_heads * K)
        for name, heads in dict(q=key_heads, k=key_heads, v=H).items():
            taps = nn.Parameter(torch.empty(heads * K, hp.conv_size)) if hp.conv_size else None
            setattr(self, f"{name}_conv1d", taps)
        if not hp.o_norm:
            self.o_norm = None

    def forward(self, seen: Tensor, T: int, ctx: train_gpt.Context, state: Tensor | None):
        def heads(x):
            return x[:, -T:].unflatten(-1, (-1, self.head_dim))  # [B, T, heads, K]

        def convolved(x, taps):
            return heads(x if taps is None else causal_conv(x, taps, ctx))

        linears = self.q_proj, self.k_proj, self.v_proj, self.g_proj, self.a_proj, self.b_proj
        q, k, v, gate, a, b = train_gpt.products(seen, *linears)
        q = F.normalize(self.feature(convolved(q, self.q_conv1d)), dim=-1)
        k = F.normalize(self.feature(convolved(k, self.k_conv1d)), dim=-1)
        v = F.silu(convolved(v, self.v_conv1d))
        q, k = (x.repeat_interleave(v.shape[2] // x.shape[2], 2) for x in (q, k))
        g = -self.A_log.exp() * F.softplus(a[:, -T:].float() + self.dt_bias)  # [B, T, H]
        g = g.masked_fill(ctx.same_doc[:, -T:, :1] == 0, train_gpt.RESET_LOG_DECAY)
        o, state = train_gpt.gated_delta_rule(q, k, v, g, b[:, -T:].float().sigmoid(), state)
        o = o if self.o_norm is None else norm(o, self.o_norm)
        return self.o_proj((o * F.silu(heads(gate))).flatten(2)), state
