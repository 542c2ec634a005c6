"""
Questions whose answers can be checked, in English and Chinese: made by a program, in any number. The embedded
conversations of data/chat consist of them, and they are the rewards of grpo.py and the checks of eval.py.

A question is held out if the hash of what it asks says so: the same numbers are never learned in another wording.
"""

import hashlib
import random
import re
from typing import NamedTuple

from flatgpt.queries import TABLES, WORDS, same_rows

LANGUAGES = ('en', 'zh')


class Question(NamedTuple):
    kind: str       # a key of KINDS
    language: str   # 'en' or 'zh'
    text: str       # what is asked
    answer: str     # a good answer
    result: str     # what an answer is checked for
    key: str        # what is asked, without its wording; decides whether the question is held out


# ---------------------------------------------------------------------------------------------------------------------
# numbers in words

ONES = ('zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen '
        'seventeen eighteen nineteen').split()
TENS = 'zero ten twenty thirty forty fifty sixty seventy eighty ninety'.split()
DIGITS = '零一二三四五六七八九'


def number_in_words(number: int, language: str) -> str:
    """An integer from 0 to 99 in words: 'forty-two', '四十二'."""
    tens, ones = divmod(number, 10)
    if language == 'en':
        if number < 20:
            return ONES[number]
        return TENS[tens] + (f'-{ONES[ones]}' if ones else '')
    if number < 10:
        return DIGITS[number]
    return (DIGITS[tens] if tens > 1 else '') + '十' + (DIGITS[ones] if ones else '')


# ---------------------------------------------------------------------------------------------------------------------
# arithmetic

SIGNS = {'+': {'en': 'plus', 'zh': '加'}, '-': {'en': 'minus', 'zh': '减'}, '*': {'en': 'times', 'zh': '乘以'}}
ASK = {'en': ('What is {}?', 'How much is {}?', 'Compute {}.', '{} = ?', 'Please tell me: {}?'),
       'zh': ('{}等于多少？', '{}是多少？', '计算{}。', '{} = ?', '请问{}得多少？')}
STORIES = {
    'en': {'+': ('Tom has {a} {thing} and buys {b} more. How many does he have now?',
                 'There are {a} {thing} in a box and {b} on the table. How many are there?'),
           '-': ('Tom has {a} {thing} and gives away {b}. How many are left?',
                 'Of {a} {thing}, {b} are sold. How many are left?'),
           '*': ('{a} boxes hold {b} {thing} each. How many are there?',
                 'One bag costs {b} coins. How many coins do {a} bags cost?')},
    'zh': {'+': ('小明有{a}个{thing}，又买了{b}个。现在有几个？', '盒子里有{a}个{thing}，桌上有{b}个。一共有几个？'),
           '-': ('小明有{a}个{thing}，送出{b}个。还剩几个？', '{a}个{thing}卖掉了{b}个。还剩几个？'),
           '*': ('{a}个盒子，每个装{b}个{thing}。一共有几个？', '一袋要{b}元，{a}袋要多少元？')}}
THINGS = {'en': ('apples', 'pens', 'books', 'eggs', 'stones', 'cups'),
          'zh': ('苹果', '梨', '本子', '鸡蛋', '石头', '杯子')}


def operands(generator: random.Random, sign: str) -> tuple[int, int]:
    """Two numbers whose sum, difference (not negative) or product is asked."""
    if sign == '*':
        return generator.randint(2, 9), generator.randint(2, 99)
    a = generator.randint(2, 99)
    b = generator.randint(2, 99)
    if sign == '-':
        return max(a, b), min(a, b)
    return a, b


def working(a: int, sign: str, b: int) -> str:
    """A computation with its steps, as one does it in the head: '47 + 38 = 70 + 15 = 85'."""
    tens = b // 10 * 10
    ones = b % 10
    if sign == '+':
        steps = [f'{a} + {b}', f'{a // 10 * 10 + tens} + {a % 10 + ones}', str(a + b)]
    elif sign == '-':
        steps = [f'{a} - {b}', f'{a - tens} - {ones}', str(a - b)]
    else:
        steps = [f'{a} × {b}', f'{a * tens} + {a * ones}', str(a * b)]
    if b < 10 and (sign != '+' or a < 10):
        del steps[1]   # there are no tens to split off
    return ' = '.join(steps)


