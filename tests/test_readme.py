"""Every command and snippet of the README runs as it stands there, in a copy of the repo, with a tiny budget."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from xml.etree import ElementTree

import cards
import numpy as np
import pytest
import torch
from conftest import ROOT, copy_sources, oracle, randomise, write_tiles
from PIL import Image

from student import IMAGENET, STUDENTS, Student, millions
from teachers import TEACHERS
from train import DEFAULTS, parse_args

README = (ROOT / "README.md").read_text()
TINY = "--steps 4 --teacher-steps 2 --batch-size 4 --device cpu --stats-tiles 8"


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands():
    lines = [line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    return [line for line in lines if line]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The repo's files, a tree of tiles and a labelled folder under the names that the README uses."""
    folder = copy_sources(tmp_path_factory.mktemp("copy"))
    write_tiles(folder / "tiles" / "slide", 8)
    for split in ("train", "test"):
        for name in ("a", "b"):
            write_tiles(folder / "labelled" / split / name, 3)
    return folder


def run(command, folder):
    words = [sys.executable if word == "python" else word for word in shlex.split(command)]
    if words[0] == "torchrun":
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone", *words[1:]]
        words[words.index("8")] = "2"
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    return subprocess.run(
        words, cwd=folder, env=environment, capture_output=True, text=True, timeout=280, check=False
    )


def test_all_commands_in_order(copy):
    seen = []
    for command in commands():
        installs, _, script = command.rpartition("&& ")
        assert not installs or re.fullmatch(r"pip install -r requirements(-test)?\.txt ", installs)
        if script == "pytest":
            continue  # this is it
        tiny = TINY if "train.py" in script and "--resume" not in script else ""
        result = run(f"{script} {tiny}", copy)
        if (
            "--teachers uni,virchow" in script
        ):  # no weights here: one line that says how to get them
            # torchrun reports a failed process in its own words, so there the line stands among others
            lines = [
                line
                for line in result.stderr.splitlines()
                if line.startswith("train.py: no weights for uni: ")
            ]
            assert result.returncode != 0 and lines and "paige-ai/Virchow" in lines[0], (
                result.stderr
            )
        else:
            assert result.returncode == 0, f"{script}: {result.stderr}"
        if script == "python train.py":  # what the README shows of it, and no budget changes
            shown = [
                line
                for line in blocks("text")[0].splitlines()
                if re.match(r"student toy: |teacher toy_\w+: ", line)
            ]
            assert len(shown) == 3 and set(shown) <= set(result.stdout.splitlines())
        seen.append(script.split()[1])
    assert seen.count("evaluate.py") >= 2 and seen.count("train.py") >= 3
    assert (copy / "runs/demo/student.pt").exists() and (copy / "runs/demo/results.json").exists()


def inline_commands():
    """Commands within the README's sentences and tables."""
    return re.findall(r"(?<!`)`((?:python|torchrun) [^`\n]+)`(?!`)", README)


def test_inline_commands_name_what_there_is():
    """Each names a script of the repo and flags of it; those that train are read as train.py reads them."""
    seen, flags = set(), {}
    for command in (span for span in inline_commands() if re.match(r"python \S+\.py", span)):
        _, script, *words = shlex.split(command)
        assert (ROOT / script).exists(), command
        if (
            script == "train.py"
            and "..." not in command
            and "--help" not in words
            and "RUN" not in words
        ):
            parse_args(words)
        elif given := [word for word in words if word.startswith("--")]:
            if script not in flags:
                flags[script] = run(f"python {script} --help", ROOT).stdout
            assert all(flag in flags[script] for flag in given), command
        seen.add(command)
    assert len(seen) > 8 and any("virchow2,uni2_h,h_optimus_1" in command for command in seen)


def test_the_readme_is_short_and_its_links_lead_somewhere():
    assert len(README.splitlines()) <= 250
    exercises = (ROOT / "EXERCISES.md").read_text()
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README + exercises):
        assert (ROOT / target).exists(), target
    for name in set(re.findall(r"`((?:tests/)?[\w-]+\.(?:py|md|yaml|txt))`", README + exercises)):
        made = {"model_card.md", "unreadable.txt", "cuts.py"}  # by a run, or by the reader
        assert name in made or (ROOT / name).exists() or (ROOT / "tests" / name).exists(), name


