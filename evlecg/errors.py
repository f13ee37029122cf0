"""The one exception that a user meets: what went wrong, where, and what to do next."""

from __future__ import annotations

from typing import Any


class EvlecgError(Exception):
    """Bad input. The CLI prints it on one line and exits with `exit_code` 2.

    Args:
        what: what is wrong, as a sentence without a full stop.
        where: the file, key or option at fault; empty where there is none.
        hint: what to do next; empty where nothing sensible can be said.
    """

    exit_code = 2

    def __init__(self, what: str, *, where: object = "", hint: str = "") -> None:
        self.what = what
        self.where = str(where)
        self.hint = hint
        super().__init__(str(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuilt, (type(self), self.what, self.where, self.hint)  # worker processes send it home

    def __str__(self) -> str:
        place = f" [{self.where}]" if self.where else ""
        advice = f" -> {self.hint}" if self.hint else ""
        return f"{self.what}{place}{advice}"


def _rebuilt(kind: type[EvlecgError], what: str, where: str, hint: str) -> EvlecgError:
    return kind(what, where=where, hint=hint)


class RunFailed(EvlecgError):
    """The input was fine, the run was not (a loss that is not finite, an export that does not reload)."""

    exit_code = 1


class Stopped(RunFailed):
    """A run that ended because a signal asked it to, saved, and can be gone on with.

    Args:
        what, where, hint: as for `EvlecgError`.
        number: of the signal; as in a shell, the exit code is 128 more: 143 for SIGTERM, 130 for SIGINT.
    """

    def __init__(self, what: str, *, where: object = "", hint: str = "", number: int = 15) -> None:
        super().__init__(what, where=where, hint=hint)
        self.exit_code = 128 + number
