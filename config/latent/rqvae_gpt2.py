"""
Text autoencoder of Wikipedia around GPT-2, 131,521,280 parameters: 4 tokens become 6 codes of 512, 13.5 bits a token. For a GPU.
GPT-2's 124 M weights, downloaded once, read the tokens and write them (latent/huggingface.py). They stay as they are for 1,000
steps, until what lies between them works. The data must have the tokenizer of the model: this one is GPT-2's, as data/wikipedia is.
Qwen/Qwen3-0.6B and the like need data prepared with theirs.
"""

base = "../wikipedia/common.py"
model = "autoencoder"
backbone = "hf:openai-community/gpt2"
freeze_backbone_iters = 1000
backbone_lr_scale = 0.1
latent_factor = 4
latent_dim = 256
codebook_size = 512
codebook_levels = 6
quantize_after = 500
batch_size = 16
gradient_accumulation_steps = 4  # x 16 x 200 = 12,800 tokens a step
learning_rate = 3e-4
min_lr = 3e-5
grad_clip = 1.0
