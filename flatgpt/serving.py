"""
OpenAI's API over HTTP for one model: requests are decoded together, each with its own options and random numbers.

A thread decodes (Worker), an asyncio loop speaks HTTP (Server); they exchange Jobs, one per answer. The forms of
requests, responses and errors are those of https://platform.openai.com/docs/api-reference.
"""

import asyncio
import collections
import contextlib
import dataclasses
import json
import secrets
import threading
import time
from pathlib import Path

import torch

from flatgpt import batching, engine
from flatgpt.conversation import messages_from
from flatgpt.errors import UserError
from flatgpt.sandbox import one_line

MOST_STOPS = 16        # stop strings of a request
MOST_TOP = 20          # likeliest tokens of which log-probabilities can be asked
MOST_CHOICES = 16      # answers of a request
FIRST_TOKEN = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)   # upper borders of the histogram, in seconds


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
class Limits:
    """What a server allows. A request that asks for more is refused, or its answer ends early."""
    rows: int = 8                # answers that are decoded together
    queue: int = 64              # answers that wait
    seconds: float = 300.0       # for an answer, waiting included
    tokens: int = 4096           # of an answer
    body: int = 1 << 20          # bytes of a request


# ---------------------------------------------------------------------------------------------------------------------
# decoding

class Job:
    """One answer: a request to the engine, its text so far, and the queue in which the HTTP side finds its pieces.

    A piece is {'text', 'tokens': [(id, log_prob, top)], 'finish'}, or an exception.
    """

    def __init__(self, request: batching.Request, answer: engine.Answer, seconds: float):
        self.request = request
        self.answer = answer
        self.loop = asyncio.get_running_loop()
        self.pieces = asyncio.Queue()
        self.begun = time.monotonic()
        self.deadline = self.begun + seconds
        self.waiting = []   # tokens whose text is not complete yet

    def put(self, piece):
        """Hand a piece to the HTTP side; called by the thread that decodes."""
        with contextlib.suppress(RuntimeError):   # the loop is closed: the server has ended
            self.loop.call_soon_threadsafe(self.pieces.put_nowait, piece)