def arithmetic(generator: random.Random, language: str) -> Question:
    """A sum, a difference or a product: in digits, in words or in a story."""
    sign = generator.choice('++--*')
    a, b = operands(generator, sign)
    form = generator.random()
    if form < 0.25:
        thing = generator.choice(THINGS[language])
        text = generator.choice(STORIES[language][sign]).format(a=a, b=b, thing=thing)
    else:
        if form < 0.5:
            shown = [number_in_words(number, language) for number in (a, b)]
            middle = SIGNS[sign][language]
        else:
            shown = [str(a), str(b)]
            middle = generator.choice((SIGNS[sign][language], {'*': '×'}.get(sign, sign)))
        gap = '' if language == 'zh' and middle == SIGNS[sign]['zh'] else ' '
        text = generator.choice(ASK[language]).format(f'{shown[0]}{gap}{middle}{gap}{shown[1]}')
    result = {'+': a + b, '-': a - b, '*': a * b}[sign]
    answer = working(a, sign, b) + ('.' if language == 'en' else '。')
    first, second = sorted((a, b))
    return Question('arithmetic', language, text, answer, str(result), f'{first} {sign} {second}')


# ---------------------------------------------------------------------------------------------------------------------
# dates and units

DAYS = {'en': 'Monday Tuesday Wednesday Thursday Friday Saturday Sunday'.split(),
        'zh': [f'星期{day}' for day in '一二三四五六日']}
MONTHS = {'en': ('January February March April May June July August September October November December').split(),
          'zh': [f'{number}月' for number in range(1, 13)]}
DAYS_OF = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
UNITS = (   # how many of the second make one of the first
    (60, {'en': ('hours', 'minutes'), 'zh': ('小时', '分钟')}),
    (60, {'en': ('minutes', 'seconds'), 'zh': ('分钟', '秒')}),
    (24, {'en': ('days', 'hours'), 'zh': ('天', '小时')}), (7, {'en': ('weeks', 'days'), 'zh': ('周', '天')}),
    (100, {'en': ('metres', 'centimetres'), 'zh': ('米', '厘米')}),
    (10, {'en': ('centimetres', 'millimetres'), 'zh': ('厘米', '毫米')}),
    (1000, {'en': ('kilometres', 'metres'), 'zh': ('公里', '米')}),
    (1000, {'en': ('kilograms', 'grams'), 'zh': ('公斤', '克')}),
    (12, {'en': ('years', 'months'), 'zh': ('年', '个月')}), (10, {'en': ('yuan', 'jiao'), 'zh': ('元', '角')}))


DATES = {   # the questions and the answer: the day in n days, how long a month is, the next month
    'en': ((('Today is {day}. Which day is it in {n} day{s}?', 'Which day comes {n} day{s} after {day}?'),
            '{n} day{s} after {day} is {result}.'),
           (('How many days does {month} have?', 'How long is {month}?'), '{month} has {result} days.'),
           (('Which month comes after {month}?', 'What follows {month}?'), 'After {month} comes {result}.')),
    'zh': ((('今天是{day}，{n}天后是星期几？', '{day}之后{n}天是星期几？'), '{day}之后{n}天是{result}。'),
           (('{month}有多少天？', '{month}有几天？'), '{month}有{result}天。'),
           (('{month}之后是几月？', '{month}的下一个月是几月？'), '{month}之后是{result}。'))}


def dates(generator: random.Random, language: str) -> Question:
    """A day of the week some days on, or the days or the successor of a month."""
    form = generator.randrange(3)
    texts, answer = DATES[language][form]
    day = generator.randrange(7)
    n = generator.randint(1, 20)
    month = generator.randrange(12)
    result = (DAYS[language][(day + n) % 7], str(DAYS_OF[month]), MONTHS[language][(month + 1) % 12])[form]
    given = {'day': DAYS[language][day], 'n': n, 's': 's' if n > 1 else '', 'month': MONTHS[language][month]}
    text = generator.choice(texts).format(**given)
    key = f'{day} + {n}' if form == 0 else text   # there are 12 months only: all of them are learned
    return Question('dates', language, text, answer.format(result=result, **given), result, key)


