"""
Folders of Hugging Face, both ways: config.json and GPTConfig, model.safetensors and our parameters, tokenizers.

The tables below give the names of Hugging Face, hf, for ours. They are read in both directions. An architecture is what
config.json calls model_type.
"""

import json
import re
import shutil
import sys
from pathlib import Path

import torch

from flatgpt import hub, tokenizer
from flatgpt.errors import UserError
from model import ARCHS, GPT, GPTConfig

CLASSES = {'gpt2': 'GPT2LMHeadModel', 'llama': 'LlamaForCausalLM', 'mistral': 'MistralForCausalLM',
           'qwen2': 'Qwen2ForCausalLM', 'qwen3': 'Qwen3ForCausalLM'}

# {module of ours: modules of hf}; # is the number of a layer. Several are rows of ours, one below the other
GPT2 = {name: [name] for name in ('transformer.wte', 'transformer.wpe', 'transformer.ln_f', 'lm_head', *(
    f'transformer.h.#.{part}' for part in ('ln_1', 'attn.c_attn', 'attn.c_proj', 'ln_2', 'mlp.c_fc', 'mlp.c_proj')))}
LLAMA = {
    'transformer.wte': ['model.embed_tokens'],
    'transformer.h.#.ln_1': ['model.layers.#.input_layernorm'],
    'transformer.h.#.attn.c_attn': [f'model.layers.#.self_attn.{part}_proj' for part in 'qkv'],
    'transformer.h.#.attn.c_proj': ['model.layers.#.self_attn.o_proj'],
    'transformer.h.#.ln_2': ['model.layers.#.post_attention_layernorm'],
    'transformer.h.#.mlp.c_fc': [f'model.layers.#.mlp.{part}_proj' for part in ('gate', 'up')],
    'transformer.h.#.mlp.c_proj': ['model.layers.#.mlp.down_proj'],
    'transformer.ln_f': ['model.norm'],
    'lm_head': ['lm_head'],
}
MODULES = {**dict.fromkeys(CLASSES, LLAMA), 'gpt2': GPT2, 'qwen3': {
    **LLAMA, **{f'transformer.h.#.attn.{part}_norm': [f'model.layers.#.self_attn.{part}_norm'] for part in 'qk'}}}
TRANSPOSED = ('c_attn.weight', 'c_proj.weight', 'c_fc.weight')   # in GPT-2 these are stored input by output
BUFFERS = r'(^|\.)attn\.(masked_)?bias$|rotary_emb\.inv_freq$'   # constants that old files hold

# {field of GPTConfig: field of config.json}
LLAMA_FIELDS = {
    'vocab_size': 'vocab_size', 'block_size': 'max_position_embeddings', 'n_layer': 'num_hidden_layers',
    'n_embd': 'hidden_size', 'n_head': 'num_attention_heads', 'n_kv_head': 'num_key_value_heads',
    'head_dim': 'head_dim', 'n_inner': 'intermediate_size', 'norm_eps': 'rms_norm_eps', 'rope_base': 'rope_theta',
    'bias': 'attention_bias', 'tie_weights': 'tie_word_embeddings'}
FIELDS = {**dict.fromkeys(CLASSES, LLAMA_FIELDS), 'mistral': {**LLAMA_FIELDS, 'window': 'sliding_window'}, 'gpt2': {
    'vocab_size': 'vocab_size', 'block_size': 'n_positions', 'n_layer': 'n_layer', 'n_embd': 'n_embd',
    'n_head': 'n_head', 'n_inner': 'n_inner', 'norm_eps': 'layer_norm_epsilon', 'tie_weights': 'tie_word_embeddings'}}
# What a config.json means that is silent
LLAMA_DEFAULTS = {'num_key_value_heads': None, 'head_dim': None, 'rms_norm_eps': 1e-6, 'rope_theta': 10_000.0,
                  'attention_bias': False, 'mlp_bias': False, 'tie_word_embeddings': False}
DEFAULTS = {
    'gpt2': {'n_inner': None, 'layer_norm_epsilon': 1e-5, 'tie_word_embeddings': True,
             'activation_function': 'gelu_new'},
    'llama': LLAMA_DEFAULTS,
    'mistral': {**LLAMA_DEFAULTS, 'num_key_value_heads': 8, 'sliding_window': 4096},
    'qwen2': {**LLAMA_DEFAULTS, 'num_key_value_heads': 32, 'attention_bias': True},
    'qwen3': {**LLAMA_DEFAULTS, 'num_key_value_heads': 32, 'head_dim': 128},
}
GELUS = {'gelu_new': 'tanh', 'gelu_pytorch_tanh': 'tanh', 'gelu': 'erf'}   # {activation_function: gelu}
# Fields that change the result, with the values that we can compute, the usual one first
LLAMA_SUPPORTED = {'hidden_act': ('silu',), 'rope_type': ('default', 'llama3'), 'use_sliding_window': (False,),
                   'quantization_config': (None,)}
