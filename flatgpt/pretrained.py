"""
Folders of Hugging Face, in both directions: config.json and GPTConfig, model.safetensors and our parameters, by tables
that are read both ways. The classes that a GPT of ours can be are GPT2LMHeadModel, LlamaForCausalLM, Qwen3ForCausalLM.
"""

import json
import re
import shutil
from pathlib import Path

import torch

from flatgpt import hub, tokenizer
from flatgpt.errors import UserError
from model import ARCHS, GPT, GPTConfig

CLASSES = {'gpt2': 'GPT2LMHeadModel', 'llama': 'LlamaForCausalLM', 'qwen3': 'Qwen3ForCausalLM'}   # by model_type

# Their modules, by ours; # is the number of a layer. Several of theirs are one of ours, one below the other
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
MODULES = {'gpt2': GPT2, 'llama': LLAMA, 'qwen3': {
    **LLAMA, **{f'transformer.h.#.attn.{part}_norm': [f'model.layers.#.self_attn.{part}_norm'] for part in 'qk'}}}
TURNED = ('c_attn.weight', 'c_proj.weight', 'c_fc.weight')   # in GPT-2 these lie input by output
BUFFERS = r'(^|\.)attn\.(masked_)?bias$|rotary_emb\.inv_freq$'   # constants that old files hold

# Their fields, by ours, and the values that they have where config.json is silent
FIELDS = {
    'gpt2': {'vocab_size': 'vocab_size', 'block_size': 'n_positions', 'n_layer': 'n_layer', 'n_embd': 'n_embd',
             'n_head': 'n_head', 'n_inner': 'n_inner', 'norm_eps': 'layer_norm_epsilon',
             'tie_weights': 'tie_word_embeddings'},
    'llama': {'vocab_size': 'vocab_size', 'block_size': 'max_position_embeddings', 'n_layer': 'num_hidden_layers',
              'n_embd': 'hidden_size', 'n_head': 'num_attention_heads', 'n_kv_head': 'num_key_value_heads',
              'head_dim': 'head_dim', 'n_inner': 'intermediate_size', 'norm_eps': 'rms_norm_eps',
              'rope_base': 'rope_theta', 'bias': 'attention_bias', 'tie_weights': 'tie_word_embeddings'},
}
FIELDS['qwen3'] = FIELDS['llama']
SILENT = {
    'gpt2': {'n_inner': None, 'layer_norm_epsilon': 1e-5, 'tie_word_embeddings': True,
             'activation_function': 'gelu_new'},
    'llama': {'num_key_value_heads': None, 'head_dim': None, 'rms_norm_eps': 1e-6, 'rope_theta': 10_000.0,
              'attention_bias': False, 'mlp_bias': False, 'tie_word_embeddings': False, 'hidden_act': 'silu'},
    'qwen3': {'num_key_value_heads': 32, 'head_dim': 128, 'rms_norm_eps': 1e-6, 'rope_theta': 10_000.0,
              'attention_bias': False, 'tie_word_embeddings': False, 'hidden_act': 'silu'},
}
GELUS = {'gelu_new': 'tanh', 'gelu_pytorch_tanh': 'tanh', 'gelu': 'erf'}   # their activation_function, ours
SMALL_FILES = '*.json', 'merges.txt'   # of a repository: all but its weights
EXPECTED = {   # what changes the result and must be as it is here
    'gpt2': {'scale_attn_weights': True, 'scale_attn_by_inverse_layer_idx': False, 'add_cross_attention': False},
    'llama': {'hidden_act': 'silu'},
    'qwen3': {'hidden_act': 'silu', 'use_sliding_window': False, 'attention_bias': False},
}


# ---------------------------------------------------------------------------------------------------------------------
# configuration

def config_from_hf(theirs, folder):
    """The fields of GPTConfig, {name: value}, that a config.json means; UserError names what it has and we do not."""
    try:
        return meant(theirs, folder)
    except (TypeError, ValueError, KeyError, ArithmeticError) as error:
        what = f'does not say its {error.args[0]}' if isinstance(error, KeyError) else f'says what cannot be: {error}'
        raise UserError(f'{folder}/config.json {what}') from None


