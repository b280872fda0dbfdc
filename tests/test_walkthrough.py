"""extras/walkthrough.ipynb: runs as a reader runs it, with a tiny budget; and keeps to its rules.

To run it whole and keep its outputs, in the repository's folder:

    pip install nbconvert ipykernel matplotlib timm safetensors
    jupyter nbconvert --to notebook --execute --ExecutePreprocessor.record_timing=False \\
        --inplace extras/walkthrough.ipynb
"""

import ast
import json
import re

import pytest
from conftest import ROOT, copy_sources, oracle

FILE = ROOT / "extras" / "walkthrough.ipynb"
SIX = ["losses", "student", "teachers", "data", "train", "evaluate"]
NOTEBOOK = json.loads(FILE.read_text())
CELLS = NOTEBOOK["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]
PICTURES = 8  # in all


def source_of(cell):
    return "".join(cell["source"])


def texts_of(cell):
    """What its outputs say, pictures apart."""
    texts = []
    for output in cell["outputs"]:
        texts.append("".join(output.get("text", [])))
        texts.append("".join(output.get("data", {}).get("text/plain", [])))
    return "\n".join(texts)


def pictures_of(cells):
    found = []
    for cell in cells:
        for output in cell["outputs"]:
            if "image/png" in output.get("data", {}):
                found.append(output["data"]["image/png"])
    return found


def defined_names(source):
    """What a source gives a name to, outside functions and classes; not what it imports."""
    names = set()
    waiting = [ast.parse(source)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
            continue
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        waiting += ast.iter_child_nodes(node)
    return names


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The notebook's cells after a run from nothing, in a copy of the sources, with 4 steps."""
    nbformat = oracle("nbformat")
    nbclient = oracle("nbclient")
    for name in ("ipykernel", "matplotlib", "timm", "safetensors"):
        oracle(name)
    folder = copy_sources(tmp_path_factory.mktemp("walkthrough"))
    notebook = nbformat.read(FILE, as_version=4)
    nbformat.validate(notebook)
    where = {"metadata": {"path": str(folder / "extras")}}  # as Jupyter opens it
    client = nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=where)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATHRYOSHKA_STEPS", "4")
        patch.setenv("OMP_NUM_THREADS", "1")
        client.execute()  # an error in a cell is an error here
    return folder, [cell for cell in notebook.cells if cell.cell_type == "code"]


# ---- it runs -------------------------------------------------------------------------------------


def test_it_runs_from_nothing_and_draws_what_the_file_keeps(executed):
    _, cells = executed
    for ours, kept in zip(cells, CODE, strict=True):
        assert len(pictures_of([ours])) == len(pictures_of([kept])), source_of(kept)


def test_its_plain_sum_is_the_loss(executed):
    _, cells = executed
    for told in ("\n".join(map(texts_of, cells)), "\n".join(map(texts_of, CODE))):
        [(plain, nested)] = re.findall(r"the sum: ([\d.]+)   nested_loss: ([\d.]+)", told)
        assert float(plain) == pytest.approx(float(nested), abs=2e-4)
        assert 15 < float(nested) < 25  # of heads that have learned nothing


def test_one_step_lowers_the_loss(executed):
    _, cells = executed
    for told in ("\n".join(map(texts_of, cells)), "\n".join(map(texts_of, CODE))):
        [(before, after)] = re.findall(r"loss ([\d.]+), and after one step ([\d.]+)", told)
        assert float(after) < float(before)


def test_timm_says_what_we_say(executed):
    _, cells = executed
    for told in (texts_of(cells[-1]), texts_of(CODE[-1])):
        rows = dict(re.findall(r"(timm|ours) \[(.*)\]", told))
        timm, ours = (list(map(float, rows[name].split(","))) for name in ("timm", "ours"))
        assert len(timm) == 8 and timm == pytest.approx(ours, abs=1.1e-4)  # it prints four digits


def test_a_second_run_trains_nothing(executed):
    """Both students and both teachers lie where a second run looks for them."""
    folder, _ = executed
    for name in ("nested", "flat"):
        assert (folder / f"runs/walkthrough-4-{name}/student.pt").exists()
    assert len(list((folder / "weights").glob("toy_*-4-0.pt"))) == 2


# ---- its rules -----------------------------------------------------------------------------------


def test_it_is_short():
    assert len(CELLS) <= 25
    for cell in CELLS:
        lines = source_of(cell).splitlines()
        assert len(lines) <= 12, source_of(cell)
        assert max(map(len, lines)) <= 100, source_of(cell)


def test_every_idea_has_its_words_before_its_code():
    kinds = [cell["cell_type"] for cell in CELLS]
    assert kinds[:3] == ["markdown", "code", "markdown"]
    assert "code code code" not in " ".join(kinds)
    for word in ("Colab", "git clone", "pip install", "PATHRYOSHKA_STEPS"):
        assert word in source_of(CELLS[0])


def test_its_outputs_are_kept_and_none_is_an_error():
    for number, cell in enumerate(CODE, 1):
        assert cell["execution_count"] == number, "run it whole, from a fresh kernel"
        for output in cell["outputs"]:
            assert output["output_type"] != "error"
            assert output.get("name") != "stderr", output
    for cell in CODE[1:]:  # the first sets the scene
        assert cell["outputs"], source_of(cell)
    assert len(pictures_of(CODE)) == PICTURES
    assert FILE.stat().st_size < 1_500_000


def test_it_tells_nothing_of_the_machine_that_ran_it():
    text = json.dumps(NOTEBOOK["metadata"])
    for cell in CODE:
        text += source_of(cell) + texts_of(cell)
    for word in (str(ROOT), "/work", "/home", "/root", "/tmp", "/Users"):
        assert word not in text, word
    for cell in CELLS:  # no times, no settings of somebody's editor
        assert cell["metadata"] == {}


def test_it_defines_nothing_that_the_six_define():
    ours = set()
    for name in SIX:
        for node in ast.parse((ROOT / f"{name}.py").read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                ours.add(node.name)
            elif isinstance(node, ast.Assign):
                ours |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    assert {"nested_loss", "Student", "CLIP"} <= ours
    for cell in CODE:
        assert not defined_names(source_of(cell)) & ours


def test_that_walk_sees_every_way_to_define_a_name():
    found = defined_names("def a(): x = 1\nclass b: pass\nfor c, d in e: pass\nwith f as g: h = i")
    assert found == {"a", "b", "c", "d", "g", "h"}


def test_it_imports_all_six():
    imported = set()
    for cell in CODE:
        imported |= set(re.findall(r"^(?:from|import) (\w+)", source_of(cell), re.MULTILINE))
    assert set(SIX) <= imported
