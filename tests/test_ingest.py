"""Documents into a dataset: the ids of the whole text, in order, whatever is killed, cut or joined on the way."""

import json
import os
import random
import shutil
import threading
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, SHARED, needs
from in_process import defaults_of
from test_hub import server  # noqa: F401, a fixture

from flatgpt import corpus, dataset, hub, ingest, tokenizer
from flatgpt.corpus import Corpus
from flatgpt.dataset import Dataset
from flatgpt.errors import UserError
from flatgpt.tokenizer import BpeTokenizer, CharTokenizer

WORDS = '''the of and to in is that for it was on are as with his they at be this from have or by one had not but what
all were when we there can an your which their said if do will each about how up out them then she many some so these
would 你好 世界 今天 北京 朋友 学习 语言 模型 größe naïve café <|end|> 12 345 def return( self.x )'''.split()


def prose(seed, words):
    generator = random.Random(seed)
    return ''.join(generator.choice(WORDS) + generator.choice([' ', ' ', ' ', ', ', '.\n', '。']) for _ in range(words))


@pytest.fixture(scope='module')
def bpe():
    return BpeTokenizer.train([prose(i, 200) for i in range(20)], 400)


@pytest.fixture(scope='module')
def bpe_path(bpe, tmp_path_factory):
    path = tmp_path_factory.mktemp('bpe') / 'tokenizer.json'
    path.write_text(bpe.json, encoding='utf-8')
    return str(path)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Pieces of a few hundred characters, so that small files take many."""
    for module in corpus, ingest:
        monkeypatch.setattr(module, 'PIECE', 300)
    monkeypatch.setattr(corpus, 'BLOCK', 256)
    monkeypatch.setattr(ingest, 'AHEAD', 2)
    monkeypatch.setattr(os, 'fsync', lambda file: None)   # no test here loses power, and a disk takes its time


@pytest.fixture
def files(tmp_path):
    """Forty documents of 0 to 400 words, among them an empty one and one that comes twice, in three files."""
    folder, texts = tmp_path / 'text', [prose(i, i * 11 % 41 * 10) for i in range(39)]
    texts.insert(30, texts[7])
    folder.mkdir()
    (folder / 'a.txt').write_text(texts[0] or prose(99, 30), encoding='utf-8')
    texts[0] = texts[0] or prose(99, 30)
    lines = [json.dumps({'text': text}) for text in texts[1:25]]
    (folder / 'b.jsonl').write_text('\n'.join([*lines[:5], '{"text": ""}', *lines[5:]]), encoding='utf-8')
    pq.write_table(pa.table({'text': texts[25:]}), folder / 'c.parquet', row_group_size=4)
    return SimpleNamespace(paths=sorted(folder.iterdir()), texts=texts)


def build(folder, files, spec='char', errors='strict', save_bytes=2000, **how):
    """ingest.build of the fixture `files` or of paths, with sizes in bytes."""
    how = {'val_fraction': 0.3, 'save_mb': save_bytes / 1e6, **how}
    options = ingest.Options(spec, **how)
    paths = files.paths if isinstance(files, SimpleNamespace) else files
    return ingest.build(folder, Corpus(paths, errors=errors), options)


def content(folder):
    """{name: bytes} of all that is in a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def documents_of(folder):
    """{split: texts of the documents} of a dataset whose tokenizer has an end of text."""
    data, out = Dataset(f'{folder}/'), {}
    tok = tokenizer.from_dict(data.tokenizer)
    for split, ids in data.data.items():
        ends = np.flatnonzero(np.asarray(ids) == tok.eot)
        assert len(ends) and ends[-1] == len(ids) - 1
        out[split] = [tok.decode(part[part != tok.eot]) for part in np.split(np.asarray(ids), ends + 1)[:-1]]
    return out


# ---------------------------------------------------------------------------------------------------------------------
# what comes out

def test_every_document_lies_whole_in_one_split_with_the_ids_that_it_has_alone(files, bpe, bpe_path, tmp_path):
    build(tmp_path / 'out', files, bpe_path)
    found = documents_of(tmp_path / 'out')
    kept = [text for text in files.texts if text]
    assert [text for text in kept if text in found['val']] == found['val'] and 4 < len(found['val']) < 25
    assert [text for text in kept if text not in found['val']] == found['train']
    data = Dataset(f'{tmp_path / "out"}/')
    for split in found:
        assert data.data[split].tolist() == [i for text in found[split] for i in [*bpe.encode(text).tolist(), bpe.eot]]


@pytest.mark.full
@needs('gpt2_encoding', 'shakespeare')
def test_ids_are_those_of_tiktoken_on_real_text(tmp_path, monkeypatch):
    import tiktoken
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(SHARED / 'tiktoken_cache'))
    for module in corpus, ingest:
        monkeypatch.setattr(module, 'PIECE', 5000)
    texts = [(SHARED / 'tinyshakespeare.txt').read_text(encoding='utf-8')[:300_000],
             (ROOT / 'README.md').read_text(encoding='utf-8'), prose(1, 5000)]
    for i, text in enumerate(texts):
        (tmp_path / f'{i}.txt').write_text(text, encoding='utf-8')
    build(tmp_path / 'out', [tmp_path / f'{i}.txt' for i in range(3)], 'gpt2')
    gpt2 = tiktoken.get_encoding('gpt2')
    ids = np.concatenate([*Dataset(f'{tmp_path / "out"}/').data.values()])
    found = [part.tolist() for part in np.split(ids, np.flatnonzero(ids == gpt2.eot_token) + 1)[:-1]]
    assert sorted(found) == sorted([*gpt2.encode_ordinary(text), gpt2.eot_token] for text in texts)


