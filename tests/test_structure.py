"""The shape of the package: no import cycle, short files and functions, few parameters, the field's words.

An exception stands here by name with its reason. One that is no longer needed fails too, so that the lists only shrink.
"""

import ast
import re
import statistics
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import grimp
import pytest

import fedtune
from fedtune.recipe.schema import Recipe
from fedtune.recipe.task_settings import list_task_names

PACKAGE = Path(fedtune.__file__).parent
FILES = sorted(path for path in PACKAGE.rglob("*.py") if "shipped" not in path.parts)


def split_words(text: str) -> set[str]:
    return set(text.split())


LONGEST_FILE = 300
MEDIAN_LINES, MOST_LINES = 8, 20
MOST_PARAMETERS = 6

MANY_PARAMETERS = {
    "_loss": "transformers calls a model's loss function with these",
    "compute_causal_loss": "what transformers calls a model's loss function with",
    "fused_cross_entropy": "the operands and options of torch's cross entropy",
    "create_run": "one keyword for each column that is known when a run begins",
    "make_conv_norm": "the arguments of torch's convolution",
    "__init__": "an inverted residual block: the columns of the table in the MobileNetV3 paper",
}
BARE_NAMES = split_words(
    "about after at before beside between by for from in into of on only out over past per than till to under until "
    "up upon via with without "
    "asked built chosen drawn found given gone held kept known laid left made meant met note now own put said seen "
    "sent set shown spent taken told well won written"
)
"""Prepositions, and participles that do not end in -ed or -ing."""
USUAL_WORDS = {"up"}
"""fedtune server up."""
OLD_WORDS = split_words(
    "workshop shop crew seat seats seating asking desk timetable door handout lifeline keeper supply patience "
    "persistence evidence told entering operand knobs pooled picks thin fusion contribution"
)
"""No part of a name: the left column of the table of words, as far as it has no second, usual meaning."""
OLD_NAMES = split_words(
    "moment order answer answers work ways forward guard operating activity settle settled explain fold stored held "
    "asked revise moves own kept explained"
)
"""No whole name: words of the left column that are usual as a part of another name, e.g. held_out."""
OLD_SETTINGS = {
    "train": {"batch", "length", "image", "clip", "by_length", "steps"},
    "asynchronous": {"oldest", "staleness"},
    "privacy": {"noise", "clip"},
    "data": {"parts", "split"},
}


class Function(NamedTuple):
    file: Path
    owner: ast.ClassDef | None
    node: ast.FunctionDef | ast.AsyncFunctionDef

    @property
    def lines(self) -> int:
        """From the first line of the body to its last, without the docstring."""
        body = self.node.body[1:] if ast.get_docstring(self.node) else self.node.body
        return body[-1].end_lineno - body[0].lineno + 1 if body else 0  # type: ignore[operator]

    @property
    def parameters(self) -> int:
        """All but self and cls."""
        given = self.node.args
        every = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
        return len([one for one in every if one is not None and one.arg not in ("self", "cls")])

    @property
    def decorators(self) -> str:
        return " ".join(ast.unparse(one) for one in self.node.decorator_list)

    def __str__(self) -> str:
        return f"{self.file.relative_to(PACKAGE.parent)}:{self.node.lineno} {self.node.name}"


