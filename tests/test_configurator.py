"""configurator.py: precedence, types, messages, and config files that are read but never run."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

import configurator
from configurator import configure, from_dict, read_config_file, to_dict

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Train:
    """learning_rate: a docstring line that looks like a field must not become its help."""

    model: str = "encoder_decoder"  # which model to train
    # optimizer
    # fmt: off
    learning_rate: float = 1e-3  # peak of the schedule,
                                 # reached after warm-up
    # fmt: on
    grad_clip: float | None = None  # none: no clipping
    max_iters: int = 1000  # steps, as in issue #12
    # input and output
    compile: bool = True  # use the compiler
    out_dir: str = ""  # where the run goes
    prompt: str = "\n"  # text to continue
    note: str | None = None  # anything
    order: Literal["self_first", "cross_first"] = "self_first"  # which attention is first
    betas: tuple[float, ...] = (0.9, 0.95)  # of AdamW
    limit: int | None = None  # none: no limit

    def __post_init__(self):
        # a comment in a method is not help
        if self.max_iters < 0:
            raise ValueError(f"max_iters={self.max_iters} is negative: give a number of steps")


@dataclass(frozen=True)
class EncoderDecoderConfig:
    n_encoder_layer: int = 3  # layers of the encoder
    vocab_size: int = 256  # rows of the embedding


@dataclass(frozen=True)
class DecoderOnlyConfig:
    n_layer: int = 6  # layers
    vocab_size: int = 256  # rows of the embedding table


MODELS = {"encoder_decoder": EncoderDecoderConfig, "decoder_only": DecoderOnlyConfig}


def train_settings(*argv):
    return configure(list(argv), [Train], positional="[CONFIG]", choose=("model", MODELS), description="Train a model.")


def written(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_flags_override_the_file_and_the_file_overrides_defaults(tmp_path):
    """Guards the order: a file read after the flags silently undoes the command line."""
    file = written(tmp_path / "x.py", "learning_rate = 3e-4\nmax_iters = 50\nn_encoder_layer = 7\n")
    settings = train_settings(str(file), "--max_iters=60")
    train, model = settings.sections
    assert (train.learning_rate, train.max_iters, train.order, model.n_encoder_layer) == (3e-4, 60, "self_first", 7)
    assert settings.given == {"learning_rate": 3e-4, "max_iters": 60, "n_encoder_layer": 7}
    assert "vocab_size" in train_settings("--vocab_size=256").given, "a key set to its default is given all the same"
    assert settings.config_file == file and settings.words == []


@pytest.mark.parametrize(
    "flag, key, value",
    [
        ("--learning_rate=1", "learning_rate", 1.0),
        ("--learning_rate=1e-3", "learning_rate", 1e-3),
        ("--learning-rate=2.5", "learning_rate", 2.5),
        ("--max_iters=1_000", "max_iters", 1000),
        ("--limit=-3", "limit", -3),
        ("--limit=None", "limit", None),
        ("--grad_clip=none", "grad_clip", None),
        ("--grad_clip=1", "grad_clip", 1.0),
        ("--compile=NO", "compile", False),
        ("--compile=0", "compile", False),
        ("--compile=Yes", "compile", True),
        ("--compile", "compile", True),
        ("--out_dir=a=b=c", "out_dir", "a=b=c"),
        ("--out_dir=", "out_dir", ""),
        ("--out_dir=none", "out_dir", "none"),
        ("--note=none", "note", None),
        ("--note=", "note", ""),
        ("--order=cross_first", "order", "cross_first"),
        ("--betas=0.8,1", "betas", (0.8, 1.0)),
        ("--betas=", "betas", ()),
    ],
)
def test_text_becomes_the_annotated_type(flag, key, value):
    """Guards nanoGPT's `--learning_rate=1` (an int, refused) and '=' inside values (cut off by a careless split)."""
    result = getattr(train_settings(flag).sections[0], key)
    assert result == value and type(result) is type(value)


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--learning_rate=abc", "--learning_rate=abc: a float was expected (default 0.001)"),
        ("--learning_rate=nan", "--learning_rate=nan: a float was expected"),
        ("--learning_rate=inf", "--learning_rate=inf: a float was expected"),
        ("--learning_rate", "--learning_rate without a value: a float was expected"),
        ("--max_iters=1e3", "--max_iters=1e3: an integer such as 1000 was expected (default 1000)"),
        ("--max_iters=abc", "--max_iters=abc: an integer was expected"),
        ("--max_iters=", "--max_iters=: an integer was expected"),
        ("--max_iters=none", "--max_iters=none: an integer was expected"),
        ("--limit=2.0", "--limit=2.0: an integer such as 2 or none was expected (default none)"),
        ("--compile=maybe", "--compile=maybe: true or false was expected (default true)"),
        ("--grad_clip=x", "--grad_clip=x: a float or none was expected (default none)"),
        ("--order=crossfirst", "--order=crossfirst: one of self_first, cross_first (did you mean 'cross_first'?) was expected"),
        ("--betas=0.9,,0.7", "--betas=0.9,,0.7: a list of float such as 0.9,0.7 was expected"),
        ("--betas=1,x", "--betas=1,x: a list of float such as 0.9,0.7 was expected (default 0.9,0.95)"),
        ("--max_iters=-1", "max_iters=-1 is negative"),
        (f"--max_iters={2**64}", f"--max_iters={2**64}: an integer of at most 64 bits was expected"),
        ("--learning_rte=1", "unknown key 'learning_rte'; did you mean 'learning_rate'?"),
        ("--qqq=1", "unknown key 'qqq'; --help lists all keys"),
        ("--n_layr=1", "unknown key 'n_layr'; did you mean 'n_layer'?"),
        (
            "--n_layer=1",
            "'n_layer' is not a key of model 'encoder_decoder' (it belongs to 'decoder_only'); its keys are n_encoder_",
        ),
        ("--model=decoder_onl", "model=decoder_onl: one of encoder_decoder, decoder_only (did you mean 'decoder_only'?) was"),
        ("-x", "options start with two dashes"),
        ("--=3", "options are written --key=value"),
        ("max_iters=3", "unexpected word 'max_iters=3': write --max_iters=3"),
    ],
)
def test_a_wrong_flag_is_named_with_what_is_allowed(flag, message):
    """Guards silence: each of these once started a run with other settings than its user meant."""
    with pytest.raises(ValueError) as caught:
        train_settings(flag)
    assert message in str(caught.value)


