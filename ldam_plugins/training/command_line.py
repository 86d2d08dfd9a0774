"""The command line of a recipe: its options by groups, errors in one line, a word at Ctrl-C.

Nothing here needs torch, so ``--help`` and a misspelt flag are answered before it is imported.
``HfArgumentParser``, whose import alone takes longer than that, reads the same dataclasses.
"""

from __future__ import annotations

import os
import sys
import traceback
import types
import warnings
from argparse import ArgumentParser, ArgumentTypeError, HelpFormatter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from ldam_plugins._validation import check_choice
from ldam_plugins.training.run_dir import has_checkpoint

USAGE_ERROR, INTERRUPTED = 2, 130
"""Exit codes of a command line that is refused and of a run that Ctrl-C ended. An error is 1."""

LOG_SECONDS = "30"
"""Between two lines of a progress bar in a log."""

_Options = TypeVar("_Options")
_OURS = (Path(__file__).parents[1],)
_WORDS = {"yes": True, "true": True, "1": True, "no": False, "false": False, "0": False}
_WORDS |= {"on": True, "off": False}
_METAVARS = {int: "N", float: "X", str: "TEXT", bool: "yes|no"}


class OptionParser(ArgumentParser):
    """A parser whose errors are exceptions, with the nearest names of a misspelt flag."""

    def error(self, message: str) -> NoReturn:
        """Raise a ``ValueError`` in place of the exit of argparse."""
        _, _, ours = message.partition(": `")
        raise ValueError(f"`{ours}" if ours else message)


def parse_flags(kind: type[_Options], flags: Sequence[str], **parser: Any) -> _Options:
    """An instance of a dataclass of options from flags, with underscores or dashes.

    Args:
        kind: The dataclass; its fields are those of :func:`~ldam_plugins.training.options.option`.
        flags: The words of the command line.
        **parser: As for :func:`make_parser`.

    Raises:
        ValueError: a flag that there is not (the nearest are named, or that it is among the groups,
            which another dataclass shares), or a bad value.
    """
    known = [f"--{field.name}" for field in fields(kind)]  # type: ignore[arg-type]
    found, unknown = make_parser(kind, **parser).parse_known_args([*map(_underscored, flags)])
    if unknown:
        flag = unknown[0].split("=")[0]
        near = get_close_matches(flag, known, n=3)
        hint = f"Did you mean {' or '.join(near)}?" if near else "--help lists all."
        if flag[2:] in (name for names in (parser.get("groups") or {}).values() for name in names):
            hint = "Another recipe has it. --help lists those of this one."
        raise ValueError(f"There is no option {unknown[0]!r}. {hint}")
    return kind(**vars(found))


def parse_known_flags(
    kind: type[_Options], flags: Sequence[str], **parser: Any
) -> tuple[_Options, list[str]]:
    """As :func:`parse_flags`, and the words that are no flags of the dataclass, for another one."""
    found, rest = make_parser(kind, **parser).parse_known_args([*map(_underscored, flags)])
    return kind(**vars(found)), rest


def or_refused(parse: Callable[[], _Options]) -> _Options:
    """What ``parse`` gives; where it refuses the command line the process ends with a line."""
    try:
        return parse()
    except (TypeError, ValueError) as error:
        if is_first_process():
            print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        raise SystemExit(USAGE_ERROR) from None


def make_parser(
    kind: type[Any], *, groups: Mapping[str, Sequence[str]] | None = None, **about: Any
) -> OptionParser:
    """The parser of a dataclass of options.

    A flag that is true or false may stand alone or before ``yes`` or ``no``; one that is true
    unless told has a ``--no_...`` as well.

    Args:
        kind: The dataclass.
        groups: Fields by the title under which ``--help`` lists them; others come last.
        **about: Of ``ArgumentParser``: ``prog``, ``usage``, ``description``, ``epilog``.
    """
    formatter: Callable[..., HelpFormatter] = lambda prog: HelpFormatter(  # noqa: E731
        prog, max_help_position=28, width=110
    )
    parser = OptionParser(allow_abbrev=False, formatter_class=formatter, **about)
    hints, by_name = get_type_hints(kind), {field.name: field for field in fields(kind)}
    named = {name for names in (groups or {}).values() for name in names}
    parts = {**(groups or {}), "more": [name for name in by_name if name not in named]}
    for title, names in parts.items():
        part = parser.add_argument_group(title)
        for name in (each for each in names if each in by_name):
            _add(part, by_name[name], hints[name])
    return parser


