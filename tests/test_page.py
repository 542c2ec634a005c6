"""
The page of serve.py in a real browser: one types, reads while it streams, stops, switches language; what a model writes
stays text.
"""

import asyncio
import json
import threading
from pathlib import Path

import pytest
from conftest import ROOT, needs, wait_until

pytestmark = [needs('browser'), pytest.mark.full]

HOSTILE = """# Title

<script>document.title = 'broken'</script><img src=x onerror="document.title='broken'">

- **bold** and *italic* and `code`
- [link](https://example.com/) and [trick](javascript:document.title='broken')
  1. first
  2. second
     - deep
- last

```python
print("<b>")
```

| a <i>b</i> | c |
|:--|--:|
| `1` | <b>2</b> |
"""


class Scripted:
    """A server with the page, whose model answers what the test says, slowly if asked."""

    def __init__(self):
        import uvicorn
        from starlette.applications import Starlette
        from starlette.responses import HTMLResponse, JSONResponse, StreamingResponse
        from starlette.routing import Route

        self.requests = []
        self.left = 0   # clients that did not wait for the end

        async def index(request):
            page = (Path(ROOT) / 'flatgpt' / 'chat.html').read_text(encoding='utf-8')
            policy = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; " \
                     "img-src data:"
            return HTMLResponse(page, headers={'Content-Security-Policy': policy})

        async def models(request):
            return JSONResponse({'data': [{'id': 'scripted'}]})

        async def chat(request):
            body = await request.json()
            self.requests.append(body)
            said = body['messages'][-1]['content']
            if said == 'fail':
                return JSONResponse({'error': {'message': 'too <b>long</b>'}}, 400)
            text = HOSTILE if said == 'hostile' else 'word ' * 500 if said == 'long' else f'You said: {said}'

            async def events():
                done = False
                try:
                    for start in range(0, len(text), 7):
                        chunk = {'choices': [{'delta': {'content': text[start:start + 7]}, 'finish_reason': None}]}
                        yield f'data: {json.dumps(chunk)}\n\n'
                        await asyncio.sleep(0.02 if said == 'long' else 0)
                    yield 'data: {"choices": [{"delta": {}, "finish_reason": "stop"}]}\n\n'
                    yield 'data: {"choices": [], "usage": {"completion_tokens": 42}}\n\ndata: [DONE]\n\n'
                    done = True
                finally:
                    self.left += not done

            return StreamingResponse(events(), media_type='text/event-stream')

        app = Starlette(routes=[Route('/', index), Route('/v1/models', models),
                                Route('/v1/chat/completions', chat, methods=['POST'])])
        self.uvicorn = uvicorn.Server(uvicorn.Config(app, host='127.0.0.1', port=0, log_level='error'))
        self.thread = threading.Thread(target=self.uvicorn.run, daemon=True)
        self.thread.start()
        wait_until(lambda: self.uvicorn.started)
        self.url = f'http://127.0.0.1:{self.uvicorn.servers[0].sockets[0].getsockname()[1]}/'


@pytest.fixture(scope='module')
def server():
    scripted = Scripted()
    yield scripted
    scripted.uvicorn.should_exit = True
    scripted.thread.join(5)


@pytest.fixture(scope='module')
def driver():
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for argument in ('--headless=new', '--no-sandbox', '--disable-dev-shm-usage', '--window-size=900,800',
                     '--lang=en-US'):
        options.add_argument(argument)
    service = webdriver.ChromeService('/usr/bin/chromedriver')
    browser = webdriver.Chrome(options, service)
    yield browser
    browser.quit()


@pytest.fixture
def page(server, driver):
    driver.get(server.url)
    return driver


def find(page, selector):
    return page.find_elements('css selector', selector)


def ask(page, text):
    from selenium.webdriver.common.keys import Keys
    number = len(find(page, '.turn.assistant'))
    find(page, '#input')[0].send_keys(text + Keys.ENTER)
    wait_until(lambda: len(find(page, '.turn.assistant')) == number + 1)


def answer(page):
    """The text of the last answer, once it is complete."""
    wait_until(lambda: not find(page, '#stop')[0].is_displayed())
    return find(page, '.turn.assistant .text')[-1].text


