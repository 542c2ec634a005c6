"""The notebooks: they run from top to bottom, and what is committed is what a whole run gave."""

import re

import nbformat
import pytest
from conftest import ROOT
from notebooks import NOTEBOOKS, execute


def code_cells(name):
    return [cell for cell in nbformat.read(ROOT / name, as_version=4).cells if cell.cell_type == 'code']


def outputs_of(cells):
    return [output for cell in cells for output in cell.outputs]


@pytest.mark.full
@pytest.mark.parametrize('name', NOTEBOOKS)
def test_a_notebook_runs_from_top_to_bottom(name, tmp_path, monkeypatch):
    monkeypatch.setenv('FLATGPT_FAST', '1')
    for folder in ('IPYTHONDIR', 'JUPYTER_RUNTIME_DIR', 'JUPYTER_CONFIG_DIR'):   # nothing of this machine's user
        monkeypatch.setenv(folder, str(tmp_path / folder))
    notebook = execute(ROOT / name, seconds=120)
    cells = [cell for cell in notebook.cells if cell.cell_type == 'code']
    assert cells and not [cell.source for cell in cells if cell.execution_count is None]
    assert not [output.text for output in outputs_of(cells) if output.get('name') == 'stderr']   # warnings


@pytest.mark.parametrize('name', NOTEBOOKS)
def test_a_notebook_is_committed_as_one_run_left_it(name):
    cells = code_cells(name)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    kinds = [output.output_type for output in outputs_of(cells)]
    assert 'error' not in kinds and {'display_data', 'stream'} & set(kinds)
    assert not [output.text for output in outputs_of(cells) if output.get('name') == 'stderr']


@pytest.mark.parametrize('name', NOTEBOOKS)
def test_a_notebook_is_small_and_names_no_folder_of_the_machine_that_ran_it(name):
    text = (ROOT / name).read_text(encoding='utf-8')
    assert len(text) < 1_000_000
    assert not re.findall(r'/(?:home|root|tmp|work|Users|usr)/[^"\\ ]*|[A-Z]:\\\\\w+', text)


@pytest.mark.parametrize('name', NOTEBOOKS)
def test_every_figure_of_a_notebook_has_something_to_say_before_it(name):
    cells = nbformat.read(ROOT / name, as_version=4).cells
    assert cells[0].cell_type == 'markdown' and cells[0].source.startswith('# ')
    for before, cell in zip(cells, cells[1:]):
        if cell.cell_type == 'code' and any('image/png' in output.get('data', {}) for output in cell.outputs):
            assert before.cell_type == 'markdown'


@pytest.mark.full
def test_an_error_in_a_cell_stops_the_run_and_is_shown(tmp_path):
    from nbclient.exceptions import CellExecutionError

    cells = [nbformat.v4.new_code_cell(source) for source in ('print(1)', '1 / 0')]
    notebook = nbformat.v4.new_notebook(cells=cells)
    nbformat.write(notebook, tmp_path / 'wrong.ipynb')
    with pytest.raises(CellExecutionError, match='ZeroDivisionError'):
        execute(tmp_path / 'wrong.ipynb', seconds=60)
