"""Scoring nine labels a record: packed, from the page's cache, one forward pass a label, and by generated text.

    python -m tests.bench.scoring [FAMILY ...] [--rounds N] [--json FILE]

Every family is measured in each way that it is able to take, in turns, on the same records; scores have to agree with
one forward pass a label to 1e-4, for answers of one token and of several. What `evlecg eval` takes is wanted 5 times
faster than one pass a label, and 10 times faster than 64 generated tokens a record and reading them. Whoever reads page
and prompt once pays at least what the first generated token costs ("1 token"): 64 tokens over that one is the most that
any scorer can win, and is printed beside what is won.

Widths are those of the tests' tiny checkpoints; pages are as large as their processors and towers allow, since what a
page costs against a question decides the ratio.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from evlecg.data.store import Prepared
from evlecg.data.tasks import label_samples
from evlecg.models import load as models
from evlecg.models.encode import Turn
from evlecg.models.generate import Generator
from evlecg.models.score import PACKED, ROWS, SHARED, Answering, Scorer
from evlecg.page.render import PageStyle
from evlecg.prepare import prepare
from evlecg.protocol import PARSERS, SUBSETS, Item
from evlecg.schema import Question, Sample
from tests import tiny
from tests.bench.timing import one_thread, print_table, save, timed, told
from tests.families import BUILDERS

N_LABELS, N_TOKENS, N_RECORDS = 9, 64, 2
FAMILIES = ("llava", "idefics3", "qwen2_vl", "qwen3_5", "lfm2_vl", "nemotron_h_omni", "paligemma")
LARGER: dict[str, Callable[[Path], Path]] = {
    "llava": lambda folder: tiny.llava(folder, size="builtin"),
    "idefics3": lambda folder: tiny.idefics3(folder, size="builtin", tiles=True),
}
PAGES: dict[str, dict[str, Any]] = {  # what is set on the image processor
    "qwen2_vl": {"size": {"shortest_edge": 56 * 56, "longest_edge": 448 * 364}},
    "qwen3_5": {"size": {"shortest_edge": 64 * 64, "longest_edge": 512 * 416}},
    "lfm2_vl": {"max_image_tokens": 256, "min_tiles": 1, "max_tiles": 1, "size": {"height": 448, "width": 448}},
}
WANTED = {ROWS: 5.0, "generate": 10.0}
FIRST = "1 token"
ALLOWED = 1e-4
SEVERAL = Answering({"yes": ("yes", "it is present"), "no": ("no", "it is not there")})
QUESTION = "Please name the rhythm and everything else that this ECG shows."


def scorers(loaded: models.Loaded, prepared: Prepared, answering: Answering, sample: Sample) -> dict[str, Scorer]:
    """One for every way that the checkpoint is able to take, the one that `eval` takes first."""
    first = Scorer(loaded, prepared, PageStyle(), answering=answering)
    first.prove(sample)
    made = {first.way: first}
    for way in (PACKED, SHARED, ROWS):
        other = Scorer(loaded, prepared, PageStyle(), answering=answering)
        other.way = way
        with contextlib.suppress(Exception):  # a way that the family cannot take
            list(other.score([sample]))
            made.setdefault(way, other)
    return made


def largest_difference(made: dict[str, Scorer], samples: Sequence[Sample]) -> dict[str, float]:
    """Of every way's scores from those of one forward pass a question."""
    found = {way: torch.tensor([item.score for item in scorer.score(samples)]) for way, scorer in made.items()}
    return {way: float((scores - found[ROWS]).abs().max()) for way, scores in found.items()}


def generating(
    loaded: models.Loaded, prepared: Prepared, samples: Sequence[Sample], n_tokens: int = N_TOKENS
) -> Callable[[int], Any]:
    """So many tokens of every record, and the labels read off them."""
    generator = Generator(loaded, prepared, PageStyle(), max_new_tokens=n_tokens)
    run, subset = generator._run, SUBSETS["cpsc-test"]
    generator._run = lambda inputs, **settings: run(inputs, min_new_tokens=n_tokens, **settings)  # type: ignore[method-assign]
    asked = [(sample.record_index, Turn(QUESTION, "", ends=False)) for sample in samples]
    items = [Item(sample.record_id, subset.name, sample.record_id, "", QUESTION, "") for sample in samples]

    def call(_round: int) -> None:
        for item, answer in zip(items, generator.generate(asked), strict=True):
            assert answer.n_tokens == n_tokens
            PARSERS["strict"].read(subset, item, answer.text, QUESTION)

    return call