CONVERSIONS = {   # the questions and the answer
    'en': (('How many {small} are {count} {large}?', 'Convert {count} {large} to {small}.'),
           '{count} {large} are {result} {small}.'),
    'zh': (('{count}{large}是多少{small}？', '把{count}{large}换算成{small}。'), '{count}{large}是{result}{small}。')}


def units(generator: random.Random, language: str) -> Question:
    """So many of a unit in a smaller one."""
    factor, names = generator.choice(UNITS)
    large, small = names[language]
    count = generator.randint(2, 99 if factor in (10, 100, 1000) else 12)
    given = {'count': count, 'large': large, 'small': small}
    texts, answer = CONVERSIONS[language]
    result = str(count * factor)
    return Question('units', language, generator.choice(texts).format(**given), answer.format(result=result, **given),
                    result, f'{count} {factor} {names["en"]}')


# ---------------------------------------------------------------------------------------------------------------------
# lookups in a table that the question holds

FRUIT = {'en': 'apple pear plum peach grape lemon melon cherry mango fig kiwi banana'.split(),
         'zh': '苹果 梨 李子 桃子 葡萄 柠檬 西瓜 樱桃 芒果 橘子 草莓 香蕉'.split()}
COLORS = {'en': 'red blue green white black yellow brown grey'.split(),
          'zh': '红色 蓝色 绿色 白色 黑色 黄色 棕色 灰色'.split()}

ENTRIES = {'en': ('{} {}', ', ', '. '), 'zh': ('{}{}', '，', '。')}   # one, between two, after the last
LOOKUPS = {   # the head of the table, the answer, the question for a value, the question for a name
    'en': {'color': ('Colors: ', 'The {name} is {value}.', 'Which color is the {name}?', 'What is {value}?'),
           'price': ('Prices: ', 'The {name} costs {value}.', 'What does the {name} cost?', 'What costs {value}?')},
    'zh': {'color': ('颜色：', '{name}是{value}的。', '{name}是什么颜色？', '什么是{value}的？'),
           'price': ('价格：', '{name}卖{value}元。', '{name}多少钱？', '什么卖{value}元？')}}


def lookup(generator: random.Random, language: str, earlier: Question | None = None) -> Question:
    """One value of a small table that the question begins with; the table has numbers or colors. earlier: a lookup; the
    question is one about its table, which is not repeated."""
    entry, between, end = ENTRIES[language]
    if earlier:
        table = table_of(earlier)
        pairs = re.findall(entry.format(f'({"|".join(FRUIT[language])})', r'(\w+)'), table)
        sort = 'price' if pairs[0][1].isdigit() else 'color'
    else:
        names = generator.sample(FRUIT[language], generator.randint(3, 5))
        sort = 'color' if generator.random() < 0.4 else 'price'
        values = generator.sample(COLORS[language] if sort == 'color' else range(1, 100), len(names))
        pairs = list(zip(names, map(str, values)))
        table = LOOKUPS[language][sort][0] + between.join(entry.format(*pair) for pair in pairs) + end
    _, statement, by_name, by_value = LOOKUPS[language][sort]
    name, value = generator.choice(pairs)
    backwards = generator.random() < 0.15
    question = (by_value if backwards else by_name).format(name=name, value=value)
    return Question('lookup', language, question if earlier else table + question,
                    statement.format(name=name, value=value), name if backwards else value, table + question)


def table_of(question: Question) -> str:
    """The table that a lookup begins with, and what separates it from the question."""
    table, end, _ = question.key.partition(ENTRIES[question.language][2])
    return table + end


# ---------------------------------------------------------------------------------------------------------------------
# SQL

ZH = {'fruit': '水果', 'films': '电影', 'staff': '员工', 'books': '书', 'color': '颜色', 'price': '价格',
      'country': '国家', 'year': '年份', 'city': '城市', 'age': '年龄', 'language': '语言', 'pages': '页数'}
