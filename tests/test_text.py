"""Your own text in one command, as a person gives it: prepared, trained on, sampled from, killed, refused."""

import gzip
import json
import os
import random
import shutil
import signal
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, SHARED, TINY, assert_one_line, needs, started
from in_process import call
from test_hub import server  # noqa: F401, a fixture
from test_ingest import content, prose, shards  # noqa: F401, a fixture

from flatgpt import dataset
from flatgpt.dataset import Dataset
from flatgpt.errors import UserError
from flatgpt.tokenizer import from_dict

PREPARE = 'data/text/prepare.py'
ZH = ['今天天气很好。', '我们去北京学习语言模型！', '你好，world！', '朋友们都说：好极了。', '他买了书，她读了。']


def chinese(n, seed=0):
    """Mixed Chinese and English."""
    generator = random.Random(seed)
    return ''.join(generator.choice(ZH) + generator.choice(['', '\n', 'The model learns Chinese. ']) for _ in range(n))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A folder with text of several kinds and languages."""
    folder = tmp_path_factory.mktemp('mine')
    (folder / 'zh.md').write_text(chinese(800), encoding='utf-8')
    (folder / 'en.txt').write_text(prose(1, 1500), encoding='utf-8')
    (folder / 'code.py').write_text((ROOT / 'model.py').read_text(encoding='utf-8'), encoding='utf-8')
    lines = ''.join(json.dumps({'text': prose(i, 40)}) + '\n' for i in range(60)).encode()
    (folder / 'l.jsonl.zst').write_bytes(pa.compress(lines, 'zstd', asbytes=True))
    (folder / 'm.txt.gz').write_bytes(gzip.compress('Grüße aus Köln. '.encode() * 100))
    pq.write_table(pa.table({'text': [chinese(5, i) for i in range(60)]}), folder / 'p.parquet')
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# from text to samples

def test_chinese_and_english_are_prepared_trained_on_and_sampled_from(folder, tmp_path):
    done = call(PREPARE, f'--input={folder}', '--name=./mine', '--tokenizer=bpe:400', '--val_fraction=0.2',
                '--special=<pad>,<bos>', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for words in ('mine:', 'train: ', 'val: ', 'vocabulary of 400', 'bytes per token', 'snippets:'):
        assert words in done.stdout
    assert ' MB/s' in done.stderr
    assert sorted(os.listdir(tmp_path / 'mine')) == ['meta.json', 'tokenizer.json', 'train.bin', 'val.bin']
    (tmp_path / 'tiny.py').write_text(TINY + "dataset = './mine'\nout_dir = 'out'\nmax_iters = 10\n")
    done = call('train.py', 'tiny.py', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    perplexity = done.stderr.strip().splitlines()[-1]
    assert ' per token, ' in perplexity and ' per byte, ' in perplexity and ' per character' in perplexity
    shutil.rmtree(tmp_path / 'mine')   # the tokenizer is in the checkpoint
    done = call('sample.py', '--out_dir=out', '--start=你好 world!', '--num_samples=1', '--max_new_tokens=20',
               '--device=cpu', cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith('你好 world!'), done.stderr


def test_a_name_is_a_folder_in_data_and_a_dataset_by_that_name(tmp_path, monkeypatch):
    project = tmp_path / 'project'
    for name in 'text', 'shakespeare':
        (project / 'data' / name).mkdir(parents=True)
        shutil.copy(ROOT / 'data' / name / 'prepare.py', project / 'data' / name)
    (tmp_path / 'x.txt').write_text('hello\n' * 100)

    done = call(project / PREPARE, '--input=x.txt', '--name=greeting', '--tokenizer=char', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(project / 'data' / 'greeting')) == ['meta.json', 'train.bin', 'val.bin']
    monkeypatch.setattr(dataset, '__file__', str(project / 'flatgpt' / 'dataset.py'))
    assert len(Dataset('greeting').data['train']) == 540
    for name in 'greetin', 'text':   # the latter has a prepare.py, and is no dataset all the same
        with pytest.raises(UserError) as refusal:
            Dataset(name)
        assert f'no dataset {name!r} in ' in str(refusal.value) and 'there are greeting, shakes' in str(refusal.value)
        assert f'python data/text/prepare.py --input=PATHS --name={name}' in str(refusal.value)
    done = call(project / PREPARE, '--input=x.txt', '--name=shakespeare', cwd=tmp_path)
    assert_one_line(done, 2, 'has a prepare.py of its own')


def test_poems_from_lists_in_json_end_where_poems_end(tmp_path):
    poems = [{'title': f'詩{i}', 'author': '李白', 'paragraphs': [f'床前明月光{i}，', '疑是地上霜。']}
             for i in range(60)]
    for i in range(3):
        (tmp_path / f'poet.{i}.json').write_text(json.dumps(poems[20 * i:20 * i + 20]))
    done = call(PREPARE, '--input=poet.*.json', '--name=./poems', '--tokenizer=bpe:300',
                r'--template={title} {author}\n{paragraphs}', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    data = Dataset(f'{tmp_path}/poems/')
    text = ''.join(from_dict(data.tokenizer).decode(ids) for ids in data.data.values())
    expected = [f'{poem["title"]} 李白\n' + '\n'.join(poem['paragraphs']) for poem in poems]
    assert sorted(text.split('<|endoftext|>')) == sorted([*expected, ''])
    done = call(PREPARE, '--input=poet.0.json', '--name=./poems', '--tokenizer=char', cwd=tmp_path)
    assert_one_line(done, 1, "poet.0.json, record 1: expected a text under 'text'; it has 'title', 'author'",
                    'give --field=NAME, --template=')


@pytest.mark.parametrize('spec, between', [('bpe:300', '<|endoftext|>'), ('char', '\n')])
def test_separators_in_a_text_end_documents(tmp_path, spec, between):
    stories = [f'story {i} of {i * i}\n' for i in range(50)]
    (tmp_path / 'x.txt').write_text('<|endoftext|>\n'.join(stories))
    done = call(PREPARE, '--input=x.txt', '--name=./x', f'--tokenizer={spec}', '--val_fraction=0.3', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    data = Dataset(f'{tmp_path}/x/')
    tok = from_dict(data.tokenizer)
    for ids in data.data.values():
        found = tok.decode(ids).removesuffix('<|endoftext|>').split(between + 'story')
        assert len(found) > 1 and {'story' + text.removeprefix('story') for text in found} <= {*stories}
    if tok.eot is not None:
        assert sum(int((ids == tok.eot).sum()) for ids in data.data.values()) == 50


def test_what_a_tokenizer_lacks_is_refused_and_with_errors_skip_counted(tmp_path):
    from tokenizers import Tokenizer, models
    Tokenizer(models.BPE({char: i for i, char in enumerate('ab \n')}, [])).save(str(tmp_path / 'tokenizer.json'))
    (tmp_path / 'x.txt').write_text('ab é世\n' * 30)
    args = [PREPARE, '--input=x.txt', '--name=./x', '--tokenizer=./tokenizer.json']
    assert_one_line(call(*args, cwd=tmp_path), 1, "x.txt has 2 characters that the tokenizer lacks, such as 'é世'",
                    'give another tokenizer, or --errors=skip')
    done = call(*args, '--errors=skip', cwd=tmp_path)
    assert done.returncode == 0 and '0 unreadable, 60 characters that the tokenizer lacks' in done.stdout
    assert sum(map(len, Dataset(f'{tmp_path}/x/').data.values())) == 4 * 30


# ---------------------------------------------------------------------------------------------------------------------
# looking at encodings

def test_encodings_are_shown_side_by_side(tmp_path):
    done = call(PREPARE, '--inspect=你好 a\n你', '--tokenizer=char', cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, '')
    assert done.stdout == 'char: 6 tokens, 2.00 bytes per token; vocabulary of 5\n你|好| |a|\\n|你\n'
    done = call(PREPARE, '--inspect=ab', '--tokenizer=char,char', '--color', cwd=tmp_path)
    assert done.stdout.count('\x1b[30;43ma\x1b[30;46mb\x1b[0m\n') == 2
    assert os.listdir(tmp_path) == []


@pytest.mark.full
@needs('gpt2_encoding')
def test_bytes_per_token_are_reported_beside_those_of_gpt2(folder, tmp_path):
    env = {'TIKTOKEN_CACHE_DIR': str(SHARED / 'tiktoken_cache')}
    done = call(PREPARE, f'--input={folder}/zh.md', '--name=./zh', '--tokenizer=bpe:500', '--compare=gpt2',
                cwd=tmp_path, **env)
    assert done.returncode == 0, done.stderr
    ratios = {line.split(': ')[0]: float(line.split()[1]) for line in done.stdout.splitlines()[-2:]}
    assert ratios['gpt2'] < 2.5 < 1.5 * ratios['gpt2'] < ratios['bpe:500']
    done = call(PREPARE, '--inspect=你好 world!', '--tokenizer=gpt2,./zh/tokenizer.json', cwd=tmp_path, **env)
    assert done.stdout.startswith('gpt2: 6 tokens, 2.17 bytes per token; vocabulary of 50,257\n')
    assert done.stdout.splitlines()[1] == r'\xe4\xbd|\xa0|\xe5\xa5|\xbd| world|!'


# ---------------------------------------------------------------------------------------------------------------------
# killed

def killed_and_run_again(tmp_path, instants, command):
    """Kill -9 at so many random instants, each time going on with what is left, and compare with an undisturbed run."""
    generator, whole, pieces = random.Random(instants), tmp_path / 'whole', tmp_path / 'pieces'
    with started(*command(whole), cwd=tmp_path) as process:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    killed = 0
    for _ in range(instants):
        with started(*command(pieces), cwd=tmp_path) as process:
            while process.poll() is None and not (pieces / 'resume.json').exists():
                time.sleep(0.01)
            time.sleep(generator.random() * 0.3)
            process.send_signal(signal.SIGKILL)
            killed += process.wait() == -signal.SIGKILL
        meta = pieces / 'meta.json'
        if meta.exists() and b'unfinished' not in meta.read_bytes():   # it was faster: once more from the beginning
            shutil.rmtree(pieces)
    with started(*command(pieces), cwd=tmp_path) as process:
        assert process.wait() == 0
    assert content(pieces) == content(whole)
    return killed


@pytest.fixture
def long(tmp_path):
    """Text that takes a while, and the command that prepares it, with many commits."""
    with open(tmp_path / 'x.jsonl', 'w', encoding='utf-8') as f:
        for i in range(1500):
            f.write(json.dumps({'text': prose(i % 50, 60) + str(i)}) + '\n')
    return lambda folder: [ROOT / PREPARE, '--input=x.jsonl', f'--name={folder}', '--tokenizer=bpe:300',
                           '--save_mb=0.01']


@pytest.mark.full
def test_killed_at_random_instants_and_run_again_it_ends_with_the_same_bytes(tmp_path, long):
    assert killed_and_run_again(tmp_path, 8, long) > 0


# ---------------------------------------------------------------------------------------------------------------------
# refused

FOUND = '--input=a.txt --name=./x '   # with which nothing else is wrong


@pytest.mark.parametrize('args, status, words', [
    ('--name=./x', 1, 'no input: give --input=PATHS'),
    ('--input=a.txt', 2, "name=''"), ('--input=a.txt --name=a+b', 2, "name='a+b'"),
    ('--input=nowhere --name=./x', 1, 'no file nowhere'),
    (FOUND + '--tokenizer=gpt5', 2, "tokenizer 'gpt5': expected 'char', 'bpe:5000'"),
    (FOUND + '--tokenizer=no.json', 1, 'cannot read no.json'),
    (FOUND + '--errors=ignore', 2, "errors='ignore': expected 'strict'"),
    (FOUND + '--val_fraction=1', 2, 'val_fraction=1.0: expected more than 0'),
    (FOUND + '--threads=0', 2, 'threads=0: expected more than 0'),
    (FOUND + f'--seed={10**70}', 2, 'expected less than 2^63'),
    (FOUND + '--save_mb=inf', 2, 'save_mb=inf: expected more than 0 and less than'),
    (FOUND + '--train_mb=nan', 2, 'train_mb=nan: expected more than 0'),
    (FOUND + '--min_frequency=99999999999999999999', 2, 'expected more than 0 and less'),
    (FOUND + '--color=red', 2, "color='red': expected 'auto', True or False"),
    ('--input=latin.txt --name=./x --tokenizer=char', 1, 'latin.txt is not UTF-8: byte 2 is 0xf6'),
    ('--input=a.txt --name=a.txt/x --tokenizer=char', 1, 'cannot write the dataset a.txt/x: Not a directory'),
    (FOUND + '--compare=gpt2,char', 2, "compare='gpt2,char': expected comma-separated tiktoken names"),
    (FOUND + '--tokenizer=char --compare=gpt5', 2, "tokenizer 'gpt5': expected"),
    ('--inspect=x --tokenizer=bpe:300', 2, 'give the tokenizer.json of a dataset made with it'),
])
def test_what_a_person_gets_wrong_is_one_line(tmp_path, args, status, words):
    (tmp_path / 'a.txt').write_text('some text\n' * 20)
    (tmp_path / 'latin.txt').write_bytes('Größe'.encode('latin-1'))
    done = call(PREPARE, *args.split(), cwd=tmp_path)
    assert_one_line(done, status, words)
    assert done.stdout == '' and not (tmp_path / 'x' / 'meta.json').exists()


@pytest.mark.full
def test_a_line_of_ten_megabytes_is_prepared(tmp_path):
    (tmp_path / 'x.jsonl').write_text(json.dumps({'text': 'word ' * 2_000_000}) + '\n')
    (tmp_path / 'y.txt').write_text('好' * 3_500_000, encoding='utf-8')
    done = call(PREPARE, '--input=x.jsonl,y.txt', '--name=./x', '--tokenizer=char', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sum(len(ids) for ids in Dataset(f'{tmp_path}/x/').data.values()) == 13_500_001   # with a line break


# ---------------------------------------------------------------------------------------------------------------------
# corpora of the hub

@pytest.mark.parametrize('name', ['openwebtext', 'fineweb'])
def test_a_corpus_of_the_hub_is_prepared_by_its_script(name, shards, tmp_path):  # noqa: F811
    from flatgpt.tokenizer import BpeTokenizer
    (tmp_path / 'tokenizer.json').write_text(BpeTokenizer.train(shards.texts, 300).json, encoding='utf-8')
    done = call(f'data/{name}/prepare.py', '--repo=some/data', '--path=sample', '--revision=main', '--name=./out',
                '--tokenizer=./tokenizer.json', '--val_fraction=0.2', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert '120' in str(sum(json.loads((tmp_path / 'out' / 'meta.json').read_text())['report']['documents'].values()))
    assert 'train: ' in done.stdout and set(os.listdir(tmp_path / 'out')) == {'train.bin', 'val.bin', 'meta.json',
                                                                            'tokenizer.json'}
    assert_one_line(call(f'data/{name}/prepare.py', '--name=./again', cwd=tmp_path), 1, 'that you can read')


@pytest.mark.parametrize('args, words', [(['--tokenizer=bpe:5000'], 'would be downloaded twice'),
                                         (['--val_fraction=0'], 'expected more than 0'), (['--shards=0'], 'shards=0')])
def test_options_that_a_corpus_of_the_hub_cannot_have_are_refused(args, words, tmp_path):
    assert_one_line(call('data/fineweb/prepare.py', *args, cwd=tmp_path), 2, words)
