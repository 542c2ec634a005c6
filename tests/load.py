"""
Load for a running serve.py: many clients at once, of whom some leave early.

    python serve.py --init_from=smollm2-instruct --dtype=float32 &
    python -m tests.load --clients=32 --requests=500 --pid=$!

Prints how many tokens come per second, beside one client alone, the time to the first token, and the server's memory.
Status 1 if an answer is lost, or is not the one that the same request gets alone, which float32 guarantees.
"""

from configurator import configure

# ---------------------------------------------------------------------------------------------------------------------
url = 'http://127.0.0.1:8000'         # address of the server
api_key = ''                          # key of the server, if it asks for one
clients = 32                          # clients that ask at the same time
requests = 500                        # questions of all clients together
alone = 50                            # of the answers, how many are compared with what one client alone gets
leaving = 0.1                         # share of the requests whose client leaves after the first token
longest_prompt = 240                  # characters
longest_answer = 64                   # tokens
pid = 0                               # process of the server, whose memory is watched, 0: none
# ---------------------------------------------------------------------------------------------------------------------
configure(globals())

import json
import random
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from requests import Session

TEXT = ' '.join((Path(__file__).parents[1] / 'README.md').read_text(encoding='utf-8').split())
session = Session()
session.headers['Authorization'] = f'Bearer {api_key}'


def body_of(number):
    """Return request `number`: its prompt, length and options are a function of the number."""
    chosen = random.Random(number)
    start = chosen.randrange(len(TEXT) - longest_prompt)
    return {'prompt': TEXT[start:start + chosen.randint(1, longest_prompt)], 'seed': number, 'stream': True,
            'max_tokens': chosen.randint(1, longest_answer), 'temperature': chosen.choice([0, 0.7, 1.0]),
            'top_p': chosen.choice([0.9, 1.0])}


def ask(number, leave=False):
    """Return the answer to a request: its text, None if it was lost, and the seconds to its first token."""
    begun = time.monotonic()
    first = None
    text = ''
    finish = None
    with session.post(f'{url}/v1/completions', json=body_of(number), stream=True, timeout=600) as response:
        if response.status_code == 400:   # such as a prompt longer than a small model's context
            raise SystemExit(response.json()['error']['message'])
        for line in response.iter_lines():
            if line.startswith(b'data: {'):
                first = first or time.monotonic() - begun
                [choice] = json.loads(line[6:])['choices']
                text += choice['text']
                finish = choice['finish_reason']
            if leave:
                break
    return text if finish else None, first


def generated():
    """Return how many tokens the server has made, and the time."""
    metrics = session.get(f'{url}/metrics', timeout=600).text
    return int(re.search('kind="generated"} ([0-9]+)', metrics)[1]), time.monotonic()


def memory():
    """Return the server's resident memory in MB."""
    return int(subprocess.check_output(['ps', '-o', 'rss=', '-p', str(pid)])) / 1024 if pid else 0.0


def tokens_per_second(before):
    """Return the speed since generated() has returned `before`."""
    tokens, now = generated()
    return (tokens - before[0]) / (now - before[1])


left = {number for number in range(requests) if random.Random(f'leaves {number}').random() < leaving}
ask(requests)   # the first answer of a server takes longer
start = memory()
middle = []


def client(number):
    """Ask once, and leave or return what ask() does."""
    if number == requests // 2:
        middle.append(memory())
    return ask(number, leave=number in left)


before = generated()
with ThreadPoolExecutor(clients) as pool:
    answers = list(pool.map(client, range(requests)))
together = tokens_per_second(before)
end = memory()
stayed = [number for number in range(requests) if number not in left]
lost = [number for number in stayed if answers[number][0] is None]

compared = stayed[:alone]
before = generated()
mixed_up = [number for number in compared if ask(number)[0] != answers[number][0]]
one_at_a_time = tokens_per_second(before)

first = sorted(answers[number][1] for number in stayed if answers[number][1])
print(f'{requests} requests of {clients} clients: {len(left)} left early, {len(lost)} lost; {len(mixed_up)} of '
      f'{len(compared)} are not what one gets alone')
print(f'{together:.1f} tokens per second, one at a time {one_at_a_time:.1f}: {together / one_at_a_time:.2f} x')
if first:
    print(f'first token: {first[len(first) // 2]:.2f} s (median), {first[len(first) * 95 // 100]:.2f} s (95 %)')
if pid:
    print(f'memory: {start:.0f} MB at the start, {middle[0]:.0f} in the middle, {end:.0f} at the end')
sys.exit(1 if lost or mixed_up else 0)
