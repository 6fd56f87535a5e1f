"""
A causal language model of Hugging Face (GPT-2, Llama, Qwen3, ...) as both trunks of the text autoencoder, backbone=hf:NAME_OR_PATH.

1. One copy reads the tokens and writes them: two would be twice the weights, gradients and moments. While it is frozen they would
   be equal anyway; after that it learns from both ends.
2. It is causal token by token, in the decoder too. There a position does not see the later ones of its block, but has no need to:
   the whole latent of the block is in the input of each. What holds of blocks (latent/autoencoder.py, 1 and 2) still holds.
3. It brings its input embeddings, which are the output layer too, its positions and its final norm. Dropout is that of our config.
4. A run needs it only once. Its weights are in the run's checkpoints and its description, as JSON, in config.json, so that going
   on and loading need neither its folder nor a network.

`transformers` is imported when such a model is asked for, and nowhere else.

Shapes: B batch, T tokens, C width.
"""

import dataclasses
import json

import safetensors
import torch
import torch.nn as nn

from model import require

SIZES = {  # of AutoencoderConfig, and what transformers calls them in every model
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_encoder_layer": "num_hidden_layers",
    "n_decoder_layer": "num_hidden_layers",
}


def transformers():
    try:
        import transformers
    except ImportError:
        raise ValueError('backbone=hf:... needs transformers, which is not installed: pip install "transformers>=5"') from None
    return transformers


def describe(name: str) -> str:
    """The configuration of a model, by name or path, as JSON. Raises ValueError where there is none."""
    try:
        found = transformers().AutoConfig.from_pretrained(name, trust_remote_code=False).to_dict()
    except (OSError, ValueError) as error:
        raise unusable(name, error) from None
    return json.dumps({key: value for key, value in found.items() if key not in ("_name_or_path", "dtype")})


def unusable(name: str, error: Exception) -> ValueError:
    return ValueError(
        f"backbone=hf:{name}: {str(error).splitlines()[0]} A folder with config.json and model.safetensors is needed, or a "
        "name on huggingface.co that is in the cache or can be downloaded"
    )


def parse(description: str):
    """transformers' configuration object of what describe() returned."""
    values = json.loads(description)
    return transformers().CONFIG_MAPPING[values["model_type"]].from_dict(values)


def fit(config, description: str, given: dict[str, object]):
    """
    An AutoencoderConfig with the description and the sizes of its backbone. Raises ValueError for `given` values that differ,
    for another vocabulary than the config's (the data set's), for too long a block_size, and for what is no causal decoder.
    """
    theirs, name = parse(description), f"backbone={config.backbone}"
    require(
        not theirs.is_encoder_decoder and all(isinstance(getattr(theirs, key, None), int) for key in SIZES.values()),
        f"{name} is a {theirs.model_type}; a causal language model of text is needed, such as GPT-2, Llama or Qwen3",
    )
    sizes = {key: getattr(theirs, attribute) for key, attribute in SIZES.items()}
    for key, value in sizes.items():
        require(
            given.get(key, value) == value,
            f"{key}={given.get(key)}, but {name} has {value}; leave {key} out: it is taken from there",
        )
    require(
        theirs.vocab_size == config.vocab_size,
        f"{name} has a vocabulary of {theirs.vocab_size} tokens, but the data set has {config.vocab_size}: its ids mean something "
        "else there; prepare the data with the tokenizer of that model (GPT-2: data/wikipedia, or --tokenizer gpt2), or, if it is "
        f"the same one and only the table is longer, say so with --vocab_size={theirs.vocab_size}",
    )
    longest = getattr(theirs, "max_position_embeddings", None) or config.block_size
    require(config.block_size <= longest, f"block_size={config.block_size}, but {name} has only {longest} positions; lower it")
    return dataclasses.replace(config, **sizes, backbone_config=description)


class PretrainedCache:
    """What a trunk has computed for the first `length` tokens; passed to forward(), which appends to it."""

    def __init__(self, config):
        self.layers = transformers().DynamicCache(config=config)

    @property
    def length(self) -> int:
        return self.layers.get_seq_length()


class PretrainedTrunk(nn.Module):
    """The layers and the final norm of a model, from embeddings (B, T, C) to states (B, T, C) for the output layer."""

    def __init__(self, description: str, dropout: float):
        super().__init__()
        config = parse(description)
        for key, value in config.to_dict().items():
            if "drop" in key and isinstance(value, float):
                setattr(config, key, dropout)
        self.model = transformers().AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=False)

    def take_embeddings(self) -> nn.Embedding:
        """Its input embeddings, to be kept by the caller under a name of their own; the trunk has none afterwards."""
        embeddings = self.model.get_input_embeddings()
        self.model.set_input_embeddings(nn.Identity())
        return embeddings

    def make_cache(self) -> PretrainedCache:
        return PretrainedCache(self.model.config)

    def forward(self, x: torch.Tensor, cache: PretrainedCache | None = None) -> torch.Tensor:
        layers = cache.layers if cache is not None else None
        return self.model(inputs_embeds=x, past_key_values=layers, use_cache=cache is not None).last_hidden_state

    def flops_again(self, T: int) -> int:
        """What CausalModel.flops_per_token misses: the trunk runs twice, and its attention may be wider or narrower than C."""
        config = self.model.config
        width = config.num_attention_heads * (getattr(config, "head_dim", None) or 0) or config.hidden_size
        weights = sum(p.numel() for name, p in self.named_parameters() if "wpe" not in name)
        return 6 * weights + 2 * config.num_hidden_layers * 12 * T * (width - config.hidden_size)

    def load(self, name: str, embeddings: nn.Embedding) -> None:
        """
        Fill the trunk and the embeddings taken from it with the weights of a model, by name or path. Raises ValueError if there
        are none, if some are missing (transformers would leave them random), or if the model looks ahead.
        """
        try:
            theirs, report = transformers().AutoModel.from_pretrained(
                name, config=self.model.config, dtype=torch.float32, trust_remote_code=False, use_safetensors=True,
                output_loading_info=True,
            )  # fmt: skip
        except (OSError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
            raise unusable(name, error) from None
        missing = sorted(report["missing_keys"])
        require(not missing, f"backbone=hf:{name} is incomplete: {len(missing)} tensors are missing, {', '.join(missing[:3])}")
        embeddings.load_state_dict(theirs.get_input_embeddings().state_dict())
        theirs.set_input_embeddings(nn.Identity())
        self.model.load_state_dict(theirs.state_dict())
        require(
            self.is_causal(embeddings),
            f"backbone=hf:{name} looks ahead, so the codes of a prefix would not be those of the text; a causal model is needed",
        )

    @torch.no_grad()
    def is_causal(self, embeddings: nn.Embedding) -> bool:
        """Whether another last token leaves all states before it as they are, bit for bit."""
        self.eval()
        before, after = (self(embeddings(torch.tensor([[1, 1, 1, last]]))) for last in (0, 1))
        self.train()
        return torch.equal(before[:, :-1], after[:, :-1])
