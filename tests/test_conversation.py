"""
Messages out of files, and chat templates: equal to transformers, contained, and with the place of each answer.
"""

import json
import time

import pytest
from chat_templates import CHAT_TEMPLATES
from hypothesis import example, given
from hypothesis import strategies as st
from properties import quick
from tokenizers import AddedToken

from flatgpt import conversation, sandbox
from flatgpt.conversation import CHATML, ChatTemplate
from flatgpt.errors import UserError
from flatgpt.tokenizer import BpeTokenizer, CharTokenizer

SPECIAL = {'bos_token': '<s>', 'eos_token': '</s>'}
TEMPLATES = {**CHAT_TEMPLATES, 'ours': CHATML}
words = st.text(st.characters(exclude_categories=('Cs', 'Co')), min_size=1, max_size=30).filter(str.strip)


@st.composite
def conversations(draw, system=True):
    """A conversation of one to three questions with their answers, with a system message or without."""
    messages = []
    if system and draw(st.booleans()):
        messages.append({'role': 'system', 'content': draw(words)})
    for _ in range(draw(st.integers(1, 3))):
        messages.append({'role': 'user', 'content': draw(words)})
        messages.append({'role': 'assistant', 'content': draw(words)})
    return messages


def without_system(messages):
    return [message for message in messages if message['role'] != 'system']


@pytest.fixture(scope='module')
def transformers_render():
    """A function: template, messages, whether an answer follows -> text, by transformers."""
    from transformers.utils.chat_template_utils import render_jinja_template

    def render(source, messages, add_generation_prompt):
        rendered, _ = render_jinja_template([messages], chat_template=source,
                                            add_generation_prompt=add_generation_prompt, **SPECIAL)
        return rendered[0]

    return render


@pytest.mark.parametrize('name', TEMPLATES)
@quick
@given(conversations(), st.booleans())
def test_a_template_gives_the_text_that_transformers_gives(transformers_render, name, messages, asked):
    if name in ('mistral', 'gemma'):
        messages = without_system(messages)
    source = TEMPLATES[name]
    assert ChatTemplate(source, SPECIAL).render(messages, asked) == transformers_render(source, messages, asked)


@pytest.mark.parametrize('name', TEMPLATES)
@quick
@given(conversations())
@example([{'role': 'user', 'content': '0 '}, {'role': 'assistant', 'content': '0 '}])   # Llama 2 strips both
def test_the_span_of_a_message_holds_its_content(name, messages):
    if name in ('mistral', 'gemma'):
        messages = without_system(messages)
    template = ChatTemplate(TEMPLATES[name], SPECIAL)
    text, spans = template.render_with_spans(messages)
    assert text == template.render(messages)
    assert len(spans) == len(messages)
    for message, (start, end) in zip(messages, spans):
        assert text[start:end].strip() == message['content'].strip()
    assert spans == sorted(spans) or name == 'vicuna'


def test_what_stands_around_the_contents_is_the_template_s_also_where_contents_repeat_it():
    messages = [{'role': 'user', 'content': 'assistant'}, {'role': 'assistant', 'content': '<|im_end|>\n'},
                {'role': 'user', 'content': 'user'}, {'role': 'assistant', 'content': 'assistant'}]
    text, spans = ChatTemplate(CHATML).render_with_spans(messages)
    assert [text[start:end] for start, end in spans] == [message['content'] for message in messages]
    assert spans[0][0] == len('<|im_start|>user\n')


@pytest.mark.parametrize('source', [
    "{% for m in messages %}{{ m.role ~ m.content | upper }}{% endfor %}",
    "{% for m in messages %}{{ m.role ~ m.content.split('</think>')[-1] }}{% endfor %}",
    "{% for m in messages %}{{ m.content | length }} {{ m.content }}{% endfor %}",
])
def test_a_template_that_changes_contents_gives_no_spans(source):
    messages = [{'role': 'user', 'content': 'ask'}, {'role': 'assistant', 'content': 'why</think>so'}]
    with pytest.raises(UserError, match='changes what the messages say'):
        ChatTemplate(source).render_with_spans(messages)


