"""The tables of `docs/recipes.md`: lines of step code, what is reached, and the pictures.

python docs/pictures/recipes.py            prints the tables
python docs/pictures/recipes.py --write    puts them into the page
python docs/pictures/recipes.py --draw     runs recipes and draws their pictures first

What a recipe reached is read from its picture, which was drawn at the end of that training.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "examples" / "recipes"
PICTURES = Path(__file__).parent / "recipes"
PAGE = ROOT / "docs" / "recipes.md"
TABLE = re.compile(r"(?<=<!-- (\w{7}) -->\n\n).*?(?=\n\n<!-- end -->)", re.DOTALL)
#: Where a step begins. What the files of a recipe call from there counts too, networks do not.
STEPS = (".training_step", ".on_before_optimizer_step", ".on_after_optimizer_step")


class Recipe(NamedTuple):
    """A row of the table.

    Attributes:
        title: of the recipe.
        shows: of the language.
        paper: who and when, and where.
        reference: repository and file on GitHub.
        lines: of step code there; None where they cannot be told apart.
    """

    title: str
    shows: str
    paper: tuple[str, str]
    reference: tuple[str, str]
    lines: int | None


def arxiv(number: str) -> str:
    """Where a paper is."""
    return f"https://arxiv.org/abs/{number}"


ROWS = {
    "dcgan": Recipe(
        "DCGAN",
        "two optimizers on one `fake`, nothing detached",
        ("Radford 2016", arxiv("1511.06434")),
        ("pytorch/examples", "dcgan/main.py"),
        26,
    ),
    "wgan_gp": Recipe(
        "WGAN-GP",
        "five critic steps: a `for`, or every fifth step",
        ("Gulrajani 2017", arxiv("1704.00028")),
        ("igul222/improved_wgan_training", "gan_mnist.py"),
        32,
    ),
    "stylegan2": Recipe(
        "StyleGAN2",
        "lazy regularisers, a running mean by `Once`, groups of samples, EMA",
        ("Karras 2020", arxiv("1912.04958")),
        ("NVlabs/stylegan2-ada-pytorch", "training/loss.py"),
        78,
    ),
    "cyclegan": Recipe(
        "CycleGAN",
        "image pools by `Once(rows=True)`",
        ("Zhu 2017", arxiv("1703.10593")),
        ("junyanz/pytorch-CycleGAN-and-pix2pix", "models/cycle_gan_model.py"),
        69,
    ),
    "vqgan": Recipe(
        "VQ-GAN",
        "a weight from `Gradient`; a codebook that follows, by `Once`",
        ("Esser 2021", arxiv("2012.09841")),
        ("CompVis/taming-transformers", "taming/modules/losses/vqperceptual.py"),
        43,
    ),
    "diffusion": Recipe(
        "Diffusion",
        "draws that no strategy changes, EMA",
        ("Ho 2020", arxiv("2006.11239")),
        ("hojonathanho/diffusion", "diffusion_tf/diffusion_utils_2.py"),
        38,
    ),
    "simclr": Recipe(
        "SimCLR",
        "`Gather`: negatives from all shards",
        ("Chen 2020", arxiv("2002.05709")),
        ("google-research/simclr", "objective.py"),
        45,
    ),
    "moco": Recipe(
        "MoCo",
        "a queue written by `Once`, a slow copy",
        ("He 2020", arxiv("1911.05722")),
        ("facebookresearch/moco", "moco/builder.py"),
        60,
    ),
    "byol": Recipe(
        "BYOL",
        "a target that gets no gradient because no optimizer has it",
        ("Grill 2020", arxiv("2006.07733")),
        ("google-deepmind/deepmind-research", "byol/byol_experiment.py"),
        95,
    ),
    "dino": Recipe(
        "DINO",
        "crops of several sizes; a centre over the whole batch",
        ("Caron 2021", arxiv("2104.14294")),
        ("facebookresearch/dino", "main_dino.py"),
        72,
    ),
    "clip": Recipe(
        "CLIP",
        "`Gather` of two kinds of features, one's own rows by their offset",
        ("Radford 2021", arxiv("2103.00020")),
        ("mlfoundations/open_clip", "src/open_clip/loss.py"),
        65,
    ),
    "language_model": Recipe(
        "Language model",
        "a mean over characters, under accumulation too",
        ("Radford 2018", "https://openai.com/index/language-unsupervised/"),
        ("karpathy/nanoGPT", "train.py"),
        14,
    ),
    "mixture_of_experts": Recipe(
        "Mixture of experts",
        "two losses with two denominators; loads over all shards",
        ("Fedus 2021", arxiv("2101.03961")),
        ("tensorflow/mesh", "mesh_tensorflow/transformer/moe.py"),
        None,
    ),
    "lora": Recipe(
        "LoRA",
        "batches and loss as Transformers gives them: `Mean.of`",
        ("Hu 2021", arxiv("2106.09685")),
        ("microsoft/LoRA", "examples/NLG/src/gpt2_ft.py"),
        25,
    ),
    "ppo": Recipe(
        "PPO",
        "epochs over a rollout, normalised and stopped by reduced means",
        ("Schulman 2017", arxiv("1707.06347")),
        ("vwxyzjn/cleanrl", "cleanrl/ppo.py"),
        42,
    ),
    "sac": Recipe(
        "SAC",
        "three optimizers, two of them in one yield; targets, replay",
        ("Haarnoja 2018", arxiv("1812.05905")),
        ("rail-berkeley/softlearning", "softlearning/algorithms/sac.py"),
        118,
    ),
    "distillation": Recipe(
        "Distillation",
        "a teacher that only looks on",
        ("Hinton 2015", arxiv("1503.02531")),
        ("haitongli/knowledge-distillation-pytorch", "model/net.py"),
        13,
    ),
    "multitask_pcgrad": Recipe(
        "PCGrad",
        "`Gradient` of each task, an update with `Grads`",
        ("Yu 2020", arxiv("2001.06782")),
        ("tianheyu927/PCGrad", "PCGrad_tf.py"),
        27,
    ),
    "fixmatch": Recipe(
        "FixMatch",
        "two loaders, each loss a mean over its own",
        ("Sohn 2020", arxiv("2001.07685")),
        ("google-research/fixmatch", "fixmatch.py"),
        39,
    ),
    "pinn": Recipe(
        "PINN",
        "Adam, then L-BFGS: a loss as a function",
        ("Raissi 2019", "https://doi.org/10.1016/j.jcp.2018.10.045"),
        ("maziarraissi/PINNs", "appendix/continuous_time_inference%20%28Burgers%29/Burgers.py"),
        25,
    ),
    "tbptt": Recipe(
        "Truncated BPTT",
        "an update a window; the hidden state is a local variable",
        ("Williams 1990", "https://doi.org/10.1162/neco.1990.2.4.490"),
        ("pytorch/examples", "word_language_model/main.py"),
        21,
    ),
    "sam": Recipe(
        "SAM",
        "uphill, a gradient there, and back: `Gradient` and `Grads`",
        ("Foret 2021", arxiv("2010.01412")),
        ("google-research/sam", "sam_jax/training_utils/flax_training.py"),
        65,
    ),
}


# -- lines -----------------------------------------------------------------------------------------


def functions(path: Path) -> dict[str, list[ast.FunctionDef]]:
    """The functions of a file by name, methods as `.name`, but for what networks are made of."""
    tree = ast.parse(path.read_text("utf-8"))
    found: dict[str, list[ast.FunctionDef]] = {}
    for outer in ast.walk(tree):
        dot = "." if isinstance(outer, ast.ClassDef) else ""
        for node in ast.iter_child_nodes(outer):
            if isinstance(node, ast.FunctionDef) and node.name not in ("__init__", "forward"):
                found.setdefault(dot + node.name, []).append(node)
    return found


def names(node: ast.AST) -> Iterator[str]:
    """What is called in it, or handed over to be called: functions, and methods as `.name`."""
    for call in ast.walk(node):
        if isinstance(call, ast.Call):
            for used in (call.func, *call.args):
                if isinstance(used, ast.Attribute):
                    yield f".{used.attr}"
                elif isinstance(used, ast.Name):
                    yield used.id


def code_lines(node: ast.FunctionDef, text: list[str]) -> Iterator[int]:
    """Its lines without empty ones, comments and docstring; decorators count."""
    begin = min([node.lineno, *(own.lineno for own in node.decorator_list)])
    assert node.end_lineno is not None
    said = range(0)
    if ast.get_docstring(node) is not None:
        said = range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1)
    for line in range(begin, node.end_lineno + 1):
        if line not in said and text[line - 1].strip() and text[line - 1].strip()[0] != "#":
            yield line


def step_lines(name: str) -> int:
    """Lines of a recipe's step, and of what it calls by name in the files of the recipes."""
    own, shared = RECIPES / f"{name}.py", RECIPES / "_views.py"
    imported = {
        alias.name
        for node in ast.walk(ast.parse(own.read_text("utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module == shared.stem
        for alias in node.names
    }
    steps = functions(own)
    for step in STEPS:
        steps[step] = steps.get(step, [])[-1:]  # of a teacher and its student, the student's
    helpers = {helper: found for helper, found in functions(shared).items() if helper in imported}
    wanted, seen, counted = list(STEPS), set[str](), set[tuple[Path, int]]()
    while wanted:
        called = wanted.pop()
        if called not in seen:
            seen.add(called)
            for path, found in (own, steps), (shared, helpers):
                text = path.read_text("utf-8").splitlines()
                for node in found.get(called, []):
                    counted.update((path, line) for line in code_lines(node, text))
                    wanted.extend(names(node))
    return len(counted)


# -- the table -------------------------------------------------------------------------------------


def reached(name: str) -> tuple[str, str, str]:
    """What was reached, the target and the control, from the picture."""
    with Image.open(PICTURES / f"{name}.png") as picture:
        said = str(picture.info["Description"])
    found = re.fullmatch(r".+ (\S+) \(target: at (\w+) (\S+); control: (\S+)\)", said)
    assert found is not None, said
    value, side, target, control = found.groups()
    return short(value), f"{'≥' if side == 'least' else '≤'} {short(target)}", short(control)


def short(number: str) -> str:
    """Three digits."""
    value = float(number)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table() -> str:
    """What each recipe shows and reaches, and its lines; the number there links to the file."""
    lines = [
        "| recipe | shows | lines here | there | reached | target | control | |",
        "|---|---|---:|---:|---:|---:|---:|---|",
    ]
    for name, row in ROWS.items():
        repository, file = row.reference
        there = "none" if row.lines is None else str(row.lines)
        cells = (
            f"[{row.title}](../examples/recipes/{name}.py)",
            row.shows,
            str(step_lines(name)),
            f"[{there}](https://github.com/{repository}/blob/HEAD/{file})",
            *reached(name),
            f"[picture](#{anchor(row.title)})",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def sources() -> str:
    """Papers, and what the lines there were counted in."""
    lines = ["| recipe | paper | reference implementation |", "|---|---|---|"]
    for row in ROWS.values():
        (paper, where), (repository, file) = row.paper, row.reference
        link = f"[{repository}](https://github.com/{repository})"
        shown = file.replace("%20", " ").replace("%28", "(").replace("%29", ")")
        lines.append(f"| {row.title} | [{paper}]({where}) | {link}, `{shown}` |")
    return "\n".join(lines)


TABLES = {"recipes": table, "sources": sources}


def anchor(title: str) -> str:
    """As GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def draw(chosen: Sequence[str]) -> None:
    """Run recipes one after the other; each has to reach its target."""
    PICTURES.mkdir(exist_ok=True)
    paths = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    for name in chosen:
        command: list[str | Path] = [
            sys.executable,
            RECIPES / f"{name}.py",
            "--strategy",
            "single",
            "--picture",
        ]
        subprocess.run([*command, PICTURES / f"{name}.png"], env=environment, check=True)


def main() -> None:
    """Draw, then print or write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the tables into the page")
    parser.add_argument("--draw", nargs="*", choices=ROWS, metavar="NAME", help="all, or these")
    given = parser.parse_args()
    if given.draw is not None:
        draw(given.draw or list(ROWS))
    if given.write:
        page = PAGE.read_text("utf-8")
        PAGE.write_text(TABLE.sub(lambda found: TABLES[found[1]](), page), encoding="utf-8")
    else:
        print(table(), sources(), sep="\n\n")


if __name__ == "__main__":
    main()
