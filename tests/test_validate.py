"""The checks of options: what cannot be is refused with the value and what is expected, all else passes."""

import math

import pytest
from conftest import ROOT, assert_one_line, needs, run
from in_process import options
from test_repo import CONFIGS

from flatgpt import start, validate
from flatgpt.errors import UsageError, UserError

CHECKS = {'train.py': validate.train_options, 'sample.py': validate.sample_options, 'eval.py': validate.eval_options,
          'export.py': validate.export_options}
NEEDED = {'eval.py': ['--data=x'], 'export.py': ['--to=/nowhere/new']}   # without which nothing can be done


def refused(script, *args, error=UsageError, **about):
    """The line with which the options of a script are refused."""
    with pytest.raises(error) as refusal:
        CHECKS[script](options(script, *args), **about)
    assert type(refusal.value) is error and '\n' not in str(refusal.value)
    return str(refusal.value)


# the least value of each number; None is allowed where it is the default
LEAST = {
    'train.py': {
        **dict.fromkeys(['eval_interval', 'eval_iters', 'log_interval', 'gradient_accumulation_steps', 'batch_size',
                         'block_size', 'loss_chunks'], 1),
        **dict.fromkeys(['checkpoint_interval', 'keep_last', 'patience', 'max_iters', 'learning_rate', 'min_lr',
                         'weight_decay', 'grad_clip', 'warmup_iters', 'lr_decay_iters', 'cooldown_iters', 'lora_rank',
                         'lora_alpha', 'peak_flops', 'max_minutes', 'beta1', 'beta2', 'dropout', 'lora_dropout'], 0)},
    'sample.py': {'num_samples': 1, 'batch_size': 1, 'max_new_tokens': 0, 'temperature': 0, 'top_k': 1, 'top_p': 0,
                  'min_p': 0, 'block_size': 1},
    'eval.py': {'batch_size': 1, 'block_size': 1, 'max_new_tokens': 1, 'stride': 1, 'limit': 1, 'shots': 0,
                'num_samples': 1, 'temperature': 0}}


@pytest.mark.parametrize('script, name', [(script, name) for script in LEAST for name in LEAST[script]])
def test_a_number_below_the_least_is_refused_and_the_least_is_not(script, name):
    least, given = LEAST[script][name], NEEDED.get(script, [])
    assert refused(script, *given, f'--{name}={least - 1}').startswith(f'{name}={least - 1}')
    lowest = ['--min_lr=0', *given, f'--{name}={least}']   # min_lr: at most the learning rate
    CHECKS[script](options(script, *(lowest if script == 'train.py' else lowest[1:])))


@pytest.mark.parametrize('name', ['learning_rate', 'grad_clip', 'peak_flops', 'weight_decay', 'dropout', 'beta2'])
@pytest.mark.parametrize('value', ['nan', 'inf'])
def test_a_number_that_is_not_finite_is_refused(name, value):
    assert refused('train.py', f'--{name}={value}').startswith(f'{name}={value}: expected ')


@pytest.mark.parametrize('name', ['beta1', 'beta2', 'dropout', 'lora_dropout'])
def test_a_share_is_less_than_one(name):
    assert refused('train.py', f'--{name}=1') == f'{name}=1.0: expected 0 or more, and less than 1'
    validate.train_options(options('train.py', f'--{name}=0.999'))


