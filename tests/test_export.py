"""An exported student is the run's student, for software that has never heard of evlecg."""

from __future__ import annotations

import base64
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from evlecg.data.store import Prepared
from evlecg.data.synthetic import generate
from evlecg.distill import distill
from evlecg.errors import EvlecgError, RunFailed
from evlecg.export import export
from evlecg.export.gate import NotAsGood, prove
from evlecg.models.trained import TrainedWith
from evlecg.recipe import SignalConfig, load_recipe, parse_set
from evlecg.run import check_manifest, load, open_student, write_manifest
from evlecg.schema import Question
from tests import tiny_classifiers
from tests.families import BUILDERS

ROOT = Path(__file__).resolve().parents[1]

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


FAMILY_TOLERANCE = 1e-4  # of log odds, float32 against float32
RESIZED_TOLERANCE = 2e-2  # where the processor resizes: pixels differ by a level
RESIZED = ("qwen2_vl", "idefics3_tiles", "internvl")
PHRASES = {"NORM": "a normal tracing", "MI": "myocardial infarction"}


def run_of(checkpoint: Path, folder: Path, **trained: object) -> Path:
    """A run folder around a checkpoint, as training would have left it."""
    shutil.copytree(checkpoint, folder / "student")
    TrainedWith(labels=PHRASES, **trained).write(folder / "student")
    return folder


@pytest.fixture(scope="module")
def graphs(checkpoints, synthetic, tmp_path_factory):
    """An Idefics3 student as float32 graphs, scored on validation."""
    folder = tmp_path_factory.mktemp("graphs")
    result = export(run_of(checkpoints["idefics3"], folder / "run"), out=folder / "onnx", format="onnx", data=synthetic)
    return folder / "run", folder / "onnx", result


def test_graphs_answer_as_the_student_does(graphs, synthetic):
    _, out, result = graphs
    assert result.max_logit_difference < FAMILY_TOLERANCE
    assert result.proof.n_records == 8 and result.proof.data == "synthetic, val"
    assert set(result.proof.original) == {"macro", *PHRASES} and result.proof.exported == result.proof.original
    assert json.loads((out / "gate.json").read_text())["exported"]["MI"] == result.proof.exported["MI"]
    assert result.n_bytes == sum(file.stat().st_size for file in out.glob("*.onnx"))
    card = (out / "README.md").read_text()
    assert "library_name: onnx" in card and "Not a medical device" in card and "8 records (synthetic, val)" in card


def test_graphs_take_any_number_of_pages(graphs):
    student = load(graphs[1])
    records = list(generate({"test": 3}, seed=1))
    views = [student.draw(record.signal_mV, record.fs_hz) for record in records]
    one_by_one = np.concatenate([student.logits([view]) for view in views])
    np.testing.assert_allclose(student.logits(views), one_by_one, atol=1e-5)
    assert np.ptp(one_by_one[:, 0, 0] - one_by_one[:, 0, 1]) > 1e-4  # it looks at its pages


