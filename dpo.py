"""
Learn from pairs of a better and a worse answer to one prompt: DPO, IPO or SimPO, of all weights or of adapters.

    python data/preferences/prepare.py
    python dpo.py config/dpo_tiny.py                                   short answers, for the model of chat_tiny.py
    python dpo.py config/dpo_tiny.py --init_from=resume                continue where it stopped
    python dpo.py config/dpo_lora.py --pairs=pairs.jsonl --loss=ipo

The model gives the chosen answer of each pair a higher probability than the rejected one, compared with the reference:
the model that it started from. out_dir has what train.py writes; sample.py, chat.py and export.py read it.
"""

import time

from configurator import configure

STARTED = time.perf_counter()   # max_minutes counts from here

# ---------------------------------------------------------------------------------------------------------------------
# output
out_dir = 'out-dpo'                   # folder for checkpoints and the log
init_from = ''                        # the weights to start from: a folder, 'owner/name', 'resume', 'auto:' and weights
eval_interval = 50                    # steps between evaluations; each evaluation is followed by a save
eval_pairs = 200                      # pairs per split in an evaluation; always the same ones
log_interval = 1                      # steps between lines of the log
wandb_log = False                     # also send the log to Weights & Biases
wandb_project = 'flatgpt'             # project of Weights & Biases
wandb_run_name: str | None = None     # None: the name of out_dir
tensorboard = False                   # also write the log to out_dir/tensorboard: tensorboard --logdir=OUT_DIR
# data
pairs = 'data/preferences/pairs.jsonl'   # files of records with prompt, chosen and rejected, separated by commas
val_pairs = ''                        # such files to validate on; '': the prompts of pairs whose hash is smallest
val_fraction = 0.05                   # the share of prompts that val_pairs='' holds out
batch_size = 8                        # pairs per micro-batch; each is two rows
block_size = 512                      # longest prompt with its answer, in tokens; longer prompts are cut
gradient_accumulation_steps = 1       # micro-batches per step, over all processes
# preference
loss = 'dpo'                          # 'dpo', 'ipo' (stops at a margin), 'simpo' (no reference, per token)
beta = 0.1                            # how much a log-ratio counts: smaller moves further from the reference
gamma = 0.5                           # SimPO: the margin to reach
nll_weight = 0.0                      # adds so much of the cross-entropy of chosen answers (Pang et al., 2024)
label_smoothing = 0.0                 # the share of pairs that may be the wrong way round; 0.5 learns nothing
# optimizer
optimizer = 'adamw'                   # 'adamw', 'muon' (for the matrices of the blocks)
max_iters = 200                       # steps of the whole run; one step is one update
max_minutes: float | None = None      # make as many steps as fit into this time, at most max_iters; None: no limit
weight_decay = 0.0                    # on matrices only
grad_clip = 1.0                       # largest norm of the gradient; 0.0: no limit
beta1 = 0.9                           # AdamW: decay per step of the mean of gradients
beta2 = 0.95                          # AdamW: decay per step of the mean of their squares
# learning rate
learning_rate = 1e-5                  # the peak; adapters need ten times as much
schedule = 'linear'                   # after the warmup: 'cosine', 'linear' or 'constant'
warmup_iters = 10                     # steps of linear rise
lr_decay_iters: int | None = None     # step at which min_lr is reached; None: max_iters
cooldown_iters: int | None = None     # 'linear' falls only in this many steps before that (WSD); None: in all
min_lr = 0.0                          # the learning rate at the end
# adapters
lora_rank = 0                         # train adapters of this rank instead of the weights; 0: train the weights
lora_alpha = 16.0                     # adapters are scaled by lora_alpha / lora_rank
lora_targets = 'attn|mlp'             # regex of the Linear modules that get an adapter
# machine
seed = 1337                           # for the order of the pairs and the adapters
device = 'auto'                       # 'cuda', 'cuda:1', 'mps', 'cpu', 'auto' (the first of them that is available)
dtype = 'auto'                        # 'float32', 'bfloat16', 'float16' (scales the loss), 'auto' (a fast one)
# ---------------------------------------------------------------------------------------------------------------------
config = configure(globals())   # applies config files and --key=val to the options above; --help prints them

import math

import numpy as np
import torch

from flatgpt import alignment, checkpoint, evaluation, optim, outdir, runtime, start, validate
from flatgpt.budget import Budget
from flatgpt.conversation import chat_template_of
from flatgpt.errors import UserError
from flatgpt.pairs import Rows, hold_out, in_epochs, read

NAMES = ('loss', 'accuracy', 'margin', 'chosen_reward', 'rejected_reward', 'distance')   # what is measured of pairs

# what the run starts from, and the machine that it runs on

validate.weights_option(config)
ckpt, start_path, resuming = start.choose_start(config)
saved = ckpt if resuming else {}                          # the state of the run that continues
validate.dpo_options(config, runtime.num_processes(), ckpt, start_path, resuming)
rt = runtime.setup(device, dtype, False, seed, training=True, earlier=saved.get('machine'))
rt.notice(rt.describe())
outdir.claim_for_all(out_dir, rt)   # one run per folder, until this process ends