def test_the_figure_shows_the_codes_own_shapes():
    """figures/method.svg is well-formed, has light and dark colours, and its numbers are those of the code."""
    root = ElementTree.parse(ROOT / "figures/method.svg").getroot()
    words = " | ".join(
        "".join(node.itertext()) for node in root.iter("{http://www.w3.org/2000/svg}text")
    )
    assert "prefers-color-scheme: dark" in (ROOT / "figures/method.svg").read_text()
    three = {"virchow2": "Virchow2", "uni2_h": "UNI2-h", "h_optimus_1": "H-optimus-1"}
    for name, label in three.items():
        assert f"{label} | {cards.COUNTS[name][1] / 1e6:.0f} M" in words
    assert "D_t = " + ", ".join(str(TEACHERS[name].arch["width"]) for name in three) in words
    vit = Student("vit_b", {}, []).backbone
    n, tokens = vit.grid**2, 1 + vit.registers + vit.grid**2
    assert f"ViT-B/14 | {millions(vit):.1f} M" in words and f"{vit.registers} registers" in words
    assert (
        f"{n} patches ({vit.grid} x {vit.grid})" in words and f"(B, {tokens}, {vit.width})" in words
    )
    assert (
        f"(B, 3, {vit.img_size}, {vit.img_size})" in words
        and f"z: (B, {vit.width}) and (B, {n}, {vit.width})" in words
    )
    dims = DEFAULTS["vit_b"]["dims"]
    assert (
        re.findall(r"z\[:(\d+)\]", words)
        == re.findall(r"h\(t, (\d+)\)", words)
        == [str(m) for m in dims]
    )


def snippet(word):
    [found] = [text for text in blocks("python") if word in text]
    return found


def python(text, folder):
    return subprocess.run(
        [sys.executable, "-c", text], cwd=folder, capture_output=True, text=True, check=False
    )


def test_the_student_from_python(copy):
    path = copy / "runs/demo/student.pt"
    if not path.exists():  # this test alone
        path.parent.mkdir(parents=True)
        config = {
            "student": "toy",
            "arch": STUDENTS["toy"],
            "nested_dims": [48],
            "step": 1,
            "steps": 1,
            "teachers": [],
        }
        torch.save(
            {"state_dict": Student("toy", {}, []).backbone.state_dict(), "config": config}, path
        )
    code = snippet("load_student")
    assert len([line for line in code.splitlines() if line]) == 4  # as it says
    result = python(
        code + "\nassert embedding.shape == (1, 16) and not embedding.requires_grad", copy
    )
    assert result.returncode == 0, result.stderr


