"""Every command and snippet of the README runs as it stands there, in a copy of the repo, with a
tiny budget."""

import re
import shlex
from xml.etree import ElementTree

import cards
import numpy as np
import pytest
import torch
from conftest import ROOT, copy_sources, oracle, randomise, write_tiles
from forks import python as fork
from PIL import Image

import teachers
from student import STUDENTS, Student, millions
from teachers import TEACHERS
from train import DEFAULTS, parse_args

README = (ROOT / "README.md").read_text()
DEEPER = (ROOT / "extras" / "README.md").read_text()
TINY = "--steps 4 --teacher-steps 2 --batch-size 4 --device cpu --stats-tiles 8"


def blocks(language, text=README):
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands():
    typed = "".join(blocks("bash")).replace("\\\n", " ")  # a command may go on in the next line
    lines = [line.split("#")[0].strip() for line in typed.splitlines()]
    return [line for line in lines if line]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The repo's files; a tree of tiles and a labelled folder, named as the README names them."""
    folder = copy_sources(tmp_path_factory.mktemp("copy"))
    write_tiles(folder / "tiles" / "slide", 8)
    for split in ("train", "test"):
        for name in ("a", "b"):
            write_tiles(folder / "labelled" / split / name, 3)
    return folder


def form(line):
    """A line of the table without its figures, dims apart."""
    return re.sub(r"\d+\.\d+", "0", " ".join(line.split()))


def test_all_commands_in_order(copy):
    seen = []
    for command in commands():
        installs, _, script = command.rpartition("&& ")
        assert not installs or re.fullmatch(r"pip install -r requirements(-test)?\.txt ", installs)
        if script == "pytest":
            continue  # this is it
        seen.append(script.split()[1])
        if script.startswith("torchrun"):  # test_stops.py has a real one
            parse_args(shlex.split(script.partition("train.py")[2]))
            continue
        trains = "train.py" in script or "extras.cache" in script
        tiny = TINY if trains and "--resume" not in script else ""
        child = fork(copy, *shlex.split(f"{script} {tiny}")[1:])
        code, out, err = child.code, child.out, child.err
        published = re.search(r"--teachers (\S+)", script)
        if published:  # no weights here: lines say how to get them
            names = published[1].split(",")
            assert code == 2 and f"no weights for {names[0]}: " in err.splitlines()[0], err
            assert all(TEACHERS[name].repo in err for name in names)
            gated = any(TEACHERS[name].gate == "gated" for name in names)
            assert err.count("\n") == len(names) + gated, err
        else:
            assert code == 0, f"{script}: {err}"
        if script == "python train.py":  # what the README shows of it, and no budget changes
            shown = []
            for line in blocks("text")[0].splitlines():
                if re.match(r"student toy: |teacher toy_\w+: ", line):
                    shown.append(line)
            assert len(shown) == 1 and set(shown) <= set(out.splitlines())
            rows = [line for line in blocks("text")[0].splitlines() if " less " not in line][2:]
            assert len(rows) == 3  # of the table: in the form of today's, with other figures
            assert {form(row) for row in rows} <= {form(line) for line in out.splitlines()}
            [difference] = re.findall(r"^.* less .*?:", blocks("text")[0], re.MULTILINE)
            assert any(line.startswith(difference) for line in out.splitlines())
    assert seen.count("evaluate.py") >= 2 and seen.count("train.py") >= 3
    assert (copy / "runs/demo/student.pt").exists() and (copy / "runs/demo/results.json").exists()


def inline_commands():
    """Commands within sentences and tables, of the README and of that of extras/."""
    text = README + DEEPER
    return re.findall(r"(?<!`)`((?:python|torchrun) [^`\n]+)`(?!`)", text)


def test_inline_commands_name_what_there_is():
    """Each names a script of the repo and flags of it; those that train are read as train.py reads
    them."""
    seen, flags = set(), {}
    for command in inline_commands():
        _, script, *words = shlex.split(command)
        if script == "-m":
            assert (ROOT / (words[0].replace(".", "/") + ".py")).exists(), command
            seen.add(command)
            continue
        if not script.endswith(".py"):
            continue
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
                flags[script] = fork(ROOT, script, "--help").out
            assert all(flag in flags[script] for flag in given), command
        seen.add(command)
    assert len(seen) > 8 and any("virchow2,uni2_h,h_optimus_1" in command for command in seen)


def test_links_lead_somewhere():
    exercises = (ROOT / "EXERCISES.md").read_text()
    exercises = re.sub(r"```.*?```", "", exercises, flags=re.DOTALL)
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README + exercises):
        assert (ROOT / target).exists(), target
    for name in set(re.findall(r"`((?:[\w-]+/)*[\w-]+\.(?:py|md|yaml|txt))`", README + exercises)):
        made = {"cuts.py"}  # by the reader
        assert name in made or (ROOT / name).exists() or (ROOT / "tests" / name).exists(), name