# pairs as token ids, by the tokenizer and the chat template of the model

tok = checkpoint.make_tokenizer(ckpt, start_path)
found = {'train': read(pairs)}
if val_pairs:
    found['val'] = read(val_pairs)
else:
    found['train'], found['val'] = hold_out(found['train'], val_fraction)
rows = {split: Rows(found[split], tok, chat_template_of(tok), block_size, split) for split in found}
for split, of_split in rows.items():
    rt.notice(f'{split}: {len(of_split):,} pairs; {of_split.num_cut:,} prompts are cut to block_size={block_size}, '
              f'{of_split.num_left_out:,} pairs are left out')

# the model, and what of it is trained

model = checkpoint.build(ckpt, start_path, merged=not resuming, dropout=0.0)
if model.config.pos != 'learned':
    start.fit_context(model, block_size)   # it grows if the rows are longer
adapted = start.adapt(model, config, saved, start_path)
longest = max(of_split.longest for of_split in rows.values())
start.require_memory(model, {**config, 'batch_size': 2 * batch_size, 'block_size': longest}, rt)
model.to(rt.device)
log_probs = alignment.LogProbs(model)
wrapped = rt.wrap(log_probs)   # the module to call in training: it averages the gradients
opt = optim.build(optimizer, model, learning_rate, (beta1, beta2), weight_decay, rt.dtype)
scaler = rt.grad_scaler()


def answers_of(log_probs_of, split, numbers):
    """Return the log-probabilities and the lengths of the answers of pairs, by their numbers, (2, B) each: of chosen
    answers, then of rejected ones. log_probs_of: log_probs, or in training wrapped."""
    idx, targets = rows[split].batch(numbers, rt.device)
    with rt.autocast():
        found = log_probs_of(idx, targets)
    return found.sum(dim=1).view(2, -1), (targets >= 0).sum(dim=1).view(2, -1)


def batches_of(split, numbers):
    """Yield the numbers of pairs in batches of similar lengths, as many as are this process's share."""
    for batch in evaluation.share(rt, rows[split].lengths[numbers], batch_size, split):
        yield numbers[batch]


# the reference: the model before any training, or without its adapters. The log-probabilities of the answers of pairs
# that the run needs are computed once and kept in its checkpoints

checksum, val_checksum = (rows[split].checksum() for split in ('train', 'val'))
reference = saved.get('reference')   # {split: (N, 2), NaN where it is not known} and the checksums of the pairs
if reference is None:
    reference = {'checksum': checksum, 'val_checksum': val_checksum,
                 **{split: torch.full((len(rows[split]), 2), math.nan) for split in rows}}
elif (reference['checksum'] != checksum or len(reference['val']) != len(rows['val'])
      or reference.get('val_checksum', val_checksum) != val_checksum):   # earlier versions do not have it
    raise UserError(f'{start_path} was trained on other pairs than those of {pairs} now: give --init_from={start_path} '
                    f'to start a new run')
in_evaluations = {split: rows[split].spread(eval_pairs) for split in rows}   # numbers of pairs
per_step = gradient_accumulation_steps * batch_size
in_steps = in_epochs(len(rows['train']), 0, min(max_iters * per_step, len(rows['train'])), seed)
for split, needed in (('train', np.union1d(in_evaluations['train'], in_steps)), ('val', in_evaluations['val'])):
    unknown = needed[reference[split][needed, 0].isnan().numpy()]
    if not len(unknown):
        continue
    if resuming and not lora_rank:
        raise UserError(f'{start_path} has no reference for {len(unknown):,} pairs that the run needs now: '
                        f'keep max_iters, eval_pairs and seed, or give --init_from={start_path} to start a new run')
    rt.notice(f'{split}: computing the reference of {len(unknown):,} pairs')
    found = torch.zeros(len(rows[split]), 2)
    with torch.no_grad(), alignment.adapters_off(model):
        for numbers in batches_of(split, unknown):
            found[numbers] = answers_of(log_probs, split, numbers)[0].T.cpu()
    reference[split][unknown] = rt.sum(found)[unknown]   # each process has computed its share

# progress: of a new run, or of the one that goes on

run = start.Progress(measured=start.number_of(val_checksum, len(in_evaluations['val']), loss, beta, gamma, nll_weight,
                                              label_smoothing))
start.go_on(run, saved, start_path, config, opt, scaler, model.flops_per_token(block_size), rt)
ckpt = saved = None   # frees memory
folder = outdir.RunFolder(config, rt, run, resuming, start_path, model=model, optimizer=opt, scaler=scaler,
                          description=tok.to_dict(), **adapted)   # log.jsonl, W&B, TensorBoard, states, signals


