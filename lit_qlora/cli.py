"""Turns the argv of a command into its settings, and a user's mistake into one readable line."""

import atexit
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields, is_dataclass
from functools import cache, reduce
from io import TextIOWrapper
from itertools import pairwise
from operator import or_
from pathlib import Path
from stat import S_ISFIFO
from traceback import format_exception
from types import UnionType
from typing import Annotated, Any, NoReturn, TextIO, TypeVar, Union, get_args, get_origin, get_type_hints

from jsonargparse import SUPPRESS, ArgumentParser, set_parsing_settings
from jsonargparse.typing import SecretStr as SecretStr  # a setting that is never printed

from lit_qlora.errors import ResourceError, UsageError, UserError, did_you_mean
from lit_qlora.files.reading import check_yaml, read_yaml_text
from lit_qlora.redact import scrub
from lit_qlora.signals import Interrupted, StopRequest, caught

Config = TypeVar("Config")
WORDS, NUMBERS = re.compile(r"[\w./:*-]+(,[\w./:*-]+)+"), re.compile(r"[-+.\deE]+(,[-+.\deE]+)+")
"""Several of them, with commas between."""
DATA_FLAG = "--data.path"
"""Flag for a data file in every command."""
OLD_DATA_FLAGS = ("--data", "--data_path", "--file", "--csv_path")
"""Its earlier names, which every command still takes. A command's own setting may be called so."""
COMMAND_LINE_ONLY = ("allow_code",)
"""Settings that a --config file must not hold and config.yaml does not: a file could be a stranger's."""
SERVERS = {"eval.judge_url": "eval.judge_key_variable"}
"""Setting that names a server -> the one that names the variable with the key that it gets.

Where there is a key, no --config file alone decides who gets it.
"""


