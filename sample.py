"""
Text from a model: continue a prompt, or many.

    python sample.py --out_dir=out-python-char --start="def "
    python sample.py --out_dir=out-shakespeare-char --start="ROMEO:" --num_samples=3 --temperature=0.6
    python sample.py --init_from=some/ckpt.pt --start=FILE:prompt.txt --num_samples=1 --stream > sample.txt
    python sample.py --out_dir=out-x --prompts=prompts.jsonl --json > answers.jsonl
    python sample.py --out_dir=out-x                            in a terminal: type a prompt, read, type the next

stdout holds the samples, a line of dashes after each, or with --json one object per line, and nothing else; the rest
goes to stderr. The same command gives the same samples; in float32 also however many are drawn together.
"""

from configurator import configure

# ---------------------------------------------------------------------------------------------------------------------
# what to continue
out_dir = 'out'                       # folder of the model: its best.pt, or else its ckpt.pt
init_from = 'resume'                  # 'resume' (the model in out_dir), a path, 'gpt2', 'owner/name' on the hub
tokenizer_of: str | None = None       # for a checkpoint of nanoGPT, which has none: the dataset it was trained on
start: str | None = None              # the prompt, may be empty, None: a line break; FILE:prompt.txt reads a file
prompts: str | None = None            # a file of prompts: its lines, or of .jsonl, .json, .csv ... what "prompt" says
block_size: int | None = None         # tokens that the model sees, more than in training only with rope and alibi
# how
num_samples = 10                      # per prompt, each from a random stream of its own
max_new_tokens = 500                  # length of a sample at most
temperature = 0.8                     # lower is safer, higher is wilder, 0 always takes the likeliest token
top_k: int | None = 200               # draw among so many likeliest tokens, None among all
top_p: float | None = None            # nucleus: the fewest likely tokens that add up to this probability, such as 0.9
min_p: float | None = None            # tokens at least so many times as probable as the most likely one, such as 0.05
repetition_penalty = 1.0              # above 1: what was there already becomes less likely
stop = ''                             # text before which a sample ends; several as a JSON list: '["\n", "Q:"]'
exact_window = False                  # past block_size, read the whole context anew for each token, as nanoGPT does
seed = 1337                           # of the random numbers; the same seed gives the same samples
# how to show it
stream: bool | str = 'auto'           # tokens as they come, one sample after another; 'auto': if typed in a terminal
json = False                          # {"prompt", "text", "tokens", "finish_reason", "mean_logprob"} per line
# machine
batch_size = 64                       # samples drawn together
quantize: str | None = None           # 'int8': weights in 8 bits, half the memory to read, a little less exact
device = 'auto'                       # 'cuda', 'cuda:1', 'mps', 'cpu', 'auto' (the first of them that is there)
dtype = 'auto'                        # 'float32', 'bfloat16', 'float16', 'auto' (the fastest in at least 16 bits)
compile: str | bool = False           # torch.compile of the decoding step: True, False, 'auto' (where it is a GPU)
# ---------------------------------------------------------------------------------------------------------------------
config = configure(globals())

import contextlib
import sys
import time
from json import dumps  # the name json is an option

from tqdm import tqdm

from flatgpt import answers, checkpoint, corpus, engine, runtime, tokenizer, validate
from flatgpt.errors import UserError
from flatgpt.evaluation import naming
from flatgpt.quantize import prepare

validate.sample_options(config)
stops = answers.parse_stops(stop)
terminal = sys.stdout.isatty() and not json
interactive = terminal and sys.stdin.isatty() and start is None and prompts is None
if stream == 'auto':
    stream = terminal and num_samples == 1 and prompts is None

# prompts, before the model is loaded, so that a mistake is found at once


def read_prompts(file):
    """[(file and line, prompt)] of a file: a record of text is a prompt, of others what is under "prompt"."""
    found = []
    for where, record in corpus.read_records(file):
        prompt = record.get('prompt') if isinstance(record, dict) else record
        if not isinstance(prompt, str):
            raise UserError(f'{where}: expected {{"prompt": "..."}}')
        found.append((where, tokenizer.no_surrogates(prompt)))
    if not found:
        raise UserError(f'{file} has no prompt')
    return found


if prompts is not None:
    texts = read_prompts(prompts)
