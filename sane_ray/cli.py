"""The command line of every job: flags, YAML and presets into one typed config; bad input out as one sentence.

Never holds a setting of its own: everything it shows comes from ``sane_ray.config``.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import itertools
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, get_type_hints

from jsonargparse import ArgumentParser, DefaultHelpFormatter, set_parsing_settings

from sane_ray.config import to_dict
from sane_ray.errors import InputError
from sane_ray.interrupts import INTERRUPTED, interruptible

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")

BAD_INPUT = 2
"""Exit status when the input is wrong; 1 is left to defects and failures."""

_INTERRUPTED = "interrupted (a second Ctrl-C ends at once)"
"""What is kept, whoever does the work says: it knows how far it was."""


def run_job(
    job: type[Config],
    main: Callable[[Config, bool], None],
    *,
    presets: Mapping[str, Callable[[], Config]] | None = None,
    examples: str = "",
    argv: Sequence[str] | None = None,
) -> None:
    """Parses the command line into a ``job`` config and calls ``main(config, dry_run)``.

    Exits with status 2 and one sentence on bad input, and with 130 after Ctrl-C or SIGTERM; any other exception keeps
    its traceback.

    Args:
        job: dataclass of the job's config; its docstring and its fields' docstrings are the help.
        main: the work.
        presets: named configs for ``--preset``; the first is the default.
        examples: lines shown at the end of ``--help``.
        argv: arguments, by default the process's.
    """
    try:
        with interruptible(_INTERRUPTED):
            config, dry_run = parse(job, presets=presets, examples=examples, argv=argv)
            main(config, dry_run)
    except InputError as error:
        stop(error)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


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
    arguments = _with_values(arguments, _switches(job))
    parser = _parser(job, presets, examples)
    try:
        if presets:
            parser.set_defaults(_flat(to_dict(presets[_preset(arguments, presets)]())))
        namespace = parser.parse_args(arguments)
        fields = parser.instantiate(namespace)
        return job(**{field.name: fields[field.name] for field in dataclasses.fields(job)}), namespace.dry_run
    except InputError:
        raise
    except Exception as error:  # jsonargparse wraps what a config's own check raised: show the innermost words
        raise InputError(_explain(error, parser)) from error


def stop(error: InputError) -> NoReturn:
    """Prints the error as one sentence and exits with status 2."""
    print(f"error: {error}", file=sys.stderr)
    sys.exit(BAD_INPUT)


def _underscored(argument: str) -> str:
    """``--run-name=a-b`` as ``--run_name=a-b``: dashes and underscores in a flag's name mean the same."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def _switches(job: Any, prefix: str = "--") -> set[str]:
    """Flags of the fields that are true or false."""
    kinds = get_type_hints(job)
    switches = {f"{prefix}{name}" for name, kind in kinds.items() if kind is bool}
    for name, kind in kinds.items():
        if dataclasses.is_dataclass(kind):
            switches |= _switches(kind, f"{prefix}{name}.")
    return switches


def _with_values(arguments: Sequence[str], switches: Collection[str]) -> list[str]:
    """``--audit`` alone as ``--audit=true``; a value that follows stays."""
    following = [*arguments[1:], "--"][: len(arguments)]
    return [
        f"{argument}=true" if argument in switches and after.startswith("--") else argument
        for argument, after in zip(arguments, following, strict=True)
    ]


def _parser(job: type, presets: Mapping[str, Callable[[], Any]] | None, examples: str) -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    program = f"python {Path(sys.argv[0]).parent.name}/{Path(sys.argv[0]).name}"
    parser = ArgumentParser(
        prog=program,
        usage=f"{program} {'[--preset NAME] ' if presets else ''}[--config FILE.yaml] [--dry-run] [--FIELD VALUE ...]",
        description=f"{inspect.getdoc(job)} Flags may be written with dashes or underscores.",
        epilog=examples,
        formatter_class=_HelpFormatter,
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="YAML file of the fields below; flags win over it.")
    parser.add_argument("--dry_run", action="store_true", help="Print the plan and do nothing.")
    if presets:
        names = "; ".join(f"`{name}`: {_first_line(preset)}" for name, preset in presets.items())
        parser.add_argument(
            "--preset", choices=list(presets), default=next(iter(presets)), help=f"Config to start from. {names}"
        )
    parser.add_class_arguments(job, nested_key=None)
    return parser


