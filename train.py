"""
Train a GPT: from scratch, from the checkpoint of a run, or from other weights; on a laptop or on many GPUs.

    python train.py config/train_python_char.py                        a small model of Python source code
    python train.py config/train_python_char.py --init_from=resume     continue where it stopped
    python train.py config/train_shakespeare_char.py --batch_size=32 --compile=False
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py

Each evaluation prints the loss on both splits and writes out_dir/ckpt.pt, from which the run can continue. best.pt has
the weights with the lowest validation loss, log.jsonl what was printed. Ctrl-C saves before the run ends. With
--init_from=auto one command both starts a run and continues it after a failure (torchrun --max-restarts=3).
Without a config file the options below train GPT-2 (124M) on OpenWebText.
"""

import time

from configurator import configure

STARTED = time.perf_counter()   # max_minutes counts from here

# ---------------------------------------------------------------------------------------------------------------------
# output
out_dir = 'out'                       # folder for checkpoints and the log
init_from = 'scratch'                 # 'scratch', 'resume', 'auto' (resume or scratch), a path, 'gpt2', 'owner/name'
eval_interval = 2000                  # steps between evaluations; each evaluation is followed by a save
checkpoint_interval = 0               # steps between additional saves; 0: none
keep_last = 0                         # number of earlier states to keep, as ckpt-<step>.pt
eval_iters = 200                      # batches per split in an evaluation; always the same batches
eval_only = False                     # evaluate once and exit; write nothing
log_interval = 1                      # steps between loss lines
patience = 0                          # stop after this many evaluations in a row without a new best; 0: never
wandb_log = False                     # also send the log to Weights & Biases
wandb_project = 'flatgpt'             # project of Weights & Biases
wandb_run_name: str | None = None     # None: the name of out_dir
tensorboard = False                   # also write the log to out_dir/tensorboard: tensorboard --logdir=OUT_DIR
# data
dataset = 'openwebtext'               # a folder in data/, or a path
batch_size = 12                       # rows per micro-batch
block_size = 1024                     # tokens per row; a new model has this context
gradient_accumulation_steps = 5 * 8   # micro-batches per step, over all processes
# model
arch = 'gpt2'                         # a set of switches in model.py: 'gpt2', 'llama', 'qwen3', 'speedrun'
size: str | None = None               # 'auto': n_layer, n_embd, n_head, learning_rate for max_minutes; None: as below
pos: str | None = None                # 'learned', 'rope', 'alibi'; None: as in arch
window: int | None = None             # how many tokens back attention reaches; None: all
layer_scale: float | None = None      # initial gain of each block's output; None: no gains
gelu: str | None = None               # 'tanh' (GPT-2's), 'erf' (nanoGPT's, faster on a CPU); None: as in arch
n_layer = 12                          # number of blocks
n_embd = 768                          # width: numbers per token between blocks
n_head = 12                           # attention heads per block; they divide n_embd
bias = False                          # biases in Linear and LayerNorm, as in GPT-2
dropout = 0.0                         # 0.0 for pretraining; 0.1 or more for finetuning and small data
attention = 'auto'                    # 'sdpa' (torch's fused kernels), 'math' (written out), 'auto' (the faster one)
loss_chunks = 1                       # compute the logits in this many pieces, which saves memory, not time
# optimizer
optimizer = 'adamw'                   # 'adamw', 'muon' (for the matrices of the blocks; needs fewer steps)
max_iters = 600000                    # steps of the whole run; one step is one update
max_minutes: float | None = None      # make as many steps as fit into this time, at most max_iters; None: no limit
weight_decay = 1e-1                   # on matrices only
grad_clip = 1.0                       # largest norm of the gradient; 0.0: no limit
beta1 = 0.9                           # AdamW: decay per step of the mean of gradients
beta2 = 0.95                          # AdamW: decay per step of the mean of their squares
# learning rate
learning_rate = 6e-4                  # the peak of the learning rate
schedule = 'cosine'                   # after the warmup: 'cosine', 'linear' or 'constant'
warmup_iters = 2000                   # steps of linear rise
lr_decay_iters: int | None = None     # step at which min_lr is reached; None: max_iters
cooldown_iters: int | None = None     # 'linear' falls only in this many steps before that (WSD); None: in all
min_lr = 6e-5                         # about a tenth of learning_rate
# finetuning
freeze = ''                           # regex of parameters that are not trained; by step: '0: wte|h; 1000: wte; 2000:'
lora_rank = 0                         # train adapters of this rank instead of the weights; 0: train the weights
lora_alpha = 16.0                     # adapters are scaled by lora_alpha / lora_rank
lora_dropout = 0.0                    # dropout of the input of an adapter
lora_targets = 'attn|mlp'             # regex of the Linear modules that get an adapter
# machine
seed = 1337                           # for the weights, the batches and dropout
device = 'auto'                       # 'cuda', 'cuda:1', 'mps', 'cpu', 'auto' (the first of them that is available)
dtype = 'auto'                        # 'float32', 'bfloat16', 'float16' (scales the loss), 'auto' (a fast one)
compile: str | bool = 'auto'          # torch.compile: True, False, 'auto' (only on a GPU)
parallel = 'ddp'                      # several processes: 'ddp' (each has the whole model), 'fsdp' (each has a shard)
activation_checkpointing = False      # recompute the blocks in the backward pass: a third more work, much less memory
peak_flops: float | None = None       # peak FLOP/s of a device, to compute the MFU; None: from a table, or measured
# ---------------------------------------------------------------------------------------------------------------------
config = configure(globals())   # applies config files and --key=val to the options above; --help prints them

