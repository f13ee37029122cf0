"""`distill --cache` and `prepare --teacher`: the teacher runs once, and nothing is reused that differs."""

from __future__ import annotations

import json
import multiprocessing

import pytest
import torch
from typer.testing import CliRunner

from evlecg.caching import cache_teacher
from evlecg.cli import app
from evlecg.distill import distill, rehearse
from evlecg.errors import EvlecgError
from evlecg.models.batch import epoch_batches
from evlecg.recipe import load_recipe, parse_set
from evlecg.teacher.signal import LiveTeacher
from evlecg.teacher.store import read_index
from evlecg.training import build
from tests import tiny_classifiers
from tests.test_distill import ALL_TERMS, rows, weights

STEPS = ("train.max_steps=4", "log.figures=false", "log.gradients_every=0")


def recipe(checkpoints, *sets, teacher="llava", student="idefics3"):
    chosen = {"teacher": str(checkpoints[teacher]), "student": str(checkpoints[student]), "train.batch_size": 8,
              "train.epochs": 2, "train.lr": 1e-3, "log.every": 1, "threads": 1,
              "data.labels": ["NORM", "MI"]}  # fmt: skip
    return load_recipe(None, chosen | parse_set([*STEPS, *sets]))


@pytest.fixture
def counted(monkeypatch):
    """How often the teacher was loaded, and how many batches it was run on."""
    counts = {"loads": 0, "batches": 0}
    load, of = build.load_teacher, LiveTeacher.of

    def counting_load(*arguments):
        counts["loads"] += 1
        return load(*arguments)

    def counting_of(self, side):
        counts["batches"] += 1
        return of(self, side)

    monkeypatch.setattr(build, "load_teacher", counting_load)
    monkeypatch.setattr(LiveTeacher, "of", counting_of)
    return counts


def test_the_second_run_neither_loads_nor_runs_the_teacher(checkpoints, synthetic, tmp_path, counted):
    cached = f"cache.dir={tmp_path / 'c'}"
    distill(recipe(checkpoints, *ALL_TERMS), data=synthetic, out=tmp_path / "live")
    counted.update(loads=0, batches=0)
    first = recipe(checkpoints, *ALL_TERMS, cached, "cache.compression=none")
    distill(first, data=synthetic, out=tmp_path / "first")
    assert counted == {"loads": 1, "batches": 4}  # 24 records, and one for its facts
    distill(first, data=synthetic, out=tmp_path / "second")
    assert counted == {"loads": 1, "batches": 4}
    mine, theirs, live = (weights(tmp_path / name) for name in ("first", "second", "live"))
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    for found, expected in zip(rows(tmp_path / "second"), rows(tmp_path / "live"), strict=True):
        assert found["terms"] == pytest.approx(expected["terms"], rel=2e-4)
    assert max(float((mine[name] - live[name]).abs().max()) for name in mine) < 1e-3
    told = json.loads((tmp_path / "second" / "run.json").read_text())["checks"]
    assert told["teacher"]["family"] == "llava" and told["teacher_cache"]["records"] == 24


@pytest.mark.parametrize(("method", "rel"), [("kl", 1e-4), ("dskd", 1e-4), ("minilm", 1e-4)])
def test_heads_and_attention_come_from_the_cache(checkpoints, synthetic, tmp_path, counted, method, rel):
    more = ("train.max_steps=1", f"method={method}", "objective.baseline.relation_heads=2")
    cached = (f"cache.dir={tmp_path / 'c'}", "cache.compression=none")
    distill(recipe(checkpoints, *more), data=synthetic, out=tmp_path / "live")
    counted.update(loads=0)
    for name in ("first", "second"):
        distill(recipe(checkpoints, *more, *cached), data=synthetic, out=tmp_path / name)
    assert counted["loads"] == 1
    live, second = rows(tmp_path / "live")[0]["terms"], rows(tmp_path / "second")[0]["terms"]
    assert second == pytest.approx(live, rel=rel) and len(live) > 1


def test_another_method_adds_only_what_it_reads(checkpoints, synthetic, tmp_path, counted):
    cached = f"cache.dir={tmp_path / 'c'}"
    for method in ("rkd", "kl", "rkd", "kl"):
        distill(
            recipe(checkpoints, cached, f"method={method}"),
            data=synthetic,
            out=tmp_path / f"{len(list(tmp_path.iterdir()))}",
        )
    assert counted["loads"] == 2
    assert set(read_index(tmp_path / "c")["contents"]["fields"]) == {"visual", "answer"}