def test_words_can_be_generated_behind_the_cache(graphs, checkpoints):
    """Three greedy words: prompt, then one token at a time, against transformers' own generate."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    student = load(graphs[1])
    prompt, graph = student.told["prompt"], student.graphs
    record = next(generate({"test": 1}, seed=2))
    page = student.draw(record.signal_mV, record.fs_hz)
    ids = np.array([[*prompt["prefix_ids"], *prompt["texts"][0]["ids"]]])
    embeds = graph["embed"]({"input_ids": ids})["embeds"]
    embeds[ids == prompt["image_token_id"]] = graph["vision"]({"page": page.pixels[None]})["visual"][0]
    heads, width, _ = prompt["cache"][0]
    past = {f"past_0_{name}": np.zeros((1, heads, 0, width), np.float32) for name in ("key", "value")}
    words, place = [], 0
    for _ in range(3):
        new = embeds.shape[1]
        found = graph["decoder"]({
            "embeds": embeds, "attention_mask": np.ones((1, place + new), np.int64),
            "position_ids": np.arange(place, place + new)[None], "keep": np.array([new - 1]), **past,
        })  # fmt: skip
        past = {name.replace("present", "past"): value for name, value in found.items() if name != "logits"}
        words.append(int(found["logits"][0, 0].argmax()))
        place, embeds = place + new, graph["embed"]({"input_ids": np.array([words[-1:]])})["embeds"]
    model = AutoModelForImageTextToText.from_pretrained(checkpoints["idefics3"])
    processor = AutoProcessor.from_pretrained(checkpoints["idefics3"])
    pixels = processor.image_processor(images=[[Image.fromarray(page.pixels)]], return_tensors="pt")
    wanted = model.generate(
        input_ids=torch.from_numpy(ids), attention_mask=torch.ones(ids.shape, dtype=torch.int64),
        pixel_values=pixels["pixel_values"], do_sample=False, max_new_tokens=3, min_new_tokens=3,
    )  # fmt: skip
    assert words == wanted[0, -3:].tolist()


@pytest.mark.parametrize("dtype", ["int8", "int8-static", "int4"])
def test_quantised_graphs_are_smaller_and_nearly_the_same(graphs, tmp_path, dtype):
    from evlecg.export.formats import quantise

    shutil.copytree(graphs[1], tmp_path / "small")
    records = list(generate({"test": 6}, seed=1))
    quantise(tmp_path / "small", dtype, lambda student: [student.draw(each.signal_mV, each.fs_hz) for each in records])
    small, whole = open_student(tmp_path / "small"), open_student(graphs[1])
    views = [whole.draw(record.signal_mV, record.fs_hz) for record in records]
    wanted, found = (each.logits(views) for each in (whole, small))
    difference = np.abs((wanted[..., 0] - wanted[..., 1]) - (found[..., 0] - found[..., 1]))
    assert 0 < difference.max() < 0.5
    assert (tmp_path / "small" / "decoder.onnx").stat().st_size < (graphs[1] / "decoder.onnx").stat().st_size
    kinds = {node.op_type for node in onnx.load(tmp_path / "small" / "decoder.onnx").graph.node}
    assert kinds & {"int8": {"MatMulInteger", "DynamicQuantizeLinear"}, "int8-static": {"QuantizeLinear"},
                    "int4": {"MatMulNBits"}}[dtype]  # fmt: skip
    page = {node.op_type for node in onnx.load(tmp_path / "small" / "vision.onnx").graph.node if "pixels" in node.name}
    assert not page & {"MatMulInteger", "MatMulNBits"}


def test_graphs_of_half_precision_answer_nearly_as_the_student_does(graphs, synthetic, tmp_path):
    result = export(graphs[0], out=tmp_path / "half", format="onnx", dtype="fp16", data=synthetic, max_drop_points=100)
    assert 0 < result.max_logit_difference < 0.25 and result.proof.n_records == 8
    assert (tmp_path / "half" / "decoder.onnx").stat().st_size < 0.7 * (graphs[1] / "decoder.onnx").stat().st_size


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-4), pytest.param("fp16", 0.05, marks=pytest.mark.slow)])
def test_openvino_answers_as_the_student_does(graphs, synthetic, tmp_path, dtype, tolerance):
    pytest.importorskip("openvino", reason="the extra evlecg[openvino] is not installed")
    out = tmp_path / "ov"
    result = export(graphs[0], out=out, format="openvino", dtype=dtype, data=synthetic, max_drop_points=100)
    assert result.max_logit_difference < tolerance and result.proof.n_records == 8
    assert {path.name for path in out.glob("*.xml")} == {"vision.xml", "embed.xml", "decoder.xml"}
    record = next(generate({"test": 1}, seed=3))
    found, wanted = (load(folder).predict(record.signal_mV, record.fs_hz) for folder in (out, graphs[1]))
    assert found.keys() == wanted.keys() == PHRASES.keys()
    assert all(abs(found[label] - wanted[label]) < tolerance for label in PHRASES)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["vit", "patchtst"])
def test_openvino_takes_classifiers(synthetic, tmp_path, family):
    pytest.importorskip("openvino", reason="the extra evlecg[openvino] is not installed")
    kind = "image" if family == "vit" else "signal"
    run = run_of(tiny_classifiers.write(tmp_path / family, family), tmp_path / "run", kind=kind)
    result = export(run, out=tmp_path / "ov", format="openvino", data=synthetic, max_drop_points=100)
    assert result.max_logit_difference < 1e-3 and result.proof.n_records == 8


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("qwen2_vl", "idefics3_tiles", "internvl", "fast_vlm")]


@pytest.mark.parametrize("family", ["llava", *SLOW])
def test_families_are_cut_into_graphs(family, checkpoints, tmp_path):
    checkpoint = checkpoints[family] if family in checkpoints else BUILDERS[family](tmp_path / "checkpoint")
    result = export(run_of(checkpoint, tmp_path / "run"), out=tmp_path / "onnx", format="onnx")
    allowed = RESIZED_TOLERANCE if family in RESIZED else FAMILY_TOLERANCE
    assert result.max_logit_difference < allowed and result.proof.data == "synthetic records"


@pytest.mark.parametrize("family", ["vit", "convnext", "patchtst", "hubert"])
def test_classifiers_are_one_graph(family, synthetic, tmp_path):
    """Pages and signals; leads as channels with gaps marked, and leads apart; twice the same bytes."""
    tiny_classifiers.write(tmp_path / "checkpoint", family)
    kind = "image" if family in tiny_classifiers.PAGES else "signal"
    form = SignalConfig(fs_hz=50.0, window_s=10.0, leads="apart") if family == "hubert" else None
    run = run_of(tmp_path / "checkpoint", tmp_path / "run", kind=kind, signal=form)
    result = export(run, out=tmp_path / "onnx", format="onnx", data=synthetic)
    assert result.max_logit_difference < FAMILY_TOLERANCE and result.proof.n_records == 8
    if family == "patchtst":
        export(run, out=tmp_path / "again", format="onnx", data=synthetic)
        sums = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("onnx", "again")]
        assert sums[0] == sums[1]


def test_an_export_that_is_worse_keeps_nothing(checkpoints, synthetic, tmp_path, monkeypatch, capsys):
    """The reloaded student's scores are turned around on their way to the gate: exit code 3."""
    from evlecg import cli
    from evlecg.export import gate

    real, calls = gate.TorchScoring.__call__, []

    def turned(self, samples):
        calls.append(self)
        found = real(self, samples)
        return 1 - found if len(calls) == 1 else found  # the export is scored first

    monkeypatch.setattr(gate.TorchScoring, "__call__", turned)
    run = run_of(checkpoints["llava"], tmp_path / "run")
    monkeypatch.setattr(sys, "argv", ["evlecg", "export", str(run), "--data", str(synthetic), "--out",
                                      str(tmp_path / "out" / "student"), "-q"])  # fmt: skip
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 3 and "falls by" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_the_gate_allows_what_it_was_told_to_allow(synthetic, tmp_path):
    """Known scores: one pair of two records is swapped."""
    prepared = Prepared.open(synthetic)
    places = prepared.indices("val").tolist()
    truth_N = prepared.labels(places, ["NORM"])[:, 0]
    right = truth_N * 0.5 + np.linspace(0, 0.1, len(truth_N))
    worse = right.copy()
    worst_yes, best_no = np.flatnonzero(truth_N == 1)[0], np.flatnonzero(truth_N == 0)[-1]
    worse[[worst_yes, best_no]] = worse[[best_no, worst_yes]]
    lost = 100 / (truth_N.sum() * (1 - truth_N).sum())  # this pair is in the wrong order now, no other
    question = Question("?", "yes", ("yes", "no"), "NORM")

    def gated(points: float):
        return prove(
            lambda records: lambda samples: right[:, None], lambda records: lambda samples: worse[:, None], [question],
            TrainedWith(), data=synthetic, max_drop_points=points, most_records=99, where=tmp_path,
        )  # fmt: skip

    proof = gated(lost + 1e-9)
    assert proof.original["NORM"] == 1 and proof.worst[1] == pytest.approx(lost)
    assert proof.drop.value == pytest.approx(-lost / 100)
    with pytest.raises(NotAsGood, match=r"NORM|macro") as caught:
        gated(lost - 1e-3)
    assert caught.value.exit_code == 3