QUERIES = (   # the query, and what is asked in English and Chinese
    ('SELECT {title} FROM {table} WHERE {number} {sign} {value};',
     'which {table} have {number} {above} {value}?', '哪些{rows}的{what}{above}{value}？'),
    ("SELECT COUNT(*) FROM {table} WHERE {group} = '{word}';",
     'how many {table} have {group} {word}?', '{of}是{word}的{rows}有多少？'),
    ('SELECT {most}({number}) FROM {table};',
     'what is the {highest} {number} of {table}?', '{rows}的{what}{highest}是多少？'),
    ('SELECT {group}, AVG({number}) FROM {table} GROUP BY {group};',
     'what is the average {number} of {table} by {group}?', '每种{of}的{rows}平均{what}是多少？'),
    ('SELECT {title} FROM {table} ORDER BY {number}{order} LIMIT {few};',
     'show the {few} {table} with the {highest} {number}', '列出{what}{highest}的{few}个{rows}'))
MORE = {'sign': '>', 'most': 'MAX', 'order': ' DESC', 'above': ('above', '大于'), 'highest': ('highest', '最大')}
LESS = {'sign': '<', 'most': 'MIN', 'order': '', 'above': ('below', '小于'), 'highest': ('lowest', '最小')}


def sql(generator: random.Random, language: str) -> Question:
    """A question about a table, answered by a query in SQL, which is the result too."""
    query, *texts = generator.choice(QUERIES)
    table = generator.choice(list(TABLES))
    title, group, number = TABLES[table]
    given = {**generator.choice((MORE, LESS)), 'table': table, 'title': title, 'group': group, 'number': number,
             'value': generator.randint(1, 99), 'few': generator.randint(1, 9), 'word': generator.choice(WORDS[group]),
             'rows': ZH[table], 'of': ZH[group], 'what': ZH[number]}
    query = query.format(**given)
    in_language = LANGUAGES.index(language)
    given |= {name: given[name][in_language] for name in ('above', 'highest')}
    text = ('SQL: ', 'SQL：')[in_language] + texts[in_language].format(**given)
    return Question('sql', language, text, query, query, query)


# ---------------------------------------------------------------------------------------------------------------------
# small talk, and what nobody who only reads can know

TALK = {
    'en': (('Hello!', 'Hello! What can I do for you?'),
           ('Good morning.', 'Good morning! What would you like to know?'),
           ('Who are you?', 'I am a small language model, trained with flatgpt.'),
           ('What is your name?', 'I have no name. I am a small language model.'),
           ('What can you do?', 'I can add, subtract and multiply, convert units, read small tables and write SQL.'),
           ('Thank you!', 'You are welcome.'), ('Thanks', 'You are welcome.'), ('Goodbye.', 'Goodbye!'),
           ('Are you a human?', 'No, I am a program.'), ('Do you speak Chinese?', 'Yes, ask me in Chinese.')),
    'zh': (('你好！', '你好！有什么可以帮你？'),
           ('早上好。', '早上好！你想知道什么？'),
           ('你是谁？', '我是用flatgpt训练的小语言模型。'), ('你叫什么名字？', '我没有名字。我是一个小语言模型。'),
           ('你会做什么？', '我会加减乘、换算单位、查小表格、写SQL。'), ('谢谢！', '不客气。'), ('再见。', '再见！'),
           ('你是人吗？', '不是，我是一个程序。'), ('你会说英语吗？', '会，请用英语问我。'))}
SAY_AGAIN = {'en': ('Repeat this: {}', '{} Say that again.'), 'zh': ('请重复：{}', '{}请再说一遍。')}
UNKNOWN = {
    'en': (('What is the weather {} {}?', 'I do not know: I cannot see the weather.'),
           ('What did I eat {1}?', 'I do not know: you have not told me.'),
           ('Who wins the match {} {}?', 'I do not know: I cannot see the future.'),
           ('What does a house {0} cost {1}?', 'I do not know: I have no such figures.')),
    'zh': (('{1}{0}的天气怎么样？', '我不知道：我看不到天气。'), ('我{1}吃了什么？', '我不知道：你没有告诉我。'),
           ('{1}{0}的比赛谁会赢？', '我不知道：我看不到未来。'),
           ('{1}{0}的房子多少钱？', '我不知道：我没有这些数字。'))}
