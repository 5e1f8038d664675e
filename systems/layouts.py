"""A richer LAYOUT than the record's: blocks that share a mixer, and a group that loops; counted
with each system that imports it."""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt  # noqa: E402  (the path comes first)


def parse_layout(layout: str, kinds: str = "GSA"):
    """'G5 S G5 S=5' -> (kind, owner of the mixer) of each block, and the blocks in order of passes.

    As train_gpt.Hyperparameters.block_kinds, and `=i` uses the mixer of block i, from 0; a group
    may loop: 'A3 (A3)x3 A5'. Raises: Refused."""
    groups = r"\(([^()]*\w[^()]*)\)x([2-9])|([^()]+)"
    if re.sub(groups, "", layout) or layout.count("(") > 1 or not layout.strip():
        raise train_gpt.Refused(
            f"LAYOUT={layout!r}: expected blocks, and at most one group (blocks)x2"
        )
    blocks, order = [], []
    for looped, passes, once in re.findall(groups, layout):
        first = len(blocks)
        for part in (looped or once).split():
            match = re.fullmatch(rf"([{kinds}])([1-9][0-9]?)?(?:=([0-9]{{1,4}}))?", part)
            if not match:
                raise train_gpt.Refused(f"LAYOUT={layout!r}: {part!r} is not KIND[COUNT][=BLOCK]")
            kind, count, owner = match.groups()
            for _ in range(int(count or 1)):
                block = kind, int(owner or len(blocks))
                if owner and block not in blocks[block[1] : block[1] + 1]:
                    raise train_gpt.Refused(f"LAYOUT={layout!r}: {part!r} reuses no earlier {kind}")
                blocks.append(block)
        order += [*range(first, len(blocks))] * int(passes or 1)
    return blocks, order


@dataclass
class Hyperparameters(train_gpt.Hyperparameters):
    def block_kinds(self) -> list[str]:
        blocks, _ = parse_layout(self.layout, self.kinds)
        return [kind for kind, _ in blocks]

    def order_of_passes(self) -> list[int]:  # through the blocks
        return parse_layout(self.layout, self.kinds)[1]


class GPT(train_gpt.GPT):
    def build(self, hp) -> None:
        super().build(hp)
        blocks, self.order = parse_layout(hp.layout, hp.kinds)
        for block, (_, owner) in zip(self.blocks, blocks, strict=True):
            block.mixer = self.blocks[owner].mixer


class LateLoop(GPT):
    """The group loops from progress ENABLE_LOOPING_AT on; until then each block is passed through
    once."""

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
