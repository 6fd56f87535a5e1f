"""Sets written by a trained run: what is in them, that it is what sample.py writes, and what is refused."""

import hashlib
import shutil

import numpy as np
import pytest

import checkpoint
import dataloader
import sample
import train
from conftest import crash_behind_meta
from data.distill import prepare
from data.pairs import prepare as pairs
from data.text import prepare as text

SMALL = (
    "--model=decoder_only --position=rope --n_layer=1 --n_head=2 --n_embd=16 --warmup_iters=1 --eval_iters=1 --device=cpu "
    "--dtype=float32 --final_eval_tokens=200"
)


@pytest.fixture(scope="module")
def pairs_run(tmp_path_factory):
    """A run on pairs, "ac12" -> "aa", just long enough to end most of its answers; and its data."""
    folder = tmp_path_factory.mktemp("pairs")
    lines = [f"{'ab'[i % 2]}{'c' * (i % 3 + 1)}{i}\t{'ab'[i % 2] * 2}" for i in range(120)]
    (folder / "doubles.tsv").write_text("\n".join(lines), encoding="utf-8")
    pairs.main(["--input", str(folder / "doubles.tsv"), "--out_dir", str(folder / "set"), "--val_fraction", "0.2"])
    words = (
        f"{SMALL} --dataset={folder / 'set'} --out_dir={folder / 'run'} --block_size=16 --batch_size=16 --learning_rate=0.01"
    )
    train.main([*words.split(), "--max_iters=150", "--eval_interval=150"])
    return folder / "run", folder / "set"


@pytest.fixture(scope="module", params=["byte", "char"])
def text_run(request, tmp_path_factory):
    """A run on plain text, hardly trained: it writes noise, with an end in it now and then; and its data."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "text.txt").write_text("\n\n\n".join(f"Text {i} of many. " * 4 for i in range(60)), encoding="utf-8")
    text.main(["--input", str(folder / "text.txt"), "--out_dir", str(folder / "set"), "--val_fraction", "0.3",
               "--tokenizer", request.param])  # fmt: skip
    words = f"{SMALL} --dataset={folder / 'set'} --out_dir={folder / 'run'} --block_size=32 --batch_size=4"
    train.main([*words.split(), "--max_iters=2", "--eval_interval=2"])
    return folder / "run", folder / "set"


def distill(run, out_dir, *words: str) -> dict:
    return prepare.main(["--run", str(run), "--out_dir", str(out_dir), "--device", "cpu", *words])


def bins(folder) -> list[bytes]:
    return [(folder / f"{split}.bin").read_bytes() for split in ("train", "val")]


@pytest.mark.parametrize("temperature", ["0", "1.0"])
def test_pairs_hold_the_answers_of_sample_py(pairs_run, tmp_path, temperature):
    """Guards the teacher's voice: answers by another seed or sample number, of a neighbour in the batch, or without their end."""
    run, source = pairs_run
    meta = distill(run, tmp_path / "set", "--temperature", temperature, "--batch", "7", "--seed", "5")
    data, original = dataloader.open_data(tmp_path / "set", 16), dataloader.open_data(source, 16)
    questions = sorted((x for x, _ in original.questions("train", None)), key=len)
    assert meta["teacher"]["written"] == len(data.bounds["train"]) > len(questions) / 2
    assert meta["teacher"]["written"] + meta["teacher"]["left_out"] == len(questions)
    answers = {bytes(x): bytes(y).decode() for x, y in data.questions("train", None)}
    assert answers.keys() <= set(map(bytes, questions))
    border = next(i for i, x in enumerate(questions) if len(x) > len(questions[0]))  # a batch is cut here
    for number in (0, 3, border - 1, border, border + 8):
        words = f"--temperature={temperature} --num_samples={number + 1} --seed=5 --max_new_tokens=10 --device=cpu"
        texts = sample.main([str(run), f"--prompt={bytes(questions[number][:-1]).decode()}", *words.split()])
        assert answers.get(bytes(questions[number]), texts[number]) == texts[number]


def test_pairs_keep_their_sides(pairs_run, tmp_path):
    """Guards against a validation set by the teacher, questions on both sides, and a set that changes from call to call."""
    run, source = pairs_run
    meta, again = (distill(run, tmp_path / name, *batch) for name, batch in (("one", ()), ("two", ("--batch", "5"))))
    assert bins(tmp_path / "one") == bins(tmp_path / "two") and meta["val"] == again["val"]
    data, original = dataloader.open_data(tmp_path / "one", 16), dataloader.open_data(source, 16)
    assert data.val_hash == original.val_hash and data.bytes_per_token == original.bytes_per_token
    sides = [{bytes(x) for x, _ in data.questions(split, None)} for split in ("train", "val")]
    assert sides[0] and sides[1] and not sides[0] & sides[1]
    teacher = meta["teacher"]
    digest = hashlib.sha256((run / "best" / "model.safetensors").read_bytes()).hexdigest()
    assert (teacher["run"], teacher["weights_sha256"], teacher["temperature"], teacher["seed"]) == (str(run), digest, 0.0, 1337)
    few = distill(run, tmp_path / "few", "--count", "20")
    assert few["teacher"]["written"] + few["teacher"]["left_out"] == 20 and few["val"]["sha256"] == meta["val"]["sha256"]


