"""
A model over HTTP: OpenAI's API, and a page to talk to it.

    python serve.py --out_dir=out-chat                        then open http://127.0.0.1:8000
    python serve.py --init_from=HuggingFaceTB/SmolLM2-135M-Instruct --port=8001 --rows=16
    curl http://127.0.0.1:8000/v1/completions -H "Content-Type: application/json" -d '{"prompt": "def ", "seed": 1}'

Every client of OpenAI's API works with base_url=http://127.0.0.1:8000/v1. Requests are decoded together; what one gets
does not depend on the others. /health and /metrics are for those who watch the server. Ctrl-C or SIGTERM: no new
requests, and the end when the running ones are done.
"""

from configurator import configure

# ---------------------------------------------------------------------------------------------------------------------
# the model
out_dir = 'out'                       # folder of the model: its best.pt, or else its ckpt.pt
init_from = 'resume'                  # 'resume' (the model in out_dir), a path, 'gpt2', 'owner/name' on the hub
tokenizer_of: str | None = None       # for a checkpoint of nanoGPT, which has none: the dataset it was trained on
name: str | None = None               # what clients call the model; None: the last part of out_dir or init_from
# who may ask, and for how much
host = '127.0.0.1'                    # address to listen on; '0.0.0.0': every machine that reaches this one
port = 8000                           # 0: any that is free
api_key = ''                          # key that clients must send; '': none
rows = 8                              # answers that are decoded together
max_queue = 64                        # answers that wait; more are refused with status 429
max_seconds = 300.0                   # for an answer, waiting included; then it ends
max_tokens = 4096                     # of an answer
max_body = 1048576                    # bytes of a request
# machine
quantize: str | None = None           # 'int8': weights in 8 bits
device = 'auto'                       # 'cuda', 'cuda:1', 'mps', 'cpu', 'auto' (the first of them that is available)
dtype = 'auto'                        # 'float32', 'bfloat16', 'float16', 'auto' (the fastest)
# ---------------------------------------------------------------------------------------------------------------------
config = configure(globals())

import signal
import sys
import threading
from pathlib import Path

from flatgpt import checkpoint, runtime, validate
from flatgpt.conversation import chat_template_of
from flatgpt.errors import UserError
from flatgpt.quantize import prepare
from flatgpt.serving import Limits, Server
from flatgpt.tokenizer import no_surrogates

validate.serve_options(config)
try:
    import uvicorn
except ImportError:
    raise UserError('serve.py needs starlette and uvicorn: pip install starlette uvicorn') from None

# the model

path = checkpoint.model_path(out_dir, init_from)
model, tok, ckpt = checkpoint.load_model(path, tokenizer_of)
rt = runtime.setup(device, dtype, False, 0, decoding=True)
print(f'{path}, {checkpoint.stage(ckpt)}; {rt.describe()}', file=sys.stderr)
del ckpt   # its memory
prepare(model, rt, quantize, dtype, rows)

# the server

template = chat_template_of(tok)
limits = Limits(rows, max_queue, max_seconds, max_tokens, max_body)
name = no_surrogates(name or Path(out_dir if init_from == 'resume' else init_from).resolve().name)   # JSON has none
server = Server(model, tok, template, name, limits, api_key)
if template is None:
    print('this model has no chat template: /v1/completions only', file=sys.stderr)
web = uvicorn.Server(uvicorn.Config(server.app(), host=host, port=port, timeout_graceful_shutdown=max_seconds))
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, web.handle_exit)   # the end comes after the last answer; a second Ctrl-C does not wait


def speak():
    """Speak HTTP until a signal comes, then end the decoding."""
    try:
        web.run()
    finally:
        server.worker.stop()


threading.Thread(target=speak, daemon=True).start()
server.worker.run()   # in the thread that has loaded the model, as run() wants it
if not web.started:   # the port is in use
    sys.exit(1)
