"""
Conversations: messages out of the forms in which people keep them, and their text by the chat template of a model.

A conversation is a list of messages, {'role': 'system', 'user', 'assistant' or 'tool', 'content': text}. A chat
template is a Jinja program that comes with a model and turns such a list into the text that the model was trained on.
"""

import functools
import json
import re
from collections.abc import Sequence

import numpy as np

from flatgpt import sandbox
from flatgpt.errors import UserError
from flatgpt.tokenizer import no_surrogates

Message = dict   # {'role': text, 'content': text}, and 'tool_calls' where an assistant calls tools
ROLES = ('system', 'user', 'assistant', 'tool')
SHAREGPT = {'system': 'system', 'human': 'user', 'user': 'user', 'gpt': 'assistant', 'assistant': 'assistant',
            'tool': 'tool', 'observation': 'tool', 'function_response': 'tool'}   # what its files have in `from`
MARKER = '\ue000{}\ue001'   # a text that no message has: of private characters

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
    if record.get('tools'):
        raise UserError(f'{where}: definitions under "tools" are not read: put them into the system message')
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
        if not isinstance(message, dict):
            raise UserError(f'{where}: expected messages with "role" and "content", found {brief(message)}')
        role = message.get('role')
        content = message.get('content')
        if 'from' in message and 'role' not in message:
            role = SHAREGPT.get(str(message['from']), message['from'])
            content = message.get('value')
        if role not in ROLES:
            raise UserError(f'{where}: role {brief(role)}, expected one of {", ".join(ROLES)}')
        calls = {}
        if role == 'assistant' and message.get('tool_calls'):
            calls = {'tool_calls': tool_calls_of(message['tool_calls'], where)}
            content = content or ''
        messages.append({'role': role, 'content': text_of(content, where), **calls})
    validate(messages, where, answered)
    return messages


def tool_calls_of(calls, where: str) -> list[dict]:
    """Calls of tools in OpenAI's form as templates need them: with arguments that are an object, not its JSON."""
    try:
        functions = [call['function'] for call in calls]
        found = [{'name': function['name'], 'arguments': function['arguments']} for function in functions]
        for function in found:
            if isinstance(function['arguments'], str):
                function['arguments'] = json.loads(function['arguments'])
            if not isinstance(function['arguments'], dict) or not isinstance(function['name'], str):
                raise TypeError
    except (KeyError, RecursionError, TypeError, ValueError):
        raise UserError(f'{where}: tool_calls {brief(calls)}, expected [{{"function": {{"name": text, "arguments": '
                        f'object}}}}]') from None
    return [{'type': 'function', 'function': function} for function in found]


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
        if not message['content'].strip() and 'tool_calls' not in message:
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


