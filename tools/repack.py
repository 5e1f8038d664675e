"""Goes on where a run stopped behind its training: quantizes, packs and scores what it had kept.

    python tools/repack.py final_model.int6.ptz
    python tools/repack.py final_model.int6.ptz --train-script systems/NAME.py    # another system's

Reads ARTIFACT.trained.pt. The log is logs/RUN_ID.repacked.txt; it ends with the figures of the
whole run. Variables that say how an artifact is scored are read, as by EVAL_ONLY.
"""

import argparse
import importlib
import os
import sys
from dataclasses import replace
from pathlib import Path

import packed
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "systems")]
import train_gpt as t  # noqa: E402  (the paths come first)


def repack(artifact: Path, module) -> None:
    """module: train_gpt or the system's. Raises: ValueError naming the file; RuntimeError if a
    check fails, those of the training included."""
    path = Path(f"{artifact}.trained.pt")
    state = packed.read_state(path)
    hp_class, model_class = module.Hyperparameters, module.GPT
    if state["system"] != hp_class.system:
        raise ValueError(f"{path}: its system is {state['system']}, not {hp_class.system}")
    trained = hp_class(**state["config"])
    own = dict(run_id=f"{trained.run_id}.repacked", artifact=str(artifact))
    hp = hp_class.from_env(os.environ, artifact=replace(trained, **own))
    audit, code = t.Audit(), t.code_files()
    audit.checks |= state["checks"]
    t.init_log(hp, code)
    torch.manual_seed(hp.seed)
    model = model_class(hp)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(state["weights"][name])
    model.to(t.world.device)
    hessians = {name: H.to(t.world.device) for name, H in state["hessians"].items()}
    validation = getattr(module, "Validation", t.Validation)(hp)
    figures = state["figures"] | t.pack(hp, model, validation, hessians) | dict(repacked=True)
    t.finish(hp, model_class, validation, code, audit, figures)


def main(argv: list[str] | None = None) -> int | str:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--train-script", type=Path, default=ROOT / "train_gpt.py")
    args = parser.parse_args(argv)
    try:
        repack(args.artifact, importlib.import_module(args.train_script.stem))
    except (OSError, ValueError, RuntimeError) as error:
        return f"repack: error: {error}"
    return 0


if __name__ == "__main__":
    sys.exit(main())