def run(main: Callable[[Config], None], config_type: type[Config], argv: Sequence[str] | None = None) -> None:
    """Parse argv (and any --config file) into `config_type`, then call `main` with it.

    The docstrings of `config_type` and of its fields become the --help texts. A UserError ends the program with its
    status and its message alone, as do a full disk, exhausted memory and a signal. Any other exception is our bug and
    keeps its traceback. LIT_QLORA_DEBUG=1 shows the traceback of every error.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    _forget_backend_of_notebook()
    sys.stdout, sys.stderr = _Terminal.instead_of(sys.stdout), _Terminal.instead_of(sys.stderr)

    def hide(text: str) -> str:
        return scrub(text, argv, os.environ)

    try:
        with caught() as stop, _quick_to_leave(stop):
            _run(main, config_type, argv, hide)
    except Interrupted as signal:
        _end(str(signal), 128 + signal.number, prefix="")
    except Exception:  # a defect of ours: its traceback is for whoever mends it, and may be posted anywhere
        sys.excepthook = lambda *error: sys.stderr.write(hide("".join(format_exception(*error))))
        raise


def _forget_backend_of_notebook() -> None:
    """Leave the choice of a backend to matplotlib.

    Jupyter and Colab hand theirs, `module://...`, to every `!command`. Without the kernel's packages matplotlib ends
    its import with an error, and with it torchmetrics and Lightning. No figure is shown on a screen here.
    """
    if os.environ.get("MPLBACKEND", "").startswith("module:"):
        del os.environ["MPLBACKEND"]


class _Terminal(TextIOWrapper):
    """A terminal to which text does no more than colour, and end, clear or leave a line.

    Names of files, data and answers may be a stranger's. Other sequences write to the clipboard, rename the window or
    have the terminal type; they are shown instead.
    """

    forbidden = re.compile(r"\x1b(?!\[[\d;]*[mKA])|[\x00-\x08\x0b\x0c\x0e-\x1a\x1c-\x1f\x7f-\x9f]")

    @classmethod
    def instead_of(cls, stream: TextIO) -> TextIO:
        """Return a stream to the same terminal; any other file stays as it is."""
        if isinstance(stream, cls) or not isinstance(stream, TextIOWrapper) or stream.closed or not stream.isatty():
            return stream
        return cls(stream.buffer, stream.encoding, stream.errors, line_buffering=True)

    def write(self, text: str) -> int:
        """Write a text, harmless."""
        return super().write(self.forbidden.sub(lambda found: ascii(found[0])[1:-1], text))


@contextmanager
def _quick_to_leave(stop: StopRequest) -> Iterator[None]:
    """After a signal, leave out what Python does at its end: to tear down libraries takes a second or two."""
    try:
        yield
    except (SystemExit, Interrupted) as end:
        if stop.signal:
            atexit.register(_leave, int(end.code or 0) if isinstance(end, SystemExit) else 128 + end.number)
        raise


def _leave(status: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # the reader may be gone
            stream.flush()
    os._exit(status)


def _run(
    main: Callable[[Config], None], config_type: type[Config], argv: list[str], hide: Callable[[str], str]
) -> None:
    try:
        argv[:] = _read_pipes(argv)  # in place, so that `hide` knows what they hold
        config = parse(config_type, argv)
        for note in getattr(config, "notes", list)():
            print(f"note: {hide(note)}", file=sys.stderr)
        main(config)
        print(end="", flush=True)
    except UserError as error:
        _end(hide(str(error)), error.status, error.prefix)
    except BrokenPipeError:  # `... | head -1`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        _end("stopped by Ctrl-C", 130, prefix="")
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        _end(hide(f"{error.filename or 'the system'}: {error.strerror}."), ResourceError.status)
    except (MemoryError, RuntimeError) as error:
        kind, reason = type(error).__name__, str(error).partition("\n")[0]
        if kind not in ("MemoryError", "OutOfMemoryError") and "can't allocate memory" not in reason:
            raise
        _end(f"Out of memory. {reason}\n{_advice(config_type)}".strip(), ResourceError.status)


def parse(config_type: type[Config], argv: Sequence[str] | None = None) -> Config:
    """Return the settings that argv describes. Raises UsageError; --help and --print_config print and exit.

    `--help all` explains every flag, `--help WORD` those with WORD in their names, and --help those to begin with.
    """
    parser = _parser(config_type)  # type: ignore[arg-type] # a class is hashable
    argv = _name_data(parser, list(sys.argv[1:] if argv is None else argv))
    if word := _help_word(argv):
        print(_help(parser, config_type, word))
        raise SystemExit(0)
    argv = _read_pipes(_split_lists(parser, _complete_switches(parser, argv)))
    parser.argv = argv
    for flag in (word.removesuffix("=--") for word in argv if word.startswith("--") and word.endswith("=--")):
        raise UsageError(f"{flag} must be given a value; -- is none.")  # argparse would make it an empty list
    try:
        for config in parser._config_files():
            _check_config(config, parser.sections)
        return _instantiate(parser, config_type, argv)
    except (ValueError, OverflowError, RecursionError) as error:  # of YAML, paths and numbers that nobody writes
        raise UsageError(f"{_strange(argv)} cannot be read: {str(error).partition(chr(10))[0]}.") from error


def _instantiate(parser: "_Parser", config_type: type[Config], argv: Sequence[str]) -> Config:
    namespace = parser.parse_args(argv)
    values = parser.instantiate(namespace)
    for name, value in vars(values).items():
        if isinstance(value, SecretStr) and not isinstance(value.get_secret_value(), str):
            raise UsageError(f"--{name} must be one text. In quotation marks, '\"[...]\"', YAML takes it as it is.")
    for name in COMMAND_LINE_ONLY:
        if getattr(values, name, False) and not _is_typed(name, argv):
            raise UsageError(
                f"{parser._config_file()}: {name} counts on the command line alone, so that no file can allow it.\n"
                f"Read what would run, then give --{name} true."
            )
    for server, variable in SERVERS.items():
        url, name = (_value_of(values, setting) for setting in (server, variable))
        if url and os.environ.get(name) and not _is_typed(server, argv):
            raise UsageError(
                f"{parser._config_file()}: {server} would be sent the key in {name}.\n"
                f"If it is for {url}, give --{server} on the command line too; else unset {name}."
            )
    return config_type(**{key: value for key, value in vars(values).items() if key != "config"})


def _is_typed(name: str, argv: Sequence[str]) -> bool:
    """Tell if a setting was given on the command line."""
    return any(word == f"--{name}" or word.startswith(f"--{name}=") for word in argv)


def _value_of(values: Any, setting: str) -> Any:
    """Return the value of a setting by its full name; None where a command has no such setting."""
    for part in setting.split("."):
        values = getattr(values, part, None)
    return values


def _check_config(config: str, sections: Sequence[str]) -> None:
    """Check a --config file, or its text, for what jsonargparse would take without a word or with a traceback.

    Raises:
        UsageError: if it is beyond the limits, names a setting twice or another file, or a section has no settings.
    """
    import yaml

    given = os.path.isfile(config)
    text = read_yaml_text(Path(config), UsageError) if given else config
    location = config if given else "--config"
    check_yaml(text, location, UsageError)
    seen = set()
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:  # two documents in one file
        raise UsageError(f"{location}: not valid YAML: {' '.join(str(error).split())}.") from None
    for name, key, value in _settings_of(root):
        line = f"{location}:{key.start_mark.line + 1}: "
        if key.tag != "tag:yaml.org,2002:str":
            raise UsageError(f"{line}{name} is not a name. In quotation marks, YAML takes it as one.")
        if name in seen:
            raise UsageError(f"{line}{name} is given twice. Leave one out.")
        if name == "config":
            raise UsageError(f"{line}a --config file names no other. Give --config several times.")
        if name in sections and not isinstance(value, yaml.MappingNode):
            raise UsageError(f"{line}{name} is a section: its settings are lines below it, indented.")
        seen.add(name)


def _settings_of(node: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield the full name, the key and the value of each setting in a YAML mapping."""
    import yaml

    for key, value in node.value if isinstance(node, yaml.MappingNode) else []:
        if key.tag != "tag:yaml.org,2002:merge":
            yield f"{prefix}{key.value}", key, value
            yield from _settings_of(value, f"{prefix}{key.value}.")


