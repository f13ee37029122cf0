"""What the teacher cache takes, loses and saves, on the built-in pair and synthetic records.

    python -m tests.bench.cache [--part bytes|epoch|auc] [--train N] [--epochs N] [--seeds N] [--json FILE]

bytes: per record and compression, the error of every field and of the losses, each against the live teacher. Answers
are kept as states that the teacher's head reads; beside them, what the 50 largest logits and an even rest would lose.
epoch: the time of a record in a cached epoch, loading included, against plain fine-tuning and against a live teacher;
the three take turns in one process, in processor time. Target: cached at most 1.15 times fine-tuning alone.
auc: whole runs from the same seeds, the teacher live or out of the cache as it is by default.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evlecg.data.store import Prepared
from evlecg.data.tasks import label_samples
from evlecg.losses.objective import METHODS, needs_of
from evlecg.models import load as models
from evlecg.models.batch import BatchBuilder
from evlecg.models.encode import Encoder
from evlecg.models.outputs import AnswerHead, forward
from evlecg.models.vocabulary import token_bytes
from evlecg.page.render import PageStyle
from evlecg.prepare import prepare
from evlecg.recipe import ObjectiveConfig, load_recipe
from evlecg.schema import AnswerLogits, Outputs
from evlecg.teacher import COMPRESSIONS, FolderStore, LiveTeacher, StoredSides, StoredTeacher
from evlecg.teacher.rows import split_outputs, split_side
from evlecg.teacher.store import Entry
from evlecg.training.cache import facts_of, row_keys
from tests.bench.timing import one_thread, print_table, save, timed, told

LABELS = ("NORM", "MI", "STTC", "CD", "HYP")
FIELDS = ("hidden", "visual", "projected", "answer")
BATCH = 16
TARGET = 1.15
TOP_K = 50
QUICKSTART = load_recipe("quickstart").objective
ALL_TERMS = dataclasses.replace(QUICKSTART, lambda_m=0.1, lambda_r=1.0, lambda_ot=0.1)
LOSSES = {"evl": ALL_TERMS, "kl": ObjectiveConfig(), "uld": ObjectiveConfig(), "feature": ObjectiveConfig()}


class Pair:
    """The built-in pair, its records, and the teacher's answers to all of them in every kind of store."""

    def __init__(self, data: Path, work: Path, n_records: int) -> None:
        self.prepared = Prepared.open(data)
        indices = self.prepared.indices("train")[:n_records].tolist()
        samples = label_samples(self.prepared, indices, LABELS, "Does this ECG show {description}?")
        self.student = models.load(models.inspect("builtin:student"), seed=0)
        self.teacher = models.load(models.inspect("builtin:teacher"))
        encoders = [Encoder(loaded.checkpoint, loaded.processor) for loaded in (self.student, self.teacher)]
        self.builder = BatchBuilder(self.prepared, samples, PageStyle(), encoders[0], encoders[1], packed=True)
        self.live = LiveTeacher(self.teacher, visual_layer=-1)
        self.facts = facts_of(self.teacher, self.live, self.builder, {})
        self.keys = [row_keys(self.prepared, sample, True) for sample in samples]
        self.stores: dict[str, FolderStore] = {}
        entries = []
        for start in range(0, len(samples), BATCH):
            side, layouts = self.builder.teacher_half(range(start, min(start + BATCH, len(samples))))
            rows = zip(split_side(side, layouts), split_outputs(self.live.of(side), FIELDS), strict=True)
            entries += [Entry(key, *row) for (key,), row in zip(self.keys[start:], rows, strict=False)]
        for compression in COMPRESSIONS:
            store = self.stores[compression] = FolderStore.open(work / compression, {}, compression)
            store.start(self.facts)
            store.add(entries)

    def facts_with_tokens(self) -> list[Any]:
        both = ((self.student, self.builder.student), (self.teacher, self.builder.teacher))
        return [dataclasses.replace(one.facts, tokens=token_bytes(one, encoder)) for one, encoder in both]

    def stored(self, compression: str, fields: tuple[str, ...] = FIELDS) -> tuple[BatchBuilder, StoredTeacher]:
        store = self.stores[compression]
        sides = StoredSides(store, self.keys, self.facts)
        head = AnswerHead(self.teacher) if "answer" in fields else None
        return (
            dataclasses.replace(self.builder, teacher=None, stored=sides),
            StoredTeacher(store, fields, self.facts, head),
        )

    def indices(self, number: int) -> range:
        start = number * BATCH % (len(self.keys) - BATCH + 1)
        return range(start, start + BATCH)


