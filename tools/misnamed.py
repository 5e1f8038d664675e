"""Environment variables that look like settings of a run and are none, for tools/settings.py.

Three kinds are told, a line each: a setting of another system than the one that runs; one of the
competition's own train_gpt.py, or of many records, with what takes its place here; and a name that
is nearly one of a setting. Nothing is changed by it.
"""

import difflib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # not there with PYTHONSAFEPATH
import variables  # noqa: E402  (the path comes first)

# Of letters in common. One letter more, less or other in six is 0.83 to 0.92.
NEAR = 0.84
# what shells, terminals, CI, schedulers and libraries set
USUAL = re.compile(
    r"(ACCELERATE|AWS|AZURE|BASH|BUILD|CI|CONDA|CUDA|CUDNN|DEBIAN|DOCKER|FSDP|GIT|GITHUB|GITLAB|GPG|"
    r"HF|INPUT|JUPYTER|KUBERNETES|LC|MKL|NCCL|NPM|NV|NVIDIA|OMP|OMPI|OPENBLAS|PBS|PMI|PMIX|PYTEST|"
    r"PYTORCH|RUNNER|RUNPOD|SGE|SLURM|SSH|SYSTEMD|TERM|TMUX|TORCH|TORCHINDUCTOR|TRITON|VSCODE|"
    r"WANDB|XDG)_.*|PYTHON\w+|ARTIFACTS|ENV|MODEL_DIR|NUM_THREADS"
)
# of the competition's train_gpt.py and train_gpt_mlx.py, then of many of its records
REPLACED = {
    "NUM_LAYERS": "LAYOUT has the blocks, as LAYOUT=A9",
    "WARMDOWN_ITERS": "WARMDOWN_FRAC is a share of the run",
    "MUON_MOMENTUM_WARMUP_STEPS": "MUON_MOMENTUM_WARMUP_FRAC is a share of the run",
    "TIE_EMBEDDINGS": "nothing: they are always tied",
    "EMBED_LR": "TIED_EMBED_LR, as embeddings are always tied",
    "HEAD_LR": "TIED_EMBED_LR, as embeddings are always tied",
    "CONTROL_TENSOR_NAME_PATTERNS": "nothing: PARAM_RULES in the source",
    "INT8_KEEP_FLOAT_FP32_NAME_PATTERNS": "nothing: PARAM_RULES in the source",
    "TRAIN_MAX_SEQ_LEN": "TRAIN_SEQ_LEN",
    "MLX_MAX_MICROBATCH_TOKENS": "nothing, or GRAD_ACCUM_STEPS",
    "MLX_EAGER_EVAL": "nothing",
    "LOGIT_CHUNK_TOKENS": "nothing",
    "OUT_DIR": "nothing: logs are in logs/, and ARTIFACT may be anywhere",
    "VAL_BATCH_TOKENS": "VAL_BATCH_SIZE",
    "DATA_DIR": "DATA_PATH and TOKENIZER_PATH",
    "ARTIFACT_DIR": "ARTIFACT",
    "COMPRESSOR": "nothing: integers are range coded, the rest is packed by brotli",
    "XSA_LAST_N": "XSA, for all layers of attention",
    "ADAM_WD": "EMBED_WD, for the embedding; nothing else of AdamW decays",
    "LN_SCALE": "nothing: a system has it or not",
    "NUM_LOOPS": "LAYOUT of SYSTEM=transformer has the loop, as 'A3 (A3)x3 A5'",
    "TTT_ENABLED": "TTT",
    "PHASED_TTT_PREFIX_DOCS": "nothing, or TTT_PHASES of SYSTEM=transformer",
    "CASEOPS_ENABLED": "nothing: SYSTEM=transformer sees by its data whether they are CaseOps",
}


def settings_of(script: Path) -> set[str]:
    """None if the source cannot be read, as it may be while somebody writes a system."""
    try:
        return variables.names_of(script)
    except ValueError:
        return set()


def owners(ours: set[str]) -> dict[str, list[str]]:
    """Of each setting that is not one of ours, the systems that have it."""
    found = {}
    for system, path in variables.systems().items():
        for name in sorted(settings_of(path) - ours):
            found.setdefault(name, []).append(f"SYSTEM={system}")
    return found


def looks_like_one(name: str) -> bool:
    """Names in small letters are no settings, unless they look like nothing else."""
    return not USUAL.fullmatch(name.upper()) and (name.isupper() or "_" in name)


def warnings(env, script: Path) -> Iterator[str]:
    """Of the environment of a run of this script."""
    ours = settings_of(script)
    known, elsewhere = ours | {variable.name for variable in variables.OTHERS}, owners(ours)
    if not ours:
        return
    for name in sorted(env.keys() - known):
        if name in elsewhere:
            yield f"{name}: a setting of {' and '.join(elsewhere[name])}, not of {script.name}"
        elif name in REPLACED:
            yield f"{name}: no setting here; in its place: {REPLACED[name]}"
        elif looks_like_one(name):
            near = difflib.get_close_matches(name.upper(), sorted(known), 1, NEAR)
            yield from (f"{name}: no setting has this name; {other} is one" for other in near)
