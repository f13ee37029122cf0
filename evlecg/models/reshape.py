"""A student of another shape: keys of its config.json set anew, random weights in place of the checkpoint's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from evlecg.errors import EvlecgError
from evlecg.recipe import assign, nearest, parse_assignment

WHERE = "student_config"


def reshaped(config: Any, settings: Sequence[str]) -> Any:
    """A config of the same family with some keys set.

    Args:
        config: a transformers config; it stays as it is.
        settings: `KEY=VALUE` each, KEY dotted into the config's parts (`text_config.num_hidden_layers=2`), VALUE as in
            YAML.

    Raises:
        EvlecgError: no `=`, a key that the config has not (naming the nearest), or values that the family refuses.
    """
    tree = config.to_dict()
    for setting in settings:
        dotted, value = parse_assignment(setting, WHERE, "text_config.num_hidden_layers=2")
        part: Any = tree
        for name in dotted.split("."):
            if not isinstance(part, dict) or name not in part:
                raise EvlecgError(f"the config has no key {dotted!r}", where=WHERE,
                                  hint=nearest(name, part if isinstance(part, dict) else ()))  # fmt: skip
            part = part[name]
        assign(tree, dotted, value)
    try:
        return type(config).from_dict(tree)
    except Exception as error:  # transformers raises many kinds here
        raise EvlecgError("the family takes no such config", where=WHERE, hint=str(error).split("\n")[0]) from error