def _add(part: Any, field: Any, hint: Any) -> None:
    default = field.default if field.default_factory is MISSING else field.default_factory()
    more = {key: value for key, value in field.metadata.items() if key not in ("help", "choices")}
    kind, is_list = _element_type(hint)
    more |= {"nargs": more.get("nargs", "*")} if is_list else {}
    choices = field.metadata.get("choices")
    if choices is not None:
        chosen = _chooser(field.name, choices)
        more |= {"type": chosen, "metavar": "|".join(map(str, choices))}
        if bool in get_args(hint):  # yes, no, or another word
            more["type"] = lambda word: _truth(word) if word.lower() in _WORDS else chosen(word)
    elif kind is bool:
        more |= {"type": _truth, "nargs": "?", "const": True, "metavar": _METAVARS[bool]}
    else:
        more |= {"type": kind, "metavar": _METAVARS[kind]}
    text = field.metadata["help"]
    is_told = default in ("", []) or default is None or default is False or "[" in text
    if not is_told:
        text += f" [{'yes' if default is True else default}]"
    part.add_argument(f"--{field.name}", default=default, help=text, **more)
    if default is True:
        part.add_argument(
            f"--no_{field.name}", dest=field.name, action="store_false", help="not so"
        )


def _element_type(hint: Any) -> tuple[Any, bool]:
    """The type of a value of ``T``, ``T | None`` or ``list[T]``, and whether it is a list."""
    if get_origin(hint) is list:
        return get_args(hint)[0], True
    if get_origin(hint) in (Union, types.UnionType):
        kinds = [each for each in get_args(hint) if each is not type(None)]
        return (str if str in kinds else kinds[0]), False  # text that may be a number is text
    return hint, False


def _chooser(name: str, choices: Any) -> Callable[[str], str]:
    def chosen(word: str) -> str:
        try:
            return check_choice(name, word, choices)
        except ValueError as error:
            raise ArgumentTypeError(str(error)) from error

    return chosen


def _truth(word: str) -> bool:
    if word.lower() not in _WORDS:
        raise ArgumentTypeError(f"yes or no is expected, got {word!r}")
    return _WORDS[word.lower()]


def _underscored(word: str) -> str:
    name, equals, value = word.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}" if word.startswith("--") else word


def flag_names(flags: Sequence[str]) -> set[str]:
    """The options that are given among the words of a command line."""
    return {_underscored(word).split("=")[0][2:] for word in flags if word.startswith("--")}


def is_first_process() -> bool:
    """Whether this is the process that speaks for all that a launcher has started."""
    return int(os.environ.get("RANK", 0)) == 0


def log_bars_rarely() -> None:
    """Let progress bars write each half minute where nobody watches; call it before tqdm is there.

    The interval of all bars is read when tqdm is imported.
    """
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", LOG_SECONDS)


def begin_study(parse: Callable[[], _Options]) -> _Options:
    """The options of a recipe that trains nothing itself, as :func:`or_refused` gives them.

    From now on its errors are a line, unless ``--traceback`` was given.
    """
    options = or_refused(parse)
    if "traceback" not in flag_names(sys.argv):
        say_errors_briefly()
    log_bars_rarely()
    return options


def say_errors_briefly(folder: str | os.PathLike[str] | None = None) -> None:
    """From now on errors of this package, and Ctrl-C, end the process with a line, not a traceback.

    Its warnings are a line as well. All other errors keep theirs. Exit codes: 1 after an error, 130
    after Ctrl-C.

    Args:
        folder: ``--output_dir`` of a run that can be resumed, for what Ctrl-C says.
    """
    program = Path(sys.argv[0]).name

    def show(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if issubclass(kind, KeyboardInterrupt):
            if is_first_process():
                told = ""
                if folder is not None and has_checkpoint(folder):
                    told = f"; --resume goes on from what {folder} keeps"
                elif folder is not None:
                    told = "; nothing was saved yet, start it again"
                print(f"\n{program}: interrupted{told}.", file=sys.stderr)
        elif is_ours(error):
            print(f"{program}: error: {error}\n(--traceback shows where)", file=sys.stderr)
        else:
            sys.__excepthook__(kind, error, trace)

    sys.excepthook = show
    plain = warnings.formatwarning

    def worded(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        line: str | None = None,
    ) -> str:
        if _is_our_file(filename):
            return f"{program}: warning: {message}\n"
        return plain(message, category, filename, lineno, line)

    warnings.formatwarning = worded


def is_ours(error: BaseException) -> bool:
    """Whether this package, or a script of the command line, raised an error to be read by users.

    A ``TypeError`` of theirs names the argument first; any other is a fault in the code.
    """
    frames = traceback.extract_tb(error.__traceback__)
    told = (ValueError, TypeError, RuntimeError, OSError, ImportError)
    if not frames or not isinstance(error, told):
        return False
    ours = _is_our_file(frames[-1].filename)
    return ours and (not isinstance(error, TypeError) or str(error).startswith("`"))


def _is_our_file(name: str) -> bool:
    """Whether a file is one of this package, or lies beside the script of the command line."""
    script = Path(sys.argv[0])  # "-c" where there is none
    folders = (*_OURS, *([script.resolve().parent] if script.is_file() else []))
    return any(Path(name).resolve().is_relative_to(folder) for folder in folders)