import math

import torch  # not above the options: --help and a misspelt option need not wait for it

from flatgpt import checkpoint, optim, outdir, runtime, scaling, start, validate
from flatgpt.budget import Budget
from flatgpt.dataset import Dataset
from flatgpt.errors import UserError
from model import GPT

# what the run starts from, and the machine that it runs on

ckpt, start_path, resuming = start.choose_start(config)   # from scratch: None, None, False
saved = ckpt if resuming else {}                          # the state of the run that continues
validate.train_options(config, runtime.num_processes(), ckpt, start_path, resuming)
rt = runtime.setup(device, dtype, compile, seed, training=True, earlier=saved.get('machine'))
rt.notice(rt.describe())
if not eval_only:
    outdir.claim_for_all(out_dir, rt)   # one run per folder, until this process ends

# data

data = Dataset(dataset)
tokens_per_iter = gradient_accumulation_steps * batch_size * block_size   # of all processes


def batch_of(step):
    """Return this process's inputs and targets of a step, each (micro-batches, B, T)."""
    return data.train_batch(step, seed, gradient_accumulation_steps, batch_size, block_size,
                            rt.device, rt.rank, rt.world_size)


# model

if ckpt is None:
    if size == 'auto':
        rt.notice(scaling.choose_size(config, data, rt))
    model = GPT(start.new_config(config, data.padded_vocab_size))
else:
    start.fit_tokenizer(ckpt, start_path, data, rt)
    model = checkpoint.build(ckpt, start_path, merged=not resuming, dropout=dropout, attention=attention,
                             loss_chunks=loss_chunks)
    start.fit_context(model, block_size)   # rows may be shorter than the context, which stays
data.validate_ids(block_size, model.config.vocab_size)
model.within_documents = bool(data.begins)   # of conversations, attention stays within each
if data.num_cut(block_size):
    rt.notice(f'{data.num_cut(block_size):,} of {len(data.begins["train"]):,} conversations are longer than '
              f'block_size={block_size}: what is past it is not learned')

# what is trained: all weights, a part of them, or an adapter

adapted = start.adapt(model, config, saved, start_path)   # puts the adapter on the model
freezer = optim.Freezer(model, freeze)
if not eval_only:
    start.require_memory(model, config, rt)
model.to(rt.device)
rt.notice(f'{model.get_num_params(non_embedding=False):,} parameters, {tokens_per_iter:,} tokens per step, '
          f'{len(data.data["train"]):,} tokens in {dataset}')
