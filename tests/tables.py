"""Tables of studies in Markdown files, made of the results that are shipped.

    python -m tests.tables [--take NAME=FILE ...]

Between `<!-- NAME: begin -->` and `<!-- NAME: end -->` of recipes/studies/README.md and README.md stands what
recipes/studies/NAME-results.json says (`NAME-summary`: the short form). `--take` copies a results.json there first.
tests/test_study.py asserts that nothing was typed.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path
from typing import Any

from evlecg.study import find_study, load_study, study_summary, study_table

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "recipes" / "studies" / "README.md", ROOT / "README.md")
PLACE = re.compile(r"(<!-- (?P<name>[\w-]+): begin -->\n).*?(<!-- (?P=name): end -->)", re.DOTALL)


def results_file(name: str) -> Path:
    return ROOT / "recipes" / "studies" / f"{name}-results.json"


def table(name: str) -> str:
    """The table that stands for `NAME` or `NAME-summary`."""
    study_name = name.removesuffix("-summary")
    study = load_study(find_study(study_name))
    told: dict[str, Any] = json.loads(results_file(study_name).read_text(encoding="utf-8"))
    if name != study_name:
        return study_summary(study, told)
    return study_table(study, told).split("\n", 2)[2].replace("## ", "### ").strip() + "\n"


def spliced(page: str) -> str:
    """A page with its tables as the results say now."""
    return PLACE.sub(lambda found: found[1] + table(found["name"]) + found[3], page)


def main() -> None:
    parser = argparse.ArgumentParser(description="Put the tables of studies into the Markdown files.")
    parser.add_argument("--take", action="append", default=[], metavar="NAME=FILE")
    for item in parser.parse_args().take:
        name, _, file = item.partition("=")
        shutil.copyfile(file, results_file(name))
    for page in PAGES:
        page.write_text(spliced(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