def test_shards_dtype_and_bytes(checkpoints, tmp_path):
    run = run_of(checkpoints["llava"], tmp_path / "run")
    for name in ("one", "two"):
        export(run, out=tmp_path / name, max_shard_size="60KB", dtype="fp16")
    first = tmp_path / "one"
    shards = sorted(first.glob("model-*.safetensors"))
    assert len(shards) > 1 and {"generation_config.json", "chat_template.jinja"} <= {
        path.name for path in first.iterdir()
    }
    assert {value.dtype for path in shards for value in load_file(path).values()} == {torch.float16}
    sums = [json.loads((tmp_path / name / "manifest.json").read_text())["sha256"] for name in ("one", "two")]
    assert sums[0] == sums[1] and set(check_manifest(first)) == {path.name for path in first.iterdir()} - {
        "manifest.json"
    }


def test_adapters_are_merged(checkpoints, synthetic, tmp_path):
    sets = ["train.max_steps=1", "data.labels=[NORM]", "train.batch_size=4", "lora.rank=2", "log.figures=false"]
    recipe = load_recipe(None, {"teacher": "none", "student": str(checkpoints["llava"])} | parse_set(sets))
    distill(recipe, data=synthetic, out=tmp_path / "run")
    result = export(tmp_path / "run", out=tmp_path / "export")
    plain, merged = load_file(checkpoints["llava"] / "model.safetensors"), load_file(result.weights)
    assert set(plain) == set(merged) and result.max_logit_difference == 0
    assert any(not torch.equal(plain[name], merged[name]) for name in plain if "q_proj" in name)


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of a model hub as an upload asks for."""

    seen: ClassVar[list[tuple[str, dict]]] = []

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        lines = [json.loads(line) for line in body.splitlines() if line.strip()]
        type(self).seen.append((self.path, {"lines": lines}))
        if self.path.endswith("/repos/create"):
            answer = {"url": f"http://{self.headers['Host']}/me/student", "name": "me/student"}
        elif "/preupload/" in self.path:
            answer = {"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                                for file in lines[0]["files"]]}  # fmt: skip
        else:
            answer = {"commitUrl": f"http://{self.headers['Host']}/me/student/commit/abc", "commitOid": "abc",
                      "pullRequestUrl": None, "success": True}  # fmt: skip
        self._answer(answer)

    def do_GET(self):
        type(self).seen.append((self.path, {}))
        self._answer({"id": "me/student", "sha": "0" * 40, "siblings": [], "private": True, "xetEnabled": False})

    def _answer(self, tree: dict) -> None:
        content = json.dumps(tree).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments):
        pass


PUSH = (
    "import sys; from pathlib import Path; from evlecg.export import push; print(push(Path(sys.argv[1]), 'me/student'))"
)


def test_a_push_uploads_every_file(tmp_path):
    folder = tmp_path / "student"
    folder.mkdir()
    files = {"config.json": "{}", "README.md": "---\ntags: [ecg]\n---\n", "model.txt": "weights"}
    for name, text in files.items():
        (folder / name).write_text(text)
    write_manifest(folder)
    Hub.seen.clear()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    here = f"http://127.0.0.1:{server.server_address[1]}"
    environment = {**os.environ, "HF_ENDPOINT": here, "HF_TOKEN": "hf_stand_in", "HF_HUB_DISABLE_XET": "1",
                   "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1", "PYTHONPATH": str(ROOT)}  # fmt: skip
    environment.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, "-c", PUSH, str(folder)]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.strip().splitlines()[-1] == f"{here}/me/student/commit/abc"
        made = next(body for path, body in Hub.seen if path.endswith("/repos/create"))["lines"][0]
        assert made.get("visibility", "private") == "private" and made.get("private", True) is True
        commit = next(body for path, body in Hub.seen if "/commit/" in path)["lines"]
        sent = {
            line["value"]["path"]: base64.b64decode(line["value"]["content"])
            for line in commit
            if line["key"] == "file"
        }
        assert set(sent) == {*files, "manifest.json"} and sent["model.txt"] == b"weights"
        before = len(Hub.seen)
        (folder / "model.txt").write_text("other")  # changed since it was exported: not a byte leaves
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode and "not the one that was exported" in done.stderr and len(Hub.seen) == before
    finally:
        server.shutdown()


def test_formats_that_a_family_cannot_have_are_refused(checkpoints, tmp_path, monkeypatch):
    llava = run_of(checkpoints["llava"], tmp_path / "run")
    with pytest.raises(EvlecgError, match="no vision part for 'llava'"):
        export(llava, out=tmp_path / "x", format="gguf")
    with pytest.raises(EvlecgError, match="onnx cannot be bfloat16"):
        export(llava, out=tmp_path / "x", format="onnx", dtype="bf16")
    with pytest.raises(EvlecgError, match="calibrated on records"):
        export(llava, out=tmp_path / "x", format="onnx", dtype="int8-static")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EvlecgError, match=r"pip install 'evlecg\[onnx\]'"):
        export(llava, out=tmp_path / "x", format="onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_gguf_says_what_is_left_to_do(checkpoints, tmp_path, monkeypatch):
    run = run_of(checkpoints["idefics3"], tmp_path / "run")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    result = export(run, out=tmp_path / "out", format="gguf", dtype="int4")
    assert len(result.commands) == 3 and "--mmproj" in result.commands[1] and "Q4_K_M" in result.commands[2]
    assert all(command in (tmp_path / "out" / "README.md").read_text() for command in result.commands)
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / "convert_hf_to_gguf.py"  # stands in for llama.cpp's: writes what it was asked for
    script.write_text("import sys; open(sys.argv[sys.argv.index('--outfile') + 1], 'w').write(' '.join(sys.argv[3:]))")
    script.chmod(0o755)
    result = export(run, out=tmp_path / "done", format="gguf", dtype="fp16")
    assert not result.commands
    assert {path.name for path in (tmp_path / "done").glob("*.gguf")} == {"model-f16.gguf", "mmproj-f16.gguf"}


@pytest.mark.slow
def test_the_cost_card_measures_student_and_export(checkpoints, synthetic, tmp_path):
    run = run_of(checkpoints["llava"], tmp_path / "run", teacher="nobody/such-teacher")
    result = export(run, out=tmp_path / "out", data=synthetic, cost=True)
    teacher, student, exported = result.prices
    assert teacher.failed and not teacher.latency_ms
    for price in (student, exported):
        assert not price.failed and set(price.latency_ms) == {"1", "2"} and price.peak_memory_bytes > 1e7
        assert all(0 < price.latency_ms[n] <= price.latency_p95_ms[n] for n in ("1", "2"))
        assert price.parameters == result.n_parameters and price.disk_bytes > 4 * result.n_parameters
        assert price.flops > 2 * result.n_parameters
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{student.latency_ms['1']:.1f} (p95" in card and "config cannot be read" in card
    assert json.loads((tmp_path / "out" / "cost.json").read_text())[1]["latency_ms"] == student.latency_ms
