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

import contextlib
import json as jsons
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from configurator import configure
from flatgpt import checkpoint, engine, runtime, tokenizer, validate
from flatgpt.errors import UserError
from flatgpt.quantize import int8, pack

# ---------------------------------------------------------------------------------------------------------------------
# what to continue
out_dir = 'out'                       # folder of the model: its best.pt, or else its ckpt.pt
init_from = 'resume'                  # 'resume' (the model in out_dir), a path, 'gpt2', 'owner/name' on the hub
tokenizer_of: str | None = None       # for a checkpoint of nanoGPT, which has none: the dataset it was trained on
start: str | None = None              # the prompt, may be empty, None: a line break; FILE:prompt.txt reads a file
prompts: str | None = None            # a file of prompts, one per line, or .jsonl with {"prompt": ...}
# how
num_samples = 10                      # per prompt, each from a random stream of its own
max_new_tokens = 500                  # per sample
temperature = 0.8                     # lower is safer, higher is wilder, 0 always takes the likeliest token
top_k: int | None = 200               # draw among so many likeliest tokens, None among all
top_p: float | None = None            # of these the fewest that together are so probable, such as 0.9
min_p: float | None = None            # and those at least so many times as probable as the likeliest, such as 0.05
repetition_penalty = 1.0              # above 1: what was there already becomes less likely
stop = ''                             # text before which a sample ends; several as a JSON list: '["\n", "Q:"]'
exact_window = False                  # past block_size, read the whole context anew for each token, as nanoGPT does
seed = 1337
# how to show it
stream: bool | str = 'auto'           # tokens as they come, one sample after another; 'auto': if typed in a terminal
json = False                          # {"prompt", "text", "tokens", "finish_reason", "mean_logprob"} per line
# machine
batch_size = 64                       # samples drawn together
quantize: str | None = None           # 'int8': weights in 8 bits, on a CPU in bfloat16 half of what a token reads
device = 'auto'                       # 'cuda', 'cuda:1', 'mps', 'cpu', 'auto' (the first of them that is there)
dtype = 'auto'                        # 'float32', 'bfloat16', 'float16', 'auto' (bfloat16 if native)
compile: str | bool = False           # torch.compile of the decoding step: True, False, 'auto' (where it is a GPU)
# ---------------------------------------------------------------------------------------------------------------------
config = configure(globals())
chat = start is None and prompts is None and sys.stdin.isatty() and sys.stdout.isatty() and not json

# refusals

validate.sample_options(config)
controls = {'temperature': temperature, 'top_k': top_k, 'top_p': top_p, 'min_p': min_p,
            'repetition_penalty': repetition_penalty}
stops = engine.parse_stops(stop)
if stream == 'auto':
    stream = sys.stdout.isatty() and num_samples == 1 and prompts is None and not json


# prompts

def read_prompts(file):
    """The prompts in a file: its lines, or if it is JSONL the texts under "prompt"."""
    found, text = [], tokenizer.read_text(file).removeprefix('\ufeff')
    for number, line in enumerate(text.replace('\r\n', '\n').split('\n'), 1):
        if line.strip() and Path(file).suffix.lower() == '.jsonl':
            try:
                found.append(jsons.loads(line)['prompt'])
                found[-1].encode()
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                raise UserError(f'{file}, line {number}: expected {{"prompt": "..."}}') from None
        elif line.strip():
            found.append(line)
    if not found:
        raise UserError(f'{file} has no prompt')
    return found


if prompts is not None:
    texts = read_prompts(prompts)
elif start is not None and start.startswith('FILE:'):
    texts = [tokenizer.read_text(start.removeprefix('FILE:'))]
else:
    texts = ['\n' if start is None else start]

# model

path = checkpoint.model_path(out_dir, init_from)
model, tok, ckpt = checkpoint.load_model(path, tokenizer_of)
rt = runtime.setup(device, dtype, compile, seed)
print(f'{path}, {checkpoint.stage(ckpt)}; {rt.describe()}', file=sys.stderr)
model.to(rt.device, rt.dtype)
ckpt = None
if quantize == 'int8':
    int8(model)
