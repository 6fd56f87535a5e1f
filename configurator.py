"""
Configuration in nanoGPT's habit, `python train.py config/x.py --key=value`, with typed frozen dataclasses behind it:
defaults < config file < flags. A config file is parsed, never executed; a misspelt key is an error, never a new global.

A section is a frozen dataclass that reads like nanoGPT's config block, with a default for every field. The comment on a field's
line is its help text, a comment line above it at its own indentation is a heading, and a deeper one goes on with the text above:

    @dataclass(frozen=True)
    class TrainConfig:
        model: str = "encoder_decoder"  # which model to train
        # optimizer
        learning_rate: float = 1e-3     # peak of the cosine schedule
        grad_clip: float | None = None  # none: no clipping
        def __post_init__(self):        # raises ValueError: the place where values are checked
            ...

train.py has at most one positional word, a config file, and a section that depends on the value of a key:

    settings = configure(argv, [TrainConfig], positional="[CONFIG]", choose=("model", MODEL_CONFIGS), description=__doc__)
    train, model = settings.sections
    if "vocab_size" not in settings.given:              # neither in the config file nor as a flag
        model = dataclasses.replace(model, vocab_size=data.vocab_size)

sample.py and compare.py have one section and positional words of their own:

    settings = configure(argv, [SampleConfig], positional="RUN", description=__doc__)
    (options,), (run,) = settings.sections, settings.words

Bad values are a ValueError, which errors.py turns into a line on stderr.
"""

import ast
import contextlib
import dataclasses
import difflib
import inspect
import math
import operator
import re
import shlex
import sys
import textwrap
import types
import typing
from pathlib import Path

BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Pow: operator.pow,
}


class Arguments(typing.NamedTuple):
    words: list[str]  # positional
    flags: dict[str, str | bool]  # --key=value as text, bare --key as True; of a repeated key the last counts
    followers: dict[str, str]  # the word right after a bare --key: perhaps its value, written with a space
    help: bool


class Settings(typing.NamedTuple):
    sections: list  # an instance for each class given to `configure`, and last the one picked by `choose`
    given: dict[str, object]  # the keys that the config file, `stored` or a flag set, with their final values
    words: list[str]  # positional words, without the config file
    config_file: Path | None
    flags: set[str]  # the keys that a flag set


def configure(
    argv: list[str] | None,
    sections: list[type],
    *,
    description: str = "",
    positional: str = "",
    choose: tuple[str, dict[str, type]] | None = None,
    stored: typing.Callable[[Path | None, dict, dict], dict[str, object]] | None = None,
) -> Settings:
    """
    Build the sections from the command line (`None`: sys.argv). `positional` is shown in the usage line and says how many words
    there may be: "" none, "RUN" exactly one, "RUN ..." one or more, in brackets also zero; the word CONFIG means a config file.
    `choose=(key, classes)` adds `classes[value of key]`. `stored(config file, its values, flags)` returns values that count more
    than the config file's and less than flags. `--help` prints every key and exits 0. A key that stands in several sections is set
    in all of them. Raises ValueError (keys, values, words) or FileNotFoundError (config file).
    """
    arguments = read_arguments(sys.argv[1:] if argv is None else argv)
    chooser, variants = choose or ("", {})
    if arguments.help:
        print(help_text(sections, description, positional, chooser, variants), flush=True)
        raise SystemExit(0)
    kinds: dict[str, list] = {}  # of every key that there may be, its type in each section that has it
    for cls in (*sections, *variants.values()):
        for key, kind in annotations(cls).items():
            kinds.setdefault(key, []).append(kind)
    check_words(arguments, positional, kinds)

    words, flags = arguments.words, arguments.flags
    config_file = Path(words[0]) if words and "CONFIG" in positional else None
    file_values = read_config_file(config_file) if config_file else {}
    places = dict.fromkeys(file_values, f" (in {config_file})") | dict.fromkeys(flags, "")
    for key, place in places.items():
        if key not in kinds:
            near = nearest(key, sorted(kinds))
            raise ValueError(f"unknown key {key!r}{place}; " + (f"did you mean {near!r}?" if near else "--help lists all keys"))
    if stored:
        file_values |= stored(config_file, file_values, flags)
        places = dict.fromkeys(file_values, " (stored)") | places
    built = [resolve(cls, file_values, flags, config_file) for cls in sections]
    if choose:
        choice = next(getattr(section, chooser) for section in built if hasattr(section, chooser))
        if choice not in variants:
            raise ValueError(f"{chooser}={choice}: {choice_text(choice, variants)} was expected")
        chosen = variants[choice]
        for key, place in places.items():
            if not any(key in annotations(cls) for cls in (*sections, chosen)):
                owners = ", ".join(repr(name) for name, cls in variants.items() if key in annotations(cls))
                raise ValueError(
                    f"{key!r}{place} is not a key of {chooser} {choice!r} (it belongs to {owners}); "
                    f"its keys are {', '.join(annotations(chosen))}"
                )
        built.append(resolve(chosen, file_values, flags, config_file))
    given = {key: getattr(section, key) for section in built for key in annotations(type(section)) if key in places}
    return Settings(built, given, words[1:] if config_file else words, config_file, set(flags))