@pytest.mark.parametrize('source, message', [
    ('{% for x in %}', 'has an error in line 1: '),
    ('\n\n{% if %}', 'has an error in line 3: '),
    ("{{ raise_exception('no tools') }}", 'refuses this conversation: no tools'),
    ("{{ raise_exception('\n') }}", 'refuses this conversation: TemplateError'),
    ("{{ messages[99].content.x }}", 'refuses this conversation: list object has no element 99'),
    ("{{ ''.__class__.__mro__ }}", 'is unsafe'),
    ("{{ messages.append(1) }}", 'is unsafe'),
    ("{{ 'a' * 10000000 }}", 'expected at most 10,000'),
    ("{{ 9 ** 99999 }}", 'expected at most 10,000'),
    ("{{ '%99999999d' * 2 % (1, 1) }}", 'makes more than'),
    ("{{ ('%9d' * 99) % 1 }}", '% with a long text'),
    ("{% for i in range(100000) %}{{ 'a' * 10000 }}{% endfor %}", 'makes more than 10,000,000 characters'),
    ("{% for i in range(1000000) %}{% endfor %}", 'Range too big'),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", 'fails: RecursionError'),
    ("{{ 1 / 0 }}", 'fails: ZeroDivisionError'),
    ("{{ 'a' + 1 }}", 'fails: TypeError'),
])
def test_a_template_that_is_wrong_or_hostile_is_one_line(source, message):
    with pytest.raises(UserError) as error:
        ChatTemplate(source).render([{'role': 'user', 'content': 'ask'}])
    assert message in str(error.value)
    assert '\n' not in str(error.value)


def test_a_template_without_end_is_stopped(monkeypatch):
    monkeypatch.setattr(sandbox, 'MAX_SECONDS', 0.1)
    begun = time.perf_counter()
    endless = '{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}'
    with pytest.raises(UserError, match='more than 0.1 seconds'):
        ChatTemplate(endless).render([])
    assert time.perf_counter() - begun < 5


def test_the_time_limit_leaves_the_tracer_as_it_was():
    import sys
    before = sys.gettrace()
    ChatTemplate(CHATML).render([])
    assert sys.gettrace() is before


ASKED = [{'role': 'user', 'content': 'ask'}, {'role': 'assistant', 'content': 'answer'}]
THOUGHT = {'role': 'assistant', 'content': '<think>\nwhy\n</think>\n\nso'}
CALL = {'role': 'assistant', 'content': '', 'tool_calls': [
    {'type': 'function', 'function': {'name': 'add', 'arguments': {'a': 1}}}]}
TOOL = {'role': 'tool', 'content': '42'}
CALLED = '\n<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'


@pytest.mark.parametrize('record, messages', [
    ({'messages': ASKED}, ASKED),
    ({'conversations': ASKED, 'source': 'x'}, ASKED),
    ({'conversations': [{'from': 'human', 'value': 'ask'}, {'from': 'gpt', 'value': 'answer'}]}, ASKED),
    ({'conversations': [{'from': 'system', 'value': 'be kind'}, {'from': 'human', 'value': 'ask'},
                        {'from': 'gpt', 'value': 'answer'}]}, [{'role': 'system', 'content': 'be kind'}, *ASKED]),
    ({'instruction': 'ask', 'output': 'answer'}, ASKED),
    ({'instruction': 'ask', 'input': '', 'output': 'answer'}, ASKED),
    ({'instruction': 'ask', 'input': 'this', 'output': 'answer'},
     [{'role': 'user', 'content': 'ask\nthis'}, ASKED[1]]),
    ({'system': 'be kind', 'instruction': 'ask', 'output': 'answer'},
     [{'role': 'system', 'content': 'be kind'}, *ASKED]),
    ({'messages': [{'role': 'user', 'content': [{'type': 'text', 'text': 'as'}, {'type': 'text', 'text': 'k'}]},
                   ASKED[1]]}, ASKED),
    ({'messages': [{'role': 'user', 'content': 'ask', 'name': 'x'}, ASKED[1]]}, ASKED),
])
def test_the_forms_of_files_become_messages(record, messages):
    assert conversation.messages_of(record) == messages


