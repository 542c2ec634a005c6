"""Datasets for finetuning: a source tree, and questions with answers of which only the latter are learnt."""

import json
import os
import shutil
import string

import numpy as np
import pytest
from conftest import ROOT, assert_one_line, run
from in_process import call

from flatgpt import checkpoint
from flatgpt.dataset import Dataset
from flatgpt.tokenizer import CharTokenizer


@pytest.fixture
def copy(tmp_path):
    """Copies a prepare.py to where its dataset does not disturb; returns the folder and how to run it there."""
    def copied(name):
        folder = tmp_path / 'data' / name
        folder.mkdir(parents=True)
        shutil.copy(ROOT / 'data' / name / 'prepare.py', folder)

        def prepare(*args, status=0, run=call):
            done = run(folder / 'prepare.py', *args, PYTHONPATH=str(ROOT))
            assert done.returncode == status, done.stderr
            return done
        return folder, prepare
    return copied


# ---------------------------------------------------------------------------------------------------------------------
# a source tree

@pytest.fixture
def tree(tmp_path):
    """A source tree with things in it that are to be left out."""
    root = tmp_path / 'tree'
    for i in range(20):
        path = root / f'part{i % 3}' / f'module{i}.py'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'def f{i}(x):\n    if x:\n        return {i}\n', encoding='utf-8')
    for name in ('.hidden/a.py', 'node_modules/b.py', '__pycache__/c.py', 'notes.txt', '.secret.py'):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text('LEFT OUT')
    (root / 'latin.py').write_bytes(b'caf\xe9')
    return root


def text_of(folder):
    data = Dataset(str(folder))
    tok = checkpoint.tokenizer.from_dict(data.tokenizer)
    return {split: tok.decode(ids) for split, ids in data.data.items()}


def test_every_file_of_a_tree_is_there_once_and_whole_in_one_split(copy, tree):
    folder, prepare = copy('my_code')
    done = prepare(f'--input={tree}', '--tokenizer=char', '--val_fraction=0.2', run=run)
    assert '20 files, ' in done.stdout and "left out: 1 files, such as 'latin.py, not UTF-8'" in done.stdout
    found = text_of(folder)
    files = {path.read_text().replace('    ', '\t') for path in tree.glob('part*/*.py')}
    parts = {split: text.split('\n\n\n')[:-1] for split, text in found.items()}
    assert {f'{part}\n' for part in parts['train'] + parts['val']} == files
    assert len(parts['train']) + len(parts['val']) == 20 and 2 <= len(parts['val']) <= 6
    assert 'LEFT' not in found['train'] + found['val']


def test_the_same_tree_gives_the_same_bytes_and_another_fraction_others(copy, tree):
    folder, prepare = copy('my_code')
    seen = []
    for fraction in (0.2, 0.2, 0.5):
        prepare(f'--input={tree}', '--tokenizer=char', f'--val_fraction={fraction}')
        seen.append([(folder / f'{split}.bin').read_bytes() for split in ('train', 'val')])
    assert seen[0] == seen[1] != seen[2]


def test_a_models_own_tokenizer_is_taken_and_what_it_lacks_is_left_out(copy, tree, trained):
    folder, prepare = copy('my_code')
    before = ''.join(path.read_text() for path in tree.glob('part*/*.py'))
    known = checkpoint.load_tokenizer(str(trained)).chars
    lost = [char for char in before if char not in known]
    done = prepare(f'--input={tree}', f'--tokenizer={trained}', '--tabs=False')
    assert len(lost) > len(set(lost)) > 0   # all are counted, not each once
    assert f'{len(lost)} characters that the tokenizer lacks, such as ' in done.stdout
    assert Dataset(str(folder)).tokenizer == checkpoint.load(trained / 'best.pt')['tokenizer']
    assert set(text_of(folder)['train']) <= set(checkpoint.load_model(trained)[1].chars)


def test_endings_say_which_files(copy, tree):
    folder, prepare = copy('my_code')
    (tree / 'more.txt').write_text('more of it')
    prepare(f'--input={tree}', '--tokenizer=char', '--endings=.txt')
    assert sorted(text_of(folder).values()) == ['LEFT OUT\n\n', 'more of it\n\n']


