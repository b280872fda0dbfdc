"""The model card that extras.export writes: Hugging Face's metadata, then what is known.

What is not known stands there as such; figures are those of results.json. No program of its own.
"""

from evaluate import BASELINES, TASKS
from teachers import TEACHERS

TAGS = ["timm", "image-feature-extraction", "pathology", "histology", "distillation", "matryoshka"]
RECIPE = ("batch_size", "lr", "standardize", "stats_tiles", "precision", "init", "seed")
LOAD = """\
import timm
import torch
from PIL import Image

model = timm.create_model("local-dir:{name}", pretrained=True).eval()  # or "hf-hub:USER/{name}"
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
image = Image.open("tile.png").convert("RGB")
with torch.inference_mode():
    z = model(transform(image)[None])  # (1, {dim})"""


def model_card(name: str, config: dict, parameters: float, recipe: dict, results: dict) -> str:
    """The text of README.md.

    config: of student.pt, with the nested dims that are left; parameters: in millions; recipe: the
    flags of train.py, {} where they are not known; results: what results.json holds, {} for none.
    """
    parts = [
        metadata(config),
        f"# {name}",
        introduction(config, parameters),
        how_to_load(name, config),
        how_to_cut(config),
        origin(config),
        training(config, recipe),
        found(config, results),
    ]
    return "\n\n".join(parts) + "\n"


# ---- metadata ------------------------------------------------------------------------------------


def metadata(config: dict) -> str:
    """Hugging Face's header, YAML between two lines of dashes."""
    lines = ["---", "library_name: timm", "pipeline_tag: image-feature-extraction", "tags:"]
    for tag in TAGS:
        lines.append(f"- {tag}")
    if is_free(config):
        lines.append("license: apache-2.0")
    else:
        lines += ["license: other", "license_name: terms-of-its-teachers"]
        lines.append("license_link: README.md")
    repos = []
    for t in made_from(config):
        if t in TEACHERS and TEACHERS[t].repo:
            repos.append(TEACHERS[t].repo)
    if repos:
        lines.append("base_model:")
    for repo in repos:
        lines.append(f"- {repo}")
    return "\n".join([*lines, "---"])


def is_free(config: dict) -> bool:
    """Whether nothing that the student was made from binds it, as far as this repository knows."""
    licences = config.get("licences", {}).values()
    return bool(licences) and all(text.endswith("binds students: no") for text in licences)


def made_from(config: dict) -> list[str]:
    """The teachers, and what --init began from."""
    return list(dict.fromkeys([*config["teachers"], *config.get("licences", {})]))


# ---- the sections --------------------------------------------------------------------------------


def introduction(config: dict, parameters: float) -> str:
    """What it is, in a paragraph."""
    arch = config["arch"]
    size = arch["img_size"]
    dim = config["nested_dims"][-1]
    cut = ""
    if dim < arch["width"]:
        cut = f" It is cut to the first {dim} of {arch['width']} channels."
    teachers = ", ".join(config["teachers"]) or "none"
    return (
        f"A vision transformer of {parameters:.3g} M parameters: a tile of {size} x {size} px "
        f"becomes {dim} numbers. Its teachers: {teachers}. It learned to predict their outputs "
        "from its embedding, and from its first channels alone at every nested dim, after "
        f"Pathryoshka ([arXiv 2511.23204](https://arxiv.org/abs/2511.23204)).{cut}"
    )


def how_to_load(name: str, config: dict) -> str:
    """A snippet, and what tiles have to be like."""
    size = config["arch"]["img_size"]
    code = LOAD.format(name=name, dim=config["nested_dims"][-1])
    return (
        f"## Use it\n\n```python\n{code}\n```\n\n"
        "`pip install 'timm>=1.0.16' safetensors`. The transform, from config.json: shorter side "
        f"to {size} px, bicubic with antialiasing; centre crop; mean and std of ImageNet. Give "
        f"tiles of {size} px at the scale of those that it learned from: others are resized, "
        "which changes the microns that a pixel stands for. Software with a transform of its own "
        "has to resize bicubically, or the features differ."
    )


def how_to_cut(config: dict) -> str:
    """Prefixes, and what has to be done after a cut."""
    dims = ", ".join(str(m) for m in config["trained_dims"])
    width = config["arch"]["width"]
    text = (
        f"## Fewer numbers\n\nTrained at the nested dims {dims}. Keep the first m numbers, "
        "`z[:, :m]`. For cosines and distances of unit vectors normalise after the cut, not "
        "before: `torch.nn.functional.normalize(z[:, :m], dim=-1)`; a linear probe needs none of "
        "it."
    )
    if config["nested_dims"][-1] < width:
        text += (
            f" With `num_classes=0` timm returns all {width} channels, zero from the cut on: that "
            "changes no cosine and no norm."
        )
    return text


