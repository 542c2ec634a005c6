"""What is exported: transformers continues a text as we do, tokenizers agree, PEFT loads the adapter."""

import functools
import json
import math
import os

import pytest
import torch
from conftest import SHARED, assert_one_line, needs, run
from in_process import call
from safetensors.torch import load_file
from test_checkpoint import state_of

from flatgpt import architectures, checkpoint, encodings, lora, pretrained, tokenizer
from flatgpt.engine import generate
from flatgpt.tokenizer import BpeTokenizer, CharTokenizer, TiktokenTokenizer
from model import ARCHS, GPT, GPTConfig

TEXT = ''.join(f'{i} times {i % 7} makes {i * (i % 7)}. 你好，世界！\n' for i in range(600))
LORA = {'rank': 3, 'alpha': 6.0, 'dropout': 0.0, 'targets': 'attn|mlp'}
each = pytest.mark.parametrize('name', ['gpt2', 'llama', pytest.param('qwen3', marks=pytest.mark.full)])


def disturb(parameters):
    """Change parameters at random, so that all of them matter."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in parameters:
            p.add_(torch.randn_like(p), alpha=0.2)


@pytest.fixture(scope='module')
def models(tmp_path_factory):
    """{name: out_dir} of models of three shapes, with two kinds of tokenizer."""
    made = {}
    for name in ('gpt2', 'llama', 'qwen3'):
        tok = BpeTokenizer.train([TEXT], 300) if name == 'llama' else CharTokenizer.of(TEXT)
        model = GPT(GPTConfig(tok.vocab_size, 16, n_layer=2, n_embd=32, n_head=2, bias=False, **ARCHS[name]))
        disturb(model.parameters())
        made[name] = tmp_path_factory.mktemp(f'out-{name}')
        checkpoint.save(made[name] / 'best.pt', state_of(model, tokenizer=tok.to_dict()))
    return made


@pytest.fixture(scope='module')
def exported(models, tmp_path_factory):
    """A function of a name: (the folder that export.py makes, what was printed), once in a process of its own."""
    @functools.cache
    def of(name):
        folder = tmp_path_factory.mktemp('exported') / name
        done = (run if name == 'gpt2' else call)('export.py', f'--out_dir={models[name]}', f'--to={folder}')
        assert done.returncode == 0, done.stderr
        return folder, done
    return of


@pytest.fixture(scope='module')
def lora_run(models, tmp_path_factory):
    """{name: out_dir} of adapters for two of the models."""
    made = {}
    for name in ('gpt2', 'llama'):
        made[name] = tmp_path_factory.mktemp('lora')
        model, tok, _ = checkpoint.load_model(models[name])
        base = checkpoint.base_of(models[name], models[name] / 'best.pt', made[name])
        lora.put(model, **LORA)
        disturb(lora.adapters(model).values())
        state = state_of(model, tokenizer=tok.to_dict(), base=base, lora=LORA)
        checkpoint.save(made[name] / 'best.pt', {**state, 'model': lora.adapters(model)})
    return made


@pytest.fixture
def hugging_face():
    """transformers, which takes two seconds to import."""
    import transformers
    return transformers


@each
def test_their_pipeline_gives_the_same_greedy_text(models, exported, hugging_face, name):
    folder, done = exported(name)
    assert done.stdout == f'{folder}\n' and f'as {architectures.CLASSES[name]}, ' in done.stderr
    assert f'by transformers {hugging_face.__version__} too' in done.stderr and 'Traceback' not in done.stderr
    model, tok, _ = checkpoint.load_model(models[name])
    ids = torch.from_numpy(tok.encode('12 times 3').astype('int64'))[None]
    drawn = generate(model, ids[:, -6:], 8, temperature=0, vocab_size=tok.vocab_size)
    ours = tok.decode([int(token) for token, _ in drawn])
    pipe = hugging_face.pipeline('text-generation', model=str(folder), dtype=torch.float32, device='cpu')
    pipe.model.generation_config.max_length = None
    theirs = pipe(tok.decode(ids[0, -6:]), max_new_tokens=8, do_sample=False, return_full_text=False)
    assert theirs[0]['generated_text'] == ours


@each
def test_auto_tokenizer_gives_the_same_ids_and_the_text_back(models, exported, hugging_face, name):
    _, tok, _ = checkpoint.load_model(models[name])
    theirs = hugging_face.AutoTokenizer.from_pretrained(exported(name)[0])
    for text in (TEXT[:200], '  12 \n', '世界', ''):
        ids = tok.encode(text).tolist()
        assert theirs.encode(text, add_special_tokens=False) == ids and theirs.decode(ids) == text
    assert theirs.eos_token_id == tok.eot


@pytest.mark.full
def test_a_folder_of_ours_is_what_the_scripts_start_from(exported, tiny, trained, tmp_path):
    done = call('export.py', f'--out_dir={trained}', f'--to={tmp_path / "hf"}')
    assert done.returncode == 0, done.stderr
    done = run('sample.py', f'--init_from={tmp_path / "hf"}', '--num_samples=1', '--max_new_tokens=5', '--start=12')
    assert done.returncode == 0 and done.stdout.startswith('12') and 'pretrained; ' in done.stderr
    done = run('train.py', tiny, f'--init_from={tmp_path / "hf"}', f'--out_dir={tmp_path / "out"}', '--max_iters=2',
               '--block_size=8')
    assert done.returncode == 0, done.stderr
    assert checkpoint.load_model(tmp_path / 'out')[0].config.block_size == 8


def test_files_are_readable_by_whoever_may_read_the_folder(exported):
    modes = {path.name: oct(os.stat(path).st_mode & 0o777) for path in exported('gpt2')[0].iterdir()}
    assert len(set(modes.values())) == 1 and set(modes) == {
        'config.json', 'generation_config.json', 'model.safetensors', 'tokenizer.json', 'tokenizer_config.json'}


@pytest.mark.full
@needs('gpt2_encoding', 'shakespeare')
@pytest.mark.parametrize('special', [
    {'<|endoftext|>': 50256}, {'<|endoftext|>': 50256, '<|fim_prefix|>': 50300}], ids=['dense', 'gap'])
def test_tiktokens_encodings_become_the_same_tokenizer_json(special, monkeypatch):
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(SHARED / 'tiktoken_cache'))
    parts = {**encodings.tiktoken_parts('gpt2'), 'special_tokens': special}   # with a gap, as newer encodings have them
    tok = TiktokenTokenizer('gpt2', {name: part for name, part in parts.items() if name != 'explicit_n_vocab'})
    again = BpeTokenizer(pretrained.tokenizer_json(tok))
    assert again.eot == tok.eot and again.vocab_size == tok.vocab_size
    assert all(again.token_bytes(i) == tok.token_bytes(i) for i in range(tok.vocab_size))
    text = (SHARED / 'tinyshakespeare.txt').read_text(encoding='utf-8')[:100_000] + tokenizer.PROBE
    assert again.encode(text).tolist() == tok.encode(text).tolist()
    assert again.encode('a<|endoftext|>', special=True).tolist() == tok.encode('a<|endoftext|>', special=True).tolist()


@pytest.mark.parametrize('pattern', [encodings.GPT2_WORDS, r'\p{L}++|\p{N}{1,3}+|\s+', r'\p{N}{2}+|\p{L}{1,}+|.'])
def test_a_regex_of_tiktokens_cuts_the_same_words(pattern):
    """A possessive repetition, {1,3}+, is another thing in the other library."""
    ranks = {bytes([i]): i for i in range(256)} | {b'12': 256, b'34': 257, b'1234': 258, b'ab': 259}
    tok = TiktokenTokenizer('few', {'name': 'few', 'pat_str': pattern, 'mergeable_ranks': ranks,
                                    'special_tokens': {'<|endoftext|>': 260}})
    again = BpeTokenizer(pretrained.tokenizer_json(tok))
    for text in ('1234', '12 123412 ab', 'abab12341'):
        assert again.encode(text).tolist() == tok.encode(text).tolist()


# ---------------------------------------------------------------------------------------------------------------------
# adapters

@pytest.mark.parametrize('name', ['gpt2', 'llama'])
def test_an_adapter_loads_with_its_base_without_flags(models, lora_run, name):
    base, adapted = checkpoint.load_model(models[name])[0], checkpoint.load_model(lora_run[name])[0]
    assert adapted.state_dict().keys() == base.state_dict().keys()
    same = {key for key, p in base.state_dict().items() if torch.equal(p, adapted.state_dict()[key])}
    assert {'transformer.wte.weight', 'transformer.ln_f.weight'} <= same
    assert 'transformer.h.0.attn.c_attn.weight' not in same


@pytest.mark.filterwarnings('ignore:.*is_gradient_checkpointing:FutureWarning')   # peft about transformers
@pytest.mark.parametrize('name', ['gpt2', pytest.param('llama', marks=pytest.mark.full)])
def test_peft_loads_the_adapter_on_the_exported_base_and_agrees(exported, lora_run, tmp_path, hugging_face, name):
    from peft import PeftModel

    done = call('export.py', f'--out_dir={lora_run[name]}', f'--to={tmp_path / "adapter"}', '--adapter')
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / 'adapter').iterdir()} == {'adapter_config.json',
                                                                        'adapter_model.safetensors'}
    base = hugging_face.AutoModelForCausalLM.from_pretrained(exported(name)[0])
    theirs = PeftModel.from_pretrained(base, tmp_path / 'adapter').eval()
    ours, tok, _ = checkpoint.load_model(lora_run[name])
    ids = torch.randint(tok.vocab_size, (2, 16))
    with torch.inference_mode():
        plain = checkpoint.load_model(exported(name)[0])[0](ids, ids)[0]
        torch.testing.assert_close(theirs(ids).logits, ours(ids, ids)[0], rtol=0, atol=1e-4)
        assert (ours(ids, ids)[0] - plain).abs().max() > 0.01


def test_an_adapter_is_exported_merged_unless_asked_otherwise(lora_run, tmp_path):
    done = call('export.py', f'--out_dir={lora_run["gpt2"]}', f'--to={tmp_path / "merged"}')
    assert done.returncode == 0, done.stderr
    ours, again = checkpoint.load_model(lora_run['gpt2'])[0], checkpoint.load_model(tmp_path / 'merged')[0]
    assert torch.equal(ours.transformer.h[0].mlp.c_fc.weight, again.transformer.h[0].mlp.c_fc.weight)


def test_an_adapter_that_is_read_back_as_another_is_not_exported(lora_run, tmp_path, monkeypatch):
    theirs = lora.save_peft
    monkeypatch.setattr(lora, 'save_peft', lambda folder, model, architecture, description, base: theirs(
        folder, model, architecture, {**description, 'alpha': description['alpha'] * 1.01}, base))
    done = call('export.py', f'--out_dir={lora_run["gpt2"]}', f'--to={tmp_path / "new" / "er" / "x"}', '--adapter')
    assert_one_line(done, 1, 'the adapter that was read back is not that of', 'nothing was exported')
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# refusals

def test_usage(models, tmp_path):
    (tmp_path / 'there').mkdir()
    (tmp_path / 'there' / 'file').touch()
    where = f'--out_dir={models["gpt2"]}'
    assert_one_line(call('export.py', where, f'--to={tmp_path / "x"}', '--dtype=int8'), 2, "dtype='int8'", "'bfloat16'")
    assert_one_line(call('export.py', where, f'--to={tmp_path / "there"}'), 1, 'is there already')
    assert_one_line(call('export.py', where, f'--to={tmp_path / "x"}', '--adapter'), 1, 'is not an adapter')
    assert_one_line(call('export.py', where, f'--to={tmp_path / "there" / "file" / "x"}'), 1, 'cannot write')
    assert [path.name for path in tmp_path.iterdir()] == ['there']


def test_an_architecture_that_no_class_has_is_refused_and_leaves_nothing(tmp_path):
    (tmp_path / 'out').mkdir()
    model = GPT(GPTConfig(5, 8, n_layer=1, n_embd=8, n_head=2, **ARCHS['speedrun']))
    checkpoint.save(tmp_path / 'out' / 'best.pt', state_of(model))
    assert_one_line(call('export.py', f'--out_dir={tmp_path / "out"}', f'--to={tmp_path / "to"}'), 1, 'softcap=15.0')
    assert [path.name for path in tmp_path.iterdir()] == ['out']


@pytest.mark.parametrize('change', [1e-3, math.nan])
def test_what_cannot_be_read_back_is_not_exported(models, tmp_path, monkeypatch, change):
    def wrong(*args):
        tensors = theirs(*args)
        tensors['transformer.h.0.ln_1.weight'] = tensors['transformer.h.0.ln_1.weight'] + change
        return tensors

    theirs = pretrained.weights_to_hf
    monkeypatch.setattr(pretrained, 'weights_to_hf', wrong)
    done = call('export.py', f'--out_dir={models["gpt2"]}', f'--to={tmp_path / "new" / "er" / "to"}')
    assert_one_line(done, 1, 'the exported model does not give what', 'of their spread, most by', 'rounding explains',
                    'nothing was exported')
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_a_deep_model_is_exported_and_two_weights_exchanged_in_its_last_layer_are_found(tmp_path, monkeypatch, dtype):
    """Rounding is 1/30 of what is allowed, and the exchange 40 times as much."""
    def exchanged(*args):
        tensors = theirs(*args)
        matrix = tensors[last].clone()   # the model has the other
        tensors[last] = matrix
        matrix[0, :2] = matrix[0, :2].flip(0)
        return tensors

    theirs, last, tok = pretrained.weights_to_hf, 'model.layers.23.mlp.down_proj.weight', CharTokenizer.of(TEXT)
    model = GPT(GPTConfig(tok.vocab_size, 32, n_layer=24, n_embd=32, n_head=2, bias=False, **ARCHS['llama']))
    disturb(model.parameters())
    checkpoint.save(tmp_path / 'best.pt', state_of(model, tokenizer=tok.to_dict()))
    args = 'export.py', f'--out_dir={tmp_path}', f'--dtype={dtype}'
    done = call(*args, f'--to={tmp_path / "right"}')
    assert done.returncode == 0, done.stderr
    assert load_file(tmp_path / 'right' / 'model.safetensors')[last].dtype == getattr(torch, dtype)
    assert json.loads((tmp_path / 'right' / 'config.json').read_text())['dtype'] == dtype
    monkeypatch.setattr(pretrained, 'weights_to_hf', exchanged)
    assert_one_line(call(*args, f'--to={tmp_path / "wrong"}'), 1, 'the exported model does not give')
    assert {path.name for path in tmp_path.iterdir()} == {'best.pt', 'right'}


def test_a_tokenizer_that_splits_otherwise_is_not_exported(models, tmp_path, monkeypatch):
    other = BpeTokenizer.train(['other words ' * 30], 300)
    monkeypatch.setattr(pretrained, 'tokenizer_json', lambda tok: other.json)
    done = call('export.py', f'--out_dir={models["llama"]}', f'--to={tmp_path / "to"}')
    assert_one_line(done, 1, 'the exported model splits a text into other tokens', 'nothing was exported')
    assert not list(tmp_path.iterdir())
