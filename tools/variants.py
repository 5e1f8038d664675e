"""The record with switches for what tools/ladder.py compares: no system, nothing of it is counted.

With its defaults it is the record, parameter by parameter."""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent / name) for name in (".", "systems")]
import layers  # noqa: E402  (the paths come first)
import layouts  # noqa: E402
import parts  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import transformer  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import train_gpt as t  # noqa: E402
from train_gpt import bounded  # noqa: E402


@dataclass
class Hyperparameters(layouts.Hyperparameters):
    system = "variants"
    conv_size: int = bounded(4, 0, 4)  # of Gated DeltaNet; 0 = SiLU alone
    o_norm: bool = True  # of Gated DeltaNet: each head's output is normalised
    even_decays: bool = True  # at the start, of the heads of Gated DeltaNet; or at random (fla)
    smear_dims: int = 0  # inputs of the SmearGate (#1855); 0 = off
    attn_gate_dims: int = 0  # of a gate on each attention head (#1787); 0 = off
    unet_skips: bool = False  # gated, from the first half of the passes to the second (#1787)
    ln_scale: bool = False  # block i reads its inputs over sqrt(i + 1) (#1787)
    enable_looping_at: float = bounded(0.0, 0, 1)  # progress from which a group loops

    def stage_starts(self) -> list[float]:
        return sorted({0.0, self.enable_looping_at})


masked_window_attention = t.masked_window_attention  # which tools/ladder.py replaces


def blocked_window_attention(q, k, v, window: int, doc: Tensor, most: int) -> Tensor:
    """As train_gpt.masked_window_attention, in blocks of `window` queries, which see keys of their
    own block and of the one before: of long rows the rest need not be computed."""
    T = q.shape[1]
    if window >= T:
        return masked_window_attention(q, k, v, window, doc, most)
    q, k, v = (F.pad(x, (0, 0, 0, 0, 0, -T % window)).unflatten(1, (-1, window)) for x in (q, k, v))
    doc = F.pad(doc, (0, -T % window), value=-1).unflatten(1, (-1, window))  # [B, blocks, window]
    k, v = (torch.cat((F.pad(x, (0, 0) * 3 + (1, 0))[:, :-1], x), 2) for x in (k, v))
    seen_doc = torch.cat((F.pad(doc, (0, 0, 1, 0), value=-2)[:, :-1], doc), 2)
    ago = torch.arange(window)[:, None] + window - torch.arange(2 * window)
    seen = (doc[..., :, None] == seen_doc[..., None, :]) & (ago >= 0) & (ago < window)
    q, k, v = (x.flatten(0, 1).transpose(1, 2) for x in (q, k, v))
    y = F.scaled_dot_product_attention(
        q, k, v, attn_mask=seen.flatten(0, 1)[:, None], enable_gqa=True
    )
    return y.transpose(1, 2).unflatten(0, (doc.shape[0], -1)).flatten(1, 2)[:, :T]


class GPT(layers.SmearGate, parts.UNet, layouts.LateLoop):
    param_rules = (
        layers.CONV_RULE,
        (r"attn_gate$", t.SCALAR, t.ZEROS),
        layers.SMEAR_RULE,
        *parts.UNet.param_rules,
    )

    def build(self, hp: Hyperparameters) -> None:
        self.ln_scale = hp.ln_scale
        if not hp.even_decays:
            self.param_rules = (layers.A_RULE, layers.DT_RULE, *self.param_rules)
        super().build(hp)
        if not hp.unet_skips:
            del self.skips

    def new_mixer(self, kind: str) -> nn.Module:
        if kind == "G":
            return layers.DeltaNet(self.hp)
        window = self.hp.window_size if kind == "S" else sys.maxsize
        gated = self.hp.attn_gate_dims > 0
        return (transformer.GatedAttention if gated else t.Attention)(self.hp, window)

    def enter(self, x: Tensor, earlier: list[Tensor]) -> Tensor:
        return super().enter(x, earlier) if self.hp.unet_skips else x