def read_arguments(argv: list[str]) -> Arguments:
    """Split the command line into words and flags. Raises ValueError for an option of another form."""
    words, flags, followers, bare = [], {}, {}, ""
    for argument in argv:
        if argument.startswith("--"):
            key, equals, value = argument[2:].partition("=")
            key = key.replace("-", "_")
            if not key.isidentifier():
                raise ValueError(f"{argument!r}: options are written --key=value")
            flags[key] = value if equals else True
            followers.pop(key, None)
            bare = "" if equals else key
        elif argument.startswith("-") and argument != "-h":
            raise ValueError(f"{argument!r}: options start with two dashes, --key=value")
        elif argument != "-h":
            words.append(argument)
            if bare:
                followers[bare] = argument
            bare = ""
    wants_help = "-h" in argv or flags.pop("help", False) is not False
    return Arguments(words, flags, followers, wants_help)


def check_words(arguments: Arguments, positional: str, kinds: dict[str, list]) -> None:
    """Raise ValueError for too many words or too few, and for words that were meant as the value of a key in `kinds`."""
    words = arguments.words
    for key, word in arguments.followers.items():
        if key in kinds and (bool not in kinds[key] or word.lower() in BOOLEANS):
            raise ValueError(f"--{key} {word}: a value follows '=', not a space: write {shlex.quote(f'--{key}={word}')}")
    for word in words:
        if "=" in word and word.split("=")[0] in kinds:
            raise ValueError(f"unexpected word {word!r}: write --{word}")
    if len(words) > (math.inf if "..." in positional else 1 if positional else 0):
        takes = f"no more than {positional}" if positional else "no positional words"
        raise ValueError(f"unexpected word {words[-1]!r}: this script takes {takes}; values are written --key=value")
    if not words and positional and not positional.startswith("["):
        raise ValueError(f"{positional} is missing; --help explains")


# config files


