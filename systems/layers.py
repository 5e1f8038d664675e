"""A loop that begins late; counted with each system that imports it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt  # noqa: E402  (the path comes first)


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