def test_texts_are_prompts_and_what_sample_py_writes(text_run, tmp_path):
    """Guards the texts: prompts of the validation side, another seed, texts that are cut or run together, another validation."""
    run, source = text_run
    meta = distill(run, tmp_path / "set", "--count", "12", "--prompt_tokens", "6", "--seed", "3", "--batch", "5")
    data, original = dataloader.TokenData(tmp_path / "set", 1), dataloader.TokenData(source, 1)
    assert data.val_hash == original.val_hash and meta["teacher"]["temperature"] == 1.0
    teacher = prepare.Teacher(str(run), "best", 1.0, 3, 5, "cpu")
    end, prompts = teacher.tokenizer.eos, list(teacher.prompts(original, 12, 6))
    assert list(prepare.Teacher(str(run), "best", 1.0, 4, 5, "cpu").prompts(original, 12, 6)) != prompts
    written, begin = data.train.tolist(), 0
    for number, prompt in enumerate(prompts):
        places = np.lib.stride_tricks.sliding_window_view(original.train, 6)
        assert (places == prompt).all(1).any() and end not in prompt
        words = f"--temperature=1 --num_samples={number + 1} --seed=3 --max_new_tokens=26 --device=cpu"
        texts = sample.main([str(run), f"--prompt={teacher.tokenizer.decode(prompt)}", *words.split()])
        text = texts[number].split("\ufffd")[0]  # up to the first byte that is not UTF-8
        if not text:  # ended at once
            continue
        whole = teacher.tokenizer.encode(teacher.tokenizer.decode(prompt) + text + ("\n\n" if end is None else ""))
        whole += [] if end is None else [end]
        assert written[begin : begin + len(whole)] == whole
        begin += len(whole)
    assert begin == len(written) > 0


def test_what_cannot_be_distilled(pairs_run, text_run, tmp_path):
    """Guards the user: each mistake is one clear line, and no set is written or overwritten."""
    (run, _), (plain, plain_source) = pairs_run, text_run
    wrong = [
        (run, ("--count", "0"), ValueError, "--count 0"),
        (run, ("--batch", "0"), ValueError, "--batch 0"),
        (run, ("--temperature", "-1"), ValueError, "temperature=-1"),
        (run, ("--dataset", str(plain_source)), ValueError, "tokenizer|set of text"),
        (plain, ("--prompt_tokens", "32"), ValueError, "--prompt_tokens 32 leaves no room"),
        (
            tmp_path / "nowhere",
            (),
            FileNotFoundError,
            "nowhere is not a directory; give a run directory, as written by train.py",
        ),
    ]
    for teacher, words, error, message in wrong:
        with pytest.raises(error, match=message):
            distill(teacher, tmp_path / "set", *words)
        assert not (tmp_path / "set" / "meta.json").exists()
    with pytest.raises(ValueError, match="no name; give --name"):
        prepare.main(["--run", str(run)])
    distill(run, tmp_path / "set", "--count", "20")
    before = bins(tmp_path / "set")
    with pytest.raises(ValueError, match="holds a data set already"):
        distill(run, tmp_path / "set", "--count", "30")
    assert bins(tmp_path / "set") == before


@pytest.mark.parametrize(
    "text",
    [b"{}", b"[]", b'{"train": {}, "model": {}}', b'{"train": "x", "model": {}}', b'{"train": "\xe9"}'],
    ids=["empty", "list", "no model", "no settings", "latin"],
)
def test_damaged_config_of_a_run(pairs_run, tmp_path, text):
    """Guards against a KeyError, or a decoding error that names no file, for the config.json of a run."""
    shutil.copytree(pairs_run[0], tmp_path / "run")
    (tmp_path / "run" / "config.json").write_bytes(text)
    with pytest.raises(ValueError, match="run/config.json is damaged"):
        checkpoint.read_config(tmp_path / "run")
    (tmp_path / "run" / "config.json").write_bytes(b'{"train": {"model": ["decoder_only"]}, "model": {}}')
    with pytest.raises(ValueError, match="run/config.json: unknown model"):
        checkpoint.read_config(tmp_path / "run")


def test_meta_is_published_whole(pairs_run, tmp_path, monkeypatch):
    """Guards against a set of text, or one without its teacher, that a crash between two writings of its meta.json left."""
    crash_behind_meta(monkeypatch)
    with pytest.raises(OSError, match="went down"):
        distill(pairs_run[0], tmp_path / "set")
    data = dataloader.open_data(tmp_path / "set", 16)
    assert isinstance(data, dataloader.PairData) and data.meta["teacher"]["written"] == len(data.bounds["train"])
    # a text set's command would overwrite it with a text set
    (tmp_path / "set" / "train.bin").unlink()
    with pytest.raises(FileNotFoundError, match=f"run again: python data/distill/prepare.py --run {pairs_run[0]} --out_dir "):
        dataloader.open_data(tmp_path / "set", 16)


