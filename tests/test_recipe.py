"""Recipes are strict, and say what is wrong with them."""

from __future__ import annotations

import dataclasses

import pytest
import yaml

from evlecg.errors import EvlecgError
from evlecg.recipe import Recipe, load_recipe, parse_set, shipped_recipes


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_every_shipped_recipe_loads(name):
    assert load_recipe(name).name == name


def test_a_resolved_recipe_is_its_own_fixed_point(tmp_path):
    recipe = load_recipe("quickstart", parse_set(["train.lr=1e-3", "page.student_size=[224, 168]", "data.dir=null"]))
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    assert load_recipe(str(path)) == recipe
    assert recipe.train.lr == 1e-3 and recipe.page.student_size == (224, 168) and recipe.data.dir is None
    assert load_recipe(str(path)).fingerprint() == recipe.fingerprint() != load_recipe("quickstart").fingerprint()


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        ("trian.lr=1", "did you mean 'train'"),
        ("train.learning=1", "unknown key train.learning"),
        ("train.epochs=0", "at least 1"),
        ("train.epochs=1.5", "must be int"),
        ("train.lr=fast", "must be float"),
        ("method=evll", "did you mean 'evl'"),
        ("data.labels=NORM", "must be a list"),
        ("train=3", "must be a section"),
        ("train.freeze_vision=1", "must be bool"),
        ("name.first=x", "not a section"),
    ],
)
def test_mistakes_are_named(tmp_path, assignment, said):
    path = tmp_path / "recipe.yaml"
    path.write_text("name: mine\n")
    with pytest.raises(EvlecgError, match=said):
        load_recipe(str(path), parse_set([assignment]))


def test_unknown_recipes_and_broken_files(tmp_path):
    with pytest.raises(EvlecgError, match="did you mean 'quickstart'"):
        load_recipe("quickstrat")
    path = tmp_path / "broken.yaml"
    path.write_text("a: [1")
    with pytest.raises(EvlecgError, match="not valid YAML"):
        load_recipe(str(path))
    path.write_text("- 1\n")
    with pytest.raises(EvlecgError, match="mapping"):
        load_recipe(str(path))
    with pytest.raises(EvlecgError, match="key=value"):
        parse_set(["train.lr"])


def test_every_key_is_documented_and_in_the_yaml():
    def walk(kind, tree):
        for item in dataclasses.fields(kind):
            assert item.name in tree
            if isinstance(tree[item.name], dict):
                walk(type(getattr(kind(), item.name)), tree[item.name])
            else:
                assert len(item.metadata["help"]) > 5, item.name

    walk(Recipe, yaml.safe_load(Recipe().to_yaml()))


def test_no_teacher_means_plain_fine_tuning():
    assert load_recipe(None, {"teacher": "none"}).effective_method == "ce"
    assert load_recipe(None).needs_teacher