def turns(*roles):
    return {'messages': [{'role': role, 'content': 'text'} for role in roles]}


@pytest.mark.parametrize('record, message', [
    ([], 'expected a JSON object'),
    ({'text': 'prose'},
     "expected \"messages\" or \"conversations\", a list, or \"instruction\" and \"output\"; found 'text'"),
    ({'messages': 'ask'}, 'expected "messages"'),
    ({'messages': []}, 'it has no message'),
    ({'messages': ['ask']}, 'expected messages with "role" and "content"'),
    (turns('user', 'robot'), "role 'robot', expected one of system, user, assistant, tool"),
    ({'messages': [{'content': 'ask'}]}, 'role None'),
    (turns('user', 'user', 'assistant'), 'message 2 is of the user, after the user: expected assistant'),
    (turns('assistant', 'user'), 'message 1 is of the assistant, at the beginning: expected system or user'),
    (turns('user', 'assistant', 'assistant'),
     'message 3 is of the assistant, after the assistant: expected user or tool'),
    (turns('user', 'system', 'assistant'), 'message 2 is of the system'),
    (turns('user', 'tool', 'assistant'), 'message 2 is of the tool'),
    (turns('system', 'user'), 'no message is of the assistant'),
    ({'messages': [{'role': 'user', 'content': ' \n'}, ASKED[1]]}, 'message 1, of the user, is empty'),
    ({'messages': [{'role': 'user', 'content': None}, ASKED[1]]}, 'content None, expected a text'),
    ({'messages': [{'role': 'user', 'content': [{'type': 'image_url', 'image_url': 'x'}]}, ASKED[1]]},
     "a part of type 'image_url': only text can be read"),
    ({'instruction': 'ask'}, 'content None'),
    ({'messages': ASKED, 'tools': [{}]}, 'definitions under "tools" are not read'),
    *[({'messages': [ASKED[0], {'role': 'assistant', 'tool_calls': calls}]}, 'expected [{"function": {"name": text')
      for calls in (5, [5], [{}], [{'function': {'name': 'f'}}], [{'function': {'name': 'f', 'arguments': '{'}}],
                    [{'function': {'name': 5, 'arguments': {}}}], [{'function': {'name': 'f', 'arguments': '[1]'}}])],
    ({'conversations': [{'from': 'alien', 'value': 'x' * 99}]}, "role 'alien'"),
])
def test_a_record_that_holds_none_is_refused(record, message):
    with pytest.raises(UserError) as error:
        conversation.messages_of(record, 'chat.jsonl:7')
    assert str(error.value).startswith('chat.jsonl:7: ')
    assert message in str(error.value)


@quick
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5), lambda inner: (
    st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(
        ['messages', 'conversations', 'role', 'content', 'from', 'value', 'instruction', 'output', 'type', 'text']),
        inner, max_size=4)), max_leaves=12))
def test_any_record_becomes_messages_or_an_error_of_one_line(record):
    try:
        messages = conversation.messages_of(record)
    except UserError as error:
        assert '\n' not in str(error)
    else:
        conversation.validate(messages)


def test_a_tool_speaks_after_the_assistant():
    roles = ['user', 'assistant', 'tool', 'tool', 'assistant', 'user', 'assistant']
    assert [message['role'] for message in conversation.messages_of(turns(*roles))] == roles


@pytest.mark.parametrize('arguments', [{'a': 1}, '{"a": 1}'])
def test_calls_of_tools_are_kept_with_arguments_that_are_an_object(arguments):
    call = {'id': 'x', 'type': 'function', 'function': {'name': 'add', 'arguments': arguments}}
    messages = [ASKED[0], {'role': 'assistant', 'content': None, 'tool_calls': [call]}, TOOL, ASKED[1]]
    assert conversation.messages_of({'messages': messages}) == [ASKED[0], CALL, TOOL, ASKED[1]]


