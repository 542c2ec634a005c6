"""sample.py as a person runs it: samples on stdout and nothing else, the same ones every time."""

import ast
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, assert_one_line, killed_after, needs, run, started
from in_process import call
from test_checkpoint import as_nanogpt
from test_model import make
from test_tokenizer import KINDS, sentencepiece, wordpiece

from flatgpt import answers, checkpoint, engine, runtime
from flatgpt.tokenizer import BpeTokenizer

DASHES = '-' * 15 + '\n'
SMALL = ('--device=cpu', '--dtype=float32', '--max_new_tokens=40', '--top_k=None')


def sample(*args, run=call, **more):
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
    return sample(f'--out_dir={trained}', '--num_samples=3', run=run)


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
                  '--exact_window', cwd=tmp_path)
    model, tok, _ = checkpoint.load_model(trained)
    assert samples_of(done) == [tok.decode(greedy(model, tok.encode(prompt).tolist(), 40))] * 2


def test_no_new_tokens_give_the_prompt_alone(trained):
    done = sample(f'--out_dir={trained}', '--num_samples=2', '--max_new_tokens=0', '--start=4 times')
    assert done.stdout == ('4 times\n' + DASHES) * 2


@pytest.mark.parametrize('num_samples', [2, pytest.param(600, marks=pytest.mark.full)])
def test_a_reader_that_has_seen_enough_ends_it_quietly(trained, num_samples):
    with started(ROOT / 'sample.py', f'--out_dir={trained}', *SMALL, f'--num_samples={num_samples}') as process:
        if num_samples == 2:   # all of it fits into one buffer, which is written at the very end
            process.stdout.close()
        else:
            head = subprocess.run(['head', '-c', '10'], stdin=process.stdout, capture_output=True, text=True)
            process.stdout.close()
            assert len(head.stdout) == 10
        err = process.stderr.read()
        assert process.wait(60) == 0
    assert 'Traceback' not in err and 'BrokenPipe' not in err


def test_a_nanogpt_checkpoint_samples_with_the_tokenizer_of_a_dataset(tmp_path, trained, char_dataset):
    model, tok, _ = checkpoint.load_model(trained, gelu='erf')
    torch.save(as_nanogpt(model, '_orig_mod.'), tmp_path / 'ckpt.pt')
    done = sample(f'--init_from={tmp_path}', f'--tokenizer_of={char_dataset}', '--num_samples=1', '--temperature=0',
                  '--start=7 times', '--exact_window')
    assert samples_of(done) == [tok.decode(greedy(model, tok.encode('7 times').tolist(), 40))]
    assert 'step 250, val loss 1.25' in done.stderr


@pytest.fixture(scope='module')
def bad(tmp_path_factory, trained):
    """A folder of prompts and checkpoints that give no sample."""
    folder = tmp_path_factory.mktemp('bad')
    (folder / 'latin').write_bytes('größer'.encode('latin-1'))
    (folder / 'empty.txt').write_text('\n \n')
    (folder / 'wrong.jsonl').write_text('{"prompt": "a"}\n{"text": "b"}\n')
    model, _, ckpt = checkpoint.load_model(trained)
    torch.save(as_nanogpt(model), folder / 'nanogpt.pt')
    ckpt['model']['transformer.ln_f.weight'] = ckpt['model']['transformer.ln_f.weight'] * float('nan')   # a copy
    torch.save(ckpt, folder / 'nan.pt')
    torch.save({'model': model.state_dict(), 'model_args': model.config.to_dict(), 'tokenizer': ckpt['tokenizer']},
               folder / 'bare.pt')
    return folder


@pytest.mark.parametrize('args, words', [
    (['--start=FILE:{bad}/nowhere.txt'], ['nowhere.txt', 'No such file']),
    (['--start=FILE:{bad}/latin'], ['latin', 'not UTF-8']),
    (['--start=größer?'], ['ö', 'ß', '?']),
    (['--out_dir={bad}/nowhere'], ['nowhere', 'there is no']),
    (['--init_from={bad}/nanogpt.pt'], ['nanogpt.pt', '--tokenizer_of=']),
    (['--init_from={bad}/nan.pt'], ['NaN']),
    (['--prompts={bad}/nowhere.txt'], ['nowhere.txt']),
    (['--prompts={bad}/empty.txt'], ['empty.txt', 'no prompt']),
    (['--prompts={bad}/wrong.jsonl'], ['wrong.jsonl, line 2', '{"prompt"']),
], ids=['no file', 'not UTF-8', 'unknown characters', 'no folder', 'no tokenizer', 'NaN', 'no prompts', 'empty',
        'no prompt'])
