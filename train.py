"""
Train a GPT: from scratch, from where a run stopped, or from other weights; on a laptop or on many GPUs.

    python train.py config/train_python_char.py                        a small model of Python source code
    python train.py config/train_python_char.py --init_from=resume     go on where it stopped
    python train.py config/train_shakespeare_char.py --batch_size=32 --compile=False
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py

Every evaluation prints the loss on both splits and writes out_dir/ckpt.pt, from which a run goes on, and best.pt when
the validation loss has not been lower before; log.jsonl holds what was printed. Ctrl-C saves before it leaves. With
--init_from=auto the command that starts a run also restarts it, after whatever ended it (torchrun --max-restarts=3).
Without a config file the options below are those of GPT-2 (124M) on OpenWebText.
"""

import contextlib
import functools
import math
import os
import signal
import sys
import time

STARTED = time.perf_counter()   # before the slow imports, because max_minutes counts them

import torch

import checkpoint
import curves
import lora
import lr_range
import optim
import runtime
import tokenizer
import validate
from budget import Budget
from configurator import UsageError, UserError, configure
from dataset import Dataset
from model import GPT, GPTConfig, switches

# ---------------------------------------------------------------------------------------------------------------------
# output
out_dir = 'out'                       # folder of checkpoints and log
init_from = 'scratch'                 # 'scratch', 'resume', 'auto' (resume or scratch), a path, 'gpt2', 'owner/name'
eval_interval = 2000                  # steps between evaluations; each one saves
checkpoint_interval = 0               # steps between saves besides those, 0 for none
keep_last = 0                         # how many earlier states stay, as ckpt-<step>.pt
eval_iters = 200                      # batches per split and evaluation, always the same ones
eval_only = False                     # evaluate once and leave; writes nothing
log_interval = 1                      # steps between loss lines
patience = 0                          # stop after so many evaluations in a row without a new best, 0 never does
wandb_log = False                     # send what is logged to Weights & Biases too
wandb_project = 'flatgpt'
wandb_run_name: str | None = None     # None: that of out_dir
tensorboard = False                   # and to out_dir/tensorboard: tensorboard --logdir=OUT_DIR
# data
dataset = 'openwebtext'               # a folder in data/, or a path
batch_size = 12                       # rows per micro-batch
block_size = 1024                     # tokens per row: the context
gradient_accumulation_steps = 5 * 8   # micro-batches per step, over all processes
# model
arch = 'gpt2'                         # a set of switches in model.py: 'gpt2', 'llama', 'qwen3', 'speedrun'
pos: str | None = None                # 'learned', 'rope', 'alibi'; None: that of arch
window: int | None = None             # how many tokens back attention reaches, None: all
layer_scale: float | None = None      # initial gain of what a block adds, None: no gains
n_layer = 12
n_embd = 768
n_head = 12
bias = False                          # biases in Linear and LayerNorm, as GPT-2 has them
dropout = 0.0                         # 0.0 for pretraining; 0.1 or more for finetuning and small data
attention = 'auto'                    # 'sdpa' (torch's fused kernels), 'math' (written out), 'auto' (the faster one)
loss_chunks = 1                       # more: logits in so many pieces, which saves their memory, not their time
# optimizer
optimizer = 'adamw'                   # 'adamw', 'muon' (for the matrices of the blocks; needs fewer steps)
max_iters = 600000                    # steps in all; one step is one update
max_minutes: float | None = None      # as many steps as fit into these minutes, at most max_iters; None: max_iters
weight_decay = 1e-1                   # on matrices only
grad_clip = 1.0                       # largest norm of the gradient, 0.0 for no limit
beta1 = 0.9
beta2 = 0.95
# learning rate
learning_rate = 6e-4                  # the peak
schedule = 'cosine'                   # after the warmup: 'cosine', 'linear' or 'constant'
warmup_iters = 2000                   # steps of linear rise
lr_decay_iters: int | None = None     # step at which min_lr is reached, None: max_iters
cooldown_iters: int | None = None     # 'linear' is constant until so many steps before that (WSD), None: falls at once
min_lr = 6e-5                         # about a tenth of learning_rate
# finetuning
freeze = ''                           # regex of parameters that stay as they are; by step: '0: wte|h; 1000: wte; 2000:'
lora_rank = 0                         # train adapters of this rank instead of the weights; 0: the weights
lora_alpha = 16.0                     # adapters count lora_alpha / lora_rank
lora_dropout = 0.0                    # of what goes into an adapter
lora_targets = 'attn|mlp'             # regex of the Linear modules that get an adapter
find_lr = False                       # find a learning rate, in 300 steps at rising ones, and leave; saves nothing else
# machine
seed = 1337                           # of the weights, the batches and dropout
device = 'auto'                       # 'cuda', 'cuda:1', 'mps', 'cpu', 'auto' (the first of them that is there)
dtype = 'auto'                        # 'float32', 'bfloat16', 'float16' (scales the loss), 'auto' (the faster of two)
compile: str | bool = 'auto'          # torch.compile: True, False, 'auto' (where it pays for itself)
parallel = 'ddp'                      # several processes: 'ddp' (each has all of the model), 'fsdp' (each has a share)
activation_checkpointing = False      # a third more work for much less memory: keep only what enters each block
peak_flops: float | None = None       # FLOP/s of a device at most, for the mfu figure; None: from a table, or measured
# ---------------------------------------------------------------------------------------------------------------------
config = configure(globals())   # config files and --key=val onto the options above; --help prints them


