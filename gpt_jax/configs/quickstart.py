# What `python train.py` runs when no config is named: a small GPT that learns to write Python
# from Python's own standard library, in minutes on a laptop's CPU.

out_dir = "out"
init_from = "auto"  # go on with the run in out_dir, if there is one
eval_interval = 500
eval_iters = 20
log_interval = 20
sample_tokens = 400  # end with something to read

dataset = "pystdlib"
gradient_accumulation_steps = 1
batch_size = 16
block_size = 64

n_layer = 4
n_head = 4
n_embd = 128
dropout = 0.0

# so small a network bears a high learning rate
learning_rate = 3e-3
max_iters = 2000
lr_decay_iters = 2000
min_lr = 3e-4
beta2 = 0.99
warmup_iters = 100