rt.notice(*freezer.notes)
if activation_checkpointing:
    runtime.recompute(model)
if rt.compile:
    rt.compile_model(model, parallel)
wrapped = rt.wrap(model, parallel, freezer.changes)   # the model to call in training: it averages the gradients
opt = optim.build(optimizer, model, learning_rate, (beta1, beta2), weight_decay, rt.dtype)
scaler = rt.grad_scaler()

# progress: of a new run, or of the one that goes on

run = start.Progress(measured=start.evaluation_id(data, eval_iters, batch_size, block_size))
start.go_on(run, saved, start_path, config, opt, scaler, model.flops_per_token(block_size), rt)
ckpt = saved = None   # frees memory

# the output folder: log.jsonl, W&B, TensorBoard, states; and Ctrl-C or SIGTERM, which end the run after a step

folder = outdir.RunFolder(config, rt, run, resuming, start_path, model=model, optimizer=opt, scaler=scaler,
                          description=data.tokenizer, **adapted)


@torch.no_grad()
def evaluate():
    """Return {split: mean loss in nats per token} over the fixed batches of each split, or None after a signal. The
    processes share the batches."""
    model.eval()
    losses = {}
    for split in ('train', 'val'):
        budget.start()
        total = torch.zeros((), device=rt.device)   # sum of the losses of batches
        count = torch.zeros((), device=rt.device)   # number of batches
        for first in range(0, eval_iters, rt.world_size):
            interrupted = folder.interrupted()
            if interrupted:
                model.train()
                return None
            i = first + rt.rank
            x, y = data.eval_batch(split, min(i, eval_iters - 1), eval_iters, batch_size, block_size, rt.device)
            weight = (y >= 0).float().mean()   # the part of the targets that counts
            if i >= eval_iters:
                weight = weight * 0   # no batch is left, but FSDP needs every process in each forward pass
            with rt.autocast():
                total += model(x, y)[1] * weight
            count += weight
        mean_count = rt.mean(count)
        if mean_count == 0:
            raise UserError(f'no token is to be learnt in the {eval_iters * batch_size} evaluation windows of {split}: '
                            f'raise eval_iters, now {eval_iters}, or block_size, now {block_size}')
        losses[split] = (rt.mean(total) / mean_count).item()
        budget.stop('evaluation')
    model.train()
    return losses


# the number of steps: max_iters, or what fits into max_minutes once the first steps are timed

minutes_to_plan = None if (eval_only or run.planned) else max_minutes
budget = Budget(minutes_to_plan, STARTED - run.seconds, rt.mean_number)
end = run.last_step(max_iters)
peak = peak_flops or rt.peak_flops()                                     # FLOP/s of one device, None: unknown
flops_per_iter = tokens_per_iter * model.flops_per_token(block_size)
rt.notice(*start.train_notices(config, model, end - run.step, flops_per_iter, rt, peak))

# ---------------------------------------------------------------------------------------------------------------------
# training loop: one update per pass, then one more pass through the top of the loop to evaluate and save the result