# what to start from: nothing, the state of a run, or weights

SWITCHES = ('arch', 'pos', 'window', 'layer_scale')
LOCAL = ('out_dir', 'init_from', 'eval_only', 'find_lr', 'device', 'compile', 'peak_flops')   # of this start only
ckpt_path = os.path.join(out_dir, 'ckpt.pt')
if runtime.restarts() and init_from not in ('resume', 'auto'):
    raise UserError(f'torchrun has started this run again, and init_from={init_from!r} would begin anew: '
                    f'give --init_from=auto')
resuming = init_from == 'resume' or init_from == 'auto' and os.path.exists(ckpt_path)
if not resuming and init_from in ('scratch', 'auto'):
    ckpt = start_path = None
else:
    start_path = ckpt_path if resuming else checkpoint.resolve(init_from)
    ckpt = checkpoint.load(start_path)
    if resuming and 'optimizer' not in ckpt:
        raise UserError(f'{start_path} has weights but no optimizer to go on with: give --init_from={start_path}')
    if resuming:   # what this command line leaves open stays as it was
        config.adopt(ckpt['config'], but=LOCAL)
        before = {**config, 'optimizer': 'adamw', 'freeze': '', 'lora_rank': 0, **ckpt['config']}
        clash = [name for name in ('optimizer', 'freeze', 'lora_rank', 'lora_alpha', 'lora_dropout', 'lora_targets')
                 if config[name] != before[name]]
        if clash:
            raise UsageError(f'{start_path} has the state of another run, of ' + ', '.join(
                f'{name}={before[name]!r}' for name in clash) + f': give --init_from={start_path} to start a new one')
    shape = {name: ckpt['model_args'][name] for name in ('n_layer', 'n_head', 'n_embd', 'block_size', 'bias')}
    if not resuming and block_size < shape['block_size'] and ('block_size' in config.given or not ckpt['config']):
        del shape['block_size']   # weights may be cropped to a shorter context, others' are to what is usual here
    clash = [name for name in shape if name in config.given and config[name] != shape[name]]
    if clash:
        raise UsageError(f'{start_path} has ' + ', '.join(f'{name}={shape[name]}, not {config[name]}' for name in clash)
                         + ': leave these options away, or start from scratch')
    config.adopt({**{name: ckpt['config'][name] for name in SWITCHES if name in ckpt['config']}, **shape})