@pytest.mark.parametrize('script, args, words', [
    ('train.py', '--arch=gpt5', "arch='gpt5': expected one of 'gpt2', 'llama', 'qwen3', 'speedrun'"),
    ('train.py', '--attention=flash', "attention='flash': expected one of 'auto', "),
    ('train.py', '--parallel=zero', "parallel='zero': expected one of 'ddp', 'fsdp'"),
    ('train.py', '--optimizer=sgd', "optimizer='sgd': expected one of 'adamw', 'muon'"),
    ('train.py', '--schedule=step', "schedule='step': expected one of 'cosine', 'linear', 'constant'"),
    ('train.py', '--learning_rate=1e-5', 'min_lr=6e-05 is above learning_rate=1e-05: give both'),
    ('train.py', '--lora_rank=2', 'lora_rank=2: expected weights to adapt, give --init_from=gpt2'),
    ('train.py', '--parallel=fsdp --dtype=float16', 'give --dtype=bfloat16'),
    ('sample.py', '--top_p=1.5', 'top_p=1.5: expected between 0 (the likeliest token) and 1'),
    ('sample.py', '--temperature=nan', 'temperature=nan: expected 0 (the likeliest token) or more'),
    ('sample.py', '--repetition_penalty=0', 'repetition_penalty=0.0: expected between 0.01'),
    ('sample.py', '--stop=[1]', "stop='[1]': expected a text, or a JSON list"),
    ('sample.py', '--stop=["a"', 'JSON list'),
    ('sample.py', '--quantize=int3', "quantize='int3': expected one of None, 'int8'"),
    ('sample.py', '--stream=perhaps', "stream='perhaps': expected one of 'auto', True, False"),
    ('sample.py', '--stream --json', 'stream=True and json=True: '),
    ('sample.py', '--start=4 --prompts=x.txt', "start='4' and prompts='x.txt': give one of them"),
    ('eval.py', '--data=x --split=test', "split='test': expected one of 'train', 'val'"),
    ('eval.py', '--data=x --shots=1', 'shots=1: examples need questions, give --choices or --generate'),
    ('eval.py', '--generate=x --stop=[1]', "stop='[1]': expected a text, or a JSON list"),
    ('export.py', '', 'to: give the folder to make, as in --to=my-model'),
    ('export.py', '--to=/nowhere/x --dtype=int8', "dtype='int8': expected one of 'float32', 'bfloat16', 'float16'"),
    ('export.py', '--to=/nowhere/x --adapter --dtype=bfloat16', "dtype='bfloat16': adapters are kept in float32"),
])
def test_what_cannot_be_is_refused_with_what_is_expected(script, args, words):
    assert words in refused(script, *args.split())


def test_a_stop_of_a_thousand_brackets_is_one_line():
    assert 'JSON list' in refused('sample.py', '--stop=' + '[' * 3000)


@pytest.mark.parametrize('args', [
    '--learning_rate=1e-5 --min_lr=1e-5', '--learning_rate=1e-5 --schedule=constant',
    '--lr_decay_iters=None --cooldown_iters=None --max_minutes=None',
])
def test_options_of_train_that_go_together_pass(args):
    validate.train_options(options('train.py', *args.split()))


@pytest.mark.parametrize('script, args', [
    ('sample.py', ''), ('sample.py', '--top_k=None --quantize=int8 --stream=True --start='), ('eval.py', '--data=x'),
    ('sample.py', '--stream=False --prompts=x --json --stop=["a","b"]'), ('eval.py', '--choices=x --shots=3'),
    ('eval.py', '--generate=x --shots=3 --split=train'), ('eval.py', '--last_word=x'), ('export.py', '--to=/nowhere/x'),
    ('export.py', '--to=/nowhere/x --adapter'), ('export.py', '--to=/nowhere/x --dtype=float16'),
])
def test_options_of_the_other_scripts_that_go_together_pass(script, args):
    CHECKS[script](options(script, *args.split()))


@pytest.mark.parametrize('path', CONFIGS)
def test_the_options_of_a_recipe_pass(path):
    validate.train_options(options('train.py', ROOT / path), ckpt={}, start_path='out-x/ckpt.pt')


def test_a_resumed_run_must_train_what_its_optimizer_state_is_for():
    saved = {'optimizer': 'muon', 'freeze': '', 'lora_rank': 2, 'lora_alpha': 4.0}
    given = options('train.py', '--optimizer=muon', '--lora_rank=2', '--lora_alpha=4')
    start.same_run(given, saved, 'x/ckpt.pt')
    with pytest.raises(UsageError) as refusal:
        start.same_run({**given, 'optimizer': 'adamw', 'lora_alpha': 8.0}, saved, 'x/ckpt.pt')
    assert str(refusal.value) == ("x/ckpt.pt has the state of another run, of optimizer='muon', lora_alpha=4.0: "
                                  "give --init_from=x/ckpt.pt to start a new one")


def test_a_checkpoint_of_nanogpt_has_the_state_of_adamw_for_all_weights():
    start.same_run(options('train.py'), {}, 'x/ckpt.pt')
    for option, before in (('--optimizer=muon', "optimizer='adamw'"), ('--freeze=wte', "freeze=''"),
                           ('--lora_rank=2', 'lora_rank=0')):
        with pytest.raises(UsageError, match=f'another run, of {before}: '):
            start.same_run(options('train.py', option), {}, 'x/ckpt.pt')