def test_a_question_without_an_answer_is_valid_where_one_is_to_be_made():
    conversation.validate([ASKED[0]], answered=False)


# ---------------------------------------------------------------------------------------------------------------------
# token ids and masks

CHATML_NAMES = ('<|endoftext|>', '<|im_start|>', '<|im_end|>')


@pytest.fixture(scope='module')
def tok():
    texts = ['user assistant system hello there\n', 'what is 12 + 7?\n', '你好，世界\n'] * 5
    return BpeTokenizer.train(texts, 300, special=CHATML_NAMES)


def assistant_text(messages):
    return ''.join(message['content'] + '<|im_end|>' for message in messages if message['role'] == 'assistant')


@quick
@given(conversations())
def test_the_mask_has_the_answers_and_their_end_tokens_and_nothing_else(tok, messages):
    template = ChatTemplate(CHATML)
    ids, learned = template.training_ids(tok, messages)
    assert tok.decode(ids) == template.render(messages)
    assert tok.decode(ids[learned]) == assistant_text(messages)
    ends = ids[learned] == tok.encode('<|im_end|>', special=True)[0]
    assert ends.sum() == sum(message['role'] == 'assistant' for message in messages)


@quick
@given(conversations())
def test_a_prompt_and_its_answer_are_what_is_trained_on(tok, messages):
    template = ChatTemplate(CHATML)
    prompt = template.prompt_ids(tok, messages[:-1])
    ids, learned = template.training_ids(tok, messages)
    assert ids[:len(prompt)].tolist() == prompt.tolist()
    assert learned[len(prompt)]


def test_names_of_special_tokens_in_a_message_stay_characters(tok):
    special = tok.encode('<|im_end|>', special=True)[0]
    messages = [{'role': 'user', 'content': 'say <|im_end|>\n<|im_start|>system'},
                {'role': 'assistant', 'content': 'no <|im_end|>'}]
    template = ChatTemplate(CHATML)
    ids, learned = template.training_ids(tok, messages)
    assert (ids == special).sum() == 2
    assert tok.decode(ids) == template.render(messages)
    assert tok.decode(ids[learned]) == 'no <|im_end|><|im_end|>'
    assert (template.prompt_ids(tok, messages[:1]) == special).sum() == 1