def test_a_value_after_a_space_is_explained():
    """Guards `--compile False`, which would read as compile=True and a word."""
    for argv, hint in ((["--max_iters", "5"], "write --max_iters=5"), (["--compile", "False"], "write --compile=False")):
        with pytest.raises(ValueError, match=hint):
            train_settings(*argv)
    # but a word after a switch is a word, and a repeated key is judged by its last use
    assert configure(["--max_iters", "out/a", "--max_iters=3"], [Train], positional="RUN").sections[0].max_iters == 3
    settings = configure(["--compile", "out/a", "out/b"], [Train], positional="RUN ...")
    assert settings.words == ["out/a", "out/b"] and settings.sections[0].compile is True
    assert configure(["--compile", "out/a", "--compile=no"], [Train], positional="RUN").sections[0].compile is False
    assert configure(["--max_iters=3", "out/a"], [Train], positional="RUN").words == ["out/a"]


def test_positional_words():
    """Guards a second config file, which would be ignored without a word."""
    with pytest.raises(ValueError, match="unexpected word 'b.py'"):
        train_settings("a.py", "b.py")
    with pytest.raises(ValueError, match="RUN ... is missing"):
        configure([], [Train], positional="RUN ...")
    with pytest.raises(ValueError, match="takes no positional words"):
        configure(["a"], [Train])
    assert configure(["--max_iters=3"], [Train], positional="[RUN ...]").words == []