class _HelpFormatter(DefaultHelpFormatter):
    """Keeps the examples' line breaks."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if "\n" in text:
            return "\n".join(indent + line for line in text.splitlines())
        return super()._fill_text(text, width, indent)


def _first_line(documented: object) -> str:
    return (inspect.getdoc(documented) or "").splitlines()[0].rstrip(".")


def _preset(arguments: Sequence[str], presets: Mapping[str, object]) -> str:
    """The value of ``--preset``, read before all else because it supplies the defaults."""
    chosen = next(iter(presets))
    for argument, following in itertools.pairwise([*arguments, ""]):
        if argument == "--preset":
            chosen = following
        elif argument.startswith("--preset="):
            chosen = argument.partition("=")[2]
    if chosen not in presets:
        raise InputError(f"--preset is {chosen!r}: must be one of {', '.join(presets)}")
    return chosen


def _flat(tree: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """A nested dict as one level of dotted keys."""
    flat: dict[str, object] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _explain(error: Exception, parser: ArgumentParser) -> str:
    """The parser's complaint in one line, with the nearest field where a name is unknown."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, InputError):
            return str(cause)
        cause = cause.__cause__ or cause.__context__
    message = " ".join(str(error).split())
    for pattern, words in _PHRASES:
        message = re.sub(pattern, words, message)
    return _suggest(message, parser) or message


_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "list": "a list, such as [1, 2]",
    "tuple": "a list, such as [1, 2]",
    "dict": "fields with their values",
    "NoneType": "null",
}
"""What people call the types of fields."""

_UNION = re.compile(
    r"Does not validate against any of the Union subtypes Subtypes: \[(?P<kinds>.+)\] Errors: .*"
    r"Given value type: .*? Given value: (?P<value>.*)"
)


def _needs_value(found: re.Match[str]) -> str:
    return f"--{found[1] if '.' in found[1] else found[1].replace('_', '-')} needs a value"


def _in_words(kind: str) -> str:
    return _KINDS.get(kind, kind)


def _expected_of_union(found: re.Match[str]) -> str:
    """``expected a whole number or two whole numbers, got x``."""
    kinds = re.findall(r"<class '(\w+)'>|(?<!\w)(NoneType|(?:tuple|list)\[)", found["kinds"])
    words = [_in_words((plain or generic).rstrip("[")) for plain, generic in kinds]
    return f"expected {' or '.join(dict.fromkeys(words)) or found['kinds']}, got {found['value']}"


def _suggest(message: str, parser: ArgumentParser) -> str:
    """A sentence for an unknown field, with what is spelled much like it; empty if the message is of something else."""
    unknown = re.search(r"unrecognized arguments: --([\w.]+)", message)
    in_group = re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message)
    at_top = re.search(r"[Oo]ption '([\w.]+)' is not accepted|[Kk]ey ['\"]([\w.]+)['\"] is not expected", message)
    found = unknown or in_group or at_top
    if not found:
        return ""
    name = ".".join(group for group in found.groups() if group)
    near = _near(name, [action.dest for action in parser._actions if action.dest != "help"])
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return f"no config field is called {name!r}{hint} (`--help` lists them all)"


_PHRASES: tuple[tuple[str | re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = (
    (r"[Ee]xpected a typing\.Literal\[(.+?)\]", r"expected one of \1"),
    (_UNION, _expected_of_union),
    (r"[Ee]xpected an? <class '(\w+)'>", lambda found: f"expected {_in_words(found[1])}"),
    (r'Parser key "([\w.]+)":', r"config field \1:"),
    (r"\. Got value:", ", got"),
    (r"argument --([\w.]+): expected one argument", _needs_value),
    (r"config field config: File does not exist: '(.+)'", r"--config \1 does not exist"),
    (
        r"config field (\w+): Unable to load config '(.+?)' - .*",
        r"config field \1 is \2: it is a section, so set its fields one by one (--\1.FIELD VALUE)",
    ),
)
"""What jsonargparse says, and in its place; one after the other."""


_ALIKE = 0.8
"""``learning_rat`` is as much like ``learning_rate``, and ``nosuch`` not like ``search``."""
_MOST_NEAR = 3


def _near(name: str, fields: Sequence[str]) -> list[str]:
    """Fields that may have been meant: spelled much like it, or called so inside a section, the most alike first."""
    scores = {field: _alikeness(name, field) for field in fields}
    near = sorted((field for field in fields if scores[field] >= _ALIKE), key=lambda field: -scores[field])
    return near[:_MOST_NEAR]


def _alikeness(name: str, field: str) -> float:
    """From 0 (nothing in common) to 1 (the same); of the last words alone, where the section is right or left out."""
    section, _, last = name.rpartition(".")
    of_field, _, own = field.rpartition(".")
    alike = difflib.SequenceMatcher(None, last, own).ratio()
    if section == of_field:
        return alike
    whole = difflib.SequenceMatcher(None, name, field).ratio()
    return whole if section else max(alike, whole)