def test_what_cannot_be_ends_in_one_line(trained, bad, args, words):
    done = call('sample.py', f'--out_dir={trained}', *SMALL, *(arg.format(bad=bad) for arg in args))
    assert_one_line(done, 1, *words)
    assert done.stdout == ''


def test_weights_without_a_history_are_enough(bad):
    assert len(samples_of(sample(f'--init_from={bad / "bare.pt"}', '--num_samples=1'))) == 1


# ---------------------------------------------------------------------------------------------------------------------
# many prompts, JSON, stops

def answers_of(done):
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_json_has_one_object_per_sample_whose_fields_agree(trained):
    done = sample(f'--out_dir={trained}', '--num_samples=2', '--start=4 times', '--json', '--max_new_tokens=9')
    plain = sample(f'--out_dir={trained}', '--num_samples=2', '--start=4 times', '--max_new_tokens=9')
    model, tok, _ = checkpoint.load_model(trained)
    for answer, text in zip(answers_of(done), samples_of(plain), strict=True):
        assert list(answer) == ['prompt', 'text', 'tokens', 'mean_logprob', 'finish_reason']
        assert answer['prompt'] + answer['text'] == text
        assert answer['text'] == tok.decode(answer['tokens']) and len(answer['tokens']) == 9
        assert answer['finish_reason'] == 'length'
        ids = torch.tensor([[*tok.encode('4 times').tolist(), *answer['tokens']]])
        with torch.no_grad():
            p = model(ids[:, :-1], ids[:, 1:])[0].log_softmax(-1).gather(-1, ids[:, 1:, None])[0, -9:, 0]
        assert answer['mean_logprob'] == pytest.approx(p.mean().item(), abs=1e-4)


@pytest.mark.parametrize('suffix', ['txt', 'jsonl'])
def test_prompts_of_a_file_are_answered_together_as_each_alone(tmp_path, trained, suffix):
    texts = ['4 times', '31 times 3 makes', '7']
    lines = [json.dumps({'prompt': text, 'id': 3}) if suffix == 'jsonl' else text for text in texts]
    (tmp_path / f'prompts.{suffix}').write_text('\n'.join([*lines, '', '']))
    args = f'--out_dir={trained}', '--max_new_tokens=8', f'--prompts={tmp_path / "prompts"}.{suffix}', '--json'
    answers = answers_of(sample(*args, '--num_samples=2', '--temperature=0'))
    assert [answer['prompt'] for answer in answers] == [text for text in texts for _ in range(2)]
    for text, answer in zip(texts, answers[::2]):
        alone = answers_of(sample(f'--out_dir={trained}', '--max_new_tokens=8', f'--start={text}', '--num_samples=1',
                                  '--temperature=0', '--json'))
        assert answer['tokens'] == alone[0]['tokens']
    # how many are drawn together changes nothing, since each has a stream of its own
    tokens = [[answer['tokens'] for answer in answers_of(sample(*args, '--num_samples=3', f'--batch_size={n}'))]
              for n in (2, 64)]
    assert tokens[0] == tokens[1] and len(tokens[0]) == 9


def test_prompts_that_are_empty_are_answered_too(tmp_path, trained):
    texts = ['4', '', '\n', '7']
    (tmp_path / 'prompts.JSONL').write_text('\ufeff' + '\n'.join(json.dumps({'prompt': text}) for text in texts))
    args = f'--out_dir={trained}', '--num_samples=1', '--json', f'--prompts={tmp_path / "prompts.JSONL"}'
    assert [answer['prompt'] for answer in answers_of(sample(*args))] == texts


def test_an_unknown_character_in_any_prompt_is_told_before_the_first_answer(tmp_path, trained):
    (tmp_path / 'prompts.txt').write_text('4\n4 #\n', encoding='utf-8')
    done = call('sample.py', f'--out_dir={trained}', *SMALL, f'--prompts={tmp_path / "prompts.txt"}', '--batch_size=1')
    assert_one_line(done, 1, f'{tmp_path / "prompts.txt"}, line 2: ', "'#'")
    assert done.stdout == ''


def test_a_sample_ends_before_a_stop_that_is_spread_over_tokens(trained):
    whole = answers_of(sample(f'--out_dir={trained}', '--num_samples=3', '--json'))
    for stop in (' makes', '9', 'zzz'):
        for before, after in zip(whole, answers_of(sample(f'--out_dir={trained}', '--num_samples=3', '--json',
                                                          f'--stop=["never", {json.dumps(stop)}]'))):
            found = stop in before['text']
            assert after['text'] == before['text'].split(stop)[0]
            assert after['finish_reason'] == ('stop' if found else 'length')
            assert len(after['tokens']) == (len(after['text'] + stop) if found else 40)   # a token is a character
    assert any('9' in answer['text'] for answer in whole)


def test_a_stream_prints_what_is_printed_at_once_without_it(trained):
    args = f'--out_dir={trained}', '--num_samples=2', '--start=4 times', '--stop= makes'
    assert sample(*args, '--stream').stdout == sample(*args).stdout
    assert sample(*args, '--batch_size=1').stdout == sample(*args).stdout


SAYS = """
import sys
import torch
from flatgpt import engine
def _generate(model, prompts, max_new_tokens, **options):
    for i in {ids}:
        yield torch.full((len(prompts),), i), torch.zeros(len(prompts))
engine.generate = _generate
_write = sys.stdout.write
def _note_and_write(text):
    with open({pieces!r}, 'a', encoding='utf-8') as f:
        f.write(repr(text) + chr(10))
    return _write(text)
sys.stdout.write = _note_and_write
"""


@pytest.fixture
def says(tmp_path, monkeypatch):
    """A function that makes a model say something, and returns what to start sample.py with, the file of what it
    writes, a Python string per line, and the ids. A token is a byte."""
    monkeypatch.setattr(engine, 'generate', engine.generate)   # puts it back afterwards
    tok = BpeTokenizer.train([''], 257)
    model = make(torch.float32, vocab_size=257, n_embd=4, n_head=1, n_layer=1)
    checkpoint.save(tmp_path / 'ckpt.pt', {'version': 1, 'model': model.state_dict(), 'tokenizer': tok.to_dict(),
                                           'model_args': model.config.to_dict()})

    def prepare(text, more=()):
        ids = [*tok.encode(text).tolist(), *more]
        (tmp_path / 'says.py').write_text(SAYS.format(ids=ids, pieces=str(tmp_path / 'pieces')))
        return [tmp_path / 'says.py', f'--out_dir={tmp_path}', '--num_samples=1', '--start=>',
                '--max_new_tokens=100'], tmp_path / 'pieces', ids
    return prepare


UNICODE = '你好，世界！🦉👩🏽‍🚀 naïve Ωμέγα'


def test_a_stream_never_shows_half_a_character(says):
    args, pieces, ids = says(UNICODE)
    assert len(ids) == len(UNICODE.encode()) > len(UNICODE)
    assert sample(*args, '--stream').stdout == f'>{UNICODE}\n{DASHES}'
    written = [ast.literal_eval(line) for line in pieces.read_text(encoding='utf-8').splitlines()]
    assert len([text for text in written if text]) > 15   # as it came
    assert ''.join(written).count('\ufffd') == 0


def test_a_stream_shows_nothing_of_a_stop(says):
    args, pieces, _ = says('one two ### three')
    done = sample(*args, '--stream', '--stop=["###", "zz"]')
    assert done.stdout == f'>one two \n{DASHES}'
    assert '#' not in pieces.read_text()


def test_a_sample_ends_at_the_end_of_text_token(says):
    args, _, ids = says('the end', more=[0, 62, 62])
    assert answers_of(sample(*args, '--json'))[0] == {
        'prompt': '>', 'text': 'the end', 'tokens': [*ids[:-2]], 'mean_logprob': 0.0, 'finish_reason': 'stop'}


@pytest.fixture
def saved(tmp_path):
    """A function that saves a tiny model with random weights and a tokenizer; returns its folder."""
    def save(tok, **changes):
        shape = {'n_embd': 8, 'n_head': 1, 'n_layer': 1, 'block_size': 16, **changes}
        model = make(torch.float32, vocab_size=tok.vocab_size, **shape)
        checkpoint.save(tmp_path / 'ckpt.pt', {'version': 1, 'model': model.state_dict(), 'tokenizer': tok.to_dict(),
                                               'model_args': model.config.to_dict()})
        return tmp_path
    return save


@pytest.mark.parametrize('kind', [*KINDS, 'WordPiece'])
def test_text_json_and_stream_show_what_the_tokens_mean_after_the_prompt(saved, kind):
    tok = BpeTokenizer(wordpiece() if kind == 'WordPiece' else KINDS[kind][0]())
    args = f'--out_dir={saved(tok)}', '--start=hello', '--num_samples=3', '--max_new_tokens=12'
    answers = answers_of(sample(*args, '--json'))
    prompt = tok.encode_prompt('hello')
    for answer in answers:
        ended = answer['tokens'][-1] in tok.ends
        assert answer['finish_reason'] == ('stop' if ended else 'length')
        piece = tok.stream(prompt)
        assert answer['text'] == piece(answer['tokens'][:-1] if ended else answer['tokens']) + piece(None)
    shown = ''.join(f'hello{answer["text"]}\n{DASHES}' for answer in answers)
    assert sample(*args).stdout == sample(*args, '--stream').stdout == shown