def losses_of(log_probs_of, split, numbers):
    """Return the mean loss of pairs, and the sums over them of NAMES, (6,)."""
    sums, lengths = answers_of(log_probs_of, split, numbers)
    before = reference[split][numbers].T.to(rt.device)                                # (2, B)
    losses, (better, worse) = alignment.preference_loss(loss, sums, before, lengths, beta, gamma, label_smoothing)
    losses = losses - nll_weight * sums[0] / lengths[0]   # keeps chosen answers likely, not only likelier
    distance = ((sums - before).abs() / lengths).mean(dim=0)                          # nats per token, of both answers
    values = torch.stack((losses, (better > worse).float(), better - worse, better, worse, distance))
    return losses.mean(), values.detach().sum(dim=1)


@torch.no_grad()
def evaluate():
    """Return {split: {name: mean}} over the fixed pairs of each split, which the processes share."""
    results = {}
    for split, numbers in in_evaluations.items():
        budget.start()
        totals = torch.zeros(len(NAMES), device=rt.device)
        for batch in batches_of(split, numbers):
            totals += losses_of(log_probs, split, batch)[1]
        results[split] = dict(zip(NAMES, (rt.sum(totals) / len(numbers)).tolist()))
        budget.stop('evaluation')
    return results


# the number of steps: max_iters, or what fits into max_minutes once the first steps are timed

budget = Budget(None if run.planned else max_minutes, STARTED - run.seconds, rt.mean_number)
end = run.last_step(max_iters)
rt.notice(*start.notices(config, end - run.step))

# ---------------------------------------------------------------------------------------------------------------------
# training loop: one update per pass, then one more pass through the top of the loop to evaluate and save the result

while True:
    last = run.step >= end

    # evaluate the weights that the updates so far have given
    results = None
    if run.evaluated != run.step and (last or run.step % eval_interval == 0):
        results = evaluate()
        val = results['val']
        rt.say(f'step {run.step}: train loss {results["train"]["loss"]:.4f}, val loss {val["loss"]:.4f}, accuracy '
               f'{val["accuracy"]:.1%}, margin {val["margin"]:.3f}, distance {val["distance"]:.4f}')
        if not math.isfinite(val['loss']):
            raise folder.diverged(f'the val loss is {val["loss"]}')
        folder.evaluated(val['loss'], train_loss=results['train']['loss'], **{name: val[name] for name in NAMES[1:]})

    # save, and end the run if this was the last step or a signal came
    interrupted = folder.interrupted()
    done = last or interrupted
    if (results or done) and folder.changed():
        budget.start()
        folder.save(reference=reference)
        budget.stop('save')
    if done:
        break

    # set the learning rate of this step
    budget.start()
    t0 = time.perf_counter()
    lr = optim.scheduled_rate(run.step, config, run.planned)
    for group in opt.param_groups:
        group['lr'] = lr

    # forward and backward: the gradients of the micro-batches of all processes are averaged
    numbers = in_epochs(len(rows['train']), run.step * per_step, (run.step + 1) * per_step, seed)
    mine = numbers.reshape(-1, batch_size)[rt.rank::rt.world_size]   # (micro-batches of this process, B)
    totals = torch.zeros(len(NAMES), device=rt.device)
    for micro in range(len(mine)):
        with rt.average_gradients(wrapped, on=micro == len(mine) - 1):   # over processes, once per step
            mean_loss, sums = losses_of(wrapped, 'train', mine[micro])
            scaler.scale(mean_loss / len(mine)).backward()
        totals += sums

    # clip the gradients and update the weights
    scaler.unscale_(opt)
    grad_norm = rt.clip_gradients(model, grad_clip or math.inf)   # inf: only measure the norm
    scaler.step(opt)
    scaler.update()
    opt.zero_grad(set_to_none=True)
    num_tokens = int(rows['train'].lengths[numbers].sum())
    run.tokens += num_tokens
    run.flops += num_tokens * model.flops_per_token(block_size)

    # log the loss, the accuracy, the rewards, the distance from the reference and the speed
    if run.step % log_interval == 0:
        values = dict(zip(NAMES, (rt.sum(totals) / numbers.size).tolist()))
        dt = time.perf_counter() - t0
        rt.say(f'iter {run.step}: loss {values["loss"]:.4f}, accuracy {values["accuracy"]:.1%}, margin '
               f'{values["margin"]:.3f}, time {dt * 1000:.0f}ms{budget.time_left(run.step, end)}')
        if not math.isfinite(values['loss']):
            raise folder.diverged(f'the loss is {values["loss"]}')
        folder.log.add(iter=run.step, **values, lr=lr, grad_norm=grad_norm.item(), dt=dt, tok_per_s=num_tokens / dt)
    run.step += 1

    # time this step for max_minutes, and set the number of steps once enough are timed
    if budget.measuring:
        end = start.plan_steps(run, budget, config, folder.writer.seconds, rt)

# ---------------------------------------------------------------------------------------------------------------------
# end: wait for the last save, draw the losses, say how the run ended

rt.close(folder.end(end, interrupted, f'best val loss {run.best_val_loss:.4f}'))
