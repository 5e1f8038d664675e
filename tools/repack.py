"""Goes on where a run stopped behind its training: quantizes, packs and scores what it had kept.

    python tools/repack.py final_model.int6.ptz
    python tools/repack.py final_model.int6.ptz --train-script systems/NAME.py    # another system's

Reads ARTIFACT.trained.pt. The log is logs/RUN_ID.repacked.txt; it ends with the figures of the
whole run. Variables that say how an artifact is scored are read, as by EVAL_ONLY, and those that
say how it is packed: ARTIFACT_TARGET_BYTES, ROUNDING_STEP and bits.
"""

import argparse
import importlib
import os
import re
import sys
from dataclasses import fields, replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "systems"), str(ROOT / "tools")]
import packed  # noqa: E402  (the paths come first)

import train_gpt as t  # noqa: E402


def module_of(script: Path):
    """Of train_gpt.py or a system; script: from here or from the root. Raises: ValueError."""
    path = (script if script.is_file() else ROOT / script).resolve()
    if path.parent not in (ROOT, ROOT / "systems") or not path.is_file():
        expected = f"expected {ROOT / 'train_gpt.py'} or a file of {ROOT / 'systems'}"
        raise ValueError(f"--train-script {script}: {expected}")
    try:
        module = importlib.import_module(path.stem)
    except (ImportError, SyntaxError) as error:
        raise ValueError(f"--train-script {script}: {error}") from None
    if not hasattr(module, "Hyperparameters"):
        raise ValueError(f"--train-script {script}: no system, it has no Hyperparameters")
    return module


def as_trained(path: Path, module) -> tuple[dict, object]:
    """What a run kept behind its training, and its hyperparameters. Raises: OSError, ValueError
    naming the file."""
    state = packed.read_state(path, "system", "config", "figures", "checks")
    hp_class = module.Hyperparameters
    if state["system"] != hp_class.system:
        raise ValueError(f"{path}: its system is {state['system']}, not {hp_class.system}")
    try:
        return state, hp_class(**state["config"])
    except TypeError as error:  # a setting that the system has not
        raise ValueError(f"{path}: of another version of {hp_class.system}: {error}") from None


def restore(model, weights: dict, path: Path) -> None:
    """Raises: ValueError naming the file if the weights are not the model's."""
    shapes = [
        {name: list(w.shape) for name, w in dict(own).items()}
        for own in (model.named_parameters(), weights)
    ]
    for name in shapes[0].keys() | shapes[1].keys():
        ours, theirs = (shape.get(name, "none") for shape in shapes)
        if ours != theirs:
            raise ValueError(f"{path}: {name} is {theirs}, the model's {ours}")
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(weights[name])


PACKING = re.compile(r"artifact_target_bytes|rounding_step|.*_bits")


def with_packing_of(env, trained):
    """The hyperparameters with variables of packing. Raises: ValueError naming the variable."""
    names = [f.name for f in fields(trained) if PACKING.fullmatch(f.name)]
    given = {name.upper(): env[name.upper()] for name in names if name.upper() in env}
    as_given = type(trained).from_env(given)
    return replace(trained, **{name.lower(): getattr(as_given, name.lower()) for name in given})


def repack(path: Path, artifact: Path, module, run_id: str = "", **more) -> None:
    """path: the state; module: train_gpt or the system's; more: of the figures. The log is that of
    run_id, or one of its own. Raises: ValueError naming the file; RuntimeError if a check fails,
    those of the training included."""
    state, trained = as_trained(path, module)
    hp_class, model_class = module.Hyperparameters, module.GPT
    own = dict(run_id=run_id or f"{trained.run_id}.repacked", artifact=str(artifact))
    packed_as = with_packing_of(os.environ, replace(trained, **own))
    hp = hp_class.from_env(os.environ, artifact=packed_as)
    audit = t.Audit()
    audit.checks |= state["checks"]
    torch.manual_seed(hp.seed)
    model = model_class(hp)
    restore(model, state["weights"], path)
    _locks = t.world.rank or t.claim_outputs(hp, model)
    t.check_files(replace(hp, eval_only=True))  # the training shards are not needed
    validation = getattr(module, "Validation", t.Validation)(hp)
    t.init_log(hp)
    if more.get("resumed"):
        t.log.info(f"resumed: {path}")
    model.to(t.world.device)
    hessians = {name: H.to(t.world.device) for name, H in state["hessians"].items()}
    figures = state["figures"] | t.pack(hp, model, validation, hessians) | more
    t.finish(hp, model_class, validation, audit, figures)


def main(argv: list[str] | None = None) -> int | str:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--train-script", type=Path, default=ROOT / "train_gpt.py")
    args = parser.parse_args(argv)
    try:
        path, module = Path(f"{args.artifact}.trained.pt"), module_of(args.train_script)
        repack(path, args.artifact, module, repacked=True)
    except (OSError, ValueError, RuntimeError) as error:
        return f"repack: error: {error}"
    return 0


if __name__ == "__main__":
    sys.exit(main())