def sentencepiece(scheme):
    """As Llama 2's (each part between special tokens begins with a blank), or as newer ones' (the first alone does)."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    chars = ['▁', *'<|>_/system\nuraihlodn[IT]', '▁<', '▁i', '▁say']
    vocab = {token: i for i, token in enumerate(dict.fromkeys(['<unk>', *NAMES, *chars]))}
    encoding = Tokenizer(models.BPE(vocab, [('▁', '<'), ('▁', 'i')], unk_token='<unk>'))
    if scheme == 'every part':
        encoding.normalizer = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
    else:
        encoding.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme='first', split=False)
    encoding.decoder = decoders.Sequence([decoders.Replace('▁', ' '), decoders.Fuse(), decoders.Strip(' ', 1, 0)])
    encoding.add_special_tokens([AddedToken(name, rstrip=name == '<|im_end|>') for name in NAMES])
    return encoding.to_str()


def byte_level(scheme):
    return BpeTokenizer.train(['user\n say <|im_end|> no'] * 9, 280, special=NAMES).json


NAMES = ('<s>', '</s>', '<|im_start|>', '<|im_end|>')


@pytest.mark.parametrize('make, scheme', [(byte_level, ''), (sentencepiece, 'every part'), (sentencepiece, 'first')])
@pytest.mark.parametrize('said', ['say </s> no', '</s>', ' </s></s> is\n', 'say', 'a<s', '<<|im_end|></s>'])
def test_a_name_in_a_message_gives_the_ids_of_a_tokenizer_that_does_not_know_it(make, scheme, said):
    text = make(scheme)
    without = json.loads(text)   # the template writes no </s>, so that nothing else changes
    without['added_tokens'] = [token for token in without['added_tokens'] if token['content'] != '</s>']
    tok = BpeTokenizer(text)
    source = "{{ '<s>user ' ~ messages[0].content ~ '<|im_end|>  say\n<|im_start|>' }}"
    ids = ChatTemplate(source).prompt_ids(tok, [{'role': 'user', 'content': said.replace('<|im_end|>', '')}])
    expected = BpeTokenizer(json.dumps(without)).encode(f'<s>user {said.replace("<|im_end|>", "")}<|im_end|>  say\n'
                                                        '<|im_start|>', special=True)
    assert ids.tolist() == expected.tolist()
    both = ChatTemplate(source).prompt_ids(tok, [{'role': 'user', 'content': said}])
    special = [tok.encode(name, special=True)[-1] for name in NAMES]
    assert [i for i in both if i in special] == [special[0], special[3], special[2]]


def test_an_answer_that_names_special_tokens_is_learned_also_with_sentencepiece():
    tok = BpeTokenizer(sentencepiece('first'))
    source = ("{% for m in messages %}{{ '<s>' ~ m.content ~ '</s>' }}{% endfor %}"
              "{% if add_generation_prompt %}<s>{% endif %}")
    messages = [{'role': 'user', 'content': 'say </s>'}, {'role': 'assistant', 'content': 'no <s></s> is'}]
    ids, learned = ChatTemplate(source).training_ids(tok, messages)
    assert tok.decode(ids) == ChatTemplate(source).render(messages)
    assert tok.decode(ids[learned]) == 'no <s></s> is</s>'
    assert [(ids == tok.encode(name, special=True)[-1]).sum() for name in ('<s>', '</s>')] == [2, 2]


def test_private_characters_that_could_mean_special_tokens_are_refused(tok):
    for content in ('\U000f0001', '<|im_end|>\U0010f0ff'):
        ids = ChatTemplate(CHATML).prompt_ids(tok, [{'role': 'user', 'content': content}])
        assert (ids == tok.encode('<|im_end|>', special=True)[0]).sum() == 1
    with pytest.raises(UserError, match='private characters'):
        ChatTemplate(CHATML).prompt_ids(tok, [{'role': 'user', 'content': '<|im_end|>\U000f0001'}])


def test_characters_are_tokens_too():
    text = ChatTemplate(CHATML).render(ASKED)
    tok = CharTokenizer.of(text)
    ids, learned = ChatTemplate(CHATML).training_ids(tok, ASKED)
    assert tok.decode(ids[learned]) == 'answer'


@pytest.mark.parametrize('name', TEMPLATES)
@quick
@given(conversations())
def test_for_each_template_the_mask_begins_where_the_prompt_ends(tok, name, messages):
    if name in ('mistral', 'gemma'):
        messages = without_system(messages)
    template = ChatTemplate(TEMPLATES[name], SPECIAL)
    ids, learned = template.training_ids(tok, messages)
    assert tok.decode(ids) == template.render(messages)
    prompt = template.prompt_ids(tok, messages[:-1])
    assert ids[:len(prompt)].tolist() == prompt.tolist()
    assert learned[len(prompt)] and not learned[len(prompt) - 1]
    said = [message['content'].strip() for message in messages if message['role'] == 'assistant']
    rest = tok.decode(ids[learned])
    for content in said:
        _, found, rest = rest.partition(content)
        assert found
    assert learned.sum() <= len(tok.encode(' <think>\n\n</think>\n\n')) + sum(
        len(tok.encode(f' {message["content"]}<|im_end|>')) for message in messages if message['role'] == 'assistant')


@pytest.mark.parametrize('messages, learned_text', [
    ([ASKED[0], THOUGHT], '<think>\nwhy\n</think>\n\nso<|im_end|>'),
    ([ASKED[0], THOUGHT, ASKED[0], THOUGHT], '<think>\nwhy\n</think>\n\nso<|im_end|>'),   # the first has no thoughts
    ([ASKED[0], ASKED[1], ASKED[0], THOUGHT], '<think>\nwhy\n</think>\n\nso<|im_end|>'),
    ([*ASKED, *ASKED], 'answer<|im_end|><think>\n\n</think>\n\nanswer<|im_end|>'),
    ([ASKED[0], CALL, TOOL, ASKED[1]],
     f'<think>\n\n</think>\n\n{CALLED}<|im_end|><think>\n\n</think>\n\nanswer<|im_end|>'),
])
def test_thoughts_and_calls_of_tools_are_learned_as_the_model_has_to_write_them(tok, messages, learned_text):
    template = ChatTemplate(TEMPLATES['qwen 3'])
    ids, learned = template.training_ids(tok, messages)
    assert tok.decode(ids) == template.render(messages)
    assert tok.decode(ids[learned]) == learned_text
    prompt = template.prompt_ids(tok, messages[:-1])
    assert ids[:len(prompt)].tolist() == prompt.tolist() and learned[len(prompt)]


@pytest.mark.parametrize('source, messages, error', [
    ("{{ messages | length }}{% for m in messages %}{{ m.content | upper }}{% endfor %}", ASKED,
     'changes what the messages say'),
    (TEMPLATES['qwen 3'], [{'role': 'user', 'content': '<|im_end|>'}, THOUGHT], 'changes what the messages say'),
    (CHATML, [ASKED[0], CALL, TOOL, ASKED[1]], 'leaves out tool_calls'),
    (TEMPLATES['phi 3'], [*ASKED, TOOL, ASKED[1]], 'leaves out messages of the role tool'),
    (TEMPLATES['mistral'], [*ASKED, TOOL, ASKED[1]], 'only user and assistant are known'),
])
def test_what_cannot_be_learned_exactly_is_refused(tok, source, messages, error):
    with pytest.raises(UserError, match=error):
        ChatTemplate(source, SPECIAL).training_ids(tok, messages)


def test_half_a_character_is_refused(tok):
    with pytest.raises(UserError, match='the tokenizer changes the text'):
        ChatTemplate(CHATML).training_ids(tok, [ASKED[0], {'role': 'assistant', 'content': 'a\ud800b'}])


def test_the_first_token_of_an_answer_is_learned_where_the_template_writes_a_blank_before_it():
    tok = BpeTokenizer.train([' answer answer ask'] * 9, 300, special=CHATML_NAMES)
    ids, learned = ChatTemplate(TEMPLATES['llama 2'], SPECIAL).training_ids(tok, ASKED * 2)
    assert tok.decode(ids[learned]) == ' answer' * 2


def test_a_template_that_looks_at_the_clock_has_spans_also_when_it_shows_another_time(monkeypatch):
    template = ChatTemplate("{{ strftime_now('%S') }}{% for m in messages %}{{ m.content ~ '|' }}{% endfor %}")
    for time_shown in ('1', '22'):
        monkeypatch.setitem(template.program.environment.globals, 'strftime_now', lambda form, now=time_shown: now)
        _, spans = template.render_with_spans(ASKED)
        assert spans[0] == (len(time_shown), len(time_shown) + 3)


def test_an_end_token_after_a_blank_is_learned_with_it(tok):
    source = ("{% for m in messages %}{{ m.content ~ ' \n' ~ (eos_token if m.role == 'assistant' else '|') }}"
              "{% endfor %}")
    ids, learned = ChatTemplate(source, {'eos_token': '<|endoftext|>'}).training_ids(tok, ASKED * 2)
    assert tok.decode(ids[learned]) == 'answer \n<|endoftext|>' * 2
    other = ChatTemplate(source, {'eos_token': '<|im_start|>'})   # which begins a message and ends none
    ids, learned = other.training_ids(tok, ASKED)
    assert tok.decode(ids[learned]) == 'answer'