def to_yaml(config: Any, changes: Mapping[str, Any] | None = None) -> str:
    """Return the settings as YAML, without COMMAND_LINE_ONLY; given with --config, it makes the same settings again.

    Args:
        changes: other values of some settings, by their full names, such as lora.r.
    """
    import yaml

    class Dumper(yaml.SafeDumper):
        """Puts a path such as 1e3, a number to jsonargparse but not to PyYAML, in quotation marks."""

    Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+$"), None)
    settings = {name: value for name, value in asdict(config).items() if name not in COMMAND_LINE_ONLY}
    for name, value in (changes or {}).items():
        *sections, last = name.split(".")
        reduce(lambda section, part: section.setdefault(part, {}), sections, settings)[last] = value
    return yaml.dump(plain(settings), Dumper=Dumper, sort_keys=False)


class _Parser(ArgumentParser):
    """A parser whose messages name the flag and guess its meaning, without nine lines of usage."""

    argv: Sequence[str] = ()
    sections: Sequence[str] = ()

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        cause = ex if isinstance(ex, UserError) else getattr(ex, "__cause__", None)
        if isinstance(cause, UserError):
            raise cause
        flags = [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]
        if found := re.match(r"unrecognized arguments: (\S+)", message):
            flag = found[1].split("=")[0]
            hint = did_you_mean(flag, flags) if flag.startswith("-") else _flag_before(flag, flags)
            raise UsageError(f"{flag} is not a flag of this command.{hint} --help all lists them.")
        if found := re.search(r"(?:Group '([\w.]+)' does not accept \w+|Option) '([\w.]+)'", message):
            key = ".".join(part for part in found.groups() if part)
            raise UsageError(f"{self._location(key)}{key} is not a setting.{did_you_mean('--' + key, flags)}")
        if found := re.search(r'key "([\w.]+)":(.*)', message, re.DOTALL):
            raise UsageError(self._wrong_value(found[1], found[2]))
        if found := re.search(r"arguments are required: (.*)", message):
            raise UsageError(f"{', '.join(map(self._shown, found[1].split(', ')))} must be given.")
        if message.startswith("Problems parsing config:"):
            raise UsageError(f"{self._config_file()}: not valid YAML: {' '.join(message.split()[3:])}.")
        if message.startswith("Unexpected config:"):
            raise UsageError(f"{self._config_file()} holds no settings. One is a line such as 'seed: 1'.")
        raise UsageError(" ".join(message.split()))

    def _wrong_value(self, key: str, detail: str) -> str:
        given = re.search(r"(?:Given|Got) value: (?!.*Given value)(.*)", detail, re.DOTALL)
        if not given:
            return f"{self._shown(key)}: {' '.join(detail.split())}."
        value = given[1].strip()
        choices = list(dict.fromkeys(re.findall(r"'([\w.-]+)'", "".join(re.findall(r"Literal\[.*?\]", detail)))))
        kinds = [
            kind for kind in re.findall(r"<class '(?:[\w.]*\.)?(\w+)'>", detail) if kind not in ("NoneType", "str")
        ]
        if value.startswith("[") and choices:
            value = next((word for word in re.findall(r"[\w.-]+", value) if word not in choices), value)
        value = value.strip("'\"")
        kinds = ["list" if kind == "tuple" else kind for kind in kinds]
        expected = " or ".join([*dict.fromkeys(kinds), *([f"one of {', '.join(choices)}"] if choices else [])])
        location, hint = self._location(key, value), did_you_mean(value, choices)
        return f"{location}{self._shown(key)}: expected {expected}, got {value!r}.{hint}"

    def _shown(self, key: str) -> str:
        """Return the flag that --help shows for a setting."""
        action = self._option_string_actions.get(f"--{key}")
        return action.option_strings[0] if action else f"--{key}"

    def _config_files(self) -> list[str]:
        """Return what each --config names."""
        return [
            here.removeprefix("--config").removeprefix("=") or following
            for here, following in pairwise([*self.argv, ""])
            if here == "--config" or here.startswith("--config=")
        ]

    def _config_file(self) -> str:
        """Return the file that --config names, --config if it is a text, or ''."""
        return next((config if os.path.isfile(config) else "--config" for config in self._config_files()), "")

    def _location(self, key: str, value: str | None = None) -> str:
        """Return 'run.yaml:7: ' if the --config file sets `key` (to `value`, or to a list with it), else ''."""
        import yaml

        file = Path(self._config_file())
        if not file.is_file():
            return ""
        line, node = 0, yaml.compose(read_yaml_text(file, UsageError))
        for part in key.split("."):
            pairs = node.value if isinstance(node, yaml.MappingNode) else []
            line, node = next(
                ((name.start_mark.line + 1, item) for name, item in pairs if name.value == part), (0, None)
            )
        items = node.value if isinstance(node, yaml.SequenceNode) else [node]
        if not line or (value is not None and value not in [getattr(item, "value", None) for item in items]):
            return ""
        return f"{file}:{line}: "