if rt.compile:
    rt.compile_step(model)
elif not quantize:
    pack(model)


# one sample: its text, which ends before a stop

class Sample:
    def __init__(self, prompt):
        self.prompt, self.text, self.ids, self.logprob, self.finish = prompt, '', [], 0.0, None
        ids = tok.encode_prompt(prompt)
        self.piece, self.shown = tok.stream(ids), 0   # whole characters out of tokens; how many are out
        self.start = torch.from_numpy(ids.astype('int64'))

    def add(self, token, logprob):
        """Take one more token, unless this sample has ended."""
        if self.finish:
            return
        before = len(self.text)
        self.logprob += logprob
        self.ids.append(token)
        if token in tok.ends:
            self.finish = 'stop'
        else:
            self.text += self.piece(token)
        if len(self.ids) == max_new_tokens and not self.finish:
            self.finish = 'length'
        if self.finish:
            self.text += self.piece(None)
        ends = [self.text.find(text, max(before - len(text), 0)) for text in stops]
        if max(ends, default=-1) >= 0:
            self.text, self.finish = self.text[:min(end for end in ends if end >= 0)], 'stop'

    def fresh(self):
        """What can be shown that has not been: nothing that may be the beginning of a stop."""
        held = 0 if self.finish else max((n for text in stops for n in range(1, len(text))
                                          if self.text.endswith(text[:n])), default=0)
        new = self.text[self.shown:len(self.text) - held]
        self.shown += len(new)
        return new


DASHES = '-' * 15 + '\n'


def complete(samples, row):
    """Complete samples together, the first of which has stream number row, yielding after each token."""
    tokens = engine.generate(model, [sample.start for sample in samples], max_new_tokens, **controls, seed=seed,
                             first_row=row, vocab_size=tok.vocab_size, exact_window=exact_window,
                             static_cache=rt.compile, log_probs=True)
    try:
        for drawn, logprobs in tokens:
            for sample, token, logprob in zip(samples, drawn.tolist(), logprobs.tolist()):
                sample.add(token, logprob)
            yield
            if all(sample.finish for sample in samples):
                return
    except ValueError as error:
        raise UserError(f'{path}: {error}') from None


def show(text):
    print(text, end='', flush=True)


# what was asked for, in one of three ways: in a conversation, one after another as it comes, or many together

samples = [Sample(text) for text in texts for _ in range(num_samples)]
t0 = time.perf_counter()
if chat:
    print('type a prompt; Ctrl-C ends an answer, Ctrl-D ends this', file=sys.stderr)
    samples = []
    with contextlib.suppress(EOFError):
        while True:
            print('> ', end='', file=sys.stderr, flush=True)
            try:
                sample = Sample(input())
            except UserError as error:   # a character that the model does not know
                print(error, file=sys.stderr)
                continue
            samples.append(sample)
            show(sample.prompt)
            with contextlib.suppress(KeyboardInterrupt):
                for _ in complete([sample], len(samples) - 1):
                    show(sample.fresh())
            show('\n')
    show('\n')
elif stream:
    for row, sample in enumerate(samples):
        show(sample.prompt)
        for _ in complete([sample], row):
            show(sample.fresh())
        show('\n' + DASHES)
else:
    bar = tqdm(total=len(samples) * max_new_tokens, unit='tok', leave=False, disable=None)
    for row in range(0, len(samples), batch_size):
        together = samples[row:row + batch_size]
        for _ in complete(together, row):
            bar.update(len(together))
        for s in together:
            if json:
                mean = s.logprob / len(s.ids) if s.ids else None   # in nats per token, of the model itself
                show(jsons.dumps({'prompt': s.prompt, 'text': s.text, 'tokens': s.ids, 'mean_logprob': mean,
                                  'finish_reason': s.finish or 'length'}, ensure_ascii=False) + '\n')
            else:
                show(s.prompt + s.text + '\n' + DASHES)
    bar.close()
dt, n = time.perf_counter() - t0, sum(len(sample.ids) for sample in samples)
if not chat:
    print(f'{n:,} tokens in {dt:.1f} s, {n / dt:,.0f} tok/s', file=sys.stderr)
