"""Students of another shape than their checkpoint's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from evlecg.errors import EvlecgError
from evlecg.models import load as models
from tests import tiny

SMALLER = (
    "text_config.hidden_size=32", "text_config.head_dim=8", "text_config.intermediate_size=96",
    "text_config.num_hidden_layers=1", "vision_config.hidden_size=32", "vision_config.intermediate_size=128",
)  # fmt: skip


def test_a_reshaped_student_is_smaller_random_and_the_same_for_a_seed() -> None:
    full = models.load(models.inspect("builtin:student"))
    checkpoint = models.inspect("builtin:student", settings=SMALLER)
    assert not checkpoint.trained and checkpoint.width == 32
    small, again = models.load(checkpoint, seed=3), models.load(checkpoint, seed=3)
    assert small.n_parameters < full.n_parameters / 2
    pairs = zip(small.model.parameters(), again.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_weights_of_a_trained_checkpoint_are_left_behind(tmp_path: Path) -> None:
    tiny.llava(tmp_path / "m")
    assert models.inspect(str(tmp_path / "m")).trained
    depth = models.inspect(str(tmp_path / "m")).config.text_config.num_hidden_layers
    checkpoint = models.inspect(str(tmp_path / "m"), settings=(f"text_config.num_hidden_layers={depth + 1}",))
    assert not checkpoint.trained and len(models.load(checkpoint).model.model.language_model.layers) == depth + 1


@pytest.mark.parametrize(
    ("setting", "said", "where"),
    [
        ("text_config.hiden_size=32", "did you mean 'hidden_size'", "student_config"),
        ("text_config.hidden_size.x=32", "no key 'text_config.hidden_size.x'", "student_config"),
        ("text_config", "student_config needs key=value", "text_config"),
        ("text_config.hidden_size=[", "student_config has a value that is not YAML", "text_config.hidden_size=["),
        ("text_config.hidden_size=wide", "takes no such config", "student_config"),
    ],
)
def test_mistakes_name_the_key(setting: str, said: str, where: str) -> None:
    with pytest.raises(EvlecgError) as caught:
        models.inspect("builtin:student", settings=(setting,))
    assert said in f"{caught.value.what} {caught.value.hint}" and caught.value.where == where
