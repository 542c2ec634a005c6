"""
What a run of train.py starts from: nothing, the state of a run, or weights.
"""

import os

from flatgpt import checkpoint, runtime
from flatgpt.errors import UsageError, UserError
from model import GPTConfig, arch_fields

ARCH_OPTIONS = ('arch', 'pos', 'window', 'layer_scale')   # options that select the architecture
# Options that a resumed run does not take from its checkpoint, because they belong to one start
LOCAL = ('out_dir', 'init_from', 'eval_only', 'device', 'compile', 'peak_flops')


def choose_start(config) -> tuple:
    """Load what a run of train.py starts from, as init_from says. Returns (checkpoint, its path, whether its run is
    resumed); (None, None, False) from scratch. Raises UserError, UsageError.

    config: the Config of train.py. Options that the user has not given get the values of the checkpoint: all of them if
    its run is resumed, else those of the model.
    """
    init_from = config['init_from']
    latest = os.path.join(config['out_dir'], 'ckpt.pt')
    if runtime.restarts() and init_from not in ('resume', 'auto'):
        raise UserError(f'torchrun has started this run again, and init_from={init_from!r} would begin anew: '
                        f'give --init_from=auto')
    resuming = init_from == 'resume' or (init_from == 'auto' and os.path.exists(latest))
    if not resuming and init_from in ('scratch', 'auto'):
        return None, None, False
    path = latest if resuming else checkpoint.resolve(init_from)
    ckpt = checkpoint.load(path)
    if resuming:
        if 'optimizer' not in ckpt:
            raise UserError(f'{path} has weights but no optimizer state: give --init_from={path}')
        config.adopt(ckpt['config'], but=LOCAL)
        same_run(config, ckpt['config'], path)
    saved = vars(GPTConfig(**ckpt['model_args']))
    shape = {name: saved[name] for name in ('n_layer', 'n_head', 'n_embd', 'block_size', 'bias')}
    # The context of weights may be cropped: to a block_size that the user gives, and for weights of other projects,
    # which have no config, to the default, because their context may be too long to train.
    may_crop = not resuming and ('block_size' in config.given or not ckpt['config'])
    if may_crop and config['block_size'] < shape['block_size']:
        del shape['block_size']
    asked = {name: config[name] for name in shape if name in config.given}
    same_model(asked, saved, path, 'remove these options, or start from scratch')
    config.adopt({name: ckpt['config'][name] for name in ARCH_OPTIONS if name in ckpt['config']})
    config.adopt(shape)
    if config.given & set(ARCH_OPTIONS):
        arch = arch_fields(config['arch'], **{name: config[name] for name in ARCH_OPTIONS[1:]})
        same_model(arch, saved, path, f'remove {", ".join(ARCH_OPTIONS)}')
    return ckpt, path, resuming


def same_run(options: dict, saved: dict, start_path):
    """Raise UsageError if a resumed run would get another optimizer state than it needs: if the options of train.py
    that decide what is trained differ from those of the checkpoint at start_path. saved: its config."""
    nanogpt = {'optimizer': 'adamw', 'freeze': '', 'lora_rank': 0}   # its checkpoints do not have these options
    clash = []
    for name in ('optimizer', 'freeze', 'lora_rank', 'lora_alpha', 'lora_dropout', 'lora_targets'):
        before = saved.get(name, nanogpt.get(name, options[name]))
        if options[name] != before:
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


def changes(options, saved: dict) -> list[str]:
    """Return a line for each option that the user has given another value than it had when the run was saved."""
    return [f'changed: {name}={options[name]!r}, was {saved[name]!r}' for name in saved
            if name in options.given - set(LOCAL) and options[name] != saved[name]]
