# The loss of the pretrained gpt2-medium (355M) on OpenWebText.
#
#   python train.py config/eval_gpt2_medium.py
#
# hardware: one GPU | time: not yet measured | result: not yet measured

init_from = 'gpt2-medium'
dataset = 'openwebtext'
eval_only = True
eval_iters = 500
batch_size = 8