SUPPORTED = {
    **dict.fromkeys(CLASSES, LLAMA_SUPPORTED),
    'qwen3': {**LLAMA_SUPPORTED, 'attention_bias': (False,)},
    'gpt2': {'scale_attn_weights': (True,), 'scale_attn_by_inverse_layer_idx': (False,),
             'add_cross_attention': (False,), 'activation_function': (*GELUS,), 'quantization_config': (None,)},
}
LLAMA3 = 'factor', 'low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings'   # GPTConfig.rope_scaling
SMALL_FILES = '*.json', 'merges.txt', 'chat_template.jinja'   # of a repository: all but its weights
KEPT_FILES = 'tokenizer_config.json', 'special_tokens_map.json', 'generation_config.json'   # which save() writes back
USUAL_ENDS = tokenizer.EOT, '<|end_of_text|>', '</s>', '<eos>', '<|im_end|>', '<|eot_id|>'


# ---------------------------------------------------------------------------------------------------------------------
# configuration

def config_from_hf(hf_config: dict, source) -> dict:
    """The fields of GPTConfig, {name: value}, for the config.json of a source, a folder or repository. UserError names
    what it asks for and we cannot compute."""
    try:
        architecture = hf_config.get('model_type')
        if architecture not in CLASSES:
            raise UserError(f'{source} is a model of type {architecture!r}: expected one of '
                            f'{", ".join(map(repr, CLASSES))}')
        rope = {**(hf_config.get('rope_parameters') or {}), **(hf_config.get('rope_scaling') or {})}
        rope.setdefault('rope_type', rope.get('type', 'default'))   # its name before transformers 4.43
        values = {**DEFAULTS[architecture], **hf_config, **rope}
        refused = [f'{name}={values[name]!r}' for name, allowed in SUPPORTED[architecture].items()
                   if values.get(name, allowed[0]) not in allowed]
        if refused:
            raise UserError(f'{source}: our {architecture} cannot compute {", ".join(refused)}')
        config = {**ARCHS.get(architecture, ARCHS['llama']),
                  **{name: values[field] for name, field in FIELDS[architecture].items()}}
        if architecture == 'gpt2':
            config |= {'bias': True, 'gelu': GELUS[values['activation_function']]}
        else:
            config['bias'] = values['attention_bias'] or values['mlp_bias']
        if values.get('rope_type') == 'llama3':
            config['rope_scaling'] = tuple(float(values[name]) for name in LLAMA3)
        with torch.device('meta'):
            c = GPT(GPTConfig(**config)).config
    except KeyError as error:
        raise UserError(f'{source}/config.json does not say its {error.args[0]}') from None
    except (TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise UserError(f'{source}/config.json says what cannot be: {error}') from None
    # What an open field means is left open: nanoGPT, which has not these fields, reads a finetuned GPT-2 too
    usual = {'norm_eps': 1e-5 if architecture == 'gpt2' else 1e-6, 'n_kv_head': c.n_head,
             'head_dim': c.n_embd / c.n_head, 'n_inner': 4 * c.n_embd if architecture == 'gpt2' else None}
    return {name: None if value == usual.get(name) else value for name, value in config.items()}


def hf_architecture(config: GPTConfig) -> str:
    """The architecture whose class computes what a GPTConfig says. UserError names the fields that no class has."""
    unsupported = {}
    for architecture in CLASSES:
        wanted = {**ARCHS.get(architecture, ARCHS['llama']), 'tie_weights': config.tie_weights, 'layer_scale': None}
        if architecture == 'gpt2':
            wanted |= {'n_kv_head': config.n_head if config.n_kv_head else None, 'head_dim': None}
        if architecture in ('mistral', 'qwen3'):
            wanted['bias'] = False
        if architecture != 'mistral':
            wanted['window'] = None
        unsupported[architecture] = [f'{name}={getattr(config, name)!r}' for name, value in wanted.items()
                                     if getattr(config, name) != value]
        if not unsupported[architecture]:
            return architecture
    nearest = min(reversed(unsupported.values()), key=len)
    raise UserError(f'no class of Hugging Face has {", ".join(nearest)}: what can be exported is what '
                    f'--arch={", --arch=".join(CLASSES)} make, without these')


def config_to_hf(config: GPTConfig, architecture: str, dtype: torch.dtype, roles: dict) -> dict:
    """The config.json of a model. roles: {'eos_token_id': id, ...}, the ids of its special tokens."""
    values = {**vars(config), 'n_kv_head': config.n_kv_head or config.n_head, 'head_dim': config.head_width,
              'n_inner': config.n_inner if architecture == 'gpt2' else config.inner_width,
              'norm_eps': config.norm_eps or (1e-5 if architecture == 'gpt2' else 1e-6)}
    hf_config = {'architectures': [CLASSES[architecture]], 'model_type': architecture,
                 'dtype': str(dtype).removeprefix('torch.'), **roles,
                 **{field: values[name] for name, field in FIELDS[architecture].items()}}
    if architecture == 'gpt2':
        activation = next(name for name, gelu in GELUS.items() if gelu == config.gelu)
        return {**hf_config, 'activation_function': activation,
                **dict.fromkeys(('attn_pdrop', 'embd_pdrop', 'resid_pdrop'), config.dropout)}
    hf_config |= {'hidden_act': 'silu', 'attention_dropout': config.dropout}
    if architecture == 'llama':
        hf_config['mlp_bias'] = config.bias
    if config.rope_scaling:
        hf_config['rope_scaling'] = {'rope_type': 'llama3', **dict(zip(LLAMA3, config.rope_scaling))}
        hf_config['rope_scaling'][LLAMA3[3]] = int(config.rope_scaling[3])
    return hf_config


# ---------------------------------------------------------------------------------------------------------------------
# weights

def hf_names(name: str, architecture: str) -> list[str]:
    """The names that a parameter of ours has in an architecture: several if it is made of several of theirs."""
    module, leaf = name.rsplit('.', 1)
    layer = re.search(r'\.h\.(\d+)\.', name)
    number = layer[1] if layer else ''
    return [f'{part.replace("#", number)}.{leaf}'
            for part in MODULES[architecture][re.sub(r'\.h\.\d+\.', '.h.#.', module)]]


def hf_rows(name: str, config: GPTConfig) -> list[int]:
    """How many rows of a parameter that is made of several belong to each of them."""
    D, K = config.head_width, config.n_kv_head or config.n_head
    return [config.n_head * D, K * D, K * D] if '.c_attn.' in name else [config.inner_width] * 2


def weights_from_hf(hf_tensors: dict, config: GPTConfig, architecture: str, source) -> dict:
    """Our parameters, {name: tensor}, from those of an architecture, of a source, a folder or repository. Biases that
    no layer has are zeros. UserError if a parameter is missing, left over or of another shape."""
    prefix = 'transformer.' if architecture == 'gpt2' else 'model.'
    hf_tensors = {name if name.startswith((prefix, 'lm_head.')) else prefix + name: tensor
                  for name, tensor in hf_tensors.items() if not re.search(BUFFERS, name)}
    head = hf_tensors.pop('lm_head.weight', None) if config.tie_weights else None
    with torch.device('meta'):
        shapes = {name: tuple(p.shape) for name, p in GPT(config).named_parameters()}
    tensors, kinds = {}, {re.sub(r'\d+', '#', name) for name in hf_tensors}
    for name, shape in shapes.items():
        names = hf_names(name, architecture)
        missing = [other for other in names if other not in hf_tensors]
        if name.endswith('.bias') and len(missing) == len(names) and re.sub(r'\d+', '#', names[0]) not in kinds:
            tensors[name] = torch.zeros(shape)
            continue
        if missing:
            raise UserError(f'{source} has no weights {missing[0]}: it is not complete')
        parts = [hf_tensors.pop(other) for other in names]
        if len({part.shape[1:] for part in parts}) > 1:
            raise UserError(f'{source}: {", ".join(names)} have different widths')
        tensor = torch.cat(parts)
        if architecture == 'gpt2' and name.endswith(TRANSPOSED):
            tensor = tensor.T
        if tensor.shape != shape:
            raise UserError(f'{source}: {names[0]} has shape {tuple(tensor.shape)}, and its config.json means {shape}')
        tensors[name] = tensor
    if config.tie_weights:
        tensors['lm_head.weight'] = tensors['transformer.wte.weight']
    if head is not None and not torch.equal(head, tensors['lm_head.weight']):
        raise UserError(f'{source}: config.json says tie_word_embeddings, and lm_head.weight is another matrix')
    if hf_tensors:
        raise UserError(f'{source} has weights that a {architecture} has not: {", ".join(sorted(hf_tensors)[:3])}')
    return tensors


def weights_to_hf(model: GPT, architecture: str) -> dict:
    """The parameters of a model, {name: tensor}, as an architecture has them."""
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    if architecture == 'gpt2' and not model.config.bias:   # its class always has biases
        for name, tensor in list(tensors.items()):
            if not name.endswith(('wte.weight', 'wpe.weight', 'lm_head.weight')):
                tensors[name.replace('.weight', '.bias')] = tensor.new_zeros(tensor.size(0))
    hf_tensors = {}
    for name, tensor in tensors.items():
        names = hf_names(name, architecture)
        if architecture == 'gpt2' and name.endswith(TRANSPOSED):
            tensor = tensor.T
        parts = tensor.split(hf_rows(name, model.config)) if len(names) > 1 else [tensor]
        hf_tensors |= {other: part.contiguous() for other, part in zip(names, parts)}
    return hf_tensors


# ---------------------------------------------------------------------------------------------------------------------
# folders

def fetch(name: str) -> Path:
    """The folder, in the cache, of a model on the hub, with all that load() reads. Raises UserError."""
    folder = fetch_config(name)
    config_from_hf(read_json(folder / 'config.json'), name)   # before weights of an unknown kind are downloaded
    return hub.snapshot(name, *SMALL_FILES, 'model.safetensors', 'model-*.safetensors')


def fetch_config(name: str) -> Path:
    """The folder, in the cache, of a model on the hub, with its configuration and tokenizer. Raises UserError."""
    folder = hub.snapshot(name, *SMALL_FILES)
    if not (folder / 'config.json').exists():
        raise UserError(f'{name} has no config.json: expected a model')
    return folder


def load(folder: Path) -> dict:
    """A checkpoint, as checkpoint.load() gives it, from a folder: weights, configuration, tokenizer if it has one."""
    hf_config = read_json(folder / 'config.json')
    config = GPTConfig(**config_from_hf(hf_config, folder))
    ckpt = {'model': weights_from_hf(read_weights(folder), config, hf_config['model_type'], folder),
            'model_args': config.to_dict()}
    tok = tokenizer_in(folder)
    return {**ckpt, 'tokenizer': tok.to_dict()} if tok else ckpt


def read_json(path: Path) -> dict:
    """The content of a JSON file that holds an object. Raises UserError."""
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError) as error:
        raise UserError(f'cannot read {path}: {getattr(error, "strerror", None) or error}') from None
    if not isinstance(content, dict):
        raise UserError(f'cannot read {path}: expected a JSON object')
    return content