def test_characters_have_a_line_break_between_documents_and_none_elsewhere(files, tmp_path):
    tok, report = build(tmp_path / 'out', files)
    data, kept = Dataset(f'{tmp_path / "out"}/'), [text for text in files.texts if text]
    assert tok.chars == ''.join(sorted(set('\n'.join(kept))))
    texts = {split: tok.decode(ids) for split, ids in data.data.items()}
    val = [text for text in kept if f'\n{text}\n' in f'\n{texts["val"]}\n']
    assert texts == {'train': '\n'.join(text for text in kept if text not in val), 'val': '\n'.join(val)}


def test_meta_json_knows_how_much_text_each_split_has_so_that_tokenizers_can_be_compared(files, bpe_path, tmp_path):
    _, report = build(tmp_path / 'out', files, bpe_path)
    data, found = Dataset(f'{tmp_path / "out"}/'), documents_of(tmp_path / 'out')
    assert data.bytes == {split: len(''.join(texts).encode()) for split, texts in found.items()}
    assert data.characters == {split: len(''.join(texts)) for split, texts in found.items()}
    of = data.perplexity(2.0)
    n = len(data.data['val'])
    assert of == pytest.approx({'token': np.exp(2), 'byte': np.exp(2 * n / data.bytes['val']),
                                'character': np.exp(2 * n / data.characters['val'])})
    assert report == json.loads((tmp_path / 'out' / 'meta.json').read_text())['report']


def test_the_report_counts_everything(files, bpe_path, tmp_path):
    _, report = build(tmp_path / 'out', files, bpe_path, deduplicate=True)
    kept = list(dict.fromkeys(text for text in files.texts if text))
    assert sum(report['documents'].values()) == len(kept) and report['duplicates'] == 1
    assert report['empty'] == 1
    assert report['bytes_per_token'] == sum(report['bytes'].values()) / sum(report['tokens'].values())
    assert sorted(sum(documents_of(tmp_path / 'out').values(), [])) == sorted(kept)


@pytest.mark.parametrize('errors, counted', [('skip', {'left_out': 12, 'repaired': 0}),
                                             ('replace', {'left_out': 0, 'repaired': 12})])
def test_faults_are_counted_and_the_first_ten_are_reported(tmp_path, bpe_path, errors, counted):
    path = tmp_path / 'x.jsonl'
    path.write_text(''.join(json.dumps({'text': f'{i} bad \ud800'[:9 if i % 3 else 5]}) + '\n' for i in range(18)))
    _, report = build(tmp_path / 'out', [path], bpe_path, errors=errors)
    assert {name: report[name] for name in counted} == counted and report['empty'] == 0
    assert sum(report['documents'].values()) == 6 + counted['repaired']
    assert [fault.split(',')[1] for fault in report['faults']] == [f' line {i} has half a surrogate pair'
                                                                   for i in range(2, 19) if i % 3 != 1][:10]


def test_snippets_are_from_even_distances_in_both_splits(tmp_path, bpe, bpe_path):
    path = tmp_path / 'x.jsonl'
    path.write_text(''.join(json.dumps({'text': prose(i, 30)}) + '\n' for i in range(300)))
    _, report = build(tmp_path / 'out', [path], bpe_path, val_fraction=0.5)
    assert len(report['snippets']) == 10 and all(len(text) > 10 for text in report['snippets'])
    for split, texts in ('train', report['snippets'][:5]), ('val', report['snippets'][5:]):
        whole = bpe.decode(Dataset(f'{tmp_path / "out"}/').data[split][:])
        for i, text in enumerate(texts):
            assert abs(whole.index(text) / len(whole) - i / 5) < 0.02


def test_little_text_waits_in_memory_however_long_the_input_is(files, tmp_path, monkeypatch):
    read, most, pieces, append = [0], [0], Corpus.pieces, dataset.Writer.append

    def reading(self, i, bar=None):
        for piece in pieces(self, i, bar):
            read[0] += len(piece.text)
            yield piece

    def appending(self, split, ids):
        if bar_is_on[0]:
            most[0] = max(most[0], read[0] - sum(self.num_tokens.values()))
        append(self, split, ids)

    bar_is_on = [False]
    write_documents = ingest.write_documents
    monkeypatch.setattr(ingest, 'write_documents', lambda *args: (
        read.__setitem__(0, 0), bar_is_on.__setitem__(0, True), write_documents(*args)))
    monkeypatch.setattr(Corpus, 'pieces', reading)
    monkeypatch.setattr(dataset.Writer, 'append', appending)
    build(tmp_path / 'out', files, threads=1, save_bytes=10**9)
    assert 3 * most[0] < read[0] and most[0] < 20 * 300


def test_no_thread_is_left_after_a_failure(files, tmp_path, bpe_path):
    before = set(threading.enumerate())
    files.paths[2].write_bytes(b'no parquet')
    with pytest.raises(UserError, match='cannot read') as refusal:
        build(tmp_path / 'out', files, bpe_path, threads=3)
    assert refusal.value.__traceback__   # which holds on to the pool
    assert {thread for thread in threading.enumerate() if not thread.daemon} <= before   # tqdm's is


