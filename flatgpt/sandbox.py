"""
Jinja templates that come from elsewhere, such as the chat template of a model: compiled and run in Jinja's sandbox,
with limits on time and on the size of what they make.
"""

import contextlib
import datetime
import functools
import json
import sys
import time

from flatgpt.errors import UserError, first_line

MAX_SECONDS = 2.0         # of work for one run of a template
MAX_CHARACTERS = 10**7    # that a template may make


def run(program, variables: dict) -> str:
    """The text that a compiled template makes of variables. UserError if it refuses them, fails, or takes too long."""
    import jinja2

    pieces = []
    length = 0
    try:
        with time_limit(MAX_SECONDS):
            for piece in program.generate(variables):
                length += len(piece)
                if length > MAX_CHARACTERS:
                    raise UserError(f'the chat template makes more than {MAX_CHARACTERS:,} characters')
                pieces.append(piece)
    except TimeOver:
        raise UserError(f'the chat template takes more than {MAX_SECONDS:g} seconds') from None
    except jinja2.TemplateError as error:
        raise UserError(f'the chat template refuses this conversation: {first_line(error)}') from None
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError) as error:
        raise UserError(f'the chat template fails: {type(error).__name__}: {first_line(error)}') from None
    return ''.join(pieces)


@functools.lru_cache(maxsize=16)
def compiled(source: str):
    """A Jinja template, compiled in a sandbox. UserError if its syntax is wrong."""
    import jinja2
    from jinja2.ext import Extension
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

    class Generation(Extension):
        """{% generation %} ... {% endgeneration %}, which some templates put around an answer: the tags do nothing."""
        tags = {'generation'}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(('name:endgeneration',), drop_needle=True)

    def refuse(message):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=['jinja2.ext.loopcontrols', Generation])
    environment.filters['tojson'] = tojson   # Jinja's own escapes HTML
    environment.globals['raise_exception'] = refuse
    environment.globals['strftime_now'] = lambda form: datetime.datetime.now().strftime(form)
    try:
        return environment.from_string(source)
    except (jinja2.TemplateError, RecursionError) as error:
        line = getattr(error, 'lineno', None)
        raise UserError(f'the chat template has an error{f" in line {line}" if line else ""}: '
                        f'{first_line(error)}') from None


class TimeOver(BaseException):
    """The end of time_limit(). It is not an Exception, which a template could pass over."""


@contextlib.contextmanager
def time_limit(seconds: float):
    """A context in which Python code of this thread runs for so many seconds at most; then it raises TimeOver.

    The thread's own clock, which does not run while other programs do, is read between two lines of the template and
    at each call (sys.settrace), because a thread cannot be stopped from outside.
    """
    end = time.thread_time() + seconds

    def look(frame, event, argument):
        if time.thread_time() > end:
            raise TimeOver
        return look if frame.f_code.co_filename == '<template>' else None   # the lines of Jinja itself are many

    before = sys.gettrace()
    sys.settrace(look)
    try:
        yield
    finally:
        sys.settrace(before)
