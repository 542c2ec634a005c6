"""
A model as a folder of Hugging Face, for transformers, vLLM and others, proven by reading it back; or as a GGUF file,
for llama.cpp, Ollama and LM Studio.

    python export.py --out_dir=out-shakespeare-char-cpu --to=my-model
    python export.py --init_from=gpt2 --to=my-gpt2 --dtype=bfloat16
    python export.py --out_dir=out-lora --to=my-model              the base with the adapter merged into it
    python export.py --out_dir=out-lora --to=my-adapter --adapter  the adapter alone, for PEFT
    python export.py --out_dir=out-chat --gguf=my-model.gguf --gguf_dtype=Q8_0

The architectures 'gpt2', 'llama' and 'qwen3' of train.py have a class there, others are refused. Prints what
it has made.
"""

from configurator import configure

# ---------------------------------------------------------------------------------------------------------------------
out_dir = 'out'                       # folder of the model: its best.pt, or else its ckpt.pt
init_from = 'resume'                  # 'resume' (the model in out_dir), a path, 'gpt2', 'owner/name' on the hub
tokenizer_of: str | None = None       # for a checkpoint of nanoGPT, which has none: the dataset it was trained on
to = ''                               # the folder to make
dtype = 'float32'                     # of the weights in it: 'float32', 'bfloat16', 'float16'
gguf = ''                             # the GGUF file to make, alone or besides
gguf_dtype = 'F16'                    # of the matrices in it: 'F32', 'F16', 'BF16', 'Q8_0' (8 bits)
adapter = False                       # an adapter alone instead of what it makes of its base
# ---------------------------------------------------------------------------------------------------------------------
config = configure(globals())

import os
import sys
import tempfile
from pathlib import Path

import torch  # not above the options: --help and a misspelt option need not wait for it
from safetensors import SafetensorError

from flatgpt import architectures, checkpoint, llama_cpp, lora, machine, pretrained, validate
from flatgpt.errors import UserError

validate.export_options(config)

# the model, with the weights that the folder will hold

path = checkpoint.model_path(out_dir, init_from)
model, tok, ckpt = checkpoint.load_model(path, tokenizer_of, merged=not adapter)
if adapter and 'base' not in ckpt:
    raise UserError(f'{path} is not an adapter, it has all its weights: remove --adapter')
architecture = architectures.hf_architecture(model.config)
model.to(machine.DTYPES[dtype]).float()
header = llama_cpp.header(model.config, tok, gguf_dtype, Path(gguf).stem) if gguf else None   # refuses what it cannot

# what the folder must give again: the ids of a text, and logits

probe = tok.probe()
T = min(model.config.block_size, 512)
ids = torch.randint(tok.vocab_size, (1, T), generator=torch.Generator().manual_seed(1))


def compare(reader, probe_ids, logits):
    """Raise UserError unless a reader of the folder gives the ids and the logits that the model here gives. Logits may
    differ by the rounding of float32, which grows with depth: with 30 layers it was 1/17 of the limit."""
    if list(probe_ids) != tok.encode(probe).tolist():
        raise UserError(f'{reader} splits a text into other tokens than {path}: nothing was exported')
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
    compare(reader, probe_ids, other(ids).logits)
    return reader


@torch.no_grad()
def export_folder(new):
    """Write the folder, read it back and compare. Returns what one reads about it."""
    if adapter:
        lora.save_peft(new, model, architecture, ckpt['lora'], str(ckpt['base']['path']))
        if not lora.same_peft(new, model):
            raise UserError(f'the adapter that was read back is not that of {path}: nothing was exported')
        return 'read back and compared'
    pretrained.save(new, model, architecture, machine.DTYPES[dtype], tok)
    again, again_tok, _ = checkpoint.load_model(new)
    compare('the exported model', again_tok.encode(probe), again(ids, ids)[0])
    reader = compare_with_transformers(new)
    return f'read back and compared, by {reader} too' if reader else 'read back and compared'


def export_gguf(new):
    """Write the GGUF file, read it back and compare. Returns what one reads about it."""
    llama_cpp.write(header, new, model, gguf_dtype)
    if not llama_cpp.same(new, model):
        raise UserError(f'the file that was read back is not {path}: nothing was exported')
    return f'{gguf_dtype}, read back and compared'


# write into a temporary folder beside the first folder to make, and only what is complete appears

for target, export in ((to, export_folder), (gguf, export_gguf)):
    if not target:
        continue
    target = Path(target).expanduser().resolve()
    try:
        place = next(folder for folder in target.parents if folder.exists())
        inside = target.relative_to(place)   # the folders to make, and the target
        with tempfile.TemporaryDirectory(prefix='.export-', dir=place) as scratch:
            new = Path(scratch) / inside
            new.parent.mkdir(parents=True, exist_ok=True)
            how = export(new)
            if target.is_dir():
                target.rmdir()
            os.rename(Path(scratch) / inside.parts[0], place / inside.parts[0])
    except (OSError, SafetensorError) as error:
        raise UserError(f'cannot write {target}: {getattr(error, "strerror", None) or error}') from None
    size = sum(file.stat().st_size for file in (target.iterdir() if target.is_dir() else [target])) / 1e6
    print(f'{path} as {architectures.CLASSES[architecture]}, {size:,.1f} MB, {how}', file=sys.stderr)
    print(target)