def test_two_runs_give_the_same_bytes_on_any_number_of_threads(files, tmp_path):
    for name, threads in (('a', 1), ('b', 1), ('c', 5)):
        build(tmp_path / name, files, 'bpe:300', threads=threads, save_bytes=[10**9, 500, 2000][threads % 3])
    assert content(tmp_path / 'a') == content(tmp_path / 'b') == content(tmp_path / 'c')
    assert set(content(tmp_path / 'a')) == {'train.bin', 'val.bin', 'meta.json', 'tokenizer.json'}


def test_another_seed_draws_others_and_the_fraction_is_kept(tmp_path, bpe_path):
    path = tmp_path / 'x.jsonl'
    path.write_text(''.join(json.dumps({'text': f'document {i}'}) + '\n' for i in range(2000)))
    drawn = []
    for seed in 1, 2, 1:
        build(tmp_path / 'out', [path], bpe_path, seed=seed, val_fraction=0.2)
        drawn.append(set(documents_of(tmp_path / 'out')['val']))
    assert drawn[0] == drawn[2] != drawn[1]
    assert all(320 < len(val) < 480 for val in drawn)
    assert 40 < len(drawn[0] & drawn[1]) < 130   # as of two independent draws


def test_a_document_stays_in_its_split_when_others_come_or_go(files, tmp_path, bpe_path):
    build(tmp_path / 'all', files, bpe_path, val_fraction=0.5)
    build(tmp_path / 'some', files.paths[1:2], bpe_path, val_fraction=0.5)
    everything, some = documents_of(tmp_path / 'all'), documents_of(tmp_path / 'some')
    assert all(set(some[split]) <= set(everything[split]) for split in some)


def test_equal_documents_are_in_the_same_split(tmp_path, bpe_path):
    path = tmp_path / 'x.jsonl'
    path.write_text(''.join(json.dumps({'text': f'document {i % 50}'}) + '\n' for i in range(200)))
    build(tmp_path / 'out', [path], bpe_path)
    found = documents_of(tmp_path / 'out')
    assert not set(found['train']) & set(found['val']) and sum(map(len, found.values())) == 200


@pytest.mark.parametrize('sizes, whole', [([30] * 120, True), ([30] * 100, True), ([30] * 99, False),
                                          ([100, 100, 1000, 3], False), ([1000, 3], False), ([1] * 30 + [3000], False)])
def test_of_few_documents_the_end_of_the_text_is_for_validation(tmp_path, bpe_path, sizes, whole):
    texts = [prose(100 + i, n) for i, n in enumerate(sizes)]
    (tmp_path / 'x.jsonl').write_text(''.join(json.dumps({'text': text}) + '\n' for text in texts))
    _, report = build(tmp_path / 'out', [tmp_path / 'x.jsonl'], bpe_path, val_fraction=0.1)
    tokens = report['tokens']
    assert 0.05 < tokens['val'] / sum(tokens.values()) < 0.2
    assert report['validation'] == ('documents, by their hash' if whole else 'the end of the text')
    data = Dataset(f'{tmp_path / "out"}/')
    ids = [i for split in data.data.values() for i in split.tolist()]
    if not whole:   # in order
        tok = tokenizer.from_dict(data.tokenizer)
        assert tok.decode(ids) == ''.join(text + '<|endoftext|>' for text in texts)
        assert sum(data.bytes.values()) == len(''.join(texts).encode())


@pytest.mark.parametrize('long, told', [(30, False), (20_000, True)])
def test_a_share_of_validation_far_from_what_was_asked_for_is_told(tmp_path, bpe_path, capsys, long, told):
    texts = [prose(100 + i, long if i == 7 else 30) for i in range(150)]
    (tmp_path / 'x.jsonl').write_text(''.join(json.dumps({'text': text}) + '\n' for text in texts))
    _, report = build(tmp_path / 'out', [tmp_path / 'x.jsonl'], bpe_path, val_fraction=0.1)
    share = report['tokens']['val'] / sum(report['tokens'].values())
    assert (f'{share:.1%} of the tokens are for validation instead of 10.0%' in capsys.readouterr().err) == told


@pytest.mark.parametrize('kind', ['txt', 'jsonl'])
@pytest.mark.parametrize('spec', ['char', 'bpe:300'])
def test_of_a_single_document_the_end_is_for_validation(tmp_path, spec, kind):
    text, path = prose(3, 2000), tmp_path / f'x.{kind}'
    path.write_text(text if kind == 'txt' else json.dumps({'text': text}), encoding='utf-8')
    tok, report = build(tmp_path / 'out', [path], spec, val_fraction=0.1)
    data = Dataset(f'{tmp_path / "out"}/')
    ids = [i for split in data.data.values() for i in split.tolist()]
    assert tok.decode(ids) == text + ('<|endoftext|>' if tok.eot is not None else '')
    assert len(data.data['val']) == pytest.approx(len(ids) / 10, abs=1)
    assert report['validation'] == 'the end of the text'
    assert sum(data.bytes.values()) == len(text.encode()) and sum(data.characters.values()) == len(text)
    assert data.characters['val'] == pytest.approx(len(text) / 10, rel=0.2)


def test_a_large_vocabulary_takes_32_bits(files, bpe, tmp_path):
    d = json.loads(bpe.json)
    d['added_tokens'][0]['id'] = d['model']['vocab']['<|endoftext|>'] = 70_000
    (tmp_path / 'tokenizer.json').write_text(json.dumps(d), encoding='utf-8')
    tok, _ = build(tmp_path / 'out', files, str(tmp_path / 'tokenizer.json'))
    data = Dataset(f'{tmp_path / "out"}/')
    assert tok.eot == 70_000 and data.data['train'].dtype == np.uint32 and 70_000 in data.data['train']
    assert sorted(sum(documents_of(tmp_path / 'out').values(), [])) == sorted(text for text in files.texts if text)