def top_k_only(logits_AV: Tensor) -> Tensor:
    """Logits of which the largest `TOP_K` are known, and how much all others come to."""
    top_Ak, place_Ak = logits_AV.topk(TOP_K, dim=-1)
    others_AV = logits_AV.scatter(1, place_Ak, -torch.inf)
    rest_A1 = others_AV.logsumexp(-1, keepdim=True) - torch.tensor(logits_AV.shape[1] - TOP_K).log()
    return rest_A1.expand_as(logits_AV).scatter(1, place_Ak, top_Ak)


def measure_bytes(pair: Pair) -> dict[str, Any]:
    """Bytes and errors of every compression."""
    rows: dict[str, Any] = {}
    facts, batches = pair.facts_with_tokens(), range(4)
    objectives = {}
    for name, config in LOSSES.items():
        torch.manual_seed(0)
        objectives[name] = METHODS[name](config, student=facts[0], teacher=facts[1])

    def losses(number: int, batch: Any, taught: Outputs) -> dict[str, float]:
        del number
        with torch.no_grad():
            outputs = forward(pair.student, batch.student)
            heads = {"output_head": AnswerHead(pair.student), "teacher_head": AnswerHead(pair.teacher)}
            found = {name: objective(outputs, taught, batch, **heads).values for name, objective in objectives.items()}
        return {f"{method}: {term}": float(value) for method, terms in found.items() for term, value in terms.items()
                if term != "ce"}  # fmt: skip

    live = [losses(n, batch := pair.builder(pair.indices(n)), pair.live(batch)) for n in batches]
    ways: dict[str, Any] = {name: pair.stored(name) for name in COMPRESSIONS}
    for name in (*ways, "top_k"):
        builder, signal = ways.get(name, (pair.builder, None))
        errors: dict[str, list[float]] = {}
        for n in batches:
            batch = builder(pair.indices(n))
            taught = signal(batch) if signal is not None else pair.live(batch)
            if signal is None:
                logits = AnswerLogits(top_k_only(taught.answer_logits_AV))
                taught = dataclasses.replace(taught, answer_logits=logits)
            for term, value in losses(n, batch, taught).items():
                errors.setdefault(term, []).append(abs(value - live[n][term]) / max(abs(live[n][term]), 1e-12))
        contents = pair.stores[name].contents() if signal is not None else None
        rows[name] = {
            "bytes_per_record": contents["bytes"] / contents["records"] if contents else None,
            "share_of_fp16": contents["share_of_fp16"] if contents else None,
            "fields": contents["fields"] if contents else None,
            "loss_error": {term: statistics.mean(values) for term, values in errors.items()},
        }
    print(f"{'':10} {'B/record':>9} {'of fp16':>8}  relative error of " + ", ".join(FIELDS))
    for name, row in rows.items():
        if row["fields"]:
            errors_told = "  ".join(f"{row['fields'][field]['relative_error']:8.2e}" for field in FIELDS)
            print(f"{name:10} {row['bytes_per_record']:9.0f} {row['share_of_fp16']:8.3f}  {errors_told}")
    print("\nrelative error of the loss, mean of 4 batches")
    print(f"{'':28}" + "".join(f"{name:>10}" for name in rows))
    for term in rows["none"]["loss_error"]:
        print(f"{term:28}" + "".join(f"{row['loss_error'][term]:10.1e}" for row in rows.values()))
    share = rows["low_rank"]["share_of_fp16"]
    print(f"{'met   ' if share <= 0.25 else 'MISSED'}  low_rank (default): {share:.3f} of fp16, at most 0.25")
    return rows


