"""
Folders of Hugging Face, both ways, and models on its hub: weights, configuration, tokenizer, special tokens.
"""

import contextlib
import json
import re
import shutil
import sys
from pathlib import Path

import torch

from flatgpt import encodings, hub, tokenizer
from flatgpt.architectures import BUFFERS, config_from_hf, config_to_hf, weights_from_hf, weights_to_hf
from flatgpt.errors import UserError
from model import GPT, GPTConfig

# Files that are met where weights are expected, by their first bytes
SIGNS = {
    b'version https://git-lfs': 'it is a pointer of Git LFS: run `git lfs pull` in its folder',
    b'GGUF': 'it is a GGUF file: give the folder, or the name on the hub, of the model that it was made from',
    (20240326).to_bytes(4, 'little'): "it is a model of llm.c: convert it with llm.c's dev/eval/export_hf.py, and give "
                                      "that folder",
    b'<': 'it is a web page: download it again',
}
WRAPPERS = r'^(_orig_mod\.|module\.|base_model\.model\.)+'   # prefixes of names: torch.compile, DDP, PEFT
SMALL_FILES = '*.json', 'merges.txt', 'chat_template.jinja'   # of a repository: all but its weights
KEPT_FILES = 'tokenizer_config.json', 'special_tokens_map.json', 'generation_config.json'   # which save() writes back
USUAL_ENDS = tokenizer.EOT, '<|end_of_text|>', '</s>', '<eos>', '<|im_end|>', '<|eot_id|>'


# ---------------------------------------------------------------------------------------------------------------------
# folders

def fetch(name: str) -> Path:
    """The folder, in the cache, of a model on the hub, with all that load() reads. Raises UserError."""
    folder = fetch_config(name)
    config_from_hf(read_json(folder / 'config.json'), name)   # before weights of an unknown kind are downloaded
    folder = hub.snapshot(name, *SMALL_FILES, 'model.safetensors', 'model-*.safetensors')
    return folder if list(folder.glob('*.safetensors')) else hub.snapshot(name, *SMALL_FILES, 'pytorch_model*.bin')


def fetch_config(name: str) -> Path:
    """The folder, in the cache, of a model on the hub, with its configuration and tokenizer. Raises UserError."""
    folder = hub.snapshot(name, *SMALL_FILES)
    if not (folder / 'config.json').exists():
        raise UserError(f'{name} has no config.json: expected a model')
    return folder


def load(folder: Path) -> dict:
    """A checkpoint, as checkpoint.load() gives it, from a folder: weights, configuration, tokenizer if it has one."""
    hf_config = read_json(folder / 'config.json')
    fields = config_from_hf(hf_config, folder)
    hf_tensors = read_weights(folder)
    if not fields['tie_weights'] and 'lm_head.weight' not in hf_tensors:
        print(f'{folder} has no lm_head.weight: the embedding is the head, too', file=sys.stderr)
        fields['tie_weights'] = True
    config = GPTConfig(**fields)
    ckpt = {'model': weights_from_hf(hf_tensors, config, hf_config['model_type'], folder),
            'model_args': config.to_dict()}
    tok = tokenizer_in(folder)
    return {**ckpt, 'tokenizer': tok.to_dict()} if tok else ckpt


def read_json(path: Path) -> dict:
    """The content of a JSON file that holds an object. Raises UserError."""
    try:
        content = json.loads(path.read_text(encoding='utf-8-sig'))   # with or without a byte order mark
    except (OSError, ValueError) as error:
        raise UserError(f'cannot read {path}: {getattr(error, "strerror", None) or error}') from None
    if not isinstance(content, dict):
        raise UserError(f'cannot read {path}: expected a JSON object')
    return content


def read_weights(folder: Path) -> dict:
    """All tensors, {name: tensor}, of model.safetensors or pytorch_model.bin, in one file or in those that an index
    names; names without the prefixes of wrappers. Raises UserError."""
    for name in ('model.safetensors', 'pytorch_model.bin'):
        index = folder / f'{name}.index.json'
        if (folder / name).exists():
            files = [name]
            break
        if index.exists():
            named = read_json(index).get('weight_map')
            files = sorted(set(map(str, named.values()))) if isinstance(named, dict) else []
            if not files or not all(re.fullmatch(r'[\w.-]+\.(safetensors|bin)', file) for file in files):
                raise UserError(f'{index} names {files[:1] or "no file"}: expected files of weights')
            break
    else:
        raise UserError(f'{folder} has no weights: expected model.safetensors or pytorch_model.bin')
    tensors = {}
    for file in files:
        tensors |= read_tensors(folder / file)
    return {re.sub(WRAPPERS, '', name).replace('.base_layer.', '.'): tensor for name, tensor in tensors.items()}