@cache
def parse_file(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def list_functions(node: ast.AST, file: Path, owner: ast.ClassDef | None = None) -> Iterator[Function]:
    """Every function of a module, methods and inner functions too."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield Function(file, owner, child)
            yield from list_functions(child, file)
        else:
            yield from list_functions(child, file, child if isinstance(child, ast.ClassDef) else owner)


@cache
def every_function() -> list[Function]:
    return [one for path in FILES for one in list_functions(parse_file(path), path)]


def is_public_module(path: Path) -> bool:
    return not path.stem.startswith("_") or path.stem == "__init__"


def is_callable_by_name(function: Function) -> bool:
    """Neither private, nor a property, nor inside another function."""
    outside = function.owner is not None or function.node in parse_file(function.file).body
    private = function.node.name.startswith("_") or (function.owner is not None and function.owner.name[0] == "_")
    return outside and not private and "property" not in function.decorators


def list_public_names(path: Path) -> Iterator[str]:
    """Functions, classes and constants of a module, and methods of its classes."""
    for node in parse_file(path).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id
    yield from (one.node.name for one in list_functions(parse_file(path), path) if one.owner and not is_torch_name(one))


def is_torch_name(function: Function) -> bool:
    """Whether torch calls the method: it chose the name."""
    return function.node.name == "forward"


def split_name(name: str) -> list[str]:
    return [part.lower() for part in re.findall(r"[A-Z]?[a-z0-9]+|[A-Z]+(?![a-z])", name)]


def has_old_word(name: str) -> bool:
    return bool(OLD_WORDS & set(split_name(name))) or "_".join(split_name(name)) in OLD_NAMES


def test_no_modules_import_each_other() -> None:
    """Imports inside functions count; only those for type checkers do not."""
    graph = grimp.build_graph("fedtune", exclude_type_checking_imports=True, cache_dir=None)
    edges = {module: set(graph.find_modules_directly_imported_by(module)) for module in graph.modules}
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")


def test_no_file_is_long() -> None:
    lines = {str(path): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert len(lines) > 100
    assert not {path: count for path, count in lines.items() if count > LONGEST_FILE}


def test_functions_are_short() -> None:
    lines = sorted(function.lines for function in every_function())
    assert len(lines) > 1000
    assert statistics.median(lines) <= MEDIAN_LINES
    assert statistics.quantiles(lines, n=10)[-1] <= MOST_LINES


def is_given_its_parameters(function: Function) -> bool:
    """A command has a parameter for each option; torch passes the operands of an autograd function one by one."""
    bases = {ast.unparse(base) for base in function.owner.bases} if function.owner else set()
    autograd = function.node.name == "forward" and any(base.endswith("Function") for base in bases)
    return ".command(" in function.decorators or "click.command" in function.decorators or autograd


def test_functions_take_few_parameters() -> None:
    many = [one for one in every_function() if one.parameters > MOST_PARAMETERS and not is_given_its_parameters(one)]
    assert not [str(one) for one in many if one.node.name not in MANY_PARAMETERS]
    assert not MANY_PARAMETERS.keys() - {one.node.name for one in many}, "no longer needed: remove them"


def test_no_function_is_called_by_a_preposition_or_participle_alone() -> None:
    functions = [one for one in every_function() if is_public_module(one.file) and is_callable_by_name(one)]
    bare = [one for one in functions if one.node.name in BARE_NAMES or re.fullmatch("[a-z]+(ed|ing)", one.node.name)]
    assert not [str(one) for one in bare if one.node.name not in USUAL_WORDS]
    assert not USUAL_WORDS - {one.node.name for one in bare}, "no longer needed: remove them"


def test_no_module_has_a_word_that_the_field_does_not_use() -> None:
    every = {*FILES, *(path.parent for path in FILES)} - {PACKAGE}
    assert not {path.stem.strip("_") for path in every if has_old_word(path.stem.strip("_"))}


def test_no_public_name_has_a_word_that_the_field_does_not_use() -> None:
    public = {name for path in FILES if is_public_module(path) for name in list_public_names(path)}
    assert len(public) > 500
    assert not {name for name in public if name[0] != "_" and has_old_word(name)}


def test_no_file_outside_the_tasks_asks_which_task_it_is() -> None:
    """A name is neither compared nor looked up: other files ask for attributes of a task."""
    names = set(list_task_names())
    found = [
        f"{path.relative_to(PACKAGE)}:{node.lineno} {node.value}"
        for path in FILES
        if PACKAGE / "tasks" not in path.parents
        for asking in ast.walk(parse_file(path))
        for node in list_compared(asking)
        if isinstance(node, ast.Constant) and node.value in names
    ]
    assert not found


def list_compared(node: ast.AST) -> list[ast.AST]:
    """The expressions that a comparison, a case or the keys of a dictionary are made of, also those in a tuple."""
    if isinstance(node, ast.Compare):
        sides = [node.left, *node.comparators]
    elif isinstance(node, ast.Dict):
        sides = [key for key in node.keys if key is not None]
    else:
        sides = [node.value] if isinstance(node, ast.MatchValue) else []
    return [inner for side in sides for inner in ast.walk(side)]


def test_no_setting_has_a_name_that_the_field_does_not_use() -> None:
    for section, old in OLD_SETTINGS.items():
        names = set(list_setting_names(Recipe, section))
        assert names, f"recipes have no section {section}"
        assert not names & old, section


def list_setting_names(model: type, section: str) -> Iterator[str]:
    schema = model.model_json_schema()  # type: ignore[attr-defined]
    for part in [schema, *schema["$defs"].values()]:
        if section in part.get("properties", {}):
            for name in re.findall(r"#/\$defs/(\w+)", str(part["properties"][section])):
                yield from schema["$defs"][name].get("properties", {})


def test_tests_import_public_names() -> None:
    """A module with a leading underscore is no unit of its folder, but it has public names of its own.

    Some tests patch a private constant, such as the size of a block, so that a small example crosses its limit.
    """
    found = [
        f"{path.name}:{node.lineno} {alias.name}"
        for path in sorted(Path(__file__).parent.rglob("*.py"))
        for node in ast.walk(parse_file(path))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fedtune")
        for alias in node.names
        if alias.name.startswith("_") and not is_module(f"{node.module}.{alias.name}")
    ]
    assert not found


def is_module(name: str) -> bool:
    return PACKAGE.parent.joinpath(*name.split(".")).with_suffix(".py").exists()
