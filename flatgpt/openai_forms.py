"""
What requests to OpenAI's API may ask of one model, and how responses, streams and errors look:
https://platform.openai.com/docs/api-reference
"""

import collections
import dataclasses
import itertools
import secrets
import time

import torch

MOST_STOPS = 16        # stop strings of a request
MOST_TOP = 20          # likeliest tokens of which log-probabilities can be asked
MOST_CHOICES = 16      # prompts of a request, and answers to each
NUMBER = (int, float)
# {name: (types, default, least, most)} of both endpoints
SAMPLING = {'temperature': (NUMBER, 1.0, 0, 5), 'top_p': (NUMBER, 1.0, 0, 1), 'top_k': (int, None, 1, 10**9),
            'min_p': (NUMBER, None, 0, 1), 'repetition_penalty': (NUMBER, 1.0, 0.01, 100),
            'seed': (int, None, -2**63, 2**63 - 1), 'n': (int, 1, 1, MOST_CHOICES),
            'max_tokens': (int, None, 0, 10**9), 'max_completion_tokens': (int, None, 0, 10**9),
            'stream': (bool, False), 'stream_options': (dict, {}), 'stop': ((str, list), [])}
COMPLETION = {**SAMPLING, 'prompt': ((str, list), []), 'echo': (bool, False), 'logprobs': (int, None, 0, MOST_TOP),
              'best_of': (int, 1, 1, 1)}
CHAT = {**SAMPLING, 'messages': (list, None), 'logprobs': (bool, False), 'top_logprobs': (int, 0, 0, MOST_TOP)}
WITHOUT_EFFECT = {'model', 'user', 'metadata', 'store', 'service_tier'}
# {name: values that ask for nothing}: what cannot be done and is refused
NOT_HERE = {'suffix': (None, ''), 'tools': (None, []), 'tool_choice': (None, 'none', 'auto'), 'functions': (None, []),
            'function_call': (None, 'none', 'auto'), 'response_format': (None, {'type': 'text'}),
            'logit_bias': (None, {}), 'presence_penalty': (None, 0), 'frequency_penalty': (None, 0), 'audio': (None,),
            'modalities': (None, ['text']), 'parallel_tool_calls': (None, True, False),
            'reasoning_effort': (None, 'none')}


