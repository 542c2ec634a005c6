"""
Checks of the options of scripts, before anything is loaded or written.

Each function takes the options of a script by name, {name: value}, and raises UsageError for a value that is out of
range or for options that exclude each other, UserError for a folder that is in the way: one line each, which says what
is wrong, the value, and what is expected.
"""

import math
import os

from flatgpt import alignment, engine, llama_cpp, machine, optim, runtime
from flatgpt.answers import parse_stops
from flatgpt.errors import UsageError, UserError
from model import ALLOWED, ARCHS


def at_least(least, options, *names):
    """Raise UsageError if one of the options is a number below `least` or is not finite. None is allowed."""
    for name in names:
        value = options[name]
        if value is not None and not value >= least:   # nan is not
            raise UsageError(f'{name}={value}: expected {least} or more')
        if value == math.inf:
            raise UsageError(f'{name}={value}: expected a finite number, {least} or more')


def one_of(known, options, name):
    """Raise UsageError if the option is none of the known values."""
    if options[name] not in known:
        raise UsageError(f'{name}={options[name]!r}: expected one of {", ".join(map(repr, known))}')


def below_one(options, *names):
    """Raise UsageError unless each of the options is 0 or more, and below 1."""
    for name in names:
        if not 0 <= options[name] < 1:
            raise UsageError(f'{name}={options[name]}: expected 0 or more, and less than 1')


def train_options(options, processes=1, ckpt=None, start_path=None, resuming=False):
    """Check the options of train.py. The last three arguments are what start.choose_start() returns."""
    at_least(1, options, 'eval_iters', 'loss_chunks')
    at_least(0, options, 'checkpoint_interval', 'keep_last', 'patience', 'peak_flops')
    below_one(options, 'dropout', 'lora_dropout')
    one_of(ARCHS, options, 'arch')
    one_of((None, 'auto'), options, 'size')
    one_of(ALLOWED['attention'], options, 'attention')
    one_of(runtime.PARALLEL, options, 'parallel')
    training_options(options, processes, ckpt, start_path, resuming)
    if options['parallel'] == 'fsdp' and options['dtype'] == 'float16':
        raise UsageError("parallel='fsdp' does not scale the loss of dtype='float16': give --dtype=bfloat16")
    if options['parallel'] == 'fsdp' and ';' in options['freeze']:
        raise UsageError(f"freeze={options['freeze']!r}: parallel='fsdp' cannot freeze or release parameters during a "
                         f"run, give one regex, or parallel='ddp'")


def training_options(options, processes, ckpt, start_path, resuming):
    """Check the options that train.py, dpo.py and grpo.py share. The last three arguments are those of
    train_options()."""
    at_least(1, options, 'eval_interval', 'log_interval', 'gradient_accumulation_steps', 'batch_size', 'block_size')
    at_least(0, options, 'max_iters', 'max_minutes', 'learning_rate', 'min_lr', 'weight_decay', 'grad_clip',
             'warmup_iters', 'lr_decay_iters', 'cooldown_iters', 'lora_rank', 'lora_alpha')
    below_one(options, 'beta1', 'beta2')
    one_of(optim.OPTIMIZERS, options, 'optimizer')
    one_of(optim.SCHEDULES, options, 'schedule')
    micro_batches = options['gradient_accumulation_steps']
    if micro_batches % processes:
        raise UsageError(f'gradient_accumulation_steps={micro_batches}: expected a multiple of the {processes} '
                         f'processes')
    if options['lora_rank']:
        lora_options(options, ckpt, start_path, resuming)
    rate, lowest = options['learning_rate'], options['min_lr']
    if options['schedule'] != 'constant' and lowest > rate:
        raise UsageError(f'min_lr={lowest} is above learning_rate={rate}: give both')


def weights_option(options):
    """Check that init_from of dpo.py or grpo.py names weights, or a run to resume."""
    if options['init_from'] in ('', 'scratch', 'auto'):
        raise UsageError(f'init_from={options["init_from"]!r}: expected weights to start from, such as out-chat-tiny, '
                         f'resume, or auto:out-chat-tiny (resume, or start from these)')


def dpo_options(options, processes=1, ckpt=None, start_path=None, resuming=False):
    """Check the options of dpo.py. The last three arguments are what start.choose_start() returns."""
    at_least(1, options, 'eval_pairs')
    at_least(0, options, 'gamma', 'nll_weight')
    training_options(options, processes, ckpt, start_path, resuming)
    one_of(alignment.LOSSES, options, 'loss')
    if not 0 <= options['label_smoothing'] <= 0.5:
        raise UsageError(f'label_smoothing={options["label_smoothing"]}: expected 0 or more, at most 0.5')
    if options['beta'] <= 0:
        raise UsageError(f'beta={options["beta"]}: expected more than 0')
    share(options, 'val_fraction')