elif start is None:
    texts = [('start', '\n')]
elif start.startswith('FILE:'):
    file = start.removeprefix('FILE:')
    texts = [(file, tokenizer.read_text(file))]
else:
    texts = [('start', start)]

# model

path = checkpoint.model_path(out_dir, init_from)
model, tok, ckpt = checkpoint.load_model(path, tokenizer_of)
rt = runtime.setup(device, dtype, compile, seed, decoding=True)
rt.notice(f'{path}, {checkpoint.stage(ckpt)}; {rt.describe()}')
del ckpt   # its memory
if block_size is not None:
    validate.set_context(model, block_size)

# from prompts to samples, before the weights are moved


class Sample(answers.Answer):
    """A prompt and the text that continues it."""

    def __init__(self, where, prompt):
        with naming(where):
            super().__init__(tok, tok.encode_prompt(prompt), max_new_tokens, stops)
        self.prompt = prompt


if interactive:
    samples = []
    notices = [answers.template_notice(tok, prompt='')]
else:
    samples = [Sample(where, text) for where, text in texts for _ in range(num_samples)]
    lengths = [len(sample.prompt_ids) for sample in samples[::num_samples]]
    notices = [answers.template_notice(tok, samples[0].prompt), answers.cut_notice(model.config, lengths, tok.begin),
               answers.memory_notice(model, rt, min(batch_size, len(samples)), max(lengths) + max_new_tokens)]
for text in filter(None, notices):
    rt.notice(text)

rows = 1 if stream or interactive else min(batch_size, len(samples))
prepare(model, rt, quantize, dtype, rows, gradually=True)
if rt.compile:
    engine.compile_step(model)


def grow(samples, first_row):
    """Continue the prompts of some samples, the first of which has the random numbers of first_row, token by token."""
    return answers.grow(
        model, samples, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed, first_row=first_row,
        repetition_penalty=repetition_penalty, exact_window=exact_window, static_cache=rt.compile)


def show(text):
    if sys.stdout.isatty():   # where tabs of eight columns would move code out of sight
        text = text.replace('\t', '    ')
    print(text, end='', flush=True)


def show_as_it_grows(sample, row):
    show(sample.prompt)
    for _ in grow([sample], row):
        show(sample.new_text())


def as_json(sample):
    """One line of JSON; mean_logprob is in nats per token, of the model itself."""
    mean = sample.log_prob / len(sample.ids) if sample.ids else None
    escaped = 'utf' not in sys.stdout.encoding.lower()   # a stream that cannot show all characters
    return dumps({'prompt': sample.prompt, 'text': sample.text, 'tokens': sample.ids, 'mean_logprob': mean,
                  'finish_reason': sample.finish}, ensure_ascii=escaped) + '\n'


DASHES = '\n' + '-' * 15 + '\n'

if interactive:
    with contextlib.suppress(ImportError):   # Windows
        import readline  # noqa: F401  so that input() has line editing and a history
    rt.notice('type a prompt; Ctrl-C ends an answer, Ctrl-D ends this')
    row = 0
    while True:
        try:
            sample = Sample('prompt', input('> '))
        except EOFError:
            show('\n')
            sys.exit()
        except KeyboardInterrupt:   # the line is dropped, not the program
            show('\n')
            continue
        except UserError as error:   # a character that the model does not know
            rt.notice(error)
            continue
        with contextlib.suppress(KeyboardInterrupt):
            show_as_it_grows(sample, row)
        show('\n')
        row += 1

t0 = time.perf_counter()
if stream:
    for row, sample in enumerate(samples):
        show_as_it_grows(sample, row)
        show(DASHES)
else:
    bar = tqdm(total=len(samples) * max_new_tokens, unit='tok', leave=False, disable=None)
    for row in range(0, len(samples), batch_size):
        batch = samples[row:row + batch_size]
        for _ in grow(batch, row):
            bar.update(len(batch))
        for sample in batch:
            show(as_json(sample) if json else sample.prompt + sample.text + DASHES)
    bar.close()
dt = time.perf_counter() - t0
n = sum(len(sample.ids) for sample in samples)
rt.notice(f'{n:,} tokens in {dt:.1f} s, {n / dt:,.0f} tok/s')