def without_oldest_turn(messages: Sequence[Message]) -> list[Message]:
    """The messages without the oldest question and what answers it; a system message stays. [] if only one question is
    left."""
    first = 1 if messages[0]['role'] == 'system' else 0
    for number in range(first + 1, len(messages)):
        if messages[number]['role'] == 'user':
            return [*messages[:first], *messages[number:]]
    return []


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
        self.program = sandbox.compiled(source)
        self.pieces = {}   # the template's own text, for find_spans(), by the roles of the messages
        self.leads = {}    # what lead() has found

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False, **variables) -> str:
        """The text of messages. add_generation_prompt: end with what comes before an answer of the assistant. UserError
        if the template refuses them, fails, or takes too long."""
        return sandbox.run(self.program, {
            **self.special, 'messages': [dict(message) for message in messages], 'tools': None,
            'add_generation_prompt': add_generation_prompt, **variables})

    def render_with_spans(self, messages: Sequence[Message],
                          add_generation_prompt: bool = False) -> tuple[str, list[tuple[int, int]]]:
        """The text of messages, and for each of them where its content stands in it: (start, end). A template may strip
        contents and leave some out ((0, 0)); ChangesContent if it changes them in another way.

        What stands between the contents is the template's own text. It is found by rendering messages of the same roles
        whose contents are markers that the template cannot know."""
        text = self.render(messages, add_generation_prompt)
        key = (*(message['role'] for message in messages), add_generation_prompt)
        spans = find_spans(text, messages, self.pieces[key]) if key in self.pieces else None
        if spans is None:   # the template may look at the contents or at the clock
            marked = [{**message, 'content': MARKER.format(number)} for number, message in enumerate(messages)]
            self.pieces[key] = re.split(MARKER.format(r'(\d+)'), self.render(marked, add_generation_prompt))
            spans = find_spans(text, messages, self.pieces[key])
        if spans is None:
            raise ChangesContent
        return text, spans

    def lead(self, roles: tuple) -> str:
        """What the template writes between the prompt for the last answer and its content: a blank in Llama 2, an empty
        <think> block in Qwen3."""
        if roles not in self.leads:
            messages = [{'role': role, 'content': MARKER.format(number)} for number, role in enumerate(roles)]
            prompt = self.render(messages[:-1], add_generation_prompt=True)
            text = self.render(messages)
            lead, found, _ = text[len(prompt):].partition(messages[-1]['content'])
            self.leads[roles] = lead if found and text.startswith(prompt) else ''
        return self.leads[roles]

    def answer_spans(self, messages: Sequence[Message]) -> list[tuple[int, int]]:
        """Where the answers stand in the text of messages, with their end tokens, whatever the template has made of
        their contents: each is what the messages up to it have more than the prompt before it. An answer is left out
        if the text does not begin with both: where Qwen3 has dropped thoughts. ChangesContent if none is left."""
        text = self.render(messages)
        spans = []
        for number, message in enumerate(messages):
            if message['role'] == 'assistant':
                prompt = self.render(messages[:number], add_generation_prompt=True)
                answered = self.render(messages[:number + 1])
                if text.startswith(answered) and answered.startswith(prompt):
                    spans.append((len(prompt), len(answered.rstrip())))
        if not spans:
            raise ChangesContent
        return spans

    def refuse_left_out(self, messages: Sequence[Message]):
        """UserError if the template leaves out a call of a tool, or what a tool says."""
        for number, message in enumerate(messages):
            if message['role'] == 'tool':
                other = {**message, 'content': MARKER}
            elif 'tool_calls' in message:
                other = {**message, 'tool_calls': [{'type': 'function', 'function': {'name': MARKER, 'arguments': {}}}]}
            else:
                continue
            if MARKER not in self.render([*messages[:number], other, *messages[number + 1:]]):
                what = 'messages of the role tool' if message['role'] == 'tool' else 'tool_calls'
                raise UserError(f'the chat template leaves out {what}: this model does not know tools')

    def prompt_ids(self, tok, messages: Sequence[Message]) -> np.ndarray:
        """Token ids, (T,), of messages and of what comes before the next answer. Names of special tokens that a message
        contains are read as characters."""
        self.refuse_left_out(messages)
        if any(has_special(tok, message['content']) for message in messages):
            text, spans = self.render_with_spans(messages, add_generation_prompt=True)
            return encode_literally(tok, text, spans)
        return tok.encode(self.render(messages, add_generation_prompt=True), special=True).astype(np.int64)

    def training_ids(self, tok, messages: Sequence[Message]) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of a conversation, (T,), and which of them are to be learned, (T,) of bool: those of the
        assistant's contents, and a special token that ends one. UserError if the tokenizer changes the text, or if it
        is unknown where the answers stand."""
        self.refuse_left_out(messages)
        roles = tuple(message['role'] for message in messages)
        try:
            if any('tool_calls' in message for message in messages):
                raise ChangesContent
            text, contents = self.render_with_spans(messages)
            lead = self.lead(roles) if roles[-1] == 'assistant' else ''
            answers = [(len(text[:start].removesuffix(lead)), end)
                       for (start, end), role in zip(contents, roles) if role == 'assistant' and start < end]
        except ChangesContent:
            if any(has_special(tok, re.sub('</?think>', '', message['content'])) for message in messages):
                raise
            text = self.render(messages)
            contents = []
            answers = self.answer_spans(messages)
        ids = encode_literally(tok, text, contents)
        pieces = pieces_of(tok, ids)
        starts = np.cumsum([0, *map(len, pieces)])[:len(ids)]   # the byte at which each token begins
        decoded = b''.join(pieces)
        content = text.encode(errors='replace')   # of lone surrogates, which no tokenizer keeps
        extra = len(decoded) - len(content)   # a blank before the text, as SentencePiece has it
        if extra < 0 or decoded[extra:] != content:
            raise UserError('the tokenizer changes the text of a conversation: which tokens are the assistant\'s is '
                            'unknown')
        starts -= extra
        learned = np.zeros(len(ids), bool)
        for span in answers:
            start, end = (len(text[:at].encode(errors='replace')) for at in span)
            learned |= (starts >= start) & (starts < end)
            blank = len(content[end:]) - len(content[end:].lstrip())   # as in Llama 2: a space comes before </s>
            after, last = np.searchsorted(starts, (end, end + blank)).tolist()   # the first tokens behind both
            if last < len(ids) and (ids[last] in tok.ends or (not blank and is_special(tok, int(ids[last])))):
                learned[after:last + 1] = True
        return ids, learned


def chat_template_of(tok) -> ChatTemplate | None:
    """The chat template that came with a tokenizer, or None."""
    files = tok.files
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


def pieces_of(tok, ids: np.ndarray) -> list[bytes]:
    """The bytes of each of some tokens, and those that are left at the end."""
    if tok.local:
        table = pieces_by_id(tok)
        return [table[i] for i in ids.tolist()]
    piece = tok.stream()
    return [*(piece(i).encode() for i in ids), piece(None).encode()]


@functools.lru_cache(maxsize=4)
def pieces_by_id(tok) -> list[bytes]:
    """The bytes of every token."""
    return [tok.token_bytes(i) for i in range(tok.vocab_size)]


def has_special(tok, text: str) -> bool:
    """Whether a text contains the name of a special token."""
    return not np.array_equal(tok.encode(text), tok.encode(text, special=True))


def encode_literally(tok, text: str, spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """Token ids of a text in which the names of special tokens are read as such, but as characters within these spans.
    They are those of one call of the tokenizer, which may look across the borders. UserError if that is impossible."""
    if not has_special(tok, ''.join(text[start:end] for start, end in spans)):
        return tok.encode(text, special=True).astype(np.int64)
    twin, stand_ins, originals = with_stand_ins(tok)
    if any(char in text for char in stand_ins.values()):
        raise UserError('a message has private characters of Unicode beside the name of a special token: remove them')
    names = re.compile('|'.join(map(re.escape, sorted(stand_ins, key=len, reverse=True))))
    parts = []
    done = 0
    for start, end in [*sorted(spans), (len(text), len(text))]:
        parts += [names.sub(lambda name: stand_ins[name[0]], text[done:start]), text[start:end]]
        done = end
    ids = twin.encode(no_surrogates(''.join(parts)), add_special_tokens=False).ids
    return np.array([originals.get(i, i) for i in ids], np.int64)


@functools.lru_cache(maxsize=1)
def with_stand_ins(tok) -> tuple:
    """A tokenizers.Tokenizer that reads the names of the special tokens of another as characters, and a private
    character for each as the token; {name: character}; and {id of a character: id of the token}."""
    from tokenizers import Tokenizer

    twin = Tokenizer.from_str(tok.json)
    twin.encode_special_tokens = True
    stand_ins = {}
    originals = {}
    for number, (i, token) in enumerate(twin.get_added_tokens_decoder().items()):
        char = chr(0xf0000 + number)
        stand_ins[token.content] = char
        token.content = char
        token.special = False
        twin.add_tokens([token])
        originals[twin.token_to_id(char)] = i
    return twin, stand_ins, originals


class ChangesContent(UserError):
    """It is not known where the answers stand in the text that a template makes."""

    def __init__(self):
        super().__init__("the chat template changes what the messages say: which tokens are the assistant's is unknown")


def find_spans(text: str, messages: Sequence[Message], pieces: list[str]) -> list[tuple[int, int]] | None:
    """Where the content of each message stands in a text. pieces: what stands around them, and which comes where:
    [text, number of a message, text, number, ..., text]. None if they do not make up the text."""
    before, *rest = pieces
    written = len(before)   # characters of text that are accounted for
    spans = [(0, 0)] * len(messages)
    if not text.startswith(before):
        return None
    for number, after in zip(map(int, rest[::2]), rest[1::2]):
        fits = [form for form in forms(messages[number]['content']) if text.startswith(form + after, written)]
        if not fits or spans[number] != (0, 0):
            return None
        spans[number] = (written, written + len(fits[0]))
        written += len(fits[0]) + len(after)
    return spans if written == len(text) else None


def forms(content: str) -> list[str]:
    """A message's content in the forms that templates give it, the longest first."""
    return [content, content.lstrip('\n'), content.rstrip(), content.lstrip(), content.strip()]