def measure(family: str, prepared: Prepared, samples: Sequence[Sample], rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        loaded = models.load(models.inspect(str((LARGER | BUILDERS | tiny.FAMILIES | LARGER)[family](Path(folder)))))
    for name, value in PAGES.get(family, {}).items():
        setattr(loaded.processor.image_processor, name, value)
    made = scorers(loaded, prepared, Answering(), samples[0])
    taken = next(iter(made))
    several = largest_difference(scorers(loaded, prepared, SEVERAL, samples[0]), samples)
    differences = largest_difference(made, samples)
    able = {way: scorer for way, scorer in made.items() if max(differences[way], several.get(way, 1.0)) <= ALLOWED}
    ways: dict[str, Callable[[int], Any]] = {
        way: (lambda _round, scorer=scorer: list(scorer.score(samples))) for way, scorer in able.items()
    }
    with contextlib.suppress(Exception):  # a family whose own generation is broken
        ways["generate"] = generating(loaded, prepared, samples)
        ways["generate"](0)
        ways[FIRST] = generating(loaded, prepared, samples, 1)
    rows = told(timed(ways, {name: 3 if name == "generate" else rounds for name in ways}), taken)
    n_visual = made[ROWS].encoder.encode([_page(made[ROWS], samples[0])], [[Turn.of(samples[0].questions[0])]])
    return {"taken": taken, "note": made[taken].note, "visual_tokens": n_visual.visual_box_BN4.shape[1], "rows": rows,
            "difference": differences, "difference_several_tokens": several}  # fmt: skip


def _page(scorer: Scorer, sample: Sample) -> Any:
    from evlecg.models.batch import draw

    return draw(scorer.prepared, sample.record_index, scorer.view, scorer.style)


def main() -> None:
    parser = argparse.ArgumentParser(description="Scores by likelihood, in every way, beside generated text.")
    parser.add_argument("families", nargs="*", default=FAMILIES)
    parser.add_argument("--rounds", type=int, default=7, help="of the fast ways; generation gets three")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    one_thread()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as work, contextlib.redirect_stderr(io.StringIO()):
        data = Path(work) / "data"
        prepare("synthetic", source=None, out=data, counts={"train": 1, "val": 1, "test": N_RECORDS}, seed=3)
        prepared = Prepared.open(data)
        samples = nine_labels(prepared)
        print(f"{N_RECORDS} records, {N_LABELS} labels each; {N_TOKENS} generated tokens a record; one thread")
        found = {}
        for family in given.families:
            result = found[family] = measure(family, prepared, samples, given.rounds)
            tell(family, result)
    print()
    for against, least in WANTED.items():
        ratios = {family: result["rows"][against]["ratio"] for family, result in found.items()
                  if against in result["rows"] and result["taken"] != against}  # fmt: skip
        if ratios:
            missed = [family for family, ratio in ratios.items() if ratio < least]
            print(f"{'MISSED' if missed else 'met   '}  {against} over what eval takes, wanted {least:g}: "
                  + ", ".join(f"{family} {ratio:.1f}" for family, ratio in ratios.items())
                  + f"; median {statistics.median(ratios.values()):.1f}")  # fmt: skip
    most = {family: rows["generate"]["median_ms"] / rows[FIRST]["median_ms"]
            for family, result in found.items() if FIRST in (rows := result["rows"])}  # fmt: skip
    print("the most that can be won against 64 tokens: "
          + ", ".join(f"{family} {ratio:.1f}" for family, ratio in most.items()))  # fmt: skip
    save(given.json, {"families": found, "wanted": WANTED})


def tell(family: str, result: dict[str, Any]) -> None:
    taken = result["taken"]
    print(f"\n{family}: {result['visual_tokens']} visual tokens, eval takes {taken!r} ({result['note']})")
    print_table(result["rows"], taken)
    several = result["difference_several_tokens"]
    print("largest difference of a score from one pass a label: "
          + ", ".join(f"{way} {value:.1e} (several tokens {several.get(way, 0):.1e})"
                      for way, value in result["difference"].items() if way != ROWS), flush=True)  # fmt: skip


def nine_labels(prepared: Prepared) -> list[Sample]:
    """Test records with nine questions each; the labels' names do not matter to what a question costs."""
    labels = prepared.label_names
    made = label_samples(prepared, prepared.indices("test").tolist(), labels, "Does this ECG show {description}?")
    chosen = []
    for sample in made:
        questions = [*sample.questions]
        while len(questions) < N_LABELS:
            one = questions[len(questions) % len(sample.questions)]
            questions.append(Question(f"{one.text[:-1]} or {len(questions)}?", one.answer, one.choices,
                                      f"{one.label}-{len(questions)}"))  # fmt: skip
        chosen.append(Sample(sample.record_index, sample.record_id, tuple(questions[:N_LABELS])))
    return chosen


if __name__ == "__main__":
    main()
