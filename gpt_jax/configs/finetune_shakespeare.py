# OpenAI's largest GPT-2, finetuned on Shakespeare.

import time

out_dir = "out-shakespeare"
eval_interval = 5
eval_iters = 40
wandb_log = False
wandb_project = "shakespeare"
wandb_run_name = "ft-" + str(time.time())

dataset = "shakespeare"
init_from = "gpt2-xl"

# it overfits within a few epochs: save only what is better on unseen text
always_save_checkpoint = False

# 1 sequence * 32 micro-batches * 1024 tokens = 32,768 tokens an iteration; of the 301,966 tokens
# of the training split, an epoch is about 9.2 iterations
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20

learning_rate = 3e-5
decay_lr = False
