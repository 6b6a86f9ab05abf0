# GPT-2 (124M) on OpenWebText; nanoGPT reaches a validation loss of about 2.85 with it in four to
# five days on eight A100s. The global batch stays the same on any number of devices.

wandb_log = True
wandb_project = "owt"
wandb_run_name = "gpt2-124M"

# 12 sequences * 1024 tokens * 40 micro-batches = 491,520 tokens an iteration
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8

# 300 billion tokens
max_iters = 600000
lr_decay_iters = 600000

eval_interval = 1000
eval_iters = 200
log_interval = 10

weight_decay = 1e-1