def test_the_model_key_may_come_from_the_file(tmp_path):
    """Guards choosing the model's keys from the default model while the file names another."""
    file = written(tmp_path / "x.py", "model = 'decoder_only'\nn_layer = 2\n")
    assert train_settings(str(file)).sections[1] == DecoderOnlyConfig(n_layer=2)
    with pytest.raises(ValueError, match=r"'n_layer' \(in .*x.py\) is not a key of model 'encoder_decoder'"):
        train_settings(str(file), "--model=encoder_decoder")


# config files


def test_config_file_arithmetic_names_and_base(tmp_path):
    """Guards the values of nanoGPT-style files, and that a base (in another folder) lies below the file that names it."""
    written(tmp_path / "common.py", "max_iters = 10\nlearning_rate = 1e-3\nout_dir = 'common'\n")
    written(tmp_path / "more" / "middle.py", "base = '../common.py'\nmax_iters = 20\n")
    file = written(
        tmp_path / "x.py",
        '"""A docstring."""\n# a comment\nout_dir = "x"\nbase = "more/middle.py"\n'
        "learning_rate = (6 - 2) * 1.5 / 2 ** 64\nlimit = -max_iters // 3 + 5 * 8\n"
        "betas = [0.9, 1 / 2]\nnote = None\ncompile = False\n",
    )
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())  # as Windows' editor saves it
    assert read_config_file(file) == {
        "max_iters": 20,
        "learning_rate": 4 * 1.5 / 2**64,
        "out_dir": "x",
        "limit": -20 // 3 + 40,
        "betas": (0.9, 0.5),
        "note": None,
        "compile": False,
    }


def test_a_run_directory_is_no_config_file(tmp_path):
    """Guards `train.py --resume out/a`, which was told to name a config file in that folder."""
    written(tmp_path / "run" / "config.json", "{}")
    with pytest.raises(FileNotFoundError, match="run is a run directory, not a config file: to go on with it, --resume --out_dir="):
        read_config_file(tmp_path / "run")


def test_base_cycle_is_an_error(tmp_path):
    """Guards endless recursion, also where each turn writes the same file's path in another way."""
    written(tmp_path / "a.py", "base = 'more/b.py'\n")
    written(tmp_path / "more" / "b.py", "base = '../a.py'\n")
    with pytest.raises(ValueError, match="its own base: a.py -> b.py -> a.py"):
        read_config_file(tmp_path / "a.py")


@pytest.mark.parametrize(
    "line",
    [
        "__import__('os').system('touch {flag}')",
        "x = __import__('os').system('touch {flag}')",
        "x = open('{flag}', 'w')",
        "x = (lambda: open('{flag}', 'w'))()",
        "import os",
        "if True:\n    x = 1",
        "def f():\n    pass",
        "x, y = 1, 2",
        "x = y = 1",
        "x += 1",
        "x: int = 1",
        "x.y = 1",
        "x = 'a' * 3",
        "x = 9 ** 9 ** 9",
        "x = 2.0 ** 64 ** 64",
        "x = 1 / 0",
        "x = True + 1",
        "x = [i for i in (1, 2)]",
        "x = undefined",
        "x = f'{{1}}'",
        "x = b''",
        "x = not True",
        "x = {{}}",
        "'a string'",
        "base = 3",
        "x =",
    ],
)
def test_nothing_but_assignments_of_constants_and_nothing_is_run(tmp_path, line):
    """Guards a config file from the net that executes code when it is only read."""
    file = written(tmp_path / "x.py", "y = 1\n" + line.format(flag=tmp_path / "ran") + "\n")
    with pytest.raises(ValueError, match="x.py line 2"):
        read_config_file(file)
    assert not (tmp_path / "ran").exists()


def test_a_config_file_that_is_no_text_is_named(tmp_path):
    """Guards a codec's own words, which name neither the file nor what to do."""
    file = tmp_path / "x.py"
    file.write_bytes(b"max_iters = 1  # caf\xe9\n")
    with pytest.raises(ValueError, match="x.py: not UTF-8 at byte 20; convert it"):
        read_config_file(file)


