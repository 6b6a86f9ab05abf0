# The loss of OpenAI's gpt2-large on OpenWebText (774M: 36 layers, 20 heads, 1280 wide).

batch_size = 8
eval_iters = 500  # more than while training: this is the only estimate
eval_only = True
wandb_log = False
init_from = "gpt2-large"
