"""
A conversation with a model in the terminal.

    python chat.py --out_dir=out-chat
    python chat.py --init_from=HuggingFaceTB/SmolLM2-135M-Instruct --system="Answer in one sentence."
    echo "What is 47 + 38?" | python chat.py --out_dir=out-chat --temperature=0

Ctrl-C ends an answer, Ctrl-D the conversation. /help prints the commands. With --json, each line of stdin is a message,
{"content": "..."} or a JSON string, and each answer is one line, {"content", "tokens", "finish_reason"}.
"""

from configurator import configure

# ---------------------------------------------------------------------------------------------------------------------
# the model
out_dir = 'out'                       # folder of the model: its best.pt, or else its ckpt.pt
init_from = 'resume'                  # 'resume' (the model in out_dir), a path, 'owner/name' on the hub
# the answers
system = ''                           # system message, with which each conversation begins; '': the template's own
max_new_tokens = 512                  # tokens of an answer
temperature = 0.7                     # lower is safer, higher is wilder, 0 always takes the likeliest token
top_k: int | None = None              # sample among this many of the likeliest tokens, None: all
top_p: float | None = 0.95            # sample among the fewest tokens whose probabilities add up to this
min_p: float | None = None            # sample among tokens at least this many times as likely as the likeliest
repetition_penalty = 1.0              # above 1: tokens that have occurred become less likely
seed = 1337                           # for the random numbers of the answers
json = False                          # one JSON object per answer, for programs
# machine
quantize: str | None = None           # 'int8': weights in 8 bits
device = 'auto'                       # 'cuda', 'cuda:1', 'mps', 'cpu', 'auto' (the first of them that is available)
dtype = 'auto'                        # 'float32', 'bfloat16', 'float16', 'auto' (the fastest)
# ---------------------------------------------------------------------------------------------------------------------
config = configure(globals())

import contextlib
import os
import sys
from json import dumps, loads  # the name json is an option
from pathlib import Path

import torch

from flatgpt import batching, checkpoint, runtime, validate
from flatgpt.answers import Answer
from flatgpt.conversation import chat_template_of, messages_of, without_oldest_turn
from flatgpt.conversation import validate as validate_messages
from flatgpt.errors import UserError
from flatgpt.quantize import prepare
from flatgpt.tokenizer import read_text

HELP = """\
/reset          begin a new conversation
/system TEXT    begin a new one with this system message
/save FILE      write the conversation to FILE, as {"messages": ...}
/load FILE      go on with a conversation from a file
/quit           end, as Ctrl-D does"""

validate.chat_options(config)
interactive = sys.stdin.isatty() and not json


def notice(line):
    print(line, file=sys.stderr)


# the model

path = checkpoint.model_path(out_dir, init_from)
model, tok, ckpt = checkpoint.load_model(path)
template = chat_template_of(tok)
if template is None:
    raise UserError(f'{path} has no chat template: it was not trained on conversations; use sample.py')
rt = runtime.setup(device, dtype, False, seed, decoding=True)
notice(f'{path}, {checkpoint.stage(ckpt)}; {rt.describe()}')
del ckpt   # its memory
prepare(model, rt, quantize, dtype, gradually=True)
session = batching.Session(model, tok.vocab_size)   # encodes each turn once
context = model.config.block_size

# the conversation


def first_messages():
    """Return the messages with which a conversation begins."""
    return [{'role': 'system', 'content': system}] if system else []


messages = first_messages()
turns = 0   # answers so far, each of which has random numbers of its own


def prompt_ids():
    """Return the token ids of the conversation so far, (T,). The oldest turns are dropped until there is room for an
    answer."""
    room = context - min(max_new_tokens, context // 2)
    dropped = 0
    ids = template.prompt_ids(tok, messages)
    while len(ids) > room:
        shorter = without_oldest_turn(messages)
        if not shorter:
            break
        dropped += len(messages) - len(shorter)
        messages[:] = shorter
        ids = template.prompt_ids(tok, messages)
    if dropped:
        notice(f'the context of {context:,} tokens is full: the {dropped} oldest messages are dropped')
    if len(ids) >= context:
        raise UserError(f'a message of {len(ids):,} tokens: expected fewer than the context of {context:,}')
    return torch.from_numpy(ids)


def write_answer(ids):
    """Return the answer to a conversation, an Answer; its text is printed as it comes. Ctrl-C ends it."""
    made = Answer(tok, ids.numpy(), max_new_tokens)
    request = batching.Request(ids, max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed, turns)
    try:
        for token, log_prob in session.generate(request):
            made.add(token, log_prob)
            if not json:
                print(made.new_text(), end='', flush=True)
            if made.finish:
                return made
    except KeyboardInterrupt:
        if not interactive:
            raise
    made.end('length')
    return made


def answer(said):
    """Answer what the user says, and add both to the conversation; neither if that fails or there is no answer."""
    global turns
    messages.append({'role': 'user', 'content': said})
    text = ''
    try:
        validate_messages(messages, 'your message', answered=False)
        made = write_answer(prompt_ids())
        text = made.text
    finally:
        if text.strip():
            messages.append({'role': 'assistant', 'content': text})
        else:
            messages.pop()
    turns += 1
    if json:
        found = {'content': text, 'tokens': made.ids, 'finish_reason': made.finish}
        escaped = 'utf' not in sys.stdout.encoding.lower()   # a stream that cannot show all characters
        print(dumps(found, ensure_ascii=escaped), flush=True)
    else:
        print(made.new_text(), flush=True)


def read_json(text, where):
    """Return what a JSON text holds."""
    try:
        return loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f'{where}: no JSON: {error}') from None


def command(line):
    """Carry out a line that begins with '/'."""
    global messages, system, turns
    word, _, argument = line.partition(' ')
    argument = argument.strip()
    path = Path(os.path.expanduser(argument))
    if word == '/quit':
        raise EOFError
    if word in ('/reset', '/system'):
        system = argument if word == '/system' else system
        messages = first_messages()
        turns = 0
    elif word in ('/save', '/load') and not argument:
        notice(f'{word}: name a file, as in {word} talk.json')
    elif word == '/save':
        path.write_text(dumps({'messages': messages}, ensure_ascii=False, indent=1), encoding='utf-8')
        notice(f'{len(messages)} messages in {argument}')
    elif word == '/load':
        messages = messages_of(read_json(read_text(path), argument), argument)
        turns = sum(message['role'] == 'assistant' for message in messages)
        for message in messages:
            notice(f'{message["role"]}: {message["content"]}')
    else:
        notice(HELP)


def content_of(line):
    """Return the message in a line of --json."""
    said = read_json(line, f'{line[:60]!r}')
    if isinstance(said, dict):
        said = said.get('content')
    if not isinstance(said, str):
        raise UserError(f'{line[:60]!r}: expected a JSON string or {{"content": "..."}}')
    return said


if interactive:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  gives input() its line editing
    notice('Type a message. /help: commands, Ctrl-C: end an answer, Ctrl-D: end.')
while True:
    try:
        line = input('> ' if interactive else '')
        if interactive and line.startswith('/'):
            command(line)
        elif line.strip():
            answer(content_of(line) if json else line)
    except EOFError:
        break
    except KeyboardInterrupt:   # while typing
        if not interactive:
            raise
        notice('')
    except (OSError, UnicodeError, UserError) as error:   # a wrong file or message does not end a conversation
        if not interactive:
            raise
        notice(error)