class Worker(threading.Thread):
    """The thread that decodes: takes jobs from a queue into an batching.Batch, and steps it."""

    def __init__(self, model, vocab_size: int, limits: Limits, metrics: 'Metrics'):
        super().__init__(name='decode', daemon=True)
        self.batch = batching.Batch(model, limits.rows, vocab_size)
        self.limits = limits
        self.metrics = metrics
        self.waiting = collections.deque()
        self.running = {}   # batching.Request: Job
        self.cancelled = set()
        self.condition = threading.Condition()   # guards waiting and cancelled
        self.stopping = False

    def submit(self, jobs: list[Job]):
        """Queue jobs, all or none; one that asks for no token is done at once. ApiError if too many wait."""
        for job in jobs:
            if job.answer.finish:
                job.put({'text': '', 'tokens': [], 'finish': job.answer.finish})
        jobs = [job for job in jobs if not job.answer.finish]
        with self.condition:
            if len(self.waiting) + len(jobs) > self.limits.queue:
                raise ApiError(429, f'{len(self.waiting)} answers wait already: try again later', code='overloaded')
            self.waiting.extend(jobs)
            self.condition.notify()

    def cancel(self, job: Job):
        """Remove a job, whether it waits or runs."""
        with self.condition:
            if job in self.waiting:
                self.waiting.remove(job)
            else:
                self.cancelled.add(job)
            self.condition.notify()

    def stop(self):
        """End the thread, once its current step is done."""
        with self.condition:
            self.stopping = True
            self.condition.notify()

    def run(self):
        while True:
            with self.condition:
                while not (self.waiting or self.running or self.stopping):
                    self.cancelled.clear()
                    self.condition.wait()
                if self.stopping:
                    return
                for job in [job for job in self.running.values() if job in self.cancelled]:
                    self.leave(job)
                self.cancelled.clear()
                room = self.limits.rows - len(self.running)
                joining = [self.waiting.popleft() for _ in range(min(room, len(self.waiting)))]
            for job in joining:
                self.join_batch(job)
            self.advance()

    def join_batch(self, job: Job):
        """Encode the prompt of a job; its first token comes with it."""
        if time.monotonic() > job.deadline:
            job.put(ApiError(503, 'the server was busy for too long: try again later', code='timeout'))
            return
        try:
            step = self.batch.add(job.request)
        except RuntimeError as error:   # out of memory
            job.put(ApiError(500, f'the model failed: {one_line(error)}'))
            return
        self.running[job.request] = job
        self.metrics.first_token(time.monotonic() - job.begun)
        self.take(step)

    def advance(self):
        """One more token for each running job."""
        try:
            steps = self.batch.step()
        except RuntimeError as error:
            for job in list(self.running.values()):
                self.leave(job)
                job.put(ApiError(500, f'the model failed: {one_line(error)}'))
            return
        for step in steps:
            self.take(step)

    def take(self, step: batching.Step):
        """Add a token to its job, and hand over the text that is complete by it."""
        job = self.running[step.request]
        if step.token is None:
            self.leave(job)
            job.put(ApiError(500, 'the model gives NaN or infinite logits'))
            return
        answer = job.answer
        answer.add(step.token, step.log_prob)
        self.metrics.tokens['generated'] += 1
        if not answer.finish and (time.monotonic() > job.deadline or self.batch.finished(step.request)):
            answer.end('length')
        job.waiting.append((step.token, step.log_prob, step.top))
        text = answer.new_text()
        if text or answer.finish:
            job.put({'text': text, 'tokens': job.waiting, 'finish': answer.finish})
            job.waiting = []
        if answer.finish:
            self.leave(job)

    def leave(self, job: Job):
        """Free the place of a job."""
        self.batch.remove(job.request)
        del self.running[job.request]


# ---------------------------------------------------------------------------------------------------------------------
# what a request asks for

NUMBER = (int, float)
# {name: (types, least, most, default)} of both endpoints
SAMPLING = {'temperature': (NUMBER, 0, 5, 1.0), 'top_p': (NUMBER, 0, 1, 1.0), 'top_k': (int, 1, 10**9, None),
            'min_p': (NUMBER, 0, 1, None), 'repetition_penalty': (NUMBER, 0.01, 100, 1.0),
            'seed': (int, -2**63, 2**63 - 1, None),
            'n': (int, 1, MOST_CHOICES, 1), 'max_tokens': (int, 0, 10**9, None),
            'max_completion_tokens': (int, 0, 10**9, None), 'stream': (bool, None, None, False),
            'stream_options': (dict, None, None, None), 'stop': ((str, list), None, None, None),
            'model': (str, None, None, None), 'user': (str, None, None, None), 'metadata': (dict, None, None, None),
            'store': (bool, None, None, None), 'service_tier': (str, None, None, None)}
COMPLETION = {**SAMPLING, 'prompt': ((str, list), None, None, None), 'echo': (bool, None, None, False),
              'logprobs': (int, 0, MOST_TOP, None), 'best_of': (int, 1, 1, 1), 'suffix': (str, None, None, None)}
CHAT = {**SAMPLING, 'messages': (list, None, None, None), 'logprobs': (bool, None, None, False),
        'top_logprobs': (int, 0, MOST_TOP, 0)}
# {name: values that ask for nothing}: what cannot be done and is refused
NOT_HERE = {'suffix': (None, ''), 'tools': (None, []), 'tool_choice': (None, 'none', 'auto'), 'functions': (None, []),
            'function_call': (None, 'none', 'auto'), 'response_format': (None, {'type': 'text'}),
            'logit_bias': (None, {}),
            'presence_penalty': (None, 0, 0.0), 'frequency_penalty': (None, 0, 0.0), 'audio': (None,),
            'modalities': (None, ['text']), 'parallel_tool_calls': (None, True, False),
            'reasoning_effort': (None, 'none')}


