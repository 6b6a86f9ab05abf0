# The loss of OpenAI's gpt2-xl on OpenWebText (1558M: 48 layers, 25 heads, 1600 wide).

batch_size = 8
eval_iters = 500  # more than while training: this is the only estimate
eval_only = True
wandb_log = False
init_from = "gpt2-xl"
