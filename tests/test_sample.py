"""sample.py as a person runs it: samples on stdout and nothing else, the same ones every time."""

import subprocess
import sys

import pytest
import torch
from conftest import ROOT, assert_one_line, run
from test_checkpoint import as_nanogpt

import checkpoint

DASHES = '-' * 15 + '\n'
SMALL = ('--device=cpu', '--dtype=float32', '--max_new_tokens=40', '--top_k=None')


def sample(*args, **more):
    done = run('sample.py', *SMALL, *args, **more)
    assert done.returncode == 0, done.stderr
    assert 'Traceback' not in done.stderr
    return done


def samples_of(done):
    """What stands before each line of dashes; there is nothing after the last."""
    *samples, rest = done.stdout.split('\n' + DASHES)
    assert rest == ''
    return samples


@pytest.fixture(scope='module')
def drawn(trained):
    return sample(f'--out_dir={trained}', '--num_samples=3')


def test_stdout_holds_samples_and_lines_of_dashes_and_stderr_the_notices(drawn, trained):
    samples = samples_of(drawn)
    assert len(set(samples)) == len(samples) == 3
    alphabet = checkpoint.load_model(trained)[1].chars
    for text in samples:
        assert text.startswith('\n')   # the default prompt
        assert len(text) == 1 + 40 and set(text) <= set(alphabet)
    assert f'{trained / "best.pt"}, step 20, val loss 1.' in drawn.stderr and 'float32' in drawn.stderr
    assert '120 tokens in' in drawn.stderr


def test_a_sample_depends_on_the_seed_and_its_number_but_not_on_how_many_are_drawn(drawn, trained):
    fewer = sample(f'--init_from={trained / "best.pt"}', '--num_samples=2', '--start=', '--seed=1337')
    # an empty prompt is a line break that is not printed
    assert samples_of(fewer) == [text.removeprefix('\n') for text in samples_of(drawn)[:2]]
    others = sample(f'--out_dir={trained}', '--num_samples=3', '--seed=7')
    assert not set(samples_of(others)) & set(samples_of(drawn))


def greedy(model, ids, n):
    """Continue a list of ids with the likeliest ones."""
    for _ in range(n):
        with torch.no_grad():
            logits, _ = model(torch.tensor([ids[-model.config.block_size:]]))
        ids = [*ids, logits[0, -1].argmax().item()]
    return ids


def test_at_temperature_0_all_samples_are_the_likeliest_continuation_of_the_prompt_file(tmp_path, trained):
    prompt = '31 times 3 makes 93.\n4'
    (tmp_path / 'prompt.txt').write_text(prompt)
    done = sample(f'--out_dir={trained}', '--num_samples=2', '--temperature=0', '--start=FILE:prompt.txt',
                  cwd=tmp_path)
    model, tok, _ = checkpoint.load_model(trained)
    assert samples_of(done) == [tok.decode(greedy(model, tok.encode(prompt).tolist(), 40))] * 2


def test_no_new_tokens_give_the_prompt_alone(trained):
    done = sample(f'--out_dir={trained}', '--num_samples=2', '--max_new_tokens=0', '--start=4 times')
    assert done.stdout == ('4 times\n' + DASHES) * 2


@pytest.mark.parametrize('num_samples', [2, 600])
def test_a_reader_that_has_seen_enough_ends_it_quietly(trained, num_samples):
    args = [sys.executable, ROOT / 'sample.py', f'--out_dir={trained}', *SMALL, f'--num_samples={num_samples}']
    with subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        if num_samples == 2:   # all of it fits into one buffer, which is written at the very end
            process.stdout.close()
        else:
            head = subprocess.run(['head', '-c', '10'], stdin=process.stdout, capture_output=True, text=True)
            process.stdout.close()
            assert len(head.stdout) == 10
        err = process.stderr.read()
    assert process.returncode == 0 and 'Traceback' not in err and 'BrokenPipe' not in err


def test_a_nanogpt_checkpoint_samples_with_the_tokenizer_of_a_dataset(tmp_path, trained, char_dataset):
    model, tok, _ = checkpoint.load_model(trained, gelu='erf')
    torch.save(as_nanogpt(model, '_orig_mod.'), tmp_path / 'ckpt.pt')
    done = sample(f'--init_from={tmp_path}', f'--tokenizer_of={char_dataset}', '--num_samples=1', '--temperature=0',
                  '--start=7 times')
    assert samples_of(done) == [tok.decode(greedy(model, tok.encode('7 times').tolist(), 40))]
    assert 'step 250, val loss 1.25' in done.stderr


@pytest.fixture(scope='module')
def bad(tmp_path_factory, trained):
    """A folder of prompts and checkpoints that give no sample."""
    folder = tmp_path_factory.mktemp('bad')
    (folder / 'latin').write_bytes('größer'.encode('latin-1'))
    model, _, ckpt = checkpoint.load_model(trained)
    torch.save(as_nanogpt(model), folder / 'nanogpt.pt')
    ckpt['model']['transformer.ln_f.weight'] *= float('nan')
    torch.save(ckpt, folder / 'nan.pt')
    torch.save({'model': model.state_dict(), 'model_args': model.config.to_dict(), 'tokenizer': ckpt['tokenizer']},
               folder / 'bare.pt')
    return folder


@pytest.mark.parametrize('args, status, words', [
    (['--start=FILE:{bad}/nowhere.txt'], 1, ['nowhere.txt', 'No such file']),
    (['--start=FILE:{bad}/latin'], 1, ['latin', 'not UTF-8']),
    (['--start=größer?'], 1, ['ö', 'ß', '?']),
    (['--out_dir={bad}/nowhere'], 1, ['nowhere', 'No such file']),
    (['--init_from={bad}/nanogpt.pt'], 1, ['nanogpt.pt', '--tokenizer_of=']),
    (['--init_from={bad}/nan.pt'], 1, ['nan.pt', 'NaN']),
    (['--temperature=-0.5'], 2, ['temperature=-0.5', 'at least 0']),
    (['--temperature=nan'], 2, ['temperature=nan']),
    (['--top_k=0'], 2, ['top_k=0', 'at least 1']),
    (['--num_samples=0'], 2, ['num_samples=0', 'at least 1']),
], ids=lambda value: value[0] if isinstance(value, list) and value[0].startswith('--') else '')
def test_what_cannot_be_ends_in_one_line(trained, bad, args, status, words):
    done = run('sample.py', f'--out_dir={trained}', *SMALL, *(arg.format(bad=bad) for arg in args),
               PYTHONIOENCODING='utf-8')
    assert_one_line(done, status, *words)
    assert done.stdout == ''


def test_weights_without_a_history_are_enough(bad):
    assert len(samples_of(sample(f'--init_from={bad / "bare.pt"}', '--num_samples=1'))) == 1