@cache
def _parser(config_type: type[Any]) -> _Parser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = _Parser(
        description=(config_type.__doc__ or "").strip(), allow_abbrev=False, usage="%(prog)s [--FLAG VALUE ...]"
    )
    parser.add_argument("--config", action="config", help="YAML file with any of these settings; flags win.")
    parser.add_class_arguments(config_type, as_group=False)
    for action in parser._actions:
        if hasattr(action, "_typehint"):
            action._typehint = _without_limits(action._typehint)
    parser.sections = [name for name, hint in get_type_hints(config_type).items() if is_dataclass(hint)]
    _remove_section_flags(parser, parser.sections)
    for flag in OLD_DATA_FLAGS:
        if own := parser._option_string_actions.get(flag):
            own.option_strings = [DATA_FLAG, flag]
    return parser


def _help_word(argv: Sequence[str]) -> str:
    """Return the word behind --help, 'first' if there is none, and '' without --help."""
    for word, following in pairwise([*argv, "--"]):
        if word in ("--help", "-h"):
            return "first" if following.startswith("-") else following
    return next((word.partition("=")[2] for word in argv if word.startswith("--help=")), "")


def _help(parser: _Parser, config_type: type[Any], word: str) -> str:
    """Explain the flags that people need first, 'all', or those whose names hold a word.

    Raises:
        UsageError: if no name holds it.
    """
    actions = [action for action in parser._actions if action.help != SUPPRESS]
    names = {
        "first": {"help", "config", *_first(config_type)},
        "all": {action.dest for action in actions},
    }.get(word, {action.dest for action in actions if any(word in flag for flag in action.option_strings)})
    if not names:
        flags = [flag for action in actions for flag in action.option_strings]
        raise UsageError(f"--help {word}: no flag has this in its name.{did_you_mean(f'--{word}', flags)}")
    hidden = {action: action.help for action in actions if action.dest not in names}
    for action in hidden:
        action.help = SUPPRESS
    text = parser.format_help().rstrip()
    for action, explanation in hidden.items():
        action.help = explanation
    more = f"{len(hidden)} more flags: --help all explains them, --help WORD those with WORD in their names."
    return f"{text}\n\n{more}" if hidden else text


