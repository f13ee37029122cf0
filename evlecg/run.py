"""Runs an exported student without torch: a signal in, a probability for every label out.

    student = evlecg.load("student-onnx")
    student.predict(signal_mV, fs_hz)      # signal [12, samples] in mV -> {"NORM": 0.93, "MI": 0.02, ...}

    python -m evlecg.run student-onnx record.hea

Needs onnxruntime (or openvino, where the artifact is one of its), numpy, scipy, opencv-python-headless, pyyaml and
wfdb; neither torch nor transformers: prompts are token ids in runner.json, and the graphs take pages as they are drawn.
The artifact is compared with its manifest before anything of it is read.

The likelihood of an answer is what `models/score.py` says it is: the product of its tokens' probabilities given page
and question. The page and what all questions share is read once; the questions follow it as one batch behind a copy of
its cache.

Shape legend: B records, L leads (always 12), T time samples, H and W page rows and columns, A texts (one a question
where every answer is one token, else one an answer), S positions of the shared prefix, M of the longest text behind it,
V vocabulary, D width.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from evlecg.errors import EvlecgError
from evlecg.files import sha256_file
from evlecg.page.render import PageStyle, render
from evlecg.page.trace import TraceForm, trace
from evlecg.schema import LEADS

MANIFEST, RUNNER = "manifest.json", "runner.json"
INSTALL = {"onnx": "onnxruntime", "openvino": "openvino"}
RUNNER_VERSION = 1


def check_manifest(folder: Path) -> dict[str, str]:
    """Compares every file that the manifest names with its SHA-256.

    Returns:
        File name -> hex SHA-256.

    Raises:
        EvlecgError: there is no manifest, or a file is missing or is another one.
    """
    path = folder / MANIFEST
    try:
        sums = json.loads(path.read_text(encoding="utf-8"))["sha256"]
        names = list(sums.items())
    except OSError as error:
        raise EvlecgError(
            "the folder holds no exported student", where=folder, hint="evlecg export RUN --out DIR"
        ) from error
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise EvlecgError("the manifest is damaged", where=path, hint="export the student again") from error
    for name, wanted in names:
        file = folder / name
        if not file.resolve().is_relative_to(folder.resolve()) or not file.is_file():
            raise EvlecgError("a file that the manifest names is missing", where=file, hint="copy the whole folder")
        if sha256_file(file) != wanted:
            raise EvlecgError("a file is not the one that was exported", where=file,
                              hint="its SHA-256 differs from the manifest's; copy or export it again")  # fmt: skip
    return sums


def write_manifest(folder: Path) -> None:
    """Writes the SHA-256 of every file of a folder beside them."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    sums = {path.relative_to(folder).as_posix(): sha256_file(path) for path in files}
    (folder / MANIFEST).write_text(json.dumps({"sha256": sums}, indent=2) + "\n", encoding="utf-8")


def load(artifact: str | Path, *, threads: int | None = None) -> Student:
    """Opens an exported student.

    Args:
        artifact: folder that `evlecg export --format onnx` or `openvino` wrote.
        threads: for its arithmetic; None: as many as the runtime likes.

    Raises:
        EvlecgError: not such a folder, one that was changed since, or a missing package.
    """
    folder = Path(artifact)
    sums = check_manifest(folder)
    if RUNNER not in sums:
        raise EvlecgError("this artifact is not for the runner", where=folder,
                          hint="evlecg export RUN --format onnx; safetensors are loaded with transformers")  # fmt: skip
    return open_student(folder, threads=threads)


def open_student(folder: Path, *, threads: int | None = None) -> Student:
    """`load` without the manifest: for a folder that is being written."""
    told = json.loads((folder / RUNNER).read_text(encoding="utf-8"))
    if told.get("version") != RUNNER_VERSION:
        raise EvlecgError(f"runner.json is of version {told.get('version')}, this is {RUNNER_VERSION}", where=folder,
                          hint="use the evlecg that exported it, or export it again")  # fmt: skip
    graphs = {name: _open(told["runtime"], folder / file, threads) for name, file in told["graphs"].items()}
    return Student(told, graphs)


