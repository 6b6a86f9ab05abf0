# The loss of OpenAI's gpt2-medium on OpenWebText (350M: 24 layers, 16 heads, 1024 wide).

batch_size = 8
eval_iters = 500  # more than while training: this is the only estimate
eval_only = True
wandb_log = False
init_from = "gpt2-medium"