def read_tensors(path: Path) -> dict:
    """The tensors, {name: tensor}, in a .safetensors file or a pickled state_dict. Nothing in it is executed. Raises
    UserError."""
    from safetensors.torch import load_file

    try:
        if path.suffix == '.safetensors':
            tensors = load_file(path)
        else:
            tensors = torch.load(path, map_location='cpu', weights_only=True)
    except FileNotFoundError:
        raise UserError(f'{path.parent} has no {path.name}: it is not complete') from None
    except Exception as error:   # a damaged or hostile file may raise anything
        raise UserError(f'cannot read {path}: {describe_file(path, error)}') from None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise UserError(f'cannot read {path}: it is no state_dict, names of parameters with their tensors')
    wrong = [name for name, tensor in tensors.items() if not tensor.is_floating_point()
             and not re.search(BUFFERS, name)]
    if wrong:
        raise UserError(f'{path}: {wrong[0]} has type {tensors[wrong[0]].dtype}, quantized weights are not read: get '
                        f'the model in 16 or 32 bits')
    return tensors


def describe_file(path: Path, error: Exception) -> str:
    """What a file is that could not be read, and what helps."""
    start = b''
    with contextlib.suppress(OSError, ValueError), open(path, 'rb') as f:
        start = f.read(32)
    for sign, words in SIGNS.items():
        if start.startswith(sign):
            return words
    code = re.search(r'GLOBAL ([\w.]+)', str(error))
    if code:
        return f'it carries code ({code[1]}), which is not run'
    return 'it is cut off, damaged or not a file of weights: get it again'


def save(folder: Path, model: GPT, architecture: str, dtype: torch.dtype, tok: tokenizer.Tokenizer):
    """Write a folder that transformers loads: config.json, generation_config.json, model.safetensors in dtype, and the
    tokenizer."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    tensors = {name: tensor.to(dtype) for name, tensor in weights_to_hf(model, architecture).items()}
    save_file(tensors, folder / 'model.safetensors', metadata={'format': 'pt'})   # which transformers asks for
    # the special tokens have the roles that they had in the model that this one comes from, no others
    ends = list(tok.ends) if len(tok.ends) > 1 else tok.eot
    roles = {'bos_token_id': None, 'eos_token_id': ends}
    names = {} if tok.eot is None else {'eos_token': tok.token_bytes(tok.eot).decode()}
    files = {'generation_config.json': {'eos_token_id': ends}, 'tokenizer_config.json': {
        'tokenizer_class': 'PreTrainedTokenizerFast', 'clean_up_tokenization_spaces': False,
        'model_max_length': model.config.block_size, **names}}
    if 'config.json' in tok.files:
        files = tok.files
        roles |= files['config.json']
    elif tok.files:   # of a chat model from scratch
        tokenizer_config = files['tokenizer_config.json'] | tok.files['tokenizer_config.json']
        files = {**files, **tok.files, 'tokenizer_config.json': tokenizer_config}
    write_json(folder / 'config.json', config_to_hf(model.config, architecture, dtype, roles))
    shutil.copymode(folder / 'config.json', folder / 'model.safetensors')
    (folder / 'tokenizer.json').write_text(tokenizer_json(tok), encoding='utf-8')
    for name in files.keys() & set(KEPT_FILES):
        write_json(folder / name, {key: value for key, value in files[name].items() if key != 'auto_map'})
    if 'chat_template.jinja' in files:
        (folder / 'chat_template.jinja').write_text(files['chat_template.jinja'], encoding='utf-8')


def write_json(path: Path, content: dict):
    """Write a dictionary as a JSON file that a person can read."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + '\n', encoding='utf-8')


# ---------------------------------------------------------------------------------------------------------------------
# tokenizers

def tokenizer_in(folder: Path) -> tokenizer.BpeTokenizer | None:
    """The tokenizer in a folder: tokenizer.json, or GPT-2's vocab.json with merges.txt, with the tokens that other
    files add, and with end_tokens(). None if there is none. Raises UserError."""
    files = {name: read_json(folder / name) for name in (*KEPT_FILES, 'added_tokens.json', 'config.json')
             if (folder / name).exists()}
    if (folder / 'tokenizer.json').exists():
        tok = tokenizer.BpeTokenizer(tokenizer.read_text(folder / 'tokenizer.json'))
    elif (folder / 'vocab.json').exists() and (folder / 'merges.txt').exists():
        tok = tokenizer.BpeTokenizer(encodings.of_files(folder / 'vocab.json', folder / 'merges.txt'))
    elif (folder / 'tokenizer.model').exists():
        raise UserError(f'{folder} has its tokenizer in tokenizer.model alone: write tokenizer.json once, with '
                        f'AutoTokenizer.from_pretrained(folder).save_pretrained(folder) of transformers')
    else:
        return None
    tok = with_added_tokens(tok, files, folder)
    tok = without_tokens_from(files.get('config.json', {}).get('vocab_size'), tok, folder)
    ends = end_tokens(files, tok.encoding.get_vocab(with_added_tokens=True), folder)
    if ends:
        tok.eot, tok.ends = ends[0], ends
    if tok.eot is None:
        print(f'{folder} names no token that ends a text: samples go on to their last token', file=sys.stderr)
    tok.files = {name: files[name] for name in KEPT_FILES if name in files}
    tok.files['config.json'] = {name: value for name, value in files.get('config.json', {}).items()
                                if name.endswith('_token_id')}
    if (folder / 'chat_template.jinja').exists():
        tok.files['chat_template.jinja'] = tokenizer.read_text(folder / 'chat_template.jinja')
    return tok