first_step = run.step
interrupted = False                      # by a signal
no_progress = False                      # for so many evaluations that patience is exhausted
x, y = batch_of(run.step)                # each (micro-batches of this process, B, T)
t0 = time.perf_counter()
timed = 0                                # steps since t0
mfu = None                               # of the steps that were logged last
model.train()
while True:
    last = run.step >= end

    # evaluate the weights that the updates so far have given
    losses = None
    if eval_only or (run.evaluated != run.step and (last or run.step % eval_interval == 0)):
        losses = evaluate()
    if losses:
        rt.say(f'step {run.step}: train loss {losses["train"]:.4f}, val loss {losses["val"]:.4f}')
        for split, loss in losses.items():
            if not math.isfinite(loss):
                raise folder.diverged(f'the {split} loss is {loss}')
        folder.evaluated(losses['val'], train_loss=losses['train'], **data.bits(losses['val']))
        if mfu and mfu > 0.5 and not peak_flops:   # the peak was perhaps measured on a busy machine
            peak = max(peak, rt.peak_flops())
    if eval_only:
        break

    # save, and end the run if this was the last step, a signal came or patience is exhausted
    interrupted = folder.interrupted()
    no_progress = 0 < patience <= run.bad_evals
    done = last or interrupted or no_progress
    save_due = losses or done or (checkpoint_interval and run.step % checkpoint_interval == 0)
    if save_due and folder.changed():
        budget.start()
        folder.save()
        budget.stop('save')
        t0 = time.perf_counter()
        timed = 0
    if done:
        break

    # freeze and release parameters as the option freeze says for this step
    num_trained = freezer.at(run.step)
    if num_trained:
        rt.notice(f'step {run.step}: {num_trained:,} parameters are trained')
        flops_per_iter = tokens_per_iter * model.flops_per_token(block_size)

    # set the learning rate of this step
    budget.start()
    lr = optim.scheduled_rate(run.step, config, run.planned)
    for group in opt.param_groups:
        group['lr'] = lr

    # forward and backward: the gradients of the micro-batches add up. Each loss is divided so that their sum is the
    # mean over the targets of the step: by the number of micro-batches, or if a mask hides targets by their share.
    rt.reseed(seed, run.step)   # dropout is a function of seed and step: a resumed run repeats it
    denominators = rt.loss_denominators(y) if data.mask else [len(x)] * len(x)
    mean_loss = torch.zeros((), device=rt.device)
    for micro in range(len(x)):
        with rt.average_gradients(wrapped, on=micro == len(x) - 1):   # over processes, once per step
            with rt.autocast():
                loss = wrapped(x[micro], y[micro])[1] / denominators[micro]
            scaler.scale(loss).backward()   # float16 gradients would underflow to zero unscaled
        mean_loss += loss.detach()
    x, y = batch_of(run.step + 1)   # read the next batch while the device still works on this one

    # clip the gradients, so that one unusual batch cannot ruin the weights, then update the weights
    scaler.unscale_(opt)
    grad_norm = rt.clip_gradients(model, grad_clip or math.inf)   # inf: only measure the norm
    scaler.step(opt)   # skips the update if a gradient is not finite in float16
    scaler.update()
    opt.zero_grad(set_to_none=True)   # frees the memory of the gradients
    timed += 1
    run.tokens += tokens_per_iter
    run.flops += flops_per_iter

    # log the loss, the learning rate, the norm of the gradient and the speed
    if run.step % log_interval == 0:
        loss = rt.mean(mean_loss).item()   # waits for the device; nothing else in a step does
        dt = (time.perf_counter() - t0) / timed
        if run.step > first_step and peak:   # the first step also allocates memory and compiles
            mfu = flops_per_iter / (dt * rt.world_size * peak)
        mfu_text = f'{mfu:.2%}' if mfu else '-'
        rt.say(f'iter {run.step}: loss {loss:.4f}, time {dt * 1000:.2f}ms, mfu {mfu_text}, '
               f'{tokens_per_iter / dt:,.0f} tok/s{budget.time_left(run.step, end)}')
        if not math.isfinite(loss):
            raise folder.diverged(f'the loss is {loss}')
        folder.log.add(iter=run.step, loss=loss, lr=lr, grad_norm=grad_norm.item(), dt=dt,
                       tok_per_s=tokens_per_iter / dt, mfu=mfu)
        t0 = time.perf_counter()
        timed = 0
    run.step += 1

    # time this step for max_minutes, and set the number of steps once enough are timed
    if budget.measuring:
        end = start.plan_steps(run, budget, config, folder.writer.seconds, rt)

# ---------------------------------------------------------------------------------------------------------------------
# end: wait for the last save, draw the losses, say how the run ended

early = f'no better loss in {run.bad_evals} evaluations, ' if no_progress else ''
perplexity = start.describe_perplexity(data, run.best_val_loss)
result = f'{early}best val loss {run.best_val_loss:.4f}, a perplexity of {perplexity}'
rt.close(folder.end(end, interrupted, result))
