"""
What a new model begins with instead of random weights: those of another run, of nanoGPT, or of a pretrained backbone.
"""

import pickle
import warnings
from pathlib import Path

import safetensors.torch
import torch

import checkpoint
import configurator
from latent import huggingface

# settings of models that say when something happens, and decide no size
AT_A_STEP = {"freeze_codes", "freeze_codes_after", "quantize_after", "freeze_backbone_iters", "startup_steps", "anneal_steps"}


def init_from(model: torch.nn.Module, source: Path) -> None:
    """
    Fill the model from the weights of another run directory (its best checkpoint), or from a checkpoint file of nanoGPT
    (a .pt for the decoder-only model). Raises ValueError where names or shapes do not fit, the codes are another autoencoder's,
    or a setting differs that no shape shows and that decides what the weights mean.
    """
    ours = configurator.to_dict(model.config)
    theirs = load_nanogpt(model, source) if source.suffix == ".pt" else load_other_run(model, ours, source)
    keys = ("n_head", "n_cross_head", "decoder_order", "position", "pos_sub", "decoder_pos_emb", "encoder_context")
    other = [f"{key}={theirs[key]} (here {ours[key]})" for key in keys if key in ours and theirs.get(key, ours[key]) != ours[key]]
    if other:
        raise ValueError(f"init_from={source} has {', '.join(other)}, so its weights would mean something else; set the same")
    if theirs.get("window", 0) != ours.get("window", 0):  # the weights work with any window, but have learned with theirs
        now = f"window={theirs.get('window', 0)} (here {ours.get('window', 0)})"
        warnings.warn(f"init_from={source} has {now}: self-attention of these weights saw other positions", stacklevel=1)


def load_other_run(model: torch.nn.Module, ours: dict, source: Path) -> dict:
    """init_from a run directory, into a model of the settings `ours`. Returns the settings of that run's model."""
    folder, (_, kind, config) = checkpoint.find(source, "best"), checkpoint.read_config(source)
    if not isinstance(model, checkpoint.MODELS[kind][1]):
        raise ValueError(f"init_from={source} is a run of model={kind}, whose weights are not for this model; name a run of the same")
    theirs = configurator.to_dict(config)
    if theirs.get("codebook_hash") and theirs["codebook_hash"] != ours["codebook_hash"]:
        raise ValueError(f"init_from={source} was trained on the codes of another autoencoder, which mean something else")
    try:
        checkpoint.load_weights(model, folder)
    except checkpoint.Misfit:
        sizes = [key for key, value in ours.items() if not (key in AT_A_STEP or isinstance(value, float))]
        sizes = [key for key in sizes if theirs.get(key, ours[key]) != ours[key]]
        if not sizes:
            raise
        other = ", ".join(f"{key}={theirs[key]} (here {ours[key]})" for key in sizes)
        raise ValueError(f"init_from={source} does not fit: it has {other}; set the same, or name another run") from None
    return theirs


def load_nanogpt(model: torch.nn.Module, source: Path) -> dict:
    """init_from a checkpoint file of nanoGPT. Returns its `model_args`, which are named as our settings are."""
    if not source.is_file():
        raise FileNotFoundError(f"init_from={source}: there is no such file")
    try:
        content = torch.load(source, map_location="cpu", weights_only=True)
        # torch.compile's prefix; `attn.bias` is the causal mask that older versions stored as a buffer
        weights = {key.removeprefix("_orig_mod."): value for key, value in content["model"].items() if not key.endswith(".attn.bias")}
        arguments = dict(content.get("model_args") or {})
    except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, TypeError, ValueError, AttributeError, OSError) as error:
        why = f"it has no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:200]
        raise ValueError(f"init_from={source} is no checkpoint of nanoGPT, or a damaged one: {why}") from None
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"init_from={source} does not fit this model: {' '.join(str(error).split())[:300]}") from None
    return arguments


def fit_backbone(config, given: dict[str, object]):
    """
    The config with the sizes and the description of its Hugging Face backbone, if it has one. A resumed run has stored the
    description and looks nothing up. Raises ValueError where there is no such model, or it does not fit `given` or the data.
    """
    if getattr(config, "pretrained", None) is None:
        return config
    return huggingface.fit(config, config.backbone_config or huggingface.describe(config.pretrained), given)


def load_backbone(model: torch.nn.Module, config) -> None:
    """Give a model the embeddings and the encoder of config.backbone. Raises ValueError for one that does not fit, or none."""
    if config.pretrained is not None:
        model.trunk.load(config.pretrained, model.wte)
        return
    run = Path(config.backbone)
    try:
        folder = checkpoint.find(run, "best")
    except FileNotFoundError as error:
        raise ValueError(f"backbone={run}: {error}") from None
    _, name, theirs = checkpoint.read_config(run)
    if name != "encoder_decoder":
        raise ValueError(f"backbone={run} is a run of {name}; one of encoder_decoder is needed")
    keys = ("n_embd", "vocab_size", "n_encoder_layer", "n_head", "bias", "position")
    other = [f"{key}={getattr(theirs, key)}" for key in keys if getattr(theirs, key) != getattr(config, key)]
    if config.position == "learned" and theirs.block_size < config.block_size:
        other.append(f"block_size={theirs.block_size}")
    if theirs.window > 0:
        other.append(f"window={theirs.window}, but its blocks would see all positions here")
    if other:
        raise ValueError(f"backbone={run} does not fit: it has {', '.join(other)}; set the same here, or take another run")
    model.load_backbone(safetensors.torch.load_file(str(folder / "model.safetensors")))