def test_a_conversation_is_sent_with_its_turns_and_options(server, page):
    assert wait_until(lambda: find(page, '#model')[0].text == 'scripted')
    page.execute_script("document.querySelector('details').open = true")
    find(page, '#system')[0].send_keys('be kind')
    temperature = find(page, '#temperature')[0]
    temperature.clear()
    temperature.send_keys('0.2')
    ask(page, 'one')
    assert answer(page) == 'You said: one'
    ask(page, 'two')
    assert answer(page) == 'You said: two'
    sent = server.requests[-1]
    assert [message['role'] for message in sent['messages']] == ['system', 'user', 'assistant', 'user']
    assert sent['messages'][2]['content'] == 'You said: one'
    assert sent['temperature'] == 0.2 and sent['stream'] is True
    assert find(page, '.turn.assistant .note')[-1].text == '42 tokens'
    find(page, '#new')[0].click()
    assert not find(page, '.turn')
    ask(page, 'three')
    answer(page)
    assert len(server.requests[-1]['messages']) == 2


def test_an_answer_streams_and_stops(server, page):
    left = server.left
    ask(page, 'long')
    wait_until(lambda: 'word' in find(page, '.turn.assistant .text')[-1].text)
    find(page, '#stop')[0].click()
    text = answer(page)
    assert 0 < len(text.split()) < 500
    assert find(page, '.turn.assistant .note')[-1].text == 'stopped'
    wait_until(lambda: server.left == left + 1)


def test_what_a_model_writes_is_shown_and_never_run(page):
    ask(page, 'hostile')
    answer(page)
    text = find(page, '.turn.assistant .text')[-1]
    assert "<script>document.title = 'broken'</script>" in text.text
    assert page.title == 'flatgpt'
    assert not find(page, '.text script') and not find(page, '.text img')
    cells = [element.text for element in find(page, '.text th, .text td')]
    assert cells == ['a <i>b</i>', 'c', '1', '<b>2</b>']
    marked = find(page, '.text strong, .text em, .text li code')
    assert [element.text for element in marked] == ['bold', 'italic', 'code']
    assert find(page, '.text h3')[0].text == 'Title'
    lists = ['.text > ul > li', '.text > ul > li > ol > li', '.text > ul > li > ol > li > ul > li']
    assert [len(find(page, items)) for items in lists] == [3, 2, 1]
    assert find(page, '.text pre code')[0].text == 'print("<b>")'
    assert [link.get_attribute('href') for link in find(page, '.text a')] == ['https://example.com/']


def test_an_error_is_shown_and_the_question_is_not_sent_again(server, page):
    ask(page, 'fail')
    answer(page)
    assert find(page, '.note.error')[0].text == 'too <b>long</b>'
    ask(page, 'again')
    answer(page)
    assert [message['content'] for message in server.requests[-1]['messages']] == ['again']


def test_the_language_and_the_theme_switch_and_stay(server, page):
    def background():
        return page.execute_script('return getComputedStyle(document.body).backgroundColor')

    find(page, '#language')[0].click()
    assert find(page, '#send')[0].text == '发送'
    assert page.execute_script('return document.documentElement.lang') == 'zh-CN'
    before = background()
    find(page, '#theme')[0].click()
    after = background()
    assert before != after
    page.get(server.url)
    assert (find(page, '#send')[0].text, background()) == ('发送', after)
    find(page, '#language')[0].click()
    assert find(page, '#send')[0].text == 'Send'


def test_a_narrow_screen_needs_no_scrolling_to_the_side(server, page):
    page.set_window_size(500, 700)
    page.execute_cdp_cmd('Emulation.setDeviceMetricsOverride',
                         {'width': 360, 'height': 700, 'deviceScaleFactor': 1, 'mobile': True})
    page.get(server.url)
    ask(page, 'x' * 300)
    answer(page)
    assert page.execute_script('return document.documentElement.scrollWidth <= window.innerWidth')
    page.execute_cdp_cmd('Emulation.clearDeviceMetricsOverride', {})