def read_options(body, known: dict) -> dict:
    """The options of a request, checked, with defaults for those that are missing or null. ApiError."""
    if not isinstance(body, dict):
        raise ApiError(400, 'expected a JSON object')
    for name, value in body.items():
        if name in NOT_HERE and value not in NOT_HERE[name]:
            raise ApiError(400, f'{name} is not supported by this server', name, 'unsupported_parameter')
        if name not in known and name not in NOT_HERE:
            raise ApiError(400, f'unknown parameter {name[:60]!r}', name[:60], 'unknown_parameter')
    options = {}
    for name, (types, least, most, default) in known.items():
        value = body.get(name)
        if value is None:
            options[name] = default
            continue
        is_bool = isinstance(value, bool)
        if not isinstance(value, types) or (is_bool and types is not bool):
            raise ApiError(400, f'{name}: {str(value)[:60]!r} has the wrong type', name, 'invalid_type')
        if least is not None and not least <= value <= most:   # nan is not
            raise ApiError(400, f'{name}={value}: expected between {least} and {most}', name, 'invalid_value')
        options[name] = value
    stops = options['stop'] if isinstance(options['stop'], list) else [options['stop']]
    options['stop'] = [stop for stop in stops if stop]
    wrong = [stop for stop in options['stop'] if not isinstance(stop, str) or len(stop) > 1000]
    if wrong or len(options['stop']) > MOST_STOPS:
        raise ApiError(400, f'stop: expected at most {MOST_STOPS} texts of at most 1,000 characters', 'stop',
                       'invalid_value')
    if options['seed'] is None:
        options['seed'] = secrets.randbits(62)
    return options


def token_ids(prompt, tok) -> list[torch.Tensor]:
    """The prompts of a completion, as token ids: from a text, a list of texts, of ids, or of lists of ids. ApiError."""
    if isinstance(prompt, str) or (prompt and all(isinstance(i, int) and not isinstance(i, bool) for i in prompt)):
        prompt = [prompt]
    if not prompt or len(prompt) > MOST_CHOICES:
        raise ApiError(400, f'prompt: expected between 1 and {MOST_CHOICES} prompts', 'prompt', 'invalid_value')
    found = []
    for one in prompt:
        if isinstance(one, str):
            found.append(torch.from_numpy(tok.encode_prompt(one).astype('int64')))
        elif isinstance(one, list) and one and all(isinstance(i, int) and 0 <= i < tok.vocab_size for i in one):
            found.append(torch.tensor(one))
        else:
            raise ApiError(400, 'prompt: expected texts, or lists of token ids that this model has', 'prompt',
                           'invalid_value')
    return found


# ---------------------------------------------------------------------------------------------------------------------
# what a response says

class Metrics:
    """Counters for /metrics, in the text form of Prometheus."""

    def __init__(self):
        self.requests = collections.Counter()   # (path, status): number
        self.tokens = collections.Counter()     # 'prompt' and 'generated': number
        self.buckets = collections.Counter()    # border of FIRST_TOKEN: number of first tokens until then
        self.seconds = 0.0                      # sum of the times to a first token
        self.answers = 0                        # number of first tokens

    def first_token(self, seconds: float):
        """Count the seconds from a request to its first token."""
        self.answers += 1
        self.seconds += seconds
        for border in FIRST_TOKEN:
            if seconds <= border:
                self.buckets[border] += 1

    def text(self, worker: Worker) -> str:
        """All counters, one per line."""
        lines = ['# TYPE flatgpt_requests_total counter']
        lines += [f'flatgpt_requests_total{{path="{path}",status="{status}"}} {number}'
                  for (path, status), number in sorted(self.requests.items())]
        lines += ['# TYPE flatgpt_tokens_total counter']
        lines += [f'flatgpt_tokens_total{{kind="{name}"}} {self.tokens[name]}' for name in ('prompt', 'generated')]
        lines += ['# TYPE flatgpt_running gauge', f'flatgpt_running {len(worker.running)}',
                  '# TYPE flatgpt_waiting gauge', f'flatgpt_waiting {len(worker.waiting)}',
                  '# TYPE flatgpt_first_token_seconds histogram']
        lines += [f'flatgpt_first_token_seconds_bucket{{le="{border}"}} {self.buckets[border]}'
                  for border in FIRST_TOKEN]
        lines += [f'flatgpt_first_token_seconds_bucket{{le="+Inf"}} {self.answers}',
                  f'flatgpt_first_token_seconds_sum {self.seconds:.6f}',
                  f'flatgpt_first_token_seconds_count {self.answers}']
        return '\n'.join(lines) + '\n'


