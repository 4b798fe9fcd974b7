"""The command line of every job: flags, YAML and presets into one typed config; bad input out as one sentence.

Never holds a setting of its own: everything it shows comes from ``sane_ray.config``.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from sane_ray.config import to_dict
from sane_ray.errors import InputError

Config = TypeVar("Config")

BAD_INPUT = 2
"""Exit status when the input is wrong; 1 is left to defects and failures."""


def run_job(
    job: type[Config],
    main: Callable[[Config, bool], None],
    *,
    presets: Mapping[str, Callable[[], Config]] | None = None,
    examples: str = "",
    argv: Sequence[str] | None = None,
) -> None:
    """Parses the command line into a ``job`` config and calls ``main(config, dry_run)``.

    Exits with status 2 and one sentence on bad input; any other exception keeps its traceback.

    Args:
        job: dataclass of the job's config; its docstring and its fields' docstrings are the help.
        main: the work.
        presets: named configs for ``--preset``; the first is the default.
        examples: lines shown at the end of ``--help``.
        argv: arguments, by default the process's.
    """
    try:
        config, dry_run = parse(job, presets=presets, examples=examples, argv=argv)
        main(config, dry_run)
    except InputError as error:
        stop(error)


def parse(
    job: type[Config],
    *,
    presets: Mapping[str, Callable[[], Config]] | None = None,
    examples: str = "",
    argv: Sequence[str] | None = None,
) -> tuple[Config, bool]:
    """The job's config and whether ``--dry-run`` was given. Later sources win: preset, then ``--config``, then flags.

    Raises:
        InputError: an unknown field, a value of the wrong type, or one that the config refuses.
    """
    arguments = [_underscored(argument) for argument in (sys.argv[1:] if argv is None else argv)]
    parser = _parser(job, presets, examples)
    if presets:
        parser.set_defaults(_flat(to_dict(presets[_preset(arguments, presets)]())))
    try:
        namespace = parser.parse_args(arguments)
        fields = parser.instantiate_classes(namespace)
        return job(**{field.name: fields[field.name] for field in dataclasses.fields(job)}), namespace.dry_run  # type: ignore[arg-type]
    except InputError:
        raise
    except Exception as error:  # jsonargparse wraps what a config's own check raised: show the innermost words
        raise InputError(_explain(error, parser)) from error


def stop(error: InputError) -> NoReturn:
    """Prints the error as one sentence and exits with status 2."""
    print(f"error: {error}", file=sys.stderr)
    sys.exit(BAD_INPUT)