def _first(config_type: type[Any], prefix: str = "") -> Iterator[str]:
    """Yield the names of the settings that their classes list in `first`; for one that lists none, all its own."""
    hints = get_type_hints(config_type)
    listed = [names for kind in config_type.__mro__ if (names := vars(kind).get("first")) is not None]
    own = [] if "first" in vars(config_type) and listed else list(config_type.__annotations__)
    for field in fields(config_type):
        if listed and field.name not in {*own, *(name for names in listed for name in names)}:
            continue
        if is_dataclass(hints[field.name]):
            yield from _first(hints[field.name], f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}"


def _remove_section_flags(parser: ArgumentParser, sections: Sequence[str]) -> None:
    """Remove --lora, --data, ...

    jsonargparse 4.53 adds them. Each would read a file of any size, or import the module that its value or a
    class_path in a --config file names.
    """
    for flag in (f"--{section}" for section in sections):
        action = parser._option_string_actions.pop(flag, None)
        for group in (parser, *parser._action_groups):
            for actions in (group._actions, getattr(group, "_group_actions", [])):
                if action and action in actions:
                    actions.remove(action)


def _without_limits(hint: Any) -> Any:
    """Return the annotation as --help shows it: Annotated[int, at_least(1)] is an int. Settings check their limits."""
    kind, parts = get_origin(hint), get_args(hint)
    if kind is Annotated:
        return _without_limits(parts[0])
    if kind in (Union, UnionType):
        return reduce(or_, map(_without_limits, parts))
    return kind[tuple(map(_without_limits, parts))] if kind in (tuple, dict) else hint


def _strange(argv: Sequence[str]) -> str:
    """Return the flag whose value is the likeliest to be refused by Python itself: NUL, bytes, thousands of letters."""
    for word in argv:
        flag, _, value = word.partition("=")
        if "\0" in value or len(value) > 1000 or not value.isascii():
            return f"The value of {flag}"
    return "A value on the command line or in the --config file"


def _read_pipes(argv: Sequence[str]) -> list[str]:
    """Put the text of each pipe that --config names, as `--config <(...)` does, in its place: it can be read once."""
    words: list[str] = []
    for word in argv:
        follows = words[-1:] == ["--config"]
        name = word if follows else word.removeprefix("--config=")
        if (follows or name != word) and _is_pipe(name):
            words = words[:-1] if follows else words
            word = f"--config={read_yaml_text(Path(name), UsageError).strip() or '{}'}"
        words.append(word)
    return words


