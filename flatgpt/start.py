"""
What a run of train.py, dpo.py or grpo.py starts from, what has changed since it was saved, and what a user should know
before it starts.
"""

import math
import os
import zlib
from dataclasses import dataclass

import torch

from flatgpt import architectures, checkpoint, lora, optim, runtime, tokenizer
from flatgpt.budget import duration
from flatgpt.errors import UsageError, UserError
from model import ARCHS, GPTConfig

ARCH_OPTIONS = ('arch', 'pos', 'window', 'layer_scale', 'gelu')   # options that select the architecture
LEARNED_FROM = ('dataset', 'pairs', 'reward')   # an option of train.py, of dpo.py, of grpo.py
# Options that a resumed run does not take from its checkpoint, because they belong to one start
LOCAL = ('out_dir', 'init_from', 'eval_only', 'device', 'compile', 'peak_flops')


# ---------------------------------------------------------------------------------------------------------------------
# scratch, a run, or weights

def choose_start(config) -> tuple:
    """Load what a run starts from, as init_from says. Returns (checkpoint, its path, whether its run is resumed);
    (None, None, False) from scratch. Raises UserError, UsageError.

    config: the Config of the script. Options that the user has not given get the values of the checkpoint: all of them
    if its run is resumed, else those of the model.
    """
    init_from = config['init_from']
    auto = init_from.split(':')[0] == 'auto'
    latest = os.path.join(config['out_dir'], 'ckpt.pt')
    if runtime.restarts() and not auto and init_from != 'resume':
        weights = '' if init_from == 'scratch' else f':{init_from}'
        raise UserError(f'torchrun has started this run again, and init_from={init_from!r} would begin anew: '
                        f'give --init_from=auto{weights}')
    resuming = init_from == 'resume' or (auto and os.path.exists(latest))
    if not resuming and init_from in ('scratch', 'auto'):
        return None, None, False
    if not resuming:
        path = checkpoint.resolve(init_from.removeprefix('auto:'))
    elif os.path.exists(latest):
        path = latest
    else:
        path = checkpoint.in_folder(config['out_dir'])   # or an error that says what is there instead
    ckpt = checkpoint.load(path)
    if resuming:
        if 'optimizer' not in ckpt:
            raise UserError(f'{path} has weights but no optimizer state: give --init_from={path}')
        config.adopt(ckpt['config'], but=LOCAL)
        same_run(config, ckpt['config'], path)
    saved = vars(GPTConfig(**ckpt['model_args']))
    shape = {name: saved[name] for name in ('n_layer', 'n_head', 'n_embd', 'bias') if name in config}
    asked = {name: config[name] for name in shape if name in config.given}
    # Rows of block_size tokens: as long as those of the checkpoint's run, or for weights of other projects at most the
    # default, because their context may be too long to train. Learned positions end with the context.
    context = saved['block_size']
    if 'block_size' not in config.given:
        config.adopt({'block_size': min(ckpt['config'].get('block_size', config['block_size']), context)})
    elif saved['pos'] == 'learned' and (resuming or config['block_size'] > context):
        asked['block_size'] = config['block_size']
    same_model(asked, saved, path, 'remove these options, or start from scratch')
    config.adopt({name: ckpt['config'][name] for name in ARCH_OPTIONS if name in ckpt['config']})
    config.adopt(shape)
    if config.given & set(ARCH_OPTIONS):
        same_model(fields_of(config), saved, path, f'remove {", ".join(ARCH_OPTIONS)}')
    return ckpt, path, resuming


def fields_of(options: dict) -> dict:
    """Return the fields of GPTConfig that ARCH_OPTIONS give: those of arch, and others that are not None."""
    others = {name: options[name] for name in ARCH_OPTIONS[1:] if options.get(name) is not None}
    return {**ARCHS[options['arch']], **others}


def new_config(options: dict, vocab_size: int) -> GPTConfig:
    """Return the configuration of a new model of train.py or bench.py. Raises UsageError."""
    names = ('block_size', 'n_layer', 'n_embd', 'n_head', 'bias', 'dropout', 'attention', 'loss_chunks')
    try:
        return GPTConfig(vocab_size, **{name: options[name] for name in names}, **fields_of(options))
    except ValueError as error:
        raise UsageError(error) from None