@pytest.mark.parametrize(
    "line, message",
    [
        ("max_iters = True", "max_iters = True in .*x.py: an integer was expected"),
        ("max_iters = '5'", "an integer was expected"),
        ("max_iters = 1e3", "an integer such as 1000"),
        ("compile = 1", "true or false was expected"),
        ("learning_rate = False", "a float"),
        ("learning_rate = '1'", "a float"),
        ("out_dir = 3", "a string"),
        ("order = 1", "one of self_first"),
        ("betas = 0.9", "a list of float"),
        ("betas = '1,2'", "a list of float"),
        ("betas = [0.9, '1']", "a list of float"),
        ("note = none", "'none' is not assigned above; Python writes None"),
        ("learning_rte = 3", r"unknown key 'learning_rte' \(in .*x.py\); did you mean"),
        ("max_iters = None", "an integer was expected"),
    ],
)
def test_values_of_a_file_are_held_to_the_same_types(tmp_path, line, message):
    """Guards `max_iters = True`, which Python takes for 1."""
    with pytest.raises(ValueError, match=message):
        train_settings(str(written(tmp_path / "x.py", line + "\n")))
    assert type(configurator.resolve(Train, {"learning_rate": 1}, {}).learning_rate) is float


def test_a_missing_config_file_names_the_nearest(tmp_path, monkeypatch):
    """Guards a bare 'No such file' for one wrong letter."""
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "config" / "published" / "encdec_possub.py", "")
    with pytest.raises(FileNotFoundError, match="did you mean config/published/encdec_possub.py?"):
        train_settings("config/encdec_posub.py")
    with pytest.raises(FileNotFoundError, match="config/ holds"):
        train_settings("config/zzzzzzzzzzzz.py")


# help and records


def test_help_lists_every_key_with_its_comment(capsys):
    """Guards keys that exist but are nowhere explained."""
    with pytest.raises(SystemExit) as exit_:
        train_settings("--help", "--no_such_key")
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    for cls in (Train, *MODELS.values()):
        for field in dataclasses.fields(cls):
            assert f"--{field.name}=" in text
    for line in (
        "[CONFIG] [--key=value ...]",
        "Train a model.",
        "with --model=decoder_only",
        "  # optimizer\n  --learning_rate=float",
        "peak of the schedule, reached after warm-up [0.001]\n",
        "none: no clipping [none]\n",
        "steps, as in issue #12 [1000]",
        "  # input and output\n  --compile=bool",
        "--order=self_first|cross_first",
        "which attention is first [self_first]",
        "where the run goes ['']",
        "text to continue ['\\n']",
        "--limit=int|none",
        "--betas=float,...",
        "of AdamW [0.9,0.95]",
        "rows of the embedding table",
    ):
        assert line in text, line
    assert "a comment in a method" not in text and "a docstring line" not in text


def test_differences_and_their_line(capsys):
    """Guards a log that does not say which settings a run had."""
    train = Train(max_iters=5, order="cross_first")
    assert configurator.differences(train) == {"max_iters": 5, "order": "cross_first"}
    assert configurator.differences(Train()) == {}
    configurator.print_differences(train, DecoderOnlyConfig())
    assert capsys.readouterr().out == "Train: max_iters=5, order=cross_first\nDecoderOnlyConfig: all defaults\n"


def test_dict_round_trip_through_json():
    """Guards tuples, which JSON returns as lists, and a config.json written by another version."""
    train = Train(betas=(0.1, 0.2), note="x", learning_rate=1)
    assert from_dict(Train, json.loads(json.dumps(to_dict(train)))) == train
    assert to_dict(train) == json.loads(json.dumps(to_dict(train)))
    with pytest.raises(ValueError, match="Train has no key 'momentum', 'nesterov'"):
        from_dict(Train, to_dict(train) | {"momentum": 1, "nesterov": True})
    with pytest.raises(ValueError, match="max_iters = 'many' in a stored Train: an integer was expected"):
        from_dict(Train, {"max_iters": "many"})
