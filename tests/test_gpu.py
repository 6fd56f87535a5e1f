"""Whether everything is put on the device that it belongs on, seen with a simulated GPU: see simulated_gpu.py."""

import json

import pytest
import torch
from simulated_gpu import GPU, simulated_gpu

import kernels
import sample
import train

SHORT = (
    "--max_iters=2 --warmup_iters=1 --eval_interval=2 --eval_iters=1 --log_interval=1 --batch_size=4 --block_size=16 --n_head=2 "
    "--n_embd=16 --final_eval_tokens=200 --dtype=float64 --compile=off"
)
STACKS = "--n_encoder_layer=1 --n_decoder_layer=1"
ENCODER_DECODER = f"{STACKS} --n_cross_head=2"
LATENT_TRANSFORMER = "--model=latent_transformer --target_size=8 --n_layer=1 --n_decoder_layer=1 --startup_steps=1"
CODES = "--batch_size=50 --latent_factor=4 --latent_dim=8 --codebook_size=4 --codebook_levels=2"
RUNS = {
    "encoder_decoder": f"{ENCODER_DECODER} --embedding_loss=mse --pos_sub=plain --gradient_accumulation_steps=2 --grad_clip=1",
    "rope": f"{ENCODER_DECODER} --embedding_loss=log_cosine --pos_sub=ln --position=rope --window=5 --activation_checkpointing=true",
    "decoder_only": "--model=decoder_only --n_layer=1 --pos_sub=plain --bias=true --eval_sample_tokens=3",
    "head": f"{ENCODER_DECODER} {CODES} --commitment_weight=0.1",
    "latent_transformer": f"{LATENT_TRANSFORMER} {CODES} --bottleneck=rq --quantize_after=1",
    "semhash": f"{LATENT_TRANSFORMER} --latent_factor=4 --latent_dim=8 --bottleneck=semhash",
    "autoencoder": f"--model=autoencoder {STACKS} {CODES} --quantize_after=1",
    "rq_transformer": "--model=rq_transformer --n_spatial_layer=1 --n_depth_layer=1",
    "codes are the tokens": "--model=rq_transformer --autoencoder=none --n_spatial_layer=1 --n_depth_layer=1",
}


def test_tensors_of_two_devices_do_not_meet():
    """Guards the simulation: what a GPU refuses and what it takes."""
    with simulated_gpu():
        x, index = torch.randn(3, 4).to("cuda"), torch.tensor([2, 0])
        assert x.device == GPU and (x + torch.arange(4, device=x.device)).device == GPU
        for wrong in (lambda: x + torch.ones(4), lambda: torch.nn.functional.embedding(index, x), lambda: x.gather(0, index[None])):
            with pytest.raises(RuntimeError, match="one device"):
                wrong()
        with pytest.raises(TypeError, match="numpy"):
            x.numpy()
        assert x[index].device == GPU and (x * torch.tensor(2.0)).device == GPU
        assert torch.zeros(4).copy_(x[0]).device.type == x.cpu().device.type == "cpu"


@pytest.fixture(scope="module")
def autoencoder(tiny_data, tmp_path_factory) -> str:
    out = tmp_path_factory.mktemp("codes") / "autoencoder"
    train.main([f"--dataset={tiny_data}", f"--out_dir={out}", *SHORT.split(), *RUNS["autoencoder"].split(), "--device=cpu"])
    return f"--autoencoder={out}"


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_what_it_is_on_a_cpu(name, tiny_data, tmp_path, autoencoder, monkeypatch):
    """Guards training, checkpoints, resuming, sampling on a GPU: a forgotten device=, state left behind on the other device."""
    found = {}
    for device in ("cuda", "cpu"):  # the first encodes the text for both
        out = tmp_path / device
        flags = [f"--dataset={tiny_data}", f"--out_dir={out}", *SHORT.split(), *RUNS[name].split(), f"--device={device}"]
        monkeypatch.setitem(kernels.CHUNK, device, 30 * 256)  # chunks of 30 tokens
        with simulated_gpu():
            train.main(flags + [autoencoder] * (name == "rq_transformer"))
            train.main([f"--out_dir={out}", "--resume", "--max_iters=3"])
            how = [str(out), f"--device={device}", "--dtype=float64", "--prompt=def f"]
            texts = sample.main(how + ["--num_samples=2", "--max_new_tokens=8"] * (name != "autoencoder"))
            if name in ("encoder_decoder", "rope", "decoder_only"):
                texts += sample.main([*how, "--lookahead=3,3,2", "--max_new_tokens=24"])
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        found[device] = texts, [[line.get(key) for key in ("kind", "step", "loss", "val_loss", "grad_norm")] for line in lines]
    assert found["cuda"] == found["cpu"]