def test_an_interrupted_fill_goes_on(checkpoints, synthetic, tmp_path, counted, monkeypatch):
    monkeypatch.setattr("evlecg.teacher.store.SHARD_BYTES", 1)
    chosen = recipe(checkpoints, f"cache.dir={tmp_path / 'c'}", "cache.compression=int8")
    of = LiveTeacher.of

    def dying(self, side):
        if counted["batches"] == 3:
            raise KeyboardInterrupt
        return of(self, side)

    with monkeypatch.context() as patched:
        patched.setattr(LiveTeacher, "of", dying)
        with pytest.raises(KeyboardInterrupt):
            distill(chosen, data=synthetic, out=tmp_path / "killed")
    counted.update(batches=0)
    distill(chosen, data=synthetic, out=tmp_path / "run")
    assert counted["batches"] == 1, "two of three batches were on disk"


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        (["page.grid=blue"], "page.grid: pink there, blue here"),
        (["page.teacher_size=[160, 160]"], "page.size_px"),
        (["train.teacher_dtype=bfloat16"], "dtype.states: float32 there, bfloat16 here"),
        (["objective.visual_layer=-2"], "layers.visual: -1 there, -2 here"),
        (["cache.compression=bf16"], "compression: low_rank there, bf16 here"),
        (["data.question=Is there {description}?"], "other questions than 'Is there"),
        (["data.labels=[NORM, MI, CD]"], "2 questions a row, not 3"),
        (["train.packing=never"], "2 questions a row, not 1"),
        (["augment.level=light"], "same pages in every epoch"),
    ],
)
def test_what_differs_is_named(checkpoints, synthetic, tmp_path_factory, made_cache, sets, said):
    with pytest.raises(EvlecgError, match=said.replace("[", r"\[")):
        distill(recipe(checkpoints, f"cache.dir={made_cache}", *sets), data=synthetic,
                out=tmp_path_factory.mktemp("x") / "run")  # fmt: skip


