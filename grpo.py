"""
Learn from a reward that is computed: GRPO. The model draws a group of answers to each question, a function of Python
rewards them, and answers that are better than the mean of their group become more likely.

    python grpo.py config/grpo_arithmetic.py                           sums and products, for the model of chat_tiny.py
    python grpo.py config/grpo_arithmetic.py --init_from=resume        continue where it stopped
    python grpo.py config/grpo_sql.py --kl=0.02 --divide_by_std=True
    python grpo.py --init_from=out-chat-tiny --questions=my.jsonl --reward=rewards.py:correct

docs/alignment.md explains the options and what goes wrong. out_dir has what train.py writes; chat.py, sample.py,
eval.py and export.py read it.
"""

import time

from configurator import configure

STARTED = time.perf_counter()   # max_minutes counts from here

# ---------------------------------------------------------------------------------------------------------------------
# output
out_dir = 'out-grpo'                  # folder for checkpoints and the log
init_from = ''                        # the weights to start from: a folder, 'owner/name', 'resume', 'auto:' and weights
eval_interval = 20                    # steps between evaluations; each evaluation is followed by a save
num_val = 200                         # held-out questions in an evaluation, answered with the likeliest tokens
log_interval = 1                      # steps between lines of the log
wandb_log = False                     # also send the log to Weights & Biases
wandb_project = 'flatgpt'             # project of Weights & Biases
wandb_run_name: str | None = None     # None: the name of out_dir
tensorboard = False                   # also write the log to out_dir/tensorboard: tensorboard --logdir=OUT_DIR
# questions and rewards
reward = 'arithmetic'                 # a kind of question, 'arithmetic', 'sql', ...; or your 'FILE.py:FUNCTION'
questions = ''                        # file of records with messages, prompt or text; a kind to generate; '': as reward
val_questions = ''                    # such a file to evaluate on; '': the last tenth of questions, or held-out ones
batch_size = 32                       # questions per micro-batch
group_size = 8                        # answers per question
gradient_accumulation_steps = 1       # micro-batches per step, over all processes
block_size = 256                      # longest question with its answer, in tokens
max_new_tokens = 64                   # longest answer, in tokens
temperature = 1.0                     # of the answers that are learned from; below 1 they differ less
# objective
updates = 1                           # updates per step, from the same answers (Shao et al., 2024, calls it mu)
divide_by_std = False                 # divide advantages by their standard deviation in the group; Dr. GRPO does not
normalize = 'token'                   # what counts the same: 'token' (DAPO), 'answer' (GRPO); 'constant' (Dr. GRPO)
clip_low = 0.2                        # a token whose probability fell by more than this share is not lowered further
clip_high = 0.28                      # one that rose by more is not raised further (DAPO; GRPO has 0.2 for both)
kl = 0.0                              # weight of the KL divergence from the first model; 0.0: none (DAPO, Dr. GRPO)
# optimizer
optimizer = 'adamw'                   # 'adamw', 'muon' (for the matrices of the blocks)
max_iters = 200                       # steps of the whole run
max_minutes: float | None = None      # make as many steps as fit into this time, at most max_iters; None: no limit
weight_decay = 0.0                    # on matrices only
grad_clip = 1.0                       # largest norm of the gradient; 0.0: no limit
beta1 = 0.9                           # AdamW: decay per step of the mean of gradients
beta2 = 0.95                          # AdamW: decay per step of the mean of their squares
# learning rate
learning_rate = 1e-5                  # the peak; adapters need ten times as much, tiny models a hundred times
schedule = 'constant'                 # after the warmup: 'cosine', 'linear' or 'constant'
warmup_iters = 5                      # steps of linear rise
lr_decay_iters: int | None = None     # step at which min_lr is reached; None: max_iters
cooldown_iters: int | None = None     # 'linear' falls only in this many steps before that (WSD); None: in all
min_lr = 0.0                          # the learning rate at the end
# adapters
lora_rank = 0                         # train adapters of this rank instead of the weights; 0: train the weights
lora_alpha = 16.0                     # adapters are scaled by lora_alpha / lora_rank
lora_targets = 'attn|mlp'             # regex of the Linear modules that get an adapter
# machine
seed = 1337                           # for the questions, the answers and the adapters
device = 'auto'                       # 'cuda', 'cuda:1', 'mps', 'cpu', 'auto' (the first of them that is available)
dtype = 'auto'                        # 'float32', 'bfloat16', 'auto' (a fast one)
# ---------------------------------------------------------------------------------------------------------------------
config = configure(globals())   # applies config files and --key=val to the options above; --help prints them

import copy
import math

import torch

