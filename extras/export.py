"""Cut a student: the first M channels of its embedding as a student of its own.

    python -m extras.export runs/demo --dim 16 student-16.pt

The file is a student.pt as train.py writes it, with the last norm's weight and bias zero from
channel M on: the ViT then gives zeros there, in timm too, which change no cosine and no norm. Its
nested dims end at M, so that evaluate.py and `load_student` offer none beyond. Needs nothing beyond
requirements.txt.
"""

from pathlib import Path

from data import make_parser, path, positive, run_program, save_atomically
from evaluate import load_student
from student import InputError


def cut_student(run: str | Path, dim: int) -> dict:
    """The content of a student.pt cut to its first `dim` channels: {"state_dict", "config"}."""
    student, config = load_student(run)
    width = student.backbone.width
    if dim > width:
        raise InputError(f"--dim: {dim} is above the width of {run}; give 1 to {width}")
    state = student.backbone.state_dict()
    state["norm.weight"][dim:] = 0
    state["norm.bias"][dim:] = 0
    smaller = [m for m in config["nested_dims"] if m < dim]
    return {"state_dict": state, "config": config | {"nested_dims": [*smaller, dim]}}


def main() -> None:
    """The command line."""
    parser = make_parser("python -m extras.export", __doc__)
    parser.add_argument("run", metavar="RUN", help="a run folder or a student.pt")
    parser.add_argument("out", metavar="OUT.pt", type=path, help="the file to write")
    parser.add_argument("--dim", type=positive, required=True, help="channels to keep")
    args = parser.parse_args()
    if Path(args.out).exists():
        raise InputError(f"OUT: {args.out} exists; choose another name, or remove it")
    save_atomically(cut_student(args.run, args.dim), args.out)
    print(f"{args.out}: the student of {args.run} cut to {args.dim} channels; the others are zero")


if __name__ == "__main__":
    run_program(main)