class Graph(Protocol):
    """A graph in its runtime."""

    def __call__(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Inputs by name -> outputs by name."""
        ...


class _OnnxGraph:
    def __init__(self, path: Path, threads: int | None) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors; warnings are about nodes that it puts where they belong
        if threads is not None:
            options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.names = [output.name for output in self.session.get_outputs()]
        # a graph of half precision wants its inputs so, and gives single precision
        self.halves = {value.name for value in self.session.get_inputs() if value.type == "tensor(float16)"}

    def __call__(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        fed = {name: value.astype(np.float16) if name in self.halves else value for name, value in feed.items()}
        found: Any = self.session.run(None, fed)
        return dict(zip(self.names, found, strict=True))


class _OpenvinoGraph:
    def __init__(self, path: Path, threads: int | None) -> None:
        import openvino  # type: ignore[import-not-found]

        core = openvino.Core()
        settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
        if threads is not None:
            settings["INFERENCE_NUM_THREADS"] = threads
        self.compiled = core.compile_model(core.read_model(str(path)), "CPU", settings)

    def __call__(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        found = self.compiled(dict(feed))
        return {output.get_any_name(): np.array(found[output]) for output in self.compiled.outputs}


RUNTIMES: dict[str, Any] = {"onnx": _OnnxGraph, "openvino": _OpenvinoGraph}


def _open(runtime: str, path: Path, threads: int | None) -> Graph:
    if runtime not in RUNTIMES:
        raise EvlecgError(f"no runtime {runtime!r}", where=path)
    try:
        return RUNTIMES[runtime](path, threads)
    except ImportError as error:
        package = INSTALL[runtime]
        raise EvlecgError(f"the package {package} is missing", hint=f"pip install {package}") from error


@dataclass(frozen=True)
class _Text:
    """What follows the shared prefix in one text.

    Attributes:
        question: place of its question.
        choice: place of the answer whose likelihood it gives; -1: all answers are one token each, at the same place.
        ids: its tokens.
        positions: of those tokens, [axes, tokens].
        predicts: (position in the text, id of the token it predicts) of every token of the answer; of all answers.
    """

    question: int
    choice: int
    ids: tuple[int, ...]
    positions: np.ndarray
    predicts: tuple[tuple[int, int], ...]


class Student:
    """An exported student in its runtime.

    Attributes:
        told: runner.json.
        labels: label codes that it answers, in its order.
    """

    def __init__(self, told: dict[str, Any], graphs: dict[str, Graph]) -> None:
        self.told = told
        self.graphs = graphs
        self.kind: str = told["kind"]
        self.labels: tuple[str, ...] = tuple(told["labels"])
        self.style = PageStyle(**told["page"]) if told["page"] else None
        self.size_px = tuple(told["size_px"]) if told["size_px"] else None
        self.form = TraceForm(**told["form"] | {"band_hz": tuple(told["form"]["band_hz"])}) if told["form"] else None
        if self.kind == "text":
            self._read_prompt(told["prompt"])

    def predict(self, signal_mV_LT: np.ndarray, fs_hz: float) -> dict[str, float]:
        """Probabilities of all labels.

        Args:
            signal_mV_LT: [12, T], leads in the order of `evlecg.schema.LEADS` (I, II, III, aVR, aVL, aVF, V1 to V6),
                millivolt, finite; the first ten seconds are looked at.
            fs_hz: samples a second.

        Raises:
            EvlecgError: wrong shape, values that are not finite.
        """
        view = self.draw(signal_mV_LT, fs_hz)
        return dict(zip(self.labels, (float(score) for score in self.scores([view])[0]), strict=True))

    def draw(self, signal_mV_LT: np.ndarray, fs_hz: float) -> Any:
        """What the student sees of a signal: a `Page`, or a `Trace`."""
        if self.form is not None:
            return trace(signal_mV_LT, fs_hz, self.form)
        assert self.size_px is not None
        return render(signal_mV_LT, fs_hz, size_px=self.size_px, style=self.style)

    def scores(self, views: Sequence[Any]) -> np.ndarray:
        """Probabilities [B, labels] of pages or traces."""
        logits_BK2 = self.logits(views)
        shifted = np.exp(logits_BK2 - logits_BK2.max(-1, keepdims=True))
        return shifted[..., 0] / shifted.sum(-1)

    def logits(self, views: Sequence[Any]) -> np.ndarray:
        """Log likelihoods (up to a constant) of yes and no, float64 [B, labels, 2]."""
        if self.kind == "text":
            return self._likelihoods(np.stack([page.pixels for page in views]))
        if self.form is not None:
            feed: dict[str, np.ndarray] = {"signal": np.stack([view.signal_LT for view in views]).astype(np.float32)}
            if self.told["reads_n_recorded"]:
                feed["n_recorded"] = np.array([view.n_recorded for view in views], np.int64)
        else:
            feed = {"page": np.stack([page.pixels for page in views])}
        logits_BC = self.graphs["classifier"](feed)["logits"].astype(np.float64)
        yes_BK = logits_BC[:, self.told["rows"]]
        no_BK = np.zeros_like(yes_BK)
        if self.told["exclusive"]:  # the others' logsumexp, so that softmax is the class's share
            for column, row in enumerate(self.told["rows"]):
                others = np.delete(logits_BC, row, axis=1)
                top_B1 = others.max(1, keepdims=True)
                no_BK[:, column] = (top_B1 + np.log(np.exp(others - top_B1).sum(1, keepdims=True)))[:, 0]
        return np.stack([yes_BK, no_BK], -1)

    def _read_prompt(self, prompt: dict[str, Any]) -> None:
        texts = []
        for text in prompt["texts"]:
            predicts = tuple((int(place), int(token)) for place, token in text["predicts"])
            texts.append(_Text(text["question"], text["choice"], tuple(text["ids"]),
                               np.array(text["positions"], np.int64), predicts))  # fmt: skip
        self._texts: tuple[_Text, ...] = tuple(texts)
        self._image_S = np.array(prompt["prefix_ids"]) == prompt["image_token_id"]
        self._prefix_positions = np.array(prompt["prefix_positions"], np.int64)  # [axes, S]
        self._prefix_1SD = self._embedded([prompt["prefix_ids"]])
        longest = max(len(text.ids) for text in texts)
        self._texts_AMD = self._embedded(
            [[*text.ids, *[prompt["pad_id"]] * (longest - len(text.ids))] for text in texts]
        )
        places = [np.pad(text.positions, ((0, 0), (0, longest - len(text.ids)))) for text in texts]
        self._text_positions = np.stack(places, 1)  # [axes, A, M]
        self._keep = np.array(sorted({place for text in texts for place, _ in text.predicts}), np.int64)

    def _embedded(self, ids: Sequence[Sequence[int]]) -> np.ndarray:
        return self.graphs["embed"]({"input_ids": np.array(ids, np.int64)})["embeds"]

    def _decoded(
        self, embeds_BTD: np.ndarray, positions: np.ndarray, keep: np.ndarray, past: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Runs the decoder behind a cache. `positions` are [axes, B, T]."""
        rows, n_new = embeds_BTD.shape[:2]
        n_past = next(iter(past.values())).shape[2]
        return self.graphs["decoder"]({
            "embeds": embeds_BTD,
            "attention_mask": np.ones((rows, n_past + n_new), np.int64),
            "position_ids": positions if self.told["prompt"]["position_axes"] == 3 else positions[0],
            "keep": keep,
            **past,
        })  # fmt: skip

    def _likelihoods(self, page_BHW3: np.ndarray) -> np.ndarray:
        """Log likelihoods of the choices of every question, float64 [B, questions, 2]."""
        rows, n_texts = len(page_BHW3), len(self._texts)
        embeds = np.repeat(self._prefix_1SD, rows, axis=0)
        embeds[:, self._image_S] = self.graphs["vision"]({"page": page_BHW3})["visual"]
        empty = {
            f"past_{layer}_{name}": np.zeros((rows, heads, 0, width), np.float32)
            for layer, (heads, *widths) in enumerate(self.told["prompt"]["cache"])
            for name, width in zip(("key", "value"), widths, strict=True)
        }
        prefix = self._decoded(
            embeds, np.repeat(self._prefix_positions[:, None], rows, 1), np.zeros(1, np.int64), empty
        )
        past = {
            name.replace("present", "past"): np.repeat(value, n_texts, axis=0)
            for name, value in prefix.items() if name.startswith("present")
        }  # fmt: skip
        found = self._decoded(
            np.tile(self._texts_AMD, (rows, 1, 1)), np.tile(self._text_positions, (1, rows, 1)), self._keep, past
        )["logits"].astype(np.float64)
        top = found.max(-1, keepdims=True)
        logp = (found - top - np.log(np.exp(found - top).sum(-1, keepdims=True))).reshape(
            rows, n_texts, *found.shape[1:]
        )
        kept = {int(place): column for column, place in enumerate(self._keep)}
        result = np.zeros((rows, len(self.labels), 2))
        for number, text in enumerate(self._texts):
            tokens = [logp[:, number, kept[place], token] for place, token in text.predicts]
            if text.choice < 0:
                result[:, text.question] = np.stack(tokens, -1)
            else:
                result[:, text.question, text.choice] = np.sum(tokens, axis=0)
        return result


def read_record(path: Path) -> tuple[np.ndarray, float]:
    """A WFDB record as the runner wants it: [12, T] in millivolt in the order of `LEADS`, samples a second.

    Raises:
        EvlecgError: it cannot be read, or is no 12-lead ECG.
    """
    from evlecg.data.gates import Unfit, mend
    from evlecg.data.readers_base import Source
    from evlecg.data.readers_wfdb import read_header, read_signal

    try:
        source = Source(path.resolve().parent)
        header = read_header(source, path.with_suffix(".hea").name)
        raw = read_signal(source, header)
        signal_mV = mend(raw.values, raw.leads, raw.units, header.fs_hz).signal_mV
    except (Unfit, OSError, ValueError) as error:
        raise EvlecgError(
            f"the record cannot be used: {error}", where=path, hint=f"12 leads: {', '.join(LEADS)}"
        ) from error
    return signal_mV, header.fs_hz


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m evlecg.run ARTIFACT RECORD.hea`: a line a label, the likeliest first."""
    import argparse

    parser = argparse.ArgumentParser(prog="python -m evlecg.run", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("artifact", type=Path, help="folder that evlecg export --format onnx wrote")
    parser.add_argument("record", type=Path, nargs="+", help="WFDB header (.hea)")
    parser.add_argument("--threads", type=int, help="for the arithmetic (default: as the runtime likes)")
    parser.add_argument("--json", action="store_true", help="one JSON object a record")
    given = parser.parse_args(arguments)
    try:
        student = load(given.artifact, threads=given.threads)
        for path in given.record:
            found = student.predict(*read_record(path))
            if given.json:
                print(json.dumps({"record": str(path), "probabilities": found}))
                continue
            print(path)
            for label, score in sorted(found.items(), key=lambda pair: -pair[1]):
                print(f"  {score:6.1%}  {label:<10} {student.told['phrases'].get(label, '')}".rstrip())
        print("Not a medical device.", file=sys.stderr)
    except EvlecgError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