def meant(theirs, folder):
    """The fields of GPTConfig for a config.json; missing fields and wrong types may raise anything."""
    kind = theirs.get('model_type')
    if kind not in CLASSES:
        raise UserError(f'{folder} is a model of type {kind!r}: expected one of {", ".join(map(repr, CLASSES))}')
    rope = {**(theirs.get('rope_parameters') or {}), **(theirs.get('rope_scaling') or {})}
    theirs = {**SILENT[kind], **theirs, **{name: rope[name] for name in ('rope_theta',) if name in rope}}
    odd = [f'{name}={theirs[name]!r}' for name, value in EXPECTED[kind].items() if theirs.get(name, value) != value]
    odd += [f'{name}={theirs[name]!r}' for name in ('quantization_config',) if theirs.get(name)]
    if theirs.get('mlp_bias', theirs.get('attention_bias')) != theirs.get('attention_bias'):
        odd.append(f'mlp_bias={theirs["mlp_bias"]!r} and attention_bias={theirs["attention_bias"]!r}')
    scaling, kept = None, rope.get('rope_type', rope.get('type', 'default'))
    if kept == 'llama3':
        scaling = tuple(float(rope[name]) for name in ('factor', 'low_freq_factor', 'high_freq_factor',
                                                       'original_max_position_embeddings'))
    elif kept != 'default':
        odd.append(f'rope_type={kept!r}')
    if kind == 'gpt2' and theirs['activation_function'] not in GELUS:
        odd.append(f'activation_function={theirs["activation_function"]!r}')
    if odd:
        raise UserError(f'{folder}: {", ".join(odd)} is nothing that our {kind} can do')
    ours = {**ARCHS[kind], **{name: theirs[field] for name, field in FIELDS[kind].items()}}
    for name, value in ours.items():
        kinds = {'norm_eps': float, 'rope_base': (int, float), 'tie_weights': bool, 'bias': bool}.get(name, int)
        optional = value is None and name in ('n_kv_head', 'head_dim', 'n_inner')
        if name in FIELDS[kind] and not optional and (not isinstance(value, kinds)
                                                      or isinstance(value, bool) and kinds is not bool):
            raise TypeError(f'{FIELDS[kind][name]}={value!r}')
    if kind == 'gpt2':
        ours |= {'bias': True, 'gelu': GELUS[theirs['activation_function']]}
    else:
        ours |= {'rope_scaling': scaling}
    c = GPTConfig(**ours)   # what a field left open would mean is left open: nanoGPT reads a finetuned GPT-2 too
    usual = {'norm_eps': 1e-5 if kind == 'gpt2' else 1e-6, 'n_kv_head': c.n_head, 'head_dim': c.n_embd / c.n_head,
             'n_inner': 4 * c.n_embd if kind == 'gpt2' else None}
    return {name: None if value == usual.get(name) else value for name, value in ours.items()}


def kind_of(config):
    """The model_type whose class computes what a GPTConfig says; UserError names the switches that none has."""
    odd = {}
    for kind in CLASSES:
        wanted = {**ARCHS[kind], 'tie_weights': config.tie_weights, 'window': None, 'layer_scale': None}
        if kind == 'gpt2':
            wanted |= {'n_kv_head': config.n_head if config.n_kv_head else None, 'head_dim': None}
        if kind == 'qwen3':
            wanted |= {'bias': False}
        odd[kind] = [f'{name}={getattr(config, name)!r}' for name, value in wanted.items()
                     if getattr(config, name) != value]
        if not odd[kind]:
            return kind
    nearest = min(reversed(odd.values()), key=len)
    raise UserError(f'no class of Hugging Face has {", ".join(nearest)}: what can be exported is what '
                    f'--arch={", --arch=".join(CLASSES)} make, without these')