def test_an_input_that_is_not_a_source_tree_is_refused(copy, tmp_path):
    _, prepare = copy('my_code')
    (tmp_path / 'empty').mkdir()
    assert_one_line(prepare(status=2), 2, "input=''", '--input=~/project')
    assert_one_line(prepare(f'--input={tmp_path / "gone"}', status=2), 2, 'there is no ', 'expected a folder')
    done = prepare(f'--input={tmp_path / "empty"}', '--tokenizer=char', status=1)
    assert_one_line(done, 1, '0 readable files', '.py')
    assert_one_line(prepare(f'--input={tmp_path}', '--val_fraction=1.0', status=2), 2, 'val_fraction=1.0')


# ---------------------------------------------------------------------------------------------------------------------
# questions and answers

def pairs_of(folder):
    """{split: [(text that is not learnt, text that is)]}"""
    data = Dataset(str(folder))
    tok, found = checkpoint.tokenizer.from_dict(data.tokenizer), {}
    for split, ids in data.data.items():
        edges = np.flatnonzero(np.diff(data.mask[split].astype(int))) + 1
        parts = [tok.decode(part) for part in np.split(ids, edges)]
        found[split] = list(zip(parts[::2], parts[1::2]))
    return found


def test_only_answers_are_learnt_and_no_question_is_in_both_splits(copy):
    folder, prepare = copy('sql')
    done = prepare('--n_pairs=500', run=run)
    found = pairs_of(folder)
    for prompt, answer in found['train'] + found['val']:
        assert prompt.startswith('question: ') and prompt.endswith('\nsql:')
        assert answer.startswith(' SELECT ') and answer.endswith(';\n') and answer.count('\n') == 1
    assert not set(found['train']) & set(found['val']) and len(set(found['train'])) == len(found['train'])
    asked = [json.loads(line) for line in (folder / 'val_questions.jsonl').read_text().splitlines()]
    assert [(pair['prompt'], f' {pair["reference"]}\n') for pair in asked] == found['val']
    assert f'{len(found["train"]):,} pairs to learn, {len(found["val"]):,} to ask' in done.stdout
    before = (folder / 'train.bin').read_bytes()
    prepare('--n_pairs=500')
    assert (folder / 'train.bin').read_bytes() == before
    prepare('--n_pairs=500', '--seed=1')
    assert (folder / 'train.bin').read_bytes() != before


@pytest.mark.parametrize('kind', ['json', 'jsonl'])
def test_ones_own_pairs_in_either_form_and_spiders_names(copy, tmp_path, kind):
    pairs = [{'question': 'who?', 'query': 'SELECT 1'}, {'question': 'where? ', 'sql': 'SELECT 2', 'context': 'tables'},
             {'question': '几点?', 'sql': 'SELECT 3'}]
    path = tmp_path / f'pairs.{kind}'
    path.write_text(json.dumps(pairs) if kind == 'json' else '\n\n'.join(map(json.dumps, pairs)))
    folder, prepare = copy('sql')
    prepare(f'--input={path}')
    found = pairs_of(folder)
    assert sorted(found['train'] + found['val']) == [
        ('question: tables\nwhere?\nsql:', ' SELECT 2\n'), ('question: who?\nsql:', ' SELECT 1\n'),
        ('question: 几点?\nsql:', ' SELECT 3\n')]


def test_pairs_with_the_same_question_are_all_there_and_in_one_split(copy, tmp_path):
    pairs = [{'question': f'q{i % 7}\u2028', 'sql': f'SELECT {i % 14}'} for i in range(28)]   # each pair twice
    (tmp_path / 'pairs.jsonl').write_text(''.join(json.dumps(pair, ensure_ascii=False) + '\n' for pair in pairs))
    folder, prepare = copy('sql')
    done = prepare(f'--input={tmp_path / "pairs.jsonl"}', '--val_fraction=0.3')
    found = pairs_of(folder)
    assert sorted(found['train'] + found['val']) == sorted({
        (f'question: {pair["question"].strip()}\nsql:', f' {pair["sql"]}\n') for pair in pairs})
    assert len(found['val']) == 4 and not {q for q, _ in found['train']} & {q for q, _ in found['val']}
    assert 'left out: 14 pairs that occur again' in done.stdout


