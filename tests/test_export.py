"""An exported student is the run's student, for software that has never heard of evlecg."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from evlecg.distill import distill
from evlecg.errors import EvlecgError, RunFailed
from evlecg.export import export
from evlecg.recipe import load_recipe, parse_set

PLAIN_READER = """
import json, sys
import numpy as np, torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
for folder in sys.argv[1:]:
    model = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Is it normal?"}]}]
    text = processor.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    page = Image.fromarray(np.random.default_rng(0).integers(0, 255, (56, 56, 3), dtype=np.uint8))
    inputs = processor(images=[page], text=[text], return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1]
    print(json.dumps({"logits": logits[:8].tolist(), "evlecg": "evlecg" in sys.modules}))
"""


@pytest.fixture(scope="module", params=["idefics3", "llava", "qwen2_vl"])
def run(request, checkpoints, synthetic, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / request.param
    sets = ["train.max_steps=1", "data.labels=[NORM]", "train.batch_size=4", "train.lr=1e-3"]
    recipe = load_recipe(None, {"teacher": "none", "student": str(checkpoints[request.param])} | parse_set(sets))
    distill(recipe, data=synthetic, out=out)
    return out


def test_plain_transformers_loads_it_in_a_process_without_evlecg(run, tmp_path):
    result = export(run, out=tmp_path / "export")
    assert result.max_logit_difference == 0
    command = [sys.executable, "-c", PLAIN_READER, str(run / "student"), str(tmp_path / "export")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(answers) == 2 and answers[0] == answers[1] and answers[0]["evlecg"] is False
    before, after = load_file(run / "student" / "model.safetensors"), load_file(result.weights)
    assert set(before) == set(after) and all(torch.equal(before[name], after[name]) for name in before)
    card = (tmp_path / "export" / "README.md").read_text()
    assert "Not a medical device" in card and f"{result.n_parameters:,}" in card and "Not evaluated" in card


def test_half_precision_is_stored_and_proven(run, tmp_path):
    result = export(run, out=tmp_path / "half", dtype="bfloat16")
    with safe_open(result.weights, framework="pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118


def test_a_reload_that_differs_keeps_nothing(run, tmp_path, monkeypatch):
    """The gate must be able to fail: the written weights are spoilt between saving and reloading."""
    from transformers import PreTrainedModel

    real = PreTrainedModel.save_pretrained

    def spoilt(self, folder, *args, **kwargs):
        real(self, folder, *args, **kwargs)
        tensors = load_file(folder / "model.safetensors")
        name = next(name for name in tensors if "layers.0" in name and tensors[name].ndim == 2)
        tensors[name] = tensors[name] + 0.5
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", spoilt)
    with pytest.raises(RunFailed, match="logits differ"):
        export(run, out=tmp_path / "export")
    assert list(tmp_path.iterdir()) == []


def test_bad_input(run, tmp_path):
    with pytest.raises(EvlecgError, match="no finished run"):
        export(tmp_path, out=tmp_path / "export")
    with pytest.raises(EvlecgError, match="did you mean 'safetensors'"):
        export(run, out=tmp_path / "export", format="safetensor")
    with pytest.raises(EvlecgError, match="unknown dtype"):
        export(run, out=tmp_path / "export", dtype="int3")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    with pytest.raises(EvlecgError, match="not empty"):
        export(run, out=tmp_path / "full")