def config_json(config, kind, dtype, eot):
    """The config.json of a GPTConfig, as a dictionary."""
    c = {**vars(config), 'n_kv_head': config.n_kv_head or config.n_head, 'head_dim': config.head_width,
         'n_inner': config.n_inner if kind == 'gpt2' else config.inner_width,
         'norm_eps': config.norm_eps or (1e-5 if kind == 'gpt2' else 1e-6)}
    theirs = {'architectures': [CLASSES[kind]], 'model_type': kind, 'dtype': str(dtype).removeprefix('torch.'),
              'bos_token_id': eot, 'eos_token_id': eot, **{field: c[name] for name, field in FIELDS[kind].items()}}
    if kind == 'gpt2':
        theirs |= {'activation_function': next(name for name, gelu in GELUS.items() if gelu == config.gelu),
                   'attn_pdrop': config.dropout, 'embd_pdrop': config.dropout, 'resid_pdrop': config.dropout}
        return theirs
    theirs |= {'hidden_act': 'silu', 'attention_dropout': config.dropout}
    if kind == 'llama':
        theirs |= {'mlp_bias': config.bias}
    if config.rope_scaling:
        names = 'factor', 'low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings'
        theirs |= {'rope_scaling': {'rope_type': 'llama3', **dict(zip(names, config.rope_scaling))}}
        theirs['rope_scaling']['original_max_position_embeddings'] = int(config.rope_scaling[3])
    return theirs


# ---------------------------------------------------------------------------------------------------------------------
# weights

def hf_names(name, kind):
    """Their names of a parameter of ours."""
    module, leaf = name.rsplit('.', 1)
    layer = re.search(r'\.h\.(\d+)\.', name)
    parts = MODULES[kind][re.sub(r'\.h\.\d+\.', '.h.#.', module)]
    return [f'{part.replace("#", layer[1]) if layer else part}.{leaf}' for part in parts]


def hf_rows(name, config):
    """How many rows of a parameter of ours belong to each of theirs that it is made of."""
    D, K = config.head_width, config.n_kv_head or config.n_head
    return [config.n_head * D, K * D, K * D] if '.c_attn.' in name else [config.inner_width] * 2


def ours(tensors, config, kind, folder):
    """Our parameters, {name: tensor}, out of theirs; UserError if one is missing, left over or of another shape."""
    prefix = 'transformer.' if kind == 'gpt2' else 'model.'
    tensors = {name if name.startswith((prefix, 'lm_head.')) else prefix + name: tensor
               for name, tensor in tensors.items() if not re.search(BUFFERS, name)}
    with torch.device('meta'):
        wanted = GPT(config).state_dict()
    head = tensors.pop('lm_head.weight', None) if config.tie_weights else None
    found = {}
    for name, empty in wanted.items():
        if name == 'lm_head.weight' and config.tie_weights:
            found[name] = found['transformer.wte.weight']
            continue
        theirs = hf_names(name, kind)
        missing = [other for other in theirs if other not in tensors]
        if missing:
            raise UserError(f'{folder} has no weights {missing[0]}: it is not complete')
        try:
            tensor = torch.cat([tensors.pop(other) for other in theirs])
        except RuntimeError:   # of different widths
            raise UserError(f'{folder}: {", ".join(theirs)} do not belong together') from None
        found[name] = tensor.T if kind == 'gpt2' and name.endswith(TURNED) else tensor
        if found[name].shape != empty.shape:
            raise UserError(f'{folder}: {theirs[0]} has shape {tuple(found[name].shape)}, and config.json means '
                            f'{tuple(empty.shape)}: they do not belong together')
    if head is not None and not torch.equal(head, found['transformer.wte.weight']):
        raise UserError(f'{folder}: config.json says tie_word_embeddings, and lm_head.weight is another matrix')
    if tensors:
        raise UserError(f'{folder} has weights that a {kind} has not: {", ".join(sorted(tensors)[:3])}')
    return found


def theirs(model, kind):
    """Their parameters, {name: tensor}, out of a model of ours."""
    config, found = model.config, {}
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    if config.tie_weights:
        del weights['lm_head.weight']
    for name, tensor in list(weights.items()):
        module, leaf = name.rsplit('.', 1)   # biases of nothing, where their class has one and we do not
        if kind == 'gpt2' and not config.bias and leaf == 'weight' and not module.endswith(('wte', 'wpe', 'lm_head')):
            weights[f'{module}.bias'] = tensor.new_zeros(tensor.size(0))
    for name, tensor in weights.items():
        names = hf_names(name, kind)
        tensor = tensor.T if kind == 'gpt2' and name.endswith(TURNED) else tensor
        parts = [tensor] if len(names) == 1 else tensor.split(hf_rows(name, config))
        found.update(zip(names, (part.contiguous() for part in parts)))
    return found


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


