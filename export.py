"""
A model as a folder of Hugging Face, for transformers, vLLM, llama.cpp and others; proven by reading it back.

    python export.py --out_dir=out-shakespeare-char-cpu --to=my-model
    python export.py --init_from=gpt2 --to=my-gpt2 --dtype=bfloat16
    python export.py --out_dir=out-lora --to=my-model              the base with the adapter merged into it
    python export.py --out_dir=out-lora --to=my-adapter --adapter  the adapter alone, for PEFT

The architectures 'gpt2', 'llama' and 'qwen3' of train.py have a class there, others are refused. Prints the folder.
"""

from configurator import configure

# ---------------------------------------------------------------------------------------------------------------------
out_dir = 'out'                       # folder of the model: its best.pt, or else its ckpt.pt
init_from = 'resume'                  # 'resume' (the model in out_dir), a path, 'gpt2', 'owner/name' on the hub
tokenizer_of: str | None = None       # for a checkpoint of nanoGPT, which has none: the dataset it was trained on
to = ''                               # the folder to make
dtype = 'float32'                     # of the weights in it: 'float32', 'bfloat16', 'float16'
adapter = False                       # an adapter alone instead of what it makes of its base
# ---------------------------------------------------------------------------------------------------------------------
config = configure(globals())

import os
import sys
import tempfile
from pathlib import Path

import torch  # not above the options: --help and a misspelt option need not wait for it
from safetensors import SafetensorError

from flatgpt import architectures, checkpoint, lora, machine, pretrained, validate
from flatgpt.errors import UserError

validate.export_options(config)

# the model, with the weights that the folder will hold

path = checkpoint.model_path(out_dir, init_from)
model, tok, ckpt = checkpoint.load_model(path, tokenizer_of, merged=not adapter)
if adapter and 'base' not in ckpt:
    raise UserError(f'{path} is not an adapter, it has all its weights: remove --adapter')
architecture = architectures.hf_architecture(model.config)
model.to(machine.DTYPES[dtype]).float()

# what the folder must give again: the ids of a text, and the logits of another one, this file

probe = tok.probe()
T = min(model.config.block_size, 512)
text = Path(__file__).read_text(encoding='utf-8')
unknown = set(tok.unknown(text))
text = ''.join(char for char in text if char not in unknown)
ids = torch.from_numpy(tok.encode(text)[:T].astype('int64'))
random = torch.randint(tok.vocab_size, (T - len(ids),), generator=torch.Generator().manual_seed(1))
ids = torch.cat((ids, random))[None]   # (1, T); random ones only where a tokenizer knows little of the text


def compare(reader, probe_ids, logits):
    """Raise UserError unless a reader of the folder gives the ids and the logits that the model here gives. Logits may
    differ by the rounding of float32, which grows with depth: with 30 layers it was a twentieth of the limit."""
    if list(probe_ids) != tok.encode(probe).tolist():
        raise UserError(f'{reader} splits a text into other tokens than {path}: nothing was exported')
    with torch.inference_mode():
        expected = model(ids, ids)[0]
    spread = (expected - expected.mean(dim=-1, keepdim=True)).norm(dim=-1).clamp_min(1e-3)   # (1, T)
    error = ((logits - expected).norm(dim=-1) / spread)[0]                                    # (T,)
    limit = 2e-6 * (5 + model.config.n_layer)
    if not error.mean() <= limit:   # true of nan
        worst = int(error.argmax())
        raise UserError(f'{reader} does not give what {path} gives: logits differ by {error.mean():.1e} of their '
                        f'spread, most by {error[worst]:.1e} at token {worst} of {T}, and rounding explains '
                        f'{limit:.1e}; nothing was exported')


def compare_with_transformers(folder):
    """Compare by the library that the folder is for, if it is installed. Returns its name and version, or None."""
    try:
        import transformers
    except ImportError:
        return None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    reader = f'transformers {transformers.__version__}'
    other = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    probe_ids = transformers.AutoTokenizer.from_pretrained(folder).encode(probe, add_special_tokens=False)
    with torch.inference_mode():
        compare(reader, probe_ids, other(ids).logits)
    return reader


# write to a temporary folder beside it, read back, compare, and only then let it appear

to = Path(to).expanduser().resolve()
reader = None
try:
    to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f'.{to.name}-', dir=to.parent) as scratch:
        new = Path(scratch) / to.name
        if adapter:
            lora.save_peft(new, model, architecture, ckpt['lora'], str(ckpt['base']['path']))
            if not lora.same_peft(new, model, architecture):
                raise UserError(f'the adapter that was read back is not that of {path}: nothing was exported')
        else:
            pretrained.save(new, model, architecture, machine.DTYPES[dtype], tok)
            again, again_tok, _ = checkpoint.load_model(new)
            with torch.inference_mode():
                compare('the exported model', again_tok.encode(probe), again(ids, ids)[0])
            reader = compare_with_transformers(new)
        if to.is_dir():
            to.rmdir()
        os.rename(new, to)
except (OSError, SafetensorError) as error:
    raise UserError(f'cannot write {to}: {getattr(error, "strerror", None) or error}') from None

size = sum(file.stat().st_size for file in to.iterdir()) / 1e6
also = f', by {reader} too' if reader else ''
print(f'{path} as {architectures.CLASSES[architecture]}, {size:,.1f} MB, read back and compared{also}', file=sys.stderr)
print(to)