def test_a_model_that_differs_from_its_checkpoint_is_refused_by_the_options_that_differ():
    found = {'n_layer': 2, 'n_head': 2, 'pos': 'learned'}
    start.same_model({'n_layer': 2, 'pos': 'learned'}, found, 'x/ckpt.pt', 'advice')
    with pytest.raises(UsageError) as refusal:
        start.same_model({'n_layer': 3, 'n_head': 2, 'pos': 'rope'}, found, 'x/ckpt.pt', 'advice')
    assert str(refusal.value) == "x/ckpt.pt has n_layer=2, not 3, pos='learned', not 'rope': advice"


def test_micro_batches_must_divide_among_the_processes():
    line = refused('train.py', '--gradient_accumulation_steps=3', processes=2)
    assert line == 'gradient_accumulation_steps=3: expected a multiple of the 2 processes'
    validate.train_options(options('train.py', '--gradient_accumulation_steps=6'), processes=3)


@needs('symlinks')
def test_an_adapter_needs_weights_that_are_none_and_a_folder_of_its_own(tmp_path):
    about = {'ckpt': {}, 'start_path': tmp_path / 'base' / 'best.pt'}
    lora = '--lora_rank=2', f'--out_dir={tmp_path / "out"}'
    validate.train_options(options('train.py', *lora), **about)
    assert refused('train.py', *lora, '--freeze=wte', **about).startswith("lora_rank=2 and freeze='wte': ")
    assert refused('train.py', *lora, '--lora_alpha=0', **about) == 'lora_rank=2: expected lora_alpha above 0'
    about['ckpt'] = {'base': {}}
    assert f'no adapter, but {tmp_path / "base" / "best.pt"} is one' in refused('train.py', *lora, **about)
    validate.train_options(options('train.py', *lora), **about, resuming=True)
    about['ckpt'] = {}
    (tmp_path / 'link').symlink_to(tmp_path / 'base')
    for folder in 'base', 'link', 'other/../base/':
        args = '--lora_rank=2', f'--out_dir={tmp_path}/{folder}'
        assert 'holds the weights that the adapter is for' in refused('train.py', *args, **about)
        validate.train_options(options('train.py', *args), **about, resuming=True)


def test_an_export_replaces_nothing(tmp_path, monkeypatch):
    (tmp_path / 'full').mkdir()
    (tmp_path / 'full' / 'file').touch()
    (tmp_path / 'empty').mkdir()
    for name in 'full', 'full/file':
        line = refused('export.py', f'--to={tmp_path}/{name}', error=UserError)
        assert line == f'{tmp_path}/{name} is there already: remove it, or give another name'
    monkeypatch.setenv('HOME', str(tmp_path))
    assert f'{tmp_path}/full is there already' in refused('export.py', '--to=~/full', error=UserError)
    for name in 'empty', 'new':
        validate.export_options(options('export.py', f'--to={tmp_path}/{name}'))


def test_the_least_values_are_of_all_numbers():
    """So that a new option that is a number has a least value too."""
    free = {'train.py': {'n_layer', 'n_embd', 'n_head', 'window', 'layer_scale', 'seed'},   # checked by GPTConfig
            'sample.py': {'repetition_penalty', 'seed'}, 'eval.py': {'seed'}}
    for script in LEAST:
        config = options(script)
        numbers = {name for name in config if {int, float} & set(config.types[name])}
        assert numbers == {*LEAST[script], *free[script]}
    assert all(least < math.inf for of in LEAST.values() for least in of.values())


@pytest.mark.parametrize('script', CHECKS)
def test_each_script_checks_its_options_first_and_leaves_nothing_behind(script, tmp_path):
    wrong = {'train.py': '--batch_size=0', 'sample.py': '--num_samples=0', 'eval.py': '--limit=0', 'export.py': '--to='}
    done = run(script, *NEEDED.get(script, []), wrong[script], cwd=tmp_path)
    name = wrong[script][2:].partition('=')[0]
    assert_one_line(done, 2, f'{script}: {name}')
    assert done.stdout == '' and not list(tmp_path.iterdir())