@pytest.fixture(scope="module")
def made_cache(checkpoints, synthetic, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "cache"
    cache_teacher(recipe(checkpoints, f"cache.dir={folder}"), data=synthetic)
    return folder


def test_another_teacher_or_processor_is_named(checkpoints, synthetic, tmp_path, made_cache):
    from tests import tiny

    other = tiny.llava(tmp_path / "other", seed=5)
    cached = f"cache.dir={made_cache}"
    with pytest.raises(EvlecgError, match=r"teacher\.revision"):
        distill(recipe({**checkpoints, "llava": other}, cached), data=synthetic, out=tmp_path / "run")
    same = tiny.llava(tmp_path / "same")
    template = same / "chat_template.jinja"
    template.write_text(template.read_text().replace("USER", "user"))
    with pytest.raises(EvlecgError, match=r"something else: processor: \w+ there"):
        distill(recipe({**checkpoints, "llava": same}, cached), data=synthetic, out=tmp_path / "run")


def test_a_copy_of_the_teacher_is_the_teacher_and_a_clean_teacher_serves_disturbed_students(
    checkpoints, synthetic, tmp_path, made_cache, counted
):
    import shutil

    copied = shutil.copytree(checkpoints["llava"], tmp_path / "copied")
    sets = (f"cache.dir={made_cache}", "augment.level=light", "augment.teacher=false")
    distill(recipe({**checkpoints, "llava": copied}, *sets), data=synthetic, out=tmp_path / "run")
    assert counted["loads"] == 0


def test_several_prompts_may_be_held_on_demand(checkpoints, synthetic, tmp_path, counted):
    cached = (f"cache.dir={tmp_path / 'c'}", "cache.several_prompts=true", "train.max_steps=1")
    for place, wording in enumerate(("Is it {description}?", "Is there {description}?", "Is it {description}?")):
        distill(recipe(checkpoints, *cached, f"data.question={wording}"), data=synthetic, out=tmp_path / f"run{place}")
    assert counted["loads"] == 2
    contents = read_index(tmp_path / "c")["contents"]
    assert contents["rows"] == 2 * contents["records"]


def test_a_short_run_asks_for_what_it_reads(checkpoints, synthetic, tmp_path):
    sets = (f"cache.dir={tmp_path / 'c'}", "train.max_steps=1", "train.batch_size=2")
    chosen, first = recipe(checkpoints, *sets), epoch_batches(24, 2, seed=0, epoch=0)[:7]  # one, and some to spare
    read = len({*range(8), *(int(index) for batch in first for index in batch)})
    assert read < 24
    distill(chosen, data=synthetic, out=tmp_path / "run")
    assert read_index(tmp_path / "c")["contents"]["records"] == read


def test_a_dry_run_writes_nothing_and_counts_the_teacher(checkpoints, synthetic, tmp_path):
    found = rehearse(recipe(checkpoints, f"cache.dir={tmp_path / 'c'}", "train.max_steps=1000", "train.batch_size=4"),
                     data=synthetic)  # fmt: skip
    assert found.teacher_s > 0 and not (tmp_path / "c").exists()


@pytest.mark.parametrize("teacher", ["hubert", "vit"])
def test_a_classifier_teaches_from_the_cache(checkpoints, synthetic, tmp_path, counted, teacher):
    pair = checkpoints | {"classifier": tiny_classifiers.write(tmp_path / "teacher", teacher)}
    for place in range(2):
        chosen = recipe(
            pair, f"cache.dir={tmp_path / 'c'}", "train.max_steps=1", "cache.compression=int8", "objective.lambda_r=1",
            teacher="classifier",
        )  # fmt: skip
        distill(chosen, data=synthetic, out=tmp_path / f"run{place}")
    assert counted["loads"] == 1
    first, second = (rows(tmp_path / f"run{place}")[0]["terms"] for place in range(2))
    assert first == second and "rel" in first


def test_seqkd_asks_the_teacher_itself(checkpoints, synthetic, tmp_path):
    with pytest.raises(EvlecgError, match="seqkd reads nothing"):
        cache_teacher(recipe(checkpoints, f"cache.dir={tmp_path / 'c'}", "method=seqkd"), data=synthetic)


def test_the_command_line_makes_a_cache_that_a_run_reads(checkpoints, synthetic, tmp_path, counted):
    common = ["--set", "data.labels=[NORM, MI]", "--json", "--quiet"]
    made = CliRunner().invoke(app, ["prepare", "--teacher", str(checkpoints["llava"]), "--dataset", str(synthetic),
                                    "--out", str(tmp_path / "c"), "--compression", "int8", *common])  # fmt: skip
    assert made.exit_code == 0, made.output
    told = json.loads(made.stdout)
    assert told["records"] == 24 and 0 < told["fields"]["visual"]["relative_error"] < 0.02 and told["share_of_fp16"] < 1
    loads = counted["loads"]
    sets = ["cache.compression=int8", "train.max_steps=1", "finish.eval_split=none", "finish.export=false"]
    command = ["distill", "--teacher", str(checkpoints["llava"]), "--student", str(checkpoints["idefics3"]), "--data",
               str(synthetic), "--cache", str(tmp_path / "c"), "--out", str(tmp_path / "r"), *common]  # fmt: skip
    run = CliRunner().invoke(app, command + [part for item in sets for part in ("--set", item)])
    assert run.exit_code == 0, run.output
    assert counted["loads"] == loads == 1


def _one_fill(chosen, data, results):
    of, batches = LiveTeacher.of, []

    def counting(self, side):
        batches.append(1)
        return of(self, side)

    LiveTeacher.of = counting
    cache_teacher(chosen, data=data)  # without a backward pass, which a forked process cannot always take
    results.put(len(batches))


def test_processes_that_start_together_share_one_cache(checkpoints, synthetic, tmp_path):
    fork = multiprocessing.get_context("fork")
    results = fork.Queue()
    sets = (f"cache.dir={tmp_path / 'c'}", "cache.compression=int8")
    chosen = [recipe(checkpoints, *sets, f"seed={seed}") for seed in (0, 1)]
    processes = [fork.Process(target=_one_fill, args=(one, synthetic, results)) for one in chosen]
    for process in processes:
        process.start()
    batches = sorted(results.get(timeout=300) for _ in processes)
    for process in processes:
        process.join()
        assert process.exitcode == 0
    contents = read_index(tmp_path / "c")["contents"]
    assert contents["rows"] == contents["records"] == 24, "nothing was written twice"
    assert batches == [0, 4]  # three batches, and one record for the facts; the other found everything
