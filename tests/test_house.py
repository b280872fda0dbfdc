"""The house of the design: who imports whom, where programs stand, what is never called.

Nothing here counts lines or asks which files stand beside the six.
"""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

MAY_IMPORT = {
    "student": set(),
    "losses": {"student"},
    "data": {"student"},
    "teachers": {"student", "data"},
    "evaluate": {"student", "losses", "data", "teachers"},
    "train": {"student", "losses", "data", "teachers", "evaluate"},
}
SCRIPTS = ["teachers.py", "train.py", "evaluate.py"]
EXTRAS = sorted((ROOT / "extras").rglob("*.py"))
OPTIONAL = ["timm", "transformers", "safetensors", "sklearn", "matplotlib", "huggingface_hub"]
OPTIONAL += ["openslide", "tifffile", "eva"]


def is_program(path):
    """Whether a file begins to work when it is run."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.If) and "__name__" in ast.unparse(node.test):
            return True
    return False


def module_name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


PROGRAMS = [module_name(path) for path in EXTRAS if is_program(path)]


# ---- who imports whom ----------------------------------------------------------------------------


def imported_modules(source):
    """The first names of all modules that a source imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found.add(alias.name.split(".")[0])
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative"
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_each_of_the_six_imports_only_those_before_it_and_nothing_of_extras(name):
    found = imported_modules((ROOT / f"{name}.py").read_text())
    assert found & MAY_IMPORT.keys() <= MAY_IMPORT[name]
    assert "extras" not in found


def test_the_walk_sees_imports_everywhere():
    source = "import a.b as c\ndef f():\n    from d.e import g\nif x:\n    import train"
    assert imported_modules(source) == {"a", "d", "train"}


def test_no_extra_imports_a_test():
    tests = {path.stem for path in (ROOT / "tests").glob("*.py")} | {"tests", "conftest"}
    for path in EXTRAS:
        assert not imported_modules(path.read_text()) & tests, path


# ---- programs ------------------------------------------------------------------------------------


def test_the_first_line_need_not_wait_for_torchvision():
    """It takes as long to import as torch does, and only what resizes a file needs it."""
    command = "import sys, train; print('torch' in sys.modules, 'torchvision' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert ran.stdout == "True False\n", ran.stderr


def test_no_file_in_tests_is_a_program():
    for path in (ROOT / "tests").glob("*.py"):
        assert not is_program(path), path


HELP = """
import contextlib, io, runpy, sys
for name in {optional!r}:
    sys.modules[name] = None  # importing it is an ImportError
for name in {programs!r}:
    sys.argv = [name, "--help"]
    said = io.StringIO()
    code = None
    with contextlib.redirect_stdout(said):
        try:
            if name.endswith(".py"):
                runpy.run_path(name, run_name="__main__")
            else:
                runpy.run_module(name, run_name="__main__")
        except SystemExit as stop:
            code = stop.code
    assert code == 0, (name, code)
    command = "python " + name if name.endswith(".py") else "python -m " + name
    assert command in said.getvalue(), (command, said.getvalue())
    print(name)
"""


def test_every_program_has_a_help_that_shows_its_command_without_optional_packages():
    programs = SCRIPTS + PROGRAMS
    code = HELP.format(optional=OPTIONAL, programs=programs)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.split() == programs


def test_the_table_of_extras_names_every_program_and_no_other():
    table = (ROOT / "extras" / "README.md").read_text()
    named = set(re.findall(r"python -m (extras[\w.]*)", table))
    assert named == set(PROGRAMS)


# ---- what is never called ------------------------------------------------------------------------

FORBIDDEN = r"""(builtins\.)?(eval|exec|compile|__import__) | os\.(system|popen|exec\w*|spawn\w*)
    | os\.posix_spawn\w* | (subprocess|pty|commands)\.\w+ | torch\.(hub|package|jit)\.\w+
    | (pickle|cPickle|_pickle|dill|cloudpickle|joblib|marshal|shelve)\.\w+ | runpy\.\w+ | code\.\w+
    | yaml\.(load|unsafe_load|full_load) | (tarfile|zipfile|shutil)\.(unpack_archive)
    | .*\.(extractall|extract)"""