def test_the_student_in_timm(copy):
    oracle("timm")
    path = copy / "runs/uni-virchow-vit_b/student.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    student = Student("vit_b", {}, []).eval()
    torch.save({"state_dict": student.backbone.state_dict(), "config": {}}, path)
    image = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        torch.save((image, student(image)["summary"]), copy / "expected.pt")
    check = f"""
import torch
image, expected = torch.load("expected.pt", weights_only=True)
mean, std = (torch.tensor(values).view(3, 1, 1) for values in {IMAGENET})
torch.testing.assert_close(model((image - mean) / std).detach(), expected, rtol=1e-4, atol=1e-4)
"""
    result = python(snippet("import timm") + check, copy)
    assert result.returncode == 0, result.stderr
    toys = re.search(r"with `(img_size=64, .*?)`", README)[1]
    settings = {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", toys)}
    model = oracle("timm").create_model("vit_base_patch14_reg4_dinov2", num_classes=0, **settings)
    model.load_state_dict(Student("toy", {}, []).backbone.state_dict(), strict=True)


def test_a_teacher_of_ones_own(copy):
    """Done as the README says: its entry pasted into the registry, a file under weights/, then the two commands."""
    timm = oracle("timm")
    [entry] = blocks("py")
    assert len(entry.splitlines()) == 5
    source = (copy / "teachers.py").read_text()
    assert source.count("\nTEACHERS = {\n") == 1
    (copy / "teachers.py").write_text(
        source.replace("\nTEACHERS = {\n", "\nTEACHERS = {\n" + entry)
    )
    [name] = re.findall(r"# as timm's (\S+)", entry)
    twin = randomise(timm.create_model(name))
    mean, std = (torch.tensor(twin.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    (copy / "weights").mkdir(exist_ok=True)
    torch.save(twin.state_dict(), copy / "weights" / "mine.pth")
    tile = write_tiles(copy / "own", 2, (224, 224))[0]
    result = run(f"python teachers.py mine {tile} --device cpu", copy)
    assert result.returncode == 0, result.stderr
    pixels = torch.from_numpy(np.array(Image.open(tile))).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        cls = twin.forward_features((pixels - mean) / std)[0, 0]
    norm, *first = re.search(
        r"embedding \(1, 384\), L2 norm (\S+), in .* begins (\S+) (\S+)", result.stdout
    ).groups()
    assert float(norm) == pytest.approx(cls.norm().item(), rel=1e-4)
    assert list(map(float, first)) == pytest.approx(cls[:2].tolist(), abs=1e-3)
    flags = "--student vit_s --data own --steps 1 --batch-size 2 --stats-tiles 2 --device cpu"
    result = run(f"python train.py --teachers mine {flags}", copy)
    assert result.returncode == 0 and "licence MIT; binds students: no" in result.stdout, (
        result.stderr
    )
    shutil.copy(ROOT / "teachers.py", copy)


def test_the_readmes_table_of_teachers():
    """Every published teacher stands in one row, with its parameters, access and licence."""
    rows = re.findall(r"^\| (`\w+`.*\|.*\|.*; (?:yes|no|presume).*) \|$", README, re.MULTILINE)
    seen = []
    for row in rows:
        names, parameters, access, licence = (cell.strip() for cell in row.split("|"))
        names = re.findall(r"`(\w+)`", names)
        millions = [int(number) for number in re.findall(r"\d+", parameters)]
        assert millions == [round(cards.COUNTS[name][1] / 1e6) for name in names]
        for name in names:
            spec = TEACHERS[name]
            binds = re.search(r"binds students: (no|yes|presume so)", spec.licence)[1]
            assert re.search(rf"; {binds}\b", licence), name
            assert spec.gate == access and spec.licence.startswith(licence.split(";")[0]), name
        seen += names
    assert sorted(seen) == sorted(cards.COUNTS)


def test_source_budget():
    """Six files, 1,700 lines together, none over 350."""
    lines = {path.name: len(path.read_text().splitlines()) for path in ROOT.glob("*.py")}
    assert set(lines) == {
        f"{name}.py" for name in ("teachers", "student", "losses", "data", "train", "evaluate")
    }
    assert max(lines.values()) <= 350 and sum(lines.values()) <= 1700


def test_no_unsafe_reading():
    """No pickle is ever trusted, nothing is loaded loosely, nothing is evaluated."""
    source = "".join(path.read_text() for path in ROOT.glob("*.py"))
    assert (
        len(re.findall(r"torch\.load\(", source))
        == len(re.findall(r"torch\.load\([^)]*weights_only=True", source))
        == 1
    )
    assert not re.search(r"strict=False|(?<![.\w])eval\(|(?<![.\w])exec\(|shell=True", source)


FORBIDDEN = r"""(builtins\.)?(eval|exec|compile|__import__) | os\.(system|popen|exec\w*|spawn\w*|posix_spawn\w*)
    | (subprocess|pty|commands)\.\w+ | (pickle|cPickle|_pickle|dill|cloudpickle|joblib|marshal|shelve)\.\w+
    | torch\.(hub|package|jit)\.\w+ | yaml\.(load|unsafe_load|full_load) | runpy\.\w+ | code\.\w+
    | (tarfile|zipfile|shutil)\.(unpack_archive) | .*\.(extractall|extract)"""
ALLOWED = {"pickle.UnpicklingError"}


def unsafe_calls(source):
    """What a source calls, or only names, that could run code of others: an ast walk, so that no text can hide it."""
    tree, names, found = ast.parse(source), {}, []
    for node in ast.walk(tree):  # import a.b as c; from a import b as c
        if isinstance(node, ast.Import):
            names |= {alias.asname or alias.name.split(".")[0]: alias.name if alias.asname else alias.name.split(".")[0]
                      for alias in node.names}  # fmt: skip
        if isinstance(node, ast.ImportFrom):
            names |= {
                alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names
            }

    def full(node):
        if isinstance(node, ast.Attribute):
            return f"{full(node.value)}.{node.attr}"
        return names.get(node.id, node.id) if isinstance(node, ast.Name) else "?"

    for node in ast.walk(tree):
        name = full(node) if isinstance(node, ast.Attribute | ast.Name) else ""
        if re.fullmatch(FORBIDDEN, name, re.VERBOSE) and name not in ALLOWED:
            found.append(name)
        if isinstance(node, ast.Call):
            called, given = (
                full(node.func),
                {x.arg: getattr(x.value, "value", x.value) for x in node.keywords},
            )
            if called == "torch.load" and given.get("weights_only") is not True:
                found.append("torch.load without weights_only=True")
            if (
                called in ("numpy.load", "np.load")
                and given.get("allow_pickle", False) is not False
            ):
                found.append("np.load with allow_pickle")
            found += [
                f"{called} with {key}"
                for key in ("shell", "trust_remote_code", "pickle_module")
                if key in given
            ]
            constants = [getattr(x, "value", "") for x in node.args]
            if called in ("importlib.import_module", "getattr", "__import__"):
                found += [
                    str(x)
                    for x in constants
                    if re.match(r"(os|subprocess|pickle|builtins|marshal|system)\b", str(x))
                ]
    return found


def test_no_source_calls_what_could_run_code_of_others():
    sources = {path.name: path.read_text() for path in ROOT.glob("*.py")}
    assert len(sources) == 6 and sum("torch.load(" in source for source in sources.values()) == 1
    assert {name: unsafe_calls(source) for name, source in sources.items()} == {
        name: [] for name in sources
    }


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
    ],
)
def test_that_walk_finds_each_of_them(line):
    assert unsafe_calls(line)
    assert not unsafe_calls(
        "import torch; torch.load(f, weights_only=True); x = 'eval(1)'; importlib.import_module('a')"
    )


SOURCES = {path.name: path.read_text() for path in sorted(ROOT.glob("*.py"))}
FUNCTIONS = [
    (f"{file}:{node.name}", node, source.splitlines()[node.lineno - 1])
    for file, source in SOURCES.items()
    for node in ast.walk(ast.parse(source))
    if isinstance(node, ast.FunctionDef | ast.ClassDef)
]
UNHINTED = {  # parameters without a hint; where a default shows the type, that is the hint
    "evaluate.py:adaptive_retrieval": {
        "train_x",
        "train_y",
        "test_x",
        "test_y",
    },  # as all tasks have them, on one line
    "losses.py:measure": {"batches"},  # any iterable, told in its docstring
    "teachers.py:run_main": {"main"},  # the function to run, told in the comment beside it
    "train.py:fill": {"teach"},  # a function, told in the comment beside it
}


def test_no_function_is_longer_than_a_screen():
    long = {
        name
        for name, node, _ in FUNCTIONS
        if node.end_lineno - node.lineno >= 60 and node.__class__ != ast.ClassDef
    }
    assert long == {"train.py:train"}  # the loop, told from top to bottom


def test_every_function_says_what_it_takes_and_gives():
    """A docstring, or for a short helper a comment on its def line; a forward is told by its class's docstring."""
    bad = []
    for name, node, line in FUNCTIONS:
        if not ast.get_docstring(node) and not re.search(r":  # \S", line):
            bad += [f"{name} has no docstring"] if node.name not in ("__init__", "__len__", "__getitem__", "forward",
                                                                    "objective") else []  # fmt: skip
        if isinstance(node, ast.ClassDef):
            continue
        given = [x for x in node.args.args + node.args.kwonlyargs if x.arg not in ("self", "cls")]
        with_default = {
            x.arg for x in node.args.args[len(node.args.args) - len(node.args.defaults) :]
        } - {
            x.arg
            for x, value in zip(reversed(node.args.args), reversed(node.args.defaults))
            if getattr(value, "value", 0) is None
        }
        bare = {x.arg for x in given if x.annotation is None} - with_default
        if bare != UNHINTED.get(name, set()) or (node.returns is None and node.name != "__init__"):
            bad.append(f"{name} has no hints for {bare or 'what it returns'}")
    assert not bad, bad


def test_nothing_stands_twice():
    """No six lines in a row, imports and blank lines left out."""
    seen, twice = {}, []
    for file, source in SOURCES.items():
        lines = [
            x.strip()
            for x in source.splitlines()
            if x.strip() and not re.match(r"\s*(import|from) ", x)
        ]
        for i in range(len(lines) - 5):
            six = "\n".join(lines[i : i + 6])
            twice += [f"{seen[six]} and {file}: {six}"] if six in seen else []
            seen[six] = file
    assert not twice, twice
