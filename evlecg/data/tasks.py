"""Labels become questions: one yes/no question a label, asked of every record that was assessed for it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from evlecg.data.store import Prepared
from evlecg.errors import EvlecgError
from evlecg.recipe import DataConfig, nearest
from evlecg.schema import Question, Sample

YES_NO = ("yes", "no")


def chosen_labels(prepared: Prepared, config: DataConfig) -> tuple[str, ...]:
    """The labels that a recipe asks about, in the folder's order where the recipe names none.

    Raises:
        EvlecgError: a label that the folder does not have, or a wording without its place for the label.
    """
    if "{description}" not in config.question:
        raise EvlecgError(
            "data.question has no place for the label", where=config.question, hint="write {description} where it goes"
        )
    for label in config.labels:
        if label not in prepared.label_names:
            raise EvlecgError(f"the prepared folder has no label {label!r}", where="data.labels",
                              hint=nearest(label, prepared.label_names))  # fmt: skip
    return tuple(config.labels) or prepared.label_names


def yes_no_questions(
    assessed: Iterable[tuple[str, bool]], descriptions: dict[str, str], wording: str
) -> tuple[Question, ...]:
    """One question a label.

    Args:
        assessed: (label, present) pairs.
        descriptions: label -> noun phrase.
        wording: sentence with `{description}` in it.
    """
    return tuple(
        Question(
            text=wording.replace("{description}", descriptions.get(label, label)),
            answer=YES_NO[0] if present else YES_NO[1],
            choices=YES_NO,
            label=label,
        )
        for label, present in assessed
    )


def label_samples(prepared: Prepared, indices: Sequence[int], labels: Sequence[str], wording: str) -> list[Sample]:
    """A sample a record, with a question for each of its assessed labels; records assessed for none are left out."""
    truth_NK = prepared.labels(indices, labels)
    samples = []
    for index, truth_K in zip(indices, truth_NK, strict=True):
        assessed = [(label, bool(value)) for label, value in zip(labels, truth_K, strict=True) if value == value]
        if assessed:
            questions = yes_no_questions(assessed, prepared.label_descriptions, wording)
            samples.append(Sample(int(index), prepared.record_ids[index], questions))
    return samples
