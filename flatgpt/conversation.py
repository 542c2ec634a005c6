"""
Conversations: messages out of the forms in which people keep them, and their text by the chat template of a model.

A conversation is a list of messages, {'role': 'system', 'user', 'assistant' or 'tool', 'content': text}. A chat
template is a Jinja program that comes with a model and turns such a list into the text that the model was trained on.
It is code from elsewhere: it runs in Jinja's sandbox, with limits on time and on the size of what it makes.
"""

import datetime
import functools
import json
import re
import sys
import time
from collections.abc import Sequence

import numpy as np

from flatgpt.errors import UserError

Message = dict[str, str]
ROLES = ('system', 'user', 'assistant', 'tool')
SHAREGPT = {'system': 'system', 'human': 'user', 'user': 'user', 'gpt': 'assistant', 'assistant': 'assistant',
            'tool': 'tool', 'observation': 'tool', 'function_response': 'tool'}   # what its files have in `from`
MAX_SECONDS = 2.0         # for one run of a template
MAX_CHARACTERS = 10**7    # that a template may make

# for models that come without a template; the two special tokens are in the tokenizers that data/chat/prepare.py trains
CHATML = """\
{% for message in messages %}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
{%- endif %}
"""


# ---------------------------------------------------------------------------------------------------------------------
# records to messages

def messages_of(record: dict, where: str = 'a conversation') -> list[Message]:
    """The messages of one record: {"messages": [{"role", "content"}]}, minimind's and ShareGPT's {"conversations": ...}
    or Alpaca's {"instruction", "input", "output"}. UserError, which begins with `where`, for anything else."""
    if not isinstance(record, dict):
        raise UserError(f'{where}: expected a JSON object, found {brief(record)}')
    if 'instruction' not in record:
        found = record.get('messages', record.get('conversations', record.get('conversation')))
        if not isinstance(found, list):
            raise UserError(f'{where}: expected "messages" or "conversations", a list, or "instruction" and "output"; '
                            f'found {", ".join(map(repr, record)) or "nothing"}')
        return messages_from(found, where)
    question = text_of(record['instruction'], where)
    if record.get('input'):
        question += '\n' + text_of(record['input'], where)
    found = [{'role': 'user', 'content': question}, {'role': 'assistant', 'content': record.get('output')}]
    if record.get('system'):
        found.insert(0, {'role': 'system', 'content': record['system']})
    return messages_from(found, where)


def messages_from(found, where: str = 'messages', answered: bool = True) -> list[Message]:
    """The messages of a list as files and requests have it, with OpenAI's names or ShareGPT's; validated. UserError."""
    if not isinstance(found, list):
        raise UserError(f'{where}: expected a list of messages, found {brief(found)}')
    messages = []
    for message in found:
        role, content = turn_of(message, where)
        if role not in ROLES:
            raise UserError(f'{where}: role {brief(role)}, expected one of {", ".join(ROLES)}')
        messages.append({'role': role, 'content': text_of(content, where)})
    validate(messages, where, answered)
    return messages


def turn_of(message, where: str) -> tuple:
    """Role and content of one entry of a list of messages."""
    if not isinstance(message, dict):
        raise UserError(f'{where}: expected messages with "role" and "content", found {brief(message)}')
    if 'from' in message and 'role' not in message:
        role = message['from']
        return SHAREGPT.get(role, role) if isinstance(role, str) else role, message.get('value')
    return message.get('role'), message.get('content')


def text_of(content, where: str) -> str:
    """The text of a message's content: a string, or a list of OpenAI's parts of type 'text', joined."""
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or part.get('type') != 'text' or not isinstance(part.get('text'), str):
                found = part.get('type') if isinstance(part, dict) else part
                raise UserError(f'{where}: content with a part of type {brief(found)}: only text can be read')
        return ''.join(part['text'] for part in content)
    if not isinstance(content, str):
        raise UserError(f'{where}: content {brief(content)}, expected a text')
    return content


def validate(messages: Sequence[Message], where: str = 'a conversation', answered: bool = True):
    """Raise UserError if messages are not a conversation: a system message only at the beginning, then user and
    assistant in turn, tools only after an assistant, no empty text. answered: whether an assistant's turn is needed."""
    previous = 'system'
    for number, message in enumerate(messages, 1):
        role = message['role']
        if not message['content'].strip():
            raise UserError(f'{where}: message {number}, of the {role}, is empty')
        allowed = {'system': ('user',) if number > 1 else ('system', 'user'), 'user': ('assistant',),
                   'assistant': ('user', 'tool'), 'tool': ('tool', 'assistant')}[previous]
        if role not in allowed:
            after = f'after the {previous}' if number > 1 else 'at the beginning'
            raise UserError(f'{where}: message {number} is of the {role}, {after}: expected {" or ".join(allowed)}')
        previous = role
    if not messages:
        raise UserError(f'{where}: it has no message')
    if answered and all(message['role'] != 'assistant' for message in messages):
        raise UserError(f'{where}: no message is of the assistant, nothing can be learned from it')


