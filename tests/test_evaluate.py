"""evaluate.py and what dev/ measures, against what training reported, and against tables whose numbers are known."""

import json
import math
import re
import shutil

import numpy as np
import pytest
import torch

import checkpoint
import dataloader
import evaluate
import runtime
import sample
import tokenizer
import train
from conftest import write_tokens
from data import corpus
from dev import codes, embeddings, recall
from tiny_runs import arguments, complaint
from validation import mean_loss, whole_file


@pytest.fixture(scope="module", params=["encoder_decoder", "decoder_only"])
def finished(request, tiny_data, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run_s1"
    train.main(arguments(tiny_data, out, "--dropout=0.3", "--pos_sub=plain", model=request.param))
    return out


def test_the_loss_is_that_of_training(finished, wide_data, tmp_path):
    """Guards against another reading of the file, other weights, or dropout left on."""
    summary = json.loads((finished / "summary.json").read_text())
    checkpoint.write_json(finished / "best" / "trainer.json", {"step": 3})  # as if it had been best before its end
    [line] = evaluate.main([str(finished), "--device=cpu", "--dtype=float32", f"--json={tmp_path / 'a' / 'lines.json'}"])
    assert line["val_loss"] == summary["val_loss"] and line["val_bits_per_byte"] == summary["val_bits_per_byte"]
    assert line["val_tokens"] == summary["val_tokens"] == 3000 and line["step"] == 6
    assert json.loads((tmp_path / "a" / "lines.json").read_text()) == [line]
    [other] = evaluate.main([str(finished), f"--dataset={wide_data}", "--device=cpu", "--dtype=float32"])
    assert other["val_bits_per_byte"] == pytest.approx(other["val_loss"] / math.log(2) / 2, rel=1e-12)
    best = evaluate.main([str(finished), "--checkpoint=best", "--device=cpu", "--dtype=float32", "--final_eval_tokens=320"])
    assert best[0]["val_tokens"] == 320 and best[0]["val_loss"] != line["val_loss"] and best[0]["step"] == 3


def test_bits_per_byte_of_a_part_are_those_of_its_bytes(tmp_path):
    """Guards train.py and evaluate.py over the first tokens, here characters of one byte, of a text whose others have three."""
    text = "abcdefgh" * 60 + "日本語" * 100
    chars = tokenizer.get("char", chars=text)
    corpus.write_sides([(False, text), (True, text)], chars, tmp_path / "set", "a test")
    summary = train.main(arguments(tmp_path / "set", tmp_path / "run", "--final_eval_tokens=300"))
    [line] = evaluate.main([str(tmp_path / "run"), "--device=cpu", "--dtype=float32", "--final_eval_tokens=300"])
    for found in (summary, line):
        assert found["val_tokens"] == 300
        assert found["val_bits_per_byte"] == pytest.approx(found["val_loss"] / math.log(2), rel=1e-12)
    [whole] = evaluate.main([str(tmp_path / "run"), "--device=cpu", "--dtype=float32"])
    assert whole["val_bits_per_byte"] < whole["val_loss"] / math.log(2) / 1.5


def test_a_tokenizer_that_is_not_here_is_missed_before_training(tiny_data, tmp_path):
    """Guards hours of training that end without a loss: bits per byte of a part of the file need its tokenizer, those of all do not."""
    folder = shutil.copytree(tiny_data, tmp_path / "set")
    (folder / "tokenizer.json").write_text('{"name": "of another machine"}')
    with pytest.raises(ValueError, match="tokenizer"):
        train.main(arguments(folder, tmp_path / "run", "--final_eval_tokens=300"))
    assert not (tmp_path / "run").exists()
    assert train.main(arguments(folder, tmp_path / "run"))["val_tokens"] == 3000


def test_a_short_text_can_be_evaluated(finished, tmp_path):
    """Guards the loss on a text that is shorter than the context, which once was refused for the sake of its training file."""
    text = np.frombuffer(b"import os\nimport sys", dtype=np.uint8)
    few = write_tokens(tmp_path / "few", text[:1], text)
    [line] = evaluate.main([str(finished), f"--dataset={few}", "--device=cpu", "--dtype=float32"])
    ids = torch.from_numpy(text.astype(np.int64))[None]
    with torch.no_grad():
        logits, _ = checkpoint.load_run(finished, "last")[0](ids[:, :-1])
    assert line["val_loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits[0], ids[0, 1:]).item(), rel=1e-5)
    assert line["val_tokens"] == len(text) - 1


def test_double_precision_is_that_of_the_weights_too(finished, tiny_data):
    """Guards --dtype=float64 of a run in float32: its weights have to be widened, or nothing is computed in another precision."""
    [line] = evaluate.main([str(finished), "--device=cpu", "--dtype=float64", "--final_eval_tokens=320"])
    model = checkpoint.load_run(finished, "last")[0].double()
    machine = runtime.Runtime(torch.device("cpu"), torch.float64, False, "")
    loss, _ = mean_loss(model, whole_file(dataloader.TokenData(tiny_data, 32), machine, 320), machine)
    assert line["val_loss"] == pytest.approx(loss, rel=1e-13)


def test_attention_dropout_is_the_only_one_left_on(finished, tiny_data):
    """Guards against dropping nothing, or embeddings and residual branches as well: training mode with these at 0 says the same."""
    [line] = evaluate.main([str(finished), "--attention_dropout", "--seed=5", "--device=cpu", "--dtype=float32"])
    model = checkpoint.load_run(finished, "last")[0].train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.eval = lambda: model  # mean_loss() calls it
    data = dataloader.open_data(tiny_data, model.config.block_size)
    runtime.seed_everything(5)
    machine = runtime.start("cpu", "float32", "off")
    assert line["val_loss"] == mean_loss(model, whole_file(data, machine), machine)[0]
    [plain] = evaluate.main([str(finished), "--device=cpu", "--dtype=float32"])
    assert line["val_loss"] != plain["val_loss"] and line["attention_dropout"] == 0.3


def test_evaluate_explains_what_it_cannot_do(finished, tiny_data, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such run directory"):
        evaluate.main([str(tmp_path / "nowhere")])
    with pytest.raises(ValueError, match="at least 1"):
        evaluate.main([str(finished), "--final_eval_tokens=0"])
    out = tmp_path / "plain"
    train.main(arguments(tiny_data, out))
    with pytest.raises(ValueError, match="without dropout"):
        evaluate.main([str(out), "--attention_dropout"])


@pytest.mark.parametrize("name", ["rq_transformer", "latent_transformer"])
def test_attention_dropout_of_models_that_have_their_own(name, tmp_path):
    """Guards a loss reported as one with attention dropout, of a model that drops nothing because it asks elsewhere."""
    options = {"vocab_size": 16, "block_size": 64, "n_embd": 8, "n_head": 2, "dropout": 0.3}
    model = checkpoint.build(name, checkpoint.CONFIGS[name](**options))
    with pytest.raises(ValueError, match="neither of encoder_decoder nor of decoder_only"):
        evaluate.keep_attention_dropout(model, tmp_path)


def test_a_run_that_fails_costs_no_other(finished, tmp_path):
    """Guards the JSON of hours of evaluation, lost to a damaged last run; and these hours, where its name is mistyped."""
    json_file = tmp_path / "new" / "lines.json"
    words = ["--device=cpu", "--dtype=float32", "--final_eval_tokens=320", f"--json={json_file}"]
    for name in ("nowhere", "unfinished"):
        (tmp_path / "unfinished").mkdir(exist_ok=True)
        with pytest.raises(FileNotFoundError, match=f"{name}"):
            evaluate.main([str(finished), str(tmp_path / name), *words])
        assert not json_file.exists()
    damaged = shutil.copytree(finished, tmp_path / "damaged")
    (damaged / "last" / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="damaged"):
        evaluate.main([str(finished), str(damaged), *words])
    assert [line["run"] for line in json.loads(json_file.read_text())] == [str(finished)]


@pytest.mark.parametrize("script", [evaluate, sample])
def test_one_process(script, finished, monkeypatch, capsys):
    """Guards a command that waits for hours, without a word, for processes that a cluster's job speaks of, or prints a text twice."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert complaint(script, [str(finished)], capsys) == (
        2, "error: WORLD_SIZE=2: only train.py runs in several processes; start this without torchrun, or unset it"
    )  # fmt: skip
    monkeypatch.delenv("WORLD_SIZE")
    code, line = complaint(script, [str(finished / "last")], capsys)
    assert code == 1 and line.endswith(f"it has no config.json; give {finished}, with --checkpoint=last")


def test_what_is_not_as_in_training_is_noted(finished, tiny_data, tmp_path, capsys):
    """Guards a loss that seems to be that of training, but is of another text or in other digits; and runs named by a pattern."""
    run = shutil.copytree(finished, tmp_path / "of_this" / "run")
    words = [str(tmp_path / "of_*" / "*"), "--device=cpu", "--dtype=float32", "--final_eval_tokens=320"]
    evaluate.main(words)
    assert not capsys.readouterr().err
    summary = json.loads((run / "summary.json").read_text())
    evaluate.main([*words, "--dtype=bfloat16"])
    assert f"{run} gave its loss in float32, this is bfloat16; --dtype=float32 is the same as there" in capsys.readouterr().err
    (run / "summary.json").write_text(json.dumps(summary | {"data_hash": "0" * 64}))
    evaluate.main(words)
    assert "has another validation file now" in capsys.readouterr().err
    (run / "summary.json").write_text("null")
    with pytest.raises(ValueError, match=r"summary.json is damaged \(null instead of keys and values\)"):
        evaluate.main(words)


def test_a_run_without_weights_is_not_called_unfinished(finished, tmp_path):
    """Guards "stopped before its first evaluation" alone for the small files of a finished run, such as results/ has."""
    for name in ("config.json", "summary.json", "tokenizer.json"):
        shutil.copy(finished / name, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"holds no weights \(best/ or last/\), .*or copied without"):
        evaluate.main([str(tmp_path), "--device=cpu"])
    shutil.copytree(finished / "best", tmp_path / "best")
    with pytest.raises(FileNotFoundError, match="no complete last checkpoint, but a best: .* --checkpoint=best, .* --init_from="):
        checkpoint.find(tmp_path, "last")


def test_numbers_are_shown_before_they_are_written(finished, tmp_path, capsys):
    """Guards minutes of evaluation against a file that cannot be written."""
    with pytest.raises(ValueError, match="is a folder"):
        evaluate.main([str(finished), f"--json={tmp_path}", "--final_eval_tokens=50"])
    (tmp_path / "x.json.tmp").mkdir()  # in the way
    with pytest.raises(OSError):
        evaluate.main([str(finished), f"--json={tmp_path / 'x.json'}", "--final_eval_tokens=50"])
    assert "nats per token" in capsys.readouterr().out


def test_values_that_are_empty_are_refused(finished):
    """Guards a file of an empty name, or none at all."""
    for main, key in ((evaluate.main, "json"), (evaluate.main, "dataset"), (embeddings.main, "json"), (embeddings.main, "plot")):
        with pytest.raises(ValueError, match=f"--{key}= is empty"):
            main([str(finished), f"--{key}="])


def test_embeddings_of_known_tables(finished, monkeypatch):
    """Guards the definitions at the top of dev/embeddings.py."""
    C = 8
    axes = torch.eye(C, dtype=torch.float64)
    around = torch.cat((axes, -axes))  # all directions alike, mean 0, norm 1
    shift = torch.zeros(C, dtype=torch.float64)
    shift[0] = 100.0
    angle = torch.arange(12, dtype=torch.float64) * (2 * math.pi / 12)
    circle = torch.stack((angle.cos(), angle.sin()), 1) @ axes[:2]  # (12, C) in the plane of the first two axes
    monkeypatch.setattr(embeddings, "tables", lambda run: {"tokens": around, "positions": 3 * circle})
    found = embeddings.measure(finished)
    assert found["tokens_norm"] == pytest.approx(1) and found["positions_norm"] == pytest.approx(3)
    assert found["tokens_rank"] == pytest.approx(C) and found["positions_rank"] == pytest.approx(2)
    assert found["positions_neighbours"] == pytest.approx(sum(math.cos(2 * math.pi / 12) for _ in range(11)) / 11)
    assert found["tokens_common"] == pytest.approx(0, abs=1e-12) and found["overlap"] == pytest.approx(1)
    outside = torch.cat((axes[2:], -axes[2:])) + shift  # orthogonal to the plane, far from the origin
    monkeypatch.setattr(embeddings, "tables", lambda run: {"tokens": outside, "positions": circle})
    found = embeddings.measure(finished)
    assert found["overlap"] == pytest.approx(0, abs=1e-12) and found["tokens_common"] == pytest.approx(1, abs=1e-3)
    assert found["tokens_rank"] == pytest.approx(C - 2)


def test_codes_of_known_tables():
    """Guards the definitions at the top of dev/codes.py: a code that its block does not settle counts, a rare block does not."""
    often, rare, once = (1, 2), (3, 4), (5, 6)
    blocks = [often] * 40 + [rare] * 4 + [once]
    stacks = [(7, 0)] * 20 + [(7, 1)] * 10 + [(8, 1)] * 10 + [(9, 0)] * 3 + [(9, 1)] + [(0, 0)]
    found = codes.settled(blocks, stacks)
    assert found["repeated"] == pytest.approx((20 + 3) / 44)
    of_level = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25))  # 30 of (7, .), 10 of (8, .)
    assert found["unsettled"] == pytest.approx([of_level, 1.5])  # 1.5 = 1/2 * 1 + 2 * 1/4 * 2
    found = codes.settled([often] * 40, [(7, 0)] * 40)
    assert found == {"repeated": 1.0, "unsettled": [0.0, 0.0]}


def test_embeddings_of_a_run(finished, tmp_path, capsys):
    """Guards the reading of checkpoints: tied tables, tokens that occur, both models."""
    model = checkpoint.load_run(finished, "last")[0]
    wte = (model.wte if hasattr(model, "wte") else model.transformer.wte).weight
    read = embeddings.tables(finished)
    assert 20 < len(read["tokens"]) < 256 and read["positions"].shape == (33, 16)
    assert torch.equal(read["tokens"][0].float(), wte[10]), "the first byte of the text's alphabet is a newline"
    rows = embeddings.main([str(finished), f"--plot={tmp_path / 'e'}", f"--json={tmp_path / 'e.json'}"])
    assert json.loads((tmp_path / "e.json").read_text()) == rows and "tokens rank" in capsys.readouterr().out
    assert (tmp_path / "e.png").stat().st_size > 10_000
    assert embeddings.main([str(tmp_path / "e.json"), "--plot=none"]) == rows


def test_matches_are_those_of_a_search():
    """Guards the definition at the top of dev/recall.py against a search from it: the longest end, of equal ones the latest."""
    rng = np.random.default_rng(1)
    for letters in (1, 2, 3, 30):
        tokens = rng.integers(0, letters, (4, 25))
        x, y = tokens[:, :-1], tokens[:, 1:].copy()
        y[:, ::5] = 99  # targets need not be the next inputs
        longest, copied = recall.matches(x, y)
        for row in range(len(x)):
            for t in range(x.shape[1]):
                context, found = x[row, : t + 1].tolist(), (0, 0)
                for end in range(1, t + 1):  # of an earlier place, exclusive
                    m = max((m for m in range(end + 1) if context[end - m : end] == context[t + 1 - m :]), default=0)
                    found = max(found, (m, end))
                m, end = found
                assert (longest[row, t], copied[row, t]) == (m, m > 0 and context[end] == y[row, t])


def test_groups_of_recall_add_up(finished, tmp_path, capsys):
    """Guards each token in one group, and the loss of all in that of the run; names of groups beside their numbers."""
    summary = json.loads((finished / "summary.json").read_text())
    rows = recall.main([str(finished), "--device=cpu", "--dtype=float32", f"--json={tmp_path / 'r.json'}"])
    [[run]] = rows.values()
    assert sum(run["tokens"]) == summary["val_tokens"] and json.loads((tmp_path / "r.json").read_text()) == rows
    assert sum(run["nats"]) / sum(run["tokens"]) == pytest.approx(summary["val_loss"], rel=1e-6)
    assert re.search(rf"\| all +\| 100.0% \| +{summary['val_loss']:.3f} \|", capsys.readouterr().out)
    part = shutil.copytree(finished, tmp_path / "part")
    checkpoint.write_json(part / "summary.json", summary | {"val_tokens": 320})  # --final_eval_tokens=320
    [[run]] = recall.main([str(part), "--device=cpu", "--dtype=float32"]).values()
    assert sum(run["tokens"]) == 320
    x = np.array([[1, 2, 9, 1, 2, 8, 9, 1, 2]])
    y = np.array([[2, 9, 1, 2, 8, 9, 1, 2, 9]])
    assert [recall.GROUPS[g] for g in recall.groups_of(x, y)[0]] == [
        "m = 0", "m = 0", "m = 0", "m = 1 or 2, then y", "m = 1 or 2, then another", "m = 0", "m = 1 or 2, then y",
        "m = 1 or 2, then y", "m = 3 to 7, then another",
    ]  # fmt: skip


def test_a_layer_left_out_writes_nothing(finished, tiny_data, capsys):
    """Guards recall --layers: each attention layer alone, the same as with its last weights 0, and all there again afterwards."""
    words = [str(finished), "--device=cpu", "--dtype=float64"]
    [[run]] = recall.main([*words, "--layers"]).values()
    printed = capsys.readouterr().out
    model = checkpoint.load_run(finished, "last")[0].double()
    layers = {name.removesuffix(".c_proj"): layer for name, layer in model.named_modules() if name.endswith("attn.c_proj")}
    assert run["without"].keys() == layers.keys() and len(layers) == model.n_layer_cache
    data, machine = dataloader.TokenData(tiny_data, 32), runtime.Runtime(torch.device("cpu"), torch.float64, False, "")
    for name, layer in layers.items():
        before = layer.weight.data.clone()
        layer.weight.data.zero_()
        with torch.no_grad():
            assert run["without"][name] == pytest.approx(recall.read_twice(model, data, machine), rel=1e-6)
        layer.weight.data.copy_(before)
        assert f" without {name}: a text read twice costs {run['without'][name][0]:.3f}, then" in printed
        assert run["without"][name] != pytest.approx((run["first"], run["second"]), rel=1e-6)
    [[again]] = recall.main(words).values()
    assert {key: run[key] for key in again} == again


def test_a_model_that_copies_reads_for_nothing_the_second_time(tiny_data):
    """Guards which losses are those of the second reading, and that they are of the same tokens as those of the first."""

    class Copies(torch.nn.Module):
        def forward(self, idx):
            """All on the token that stood half a window before the next one; nothing in the first half and the first of the second."""
            logits = torch.zeros(*idx.shape, 256)
            logits[:, 16:] = 100 * torch.nn.functional.one_hot(idx[:, 1 : idx.size(1) - 15], 256).float()
            return logits, {}

    machine = runtime.Runtime(torch.device("cpu"), torch.float32, False, "")
    first, second = recall.read_twice(Copies(), dataloader.TokenData(tiny_data, 32), machine)
    assert first == pytest.approx(math.log(256), rel=1e-5) and second == pytest.approx(0, abs=1e-5)