def grpo_options(options, processes=1, ckpt=None, start_path=None, resuming=False):
    """Check the options of grpo.py. The last three arguments are what start.choose_start() returns."""
    at_least(1, options, 'num_val', 'max_new_tokens', 'updates')
    at_least(2, options, 'group_size')
    at_least(0, options, 'clip_high', 'kl')
    training_options(options, processes, ckpt, start_path, resuming)
    one_of(alignment.NORMALIZE, options, 'normalize')
    if not 0 <= options['clip_low'] <= 1:
        raise UsageError(f'clip_low={options["clip_low"]}: expected 0 or more, at most 1')
    if not options['temperature'] > 0 or options['temperature'] == math.inf:
        raise UsageError(f'temperature={options["temperature"]}: expected more than 0: the answers to a question must '
                         f'differ')
    if options['max_new_tokens'] >= options['block_size']:
        raise UsageError(f'max_new_tokens={options["max_new_tokens"]}: expected less than '
                         f'block_size={options["block_size"]}, which is for a question and its answer')
    if ':' in options['reward'] and not options['questions']:
        raise UsageError(f'reward={options["reward"]!r} needs questions: give --questions=FILE, or a kind such as '
                         f'--questions=arithmetic')


def lora_options(options, ckpt, start_path, resuming):
    """Check the options of train.py for a run that trains an adapter; the arguments are those of train_options()."""
    rank = options['lora_rank']
    if ckpt is None:
        raise UsageError(f'lora_rank={rank}: expected weights to adapt, give --init_from=gpt2 or another model')
    if options.get('freeze'):
        raise UsageError(f'lora_rank={rank} and freeze={options["freeze"]!r}: an adapter leaves all weights as they '
                         f'are, give one of them')
    if not options['lora_alpha']:
        raise UsageError(f'lora_rank={rank}: expected lora_alpha above 0')
    if resuming:
        return
    if 'base' in ckpt:
        raise UsageError(f'lora_rank={rank}: expected weights that are no adapter, but {start_path} is one: merge it '
                         f'with export.py first')
    out_dir = options['out_dir']
    if os.path.realpath(os.path.dirname(start_path)) == os.path.realpath(out_dir):
        raise UsageError(f'out_dir={out_dir!r} holds the weights that the adapter is for: give another folder')


def set_context(model, block_size: int):
    """Set the context of a model to block_size tokens. Raises UsageError if it has fewer positions."""
    try:
        model.crop_block_size(block_size)
    except ValueError as error:
        raise UsageError(error) from None


def sampling_controls(options):
    """Check the options of sample.py and chat.py that say how to sample a token."""
    controls = ('temperature', 'top_k', 'top_p', 'min_p', 'repetition_penalty')
    try:
        engine.check_controls(**{name: options[name] for name in controls})
    except ValueError as error:
        raise UsageError(error) from None


def sample_options(options):
    """Check the options of sample.py."""
    at_least(1, options, 'num_samples', 'batch_size', 'block_size')
    at_least(0, options, 'max_new_tokens')
    sampling_controls(options)
    parse_stops(options['stop'])
    one_of((None, 'int8'), options, 'quantize')
    one_of(('auto', True, False), options, 'stream')
    if options['start'] is not None and options['prompts'] is not None:
        raise UsageError(f'start={options["start"]!r} and prompts={options["prompts"]!r}: give one of them')
    if options['stream'] is True and options['json']:
        raise UsageError('stream=True and json=True: JSON is written when a sample is complete, give one of them')


def eval_options(options):
    """Check the options of eval.py."""
    at_least(1, options, 'batch_size', 'block_size', 'max_new_tokens', 'stride', 'limit', 'num_samples')
    at_least(0, options, 'shots', 'temperature')
    if options['num_samples'] > 1 and not options['temperature']:
        raise UsageError(f'num_samples={options["num_samples"]} and temperature=0: all samples would be the same, give '
                         f'--temperature=1')
    one_of(('train', 'val'), options, 'split')
    if options['shots'] and not (options['choices'] or options['generate']):
        raise UsageError(f'shots={options["shots"]}: examples need questions, give --choices or --generate')
    parse_stops(options['stop'])


def export_options(options):
    """Check the options of export.py."""
    if not (options['to'] or options['gguf']):
        raise UsageError('to: give the folder to make, as in --to=my-model, or a file, as in --gguf=my-model.gguf')
    one_of(machine.DTYPES, options, 'dtype')
    one_of(llama_cpp.DTYPES, options, 'gguf_dtype')
    if options['adapter'] and options['dtype'] != 'float32':
        raise UsageError(f'dtype={options["dtype"]!r}: adapters are kept in float32')
    if options['adapter'] and options['gguf']:
        raise UsageError(f'gguf={options["gguf"]!r}: it has the adapter merged into its base, remove --adapter')
    for to in (os.path.expanduser(options[name]) for name in ('to', 'gguf')):
        if os.path.exists(to) and (not os.path.isdir(to) or os.listdir(to)):
            raise UserError(f'{to} is there already: remove it, or give another name')


def share(options, name):
    """Raise UsageError unless the option is above 0 and below 1."""
    if not 0 < options[name] < 1:
        raise UsageError(f'{name}={options[name]}: expected more than 0 and less than 1')


def chat_options(options):
    """Check the options of chat.py."""
    at_least(1, options, 'max_new_tokens')
    sampling_controls(options)
    one_of((None, 'int8'), options, 'quantize')


def serve_options(options):
    """Check the options of serve.py."""
    at_least(1, options, 'rows', 'max_tokens', 'max_body')
    at_least(0, options, 'max_queue', 'max_seconds')
    if not 0 <= options['port'] < 2**16:
        raise UsageError(f'port={options["port"]}: expected between 0 (any that is free) and 65535')
    one_of((None, 'int8'), options, 'quantize')