def test_a_tokenizer_with_an_end_of_text_ends_answers_with_it(copy, tmp_path):
    from safetensors.torch import save_file

    from flatgpt.tokenizer import BpeTokenizer
    tok = BpeTokenizer.train(['question: sql: SELECT'] * 5, 300)
    (tmp_path / 'model').mkdir()
    (tmp_path / 'model' / 'tokenizer.json').write_text(tok.json)
    (tmp_path / 'model' / 'config.json').write_text('{"model_type": "gpt2"}')
    save_file({}, tmp_path / 'model' / 'model.safetensors')   # of which nothing is read
    folder, prepare = copy('sql')
    prepare('--n_pairs=20', f'--tokenizer={tmp_path / "model"}')
    assert all(answer.endswith(';\n<|endoftext|>') for _, answer in pairs_of(folder)['train'])


def test_answers_of_a_tokenizer_that_puts_blanks_before_texts_begin_with_one(copy, tmp_path):
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, decoders, models, normalizers, processors
    chars = ['<s>', '</s>', '▁', *sorted(set(string.printable) - {' '}), '▁S']
    tok = Tokenizer(models.BPE({char: i for i, char in enumerate(chars)}, [('▁', 'S')]))
    tok.normalizer = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
    tok.decoder = decoders.Sequence([decoders.Replace('▁', ' '), decoders.Fuse(), decoders.Strip(' ', 1, 0)])
    tok.post_processor = processors.TemplateProcessing('<s> $A', special_tokens=[('<s>', 0)])
    tok.add_special_tokens(['<s>', '</s>'])
    (tmp_path / 'model').mkdir()
    tok.save(str(tmp_path / 'model' / 'tokenizer.json'))
    (tmp_path / 'model' / 'config.json').write_text('{"model_type": "llama", "eos_token_id": 1}')
    save_file({}, tmp_path / 'model' / 'model.safetensors')
    folder, prepare = copy('sql')
    prepare('--n_pairs=20', f'--tokenizer={tmp_path / "model"}')
    data = Dataset(str(folder))
    ids, mask = data.data['val'].tolist(), data.mask['val'].tolist()
    first = mask.index(1)
    assert ids[0] == 0 and ids[first] == chars.index('▁S') and ids[first - 1] == chars.index(':')
    assert ids[mask.index(0, first) - 1] == 1 and ids[mask.index(0, first)] == 0   # the end, and the next beginning


@pytest.mark.parametrize(('content', 'words'), [
    ('[{"question": "a", "sql": "b"}, {"question": "c"}]', ['record 2', '"question"']), ('[', ['not JSON']),
    ('[1]', ['record 1']), ('[]', ['0 distinct questions']),
    ('[{"question": "a", "sql": "b"}]', ['1 distinct questions'])])
def test_a_file_without_pairs_is_refused(copy, tmp_path, content, words):
    (tmp_path / 'pairs.json').write_text(content)
    _, prepare = copy('sql')
    assert_one_line(prepare(f'--input={tmp_path / "pairs.json"}', status=1), 1, *words)


def test_usage(copy):
    _, prepare = copy('sql')
    assert_one_line(prepare('--n_pairs=3', status=2), 2, 'n_pairs=3')
    assert_one_line(prepare('--tokenizer=nowhere/model', status=1), 1, 'there is no folder nowhere/model here')


def test_the_tokenizer_of_a_model_is_named_in_many_ways(trained, monkeypatch):
    assert checkpoint.load_tokenizer(str(trained)).chars == checkpoint.load_tokenizer(str(trained / 'ckpt.pt')).chars
    monkeypatch.setattr(checkpoint.tokenizer, 'TiktokenTokenizer', lambda name: name)
    for name in ('cl100k_base', 'gpt2'):
        assert checkpoint.load_tokenizer(name) == name
    ckpt = checkpoint.load(trained / 'best.pt')
    del ckpt['tokenizer']
    path = os.path.join(os.path.dirname(trained), 'bare.pt')
    checkpoint.save(path, ckpt)
    with pytest.raises(checkpoint.UserError, match='carries no tokenizer'):
        checkpoint.load_tokenizer(path)
    assert isinstance(checkpoint.load_tokenizer(str(trained)), CharTokenizer)