from flatgpt import alignment, checkpoint, optim, outdir, rewards, rollouts, runtime, start, validate
from flatgpt.budget import Budget
from flatgpt.evaluation import generate_until

# what the run starts from, and the machine that it runs on

validate.weights_option(config)
ckpt, start_path, resuming = start.choose_start(config)
saved = ckpt if resuming else {}                          # the state of the run that continues
validate.grpo_options(config, runtime.num_processes(), ckpt, start_path, resuming)
rt = runtime.setup(device, dtype, False, seed, training=True, earlier=saved.get('machine'))
rt.notice(rt.describe())
outdir.claim_for_all(out_dir, rt)   # one run per folder, until this process ends

# questions and rewards: records, and a function (question, answer) -> float

tok = checkpoint.make_tokenizer(ckpt, start_path)
reward_of = rewards.load(reward)
source = rollouts.Questions(reward, questions, val_questions, num_val, tok, block_size - max_new_tokens)
rt.notice(*source.notes)
per_step = gradient_accumulation_steps * batch_size   # questions, over all processes

# the model, what of it is trained, and the reference that it is to stay near to

model = checkpoint.build(ckpt, start_path, merged=not resuming, dropout=0.0)
start.fit_context(model, block_size)
adapted = start.adapt(model, config, saved, start_path)
start.require_memory(model, {**config, 'batch_size': batch_size * group_size, 'block_size': max_new_tokens}, rt)
model.to(rt.device)
reference = None   # a copy of the first model; an adapter needs none
if kl and not lora_rank:
    reference = copy.deepcopy(model).requires_grad_(False)
    if resuming:
        reference.load_state_dict(saved['reference'])
wrapped = rt.wrap(alignment.LogProbs(model, temperature))   # averages gradients over processes
opt = optim.build(optimizer, model, learning_rate, (beta1, beta2), weight_decay, rt.dtype)
scaler = rt.grad_scaler()

# progress: of a new run, or of the one that goes on

run = start.Progress(measured=start.number_of(source.checksum(), reward, max_new_tokens))
start.go_on(run, saved, start_path, config, opt, scaler, model.flops_per_token(block_size), rt)
ckpt = saved = None   # frees memory
folder = outdir.RunFolder(config, rt, run, resuming, start_path, model=model, optimizer=opt, scaler=scaler,
                          description=tok.to_dict(), **adapted)   # log.jsonl, W&B, TensorBoard, states, signals


def evaluate():
    """Return the mean reward of the likeliest answers to the held-out questions, and print two of them."""
    budget.start()
    prompts = [rewards.prompt_ids(tok, question) for question in source.val]
    with rt.autocast():
        answers = generate_until(model, tok, rt, prompts, max_new_tokens, [], batch_size * group_size)
    values = [reward_of(question, answer) for question, answer in zip(source.val, answers)]
    for i in (run.step % len(values), (run.step + 1) % len(values)):   # others each time
        rt.notice(f'  {rewards.asked(source.val[i])!r} -> {answers[i]!r}, reward {values[i]:g}')
    budget.stop('evaluation')
    return sum(values) / len(values)


def draw(step):
    """Return what the model draws for the questions of a step: a rollouts.Rollout for each micro-batch of this process;
    {name: mean over all answers of the step} of rollouts.FIGURES; and the number of tokens of all answers."""
    asked = source.of_step(seed, step, per_step)
    drawn = []
    for micro in range(rt.rank, gradient_accumulation_steps, rt.world_size):
        first = micro * batch_size
        with rt.autocast():
            drawn.append(rollouts.draw(model, tok, asked[first:first + batch_size], reward_of, group_size,
                                       max_new_tokens, temperature, seed, step, first * group_size,
                                       must_end=':' not in reward))
    totals = dict(zip(rollouts.FIGURES, rt.sum(sum(rollout.totals() for rollout in drawn)).tolist()))
    return drawn, {name: total / (per_step * group_size) for name, total in totals.items()}, int(totals['length'])


def prepare(rollout, num_tokens):
    """Set what does not change in the updates of a step: the rows of a rollout that are learned from, what their tokens
    weigh, and their log-probabilities by the reference. num_tokens: of the answers of all processes."""
    rollout.advantages = alignment.group_advantages(rollout.rewards, divide_by_std).flatten()
    rollout.pad((rollout.advantages != 0) | (kl > 0), rt.device)   # without an advantage only the KL moves something
    rollout.weights = alignment.token_weights(rollout.targets, normalize, per_step * group_size, num_tokens,
                                              max_new_tokens)
    if kl:
        with torch.no_grad(), rt.autocast(), alignment.adapters_off(model):
            rollout.reference = alignment.LogProbs(reference or model, temperature)(rollout.idx, rollout.targets)


