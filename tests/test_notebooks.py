"""The notebooks run from top to bottom."""

import nbformat
import pytest
from conftest import ROOT
from notebooks import NOTEBOOKS, execute


@pytest.mark.full
@pytest.mark.parametrize('name', NOTEBOOKS)
def test_a_notebook_runs_from_top_to_bottom(name, tmp_path, monkeypatch):
    monkeypatch.setenv('FLATGPT_FAST', '1')
    for folder in ('IPYTHONDIR', 'JUPYTER_RUNTIME_DIR', 'JUPYTER_CONFIG_DIR'):   # nothing of this machine's user
        monkeypatch.setenv(folder, str(tmp_path / folder))
    notebook = execute(ROOT / name, seconds=120)
    cells = [cell for cell in notebook.cells if cell.cell_type == 'code']
    assert cells and not [cell.source for cell in cells if cell.execution_count is None]
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output.text for output in outputs if output.get('name') == 'stderr']   # warnings


@pytest.mark.full
def test_an_error_in_a_cell_stops_the_run_and_is_shown(tmp_path):
    from nbclient.exceptions import CellExecutionError

    cells = [nbformat.v4.new_code_cell(source) for source in ('print(1)', '1 / 0')]
    notebook = nbformat.v4.new_notebook(cells=cells)
    nbformat.write(notebook, tmp_path / 'wrong.ipynb')
    with pytest.raises(CellExecutionError, match='ZeroDivisionError'):
        execute(tmp_path / 'wrong.ipynb', seconds=60)