def read_config_file(path: str | Path, readers: tuple[Path, ...] = ()) -> dict[str, object]:
    """
    The assignments of a config file, in order. `base = "common.py"` (relative to this file) puts that file's values below
    this one's; `readers` are the files whose base this one is. Raises ValueError for anything but `name = value` lines,
    FileNotFoundError for a missing file.
    """
    path = Path(path)
    if (path / "config.json").is_file():
        raise FileNotFoundError(f"{path} is a run directory, not a config file: to go on with it, --resume --out_dir={path}")
    if path.is_dir():
        raise FileNotFoundError(f"{path} is a folder; name one of the config files in it")
    if not path.is_file():
        files = {}
        for folder in (Path("config"), Path(__file__).with_name("config")):
            files = {file.stem: file for file in sorted(folder.rglob("*.py"))} | files
        near = nearest(path.name.removesuffix(".py"), files)
        hint = f"; did you mean {files[near].as_posix()}?" if near else "; config/ holds the ones there are"
        raise FileNotFoundError(f"config file {path} does not exist{hint}")
    if path.resolve() in readers:
        raise ValueError(f"{path}: this config file is its own base: {' -> '.join(p.name for p in (*readers, path))}")
    try:
        tree = ast.parse(path.read_text(encoding="utf-8-sig"))  # some editors begin a file with a mark
    except SyntaxError as error:
        where = "" if error.lineno is None else f" line {error.lineno}"
        raise ValueError(f"{path}{where}: {error.msg}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}; convert it") from None
    values: dict[str, object] = {}
    for index, line in enumerate(tree.body):
        if index == 0 and ast.get_docstring(tree, clean=False) is not None:
            continue
        try:
            if not (isinstance(line, ast.Assign) and len(line.targets) == 1 and isinstance(line.targets[0], ast.Name)):
                raise ValueError(repr(ast.unparse(line).splitlines()[0][:60]))
            name, value = line.targets[0].id, evaluate(line.value, values)
        except (ValueError, ArithmeticError) as error:
            raise ValueError(
                f"{path} line {line.lineno}: {error}: only 'name = value' lines are allowed, where a value is a "
                "number, string, True, False, None, a list of them, or + - * / // ** of numbers"
            ) from None
        if name != "base":
            values[name] = value
        elif isinstance(value, str):
            values = read_config_file(path.parent / value, (*readers, path.resolve())) | values
        else:
            raise ValueError(f"{path} line {line.lineno}: base = {value!r}: the name of a config file was expected")
    return values


def evaluate(node: ast.expr, names: dict[str, object]) -> object:
    """The value of a constant expression over `names`. Raises ValueError with the source of what is not one."""
    match node:
        case ast.Constant(value=bool() | int() | float() | str() | None):
            return node.value
        case ast.Tuple() | ast.List():
            return tuple(evaluate(element, names) for element in node.elts)
        case ast.Name() if node.id in names:
            return names[node.id]
        case ast.Name():
            meant = f"; Python writes {node.id.title()}" if node.id in ("none", "true", "false") else ""
            raise ValueError(f"{node.id!r} is not assigned above{meant}")
        case ast.UnaryOp(op=ast.USub()) if is_number(value := evaluate(node.operand, names)):
            return -value
        case ast.BinOp() if type(node.op) in OPERATORS:
            left, right = evaluate(node.left, names), evaluate(node.right, names)
            # the bound on the exponent: 9**9**9 would not come back
            if is_number(left) and is_number(right) and not (isinstance(node.op, ast.Pow) and abs(right) > 64):
                return OPERATORS[type(node.op)](left, right)
    raise ValueError(f"{ast.unparse(node)!r}")


# values


def resolve(cls: type, file_values: dict[str, object], flags: dict[str, str | bool], source: object = "the config file"):
    """
    The dataclass with defaults < file < flags; keys of other sections are ignored. Raises ValueError for a wrong type,
    naming `source` for a file's value, and lets through what the dataclass's own __post_init__ raises.
    """
    values = {}
    for key, kind in annotations(cls).items():
        try:
            if key in flags:
                shown = f"--{key} without a value" if flags[key] is True else f"--{key}={flags[key]}"
                values[key] = coerce(flags[key], kind, is_text=flags[key] is not True)
            elif key in file_values:
                shown = f"{key} = {file_values[key]!r} in {source}"
                values[key] = coerce(file_values[key], kind, is_text=False)
        except Mismatch as error:
            raise ValueError(f"{shown}: {error} was expected (default {as_text(defaults(cls)[key])})") from None
    return cls(**values)


class Mismatch(Exception):
    """A value is not of the annotated type; the message says what was expected, with its article."""