def loss_of(rollout):
    """Return the loss of a rollout, and what adds up over all rollouts of a step, (3,): the loss, the number of clipped
    tokens, and the estimate of the KL divergence from the reference."""
    with rt.autocast():
        log_probs = wrapped(rollout.idx, rollout.targets)
    if rollout.log_probs is None:   # the first update of a step: the policy is still the one that has drawn
        rollout.log_probs = log_probs.detach()
    loss, clipped = alignment.policy_loss(log_probs, rollout.log_probs, rollout.advantages, rollout.weights, clip_low,
                                          clip_high)
    divergence = torch.zeros((), device=rt.device)
    if kl:
        divergence = (rollout.weights * alignment.kl_estimate(log_probs, rollout.reference)).sum()
        loss = loss + kl * divergence
    return loss, torch.stack((loss, clipped.sum(), divergence)).detach()


# the number of steps: max_iters, or what fits into max_minutes once the first steps are timed

budget = Budget(None if run.planned else max_minutes, STARTED - run.seconds, rt.mean_number, splits=1)
end = run.last_step(max_iters)
rt.notice(*start.notices(config, end - run.step))

# ---------------------------------------------------------------------------------------------------------------------
# training loop: one step per pass, then one more pass through the top of the loop to evaluate and save the result

while True:
    last = run.step >= end

    # evaluate the weights that the steps so far have given
    evaluated = run.evaluated != run.step and (last or run.step % eval_interval == 0)
    if evaluated:
        val_reward = evaluate()
        rt.say(f'step {run.step}: reward of held-out questions {val_reward:.4f}')
        folder.evaluated(-val_reward, val_reward=val_reward)   # best.pt has the weights with the highest one

    # save, and end the run if this was the last step or a signal came
    interrupted = folder.interrupted()
    if (evaluated or interrupted) and folder.changed():
        budget.start()
        folder.save(reference=reference.state_dict() if reference else None)
        budget.stop('save')
    if last or interrupted:
        break

    # draw a group of answers to each question, and reward them
    t0 = time.perf_counter()
    budget.start()
    drawn, figures, num_tokens = draw(run.step)
    for rollout in drawn:
        prepare(rollout, num_tokens)
    num_learned = rt.sum(torch.tensor(sum(len(ids) - 1 for rollout in drawn for ids, _ in rollout.rows))).item()
    seconds_drawing = time.perf_counter() - t0

    # learn from them: the losses of the rollouts of all processes add up
    lr = optim.scheduled_rate(run.step, config, run.planned)
    for group in opt.param_groups:
        group['lr'] = lr
    for _ in range(updates):
        totals = torch.zeros(3, device=rt.device)   # loss, clipped tokens, KL divergence
        for i, rollout in enumerate(drawn):
            with rt.average_gradients(wrapped, on=i == len(drawn) - 1):   # over processes, once per update
                loss, sums = loss_of(rollout)
                scaler.scale(loss * rt.world_size).backward()   # the average over processes is to be a sum
            totals += sums
        scaler.unscale_(opt)
        grad_norm = rt.clip_gradients(model, grad_clip or math.inf)   # inf: only measure the norm
        scaler.step(opt)
        scaler.update()
        opt.zero_grad(set_to_none=True)
    run.tokens += num_tokens
    run.flops += updates * num_learned * model.flops_per_token(block_size)   # without drawing, reference, evaluations

    # log what was drawn, and the last update
    if run.step % log_interval == 0:
        loss, clipped, divergence = rt.sum(totals).tolist()
        dt = time.perf_counter() - t0
        rt.say(f'iter {run.step}: reward {figures["reward"]:.4f}, {figures["length"]:.1f} tokens, '
               f'{figures["no_signal"]:.0%} without signal, entropy {figures["entropy"]:.3f}, '
               f'time {dt:.2f}s ({seconds_drawing:.2f}s to draw){budget.time_left(run.step, end)}')
        if not math.isfinite(loss):
            raise folder.diverged(f'the loss is {loss}')
        folder.log.add(iter=run.step, loss=loss, **figures, clipped=clipped / num_tokens, kl=divergence, lr=lr,
                       grad_norm=grad_norm.item(), dt=dt, seconds_drawing=seconds_drawing)
    run.step += 1

    # time this step for max_minutes, and set the number of steps once enough are timed
    if budget.measuring:
        end = start.plan_steps(run, budget, config, folder.writer.seconds, rt)

rt.close(folder.end(end, interrupted, f'reward of held-out questions {-run.best_val_loss:.4f} at best'))