ALLOWED = {"pickle.UnpicklingError"}
PROCESSES = {"subprocess." + name for name in ("run", "Popen", "TimeoutExpired")}
WORDS = r"(os|subprocess|pickle|builtins|marshal|system)\b"
DANGEROUS_FLAGS = ("shell", "trust_remote_code", "pickle_module")


def names_of_imports(tree):
    """{name in the source: what it stands for}: import a.b as c; from a import b as c."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.asname:
                    names[alias.asname] = alias.name
                else:
                    first = alias.name.split(".")[0]
                    names[first] = first
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return names


def full_name(node, names):
    if isinstance(node, ast.Attribute):
        return f"{full_name(node.value, names)}.{node.attr}"
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    return "?"


def unsafe_arguments(node, called):
    """What a call is given that lets it run code of others, or take weights loosely."""
    given = {}
    for keyword in node.keywords:
        given[keyword.arg] = getattr(keyword.value, "value", keyword.value)
    found = []
    if called == "torch.load" and given.get("weights_only") is not True:
        found.append("torch.load without weights_only=True")
    if called in ("numpy.load", "np.load") and given.get("allow_pickle", False) is not False:
        found.append("np.load with allow_pickle")
    if called.endswith("load_state_dict") and given.get("strict", True) is not True:
        found.append("load_state_dict that is not strict")
    for key in DANGEROUS_FLAGS:
        if key in given:
            found.append(f"{called} with {key}")
    if called in ("importlib.import_module", "getattr", "__import__"):
        for argument in node.args:
            text = str(getattr(argument, "value", ""))
            if re.match(WORDS, text):
                found.append(text)
    return found


def unsafe_calls(source, allowed=ALLOWED):
    """What a source calls, or only names, that could run code of others.

    A walk over its syntax tree, so that no text can hide it.
    """
    tree = ast.parse(source)
    names = names_of_imports(tree)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name):
            name = full_name(node, names)
            if re.fullmatch(FORBIDDEN, name, re.VERBOSE) and name not in allowed:
                found.append(name)
        if isinstance(node, ast.Call):
            found += unsafe_arguments(node, full_name(node.func, names))
    return found


def test_none_of_the_six_calls_what_could_run_code_of_others():
    for name in MAY_IMPORT:
        assert unsafe_calls((ROOT / f"{name}.py").read_text()) == [], name


@pytest.mark.parametrize("path", EXTRAS, ids=module_name)
def test_no_extra_does_either_but_benchmarks_start_processes(path):
    allowed = ALLOWED
    if path.parent.name == "benchmarks":
        allowed = ALLOWED | PROCESSES
    assert unsafe_calls(path.read_text(), allowed) == []


@pytest.mark.parametrize(
    "line",
    [
        "eval('1')",
        "e = exec",
        "compile('1', '', 'eval')",
        "import os as o; o.system('x')",
        "from os import system as s; s('x')",
        "import os; os.popen('x')",
        "import os; os.execv('x', [])",
        "import subprocess; subprocess.run(['x'])",
        "from subprocess import Popen; Popen('x')",
        "f(shell=True)",
        "import pickle; pickle.load(f)",
        "from pickle import loads; loads(f)",
        "import pickle as p; p.Unpickler(f).load()",
        "import marshal; marshal.loads(f)",
        "import joblib; joblib.load(f)",
        "import numpy as np; np.load(f, allow_pickle=True)",
        "import torch; torch.load(f)",
        "import torch; torch.load(f, weights_only=False)",
        "import torch as t; t.load(f, weights_only=x)",
        "from torch import load; load(f)",
        "import torch; torch.hub.load('x', 'y')",
        "import tarfile; tarfile.open(f).extractall()",
        "import importlib; importlib.import_module('subprocess')",
        "__import__('os')",
        "model.load_state_dict(state, strict=False)",
    ],
)
def test_that_walk_finds_each_of_them(line):
    assert unsafe_calls(line)


def test_that_walk_finds_nothing_else():
    safe = "import torch; torch.load(f, weights_only=True); x = 'eval(1)'; import importlib"
    assert not unsafe_calls(safe + "; importlib.import_module('a'); zip(a, b, strict=False)")


def test_the_files_that_are_looked_at_are_there():
    assert Path(ROOT, "extras", "benchmarks", "miniature.py") in EXTRAS
    assert "extras.benchmarks.miniature" in PROGRAMS and "extras.benchmarks.timing" not in PROGRAMS