def coerce(value: object, kind: object, is_text: bool) -> object:
    """
    `value` as the annotated type: int, float, bool, str, Literal, tuple[T, ...] or a union of these with None. Text comes
    from the command line and is parsed; other values come from a file and only widen (int to float). Raises Mismatch.
    """
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        if types.NoneType in arguments and (value is None or (is_text and value.lower() == "none")):
            return None
        expected = []
        for option in arguments:
            try:
                return coerce(value, option, is_text)
            except Mismatch as error:
                expected.append(str(error))
        raise Mismatch(" or ".join(dict.fromkeys(expected)))
    if typing.get_origin(kind) is typing.Literal:
        if value in arguments:
            return value
        raise Mismatch(choice_text(value, arguments))
    if typing.get_origin(kind) is tuple:  # of any length, all elements of one type; as text 4,4,2
        parts = [part.strip() for part in value.split(",") if value.strip()] if is_text else value
        if not isinstance(parts, (list, tuple)):
            raise Mismatch(type_text(kind))
        try:
            return tuple(coerce(part, arguments[0], is_text) for part in parts)
        except Mismatch:
            raise Mismatch(type_text(kind)) from None
    assert kind in (int, float, bool, str, types.NoneType), f"a field of type {kind} cannot be configured"
    expected = type_text(kind)
    if (kind is str and isinstance(value, str)) or (kind is bool and isinstance(value, bool)):
        return value
    if kind is bool and is_text and value.lower() in BOOLEANS:
        return BOOLEANS[value.lower()]
    if kind is float and (is_text or is_number(value)):
        with contextlib.suppress(ValueError, OverflowError):
            if math.isfinite(float(value)):
                return float(value)
    if kind is int and (is_text or is_number(value)):
        with contextlib.suppress(ValueError):
            if not isinstance(value, float):
                if abs(int(value)) < 1 << 64:
                    return int(value)
                raise Mismatch("an integer of at most 64 bits")
        with contextlib.suppress(ValueError, OverflowError):  # 1e3: show how it is written
            expected = f"an integer such as {int(float(value))}"
    raise Mismatch(expected)


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def nearest(word: object, options) -> str | None:
    return next(iter(difflib.get_close_matches(str(word), list(options), n=1)), None)


def choice_text(value: object, options) -> str:
    near = nearest(value, options)
    return f"one of {', '.join(options)}" + (f" (did you mean {near!r}?)" if near else "")


def type_text(kind: object) -> str:
    if typing.get_origin(kind) is tuple:
        of = typing.get_args(kind)[0]
        example = {str: "this,that", int: "4,4,2", float: "0.9,0.7"}[of]
        return f"a list of {of.__name__} such as {example}"
    return {int: "an integer", float: "a float", bool: "true or false", str: "a string", types.NoneType: "none"}[kind]


def check_given(config: object, *keys: str) -> None:
    """Raise ValueError for settings of a dataclass with nothing after --key=, or with ~/, which a shell expands after a space only."""
    for key in keys:
        value = getattr(config, key)
        if value in ("", ()):
            raise ValueError(f"--{key}= is empty: give it a value, or leave it out")
        if isinstance(value, str) and value.split("/")[0] == "~":
            raise ValueError(f"--{key}={value} would be a folder called ~: write $HOME for your own")


def at_least_one(config: object, *keys: str) -> None:
    """Raise ValueError for settings of a dataclass that are numbers below 1."""
    for key in keys:
        if getattr(config, key) is not None and getattr(config, key) < 1:
            raise ValueError(f"{key}={getattr(config, key)}: at least 1 is needed")


def as_text(value: object) -> str:
    """A value as it would be written on the command line; of white space, which would not be seen, the repr."""
    if isinstance(value, (list, tuple)):
        return ",".join(map(as_text, value))
    if isinstance(value, str):
        return value if value.strip() else repr(value)
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


