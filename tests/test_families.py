"""Model families end to end; `python -m tests.coverage` does the same for every family there is."""

from __future__ import annotations

import pytest

from evlecg.models.families import FAMILIES
from tests import coverage
from tests.families import BUILDERS

QUICK = ("llava",)  # the command tries the rest


@pytest.fixture(scope="module")
def partners(tmp_path_factory):
    return coverage.Partners.make(tmp_path_factory.mktemp("partners"))


@pytest.mark.parametrize("family", QUICK)
def test_a_family_teaches_and_learns(family, partners, tmp_path):
    verdict = coverage.check(family, partners, tmp_path)
    assert verdict.works, verdict


@pytest.mark.parametrize("family", sorted(name for name, row in FAMILIES.items() if row.refused))
def test_a_refused_family_is_told_so_before_weights_are_read(family, tmp_path):
    assert coverage.refusal(family, tmp_path) == FAMILIES[family].refused


def test_the_table_knows_every_family_of_transformers():
    assert set(BUILDERS) | set(FAMILIES) <= set(coverage.families())