@pytest.fixture(scope="module")
def bytes_run(tmp_path_factory):
    """Runs on characters of two and three bytes, hardly trained, so that they write bytes in any order: on text and on pairs."""
    folder = tmp_path_factory.mktemp("bytes")
    (folder / "text.txt").write_text("\n\n\n".join(f"é日本 {i} " * 8 for i in range(80)), encoding="utf-8")
    text.main(["--input", str(folder / "text.txt"), "--out_dir", str(folder / "text"), "--val_fraction", "0.3"])
    (folder / "pairs.tsv").write_text("\n".join(f"é{i}\té" for i in range(120)), encoding="utf-8")
    pairs.main(["--input", str(folder / "pairs.tsv"), "--out_dir", str(folder / "pairs"), "--val_fraction", "0.2"])
    for kind, iterations in (("text", 2), ("pairs", 60)):
        words = f"{SMALL} --dataset={folder / kind} --out_dir={folder / f'{kind}_run'} --block_size=32 --batch_size=8"
        train.main([*words.split(), f"--max_iters={iterations}", f"--eval_interval={iterations}", "--learning_rate=0.01"])
    return folder


def test_texts_are_utf8(bytes_run, tmp_path):
    """Guards against U+FFFD in place of characters that a prompt cut in two, or that the run did not finish."""
    meta = distill(bytes_run / "text_run", tmp_path / "set", "--count", "40", "--prompt_tokens", "7")
    documents = (tmp_path / "set" / "train.bin").read_bytes()[::2].split(b"\0")[:-1]
    source = (bytes_run / "text" / "train.bin").read_bytes()[::2]
    assert len(documents) == meta["teacher"]["written"] > 0 and meta["teacher"]["left_out"] > 0
    for document in documents:
        assert "\ufffd" not in document.decode() and document[:7] in source and len(document) > 7
        document[:7].decode()
    teacher = prepare.Teacher(str(bytes_run / "text_run"), "best", 1.0, 1, 8, "cpu")
    with pytest.raises(ValueError, match="--prompt_tokens 200: documents of .* are mostly shorter, or so long a piece cuts"):
        list(teacher.prompts(dataloader.TokenData(bytes_run / "text", 1), 3, 200))


def test_answers_are_utf8(bytes_run, tmp_path):
    """Guards against U+FFFD in answers: one whose bytes are no text is left out and counted."""
    meta = distill(bytes_run / "pairs_run", tmp_path / "set", "--temperature", "1")
    data = dataloader.open_data(tmp_path / "set", 32)
    answers = [bytes(y).decode() for _, y in data.questions("train", None)]
    teacher = prepare.Teacher(str(bytes_run / "pairs_run"), "best", 1.0, 1337, 64, "cpu")
    questions = sorted((x for x, _ in dataloader.open_data(bytes_run / "pairs", 32).questions("train", None)), key=len)
    longest = dataloader.open_data(bytes_run / "pairs", 32).longest_y
    samples = [s for s in teacher.continuations(questions, longest) if s.reason == "eos" and s.text.strip()]
    assert any("\ufffd" in sample.text for sample in samples), "the run is too good for this test"
    assert answers == [sample.text for sample in samples if "\ufffd" not in sample.text and "\t" not in sample.text]
    assert meta["teacher"]["written"] + meta["teacher"]["left_out"] == len(questions)


def test_a_teacher_without_texts(pairs_run):
    """
    Guards against a training side of nothing, answers left out that just fit, those to short questions for want of the room that
    long ones have, and a search for prompts that never ends.
    """
    run, source = pairs_run
    fitting, teacher = (prepare.Teacher(str(run), "best", 0.0, 1, 8, "cpu") for _ in range(2))
    data = dataloader.open_data(source, 16)
    questions = [[7] * length for length in (3, 9, 16)]
    assert [s.limit - s.n_prompt for s in fitting.continuations(questions, 99)] == [14, 8, 1], "the end of a pair is no input"
    assert [s.limit - s.n_prompt for s in fitting.continuations(questions, 4)] == [4, 4, 1]
    assert [s.limit - s.n_prompt for s in fitting.continuations(questions)] == [13, 7, 0]
    assert data.longest_y == 3  # two letters and an end
    assert max(len(answer) for val, _, answer in fitting.pairs(data, None) if not val) == 2
    data.longest_y = 1  # no answer comes to its end
    with pytest.raises(ValueError, match="nothing but empty or endless texts"):
        list(teacher.pairs(data, 10))
    assert teacher.left_out == 10
    with pytest.raises(ValueError, match="--prompt_tokens 90: documents of .* are mostly shorter"):
        list(prepare.Teacher(str(run), "best", 1.0, 1, 8, "cpu").prompts(dataloader.TokenData(source, 1), 3, 90))
