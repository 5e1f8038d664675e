"""The layer that README adds in 25 lines: it trains, ships and scores, and keeps the promises of a
mixer: nothing of later tokens or other documents, and chunks with a cache are the whole."""

import re
import shutil
import sys

import in_process
import pytest
import torch
from conftest import ROOT, TINY

import train_gpt


@pytest.fixture
def script(tmp_path, monkeypatch):
    """systems/token_mix.py of a copy of the program."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    assert len(blocks) == 1
    (tmp_path / "systems").mkdir()
    shutil.copy(ROOT / "train_gpt.py", tmp_path)
    shutil.copy(ROOT / "systems" / "parts.py", tmp_path / "systems")
    path = tmp_path / "systems" / "token_mix.py"
    path.write_text(blocks[0])
    monkeypatch.setitem(in_process.LAYOUTS, "token_mix", "G C S")
    return path


def test_the_readme_is_read_in_minutes():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_the_example_is_as_short_as_its_title_says(script):
    lines = [line for line in script.read_text().splitlines() if line.strip()]
    code = [line for line in lines if not re.match(r"import|from|if __name__|    train_gpt", line)]
    assert len(code) <= 26


def test_the_example_trains_ships_and_scores(script, tmp_path):
    in_process.train(tmp_path, script, run_id="run", ttt="lora", eval_mode="stream")
    trained = (tmp_path / "logs" / "run.txt").read_text()
    data = dict(DATA_PATH="data", TOKENIZER_PATH="data/tokenizer.model")
    scoring = dict(EVAL_ONLY="1", RUN_ID="again", ARTIFACT="model.ptz")
    again = in_process.run(script, tmp_path, scoring | data)
    assert again.returncode == 0, again.stderr
    final = re.compile(r"^final_int6_stream_ttt_lora_exact .*$", re.M)
    assert final.findall(trained) == final.findall(again.stdout) != []
    assert "  system: token_mix\n" in trained


@torch.no_grad()
def test_the_example_keeps_the_promises_of_a_mixer(script, lively, monkeypatch):
    monkeypatch.syspath_prepend(str(script.parent))
    monkeypatch.delitem(sys.modules, "token_mix", raising=False)
    import token_mix

    hp = token_mix.Hyperparameters(**TINY | dict(layout="C G C S"))
    hp.validate()
    model = lively(token_mix.GPT(hp))
    ids = torch.randint(2, hp.vocab_size, (2, 40))
    ids[:, [0, 20]] = train_gpt.BOS_ID
    logits = model(ids)

    later = ids.clone()
    later[:, 30:] = 2 + (later[:, 30:] - 1) % (hp.vocab_size - 2)
    assert torch.equal(model(later)[:, :30], logits[:, :30])
    earlier = ids.clone()
    earlier[:, 1:20] = 2 + (earlier[:, 1:20] - 1) % (hp.vocab_size - 2)
    assert torch.equal(model(earlier)[:, 20:], logits[:, 20:])

    cache, parts = model.new_cache(2), []
    for chunk in ids.split([7, 1, 13, 19], 1):
        part, cache = model(chunk, cache=cache)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 1), logits, atol=1e-4, rtol=1e-4)