def read_weights(folder: Path) -> dict:
    """All tensors of model.safetensors, or of the files that its index names: {name: tensor}. Raises UserError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    files, index = ['model.safetensors'], folder / 'model.safetensors.index.json'
    if index.exists() and not (folder / files[0]).exists():
        named = read_json(index).get('weight_map')
        files = sorted(set(map(str, named.values()))) if isinstance(named, dict) else []
        if not files or not all(re.fullmatch(r'[\w.-]+\.safetensors', file) for file in files):
            raise UserError(f'{index} names {files[:1] or "no file"}: expected files of weights, *.safetensors')
    tensors = {}
    for file in files:
        try:
            tensors |= load_file(folder / file)
        except FileNotFoundError:
            raise UserError(f'{folder} has no {file}: weights in other formats, which may carry code, are not '
                            f'read') from None
        except (OSError, SafetensorError) as error:
            raise UserError(f'cannot read {folder / file}: {" ".join(str(error).split())[:80]}; it is cut off or '
                            f'damaged, get it again') from None
    return tensors


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
    if isinstance(tok, tokenizer.BpeTokenizer) and tok.files:
        files = tok.files
        roles |= files['config.json']
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
        tok = tokenizer.BpeTokenizer(tokenizer.of_files(folder / 'vocab.json', folder / 'merges.txt'))
    elif (folder / 'tokenizer.model').exists():
        raise UserError(f'{folder} has its tokenizer in tokenizer.model alone: write tokenizer.json once, with '
                        f'AutoTokenizer.from_pretrained(folder).save_pretrained(folder) of transformers')
    else:
        return None
    tok = with_added_tokens(tok, files, folder)
    ends = end_tokens(files, tok.encoding.get_vocab(with_added_tokens=True), folder)
    if ends:
        tok.eot, tok.ends = ends[0], ends
    if tok.eot is None:
        print(f'{folder} names no token that ends a text: samples go on to their last token', file=sys.stderr)
    tok.files = {name: files[name] for name in KEPT_FILES if name in files}
    tok.files['config.json'] = {name: value for name, value in files.get('config.json', {}).items()
                                if name.endswith('_token_id')}
    if (folder / 'chat_template.jinja').exists():
        tok.files['chat_template.jinja'] = (folder / 'chat_template.jinja').read_text(encoding='utf-8')
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
    shown = {byte: char for char, byte in tokenizer.byte_alphabet().items()}
    ranks = tok.parts['mergeable_ranks']
    special = tok.parts['special_tokens']
    vocab = {''.join(shown[byte] for byte in token): i for token, i in ranks.items()}
    pairs = [pair_of(token, ranks) for token in sorted(ranks, key=ranks.get) if len(token) > 1]
    merges = [tuple(''.join(shown[byte] for byte in part) for part in pair) for pair in pairs]
    encoding = Tokenizer(models.BPE({**vocab, **special}, merges, ignore_merges=True))
    encoding.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(tok.parts['pat_str']), 'isolated'),
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