def load(folder):
    """A checkpoint, as checkpoint.load() gives it, of a folder of Hugging Face: weights, configuration, tokenizer."""
    theirs = read_json(folder / 'config.json')
    fields = config_from_hf(theirs, folder)
    ckpt = {'model': ours(read_weights(folder), GPTConfig(**fields), theirs['model_type'], folder),
            'model_args': GPTConfig(**fields).to_dict()}
    tok = tokenizer_in(folder)
    return {**ckpt, 'tokenizer': tok.to_dict()} if tok else ckpt


def read_json(path):
    try:
        content = json.loads(Path(path).read_text(encoding='utf-8'))
        if not isinstance(content, dict):
            raise ValueError('it is no JSON object')
        return content
    except (OSError, ValueError) as error:
        raise UserError(f'cannot read {path}: {getattr(error, "strerror", None) or error}') from None


def shards(index):
    """The files that an index names."""
    named = read_json(index).get('weight_map')
    files = set(map(str, named.values())) if isinstance(named, dict) else set()
    odd = [file for file in files if not re.fullmatch(r'[\w.-]+\.safetensors', file)]
    if odd or not files:
        raise UserError(f'{index} names {odd[:1] or "no file"}: expected files of weights, *.safetensors')
    return sorted(files)


def read_weights(folder):
    """All tensors in the *.safetensors files of one folder: {name: tensor}."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    index = folder / 'model.safetensors.index.json'
    files = shards(index) if index.exists() and not (folder / 'model.safetensors').exists() else ['model.safetensors']
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


def tokenizer_in(folder):
    """The tokenizer in a folder: tokenizer.json, or GPT-2's vocab.json with merges.txt; None if it has neither."""
    eot = read_json(folder / 'config.json').get('eos_token_id')
    eot = eot[0] if isinstance(eot, list) and eot else eot
    eot = eot if type(eot) is int and eot >= 0 else None
    if (folder / 'tokenizer.json').exists():
        return tokenizer.BpeTokenizer(tokenizer.read_text(folder / 'tokenizer.json'), eot)
    vocab, merges = folder / 'vocab.json', folder / 'merges.txt'
    if not vocab.exists() or not merges.exists():
        return None
    return tokenizer.BpeTokenizer.of_files(read_json(vocab), tokenizer.read_text(merges), eot)


def save(folder, model, kind, dtype, tok):
    """Make a folder of Hugging Face of a model: config.json, generation_config.json, model.safetensors in dtype, and a
    tokenizer that AutoTokenizer loads."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    tensors = {name: tensor.to(dtype) for name, tensor in theirs(model, kind).items()}
    save_file(tensors, folder / 'model.safetensors', metadata={'format': 'pt'})   # which transformers asks for
    write_json(folder / 'config.json', config_json(model.config, kind, dtype, tok.eot))
    write_json(folder / 'generation_config.json', {'bos_token_id': tok.eot, 'eos_token_id': tok.eot})
    shutil.copymode(folder / 'config.json', folder / 'model.safetensors')
    (folder / 'tokenizer.json').write_text(tokenizer_json(tok), encoding='utf-8')
    names = {} if tok.eot is None else dict.fromkeys(('bos_token', 'eos_token'), tok.token_bytes(tok.eot).decode())
    write_json(folder / 'tokenizer_config.json', {
        'tokenizer_class': 'PreTrainedTokenizerFast', 'clean_up_tokenization_spaces': False,
        'model_max_length': model.config.block_size, **names})


def write_json(path, content):
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + '\n', encoding='utf-8')


# ---------------------------------------------------------------------------------------------------------------------
# tokenizers

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
    ranks, special = tok.encoding._mergeable_ranks, tok.encoding._special_tokens
    vocab = {''.join(shown[byte] for byte in token): i for token, i in ranks.items()}
    pairs = [pair_of(token, ranks) for token in sorted(ranks, key=ranks.get) if len(token) > 1]
    merges = [tuple(''.join(shown[byte] for byte in part) for part in pair) for pair in pairs]
    encoding = Tokenizer(models.BPE({**vocab, **special}, merges, ignore_merges=True))
    encoding.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(tok.encoding._pat_str), 'isolated'),
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