@pytest.fixture(scope='module')
def uncuttable(tmp_path_factory):
    """The path of a tokenizer.json like SentencePiece's, which puts a blank before each text."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    chars = sorted(set('▁'.join([*WORDS, ', ', '.\n', '。']).replace(' ', '▁')))
    tok = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(['</s>', *chars])}, merges=[]))
    tok.normalizer = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
    tok.decoder = decoders.Sequence([decoders.Replace('▁', ' '), decoders.Fuse(), decoders.Strip(' ', 1, 0)])
    tok.add_special_tokens(['</s>'])
    path = tmp_path_factory.mktemp('uncuttable') / 'tokenizer.json'
    path.write_text(tok.to_str(), encoding='utf-8')
    return str(path)


def test_a_tokenizer_whose_texts_must_not_be_cut_sees_them_whole(files, tmp_path, uncuttable):
    made, _ = build(tmp_path / 'out', files, uncuttable)
    assert made.eot == 0 and made.border is tokenizer.BLANK
    assert sorted(sum(documents_of(tmp_path / 'out').values(), [])) == sorted(text for text in files.texts if text)


def in_several_files(folder, n):
    """Make the files of a dataset as they were in older versions: n ids in each."""
    meta = json.loads((folder / 'meta.json').read_text())
    meta['files'] = {}
    for split in 'train', 'val':
        ids = np.fromfile(folder / f'{split}.bin', np.uint16)
        parts = np.split(ids, range(n, len(ids), n))
        meta['files'][split] = [len(part) for part in parts]
        if len(parts) > 1:
            (folder / f'{split}.bin').unlink()
            for i, part in enumerate(parts):
                part.tofile(folder / f'{split}-{i:05d}.bin')
    (folder / 'meta.json').write_text(json.dumps(meta))


def test_a_long_document_of_such_a_tokenizer_is_cut_at_blanks_and_has_the_ids_of_the_whole(tmp_path, uncuttable):
    texts = [prose(1, 20), ' '.join(prose(2, 4000).split()), prose(3, 20)]
    path = tmp_path / 'x.jsonl'
    path.write_text(''.join(json.dumps({'text': text}) + '\n' for text in texts))
    tok, _ = build(tmp_path / 'out', [path], uncuttable, val_fraction=0.1)
    cut = Corpus([path], border=tokenizer.BLANK)
    assert len(list(cut.pieces(0))) > 5 and max(len(piece.text) for piece in cut.pieces(0)) <= 300
    ids = [i for split in Dataset(f'{tmp_path / "out"}/').data.values() for i in split.tolist()]
    assert ids == [i for text in texts for i in tok.encode_document(text).tolist()]


def test_several_files_read_as_one(files, tmp_path, bpe_path):
    build(tmp_path / 'one', files, bpe_path)
    build(tmp_path / 'many', files, bpe_path)
    in_several_files(tmp_path / 'many', 500)
    one, many = (Dataset(f'{tmp_path / name}/') for name in ('one', 'many'))
    assert (tmp_path / 'many' / 'train-00003.bin').stat().st_size == 1000
    assert not (tmp_path / 'many' / 'train.bin').exists()
    for split in 'train', 'val':
        ids = one.data[split]
        assert len(many.data[split]) == len(ids) and np.array_equal(many.data[split][:], ids)
        assert many.data[split].max() == ids.max()
        for a, b in ((0, 10), (480, 1020), (499, 500), (500, 501), (0, len(ids)), (7, 7), (len(ids) - 3, len(ids) + 9)):
            assert np.array_equal(many.data[split][a:b], ids[a:b])
    many.validate_ids(64, 400)
    for step in range(20):
        a, b = (data.train_batch(step, 7, 2, 8, 64, dataset_device()) for data in (one, many))
        assert all(x.equal(y) for x, y in zip(a, b))
    for i in range(3):
        assert one.eval_batch('val', i, 3, 8, 64, dataset_device())[0].equal(
            many.eval_batch('val', i, 3, 8, 64, dataset_device())[0])


def dataset_device():
    import torch
    return torch.device('cpu')


def test_a_dataset_of_several_files_is_replaced_and_nothing_else(files, tmp_path, bpe_path):
    build(tmp_path / 'fresh', files, bpe_path)
    build(tmp_path / 'out', files, bpe_path)
    in_several_files(tmp_path / 'out', 500)
    (tmp_path / 'out' / 'train-notes.txt').write_text('mine')
    (tmp_path / 'out' / 'train-00000.bin.new').write_text('left by an older version')
    build(tmp_path / 'out', files, bpe_path)
    (tmp_path / 'out' / 'train-notes.txt').unlink()
    assert content(tmp_path / 'out') == content(tmp_path / 'fresh')


@pytest.mark.parametrize('damage, words', [
    (lambda path: path.unlink(), 'is missing'),
    (lambda path: path.write_bytes(path.read_bytes()[:-2]), 'meta.json says'),
], ids=['missing', 'shorter'])
def test_a_damaged_file_of_several_is_named(files, tmp_path, bpe_path, damage, words):
    build(tmp_path / 'out', files, bpe_path)
    in_several_files(tmp_path / 'out', 500)
    damage(tmp_path / 'out' / 'train-00002.bin')
    with pytest.raises(UserError, match=f'train-00002.bin .*{words}'):
        Dataset(f'{tmp_path / "out"}/')


# ---------------------------------------------------------------------------------------------------------------------
# interruptions

class Killed(BaseException):
    pass


def killed_at(n, monkeypatch):
    """From now on the n-th writing, syncing or renaming is not done, nor anything after it."""
    count = [0]

    def dying(real, *also):
        def call(*args, **more):
            count[0] += 1
            if count[0] >= n:
                raise Killed
            return real(*args, **more)
        return call

    for name in 'replace', 'fsync':
        monkeypatch.setattr(os, name, dying(getattr(os, name)))
    monkeypatch.setattr(dataset.Writer, 'append', dying(dataset.Writer.append))


@pytest.mark.parametrize('kind', ['many', pytest.param('one', marks=pytest.mark.full)])
def test_killed_anywhere_and_run_again_it_ends_with_the_same_bytes(files, tmp_path, kind, monkeypatch):
    for module in corpus, ingest:
        monkeypatch.setattr(module, 'PIECE', 4000)
    how = {'save_bytes': 9000, 'threads': 1}
    if kind == 'one':
        (tmp_path / 'x.txt').write_text(prose(3, 300), encoding='utf-8')
        files, how = [tmp_path / 'x.txt'], {'spec': 'bpe:270', 'threads': 1}
    build(tmp_path / 'undisturbed', files, **how)
    expected, folder, points = content(tmp_path / 'undisturbed'), tmp_path / 'out', 0
    for n in range(1, 10**6, 1 if kind == 'one' else 2):
        with pytest.MonkeyPatch.context() as patch:
            killed_at(n, patch)
            try:
                build(folder, files, **how)
                break
            except Killed:
                points += 1
        if (folder / dataset.RESUME).exists():
            for split in 'train', 'val':   # what had been written after the last commit, or half of it
                for path in sorted(folder.glob(f'{split}*.new'))[-1:]:
                    path.write_bytes(path.read_bytes() + b'\7' * 5)
        build(folder, files, **how)
        assert content(folder) == expected, n
        shutil.rmtree(folder)
    assert points > 8, points


@pytest.mark.parametrize('kind', ['char', pytest.param('whole', marks=pytest.mark.full)])
def test_killed_within_a_long_document_it_goes_on_there_with_the_same_bytes(tmp_path, kind, uncuttable, monkeypatch):
    texts = [prose(1, 20), prose(2, 500), prose(2, 500), prose(3, 500), prose(4, 20)]   # one of them twice
    path = tmp_path / 'x.jsonl'
    path.write_text(''.join(json.dumps({'text': text}) + '\n' for text in texts))
    how = {'spec': 'char' if kind == 'char' else uncuttable, 'save_bytes': 700, 'deduplicate': True, 'threads': 1}
    build(tmp_path / 'undisturbed', [path], **how)
    inside, folder, of = 0, tmp_path / 'out', Corpus([path])
    of.border = tokenizer.BORDER if kind == 'char' else tokenizer.BLANK
    of.duplicates = ingest.find_duplicates(of)
    pieces = list(of.pieces(0))
    for n in range(5, 10**6, 5):
        with pytest.MonkeyPatch.context() as patch:
            killed_at(n, patch)
            try:
                build(folder, [path], **how)
                break
            except Killed:
                pass
        if (folder / dataset.RESUME).exists():
            done = json.loads((folder / dataset.RESUME).read_bytes())['state']['pieces']
            inside += 0 < done and not pieces[done - 1].last
        build(folder, [path], **how)
        assert content(folder) == content(tmp_path / 'undisturbed'), n
        shutil.rmtree(folder)
    assert inside > 3


def test_it_goes_on_and_does_not_begin_again(files, tmp_path, bpe_path, monkeypatch, capsys):
    appended = []
    real = dataset.Writer.append
    monkeypatch.setattr(dataset.Writer, 'append', lambda self, split, ids: (appended.append(len(ids)),
                                                                           real(self, split, ids)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus.Corpus, 'rows', lambda *args: (_ for _ in ()).throw(Killed()))   # at the last file
        with pytest.raises(Killed):
            build(tmp_path / 'out', files, bpe_path, save_bytes=500, val_fraction=0.5)
    with pytest.raises(UserError, match="unfinished: run the command that makes it again"):
        Dataset(f'{tmp_path / "out"}/')
    before, appended[:] = sum(appended), []
    build(tmp_path / 'out', files, bpe_path, save_bytes=500, val_fraction=0.5)
    total = sum(json.loads((tmp_path / 'out' / 'meta.json').read_text())['tokens'].values())
    assert total - 600 < before + sum(appended) - 500 < total + 600 and before > total / 3
    assert 'continuing' in capsys.readouterr().err


@pytest.mark.parametrize('change', [{'seed': 2}, {'spec': 'bpe:280'}, 'touched', *(
    pytest.param(change, marks=pytest.mark.full) for change in (
        {'val_fraction': 0.2}, {'deduplicate': True}))], ids=str)
def test_what_was_begun_with_other_options_or_other_files_is_begun_anew(files, tmp_path, change):
    how = {'spec': 'bpe:270'}
    with pytest.MonkeyPatch.context() as patch:
        killed_at(12, patch)
        with pytest.raises(Killed):
            build(tmp_path / 'out', files, **how)
    if change == 'touched':
        (files.paths[0]).write_text('another text', encoding='utf-8')
        change = {}
    build(tmp_path / 'out', files, **{**how, **change})
    build(tmp_path / 'fresh', files, **{**how, **change})
    assert content(tmp_path / 'out') == content(tmp_path / 'fresh')


def killed_behind(n, monkeypatch):
    """From now on a process is killed behind the commit by which there are n tokens."""
    commit = dataset.Writer.commit

    def dying(self, *args):
        commit(self, *args)
        if sum(self.num_tokens.values()) >= n:
            raise Killed

    monkeypatch.setattr(dataset.Writer, 'commit', dying)


@pytest.mark.parametrize('changed', ['file', 'tokenizer'])
def test_what_was_begun_with_other_content_under_the_same_name_is_begun_anew(files, tmp_path, bpe, changed):
    path, first = tmp_path / 'tokenizer.json', files.paths[0]
    path.write_text(bpe.json, encoding='utf-8')
    with pytest.MonkeyPatch.context() as patch:
        killed_behind(500, patch)
        with pytest.raises(Killed):
            build(tmp_path / 'out', files.paths[:2], str(path), save_bytes=10_000)
    size, before = first.stat().st_size, first.stat().st_mtime_ns
    if changed == 'file':
        first.write_bytes(first.read_bytes().swapcase())
        os.utime(first, ns=(before + 10**9, before + 10**9))   # whatever the steps of the clock are
    else:
        path.write_text(BpeTokenizer.train([prose(1, 200)], 300).json, encoding='utf-8')
    assert first.stat().st_size == size
    build(tmp_path / 'out', files.paths[:2], str(path), save_bytes=10_000)
    build(tmp_path / 'fresh', files.paths[:2], str(path), save_bytes=10_000)
    assert content(tmp_path / 'out') == content(tmp_path / 'fresh')


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(files, tmp_path, monkeypatch):
    build(tmp_path / 'undisturbed', files)
    real, calls = os.fsync, []

    def full(f):
        calls.append(f)
        if len(calls) == 9:
            raise OSError(28, 'No space left on device')
        real(f)

    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(UserError, match=f'^cannot write the dataset {tmp_path / "out"}: No space left on device'):
        build(tmp_path / 'out', files)
    build(tmp_path / 'out', files)
    assert content(tmp_path / 'out') == content(tmp_path / 'undisturbed')


def test_a_disk_without_room_for_the_rest_is_refused_at_a_commit_and_the_same_command_continues(
        files, tmp_path, bpe_path, monkeypatch):
    build(tmp_path / 'whole', files, bpe_path)
    n_bytes = sum(path.stat().st_size for path in (tmp_path / 'whole').glob('*.bin'))
    free, asked, folder = [0], [], tmp_path / 'out'
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: SimpleNamespace(free=free[0]))
    words = r'about 0\.\d MB more are needed and 0\.0 MB are free: make room and run'
    with pytest.raises(UserError, match=words) as error:
        build(folder, files, bpe_path, threads=1, save_bytes=20_000)
    assert '\n' not in str(error.value) and json.loads((folder / dataset.RESUME).read_bytes())['state']['pieces'] > 0
    written = sum(path.stat().st_size for path in folder.glob('*.bin.new'))
    assert 0.1 * n_bytes < written < 0.9 * n_bytes
    check = ingest.check_disk_space
    monkeypatch.setattr(ingest, 'check_disk_space', lambda writer, fraction: (asked.append(fraction),
                                                                              check(writer, fraction)))
    free[0] = n_bytes   # more than is needed now
    build(folder, files, bpe_path, threads=1)
    assert content(folder) == content(tmp_path / 'whole')
    assert asked == sorted(asked) and 0 < asked[0] < asked[-1] <= 1


@pytest.mark.parametrize('dtype, n, fraction, needed', [('<u2', 1_000_000, 0.5, 2e6), ('<u4', 1_000_000, 0.2, 16e6)])
def test_as_much_room_is_needed_as_the_rest_of_the_ids_takes(tmp_path, monkeypatch, dtype, n, fraction, needed):
    writer = SimpleNamespace(num_tokens={'train': n - 10, 'val': 10}, dtype=np.dtype(dtype), folder=tmp_path)
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: SimpleNamespace(free=1.01 * needed))
    ingest.check_disk_space(writer, fraction)
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: SimpleNamespace(free=0.99 * needed))
    with pytest.raises(UserError, match=f'about {needed / 1e6:.1f} MB more are needed'):
        ingest.check_disk_space(writer, fraction)


def test_two_processes_do_not_write_the_same_dataset(files, tmp_path):
    with dataset.open_writer(tmp_path / 'out'):
        with pytest.raises(UserError, match='another process is writing the dataset'):
            build(tmp_path / 'out', files)
    build(tmp_path / 'out', files)
    assert set(os.listdir(tmp_path / 'out')) == {'train.bin', 'val.bin', 'meta.json'}


# ---------------------------------------------------------------------------------------------------------------------
# too little

@pytest.mark.parametrize('text, spec, words', [
    ('', 'bpe', 'too little text: 0 tokens to train on and 0 for validation, .*; 1 documents are empty'),
    ('', 'char', 'too little text: 0 tokens to train on and 0 for validation'),
    ('a', 'bpe', 'too little text: 1 tokens to train on and 1 for validation'),   # the other one ends the text
    ('a', 'char', 'too little text: 0 tokens to train on and 1 for validation')])
def test_an_empty_file_and_one_of_one_token_are_refused(tmp_path, bpe_path, text, spec, words):
    (tmp_path / 'x.txt').write_text(text)
    with pytest.raises(UserError, match=words):
        build(tmp_path / 'out', [tmp_path / 'x.txt'], 'char' if spec == 'char' else bpe_path)
    assert not (tmp_path / 'out').exists()


def test_a_refusal_before_anything_is_written_leaves_nothing_and_a_later_one_what_can_be_continued(tmp_path, bpe_path):
    path = tmp_path / 'x.jsonl'
    lines = [json.dumps({'text': prose(i, 60)}) for i in range(60)]
    for bad, left in (0, []), (59, ['resume.json', 'train.bin.new', 'val.bin.new']):
        path.write_text('\n'.join([*lines[:bad], '{}', *lines[bad:]]))
        with pytest.raises(UserError, match='expected a text'):
            build(tmp_path / 'out', [path], bpe_path, threads=1, save_bytes=500)
        assert sorted(path.name for path in tmp_path.glob('out/*')) == left
        assert (tmp_path / 'out').exists() == bool(left)


def test_of_equal_documents_some_are_for_validation(tmp_path, bpe_path):
    path = tmp_path / 'x.jsonl'
    path.write_text('{"text": "the same"}\n' * 30)
    build(tmp_path / 'out', [path], bpe_path, val_fraction=0.1)
    assert documents_of(tmp_path / 'out') == {'train': ['the same'] * 27, 'val': ['the same'] * 3}


def test_a_wrong_tokenizer_is_refused_before_a_word_is_read(files, tmp_path, monkeypatch):
    monkeypatch.setattr(Corpus, 'pieces', lambda *args: pytest.fail('it reads'))
    for spec in 'bpe:many', 'bpe:99', 'bpe:99999999999', 'gpt5', 'nothing.json':
        with pytest.raises(UserError, match=spec):
            build(tmp_path / 'out', files, spec, deduplicate=True)


def test_a_tokenizer_json_goes_with_its_dataset(files, tmp_path, bpe_path):
    build(tmp_path / 'out', files, bpe_path)
    assert (tmp_path / 'out' / 'tokenizer.json').read_bytes() == dataset.Path(bpe_path).read_bytes()
    build(tmp_path / 'out', files, 'char')
    assert set(os.listdir(tmp_path / 'out')) == {'train.bin', 'val.bin', 'meta.json'}


def test_a_folder_that_cannot_be_made_is_refused(files):
    folder = files.paths[0] / 'x'   # in a file
    with pytest.raises(UserError, match=f'cannot write the dataset {folder}: Not a directory'):
        build(folder, files)


# ---------------------------------------------------------------------------------------------------------------------
# vocabularies

def test_names_of_special_tokens_in_a_text_are_these_tokens_whatever_pieces_it_is_cut_into(tmp_path):
    path = tmp_path / 'x.jsonl'
    texts = [f'<|user|>how are you {i}?\n<|bot|>fine {i}\n' * (1 + 200 * (i % 5 == 0)) for i in range(20)]
    path.write_text(''.join(json.dumps({'text': text}) + '\n' for text in texts))
    tok, _ = build(tmp_path / 'out', [path], 'bpe:300', special=('<|user|>', '<|bot|>'))
    ids = np.concatenate([*Dataset(f'{tmp_path / "out"}/').data.values()])
    for name in '<|user|>', '<|bot|>':
        (i,) = tok.encode_prompt(name)
        assert (ids == i).sum() == ''.join(texts).count(name)


@pytest.mark.parametrize('text, weight', [('abcdefghi ' * 20, 200), ('你好世界' * 50, 101 * 200)])
def test_a_vocabulary_is_trained_on_an_even_sample_that_needs_no_more_memory_than_allowed(
        tmp_path, monkeypatch, text, weight):
    path = tmp_path / 'x.jsonl'
    path.write_text(''.join(json.dumps({'text': text + f'{i:03}'}) + '\n' for i in range(500)))
    drawn = []
    monkeypatch.setattr(tokenizer, 'load', lambda spec, texts, *args: drawn.append([*texts]) or CharTokenizer('a'))
    for seed in 1, 2:
        ingest.make_tokenizer(Corpus([path]), ingest.Options('bpe:300', seed=seed, train_mb=(weight + 3) * 100 / 1e6))
    assert all(60 < len(texts) < 140 for texts in drawn) and drawn[0] != drawn[1]


def test_characters_that_the_tokenizer_lacks_are_counted_and_no_faults(tmp_path):
    from tokenizers import Tokenizer, models
    Tokenizer(models.BPE({char: i for i, char in enumerate('ab \n')}, [])).save(str(tmp_path / 'tokenizer.json'))
    path = tmp_path / 'x.jsonl'
    path.write_text(''.join(json.dumps({'text': text}) + '\n' for text in ('ab é ' * 300, 'ab é', 'é')))   # long, short
    _, report = build(tmp_path / 'out', [path], str(tmp_path / 'tokenizer.json'), errors='skip')
    assert report['unknown'] == 302 and (report['repaired'], report['left_out'], report['faults']) == (0, 0, [])
    assert sum(report['tokens'].values()) == 1200 + 1 + 3   # with a line break


@pytest.mark.parametrize('size, short', [(5000, True), (260, False)])
def test_a_text_that_is_too_short_for_its_vocabulary_says_so(files, tmp_path, capsys, size, short):
    build(tmp_path / 'out', files, f'bpe:{size}')
    assert ('the text is too short for 5,000' in capsys.readouterr().err) == short


# ---------------------------------------------------------------------------------------------------------------------
# from the hub

@pytest.fixture
def shards(server, tmp_path):  # noqa: F811
    """A hub with a dataset of three files of forty documents each; the server, the files {path: bytes}, the texts."""
    files, texts = {}, []
    for i in range(3):
        rows = [prose(100 * i + j, 30) for j in range(40)]
        files[f'sample/{i}.parquet'] = parquet(tmp_path, text=rows)
        texts += rows
    server.repos['some/data'] = files
    return SimpleNamespace(server=server, files=files, texts=texts)


def parquet(folder, **columns):
    """The bytes of a .parquet file."""
    pq.write_table(pa.table(columns), folder / 'x.parquet')
    return (folder / 'x.parquet').read_bytes()


def from_hub(folder, spec, shards=None, **how):
    config = {**defaults_of('data/fineweb/prepare.py'), 'repo': 'some/data', 'path': 'sample', 'shards': shards,
              'tokenizer': spec, 'val_fraction': 0.3, **how}
    ingest.build_from_hub(folder, config)


def test_shards_of_the_hub_become_a_dataset_and_are_removed(shards, tmp_path, bpe_path):
    from_hub(tmp_path / 'out', bpe_path)
    assert set(os.listdir(tmp_path / 'out')) == {'train.bin', 'val.bin', 'meta.json', 'tokenizer.json'}
    found = documents_of(tmp_path / 'out')
    assert sorted(found['train'] + found['val']) == sorted(shards.texts) and 20 < len(found['val']) < 55
    assert sorted(shards.server.downloads()) == sorted(shards.files)
    from_hub(tmp_path / 'first', bpe_path, shards=1)
    found = documents_of(tmp_path / 'first')
    assert sorted(found['train'] + found['val']) == sorted(shards.texts[:40])


def test_a_file_of_another_revision_is_not_read(shards, tmp_path, bpe_path):
    from_hub(tmp_path / 'undisturbed', bpe_path)
    stale = tmp_path / 'out' / 'shards' / 'sample' / '1.parquet'
    stale.parent.mkdir(parents=True)
    stale.write_bytes(parquet(tmp_path, text=['another revision']))
    from_hub(tmp_path / 'out', bpe_path)
    assert content(tmp_path / 'out') == content(tmp_path / 'undisturbed')


def test_the_next_shard_and_no_other_is_on_its_way_while_one_is_read(shards, tmp_path, bpe_path, monkeypatch):
    asked, real, fetcher = [threading.Event() for _ in range(3)], hub.dataset_file, ingest.fetcher

    def download(repo, revision, file, folder):
        asked[int(file['path'][len('sample/')])].set()
        return real(repo, revision, file, folder)

    def watched(folder, *args):
        fetch = fetcher(folder, *args)

        def fetched(i):
            path = fetch(i)
            assert i == 2 or asked[i + 1].wait(5)
            assert not any(event.is_set() for event in asked[i + 2:])
            assert (folder / 'sample' / '0.parquet').exists() == (i < 2)
            return path
        return fetched

    monkeypatch.setattr(hub, 'dataset_file', download)
    monkeypatch.setattr(ingest, 'fetcher', watched)
    from_hub(tmp_path / 'out', bpe_path)
    assert all(event.is_set() for event in asked)


@pytest.mark.parametrize('fault, words', [('gone', 'cannot get .*some/data'), ('other content', 'the sha256 is not'),
                                          ('column', "has no column 'text'")])
def test_a_shard_that_cannot_be_had_is_one_line_and_the_command_goes_on_there(
        shards, tmp_path, bpe_path, monkeypatch, fault, words):
    from_hub(tmp_path / 'undisturbed', bpe_path)
    good = shards.files['sample/1.parquet']
    listed = hub.dataset_files('some/data', 'sample')
    if fault == 'gone':
        del shards.files['sample/1.parquet']
    elif fault == 'column':
        shards.files['sample/1.parquet'] = parquet(tmp_path, body=['x'])
        listed = hub.dataset_files('some/data', 'sample')
    else:
        shards.files['sample/1.parquet'] = good[:-1] + b'x'
    monkeypatch.setattr(hub, 'dataset_files', lambda *args: listed)
    with pytest.raises(UserError, match=words) as refusal:
        from_hub(tmp_path / 'out', bpe_path)
    assert '\n' not in str(refusal.value)
    if fault == 'column':
        return
    shards.files['sample/1.parquet'] = good
    shards.server.asked.clear()
    from_hub(tmp_path / 'out', bpe_path)
    assert content(tmp_path / 'out') == content(tmp_path / 'undisturbed')
    assert 'sample/0.parquet' not in shards.server.downloads()   # that one was done


@pytest.mark.full
def test_killed_anywhere_it_ends_with_the_same_bytes_from_the_hub_too(shards, tmp_path, bpe_path):
    from_hub(tmp_path / 'undisturbed', bpe_path, threads=1)
    expected, folder = content(tmp_path / 'undisturbed'), tmp_path / 'out'
    for n in range(1, 10**6, 7):
        with pytest.MonkeyPatch.context() as patch:
            killed_at(n, patch)
            try:
                from_hub(folder, bpe_path, threads=1)
                break
            except Killed:
                pass
        from_hub(folder, bpe_path, threads=1)
        assert content(folder) == expected, n
        shutil.rmtree(folder)
    assert n > 15
