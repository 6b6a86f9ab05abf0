"""Wrong input and runs that cannot go on, said in one line."""

import functools
import os
import sys
from collections.abc import Callable


class UserError(ValueError):
    """Input that cannot be used; the message says what, which value, which bound, what to do."""


class DamageError(UserError):
    """A checkpoint that is not what was saved; an earlier one may be."""


class Stopped(Exception):  # noqa: N818
    """A signal has asked to stop, and what was under way can be done again."""


class RunError(RuntimeError):
    """What ends a run though its input was right; the message says how to go on."""


def exit_code(main: Callable[[list[str]], None]) -> Callable[[], int]:
    """Wrap a command: 0 done, 2 wrong input (said in one line), 130 interrupted, 1 the rest."""

    @functools.wraps(main)
    def command() -> int:
        try:
            main(sys.argv[1:])
        except (UserError, RunError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2 if isinstance(error, UserError) else 1
        except KeyboardInterrupt:
            print("\ninterrupted", file=sys.stderr)
            return 130
        except BrokenPipeError:  # `python sample.py | head`: the reader has had enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0

    return command
