"""The project as a whole: who imports whom, every config file, every command of the README."""

import ast
import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import checkpoint
import configurator
from conftest import HOW_TO_INSTALL, ROOT
from latent import huggingface
from trainer import TrainConfig

# ----------------------------------------------------------------------------------------------------------------------
# layers: a module may import those of lower ones

MODULES = {path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): path
           for folder in (".", "baseline_transformer", "benchmarks", "latent", "data", "data/*", "dev")
           for path in ROOT.glob(f"{folder}/*.py")}  # fmt: skip
LOW = {"model", "kernels", "cpu_kernels", "gpu_kernels", "configurator", "curves", "dataloader", "errors", "runtime", "tokenizer"}
LOW |= {"latent.resample", "latent.quantize"}
SCRIPTS = {"train", "sample", "compare", "evaluate", "bench"}
SCRIPTS |= {name for name in MODULES if name.startswith("dev.") or name.endswith(".prepare")}


def imports(path: Path, nodes=ast.walk) -> set[str]:
    """Modules of this project that a file imports, anywhere in it, or at its top with ast.iter_child_nodes."""
    found = set()
    for node in nodes(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found & MODULES.keys()


def test_who_may_import_whom():
    """Guards the architecture: low modules know nothing of the project, models only blocks, none a script, only bench.py benchmarks."""
    for name, path in MODULES.items():
        used = imports(path)
        if name == "model":
            assert all(module.startswith("latent.") or module == "kernels" for module in used), used
            assert imports(path, ast.iter_child_nodes) == {"kernels"}, "latent/ is imported where a compression head is switched on"
        elif name in LOW:
            assert used <= ({"cpu_kernels", "gpu_kernels"} if name == "kernels" else set()), f"{name} imports {used}"
        elif name.startswith(("baseline_transformer", "latent")):
            assert used <= LOW | {m for m in MODULES if m.startswith("latent")}, f"{name} imports {used}"
        assert not used & SCRIPTS, f"{name} imports the script {used & SCRIPTS}"
        if not name.startswith("bench"):
            assert not any(module.startswith("benchmarks.") for module in used), f"{name} imports {used}"
            allowed = name in SCRIPTS | {"recorder", "pretrained"}
            assert allowed or "checkpoint" not in used, f"{name} imports the registry, which imports all models"


def test_a_command_starts_without_the_compiler():
    """Guards the time that every command takes to start: a decorator of torch.compiler imports torch._dynamo, 1.4 s of 3.2."""
    code = "import sys, evaluate, sample, train; print(sorted({'sympy', 'torch._dynamo', 'transformers'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout == "[]\n"


# ----------------------------------------------------------------------------------------------------------------------
# config files

CONFIGS = sorted((ROOT / "config").rglob("*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.relative_to(ROOT / "config").as_posix())
def test_every_config_file_builds_its_model(path):
    """Guards config/: each file parses, names only keys that exist, and its model can be built (on the meta device)."""
    import torch

    parsed = configurator.configure(
        [str(path)], [TrainConfig], positional="[CONFIG]", choose=("model", checkpoint.CONFIGS)
    )
    config, model_config = parsed.sections
    if getattr(
        model_config, "pretrained", None
    ):  # by name, which a test may not download: GPT-2's shape is the library's default
        theirs = pytest.importorskip("transformers", reason=HOW_TO_INSTALL).GPT2Config()
        assert model_config.pretrained == "openai-community/gpt2"
        model_config = dataclasses.replace(model_config, vocab_size=theirs.vocab_size)
        model_config = huggingface.fit(model_config, json.dumps(theirs.to_dict()), parsed.given)
    with torch.device("meta"):
        model = checkpoint.build(config.model, model_config)
    stated = re.search(r"([\d,]+) parameters", path.read_text(encoding="utf-8"))
    if stated and "vocab_size" not in parsed.given:
        vocab_size = {"stdlib": 256, "wikipedia": 50257, "fineweb": 50257, "numbers": 256}[config.dataset]
        count = model.get_num_params() + (vocab_size - model_config.vocab_size) * model_config.n_embd
        assert count == int(stated[1].replace(",", "")), "the docstring states another number of parameters"


def differing(a: Path, b: Path) -> set[str]:
    one, two = (configurator.read_config_file(p) for p in (a, b))
    return {key for key in one.keys() | two.keys() if one.get(key) != two.get(key)}


@pytest.mark.parametrize("folder", ["wikipedia", "stdlib"])
def test_the_eight_runs_differ_only_in_what_they_are_about(folder):
    """Guards the comparison: a stray setting in one file would be compared as if it were an idea."""
    folder = ROOT / "config" / folder
    plain, baseline = folder / "encdec_plain.py", folder / "baseline.py"
    assert differing(plain, folder / "encdec_cosine.py") == differing(plain, folder / "encdec_mse.py") == {"embedding_loss"}
    assert differing(plain, folder / "encdec_possub.py") == {"pos_sub"}
    assert differing(plain, folder / "encdec_mse_possub.py") == {"pos_sub", "embedding_loss", "embedding_loss_weight"}
    assert differing(baseline, folder / "baseline_dropout.py") == {"dropout"}
    assert differing(baseline, folder / "baseline_small.py") <= {"n_layer", "n_embd", "n_head"}
    shape = {"model", "n_layer", "n_embd", "n_head", "n_encoder_layer", "n_decoder_layer", "n_cross_head"}
    assert differing(plain, baseline) <= shape


def test_stdlib_pairs_have_one_size():
    """Guards 'same size': encoder-decoder and baselines within 1% of parameters of each other."""
    sizes = []
    for path in sorted((ROOT / "config" / "stdlib").glob("*.py")):
        parsed = configurator.configure(
            [str(path)], [TrainConfig], positional="[CONFIG]", choose=("model", checkpoint.CONFIGS)
        )
        if path.stem != "common":
            sizes.append(checkpoint.build(parsed.sections[0].model, parsed.sections[1]).get_num_params())
    assert len(sizes) == 8 and max(sizes) / min(sizes) < 1.01


# ----------------------------------------------------------------------------------------------------------------------
# the README


def readme_commands() -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = [line for block in re.findall(r"```(?:bash|sh)\n(.*?)```", text, re.S) for line in block.splitlines()]
    return [line.split("  #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


def shrink(command: str) -> str | None:
    """The command with flags appended that make it small (the last of a repeated key counts); None: not to be run here."""
    words = shlex.split(command)
    if command == "make quickstart":  # what of it later commands need
        return " && ".join(shrink(f"python train.py config/{run}.py") for run in ("quickstart", "quickstart_baseline"))
    if words[0] in ("git", "make", "."):
        return None  # the set-up itself: what CI and `make quickstart` do
    if words[1].startswith("data/"):
        if "--input" in words:
            return f"{command} --tokenizer byte"  # GPT-2's needs a download
        if "data/distill" in command:
            return f"{command} --count=20 --prompt_tokens=4"
        offline = "stdlib" in command or "--numbers" in command
        return command if offline else None  # a download; test_data.py tests the real libraries on local files
    if "sample.py" in command:
        short = "" if "sample.py out/latent/rqvae" in command else " --max_new_tokens=5"  # an autoencoder gives back what it is given
        return f"{command}{short} --device=cpu"
    if "evaluate.py" in command:
        return f"{command} --final_eval_tokens=2000"
    if "bench.py latent" in command:
        return f"{command} --tokens=8"
    if "bench.py train" in command:
        return f"{command} --batch=1 --device=cpu"
    if "bench.py data" in command:
        return f"{command} --tokenizer=byte --megabytes=1"  # GPT-2's needs a download
    if "train.py" not in command:
        return command
    shape = "--n_layer=1" if "baseline" in command else "--n_encoder_layer=1 --n_decoder_layer=1 --n_cross_head=2"
    if "config/latent/" in command:  # k-means wants 50 latents a code
        sizes = "--latent_dim=4 --codebook_size=4 --dataset=my_texts --max_iters=2 --warmup_iters=1 --eval_interval=1 --eval_iters=1"
        if "rqvae" in command:
            sizes += " --n_encoder_layer=1 --n_decoder_layer=1 --block_size=16 --quantize_after=1 --batch_size=64"
        elif "numbers" in command:
            sizes = sizes.replace("--dataset=my_texts", "--n_layer=1 --n_decoder_layer=1 --startup_steps=1 --quantize_after=1")
            sizes += " --freeze_codes_after=0 --final_eval_tokens=1000"
        elif "latent_transformer" in command:
            sizes += " --n_layer=1 --n_decoder_layer=1 --startup_steps=1 --quantize_after=1"
            sizes += " --target_size=8 --block_size=16 --batch_size=64"
        elif "rq_transformer" in command:
            sizes = sizes[sizes.index("--dataset") :] + " --n_spatial_layer=1 --block_size=16 --batch_size=2"
        else:
            sizes += f" {shape} --block_size=16 --batch_size=2"
        return f"{command} {sizes} --n_embd=8 --n_head=2 --dtype=float32 --device=cpu"
    return (
        f"{re.sub('nproc_per_node=[0-9]+', 'nproc_per_node=2', command)} {shape} --n_embd=8 --n_head=2 --block_size=16 "
        "--max_iters=2 --warmup_iters=1 --eval_interval=1 --eval_iters=1 --batch_size=1 --gradient_accumulation_steps=2 "
        "--dtype=float32 --device=cpu --compile=off"
    )


def test_readme_commands(tmp_path):
    """Guards the README: every command in it is typed as written, only smaller, in order, in a copy of the checkout."""
    tree = tmp_path / "checkout"
    shutil.copytree(
        ROOT, tree, ignore=shutil.ignore_patterns(".git", ".venv", "out", "*.bin", "meta.json", "__pycache__", ".*_cache")
    )
    (tree / "my_texts").mkdir()
    for i in range(40):
        (tree / "my_texts" / f"{i}.txt").write_text(f"Text number {i}. " * 20, encoding="utf-8")
    (tree / "wikipedia.txt").write_text("\n\n\n".join(f"Article {i}\n\n" + "Some words. " * 20 for i in range(200)))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    commands = [small for small in map(shrink, readme_commands()) if small]
    assert len(commands) >= 12
    for command in commands:
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", command], cwd=tree, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-500:]}\n{done.stderr[-1500:]}"
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S):
        done = subprocess.run([sys.executable, "-c", block], cwd=tree, env=environment, capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.startswith("def "), f"{block}\n{done.stderr[-1500:]}"


def test_readme_links_exist():
    """Guards against a README that names files which are not there."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (ROOT / target).exists(), target
