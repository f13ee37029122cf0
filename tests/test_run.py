"""The runner: an exported student in a process without torch, its manifest, and what it does with bad input."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import evlecg
from evlecg.data.synthetic import generate
from evlecg.errors import EvlecgError
from evlecg.run import RUNNER, Student, check_manifest, main, write_manifest

ROOT = Path(__file__).resolve().parents[1]
N_LABELS, WIDTH, VOCABULARY = 3, 4, 7

# as on a device: what is not installed there cannot be imported
WITHOUT_TORCH = """
import sys
ABSENT = {"torch", "torchvision", "transformers", "tokenizers", "safetensors", "sklearn", "peft"}
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ABSENT:
            raise ImportError(f"{name} is not installed on this device")
sys.meta_path.insert(0, Absent())
from evlecg.run import main
code = main(sys.argv[1:])
assert "torch" not in sys.modules
sys.exit(code)
"""


def in_a_process_without_torch(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", WITHOUT_TORCH, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


@pytest.fixture(scope="module")
def record(tmp_path_factory) -> Path:
    """A synthetic ECG as a WFDB record, with its leads in another order than ours."""
    import wfdb

    made = next(generate({"test": 1}, seed=5))
    folder = tmp_path_factory.mktemp("record")
    names = ["V6", "V5", "V4", "V3", "V2", "V1", "aVF", "aVL", "aVR", "III", "II", "I"]
    wfdb.wrsamp("ecg", fs=made.fs_hz, units=["mV"] * 12, sig_name=names, p_signal=made.signal_mV[::-1].T.astype(float),
                fmt=["16"] * 12, write_dir=str(folder))  # fmt: skip
    np.save(folder / "signal.npy", made.signal_mV)
    (folder / "fs").write_text(str(made.fs_hz))
    return folder / "ecg.hea"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory) -> Path:
    """A classifier of signals that was written with onnx alone: logits are what three leads are on average."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    folder = tmp_path_factory.mktemp("artifact")
    pick = np.zeros((12, N_LABELS), np.float32)
    pick[[0, 1, 11], [0, 1, 2]] = 10
    graph = helper.make_graph(
        [helper.make_node("ReduceMean", ["signal", "axis"], ["mean"], keepdims=0),
         helper.make_node("MatMul", ["mean", "pick"], ["logits"])],
        "g", [helper.make_tensor_value_info("signal", TensorProto.FLOAT, ["batch", 12, 500])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", N_LABELS])],
        [numpy_helper.from_array(pick, "pick"), numpy_helper.from_array(np.array([2], np.int64), "axis")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, folder / "classifier.onnx")
    told = {
        "version": 1, "runtime": "onnx", "kind": "signal", "graphs": {"classifier": "classifier.onnx"},
        "labels": ["A", "B", "C"], "phrases": {"A": "the first"}, "page": None, "size_px": None,
        "form": {"fs_hz": 50.0, "n_samples": 500, "leads": "channels", "scale": "none", "band_hz": [0.0, 0.0]},
        "rows": [0, 1, 2], "exclusive": False, "reads_n_recorded": False,
    }  # fmt: skip
    (folder / RUNNER).write_text(json.dumps(told))
    write_manifest(folder)
    return folder


def test_a_record_is_read_and_answered_without_torch(artifact, record):
    done = in_a_process_without_torch(artifact, record, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["probabilities"]
    student = evlecg.load(artifact, threads=1)
    signal_mV, fs_hz = np.load(record.parent / "signal.npy"), float((record.parent / "fs").read_text())
    here = student.predict(signal_mV, fs_hz)
    assert list(found) == ["A", "B", "C"]
    np.testing.assert_allclose(list(found.values()), list(here.values()), atol=2e-3)  # steps of a WFDB record
    seen = student.draw(signal_mV, fs_hz).signal_LT
    wanted = 1 / (1 + np.exp(-10 * seen[[0, 1, 11]].mean(1)))
    np.testing.assert_allclose(list(here.values()), wanted, rtol=1e-5)


def test_it_tells_a_reader(artifact, record):
    done = in_a_process_without_torch(artifact, record, record)
    assert done.returncode == 0 and done.stdout.count("the first") == 2 and "Not a medical device" in done.stderr


def test_importing_evlecg_loads_neither_torch_nor_numpy():
    code = "import evlecg, sys; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("name", ["classifier.onnx", RUNNER])
def test_a_file_that_was_changed_is_refused(artifact, record, tmp_path, name, capsys):
    shutil.copytree(artifact, tmp_path / "copy")
    path = tmp_path / "copy" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert main([str(tmp_path / "copy"), str(record)]) == 2
    assert f"not the one that was exported [{path}]" in capsys.readouterr().err


def test_bad_folders_are_refused(artifact, tmp_path):
    with pytest.raises(EvlecgError, match="no exported student"):
        evlecg.load(tmp_path)
    shutil.copytree(artifact, tmp_path / "copy")
    (tmp_path / "copy" / "classifier.onnx").unlink()
    with pytest.raises(EvlecgError, match="is missing"):
        check_manifest(tmp_path / "copy")
    (tmp_path / "copy" / "manifest.json").write_text(json.dumps({"sha256": {"../copy2": "0"}}))
    (tmp_path / "copy2").write_text("x")
    with pytest.raises(EvlecgError, match="is missing"):  # a manifest that leads out of its folder
        check_manifest(tmp_path / "copy")
    (tmp_path / "copy" / "manifest.json").write_text("[]")
    with pytest.raises(EvlecgError, match="damaged"):
        check_manifest(tmp_path / "copy")
    shutil.copytree(artifact, tmp_path / "newer")
    told = json.loads((tmp_path / "newer" / RUNNER).read_text()) | {"version": 99}
    (tmp_path / "newer" / RUNNER).write_text(json.dumps(told))
    write_manifest(tmp_path / "newer")
    with pytest.raises(EvlecgError, match="version 99"):
        evlecg.load(tmp_path / "newer")


def test_bad_records_are_refused(artifact, tmp_path, capsys):
    (tmp_path / "x.hea").write_text("x 2 500 100\nx.dat 16 200 16 0 0 0 0 I\nx.dat 16 200 16 0 0 0 0 II\n")
    assert main([str(artifact), str(tmp_path / "x.hea")]) == 2
    assert main([str(artifact), str(tmp_path / "nothing.hea")]) == 2
    assert capsys.readouterr().err.count("cannot be used") == 2
    with pytest.raises(EvlecgError, match=r"\[12, samples\]"):
        evlecg.load(artifact).predict(np.zeros((3, 100)), 100)


def test_a_missing_runtime_is_one_line(artifact, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(EvlecgError, match="pip install onnxruntime"):
        evlecg.load(artifact)


class Decoder:
    """A decoder that is easy to follow: a position's state is the sum of all embeddings up to it, its own included."""

    def __init__(self, head: np.ndarray) -> None:
        self.head, self.rows = head, []

    def __call__(self, feed):
        embeds, past = feed["embeds"], feed["past_0_key"][:, 0]
        rows, n_new, _ = embeds.shape
        assert feed["attention_mask"].shape == (rows, past.shape[1] + n_new)
        assert (feed["position_ids"][:, 0] == past.shape[1]).all()
        self.rows.append((rows, past.shape[1], n_new))
        keys = np.concatenate([past, embeds], 1)
        states = np.cumsum(keys, 1)[:, past.shape[1] :]
        return {
            "logits": states[:, feed["keep"]] @ self.head,
            "present_0_key": keys[:, None],
            "present_0_value": keys[:, None],
        }


def text_student(texts: list[dict], labels: list[str]) -> tuple[Student, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    table, head = generator.normal(size=(9, WIDTH)), generator.normal(size=(WIDTH, VOCABULARY))
    told = {
        "kind": "text", "labels": labels, "page": {}, "size_px": [6, 4], "form": None,
        "prompt": {"prefix_ids": [1, 8, 8, 2], "prefix_positions": [[0, 1, 2, 3]], "image_token_id": 8, "pad_id": 0,
                   "texts": texts, "cache": [[1, WIDTH, WIDTH]], "position_axes": 2},
    }  # fmt: skip
    graphs = {
        "vision": lambda feed: {"visual": feed["page"][:, :2, :1, 0].astype(float) / 255 + np.zeros((1, 1, WIDTH))},
        "embed": lambda feed: {"embeds": table[feed["input_ids"]]},
        "decoder": Decoder(head),
    }
    return Student(told, graphs), table, head


def naive_log_likelihood(table, head, visual_ND, prefix, ids, predicts):
    """One pass over the whole row, no cache, no batch."""
    embeds = table[[*prefix, *ids]].copy()
    embeds[1:3] = visual_ND
    states = np.cumsum(embeds, 0)[len(prefix) :]
    total = 0.0
    for place, token in predicts:
        logits = states[place] @ head
        total += logits[token] - np.log(np.exp(logits).sum())
    return total


def test_likelihoods_are_those_of_whole_rows():
    """Questions of different lengths, answers of one token and of several, two pages at once."""
    texts = [
        {"question": 0, "choice": -1, "ids": [3, 4], "positions": [[4, 5]], "predicts": [[0, 5], [0, 6]]},
        {"question": 1, "choice": 0, "ids": [3, 5, 6, 1], "positions": [[4, 5, 6, 7]], "predicts": [[1, 6], [2, 1]]},
        {"question": 1, "choice": 1, "ids": [3, 5, 2], "positions": [[4, 5, 6]], "predicts": [[1, 2]]},
    ]
    student, table, head = text_student(texts, ["A", "B"])
    pages = [type("P", (), {"pixels": np.full((4, 6, 3), tone, np.uint8)}) for tone in (40, 200)]
    found = student.logits(pages)
    assert found.shape == (2, 2, 2)
    assert student.graphs["decoder"].rows == [(2, 0, 4), (6, 4, 4)]  # the page is read once
    for row, tone in enumerate((40, 200)):
        visual_ND = np.full((2, WIDTH), tone / 255)
        for text in texts:
            each = [[(0, 5)], [(0, 6)]] if text["choice"] < 0 else [text["predicts"]]
            for choice, predicts in enumerate(each, start=max(text["choice"], 0)):
                wanted = naive_log_likelihood(table, head, visual_ND, [1, 8, 8, 2], text["ids"], predicts)
                np.testing.assert_allclose(found[row, text["question"], choice], wanted, rtol=1e-9)
    np.testing.assert_allclose(student.scores(pages), np.exp(found[..., 0]) / np.exp(found).sum(-1), rtol=1e-9)


def test_classes_that_exclude_one_another_share_one():
    told = {"kind": "image", "labels": ["B", "C"], "page": {}, "size_px": [2, 2], "form": None, "rows": [1, 2],
            "exclusive": True}  # fmt: skip
    logits = np.array([[0.3, -1.0, 2.0]])
    student = Student(told, {"classifier": lambda feed: {"logits": logits}})
    page = type("P", (), {"pixels": np.zeros((2, 2, 3), np.uint8)})
    shares = np.exp(logits) / np.exp(logits).sum()
    np.testing.assert_allclose(student.scores([page]), shares[:, 1:], rtol=1e-12)