# refusals

validate.train_options(config, runtime.processes(), ckpt, start_path, resuming)

# machine

rt = runtime.setup(device, dtype, compile, seed, training=True, earlier=ckpt.get('machine') if resuming else None)
say = functools.partial(print, flush=True) if rt.master else lambda *args, **kwargs: None   # one process talks
if parallel == 'fsdp' and rt.dtype == torch.float16:
    raise UsageError("parallel='fsdp' does not scale the loss of dtype='float16': give --dtype=bfloat16")
say(rt.describe(), file=sys.stderr)
writing = not eval_only and not find_lr   # checkpoints and the log
lock = checkpoint.claim(out_dir) if rt.master and not eval_only else None   # one run per folder
if rt.any(rt.master and not eval_only) and not rt.same(checkpoint.holder(out_dir)):
    raise UserError(f'out_dir={out_dir!r} must be a folder that all hosts share')

# data

data = Dataset(dataset)
tokens_per_iter = gradient_accumulation_steps * batch_size * block_size


def batch_of(step):
    return data.train_batch(step, seed, gradient_accumulation_steps, batch_size, block_size,
                            rt.device, rt.rank, rt.world_size)


# model: build, load, crop

newer = switches(arch, pos=pos, window=window, layer_scale=layer_scale)
if ckpt is None:
    vocab_size = data.vocab_size if data.vocab_size < 1000 else -(-data.vocab_size // 64) * 64   # see GPTConfig
    try:
        model = GPT(GPTConfig(vocab_size, block_size, n_layer, n_embd, n_head, bias, dropout, attention=attention,
                              loss_chunks=loss_chunks, **newer))
    except ValueError as error:
        raise UsageError(error) from None
else:
    if not tokenizer.same(ckpt.get('tokenizer', data.tokenizer), data.tokenizer):
        raise UsageError(f'{start_path} was trained with another tokenizer than the dataset {dataset!r} has')
    model = checkpoint.build(ckpt, start_path, not resuming, dropout=dropout, attention=attention,
                             loss_chunks=loss_chunks)
    clash = [f'{name}={getattr(model.config, name)!r}, not {value!r}' for name, value in newer.items()
             if getattr(model.config, name) != value]
    if clash and config.given & set(SWITCHES):
        raise UsageError(f'{start_path} has {", ".join(clash)}: leave {", ".join(SWITCHES)} away')
    base = checkpoint.base_of(model, init_from, start_path, out_dir) if lora_rank and not resuming else ckpt.get('base')
    model.crop_block_size(block_size)
data.check(block_size, model.config.vocab_size)

# what is trained: adapters, or all but what freeze finds

adapter = {'rank': lora_rank, 'alpha': lora_alpha, 'dropout': lora_dropout, 'targets': lora_targets}
if lora_rank and not resuming:
    lora.put(model, **adapter)
model.to(rt.device)
say(f'{model.get_num_params(non_embedding=False):,} parameters, {tokens_per_iter:,} tokens per step, '
    f'{len(data.data["train"]):,} tokens in {dataset}', file=sys.stderr)
freezer = optim.Freezer(model, freeze)
say(*freezer.notes, sep='\n', end='\n' * bool(freezer.notes), file=sys.stderr)
if freezer.changes and parallel == 'fsdp':
    raise UsageError(f"freeze={freeze!r}: parallel='fsdp' keeps what is frozen at its start, give one regex, or 'ddp'")

# compile, wrap

for block in model.transformer.h if activation_checkpointing else ():
    runtime.recompute(block)
if rt.compile:
    rt.compile_model(model, parallel)
wrapped = rt.wrap(model, parallel, freezer.changes)

# optimizer, and where the run stands

opt = optim.build(optimizer, model, learning_rate, (beta1, beta2), weight_decay, rt.dtype)
scaler = rt.grad_scaler()
step, seconds, best_val_loss = 0, 0.0, math.inf
evaluated, bad_evals = -1, 0   # the step of the last evaluation; evaluations since the best one
planned = None                 # the number of steps that fit into max_minutes, once it is known
if resuming:
    step, best_val_loss, seconds = ckpt['iter_num'], ckpt['best_val_loss'], ckpt.get('seconds', 0.0)
    evaluated, bad_evals = ckpt.get('evaluated', -1), ckpt.get('bad_evals', 0)
    optim.load_state(opt, ckpt['optimizer'])
    if max_minutes == ckpt['config'].get('max_minutes'):
        planned = ckpt.get('planned')
    if ckpt.get('scaler'):
        scaler.load_state_dict(ckpt['scaler'])
    say(f'resumed {ckpt_path}: step {step:,}, {step * tokens_per_iter:,} tokens seen, '
        f'best val loss {best_val_loss:.4f}', file=sys.stderr)
    for name, old in ckpt['config'].items():
        if name in config.given - set(LOCAL) and config[name] != old:
            say(f'changed: {name}={config[name]!r}, was {old!r}', file=sys.stderr)
ckpt = None   # gives its memory back
if not rt.same(step):
    raise UserError(f'not all processes start at the same step, this one at {step:,}: start them again')

# the record of the run

if wandb_log and rt.master:
    try:
        import wandb
        wandb.init(project=wandb_project, name=wandb_run_name or out_dir, config=dict(config))
    except ImportError:
        raise UserError('wandb_log=True needs the wandb package: pip install wandb') from None
    except wandb.Error as error:
        raise UserError(f'wandb: {error}; WANDB_MODE=offline keeps the log on this machine') from None
if rt.master and writing:
    if resuming:
        checkpoint.rewind_log(out_dir, step)
    else:
        before = checkpoint.set_aside(out_dir)
        if before:
            say(f'the run that was in {out_dir} is now in {before}', file=sys.stderr)
board = None
if tensorboard and rt.master and writing:
    try:
        board = curves.Board(out_dir, step if resuming else None)
    except ImportError:
        raise UserError('tensorboard=True needs the tensorboard package: pip install tensorboard') from None


def require_finite(value, what):
    if not math.isfinite(value):
        writer.wait()
        kept = f'{ckpt_path} holds the last good state' if os.path.exists(ckpt_path) else 'nothing was saved'
        raise UserError(f'{what} is {value} at step {step}: {kept}; '
                        f'lower learning_rate, raise warmup_iters, or use dtype=float32, then resume or start again')


def log(**record):
    if rt.master and writing:
        checkpoint.append_log(out_dir, record)
    if rt.master and wandb_log:
        wandb.log(record, step=step)
    if board:
        board.show(record, step)


writer = checkpoint.Writer(out_dir, keep_last, step if resuming else None)


def save():
    """Copy the state of the run, unless the weights are ruined, and write it in the background: ckpt.pt, and best.pt
    when this is it."""
    ruined = rt.any(not all(runtime.local(p).isfinite().all() for p in model.parameters()))
    require_finite(math.nan if ruined else 0.0, 'a weight')
    writer.wait()   # before memory is taken for another state
    state = rt.whole({
        'version': checkpoint.VERSION, 'model_args': model.config.to_dict(),
        'model': lora.adapters(model) if lora_rank else model.state_dict(keep_vars=True),   # of an adapter nothing else
        **({'base': base, 'lora': adapter} if lora_rank else {}),
        'tokenizer': data.tokenizer, 'config': dict(config), 'iter_num': step, 'best_val_loss': best_val_loss,
        'optimizer': opt.state_dict(), 'scaler': scaler.state_dict(),
        'machine': (rt.device.type, str(rt.dtype)[6:]), 'planned': planned, 'evaluated': evaluated,
        'bad_evals': bad_evals, 'seconds': time.perf_counter() - begun})
    if rt.master:
        writer.put(state, best=evaluated == step and bad_evals == 0)


# measure: the mean loss over the fixed batches of each split, in nats per token; every process takes its share

@torch.no_grad()
def evaluate():
    """{split: loss}, or None if a signal came in between."""
    model.eval()
    losses = {}
    for split in ('train', 'val'):
        budget.start()
        total, count = torch.zeros(2, device=rt.device)   # of batches
        for start in range(0, eval_iters, rt.world_size):
            if rt.any(bool(signals)):
                model.train()
                return None
            i = start + rt.rank   # past the end there is nothing to measure, but FSDP needs every process in each pass
            x, y = data.eval_batch(split, min(i, eval_iters - 1), eval_iters, batch_size, block_size, rt.device)
            share = (y != -1).float().mean() * (i < eval_iters)
            with rt.autocast():
                total += model(x, y)[1] * share
            count += share
        losses[split] = (rt.mean(total) / rt.mean(count)).item()
        budget.stop('evaluation')
    model.train()
    return losses


# Ctrl-C and SIGTERM end the run after the step at hand; a second one ends it at once

signals = []   # when they came


def on_signal(number, frame):
    if not signals:
        say('stopping after this step, once more to leave at once', file=sys.stderr)
    elif rt.world_size == 1 or time.monotonic() - signals[0] > 1:   # torchrun passes on what a scheduler sent us too
        raise KeyboardInterrupt
    signals.append(time.monotonic())


for number in (signal.SIGINT, signal.SIGTERM) if writing else ():
    signal.signal(number, on_signal)


def lengths(planned):
    """Steps of the run, of its warmup, and until the learning rate is at its lowest. A run that max_minutes limits
    decays until its end, and warms up for a tenth of it at most."""
    if find_lr:
        return lr_range.STEPS, 0, lr_range.STEPS
    if planned is None:
        return max_iters, warmup_iters, max_iters if lr_decay_iters is None else lr_decay_iters
    return min(planned, max_iters), min(warmup_iters, planned // 10), planned


# ---------------------------------------------------------------------------------------------------------------------
# training loop: max_iters updates, and one more turn to measure what the last one gave

test = lr_range.RangeTest()
budget = Budget(None if find_lr or eval_only or planned else max_minutes, STARTED - seconds,
                agree=lambda value: rt.mean(torch.tensor(value, dtype=torch.float64)).item())
end, warmup, decay_iters = lengths(planned)
peak = peak_flops or rt.peak_flops()
x, y = batch_of(step)   # (micro-batches of this process, B, T) each
changed = not resuming  # since the last save
begun = time.perf_counter() - seconds
t0, first, timed = time.perf_counter(), step, 0   # timed: steps since t0
model.train()
while True:
    last = step >= end

    # evaluate
    losses = None
    if eval_only or writing and evaluated != step and (last or step % eval_interval == 0):
        losses = evaluate()
    if losses:
        say(f'step {step}: train loss {losses["train"]:.4f}, val loss {losses["val"]:.4f}')
        for split, loss in losses.items():
            require_finite(loss, f'the {split} loss')
        evaluated, bad_evals, changed = step, 0 if losses['val'] < best_val_loss else bad_evals + 1, True
        best_val_loss = min(best_val_loss, losses['val'])
        log(step=step, train_loss=losses['train'], val_loss=losses['val'], best_val_loss=best_val_loss,
            tokens=step * tokens_per_iter, flops=step * tokens_per_iter * model.flops_per_token(),
            seconds=time.perf_counter() - begun)

    # save and leave
    interrupted = rt.any(bool(signals))
    done = last or interrupted or 0 < patience <= bad_evals
    due = losses or done or checkpoint_interval and step % checkpoint_interval == 0
    if due and changed and writing:
        budget.start()
        save()
        budget.stop('save')
        changed = False
        t0, timed = time.perf_counter(), 0
    if done or eval_only:
        break

    count = freezer.at(step)
    if count:
        say(f'step {step}: {count:,} parameters are trained', file=sys.stderr)

    # one update: forward and backward over the micro-batches, whose gradients add up
    budget.start()
    rate = test.rate(step) if find_lr else optim.learning_rate_at(
        step, schedule, learning_rate, min_lr, warmup, decay_iters, cooldown_iters)
    for group in opt.param_groups:
        group['lr'] = rate
    rt.reseed(seed, step)
    mean_loss, parts = torch.zeros((), device=rt.device), rt.parts(y) if data.mask else [len(x)] * len(x)
    for micro in range(len(x)):
        with rt.average_gradients(wrapped, on=micro == len(x) - 1):
            with rt.autocast():
                loss = wrapped(x[micro], y[micro])[1] / parts[micro]   # the mean over the step, not the sum
            scaler.scale(loss).backward()
        mean_loss += loss.detach()
    x, y = batch_of(step + 1)   # while the device still works
    scaler.unscale_(opt)
    grad_norm = rt.clip_gradients(model, grad_clip or math.inf)
    scaler.step(opt)
    scaler.update()
    opt.zero_grad(set_to_none=True)
    timed, changed = timed + 1, True

    # everything below is bookkeeping
    if step % log_interval == 0 or find_lr:
        loss = rt.mean(mean_loss).item()   # the one place that waits for the device
        dt = (time.perf_counter() - t0) / timed
        mfu = model.flops_per_token() * tokens_per_iter / (dt * rt.world_size * peak) if peak and step > first else None
        say(f'iter {step}: loss {loss:.4f}, time {dt * 1000:.2f}ms, mfu {f"{mfu:.2%}" if mfu else "-"}, '
            f'{tokens_per_iter / dt:,.0f} tok/s')
        if find_lr and test.add(rate, loss):
            break
        require_finite(loss, 'the loss')
        log(iter=step, loss=loss, lr=rate, grad_norm=grad_norm.item(), dt=dt, tok_per_s=tokens_per_iter / dt, mfu=mfu)
        t0, timed = time.perf_counter(), 0
    step += 1

    # the number of steps that fit into max_minutes, once it can be told
    if budget.measuring:
        rt.sync()
        budget.stop('step')
        planned = budget.steps_that_fit(step, max_iters, eval_interval, writer.seconds)
        if planned is not None:
            end, warmup, decay_iters = lengths(planned)
            say(f'max_minutes={max_minutes:g}: {planned:,} steps fit', file=sys.stderr)

# ---------------------------------------------------------------------------------------------------------------------
status = 0
if rt.master and evaluated >= 0 and not eval_only and not writer.wait():
    curves.leave_picture(out_dir)   # loss.png
if writer.wait():   # it has said why
    status = 1
elif interrupted and not (last and evaluated == step):
    say(f'interrupted at step {step:,}, saved in {ckpt_path}: go on with --init_from=resume', file=sys.stderr)
    status = 130
elif find_lr:
    say(test.report(out_dir) if rt.master else '', file=sys.stderr)
elif first > end:
    say(f'nothing to do: step {first:,} is past max_iters={end:,}', file=sys.stderr)
elif not eval_only:
    early = f'no better loss in {bad_evals} evaluations, ' if 0 < patience <= bad_evals else ''
    perplexity = ', '.join(f'{value:,.2f} per {unit}' for unit, value in data.perplexity(best_val_loss).items())
    say(f'stopped at step {step:,}: {early}best val loss {best_val_loss:.4f}, a perplexity of {perplexity}, '
        f'in {out_dir}', file=sys.stderr)
if wandb_log and rt.master:
    with contextlib.redirect_stdout(sys.stderr):   # where its farewell belongs
        wandb.finish()
rt.close(status)