def same_run(options: dict, saved: dict, start_path):
    """Raise UsageError if a resumed run would get another optimizer state than it needs: if it is of another script, or
    if the options that decide what is trained differ from those of the checkpoint at start_path. saved: its config."""
    nanogpt = {'optimizer': 'adamw', 'freeze': '', 'lora_rank': 0}   # its checkpoints do not have these options
    clash = [f'{name}={saved[name]!r}' for name in LEARNED_FROM if name in saved and name not in options]
    for name in ('optimizer', 'freeze', 'lora_rank', 'lora_alpha', 'lora_dropout', 'lora_targets'):
        now = options.get(name)
        before = saved.get(name, nanogpt.get(name, now))
        if now != before and name in options:
            clash.append(f'{name}={before!r}')
    if clash:
        raise UsageError(f'{start_path} has the state of another run, of {", ".join(clash)}: '
                         f'give --init_from={start_path} to start a new one')


def same_model(asked: dict, found: dict, start_path, advice: str):
    """Raise UsageError if the model that is asked for differs from the one in the checkpoint at start_path.

    asked: {name: value} of the options that count. found: {name: value} of the checkpoint. advice: what to do then.
    """
    clash = [f'{name}={found[name]!r}, not {value!r}' for name, value in asked.items() if found[name] != value]
    if clash:
        raise UsageError(f'{start_path} has {", ".join(clash)}: {advice}')


# ---------------------------------------------------------------------------------------------------------------------
# a run that goes on

@dataclass
class Progress:
    """How far a run is, as it is saved in its checkpoints."""
    step: int = 0                      # updates made
    tokens: int = 0                    # that these updates have seen
    flops: int = 0                     # that they took
    seconds: float = 0.0               # of the run until its latest save
    best_val_loss: float = math.inf
    evaluated: int = -1                # step of the last evaluation
    bad_evals: int = 0                 # evaluations since the best one
    planned: int | None = None         # steps that fit into max_minutes, once known
    measured: int = 0                  # what evaluation_id() or number_of() returns for this run
    wandb_id: str | None = None        # of the run in Weights & Biases

    def resume(self, saved: dict, path, options, flops_per_token: int) -> list[str]:
        """Set the progress to that of the checkpoint at path. Returns lines for the user: how far the run is, and what
        has changed since. `measured` stays; if it differs, the best loss and patience begin anew."""
        before = {**options, **saved['config']}
        names = ('gradient_accumulation_steps', 'batch_size', 'block_size')   # nanoGPT does not count tokens
        self.step = saved['iter_num']
        self.tokens = saved.get('tokens', self.step * math.prod(before[name] for name in names))
        self.flops = saved.get('flops', self.tokens * flops_per_token)
        self.seconds = saved.get('seconds', 0.0)
        self.wandb_id = saved.get('wandb_id')
        if options['max_minutes'] == saved['config'].get('max_minutes'):
            self.planned = saved.get('planned')
        lines = [f'resumed {path}: step {self.step:,}, {self.tokens:,} tokens seen, '
                 f'best val loss {saved["best_val_loss"]:.4f}', *changes(options, saved['config'], self.step)]
        names = ('dataset', 'eval_iters', 'batch_size', 'block_size')   # earlier versions do not save `measured`
        unchanged = all(before.get(name) == options.get(name) for name in names)
        if saved.get('measured', self.measured) == self.measured and ('measured' in saved or unchanged):
            self.best_val_loss = saved['best_val_loss']
            self.evaluated = saved.get('evaluated', -1)
            self.bad_evals = saved.get('bad_evals', 0)
        elif not options.get('eval_only'):
            lines.append(f'evaluations measure something else than before: the best val loss and patience begin anew; '
                         f'the best weights until now stay in best-{self.step}.pt')
        return lines

    def last_step(self, max_iters: int) -> int:
        """Return the number of steps of the run: max_iters, or what fits into max_minutes."""
        return max_iters if self.planned is None else min(self.planned, max_iters)

    def evaluate(self, val_loss: float):
        """Note the validation loss of this step: the best one so far, or one evaluation more without a better one."""
        self.evaluated = self.step
        self.bad_evals += 1
        if val_loss < self.best_val_loss:
            self.bad_evals = 0
            self.best_val_loss = val_loss