# dataclasses


def annotations(cls: type) -> dict[str, object]:
    """Name and type of each field, in order."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def defaults(cls: type) -> dict[str, object]:
    return {field.name: field.default for field in dataclasses.fields(cls)}


def to_dict(instance) -> dict[str, object]:
    """The fields as values that JSON keeps: tuples become lists."""
    return {
        key: list(value) if isinstance(value := getattr(instance, key), tuple) else value for key in annotations(type(instance))
    }


def from_dict(cls: type, values: dict[str, object]):
    """The inverse of to_dict; missing keys take their defaults. Raises ValueError for unknown keys and wrong types."""
    unknown = [key for key in values if key not in annotations(cls)]
    if unknown:
        raise ValueError(f"{cls.__name__} has no key {', '.join(map(repr, unknown))}: was this written by another version?")
    return resolve(cls, values, {}, f"a stored {cls.__name__}")


def differences(instance) -> dict[str, object]:
    """The fields whose value is not the default."""
    return {key: value for key, default in defaults(type(instance)).items() if (value := getattr(instance, key)) != default}


def print_differences(*instances) -> None:
    """One line a section: what differs from the defaults."""
    for instance in instances:
        changed = ", ".join(f"{key}={as_text(value)}" for key, value in differences(instance).items())
        print(wrap(f"{type(instance).__name__}: {changed or 'all defaults'}", indent=4))


def wrap(text: str, indent: int) -> str:
    return textwrap.fill(text, 120, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)


# help


def help_text(sections: list[type], description: str, positional: str, chooser: str, variants: dict[str, type]) -> str:
    """Every key of every section with type, default and comment."""
    spec = sys.modules["__main__"].__spec__  # of python -m
    program = f"-m {spec.name}" if spec else sys.argv[0]
    lines = [f"usage: python {program} {positional}".rstrip() + " [--key=value ...]", "", description.strip()]
    if "CONFIG" in positional:
        lines += ["", "CONFIG is a file of 'name = value' lines, see config/; flags override it."]
    blocks = {cls.__name__: cls for cls in sections} | {f"with --{chooser}={name}": cls for name, cls in variants.items()}
    for title, cls in blocks.items():
        comments = field_comments(cls)
        lines += ["", title]
        for key, kind in annotations(cls).items():
            heading, comment = comments.get(key, ("", ""))
            lines += [f"  # {heading}"] if heading else []
            lines.append(wrap(f"{f'  --{key}={help_type(kind)}':<40} {comment} [{as_text(defaults(cls)[key])}]", indent=41))
    return "\n".join(lines)


def help_type(kind: object) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return "|".join(typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return f"{help_type(typing.get_args(kind)[0])},..."
    if typing.get_args(kind):
        return "|".join(help_type(option) for option in typing.get_args(kind))
    return "none" if kind is types.NoneType else kind.__name__


def field_comments(cls: type) -> dict[str, tuple[str, str]]:
    """For each field the heading above it and the comment on its line, read from the source (which may be out of reach)."""
    try:
        lines = textwrap.dedent(inspect.getsource(cls)).splitlines()
    except (OSError, TypeError):
        return {}
    found: dict[str, tuple[str, str]] = {}
    key, heading = "", ""
    for line in lines[1:]:
        code, comment = re.fullmatch(r"(.*?)(?:(?<!\S)#\s*(.*))?", line).groups(default="")
        if re.match(r"    (def|@|class)\b", code):
            break  # what follows are methods
        if comment.startswith("fmt:"):  # a word to the formatter
            continue
        if field := re.match(r"    (\w+)\s*:", code):
            key = field[1]
            found[key], heading = (heading, comment), ""
        elif comment and (code.strip() or len(code) > 4):  # goes on with the field above
            if key:
                found[key] = (found[key][0], f"{found[key][1]} {comment}".strip())
        elif comment:
            heading = f"{heading} {comment}".strip()
    return found
