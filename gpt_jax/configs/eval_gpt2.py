# The loss of OpenAI's gpt2 on OpenWebText (124M: 12 layers, 12 heads, 768 wide).

batch_size = 8
eval_iters = 500  # more than while training: this is the only estimate
eval_only = True
wandb_log = False
init_from = "gpt2"