def plan_steps(run: Progress, budget, options: dict, seconds_to_write: float, rt) -> int:
    """Count a step that has just ended in a flatgpt.budget.Budget, and set and tell how many fit into max_minutes once
    enough are timed. Returns the number of steps of the run. seconds_to_write: of the last checkpoint."""
    rt.sync()
    budget.stop('step')
    run.planned = budget.steps_that_fit(run.step, options['max_iters'], options['eval_interval'], seconds_to_write)
    if run.planned is not None:
        rt.notice(f'max_minutes={options["max_minutes"]:g}: {run.planned:,} steps fit')
    return run.last_step(options['max_iters'])


def go_on(run: Progress, saved: dict, path, options, opt, scaler, flops_per_token: int, rt: runtime.Runtime):
    """Load the state of the run that goes on, if there is one: its progress, its optimizer, its scaler. UserError if
    the processes of a run are at different steps. saved: the checkpoint at path; empty for a new run."""
    if saved:
        optim.load_state(opt, saved['optimizer'])
        if saved.get('scaler'):
            scaler.load_state_dict(saved['scaler'])
        rt.notice(*run.resume(saved, path, options, flops_per_token))
    if not rt.same_everywhere(run.step):
        raise UserError(f'not all processes start at the same step, this one at {run.step:,}: start them again')


def changes(options, saved: dict, step: int) -> list[str]:
    """Return lines for the user about a run that was saved with other options, at a step: which options have changed,
    and whether the learning rate rises because the run is longer now."""
    changed = [name for name in saved if name in options.given - set(LOCAL) and options[name] != saved[name]]
    lines = [f'changed: {name}={options[name]!r}, was {saved[name]!r}' for name in changed]
    before = optim.scheduled_rate(step - 1, {**options, **saved})
    after = optim.scheduled_rate(step, options)
    if {'max_iters', 'lr_decay_iters'} & set(changed) and step and after > 1.1 * before:
        lines.append(f'the learning rate rises from {before:.2g} to {after:.2g}, because the run is longer than it was '
                     f'planned: runs that are to be extended need --schedule=linear --cooldown_iters=N (WSD)')
    return lines


def number_of(*values) -> int:
    """Return a number that stands for what an evaluation measures, given as plain values: the CRC-32 of their text."""
    return zlib.crc32(repr(values).encode(errors='surrogatepass'))


def evaluation_id(data, eval_iters: int, batch_size: int, block_size: int) -> int:
    """Return a number that stands for what an evaluation measures: the CRC-32 of the targets of its batches."""
    number = 0
    for i in range(eval_iters):
        targets = data.eval_batch('val', i, eval_iters, batch_size, block_size, torch.device('cpu'))[1]
        number = zlib.crc32(targets.numpy().tobytes(), number)
    return number


# ---------------------------------------------------------------------------------------------------------------------
# before the first step

def adapt(model, options: dict, saved: dict, start_path) -> dict:
    """Put the adapter on a model that the options ask for. Returns what checkpoint.state_of() stores of it: 'base' and
    'adapter', both None if all weights are trained. saved: the checkpoint of the run that goes on, which has its
    adapter; empty for a new run."""
    if not options['lora_rank']:
        return {'base': None, 'adapter': None}
    adapter = {'rank': options['lora_rank'], 'alpha': options['lora_alpha'], 'targets': options['lora_targets'],
               'dropout': options.get('lora_dropout', 0.0)}
    base = saved.get('base')
    if not saved:
        base = checkpoint.base_of(options['init_from'].removeprefix('auto:'), start_path, options['out_dir'])
        lora.put(model, **adapter)
    return {'base': base, 'adapter': adapter}


def fit_tokenizer(ckpt: dict, path, data, rt: runtime.Runtime):
    """Raise UserError or UsageError unless the weights of a checkpoint can be trained on a dataset: both need the same
    tokenizer. If the checkpoint has none, a notice says so; else it is the one that the run stores, because it knows
    the roles of its model's special tokens."""
    vocab_size = ckpt['model_args']['vocab_size']
    if data.vocab_size > vocab_size:
        raise UserError(f'{path} knows {vocab_size:,} tokens and the dataset {data.folder} has {data.vocab_size:,}: '
                        f'they do not belong together')
    if ckpt.get('tokenizer') is None:
        rt.notice(f'{path} has no tokenizer: it is trained on the ids of {data.folder}, which is right only if it was '
                  f'trained with the tokenizer of this dataset before')
    elif not tokenizer.same(ckpt['tokenizer'], data.tokenizer):
        raise UsageError(f'{path} was trained with another tokenizer than the dataset {str(data.folder)!r} has')
    else:
        data.tokenizer = ckpt['tokenizer']