def test_the_figure_shows_the_codes_own_shapes():
    """figures/method.svg is well-formed, has light and dark colours, and its numbers are those of
    the code."""
    root = ElementTree.parse(ROOT / "figures/method.svg").getroot()
    words = " | ".join(
        "".join(node.itertext()) for node in root.iter("{http://www.w3.org/2000/svg}text")
    )
    assert "prefers-color-scheme: dark" in (ROOT / "figures/method.svg").read_text()
    three = {"virchow2": "Virchow2", "uni2_h": "UNI2-h", "h_optimus_1": "H-optimus-1"}
    for name, label in three.items():
        assert f"{label} | {cards.COUNTS[name][1] / 1e6:.0f} M" in words
    assert "D_t = " + ", ".join(str(TEACHERS[name].arch["width"]) for name in three) in words
    vit = Student("vit_b").backbone
    registers = vit.extra_tokens - 1
    n, tokens = vit.grid**2, 1 + registers + vit.grid**2
    assert f"ViT-B/14 | {millions(vit):.1f} M" in words and f"{registers} registers" in words
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


def snippet(word, text=README):
    [found] = [code for code in blocks("python", text) if word in code]
    return found


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
        torch.save({"state_dict": Student("toy").backbone.state_dict(), "config": config}, path)
    code = snippet("load_student", DEEPER)
    assert len([line for line in code.splitlines() if line]) == 4  # as it says
    check = "\nassert embedding.shape == (1, 16) and not embedding.requires_grad"
    child = fork(copy, "-c", code + check)
    assert child.code == 0, child.err


def test_the_student_in_timm(copy):
    oracle("timm")
    run = copy / "runs/in-timm"
    run.mkdir(parents=True)
    student = randomise(Student("toy"))
    config = {"student": "toy", "arch": STUDENTS["toy"], "nested_dims": [48], "teachers": []}
    config |= {"step": 1, "steps": 1}
    torch.save({"state_dict": student.backbone.state_dict(), "config": config}, run / "student.pt")
    [command] = [line for line in commands() if "extras.export" in line]
    words = shlex.split(command)
    (copy / "timm").mkdir()
    child = fork(copy / "timm", *words[1:3], run, *words[4:])
    assert child.code == 0, child.err
    tile = write_tiles(copy / "timm", 1, (64, 64))[0].rename(copy / "timm" / "tile.png")
    pixels = torch.from_numpy(np.array(Image.open(tile))).permute(2, 0, 1)
    with torch.no_grad():
        torch.save(student(pixels[None])["summary"][:, :16], copy / "timm" / "expected.pt")
    check = """
import torch
expected = torch.load("expected.pt", weights_only=True)
assert (embedding.detach() - expected).abs().max() <= 1e-6
"""
    child = fork(copy / "timm", "-c", snippet("import timm") + check)
    assert child.code == 0, child.err


def test_a_teacher_of_ones_own(copy):
    """Done as the README says: its entry pasted into the registry, a file under weights/, then the
    two commands."""
    timm = oracle("timm")
    [entry] = blocks("py")
    assert len(entry.splitlines()) == 6

    def register():
        exec(f"TEACHERS.update({{{entry}}})", vars(teachers))

    [name] = re.findall(r"# as timm's (\S+)", entry)
    twin = randomise(timm.create_model(name))
    mean, std = (torch.tensor(twin.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    (copy / "weights").mkdir(exist_ok=True)
    torch.save(twin.state_dict(), copy / "weights" / "mine.pth")
    tile = write_tiles(copy / "own", 2, (224, 224))[0]
    child = fork(copy, "teachers.py", "mine", tile, "--device", "cpu", patch=register)
    assert child.code == 0, child.err
    pixels = torch.from_numpy(np.array(Image.open(tile))).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        cls = twin.forward_features((pixels - mean) / std)[0, 0]
    [norm] = re.search(r"embedding \(1, 384\), L2 norm (\S+), in ", child.out).groups()
    first = re.search(r"it begins (\S+) (\S+)", child.out).groups()
    assert float(norm) == pytest.approx(cls.norm().item(), rel=1e-4)
    assert list(map(float, first)) == pytest.approx(cls[:2].tolist(), abs=1e-3)
    flags = "--student vit_s --data own --steps 1 --batch-size 2 --stats-tiles 2 --device cpu"
    words = ["train.py", "--teachers", "mine", *flags.split()]
    child = fork(copy, *words, patch=register)
    assert child.code == 0, child.err
    assert "licence MIT; binds students: no" in child.out


def test_the_readme_can_be_read_in_a_terminal():
    lines = README.splitlines()
    assert max(map(len, lines)) <= 110


def test_the_table_of_teachers():
    """Every published teacher stands in one row, with its parameters, access and licence."""
    rows = re.findall(r"^\| (`\w+`.*\|.*\|.*; (?:yes|no|presume).*) \|$", DEEPER, re.MULTILINE)
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