class ApiError(Exception):
    """An error in OpenAI's form: status of HTTP, message, and where there is one the parameter and a code."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code

    def body(self) -> dict:
        """The error as the JSON of a response."""
        fault = 'invalid_request_error' if self.status < 500 and self.status != 429 else 'server_error'
        return {'error': {'message': str(self), 'type': fault, 'param': self.param, 'code': self.code}}


@dataclasses.dataclass
class Piece:
    """A part of an answer: text, tokens (id, log-probability, likeliest pairs), and at the end why it ends."""
    text: str = ''
    tokens: list[tuple] = dataclasses.field(default_factory=list)
    finish: str | None = None


def read_options(body, known: dict) -> dict:
    """The options of a request, checked, with defaults for those that are missing or null. ApiError."""
    if not isinstance(body, dict):
        raise ApiError(400, 'expected a JSON object')
    for name, value in body.items():
        if name in NOT_HERE and value not in NOT_HERE[name]:
            raise ApiError(400, f'{name} is not supported by this server', name, 'unsupported_parameter')
        if name not in {*known, *NOT_HERE, *WITHOUT_EFFECT}:
            raise ApiError(400, f'unknown parameter {name[:60]!r}', name[:60], 'unknown_parameter')
    options = {}
    for name, (types, default, *limits) in known.items():
        value = default if body.get(name) is None else body[name]
        options[name] = value
        if value is default:
            continue
        if not isinstance(value, types) or (isinstance(value, bool) and types is not bool):
            raise ApiError(400, f'{name}: {str(value)[:60]!r} has the wrong type', name, 'invalid_type')
        if limits and not limits[0] <= value <= limits[1]:
            raise ApiError(400, f'{name}={str(value)[:60]}: expected between {limits[0]} and {limits[1]}', name,
                           'invalid_value')
    if options.get('top_logprobs') and not options['logprobs']:
        raise ApiError(400, 'top_logprobs needs logprobs to be true', 'top_logprobs', 'invalid_value')
    stops = options['stop'] if isinstance(options['stop'], list) else [options['stop']]
    options['stop'] = [stop for stop in stops if stop]
    if len(stops) > MOST_STOPS or not all(isinstance(stop, str) and len(stop) <= 1000 for stop in options['stop']):
        raise ApiError(400, f'stop: expected at most {MOST_STOPS} texts of at most 1,000 characters', 'stop',
                       'invalid_value')
    if options['seed'] is None:
        options['seed'] = secrets.randbits(62)
    return options


def token_ids(prompt: str | list, tok) -> list[torch.Tensor]:
    """The prompts of a completion, as token ids: from a text, a list of texts, of ids, or of lists of ids. ApiError for
    anything else, UserError for a text that the model cannot read."""
    if isinstance(prompt, str) or (prompt and all(isinstance(i, int) for i in prompt)):
        prompt = [prompt]
    if not 1 <= len(prompt) <= MOST_CHOICES:
        raise ApiError(400, f'prompt: expected between 1 and {MOST_CHOICES} prompts', 'prompt', 'invalid_value')
    found = []
    for one in prompt:
        if isinstance(one, str):
            found.append(torch.from_numpy(tok.encode_prompt(one).astype('int64')))
        elif isinstance(one, list) and one and all(type(i) is int and 0 <= i < tok.vocab_size for i in one):
            found.append(torch.tensor(one))
        else:
            raise ApiError(400, 'prompt: expected texts, or lists of token ids that this model has', 'prompt',
                           'invalid_value')
    return found


class Forms:
    """The responses of one endpoint to one request with these options. chat: whether it is that of conversations."""

    def __init__(self, model_name: str, tok, chat: bool, options: dict):
        kind = 'text_completion'
        if chat:
            kind = 'chat.completion.chunk' if options['stream'] else 'chat.completion'
        self.head = {'id': f'{"chatcmpl" if chat else "cmpl"}-{secrets.token_hex(12)}', 'object': kind,
                     'created': int(time.time()), 'model': model_name}
        self.tok = tok
        self.chat = chat
        self.stream = options['stream']
        self.top = options['top_logprobs'] if chat else options['logprobs']   # likeliest tokens that are shown
        self.logprobs = options['logprobs'] not in (None, False)   # 0 of completions wants those of the tokens
        self.needed = max(self.top, 1) if self.logprobs else 0                # likeliest tokens to compute
        self.lengths = collections.Counter()   # characters of the tokens of each answer so far

    def response(self, choices: list[dict], usage: tuple[int, int] | None = None) -> dict:
        """A response, or a chunk of a stream. usage: numbers of tokens, read and made."""
        whole = {**self.head, 'choices': choices}
        if usage:
            whole['usage'] = {'prompt_tokens': usage[0], 'completion_tokens': usage[1], 'total_tokens': sum(usage)}
        return whole

    def choice(self, index: int, piece: Piece, first: bool = False) -> dict:
        """One answer of a response, or a piece of it in a stream. first: whether it begins a message."""
        content = {'text': piece.text}
        if self.chat and not self.stream:
            content = {'message': {'role': 'assistant', 'content': piece.text, 'refusal': None}}
        elif self.chat and first:
            content = {'delta': {'role': 'assistant', 'content': ''}}
        elif self.chat:
            content = {'delta': {'content': piece.text} if piece.text else {}}
        return {'index': index, **content, 'logprobs': self.log_probs(index, piece.tokens),
                'finish_reason': piece.finish}

    def log_probs(self, index: int, tokens: list[tuple]) -> dict | None:
        """The log-probabilities of the next tokens of an answer in the form of the endpoint."""
        if not self.logprobs:
            return None
        if self.chat:
            return {'content': [{**self.entry(i, log_prob), 'top_logprobs': [
                self.entry(*pair) for pair in top[:self.top]]} for i, log_prob, top in tokens], 'refusal': None}
        texts = [self.entry(i)['token'] for i, _, _ in tokens]
        *offsets, self.lengths[index] = itertools.accumulate(map(len, texts), initial=self.lengths[index])
        return {'tokens': texts, 'token_logprobs': [log_prob for _, log_prob, _ in tokens], 'top_logprobs': [
            None if top is None else {self.entry(i)['token']: p for i, p in top[:self.top]}
            for _, _, top in tokens], 'text_offset': offsets}

    def entry(self, i: int, log_prob: float | None = None) -> dict:
        """A token with its text, U+FFFD for a part of a character, its bytes and its log-probability."""
        content = self.tok.token_bytes(i)
        return {'token': content.decode('utf-8', errors='replace'), 'logprob': log_prob, 'bytes': list(content)}
