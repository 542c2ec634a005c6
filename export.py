"""
A model as a folder of Hugging Face, for transformers, vLLM, llama.cpp and others; proven by reading it back.

    python export.py --out_dir=out-shakespeare-char-cpu --to=my-model
    python export.py --init_from=gpt2 --to=my-gpt2 --dtype=bfloat16
    python export.py --out_dir=out-lora --to=my-model              the base with the adapter merged into it
    python export.py --out_dir=out-lora --to=my-adapter --adapter  the adapter alone, for PEFT

The architectures 'gpt2', 'llama' and 'qwen3' of train.py have a class there, others are refused. Prints the folder.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError

from configurator import configure
from flatgpt import checkpoint, lora, pretrained, runtime, tokenizer, validate
from flatgpt.errors import UserError

# ---------------------------------------------------------------------------------------------------------------------
out_dir = 'out'                       # folder of the model: its best.pt, or else its ckpt.pt
init_from = 'resume'                  # 'resume' (the model in out_dir), a path, 'gpt2', 'owner/name' on the hub
tokenizer_of: str | None = None       # for a checkpoint of nanoGPT, which has none: the dataset it was trained on
to = ''                               # the folder to make
dtype = 'float32'                     # of the weights in it: 'float32', 'bfloat16', 'float16'
adapter = False                       # an adapter alone instead of what it makes of its base
# ---------------------------------------------------------------------------------------------------------------------
config = configure(globals())

# refusals

validate.export_options(config)

# model

path = checkpoint.model_path(out_dir, init_from)
model, tok, ckpt = checkpoint.load_model(path, tokenizer_of, merged=not adapter)
if adapter and 'base' not in ckpt:
    raise UserError(f'{path} is not an adapter, it has all its weights: remove --adapter')
kind = pretrained.hf_architecture(model.config)
model.to(runtime.DTYPES[dtype]).float()   # what the folder will hold


probe = ''.join(tok.chars) if isinstance(tok, tokenizer.CharTokenizer) else tokenizer.PROBE
shape = 1, min(model.config.block_size, 1024)
ids = torch.randint(tok.vocab_size, shape, generator=torch.Generator().manual_seed(1))   # (B, T)


def check(what, text_ids, logits):
    """Raise UserError unless the exported files give the ids of the probe and the logits of the model here."""
    with torch.inference_mode():
        ours = model(ids, ids)[0]
    close = torch.allclose(logits, ours, rtol=1e-4, atol=1e-4)
    if list(text_ids) != tok.encode(probe).tolist() or not close:
        raise UserError(f'{what} does not give what {path} gives: nothing was exported')


def check_with_transformers(folder):
    """The same by the library that the folder is for, if it is installed. Returns its name and version, or None."""
    try:
        import transformers
    except ImportError:
        return None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    text_ids = transformers.AutoTokenizer.from_pretrained(folder).encode(probe, add_special_tokens=False)
    with torch.inference_mode():
        check(f'transformers {transformers.__version__}', text_ids, theirs(ids).logits)
    return f'transformers {transformers.__version__}'


# write beside the place, read back, compare, and only then let it appear

to, scratch = Path(to).expanduser().resolve(), None
try:
    to.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f'.{to.name}-', dir=to.parent))
    new = scratch / to.name
    if adapter:
        lora.save_peft(new, model, kind, ckpt['lora'], str(ckpt['base']['path']))
        if not lora.same_peft(new, model, kind):
            raise UserError(f'the adapter that was read back is not that of {path}: nothing was exported')
        reader = None
    else:
        pretrained.save(new, model, kind, runtime.DTYPES[dtype], tok)
        again, text, _ = checkpoint.load_model(new)
        with torch.inference_mode():
            check('the exported model', text.encode(probe), again(ids, ids)[0])
        reader = check_with_transformers(new)
    if to.is_dir():
        to.rmdir()
    os.rename(new, to)
except (OSError, SafetensorError) as error:
    raise UserError(f'cannot write {to}: {getattr(error, "strerror", None) or error}') from None
finally:
    if scratch:
        shutil.rmtree(scratch, ignore_errors=True)
size = sum(file.stat().st_size for file in to.iterdir())
print(f'{path} as {pretrained.CLASSES[kind]}, {size / 1e6:,.1f} MB, read back and compared'
      f'{f", by {reader} too" if reader else ""}', file=sys.stderr)
print(to)