def brief(value) -> str:
    """A value in at most 60 characters, for an error."""
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + '...'


# ---------------------------------------------------------------------------------------------------------------------
# templates

class ChatTemplate:
    """A chat template, and the special tokens that it may name: {'bos_token': text, 'eos_token': text, ...}."""

    def __init__(self, source: str, special: dict[str, str] | None = None):
        self.source = source
        self.special = {name: token for name, token in (special or {}).items() if isinstance(token, str)}
        self.program = compiled(source)

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False, **variables) -> str:
        """The text of messages. add_generation_prompt: end with what comes before an answer of the assistant. UserError
        if the template refuses them, fails, or takes too long."""
        import jinja2

        given = {**self.special, 'messages': [dict(message) for message in messages], 'tools': None,
                 'add_generation_prompt': add_generation_prompt, **variables}
        try:
            with TimeLimit(MAX_SECONDS):
                text = ''.join(self.limited(self.program.generate(given)))
        except TimeLimit.Reached:
            raise UserError(f'the chat template takes more than {MAX_SECONDS:g} seconds') from None
        except jinja2.TemplateError as error:
            raise UserError(f'the chat template refuses this conversation: {one_line(error)}') from None
        except (ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError,
                ValueError) as error:
            raise UserError(f'the chat template fails: {type(error).__name__}: {one_line(error)}') from None
        return text

    @staticmethod
    def limited(pieces):
        """Pieces of text as they are; UserError once they are too long together."""
        length = 0
        for piece in pieces:
            length += len(piece)
            if length > MAX_CHARACTERS:
                raise UserError(f'the chat template makes more than {MAX_CHARACTERS:,} characters')
            yield piece

    def render_with_spans(self, messages: Sequence[Message],
                          add_generation_prompt: bool = False) -> tuple[str, list[tuple[int, int]]]:
        """The text of messages, and for each of them where its content stands in it: (start, end). A template may strip
        contents and leave some out ((0, 0)); UserError if it changes them in another way.

        Each content is replaced by a marker that the template cannot know. What stands between the markers is the
        template's own text, and must stand between the contents too.
        """
        text = self.render(messages, add_generation_prompt)
        markers = [f'\ue000{number}\ue001' for number in range(len(messages))]
        with_markers = [{**message, 'content': marker} for message, marker in zip(messages, markers)]
        marked = self.render(with_markers, add_generation_prompt)
        spans = [(0, 0)] * len(messages)
        before, *rest = re.split('\ue000(\\d+)\ue001', marked)   # text, number of a message, text, number, ...
        written = len(before)   # characters of text that are accounted for
        valid = text.startswith(before)
        for number, after in zip(map(int, rest[::2]), rest[1::2]):
            fits = [form for form in forms(messages[number]['content']) if text.startswith(form + after, written)]
            valid = valid and bool(fits) and spans[number] == (0, 0)
            if not valid:
                break
            spans[number] = (written, written + len(fits[0]))
            written += len(fits[0]) + len(after)
        if not valid or written != len(text):
            raise changes_content()
        return text, spans

    def prompt_ids(self, tok, messages: Sequence[Message]) -> np.ndarray:
        """Token ids, (T,), of messages and of what comes before the next answer. Names of special tokens that a message
        contains are read as characters."""
        contents = [message['content'] for message in messages]
        if any(has_special(tok, content) for content in contents):
            text, spans = self.render_with_spans(messages, add_generation_prompt=True)
            return encode_literally(tok, text, spans)
        return tok.encode(self.render(messages, add_generation_prompt=True), special=True).astype(np.int64)

    def training_ids(self, tok, messages: Sequence[Message]) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of a conversation, (T,), and which of them are to be learned, (T,) of bool: those of the
        assistant's contents, and a special token that ends one. UserError if the tokenizer changes the text."""
        text, spans = self.render_with_spans(messages)
        ids = encode_literally(tok, text, spans)
        starts = []   # the character at which each token begins
        piece = tok.stream()
        decoded = ''
        for i in ids:
            starts.append(len(decoded))
            decoded += piece(i)
        decoded += piece(None)
        extra = len(decoded) - len(text)   # a blank before the text, as SentencePiece has it
        if extra < 0 or decoded[extra:] != text:
            raise UserError('the tokenizer changes the text of a conversation: which tokens are the assistant\'s is '
                            'unknown')
        starts = np.array(starts) - extra
        learned = np.zeros(len(ids), bool)
        for message, (start, end) in zip(messages, spans):
            if message['role'] != 'assistant' or start == end:
                continue
            learned |= (starts >= start) & (starts < end)
            after = int(np.searchsorted(starts, end))   # the first token behind the content
            if after < len(ids) and is_special(tok, int(ids[after])):
                learned[after] = True
            blank = len(text[end:]) - len(text[end:].lstrip())   # as in Llama 2, where a space comes before </s>
            last = int(np.searchsorted(starts, end + blank))
            if last < len(ids) and ids[last] in tok.ends:
                learned[after:last + 1] = True
        return ids, learned