def origin(config: dict) -> str:
    """Teachers and their licences."""
    rows = [
        "| made from | its tiles: px at microns | licence; binds students? |",
        "|---|---|---|",
    ]
    licences = config.get("licences", {})
    for t in made_from(config):
        name = t
        tile = "not known"
        if t in TEACHERS:
            tile = TEACHERS[t].tile
        if t in TEACHERS and TEACHERS[t].repo:
            name = f"{t} ([{TEACHERS[t].repo}](https://huggingface.co/{TEACHERS[t].repo}))"
        rows.append(f"| {cell(name)} | {cell(tile)} | {cell(licences.get(t, 'not known'))} |")
    verdict = "At least one of these binds this student, or may: ask before you share or sell it."
    if is_free(config):
        verdict = (
            "None of these binds this student: its licence is its maker's choice, and apache-2.0 "
            "in the header is but a proposal."
        )
    note = "This is a reading of their terms, not legal advice; cite each as its card asks."
    return "\n".join(["## Teachers and licences", "", *rows, "", f"{verdict} {note}"])


def training(config: dict, recipe: dict) -> str:
    """Tiles, cache, steps and flags."""
    tiles = config.get("tiles", "not known")
    cached = "no"
    if tiles == "not known":
        cached = tiles
    elif "outputs from a cache" in tiles:
        cached = "yes: they saw one fixed view of every tile"
    facts = {
        "tiles": tiles,
        "teachers' outputs from a cache": cached,
        "steps done": f"{config['step']:,} of {config['steps']:,}",
    }
    if not recipe:
        facts["flags of train.py"] = "not known: the run's last.pt was not beside the student"
    for key in RECIPE:
        if recipe.get(key) is not None:
            facts["--" + key.replace("_", "-")] = str(recipe[key])
    rows = ["| | |", "|---|---|"]
    for key, value in facts.items():
        rows.append(f"| {key} | {cell(value)} |")
    return "\n".join(["## Training", "", *rows])


def found(config: dict, results: dict) -> str:
    """Tables of what evaluate.py found: of each task its first metric, in per cent."""
    parts = ["## What evaluate.py found"]
    if not results:
        parts.append("Nothing was measured on this student.")
    for title, result in results.items():
        for label in result["rows"][0]["scores"]:
            parts.append(score_table(config, f"{title}: {label}", label, result))
    protocols = {}
    for result in results.values():
        protocols |= result["protocol"]  # once for all tables
    for key in (*TASKS, *BASELINES, "intervals"):
        if key in protocols:
            parts.append(f"{key}: {protocols[key]}.")
    return "\n\n".join(parts)


def score_table(config: dict, title: str, label: str, result: dict) -> str:
    """One label of one result. Rows of channels that are cut off are left out."""
    first = result["rows"][0]
    width = config["arch"]["width"]
    dim = config["nested_dims"][-1]
    tasks = list(first["scores"][label])
    if dim < width and "adaptive" in tasks:
        tasks.remove("adaptive")  # it ranks by the whole embedding
    names = ["model", "channels"]
    for task in tasks:
        names.append(f"{task}, {next(iter(first['scores'][label][task]))}")
    n = first["n"]
    lines = [f"{cell(title)}; {n['train']} tiles to learn from, {n['test']} to test; per cent", ""]
    lines += [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for row in result["rows"]:
        is_student = row["model"] not in BASELINES and not row["model"].startswith("teacher ")
        if is_student and row["dim"] > dim:
            continue
        values = [cell(row["model"]), "-" if row["model"] in BASELINES else str(row["dim"])]
        for task in tasks:
            values.append(first_figure(row, label, task))
        lines.append(f"| {' | '.join(values)} |")
    return "\n".join(lines)


def first_figure(row: dict, label: str, task: str) -> str:
    """The first metric of a task in per cent, and its interval where results.json has one."""
    metric, value = next(iter(row["scores"][label][task].items()))
    text = f"{100 * value:.1f}"
    bounds = row.get("intervals", {}).get(label, {}).get(task, {}).get(metric)
    if bounds:
        text += f" ({100 * bounds[0]:.1f}-{100 * bounds[1]:.1f})"
    return text


def cell(text: str) -> str:
    """Text that may stand in a table: one line, without bars."""
    return " ".join(text.split()).replace("|", "\\|")