def with_added_tokens(tok, files, folder):
    """A tokenizer with the tokens, too, that are in added_tokens.json or tokenizer_config.json alone."""
    from tokenizers import AddedToken

    added = {name: (i, True) for name, i in files.get('added_tokens.json', {}).items()}
    for i, token in files.get('tokenizer_config.json', {}).get('added_tokens_decoder', {}).items():
        added[token['content']] = int(i), token.get('special', True)
    new = sorted((i, name, special) for name, (i, special) in added.items() if tok.encoding.token_to_id(name) is None)
    for i, name, special in new:
        tok.encoding.add_tokens([AddedToken(name, special=special, normalized=False)])
        if tok.encoding.token_to_id(name) != i:
            raise UserError(f'{folder}: the id {i} of the added token {name!r} does not follow those of the vocabulary')
    return tokenizer.BpeTokenizer(tok.encoding.to_str()) if new else tok


def without_tokens_from(size, tok, folder):
    """A tokenizer without the added tokens from the id `size` on, for which a model of so many tokens has no embedding:
    finetuning often adds a [PAD] so. A notice names them."""
    beyond = {i: name for i, name in tok.added.items() if isinstance(size, int) and i >= size}
    if not beyond:
        return tok
    print(f'{folder}: the model has {size:,} tokens, none for {", ".join(beyond.values())}: read as plain text',
          file=sys.stderr)
    description = json.loads(tok.encoding.to_str())
    description['added_tokens'] = [token for token in description['added_tokens'] if token['id'] not in beyond]
    return tokenizer.BpeTokenizer(json.dumps(description))


def end_tokens(files: dict, vocab: dict, folder) -> tuple[int, ...]:
    """The ids that end a text, first the one that documents end with: those that the files, {name: content}, of a
    folder name, or else one of the usual names. A notice tells when files disagree. vocab: {token: id}."""
    named = {}
    for file in (*KEPT_FILES, 'config.json'):
        content = files.get(file, {})
        ends = content.get('eos_token', content.get('eos_token_id'))
        ends = ends if isinstance(ends, list) else [ends]
        ends = [end.get('content') if isinstance(end, dict) else end for end in ends]   # an AddedToken
        ids = [vocab.get(end) if isinstance(end, str) else end for end in ends]
        named[file] = [i for i in ids if type(i) is int and i in vocab.values()]
    ends = tuple(dict.fromkeys(i for ids in named.values() for i in ids))
    if not any(set(ends) == set(ids) for ids in named.values()) and ends:
        listed = ', '.join(f'{file} has {ids}' for file, ids in named.items() if ids)
        print(f'{folder}: files disagree on what ends a text, {listed}: each of them ends a sample, a document ends '
              f'with {ends[0]}', file=sys.stderr)
    return ends or tuple(vocab[name] for name in USUAL_ENDS if name in vocab)[:1]


def tokenizer_json(tok):
    """The text of a tokenizer.json that encodes as one of our tokenizers does."""
    if isinstance(tok, tokenizer.BpeTokenizer):
        return tok.json
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    if isinstance(tok, tokenizer.CharTokenizer):   # pairs that are never merged
        encoding = Tokenizer(models.BPE({char: i for i, char in enumerate(tok.chars)}, []))
        encoding.decoder = decoders.Fuse()
        return encoding.to_str()
    shown = {byte: char for char, byte in encodings.byte_alphabet().items()}
    ranks = tok.parts['mergeable_ranks']
    special = tok.parts['special_tokens']
    vocab = {''.join(shown[byte] for byte in token): i for token, i in ranks.items()}
    pairs = [pair_of(token, ranks) for token in sorted(ranks, key=ranks.get) if len(token) > 1]
    merges = [tuple(''.join(shown[byte] for byte in part) for part in pair) for pair in pairs]
    encoding = Tokenizer(models.BPE({**vocab, **special}, merges, ignore_merges=True))
    pattern = re.sub(r'(\{[\d,]+\})\+', r'\1', tok.parts['pat_str'])   # {1,3}+ repeats a group in this library
    encoding.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), 'isolated'),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    encoding.decoder = decoders.ByteLevel()
    encoding.add_special_tokens(sorted(special, key=special.get))
    return encoding.to_str()


def pair_of(token, ranks):
    """The two tokens that a token, bytes, was merged from: what is left of its bytes when all that ranks lower, {token:
    rank}, has been merged."""
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:
        i = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], len(ranks)))
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts
