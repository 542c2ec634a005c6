"""eval.py as a person runs it: one JSON object on stdout, a table on stderr, a line for every mistake."""

import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_one_line, needs, run, torchrun
from in_process import call
from test_checkpoint import state_of
from test_scoring import RT

from flatgpt import checkpoint, corpus, evaluation, ingest
from flatgpt.dataset import write
from flatgpt.tokenizer import BpeTokenizer, CharTokenizer
from model import GPT, GPTConfig


def evaluate(*args, run=call):
    """(what eval.py printed as JSON, its table)."""
    done = run('eval.py', '--device=cpu', *args)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('\n') == 1 and 'Traceback' not in done.stderr
    return json.loads(done.stdout), done.stderr


def lines(path, *records):
    path.write_text(''.join(json.dumps(record) + '\n' for record in records), encoding='utf-8')
    return path


# ---------------------------------------------------------------------------------------------------------------------
# the loss of a text

def test_the_loss_of_a_dataset_is_that_of_its_file_and_of_its_text(trained, char_dataset, tmp_path):
    found, table = evaluate(f'--out_dir={trained}', f'--data={char_dataset}', '--stride=5')
    model, tok, _ = checkpoint.load_model(trained)
    ids = np.fromfile(char_dataset / 'val.bin', '<u2')
    loss, error, n = evaluation.rolling_loss(model, RT, ids, 5, 16)
    assert found['model'] == str(trained / 'best.pt') and found['step'] == 20 and found['dtype'] == 'float32'
    assert found['data'] == {
        'of': str(char_dataset / 'val.bin'), 'tokens': n, 'bytes': n, 'characters': n, 'block_size': 16, 'stride': 5,
        'loss': pytest.approx(loss, rel=1e-6), 'loss_stderr': pytest.approx(error, rel=1e-6),
        'perplexity': pytest.approx(math.exp(loss)), 'bits_per_token': pytest.approx(loss / math.log(2)),
        'bits_per_token_stderr': pytest.approx(error / math.log(2)),
        'bits_per_byte': pytest.approx(loss / math.log(2)), 'bits_per_character': pytest.approx(loss / math.log(2))}
    assert f'loss                 {loss:.4f} ± {error:.4f}\n' in table and 'float32' in table
    (tmp_path / 'copy.bin').write_bytes(ids.tobytes())   # without meta.json
    (tmp_path / 'text').write_bytes(tok.decode(ids).encode())
    for name in (tmp_path / 'copy.bin', tmp_path / 'text'):
        assert evaluate(f'--out_dir={trained}', f'--data={name}', '--stride=5')[0]['data'] == {
            **found['data'], 'of': str(name)}


def test_of_a_dataset_with_a_mask_what_was_to_be_learnt_is_scored(trained, tmp_path):
    model, tok, _ = checkpoint.load_model(trained)
    ids = np.arange(200, dtype=np.uint16) * 7 % tok.vocab_size
    masks = {'train': np.zeros(200, bool), 'val': np.arange(200) % 5 < 2}
    write(tmp_path, {'train': ids, 'val': ids}, tok, {}, masks)
    loss, error, n = evaluation.rolling_loss(model, RT, ids, 5, 16, masks['val'])
    for name in (tmp_path, tmp_path / 'val.bin'):
        found, _ = evaluate(f'--out_dir={trained}', f'--data={name}', '--stride=5')
        assert found['data']['loss'] == pytest.approx(loss, rel=1e-6) and found['data']['tokens'] == n == 79
        assert found['data']['bytes'] == 79 and found['data']['bits_per_byte'] == found['data']['bits_per_token']
    whole, _, n = evaluation.rolling_loss(model, RT, ids, 5, 16)
    assert n == 199 and abs(whole - loss) > 1e-3
    done = call('eval.py', '--device=cpu', f'--out_dir={trained}', f'--data={tmp_path}', '--split=train')
    assert_one_line(done, 1, f'{tmp_path}/train.bin has no token to score')


def test_a_file_of_a_dataset_a_limit_and_the_default_stride(trained, char_dataset):
    found = evaluate(f'--out_dir={trained}', f'--data={char_dataset}/train.bin', '--limit=40')[0]['data']
    ids = np.fromfile(char_dataset / 'train.bin', '<u2')[:41]
    loss, *_ = evaluation.rolling_loss(checkpoint.load_model(trained)[0], RT, ids, 8, 16)
    assert (found['tokens'], found['stride'], found['loss']) == (40, 8, pytest.approx(loss, rel=1e-6))


@pytest.mark.parametrize('content, documents', [
    ('Déjà vu', ['Déjà vu']), ('\ufeffone\r\ntwo', ['one\ntwo']),
    ({'text': 'Déjà'}, ['Déjà', 'vu', 'x']), (['text', 'Déjà'], ['Déjà', 'vu']),
], ids=['text', 'mark and line ends', 'jsonl', 'csv'])
def test_documents_begin_after_the_end_of_another_and_the_last_end_is_not_scored(tmp_path, content, documents):
    tok = BpeTokenizer.train(['vu vu vu'], 258)
    model = GPT(GPTConfig(258, 8, n_layer=1, n_embd=4, n_head=1))
    checkpoint.save(tmp_path / 'ckpt.pt', state_of(model, tokenizer=tok.to_dict()))
    path = tmp_path / 'a.txt'
    if isinstance(content, str):
        path.write_bytes(content.encode())
    elif isinstance(content, dict):
        path = lines(tmp_path / 'a.jsonl', *({'text': text} for text in documents))
    else:
        path = tmp_path / 'a.csv'
        path.write_text('\r\n'.join(['text', *documents]), encoding='utf-8')
    found = evaluate(f'--init_from={tmp_path}', f'--data={path}')[0]['data']
    ids = np.concatenate(([tok.eot], tok.encode_texts(documents)[:-1]))
    loss, _, n = evaluation.rolling_loss(model.eval(), RT, ids, 4, 16)
    n_bytes, n_chars = len(''.join(documents).encode()), len(''.join(documents))
    assert (found['tokens'], found['bytes'], found['characters']) == (len(ids) - 1, n_bytes, n_chars)
    assert n == len(ids) - 1 and found['loss'] == pytest.approx(loss, rel=1e-6)
    assert found['bits_per_byte'] == pytest.approx(loss * n / n_bytes / math.log(2), rel=1e-6)
    assert found['bits_per_character'] == pytest.approx(loss * n / n_chars / math.log(2), rel=1e-6)


@pytest.mark.parametrize('name, content', [
    ('a.txt', 'one<|endoftext|>\ntwo two<|endoftext|><|endoftext|>three'),
    ('a.jsonl', '{"text": "one"}\n{"text": ""}\n{"text": "two two"}\n"three"\n')], ids=['text', 'jsonl'])
