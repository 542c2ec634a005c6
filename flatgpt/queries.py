"""
Queries in SQL that a model writes: run on a small database, within limits, and compared by the rows that they give.
"""

import random
import sqlite3
import time

TABLES = {'fruit': ('name', 'color', 'price'), 'films': ('title', 'country', 'year'), 'staff': ('name', 'city', 'age'),
          'books': ('title', 'language', 'pages')}   # a text that names a row, a text that groups rows, a number
WORDS = {'color': ('red', 'green', 'blue', 'yellow'), 'country': ('China', 'Peru', 'Norway', 'Egypt'),
         'city': ('Oslo', 'Lima', 'Kyoto', 'Cairo'), 'language': ('Chinese', 'English', 'Spanish', 'Arabic')}


def database(seed: int = 0) -> sqlite3.Connection:
    """A small database in memory with the tables of the questions, 40 rows each."""
    connection = sqlite3.connect(':memory:')
    generator = random.Random(seed)
    for table, (title, group, number) in TABLES.items():
        connection.execute(f'CREATE TABLE {table} ({title} TEXT, {group} TEXT, {number} INTEGER)')
        rows = [(f'{table} {i}', generator.choice(WORDS[group]), generator.randint(1, 99)) for i in range(40)]
        connection.executemany(f'INSERT INTO {table} VALUES (?, ?, ?)', rows)
    return connection


READS = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION}   # what a query may do
READS_FUNCTIONS = {'count', 'sum', 'avg', 'min', 'max', 'total', 'abs', 'round', 'length', 'lower', 'upper', 'substr',
                   'coalesce', 'ifnull', 'like'}


def run_sql(query: str, seconds: float = 1.0, max_rows: int = 1000) -> list[tuple] | None:
    """The rows that a query gives, or None if it is not one that reads, fails, or takes too long.

    The query may come from a model: it can only read the tables, within the limits of time and rows.
    """
    connection = database()
    end = time.monotonic() + seconds

    def authorize(action, first, second, *_):
        allowed = action in READS and (action != sqlite3.SQLITE_FUNCTION or second in READS_FUNCTIONS)
        return sqlite3.SQLITE_OK if allowed else sqlite3.SQLITE_DENY

    connection.set_authorizer(authorize)
    connection.set_progress_handler(lambda: time.monotonic() > end, 1000)
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 100_000)
    try:
        rows = connection.execute(query).fetchmany(max_rows + 1)
    except (sqlite3.Error, sqlite3.Warning, ValueError, UnicodeError, OverflowError):
        return None
    finally:
        connection.close()
    return rows if len(rows) <= max_rows else None


def same_rows(given: str, expected: str) -> bool:
    """Whether two queries give the same rows; in the same order if the expected one asks for an order."""
    found = run_sql(given)
    wanted = run_sql(expected)
    if found is None or wanted is None:
        return False
    if 'ORDER BY' in expected.upper():
        return found == wanted
    return sorted(found, key=repr) == sorted(wanted, key=repr)
