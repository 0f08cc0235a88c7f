"""Who may import whom: a module imports from layers below its own, and each outside library has one home."""

import ast
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from tests.conftest import ROOT

LAYERS = [
    {"commands", "errors", "kernels", "redact", "signals"},
    {"files"},
    {"__main__", "cli", "model", "report", "settings"},
    {"device", "partial_answers", "prompts"},
    {"quantize"},
    {"sharded"},
    {"checkpoint", "data"},
    {"convert", "train"},
    {"lora"},
    {"fused"},
    {"generation"},
    {"evaluate", "inference"},
    {"run", "serve"},
    {"sweep"},
]
"""The packages, and the modules beside them, from the bottom up; those of one layer do not know each other."""

HOMES = {
    "bitsandbytes": {"quantize"},
    "triton": {"kernels.launch"},
    "lightning": {
        "evaluate.labels",
        "evaluate.measures",
        "evaluate.preferences",
        "run.distillation",
        "run.dry_run",
        "run.finetune",
        "run.folder",
        "run.learning",
        "run.preferences",
        "train.launcher",
        "train.watch",
    }
    | {"train.loop", "train.parallel", "train.training_state"},
    "sentencepiece": {"prompts.backends"},
    "tokenizers": {"prompts.backends"},
    "jsonargparse": {"cli"},
    "yaml": {"cli", "files.reading"},
    "matplotlib": {"run.figures", "sweep.pages"},
    "wandb": {"run.trackers"},
    "mlflow": {"run.trackers"},
    "trackio": {"run.trackers"},
    "optuna": {"sweep.study"},
    "safetensors": {"checkpoint.safetensors_io"},
    "huggingface_hub": {"convert.hub"},
    "tqdm": {"checkpoint.shards"},
    "gguf": {"convert.to_gguf"},
    "fla": {"fused.delta_rule"},
    "flash_attn": {"fused.flash_4"},
    "fastapi": {"serve.app", "serve.guard"},
    "starlette": {"serve.app"},  # what FastAPI is built on
    "uvicorn": {"serve.listen"},
    "jinja2": {"prompts.template_worker"},
    "torchmetrics": {"evaluate.metrics"},
    "sacrebleu": {"evaluate.metrics"},
    "numpy": {
        "convert.to_gguf",
        "data.audit",
        "data.batches",
        "data.cache",
        "data.comparisons",
        "data.encode",
        "data.judged",
        "data.load",
        "data.preferences",
        "data.reference",
        "data.scoring",
        "data.tokenized",
    }
    | {"data.samples", "data.taught", "run.preferences"},
    "datasets": {"data.sources"},
    "pyarrow": {"data.readers", "data.text_files"},
    "transformers": set(),
    "peft": set(),
    "lm_eval": set(),
}
"""Outside libraries and the only modules of the package that may import them."""

LIBRARIES = set(packages_distributions())
PACKAGE = ROOT / "lit_qlora"
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
SCRIPTS = sorted(path for folder in ("finetune", "scripts", "eval") for path in (ROOT / folder).glob("*.py"))


def unit(path: Path) -> str:
    """What LAYERS calls the file: data/samples.py is part of "data"."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def module(path: Path) -> str:
    """What HOMES calls the file: data/samples.py is "data.samples"."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


@cache
def imported(path: Path) -> tuple[str, ...]:
    """Full names of what a file imports, wherever it does so, but for types alone."""

    def visit(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield from (f"{node.module}.{name.name}" for name in node.names)
        for child in ast.iter_child_nodes(node):
            yield from visit(child)

    return tuple(visit(ast.parse(path.read_text())))


def test_imports_are_found_wherever_they_stand(tmp_path: Path) -> None:
    source = "import a.b\nif TYPE_CHECKING:\n    import c\ndef f():\n    from d import e\n"
    (tmp_path / "x.py").write_text(source)
    assert imported(tmp_path / "x.py") == ("a.b", "d.e")


def test_every_package_has_a_layer() -> None:
    assert sorted(name for layer in LAYERS for name in layer) == sorted({unit(path) for path in MODULES})


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_package_imports_only_from_lower_layers(path: Path) -> None:
    own = next(i for i, layer in enumerate(LAYERS) if unit(path) in layer)
    below = set().union(*LAYERS[:own]) | {"__version__"}
    used = {name.split(".")[1] for name in imported(path) if name.startswith("lit_qlora.")} - {unit(path)}
    assert used <= below


def test_contributing_draws_these_layers() -> None:
    drawing = (ROOT / "CONTRIBUTING.md").read_text().split("<!-- the layers, from tests/test_architecture.py -->")[1]
    lines = drawing.split("```")[1].strip().splitlines()
    assert [set(line.split("  ")[0].split()) for line in reversed(lines[1:])] == LAYERS


def test_no_modules_import_each_other_in_a_circle() -> None:
    files = {".".join(["lit_qlora", *module(path).removesuffix(".__init__").split(".")]): path for path in MODULES}
    files |= {path.stem: path for path in SCRIPTS}

    def imports(path: Path) -> set[str]:
        candidates = ((full, full.rpartition(".")[0]) for full in imported(path))
        return {next(name for name in pair if name in files) for pair in candidates if set(pair) & set(files)}

    graph = {name: imports(path) - {name} for name, path in files.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


@pytest.mark.parametrize("library", HOMES)
def test_an_outside_library_has_one_home(library: str) -> None:
    users = {module(path) for path in MODULES if library in {name.split(".")[0] for name in imported(path)}}
    assert users == HOMES[library]


def test_models_on_the_meta_device_are_made_in_one_place() -> None:
    benchmarks = (ROOT / "benchmarks").rglob("*.py")
    makers = [path.name for path in (*MODULES, *SCRIPTS, *benchmarks) if 'torch.device("meta")' in path.read_text()]
    assert makers == ["gpt.py"]


def test_every_outside_library_has_a_home() -> None:
    used = {name.split(".")[0] for path in MODULES for name in imported(path)}
    assert used - sys.stdlib_module_names - {"lit_qlora", "torch"} <= set(HOMES)


def test_the_loop_knows_neither_lora_nor_quantisation_nor_files() -> None:
    used = {name.split(".")[1] for name in imported(PACKAGE / "train/loop.py") if name.startswith("lit_qlora.")}
    assert not used & {"lora", "quantize", "checkpoint"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_package_does_not_know_the_scripts(path: Path) -> None:
    scripts = {"finetune", "scripts", "eval", "tests"} | {script.stem for script in SCRIPTS}
    assert not {name.split(".")[0] for name in imported(path)} & scripts


@pytest.mark.parametrize("path", [*MODULES, *SCRIPTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_touches_the_path_of_imports(path: Path) -> None:
    assert not any(
        isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.path"
        for node in ast.walk(ast.parse(path.read_text()))
    )


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_script_hides_a_library(path: Path) -> None:
    assert path.stem not in LIBRARIES