def chat_template_of(tok) -> ChatTemplate | None:
    """The chat template that came with a tokenizer, or None."""
    files = getattr(tok, 'files', {})
    settings = files.get('tokenizer_config.json', {})
    source = files.get('chat_template.jinja', settings.get('chat_template'))
    if isinstance(source, list):   # several by name
        named = {entry.get('name'): entry.get('template') for entry in source if isinstance(entry, dict)}
        source = named.get('default')
    if not isinstance(source, str):
        return None
    special = {}
    for name, token in {**files.get('special_tokens_map.json', {}), **settings}.items():
        if name.endswith('_token'):
            special[name] = token.get('content') if isinstance(token, dict) else token
    return ChatTemplate(source, special)


def add_chatml(tok) -> ChatTemplate:
    """Give a tokenizer that has its special tokens the template of ChatML; its messages end a sample from then on."""
    end = int(tok.encode('<|im_end|>', special=True)[0])
    tok.ends = (end, *(i for i in tok.ends if i != end))
    tok.files = {**tok.files, 'chat_template.jinja': CHATML, 'tokenizer_config.json': {'eos_token': '<|im_end|>'}}
    return chat_template_of(tok)


def is_special(tok, i: int) -> bool:
    """Whether a token is a special one, which a text alone never becomes."""
    return i in tok.ends or (len(tok.encode(tok.decode([i]))) != 1)


def has_special(tok, text: str) -> bool:
    """Whether a text contains the name of a special token."""
    return not np.array_equal(tok.encode(text), tok.encode(text, special=True))


def encode_literally(tok, text: str, spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """Token ids of a text in which the names of special tokens are read as such, but not within these spans."""
    literal = sorted((start, end) for start, end in spans if has_special(tok, text[start:end]))
    parts = []
    done = 0
    for start, end in literal:
        parts += [tok.encode(text[done:start], special=True), tok.encode(text[start:end])]
        done = end
    parts.append(tok.encode(text[done:], special=True))
    return np.concatenate(parts).astype(np.int64)


def changes_content() -> UserError:
    """The error for a template of which it is not known where the answers stand in its text."""
    return UserError('the chat template changes what the messages say: which tokens are the assistant\'s is unknown')


def forms(content: str) -> list[str]:
    """A message's content in the forms that templates give it, the longest first."""
    return [content, content.rstrip(), content.lstrip(), content.strip()]


def one_line(error: Exception) -> str:
    """The message of an error, in one line of at most 200 characters."""
    return ' '.join(str(error).split())[:200]


@functools.lru_cache(maxsize=16)
def compiled(source: str):
    """A Jinja template, compiled in a sandbox. UserError if its syntax is wrong."""
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Sandbox(ImmutableSandboxedEnvironment):
        """Jinja's sandbox, in which products cannot make huge texts or numbers."""
        intercepted_binops = frozenset(('*', '**', '%'))

        def call_binop(self, context, operator, left, right):
            if operator != '%' or isinstance(left, str):
                for value in (left, right):
                    if isinstance(value, int) and abs(value) > 10_000:
                        raise jinja2.TemplateRuntimeError(f'{operator} with {value}: expected at most 10,000')
                if operator == '%' and len(left) > 200:
                    raise jinja2.TemplateRuntimeError('% with a long text')
            return super().call_binop(context, operator, left, right)

    def refuse(message):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    extensions = ['jinja2.ext.loopcontrols', generation_tag()]
    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters['tojson'] = tojson   # Jinja's own escapes HTML
    environment.globals['raise_exception'] = refuse
    environment.globals['strftime_now'] = lambda form: datetime.datetime.now().strftime(form)
    try:
        return environment.from_string(source)
    except (jinja2.TemplateError, RecursionError) as error:
        line = getattr(error, 'lineno', None)
        raise UserError(f'the chat template has an error{f" in line {line}" if line else ""}: '
                        f'{one_line(error)}') from None


@functools.cache
def generation_tag():
    """The extension of Jinja for {% generation %} ... {% endgeneration %}, which some templates put around an answer:
    the tags are passed over."""
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = {'generation'}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(('name:endgeneration',), drop_needle=True)

    return Generation


class TimeLimit:
    """A context in which Python code of this thread runs for so many seconds at most; then it raises Reached.

    Between two lines of code the clock is read (sys.settrace), because a thread cannot be stopped from outside.
    """

    class Reached(BaseException):   # not an Exception, which a template could pass over
        pass

    def __init__(self, seconds: float):
        self.seconds = seconds

    def __enter__(self):
        self.end = time.monotonic() + self.seconds
        self.before = sys.gettrace()
        sys.settrace(self.look)

    def __exit__(self, *error):
        sys.settrace(self.before)

    def look(self, frame, event, argument):
        if time.monotonic() > self.end:
            raise self.Reached
        return self.look