def _is_pipe(name: str) -> bool:
    with suppress(OSError, ValueError):  # a text of settings is no path
        return S_ISFIFO(os.stat(name).st_mode)
    return False


def _complete_switches(parser: ArgumentParser, argv: list[str]) -> list[str]:
    """Complete `--dry_run` alone to `--dry_run=true`, and every other flag that takes true or a word."""
    switches = {
        flag
        for action in parser._actions
        if getattr(action, "_typehint", None) in (bool, bool | str)
        for flag in action.option_strings
    }
    complete = []
    for here, following in zip(argv, [*argv[1:], "--"], strict=False):
        complete.append(f"{here}=true" if here in switches and following.startswith("--") else here)
    return complete


def _flag_before(word: str, flags: Sequence[str]) -> str:
    """Return ' Did you mean --data.path WORD?' for a word alone, with the flag that a command needs most."""
    usual = (DATA_FLAG, "--prompt", "--repo_id", "--lora_path", "--checkpoint_dir")
    return next((f" Did you mean {flag} {word}?" for flag in usual if flag in flags), "")


def _name_data(parser: ArgumentParser, argv: Sequence[str]) -> list[str]:
    """Put the name of the command's own setting in place of DATA_FLAG and its earlier names."""
    names = (DATA_FLAG, *OLD_DATA_FLAGS)
    own = [flag for flag in (*names, "--verify") if flag in parser._option_string_actions]
    words = [word.partition("=") for word in argv]
    return [(own[0] if own and flag in names and flag not in own else flag) + "".join(rest) for flag, *rest in words]


def _split_lists(parser: ArgumentParser, argv: Sequence[str]) -> list[str]:
    """Put brackets around `query,value`, for flags that take one value or a list; not around the name of a file."""
    lists = {
        flag: NUMBERS if get_args(part)[0] in (int, float) else WORDS
        for action in parser._actions
        for part in get_args(getattr(action, "_typehint", None))
        if get_origin(part) is tuple
        for flag in action.option_strings
    }
    texts = {
        flag
        for action in parser._actions
        if getattr(action, "_typehint", None) == tuple[str, ...] | str
        for flag in action.option_strings
    }
    words: list[str] = []
    for word in argv:
        flag, equals, value = word.partition("=") if word.startswith("--") else ("".join(words[-1:]), "", word)
        if flag in lists and lists[flag].fullmatch(value) and not os.path.exists(value):
            value = f"[{value}]"
        if flag in texts and value.startswith("[") and not os.path.exists(value):
            value = _texts(value)
        words.append(f"{flag}={value}" if equals else word if word.startswith("--") else value)
    return words


def _texts(value: str) -> str:
    """A list of texts, each in quotation marks where YAML would take one for a number or a truth."""
    import yaml

    try:
        check_yaml(value, "a list", UsageError)
        items, plain = yaml.load(value, yaml.BaseLoader), yaml.safe_load(value)
    except (UsageError, yaml.YAMLError, ValueError):  # left to the parser, which says what is wrong
        return value
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items) or items == plain:
        return value
    return json.dumps(items)


def _advice(config_type: type[Any]) -> str:
    """Advise flags of this command that save memory."""
    advice = {
        "train": "lower --train.micro_batch_size or --data.max_length, or set --train.recompute full",
        "batch_size": "lower --batch_size",
        "quantize": "set --quantize bnb.nf4",
    }
    tips = [tip for name, tip in advice.items() if name in {field.name for field in fields(config_type)}]
    return f"To need less, {', or '.join(tips)}." if tips else ""


def plain(value: Any) -> Any:
    """Return `value` with paths as strings and tuples as lists, as YAML needs."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _end(message: str, status: int, prefix: str = "error: ") -> NoReturn:
    if os.environ.get("LIT_QLORA_DEBUG"):
        raise  # the exception being handled
    with suppress(OSError, ValueError):  # the reader may be gone
        print(f"{prefix}{message}", file=sys.stderr)
    raise SystemExit(status) from None
