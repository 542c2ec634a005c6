"""
OpenAI's API over HTTP for one model: requests are decoded together, each with its own options and random numbers.

One thread decodes (Worker), an asyncio loop speaks HTTP (Server); they exchange Jobs, one per answer. What requests may
ask and how responses look is in flatgpt/openai_forms.py.
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

from flatgpt import batching
from flatgpt.answers import Answer
from flatgpt.conversation import messages_from
from flatgpt.errors import UserError, first_line
from flatgpt.openai_forms import CHAT, COMPLETION, ApiError, Forms, Piece, read_options, token_ids

FIRST_TOKEN = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, '+Inf')   # upper borders of the histogram, in seconds
METRICS = {'flatgpt_requests_total': 'counter', 'flatgpt_tokens_total': 'counter', 'flatgpt_running': 'gauge',
           'flatgpt_waiting': 'gauge', 'flatgpt_first_token_seconds': 'histogram'}
BUCKET = 'flatgpt_first_token_seconds_bucket{{le="{}"}}'
CONTROLS = ('temperature', 'top_k', 'top_p', 'min_p', 'repetition_penalty', 'seed')   # of a request to the engine
PATHS = ('/v1/completions', '/v1/chat/completions', '/v1/models')   # that have metrics of their own
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; " \
         "img-src data:; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"   # what the page may load


@dataclasses.dataclass
class Limits:
    """What a server allows. A request that asks for more is refused, or its answer ends early."""
    rows: int = 8                # answers that are decoded together
    queue: int = 64              # answers that wait
    seconds: float = 300.0       # for an answer, waiting included, and for a request to arrive
    tokens: int = 4096           # of an answer
    body: int = 1 << 20          # bytes of a request


class Metrics(collections.Counter):
    """Numbers by their names in the text form of Prometheus, labels included."""

    def first_token(self, seconds: float):
        """Count the seconds from a request to its first token."""
        self.update({BUCKET.format(border): int(seconds <= float(border)) for border in FIRST_TOKEN})
        self['flatgpt_first_token_seconds_sum'] += seconds
        self['flatgpt_first_token_seconds_count'] += 1

    def text(self) -> str:
        """All numbers, one per line; of a copy, because another thread may add some."""
        lines = []
        for name, kind in METRICS.items():
            lines.append(f'# TYPE {name} {kind}')
            lines += [f'{series} {number}' for series, number in list(self.items()) if series.startswith(name)]
        return '\n'.join(lines) + '\n'


# ---------------------------------------------------------------------------------------------------------------------
# decoding

@dataclasses.dataclass(eq=False, kw_only=True)
class Job(batching.Request):
    """One answer: a request to the engine and its text so far. The HTTP side finds (index, Piece or ApiError) in
    pieces, which all answers of one HTTP request share."""
    index: int
    answer: Answer
    echo: bool                   # whether the prompt comes first
    pieces: asyncio.Queue
    loop: asyncio.AbstractEventLoop
    begun: float = dataclasses.field(default_factory=time.monotonic)
    held: list = dataclasses.field(default_factory=list)   # tokens whose text is not complete yet
    cancelled: bool = False      # it is removed before the next step

    def put(self, piece: Piece | ApiError):
        """Hand a piece to the HTTP side; called by the thread that decodes."""
        with contextlib.suppress(RuntimeError):   # the loop is closed: the server has ended
            self.loop.call_soon_threadsafe(self.pieces.put_nowait, (self.index, piece))


class Worker:
    """Decodes: takes jobs from a queue into a batching.Batch, and steps it. One thread calls run(), others the rest."""

    def __init__(self, model, tok, limits: Limits, metrics: Metrics):
        self.batch = batching.Batch(model, limits.rows, tok.vocab_size)
        self.running = self.batch.requests
        self.limits = limits
        self.metrics = metrics
        self.waiting = []
        self.condition = threading.Condition()   # guards waiting
        self.stopping = False

    def submit(self, jobs: list[Job]):
        """Queue jobs, all or none. ApiError if too many wait."""
        with self.condition:
            if len(self.waiting) + len(jobs) > self.limits.queue:
                raise ApiError(429, f'{len(self.waiting)} answers wait already: try again later', code='overloaded')
            self.waiting += jobs
            self.condition.notify()

    def stop(self):
        """End run(), once its current step is done."""
        with self.condition:
            self.stopping = True
            self.condition.notify()

    def run(self):
        """Decode until stop(), in the thread that calls this. Others should not compute: where several threads do,
        OpenMP lets all sleep at each barrier, which halves the speed of a small model."""
        while not self.stopping:
            with self.condition:
                self.condition.wait_for(lambda: self.waiting or self.running or self.stopping, timeout=1)   # Ctrl-C
                for job in [job for job in self.running if job.cancelled]:
                    self.batch.remove(job)
                self.waiting = [job for job in self.waiting if not job.cancelled]
                room = self.limits.rows - len(self.running)
                joining = self.waiting[:room]
                self.waiting = self.waiting[room:]
            for job in joining:
                with self.failing([job]):
                    self.join_batch(job)
            with self.failing(list(self.running)):
                for step in self.batch.step():
                    self.take(step)

    @contextlib.contextmanager
    def failing(self, jobs: list[Job]):
        """In this block, an error of torch, such as a lack of memory, ends these jobs and not the server."""
        try:
            yield
        except RuntimeError as error:
            for job in jobs:
                self.end(job, ApiError(500, f'the model failed: {first_line(error)}'))

    @torch.inference_mode()
    def join_batch(self, job: Job):
        """Encode the prompt of a job; its first token comes with it."""
        if time.monotonic() > job.begun + self.limits.seconds:
            job.put(ApiError(503, 'the server was busy for too long: try again later', code='timeout'))
            return
        if job.echo:
            job.put(self.prompt_piece(job))
        if job.answer.finish:   # no token is wanted
            job.put(Piece(finish=job.answer.finish))
            return
        step = self.batch.add(job)
        self.metrics.first_token(time.monotonic() - job.begun)
        self.take(step)

    def prompt_piece(self, job: Job) -> Piece:
        """The prompt of a job as a piece: its text, and the log-probabilities of its tokens if they are wanted."""
        ids = job.ids.tolist()
        tokens = [(i, None, None) for i in ids]
        if job.top_log_probs:
            hidden = self.batch.model.hidden_states(job.ids.to(self.batch.cache.device)[None])
            logits = self.batch.model.compute_logits(hidden)[0, :-1, :self.batch.vocab_size].float()   # (T - 1, V)
            log_probs = logits.log_softmax(dim=-1)
            values, likeliest = log_probs.topk(min(job.top_log_probs, log_probs.size(1)))
            for at, (top, top_values) in enumerate(zip(likeliest.tolist(), values.tolist()), 1):
                tokens[at] = (ids[at], log_probs[at - 1, ids[at]].item(), list(zip(top, top_values)))
        return Piece(job.answer.tok.decode(ids), tokens)

    def take(self, step: batching.Step):
        """Add a token to its job, and hand over the text that is complete by it."""
        job = step.request
        if step.token is None:
            self.end(job, ApiError(500, 'the model gives NaN or infinite logits'))
            return
        answer = job.answer
        answer.add(step.token, step.log_prob)
        self.metrics['flatgpt_tokens_total{kind="generated"}'] += 1
        if not answer.finish and time.monotonic() > job.begun + self.limits.seconds:
            answer.end('length')
        job.held.append((step.token, step.log_prob, step.top))
        piece = Piece(answer.new_text(), job.held, answer.finish)
        if piece.finish:
            self.end(job, piece)
        elif piece.text:
            job.held = []
            job.put(piece)

    def end(self, job: Job, last: Piece | ApiError):
        """End a job with this piece."""
        job.put(last)
        if job in self.running:
            self.batch.remove(job)


# ---------------------------------------------------------------------------------------------------------------------
# HTTP

class Server:
    """The endpoints for one model. A thread must call worker.run().

    model: in eval() mode. tok: its tokenizer. template: its ChatTemplate, or None. name: what it is called. api_key:
    what a client must send, '' for nothing.
    """

    def __init__(self, model, tok, template, name: str, limits: Limits, api_key: str = ''):
        self.context = model.config.block_size
        self.tok = tok
        self.template = template
        self.card = {'id': name, 'object': 'model', 'created': int(time.time()), 'owned_by': 'flatgpt'}
        self.limits = limits
        self.api_key = api_key
        self.encoding = threading.Lock()
        self.metrics = Metrics()
        self.worker = Worker(model, tok, limits, self.metrics)

    def app(self):
        """The ASGI application."""
        from starlette.applications import Starlette
        from starlette.exceptions import HTTPException
        from starlette.requests import ClientDisconnect
        from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse
        from starlette.routing import Route

        page = (Path(__file__).parent / 'chat.html').read_text(encoding='utf-8')

        async def index(request):
            return HTMLResponse(page, headers={'Content-Security-Policy': POLICY, 'X-Content-Type-Options': 'nosniff'})

        async def health(request):
            return JSONResponse({'status': 'ok'})

        async def metrics(request):
            self.metrics['flatgpt_running'] = len(self.worker.running)
            self.metrics['flatgpt_waiting'] = len(self.worker.waiting)
            return PlainTextResponse(self.metrics.text(), media_type='text/plain; version=0.0.4')

        async def models(request):
            self.authorize(request)
            name = request.path_params.get('name')
            if name not in (None, self.card['id']):
                raise ApiError(404, f'there is no model {name[:60]!r} here', 'model', 'model_not_found')
            self.count(request, 200)
            return JSONResponse(self.card if name else {'object': 'list', 'data': [self.card]})

        async def failed(request, error):
            if isinstance(error, HTTPException):   # no such path, no such method
                error = ApiError(error.status_code, f'{request.method} {request.url.path}: {error.detail}')
            elif isinstance(error, ClientDisconnect):
                error = ApiError(499, 'the client has left')
            elif isinstance(error, UserError):   # what was said cannot be encoded
                said = 'messages' if 'chat' in request.url.path else 'prompt'
                error = ApiError(400, str(error), said, 'invalid_value')
            elif not isinstance(error, ApiError):   # is logged with its traceback, too
                error = ApiError(500, f'the server failed: {type(error).__name__}')
            self.count(request, error.status)
            headers = {'Retry-After': '1'} if error.status in (429, 503) else {}
            return JSONResponse(error.body(), error.status, headers)

        handlers = dict.fromkeys((ApiError, HTTPException, ClientDisconnect, UserError, Exception), failed)
        return Starlette(exception_handlers=handlers, routes=[
            Route('/', index), Route('/health', health), Route('/metrics', metrics), Route('/v1/models', models),
            Route('/v1/models/{name:path}', models),
            Route('/v1/completions', self.complete, methods=['POST']),
            Route('/v1/chat/completions', self.complete, methods=['POST'])])

    def count(self, request, status: int):
        """Count a response, if it is one of the API."""
        if request.url.path in PATHS:
            self.metrics[f'flatgpt_requests_total{{path="{request.url.path}",status="{status}"}}'] += 1

    def authorize(self, request):
        """ApiError unless the client has sent the key."""
        scheme, _, key = request.headers.get('authorization', '').partition(' ')
        right = secrets.compare_digest(key.strip().encode(), self.api_key.encode())
        if self.api_key and not (right and scheme.lower() == 'bearer'):
            raise ApiError(401, 'wrong or missing API key: send it as "Authorization: Bearer KEY"',
                           code='invalid_api_key')

    async def read_body(self, request):
        """The JSON of a request's body. ApiError if it is too long, comes too slowly or is not JSON."""
        content = bytearray()
        try:
            async with asyncio.timeout(max(self.limits.seconds, 1)):
                async for part in request.stream():
                    content += part
                    if len(content) > self.limits.body:
                        raise ApiError(413, f'the request is longer than {self.limits.body:,} bytes',
                                       code='request_too_large')
            found = json.loads(content)
            json.dumps(found, ensure_ascii=False, allow_nan=False).encode()   # refuses half a character, too: '\ud800'
        except TimeoutError:
            raise ApiError(408, 'the request did not arrive in time', code='timeout') from None
        except (ValueError, RecursionError) as error:
            raise ApiError(400, f'the request is not JSON: {first_line(error)[:100]}') from None
        return found

    async def complete(self, request):
        """POST /v1/completions: texts that continue prompts. /v1/chat/completions: the assistant's next message."""
        from starlette.responses import JSONResponse, StreamingResponse

        self.authorize(request)
        chat = request.url.path == '/v1/chat/completions'
        options = read_options(await self.read_body(request), CHAT if chat else COMPLETION)
        if chat and self.template is None:
            raise ApiError(400, 'this model has no chat template: use /v1/completions', code='no_chat_template')
        prompts = await asyncio.to_thread(self.prompts, chat, options)
        forms = Forms(self.card['id'], self.tok, chat, options)
        jobs = self.jobs(forms, prompts, options)
        self.worker.submit(jobs)
        number = sum(map(len, prompts))
        self.metrics['flatgpt_tokens_total{kind="prompt"}'] += number
        if options['stream']:
            self.count(request, 200)
            return StreamingResponse(self.stream(forms, jobs, number, options), media_type='text/event-stream',
                                     headers={'Cache-Control': 'no-cache'})
        whole = await self.collect(request, jobs)
        self.count(request, 200)
        choices = [forms.choice(index, piece) for index, piece in enumerate(whole)]
        return JSONResponse(forms.response(choices, (number, sum(len(job.answer.ids) for job in jobs))))

    def prompts(self, chat: bool, options: dict) -> list[torch.Tensor]:
        """The token ids of the prompts of a request. One thread at a time, because a tokenizer is told before each text
        whether it reads the names of special tokens. ApiError or UserError for what cannot be encoded."""
        with self.encoding:
            if not chat:
                return token_ids(options['prompt'], self.tok)
            messages = messages_from(options['messages'], answered=False)
            return [torch.as_tensor(self.template.prompt_ids(self.tok, messages))]

    def jobs(self, forms: Forms, prompts: list[torch.Tensor], options: dict) -> list[Job]:
        """The jobs of a request, n for each prompt. ApiError for a prompt that is too long or empty."""
        wanted = options['max_tokens'], options['max_completion_tokens'], self.limits.tokens
        asked = next(number for number in wanted if number is not None)
        controls = {name: options[name] for name in CONTROLS}
        loop = asyncio.get_running_loop()
        pieces = asyncio.Queue()
        jobs = []
        for prompt in prompts:
            room = self.context - len(prompt)
            if room < min(asked, 1) or not len(prompt):
                raise ApiError(400, f'a prompt of {len(prompt):,} tokens: this model has a context of '
                               f'{self.context:,}', 'messages' if forms.chat else 'prompt', 'context_length_exceeded')
            number = min(room, asked, self.limits.tokens)
            for row in range(options['n']):
                answer = Answer(self.tok, prompt.numpy(), number, options['stop'])
                jobs.append(Job(ids=prompt, max_new_tokens=number, row=row, top_log_probs=forms.needed, **controls,
                                index=len(jobs), answer=answer, echo=options.get('echo', False), pieces=pieces,
                                loop=loop))
        return jobs

    async def collect(self, request, jobs: list[Job]) -> list[Piece]:
        """The whole answers of jobs. ApiError if one fails or the client leaves."""
        async def watch():
            while (await request.receive())['type'] != 'http.disconnect':
                pass
            jobs[0].put(ApiError(499, 'the client has left'))

        leaving = asyncio.ensure_future(watch())
        answers = [Piece() for _ in jobs]
        try:
            while not all(answer.finish for answer in answers):
                index, piece = await jobs[0].pieces.get()
                if isinstance(piece, ApiError):
                    raise piece
                answers[index].text += piece.text
                answers[index].tokens += piece.tokens
                answers[index].finish = piece.finish
        finally:
            leaving.cancel()
            for job in jobs:
                job.cancelled = True
        return answers

    async def stream(self, forms: Forms, jobs: list[Job], prompt_tokens: int, options: dict):
        """The events of a stream. When the client leaves, this generator is closed and the jobs are cancelled."""
        def event(choices, usage=None):
            return f'data: {json.dumps(forms.response(choices, usage), ensure_ascii=False)}\n\n'

        try:
            if forms.chat:
                for job in jobs:
                    yield event([forms.choice(job.index, Piece(), first=True)])
            running = len(jobs)
            while running:
                index, piece = await jobs[0].pieces.get()
                if isinstance(piece, ApiError):
                    yield f'data: {json.dumps(piece.body())}\n\n'
                    return
                yield event([forms.choice(index, piece)])
                if piece.finish:
                    running -= 1
            if options['stream_options'].get('include_usage'):
                yield event([], (prompt_tokens, sum(len(job.answer.ids) for job in jobs)))
            yield 'data: [DONE]\n\n'
        finally:
            for job in jobs:
                job.cancelled = True