class Forms:
    """The responses of one endpoint: whole, or in chunks for a stream. chat: whether it is that of conversations."""

    def __init__(self, model_name: str, tok, chat: bool, logprobs: bool, top: int):
        self.head = {'id': f'{"chatcmpl" if chat else "cmpl"}-{secrets.token_hex(12)}', 'created': int(time.time()),
                     'model': model_name}
        self.tok = tok
        self.chat = chat
        self.logprobs = logprobs
        self.top = top

    def token_text(self, i: int) -> str:
        """The text of a token; U+FFFD for a part of a character."""
        return self.tok.token_bytes(i).decode('utf-8', errors='replace')

    def log_probs(self, tokens: list, offset: int = 0) -> dict | None:
        """The log-probabilities of tokens, [(id, log_prob, top)], in the form of the endpoint."""
        if not self.logprobs:
            return None
        if self.chat:
            def entry(i, log_prob):
                return {'token': self.token_text(i), 'logprob': log_prob, 'bytes': list(self.tok.token_bytes(i))}

            return {'content': [{**entry(i, log_prob), 'top_logprobs': [entry(*pair) for pair in top[:self.top]]}
                                for i, log_prob, top in tokens], 'refusal': None}
        texts = [self.token_text(i) for i, _, _ in tokens]
        offsets = [offset]
        for text in texts:
            offsets.append(offsets[-1] + len(text))
        return {'tokens': texts, 'token_logprobs': [log_prob for _, log_prob, _ in tokens],
                'top_logprobs': [None if top is None else {self.token_text(i): p for i, p in top[:self.top]}
                                 for _, _, top in tokens], 'text_offset': offsets[:-1]}

    def whole(self, choices: list[dict], usage: dict) -> dict:
        """The response to a request that is not streamed. choices: {'text', 'tokens', 'finish'}."""
        made = []
        for index, choice in enumerate(choices):
            content = {'text': choice['text']}
            if self.chat:
                content = {'message': {'role': 'assistant', 'content': choice['text'], 'refusal': None}}
            made.append({'index': index, **content, 'logprobs': self.log_probs(choice['tokens']),
                         'finish_reason': choice['finish']})
        return {**self.head, 'object': 'chat.completion' if self.chat else 'text_completion', 'choices': made,
                'usage': usage}

    def chunk(self, index: int, piece: dict, first: bool = False) -> dict:
        """One piece of a stream, {'text', 'tokens', 'finish'}."""
        content = {'text': piece['text']}
        if self.chat:
            role = {'role': 'assistant'} if first else {}
            content = {'delta': {**role, **({'content': piece['text']} if piece['text'] or first else {})}}
        choice = {'index': index, **content, 'logprobs': self.log_probs(piece['tokens']),
                  'finish_reason': piece['finish']}
        return {**self.head, 'object': 'chat.completion.chunk' if self.chat else 'text_completion', 'choices': [choice]}

    def usage_chunk(self, usage: dict) -> dict:
        """The last chunk of a stream that is to tell the number of tokens."""
        return {**self.head, 'object': 'chat.completion.chunk' if self.chat else 'text_completion', 'choices': [],
                'usage': usage}


def usage_of(prompt_tokens: int, completion_tokens: int) -> dict:
    """The numbers of tokens that a response tells."""
    return {'prompt_tokens': prompt_tokens, 'completion_tokens': completion_tokens,
            'total_tokens': prompt_tokens + completion_tokens}


