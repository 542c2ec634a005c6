"""
Run notebooks from top to bottom, and keep in them what they print and draw.

    make notebooks
    python -m tests.notebooks transformer_sizing.ipynb

With FLATGPT_FAST=1 in the environment they do the same with smaller models, for the tests.
"""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ['scaling_laws.ipynb', 'transformer_sizing.ipynb']


def execute(path, seconds=3600):
    """The notebook in a file, run in a kernel of its own with the project as its folder. nbclient's CellExecutionError
    says which cell failed and why; no cell may take longer than so many seconds."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=seconds, kernel_name='python3', record_timing=False, coalesce_streams=True,
                   extra_arguments=['--log-level=ERROR'], resources={'metadata': {'path': str(ROOT)}}).execute()
    notebook.metadata['language_info'].pop('version')   # which would differ from one machine to the next
    return notebook


if __name__ == '__main__':
    for name in sys.argv[1:] or [ROOT / name for name in NOTEBOOKS]:
        print(f'{name} ...', file=sys.stderr, flush=True)
        nbformat.write(execute(name), name)