def fit_context(model, block_size: int):
    """Prepare a model to train on rows of block_size tokens. Learned positions are cropped to so many; rotary ones and
    ALiBi need no change: the context stays, or grows if the rows are longer."""
    if model.config.pos == 'learned':
        model.crop_block_size(block_size)
    else:
        model.config.block_size = max(model.config.block_size, block_size)


def notices(options: dict, steps: int) -> list[str]:
    """Return lines about what may not be intended in a run of train.py, dpo.py or grpo.py: a warmup longer than the
    run. steps: that are to be made."""
    if options.get('eval_only') or steps <= 0:
        return []
    warmup, end = options['warmup_iters'], options['max_iters']
    if warmup >= end and not options['max_minutes']:
        return [f'warmup_iters={warmup:,} is not below max_iters={end:,}: the learning rate will not reach '
                f'{options["learning_rate"]:g}; try --warmup_iters={end // 10}']
    return []


def train_notices(options: dict, model, steps: int, flops_per_iter: int, rt, peak: float | None) -> list[str]:
    """Return the lines of notices() for a run of train.py, and others: of a run of hours, of the learning rate of
    pretraining, of a model that cannot be exported. rt: the Runtime. peak: FLOP/s of one device."""
    lines = notices(options, steps)
    if options['eval_only'] or steps <= 0:
        return lines
    if peak:
        step = flops_per_iter / (peak * rt.world_size)   # seconds at least
        batches = 2 * options['eval_iters']   # of both splits; forward passes alone, a third of the work
        evaluation = step / 3 * batches / options['gradient_accumulation_steps']
        total = step * steps
        if options['max_minutes']:
            total = min(total, 60 * options['max_minutes'])
        if step + evaluation > 5:
            lines.append(f'at {rt.world_size * peak / 1e12:,.2f} TFLOP/s, the peak, an evaluation would take '
                         f'{duration(evaluation)}, a step {duration(step)} and the run {duration(total)}; expect two '
                         f'or three times as much, or lower eval_iters, gradient_accumulation_steps, batch_size')
    if options['init_from'] not in ('scratch', 'resume', 'auto') and 'learning_rate' not in options.given:
        lines.append(f'learning_rate={options["learning_rate"]:g}, the default, is for pretraining: to finetune, take '
                     f'a recipe such as config/finetune_shakespeare.py or config/lora_llama.py')
    try:
        architectures.hf_architecture(model.config)
    except UserError:
        if steps == options['max_iters']:   # a new run
            lines.append(f"export.py has no format for this model (arch={options['arch']!r}): --arch=gpt2, llama or "
                         f"qwen3 have one")
    return lines


def require_memory(model, options: dict, rt: runtime.Runtime):
    """Raise UserError if the device has less memory free than training needs at least: for gradients, the moments of
    the optimizer, activations of one micro-batch and, on a GPU, the weights. Nothing has been moved yet."""
    free = rt.free_memory()
    c = model.config
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    weights = 0 if rt.device.type == 'cpu' else sum(p.numel() for p in model.parameters())
    state = 4 * weights + (12 if options['optimizer'] == 'adamw' else 8) * trained
    if options.get('parallel') == 'fsdp':
        state //= rt.world_size
    per_layer = (4 if options.get('activation_checkpointing') else 12) * c.n_embd
    if options.get('freeze'):
        per_layer = 0   # nothing is kept below the first layer that is trained
    per_token = c.n_layer * per_layer
    advice = ['lower batch_size and raise gradient_accumulation_steps']
    if 'dataset' in options:   # train.py; the other scripts compute logits in pieces
        per_token += 4 * c.vocab_size // c.loss_chunks   # logits in float32
        advice += ['give --activation_checkpointing, --loss_chunks=8', 'a smaller model']
    needed = state + per_token * options['batch_size'] * options['block_size']
    if free is not None and needed > free:
        raise UserError(f'training needs {needed / 2**30:.1f} GiB of memory or more, {free / 2**30:.1f} GiB are free: '
                        f'{", or ".join(advice)}, or --lora_rank=8 when finetuning')


def describe_perplexity(data, loss: float) -> str:
    """Return '4.17 per token, 2.20 per byte' for a mean loss on the validation text: equal numbers once, with the last
    unit."""
    units = {f'{value:,.2f}': unit for unit, value in data.perplexity(loss).items()}
    return ', '.join(f'{number} per {unit}' for number, unit in units.items())