# ---------------------------------------------------------------------------------------------------------------------
# HTTP

class Server:
    """The endpoints for one model.

    model: in eval() mode. tok: its tokenizer. template: its ChatTemplate, or None. name: what it is called. api_key:
    what a client must send, '' for nothing.
    """

    def __init__(self, model, tok, template, name: str, limits: Limits, api_key: str = ''):
        self.model = model
        self.tok = tok
        self.template = template
        self.name = name
        self.limits = limits
        self.api_key = api_key
        self.created = int(time.time())
        self.metrics = Metrics()
        self.worker = Worker(model, tok.vocab_size, limits, self.metrics)

    def app(self):
        """The ASGI application. Its worker runs from the server's start to its end."""
        from starlette.applications import Starlette
        from starlette.exceptions import HTTPException
        from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse
        from starlette.routing import Route

        page = (Path(__file__).parent / 'chat.html').read_text(encoding='utf-8')
        policy = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; " \
                 "img-src data:; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"

        async def index(request):
            return HTMLResponse(page, headers={'Content-Security-Policy': policy, 'X-Content-Type-Options': 'nosniff'})

        async def health(request):
            if self.worker.is_alive():
                return JSONResponse({'status': 'ok'})
            return JSONResponse({'status': 'failed'}, 500)

        async def metrics(request):
            return PlainTextResponse(self.metrics.text(self.worker), media_type='text/plain; version=0.0.4')

        async def models(request):
            self.authorize(request)
            return JSONResponse({'object': 'list', 'data': [self.model_card()]})

        async def one_model(request):
            self.authorize(request)
            asked = request.path_params['name']
            if asked != self.name:
                raise ApiError(404, f'there is no model {asked[:60]!r} here', 'model', 'model_not_found')
            return JSONResponse(self.model_card())

        async def api_error(request, error):
            headers = {'Retry-After': '1'} if error.status in (429, 503) else {}
            return JSONResponse(error.body(), error.status, headers)

        async def http_error(request, error):   # no such path, no such method
            told = ApiError(error.status_code, f'{request.method} {request.url.path}: {error.detail}')
            return JSONResponse(told.body(), error.status_code)

        async def unexpected(request, error):   # is logged with its traceback, too
            return JSONResponse(ApiError(500, f'the server failed: {type(error).__name__}').body(), 500)

        @contextlib.asynccontextmanager
        async def lifespan(app):
            self.worker.start()
            yield
            self.worker.stop()
            await asyncio.to_thread(self.worker.join)

        handlers = {ApiError: api_error, HTTPException: http_error, Exception: unexpected}
        app = Starlette(lifespan=lifespan, exception_handlers=handlers, routes=[
            Route('/', index), Route('/health', health), Route('/metrics', metrics), Route('/v1/models', models),
            Route('/v1/models/{name:path}', one_model),
            Route('/v1/completions', self.completions, methods=['POST']),
            Route('/v1/chat/completions', self.chat_completions, methods=['POST'])])
        return self.counted(app)

    def counted(self, app):
        """The application, with each response to the API counted."""
        async def outer(scope, receive, send):
            async def noticed(message):
                if message['type'] == 'http.response.start' and scope['path'].startswith('/v1/'):
                    known = ('/v1/completions', '/v1/chat/completions', '/v1/models')
                    path = scope['path'] if scope['path'] in known else 'other'
                    self.metrics.requests[path, message['status']] += 1
                await send(message)

            await app(scope, receive, noticed if scope['type'] == 'http' else send)

        return outer

    def model_card(self) -> dict:
        """The model as /v1/models lists it."""
        return {'id': self.name, 'object': 'model', 'created': self.created, 'owned_by': 'flatgpt'}

    def authorize(self, request):
        """ApiError unless the client has sent the key."""
        scheme, _, key = request.headers.get('authorization', '').partition(' ')
        right = secrets.compare_digest(key.strip().encode(), self.api_key.encode())
        if self.api_key and not (right and scheme.lower() == 'bearer'):
            raise ApiError(401, 'wrong or missing API key: send it as "Authorization: Bearer KEY"',
                           code='invalid_api_key')

    async def read_body(self, request):
        """The JSON of a request's body. ApiError if it is too long or is not JSON."""
        content = bytearray()
        async for part in request.stream():
            content += part
            if len(content) > self.limits.body:
                raise ApiError(413, f'the request is longer than {self.limits.body:,} bytes', code='request_too_large')
        try:
            return json.loads(content, parse_constant=refuse_constant)
        except (ValueError, RecursionError) as error:
            raise ApiError(400, f'the request is not JSON: {one_line(error)[:100]}') from None

    async def completions(self, request):
        """POST /v1/completions: texts that continue prompts."""
        self.authorize(request)
        options = read_options(await self.read_body(request), COMPLETION)
        if options['prompt'] is None:
            raise ApiError(400, 'prompt: missing', 'prompt', 'missing_required_parameter')
        try:
            prompts = token_ids(options['prompt'], self.tok)
        except UserError as error:
            raise ApiError(400, str(error), 'prompt', 'invalid_value') from None
        forms = Forms(self.name, self.tok, False, options['logprobs'] is not None, options['logprobs'] or 0)
        return await self.respond(request, forms, prompts, options)

    async def chat_completions(self, request):
        """POST /v1/chat/completions: the assistant's next message."""
        self.authorize(request)
        options = read_options(await self.read_body(request), CHAT)
        if self.template is None:
            raise ApiError(400, 'this model has no chat template: use /v1/completions', code='no_chat_template')
        try:
            messages = messages_from(options['messages'], answered=False)
            ids = await asyncio.to_thread(self.template.prompt_ids, self.tok, messages)
        except UserError as error:
            raise ApiError(400, str(error), 'messages', 'invalid_value') from None
        forms = Forms(self.name, self.tok, True, options['logprobs'], options['top_logprobs'])
        return await self.respond(request, forms, [torch.as_tensor(ids)], {**options, 'echo': False})

    async def respond(self, request, forms: Forms, prompts: list[torch.Tensor], options: dict):
        """Answer n times to each prompt, and send the answers as they come or all at the end."""
        from starlette.responses import JSONResponse, StreamingResponse

        asked = options['max_completion_tokens'] if options['max_tokens'] is None else options['max_tokens']
        block_size = self.model.config.block_size
        jobs = []
        echoes = []
        for prompt in prompts:
            needed = len(prompt) if asked == 0 else len(prompt) + 1
            if needed > block_size:
                raise ApiError(400, f'a prompt of {len(prompt):,} tokens: this model has a context of {block_size:,}',
                               'messages' if forms.chat else 'prompt', 'context_length_exceeded')
            most = min(self.limits.tokens, block_size - len(prompt))
            number = min(most if asked is None else asked, most)
            echo = {'text': '', 'tokens': [], 'finish': None}
            if options['echo']:
                echo = await asyncio.to_thread(self.echo, prompt, forms)
            for row in range(options['n']):
                try:
                    made = batching.Request(
                        prompt, number, options['temperature'], options['top_k'], options['top_p'], options['min_p'],
                        options['repetition_penalty'], options['seed'], row, forms.top if forms.logprobs else 0)
                except ValueError as error:
                    raise ApiError(400, str(error), code='invalid_value') from None
                answer = engine.Answer(self.tok, prompt.numpy(), number, options['stop'])
                jobs.append(Job(made, answer, self.limits.seconds))
                echoes.append(echo)
        prompt_tokens = sum(map(len, prompts))
        self.metrics.tokens['prompt'] += prompt_tokens
        self.worker.submit(jobs)
        if options['stream']:
            with_usage = bool((options['stream_options'] or {}).get('include_usage'))
            return StreamingResponse(self.stream(forms, jobs, echoes, prompt_tokens, with_usage),
                                     media_type='text/event-stream', headers={'Cache-Control': 'no-cache'})
        work = asyncio.ensure_future(asyncio.gather(*(collect(job) for job in jobs)))
        leaving = asyncio.ensure_future(disconnected(request))
        try:
            await asyncio.wait((work, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                return JSONResponse({}, 499)   # nobody reads it
            choices = [{'text': echo['text'] + got['text'], 'tokens': echo['tokens'] + got['tokens'],
                        'finish': got['finish']} for echo, got in zip(echoes, work.result())]
        finally:
            leaving.cancel()
            work.cancel()
            for job in jobs:
                self.worker.cancel(job)
        made = sum(len(job.answer.ids) for job in jobs)
        return JSONResponse(forms.whole(choices, usage_of(prompt_tokens, made)))

    async def stream(self, forms: Forms, jobs: list[Job], echoes: list[dict], prompt_tokens: int, with_usage: bool):
        """The events of a stream. When the client leaves, this generator is closed and the jobs are cancelled."""
        together = asyncio.Queue()   # pieces of all jobs, with their number

        async def forward(index, job):
            while True:
                piece = await job.pieces.get()
                await together.put((index, piece))
                if isinstance(piece, Exception) or piece['finish']:
                    return

        tasks = [asyncio.ensure_future(forward(index, job)) for index, job in enumerate(jobs)]
        try:
            for index, echo in enumerate(echoes):
                if forms.chat or echo['text']:
                    yield event(forms.chunk(index, echo, first=True))
            running = len(jobs)
            while running:
                index, piece = await together.get()
                if isinstance(piece, ApiError):
                    yield event(piece.body())
                    return
                running -= piece['finish'] is not None
                yield event(forms.chunk(index, piece))
            if with_usage:
                made = sum(len(job.answer.ids) for job in jobs)
                yield event(forms.usage_chunk(usage_of(prompt_tokens, made)))
            yield 'data: [DONE]\n\n'
        finally:
            for task in tasks:
                task.cancel()
            for job in jobs:
                self.worker.cancel(job)

    @torch.inference_mode()
    def echo(self, prompt: torch.Tensor, forms: Forms) -> dict:
        """A prompt in the form of an answer: its text, and its tokens, with log-probabilities if they are wanted."""
        ids = prompt.tolist()
        tokens = [(i, None, None) for i in ids]
        if forms.logprobs:
            device = self.model.transformer.wte.weight.device
            hidden = self.model.hidden_states(prompt.to(device)[None])
            logits = self.model.compute_logits(hidden)[0, :, :self.tok.vocab_size].float()   # (T, V)
            log_probs = logits.log_softmax(dim=-1)
            values, likeliest = log_probs.topk(min(max(forms.top, 1), log_probs.size(1)))
            for at in range(1, len(ids)):
                top = list(zip(likeliest[at - 1].tolist(), values[at - 1].tolist()))
                tokens[at] = (ids[at], log_probs[at - 1, ids[at]].item(), top)
        return {'text': self.tok.decode(ids), 'tokens': tokens, 'finish': None}


def refuse_constant(name: str):
    """Raise ValueError for NaN and Infinity, which Python would read in JSON."""
    raise ValueError(f'{name} is not a JSON number')


def event(content: dict) -> str:
    """A server-sent event."""
    return f'data: {json.dumps(content, ensure_ascii=False)}\n\n'


async def collect(job: Job) -> dict:
    """The whole answer of a job, {'text', 'tokens', 'finish'}."""
    text = []
    tokens = []
    while True:
        piece = await job.pieces.get()
        if isinstance(piece, Exception):
            raise piece
        text.append(piece['text'])
        tokens += piece['tokens']
        if piece['finish']:
            return {'text': ''.join(text), 'tokens': tokens, 'finish': piece['finish']}


async def disconnected(request):
    """Return when the client of a request has left."""
    while True:
        message = await request.receive()
        if message['type'] == 'http.disconnect':
            return