PLACES = {'en': ('in Oslo', 'in Lima', 'in Kyoto', 'in Paris', 'in Cairo', 'here'),
          'zh': ('北京', '上海', '广州', '巴黎', '东京', '这里')}
TIMES = {'en': ('today', 'tomorrow', 'next week', 'tonight', 'on Monday', 'this year'),
         'zh': ('今天', '明天', '下周', '今晚', '星期一', '今年')}


def talk(generator: random.Random, language: str) -> Question:
    """Small talk, whose answer is given, or a table to say again, from which a model learns to copy."""
    if generator.random() < 0.7:
        answer = table_of(lookup(generator, language)).strip()
        text = generator.choice(SAY_AGAIN[language]).format(answer)
    else:
        text, answer = generator.choice(TALK[language])
    return Question('talk', language, text, answer, answer, text)


def unknown(generator: random.Random, language: str) -> Question:
    """A question whose only right answer is that one does not know."""
    text, answer = generator.choice(UNKNOWN[language])
    text = text.format(generator.choice(PLACES[language]), generator.choice(TIMES[language]))
    return Question('unknown', language, text, answer, {'en': 'do not know', 'zh': '不知道'}[language], text)


# ---------------------------------------------------------------------------------------------------------------------
# all of them

KINDS = {'arithmetic': arithmetic, 'dates': dates, 'units': units, 'lookup': lookup, 'sql': sql, 'talk': talk,
         'unknown': unknown}
SHARES = (5, 1, 2, 9, 2, 2, 1)   # of the kinds, in conversations
NEVER_HELD_OUT = ('talk',)   # there is nothing to generalise to


def is_held_out(question: Question) -> bool:
    """Whether a question is for tests: a tenth of what can be asked, whatever the wording and the language."""
    if question.kind in NEVER_HELD_OUT:
        return False
    digest = hashlib.sha256(f'{question.kind}: {question.key}'.encode()).digest()
    return int.from_bytes(digest[:4], 'little') < 0.1 * 2**32


def questions(kind: str, language: str, seed: int, held_out: bool):
    """Endless questions of a kind and a language, all held out or none; those of small talk are never held out."""
    generator = random.Random(f'{kind} {language} {seed} {held_out}')
    while True:
        question = KINDS[kind](generator, language)
        if is_held_out(question) == held_out or kind in NEVER_HELD_OUT:
            yield question


def is_correct(question: Question, answer: str) -> bool:
    """Whether an answer to a question is right: whatever its words, what it ends with must be the result."""
    answer = answer.strip()
    if question.kind == 'sql':
        return same_rows(answer, question.result)
    if question.kind == 'unknown':
        return question.result in answer
    if question.kind == 'talk':
        return answer == question.result
    if question.result.isdigit():
        numbers = re.findall(r'\d+', answer)
        return bool(numbers) and numbers[-1] == question.result
    lists = (DAYS, MONTHS, FRUIT, COLORS)
    values = next(names[question.language] for names in lists if question.result in names[question.language])
    ends = {value: answer.rfind(value) + len(value) for value in values if value in answer}
    return bool(ends) and max(ends, key=lambda value: (ends[value], len(value))) == question.result


def conversation(generator: random.Random, next_question) -> list[dict]:
    """Messages of one to three questions in one language with their answers; a table may be asked about several times.

    next_question: a function of kind and language that gives a question.
    """
    language = generator.choice(LANGUAGES)
    messages = []
    question = None
    for _ in range(generator.randint(1, 3)):
        again = None
        if question and question.kind == 'lookup' and generator.random() < 0.7:
            again = lookup(generator, language, question)
        if again and is_held_out(again) == is_held_out(question):
            question = again
        else:
            question = next_question(generator.choices(list(KINDS), SHARES)[0], language)
        messages.append({'role': 'user', 'content': question.text})
        messages.append({'role': 'assistant', 'content': question.answer})
    return messages