def measure_epoch(pair: Pair, rounds: int) -> dict[str, Any]:
    """Processor time of a batch, loading and step, in turns."""
    alone = dataclasses.replace(pair.builder, teacher=None)
    facts = [pair.student.facts, pair.teacher.facts]
    pair.student.model.train()

    def training(builder: BatchBuilder, signal: Any, method: str, config: ObjectiveConfig) -> Any:
        torch.manual_seed(0)
        objective = METHODS[method](config, student=facts[0], teacher=facts[1])
        parameters = [*pair.student.model.parameters(), *objective.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=1e-6)

        def step(number: int) -> None:
            batch = builder(pair.indices(number))
            outputs = forward(pair.student, batch.student)
            taught = signal(batch) if signal is not None else None
            objective(outputs, taught, batch, output_head=AnswerHead(pair.student)).total.backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    sft = "SFT-only"
    ways: dict[str, Any] = {sft: training(alone, None, "ce", QUICKSTART)}
    for name, config in (("quickstart", QUICKSTART), ("all terms", ALL_TERMS)):
        fields = tuple(field for field in FIELDS if field in needs_of("evl", config))
        ways[f"{name}, cached"] = training(*pair.stored("low_rank", fields), "evl", config)
        ways[f"{name}, live"] = training(pair.builder, pair.live, "evl", config)
    ways["uld, cached"] = training(*pair.stored("low_rank", ("answer",)), "uld", QUICKSTART)
    parts = {
        "  batch, SFT-only": lambda n: alone(pair.indices(n)),
        "  batch, live": lambda n: pair.builder(pair.indices(n)),
    }
    stored, _ = pair.stored("low_rank")
    parts["  batch, cached"] = lambda n: stored(pair.indices(n))
    batch = stored(pair.indices(0))
    signal = pair.stored("low_rank", ("visual",))[1]
    parts["  signal, cached (visual)"] = lambda n: signal(batch)
    rows = told(timed(ways | parts, rounds), sft)
    print_table(rows, sft)
    verdict = rows["quickstart, cached"]["ratio"]
    print(
        f"{'met   ' if verdict <= TARGET else 'MISSED'}  cached epoch: {verdict:.2f} of fine-tuning, at most {TARGET}"
    )
    return rows


def measure_auc(data: Path, work: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Macro AUC on the test split of runs that differ in the teacher's signal only."""
    from evlecg.distill import distill
    from evlecg.evaluate import evaluate

    rows: dict[str, list[float]] = {"live": [], "low_rank": []}
    for seed in range(given.seeds):
        for way, found in rows.items():
            keys: dict[str, Any] = {
                "seed": seed, "data.max_train": given.train, "train.epochs": given.epochs, "log.figures": False,
                "train.remember_teacher": way == "live", "log.gradients_every": 0,
                "cache.dir": None if way == "live" else str(work / "auc-cache"),
            }  # fmt: skip
            run = work / f"run-{way}-{seed}"
            distill(load_recipe("quickstart", keys), data=data, out=run)
            report = evaluate(str(run), data=data, out=run / "report", split="test", labels=LABELS)
            auc = report.to_dict()["metrics"]["auc"]["macro"]["value"]
            found.append(auc)
            print(f"seed {seed} {way:9} macro AUC {auc:.4f}", flush=True)
    apart = [cached - live for live, cached in zip(rows["live"], rows["low_rank"], strict=True)]
    spread = statistics.stdev(rows["live"]) if len(apart) > 1 else float("nan")
    print(f"cached minus live: mean {statistics.mean(apart):+.4f}, each {', '.join(f'{d:+.4f}' for d in apart)}; "
          f"standard deviation of live over seeds {spread:.4f}")  # fmt: skip
    return {"auc": rows, "cached_minus_live": apart, "sd_live": spread}


def main() -> None:
    parser = argparse.ArgumentParser(description="What the teacher cache takes, loses and saves.")
    parser.add_argument("--part", choices=("bytes", "epoch", "auc"), help="one part only")
    parser.add_argument("--records", type=int, default=160, help="of the first two parts")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--train", type=int, default=500, help="training records of the runs that are scored")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    one_thread()
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        counts = {"train": max(given.records, given.train if given.part in (None, "auc") else 0), "val": 1, "test": 300}
        prepare("synthetic", source=None, out=work / "data", counts=counts, seed=0)
        if given.part in (None, "bytes", "epoch"):
            pair = Pair(work / "data", work, given.records)
            if given.part != "epoch":
                result["bytes"] = measure_bytes(pair)
            if given.part != "bytes":
                result["epoch"] = measure_epoch(pair, given.rounds)
        if given.part in (None, "auc"):
            result["auc"] = measure_auc(work / "data", work, given)
    save(given.json, result)


if __name__ == "__main__":
    main()