def test_a_stop_that_begins_with_a_space_is_found_where_the_space_is_part_of_a_token(saved):
    tok = BpeTokenizer(sentencepiece())
    hello, h = tok.encoding.token_to_id('▁hello'), tok.encoding.token_to_id('h')
    for ids, text, finish in (([hello], '', 'stop'), ([h, hello, h], 'h', 'stop'), ([h, h, h], 'hhh', 'length')):
        answer = answers.Answer(tok, tok.encode_prompt('hello'), 3, [' hello'])
        for token in ids:
            answer.add(token)
        assert (answer.text, answer.finish) == (text, finish)


def test_any_of_several_ends_ends_a_sample_and_is_not_shown():
    tok = BpeTokenizer(BpeTokenizer.train(['x'], 260, special=['<|end|>', '<|user|>']).json, 0, (0, 1))
    for end in (0, 1):
        answer = answers.Answer(tok, tok.encode_prompt('x'), 9)
        for token in (*tok.encode('you').tolist(), end, 5):
            answer.add(token)
        assert (answer.text, answer.finish, answer.ids[-1]) == ('you', 'stop', end)


@pytest.mark.parametrize('name, content', [
    ('p.txt', '\ufeff4\r\n\r\n4 times\r\n'), ('p.md', '4\n4 times'),
    ('p.ndjson', '{"prompt": "4"}\n{"prompt": "4 times"}'),
    ('p.json', '["4", "4 times"]'), ('p.json', '[{"prompt": "4"}, {"prompt": "4 times", "id": 7}]'),
    ('p.csv', 'id,prompt\r\n1,4\r\n2,4 times\r\n'), ('p.tsv', 'prompt\tid\n4\t1\n4 times\t2'),
])
def test_a_file_of_prompts_is_read_as_records(tmp_path, trained, name, content):
    (tmp_path / name).write_text(content, encoding='utf-8', newline='')
    done = sample(f'--out_dir={trained}', f'--prompts={tmp_path / name}', '--num_samples=1', '--json')
    assert [answer['prompt'] for answer in answers_of(done)] == ['4', '4 times']


@pytest.mark.parametrize('name, content, words', [
    ('p.json', '[{"text": "4"}]', ['p.json, record 1: expected {"prompt"']),
    ('p.csv', 'text\n4\n', ['p.csv, line 2: expected {"prompt"']), ('p.jsonl', '{"prompt": 4}', ['p.jsonl, line 1: ']),
    ('p.jsonl', '{"prompt": "4"', ['p.jsonl, line 1 is not JSON']), ('p.json', '[]', ['p.json has no prompt']),
])
def test_a_record_without_a_prompt_is_named(tmp_path, trained, name, content, words):
    (tmp_path / name).write_text(content)
    done = call('sample.py', f'--out_dir={trained}', *SMALL, f'--prompts={tmp_path / name}')
    assert_one_line(done, 1, *words)
    assert '--errors' not in done.stderr


def test_a_prompt_that_is_cut_is_told_with_both_numbers_and_keeps_what_begins_a_text(saved):
    tok = BpeTokenizer(sentencepiece())
    folder = saved(tok)
    long = tok.encode_prompt('hello' + ' hello' * 20)
    args = '--num_samples=2', '--temperature=0', '--json', '--max_new_tokens=1'
    done = sample(f'--out_dir={folder}', '--start=hello' + ' hello' * 20, *args)
    notices = [line for line in done.stderr.splitlines() if 'context' in line]
    assert notices == ['1 of 1 prompts are longer than the context of 16 tokens, the longest has 22: only their ends '
                       'are seen, after the 1 that begin a text']
    model = checkpoint.load_model(folder)[0]
    seen = torch.tensor([[*tok.begin, *long[-15:].tolist()]])
    assert answers_of(done)[0]['tokens'] == [model(seen)[0][0, -1].argmax().item()]
    assert 'context' not in sample(f'--out_dir={folder}', '--start=hello', '--num_samples=1').stderr


@pytest.mark.parametrize('files', [{'chat_template.jinja': 'x'}, {'tokenizer_config.json': {'chat_template': 'x'}}],
                         ids=['file', 'config'])