def test_documents_are_divided_as_in_training_data(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    for tok in (BpeTokenizer.train(['two two'], 258), CharTokenizer.of('one two three\n<|x>df')):
        options = ingest.Options(val_fraction=0.1)
        writer = SimpleNamespace(tok=tok, ids=[], num_tokens={}, commit=lambda state: None)
        writer.append = lambda split, ids, writer=writer: writer.ids.append(ids)
        documents = corpus.Corpus([tmp_path / name], separator='<|endoftext|>')
        ingest.write_documents(documents, writer, ingest.State(by_hash=False), options)
        ids = np.concatenate(writer.ids)
        expected = ids if tok.eot is None else [tok.eot, *ids[:-1]]
        assert evaluation.encode_documents(str(tmp_path / name), tok).tolist() == list(expected)


def test_a_template_makes_texts_of_records(trained, tmp_path):
    path = lines(tmp_path / 'a.jsonl', *({'q': f'{i} times 3', 'a': i * 3} for i in range(9)))
    (tmp_path / 'a.txt').write_text('\n'.join(f'{i} times 3 makes {i * 3}' for i in range(9)))
    by_record = evaluate(f'--out_dir={trained}', f'--data={path}', '--template={q} makes {a}')[0]['data']
    assert by_record == {**evaluate(f'--out_dir={trained}', f'--data={tmp_path}/a.txt')[0]['data'], 'of': str(path)}


@pytest.mark.parametrize('block_size', [1, 5, 16])
def test_shorter_windows_are_named_in_the_figure(trained, char_dataset, block_size):
    found = evaluate(f'--out_dir={trained}', f'--data={char_dataset}', f'--block_size={block_size}')[0]['data']
    model = checkpoint.load_model(trained)[0]
    model.crop_block_size(block_size)
    stride = max(block_size // 2, 1)
    loss, *_ = evaluation.rolling_loss(model, RT, np.fromfile(char_dataset / 'val.bin', '<u2'), stride, 16)
    assert (found['block_size'], found['stride'], found['loss']) == (block_size, stride, pytest.approx(loss, rel=1e-6))


def test_a_limit_reads_and_encodes_little_more_than_it_says(tmp_path, monkeypatch):
    tok = BpeTokenizer.train(['vu vu vu'], 258)
    (tmp_path / 'long.txt').write_text('déjà vu\n' * 100_000, encoding='utf-8')
    encoded, encode = [], tok.encode
    monkeypatch.setattr(tok, 'encode', lambda text, **more: encoded.append(text) or encode(text, **more))
    ids = evaluation.encode_documents(str(tmp_path / 'long.txt'), tok, limit=300)
    assert len(ids) > 300 and sum(map(len, encoded)) < 300_000   # of 800,000: one piece
    assert ids[:301].tolist() == [tok.eot, *encode('déjà vu\n' * 100)][:301]


# ---------------------------------------------------------------------------------------------------------------------
# questions, to a model that knows what follows

CYCLE = 'a!b?c;d:e '   # each of these is followed by the next


@pytest.fixture(scope='module')
def rigged(tmp_path_factory):
    """The folder of a model that is sure of what follows in CYCLE, a dataset of it, and questions."""
    folder, V = tmp_path_factory.mktemp('rigged'), len(CYCLE)
    model = GPT(GPTConfig(V, 32, n_layer=1, n_embd=V, n_head=1, bias=False, pos='rope', tie_weights=False,
                          zero_init=True))
    with torch.no_grad():
        model.transformer.wte.weight.copy_(torch.eye(V))
        model.lm_head.weight.copy_(20 * torch.eye(V).roll(1, dims=0))
    tok = CharTokenizer(CYCLE)
    checkpoint.save(folder / 'ckpt.pt', state_of(model, tokenizer=tok.to_dict()))
    lines(folder / 'c.jsonl', *({'context': CYCLE[i:i + 2], 'choices': ['a'] * (i % 3) + [CYCLE[i + 2:i + 6], '::'],
                                 'gold': i % 3} for i in range(4)))
    lines(folder / 'l.jsonl', {'text': 'a!b?c;d:e a!b'}, {'text': 'd:e a!'}, {'text': 'd:e d'})
    lines(folder / 'g.jsonl', {'prompt': 'a', 'reference': '! b ? c ; d : x'}, {'prompt': 'c', 'reference': ';d'},
          {'prompt': 'b', 'reference': '?'})
    write(folder, {'train': tok.encode(CYCLE * 9), 'val': tok.encode(CYCLE * 5)}, tok, {})
    return folder


def asked(folder, *args):
    """The options to ask everything that there is in a folder."""
    return (f'--init_from={folder}', f'--data={folder}', f'--choices={folder}/c.jsonl', '--delimiter=',
            f'--last_word={folder}/l.jsonl', f'--generate={folder}/g.jsonl', *args)


def test_a_model_that_knows_scores_one_and_its_errors_are_those_it_makes(rigged):
    found, table = evaluate(*asked(rigged, '--max_new_tokens=8'), run=run)
    assert found['data']['loss'] == pytest.approx(0, abs=1e-6) and found['data']['perplexity'] == pytest.approx(1)
    assert found['choices'] == {
        'of': str(rigged / 'c.jsonl'), 'n': 4, 'shots': 0, 'acc': 1.0, 'acc_stderr': 0.0, 'acc_norm': 1.0,
        'acc_norm_stderr': 0.0, 'acc_bytes': 1.0, 'acc_bytes_stderr': 0.0,
        'chance': pytest.approx((1 / 2 + 1 / 3 + 1 / 4 + 1 / 2) / 4)}
    wrong = 20 * 10 / 3   # what the logit of 'd' lacks, over three: a LayerNorm of one among ten has 3 and -1/3
    assert found['last_word'] == {
        'of': str(rigged / 'l.jsonl'), 'n': 3, 'acc': pytest.approx(2 / 3), 'acc_stderr': pytest.approx(1 / 3),
        'loss': pytest.approx(wrong / 3, rel=1e-3), 'loss_stderr': pytest.approx(wrong / 3, rel=1e-3),
        'perplexity': pytest.approx(math.exp(found['last_word']['loss']))}
    assert found['generate']['n'] == 3 and 0 < found['generate']['rouge1_stderr'] < 1
    assert [line for line in table.splitlines() if line in ('data', 'choices', 'last_word', 'generate')] == [
        'data', 'choices', 'last_word', 'generate']


def test_bleu_chrf_and_rouge_are_those_worked_out_by_hand(rigged):
    """The answer is ! b ? c ; d : e, of 8 tokens, 4 words and 8 characters, the reference has x in the place of e."""
    from sacrebleu import __version__

    found = evaluate(f'--init_from={rigged}', f'--generate={rigged}/g.jsonl', '--limit=1', '--max_new_tokens=8')[0]
    assert found['generate'] == {
        'of': f'{rigged}/g.jsonl', 'n': 1, 'shots': 0,
        'bleu': pytest.approx(100 * (7 / 8 * 6 / 7 * 5 / 6 * 4 / 5)**(1 / 4)),
        'chrf': pytest.approx(100 * sum((8 - n) / (9 - n) for n in range(1, 7)) / 6),
        'rouge1': pytest.approx(3 / 4), 'rouge2': pytest.approx(2 / 3), 'rougeL': pytest.approx(3 / 4),
        'bleu_signature': f'nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:{__version__}',
        'chrf_signature': f'nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:{__version__}',
        'rouge_words': 'ascii'}


def test_an_answer_ends_before_a_stop(rigged, tmp_path):
    path = lines(tmp_path / 'g.jsonl', {'prompt': 'a', 'reference': '!b?c'}, {'prompt': '', 'reference': '!b?c'})
    found = evaluate(f'--init_from={rigged}', f'--generate={path}', '--stop=[";d", "e"]')[0]['generate']
    assert (found['rouge1'], found['bleu'], found['chrf']) == (1, pytest.approx(100), pytest.approx(100))


@pytest.mark.full
@needs('two_processes')
def test_two_processes_print_what_one_does_to_the_last_bit(trained, char_dataset, tmp_path):
    """Of a model that is not sure of anything."""
    facts = [(f'{i} times {i % 7} makes', f'{i * (i % 7)}.') for i in range(40, 47)]
    lines(tmp_path / 'c.jsonl', *({'context': q, 'choices': ['7.', a], 'gold': 1} for q, a in facts))
    lines(tmp_path / 'l.jsonl', *({'text': f'{q} {a}'} for q, a in facts))
    lines(tmp_path / 'g.jsonl', *({'prompt': q, 'reference': a} for q, a in facts))
    args = (f'--init_from={trained}', f'--data={char_dataset}', f'--choices={tmp_path}/c.jsonl', '--max_new_tokens=9',
            f'--last_word={tmp_path}/l.jsonl', f'--generate={tmp_path}/g.jsonl', '--batch_size=3', '--device=cpu',
            '--shots=2', '--split=train', '--limit=1000')
    one, two = run('eval.py', *args), torchrun('eval.py', *args)
    assert one.stdout == two.stdout and one.stdout.count('\n') == 1, one.stderr
    assert two.stderr.count('2 processes') == 1
    found = json.loads(one.stdout)
    assert found['data']['of'].endswith('train.bin') and found['choices']['shots'] == found['generate']['shots'] == 2


def test_examples_come_before_the_question_and_an_answer_ends_where_another_would_begin(tmp_path):
    """Asked of a model that looks at nothing but the position: it knows what stands where after one example."""
    text, chars = '????? r\n\nq s\n\nq', '\n ?pqrs'
    model = GPT(GPTConfig(len(chars), 16, n_layer=1, n_embd=16, n_head=1, bias=False, tie_weights=False,
                          zero_init=True))
    with torch.no_grad():
        model.transformer.wte.weight.zero_()
        model.transformer.wpe.weight.copy_(torch.eye(16))
        for place, char in enumerate(text):
            model.lm_head.weight[chars.index(char), place] = 20   # after "q r", a blank line and "p"
    checkpoint.save(tmp_path / 'ckpt.pt', state_of(model, tokenizer=CharTokenizer(chars).to_dict()))
    path = lines(tmp_path / 'both.jsonl', *({'context': q, 'choices': ['s', 'r'], 'gold': 1, 'prompt': q,
                                             'reference': 'r'} for q in 'qp'))
    args = (f'--init_from={tmp_path}', f'--choices={path}', f'--generate={path}', '--max_new_tokens=10')
    found = evaluate(*args, '--shots=1')[0]
    assert (found['choices']['acc'], found['choices']['shots'], found['generate']['rouge1']) == (1, 1, 1)
    found = evaluate(*args)[0]   # it writes ????? r, a blank line and q
    assert (found['choices']['acc'], found['choices']['shots']) == (0, 0)
    assert found['generate']['rouge1'] == pytest.approx(2 / 3)
    assert_one_line(call('eval.py', *args, '--shots=2'), 1, f'{path}, line 1', 'shots=2', '1 other questions')


def test_the_example_of_sentiment_is_balanced_and_can_be_asked():
    items = evaluation.read_items(ROOT / 'assets' / 'sentiment.jsonl', evaluation.multiple_choice)
    assert len(items) >= 20 and sum(item.gold for item in items) * 2 == len(items)
    assert len({item.context for item in items}) == len(items)
    assert all(item.answers == ['positive', 'negative'] for item in items)


# ---------------------------------------------------------------------------------------------------------------------
# mistakes

@pytest.mark.parametrize('arg, status, words', [
    ('--stride=33', 2, ['stride=33', 'block_size', '32']),
    ('--data=nowhere.txt', 1, ['cannot read nowhere.txt']), ('--data={bad}/one', 1, ['one has no token to score']),
    ('--data={bad}/alien.bin', 1, ['alien.bin was made with another tokenizer']),
    ('--data={other}', 1, ['val.bin was made with another tokenizer']),
    ('--data={bad}/latin', 1, ['latin is not UTF-8: byte 3 is 0xe9']), ('--data={bad}/chars', 1, ['chars: ', "'xyz'"]),
    ('--choices={bad}/gold.jsonl', 1, ['gold.jsonl, line 2: "gold" is 2', '0 to 1']),
    ('--last_word={bad}/chars.jsonl', 1, ['chars.jsonl, line 1: ', 'never seen']),
    ('--generate={bad}/chars.jsonl', 1, ['chars.jsonl, line 1: ', 'never seen']),
])
def test_a_mistake_gets_one_line(rigged, bad, char_dataset, arg, status, words):
    arg = arg.format(bad=bad, other=char_dataset)
    done = call('eval.py', f'--init_from={rigged}', f'--data={rigged}', '--device=cpu', arg)
    assert_one_line(done, status, *words)
    assert done.stdout == ''


@pytest.fixture(scope='module')
def bad(tmp_path_factory):
    folder = tmp_path_factory.mktemp('bad')
    for name, content in {'one': b'a', 'alien.bin': b'\x0a\0' * 9, 'latin': 'a!\né\n'.encode('latin-1'),
                          'chars': b'a!xyz'}.items():
        (folder / name).write_bytes(content)
    lines(folder / 'gold.jsonl', *({'context': 'a', 'choices': ['!', 'b'], 'gold': gold} for gold in (1, 2)))
    lines(folder / 'chars.jsonl', {'text': 'x y', 'prompt': 'x', 'reference': 'y'})
    return folder


@pytest.mark.parametrize('name', ['rouge_score', 'sacrebleu'])
def test_a_missing_package_is_named_with_its_installation_and_only_where_it_is_needed(rigged, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    done = call('eval.py', *asked(rigged))
    assert_one_line(done, 1, 'eval.py needs sacrebleu', f'no {name} here', 'pip install sacrebleu rouge-score')
    assert call('eval.py', f'--init_from={rigged}', f'--data={rigged}').returncode == 0


def test_without_a_task_the_dataset_that_the_model_was_trained_on_is_suggested(trained, char_dataset):
    done = call('eval.py', f'--out_dir={trained}')
    assert_one_line(done, 2, f'nothing to do: give --data={char_dataset}, --choices')