def test_a_chat_template_that_is_not_used_is_told_unless_the_prompt_has_special_tokens(saved, files):
    tok = BpeTokenizer.train(['x'], 260, special=['<|end|>', '<|user|>'])
    tok.files = files
    folder = saved(tok)
    told = {start: 'chat template' in sample(f'--out_dir={folder}', f'--start={start}', '--num_samples=1').stderr
            for start in ('hello', '<|user|>hello')}
    assert told == {'hello': True, '<|user|>hello': False}
    tok.files = {}
    assert 'chat template' not in sample(f'--out_dir={saved(tok)}', '--start=hello', '--num_samples=1').stderr


@pytest.mark.parametrize('free, told', [(None, False), (10**9, False), (1000, True)])
def test_memory_that_is_not_enough_is_told(trained, monkeypatch, free, told):
    monkeypatch.setattr(runtime.Runtime, 'free_memory', lambda self: free)
    done = sample(f'--out_dir={trained}', '--num_samples=50', '--max_new_tokens=2')
    assert ('GB are free: lower batch_size' in done.stderr) == told


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('n', [10, 64, 1000])
def test_the_estimate_of_memory_counts_cache_logits_and_weights_that_move(dtype, n):
    model = make(torch.float32, block_size=64)
    needed = engine.cache_bytes(model.config, 7 * min(n, 64), dtype.itemsize) + 7 * 23 * (4 + 1)
    if dtype == torch.bfloat16:
        needed += 2 * sum(p.numel() for p in model.parameters())
    for free, told in ((needed - 1, True), (needed, False), (None, False)):
        rt = SimpleNamespace(device=torch.device('cpu'), dtype=dtype, free_memory=lambda free=free: free)
        assert ('GB are needed for 7 samples' in answers.memory_notice(model, rt, 7, n)) == told


@pytest.mark.parametrize('pos', ['rope', 'alibi', 'learned'])
def test_a_longer_context_needs_positions_that_are_relative(saved, pos):
    tok = BpeTokenizer(sentencepiece())
    args = f'--out_dir={saved(tok, pos=pos)}', '--start=' + 'hello ' * 30, '--num_samples=1', '--block_size=64'
    done = call('sample.py', *SMALL, *args)
    if pos == 'learned':
        assert_one_line(done, 2, 'block_size=64', '16 positions')
    else:
        assert done.returncode == 0 and 'longer than the context' not in done.stderr


@pytest.mark.full
def test_in_a_terminal_it_asks_for_prompts_and_streams_answers(says):
    pty = pytest.importorskip('pty')   # which Unix has
    args, _, _ = says('你好\tthere')   # a tab is four columns there
    terminal, inside = pty.openpty()
    environ = {**os.environ, 'PYTHONIOENCODING': 'utf-8', 'TERM': 'dumb'}
    command = [sys.executable, ROOT / 'sample.py', '--device=cpu', '--dtype=float32', *args[:2]]
    with subprocess.Popen(command, stdin=inside, stdout=inside, stderr=inside, env=environ) as process, \
            killed_after(60, process.pid):
        os.close(inside)
        seen = b''
        for line in (b'who?\n', b'\n', b'\x04'):   # a prompt, an empty one, the end
            while not seen.endswith(b'> '):
                seen += os.read(terminal, 1000)
            os.write(terminal, line)
            seen += b'|'
        process.wait(60)
    assert process.returncode == 0
    notices, shown = seen.decode().replace('\r\n', '\n').split('> |', 1)
    assert 'Ctrl-D' in notices
    assert shown == 'who?\nwho?你好    there\n> |\n你好    there\n> |'


@pytest.mark.parametrize('args', [['--quantize=int8'], ['--dtype=bfloat16'], ['--top_p=0.9', '--min_p=0.02'],
                                  ['--repetition_penalty=1.3', '--exact_window']], ids=' '.join)
def test_the_same_command_gives_the_same_samples(trained, args):
    args = [f'--out_dir={trained}', '--num_samples=2', *args]
    assert samples_of(sample(*args)) == samples_of(sample(*args))


@pytest.mark.full
@needs('c_compiler')
def test_a_compiled_step_gives_the_same_samples(trained):
    args = [f'--out_dir={trained}', '--num_samples=2']
    for start in ('4 times', '4'):   # a prompt of one token is not the step that is compiled
        more = f'--start={start}', '--max_new_tokens=30'
        assert sample(*args, *more, '--compile=True', run=run, timeout=600).stdout == sample(*args, *more).stdout
