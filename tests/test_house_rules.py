"""The house rules that import contracts (`lint-imports`), ruff and mypy cannot express, each as a test.

A failure names every offender and the cure; the last test plants an offence against each rule and sees it turn red.
"""

from __future__ import annotations

import ast
import functools
import gc
import importlib.metadata
import importlib.util
import re
import subprocess
import tokenize
import tomllib
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("kernels", "parallel", "train", "launch")
# Aims are about 300 lines a file and 40 a function; past these a reason is asked for.
MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 80
MAX_PARAMETERS = 8
MAX_ENTRYPOINT_LINES = 120
# Docstring lines a line of code, over the product; peers have 0.06 to 0.2.
MAX_DOCSTRING_RATIO = 0.28

# Files in kernels/ that are no kernels: formats and tiles, configuration, backend, another library, queue and probe.
NOT_KERNELS = ("__init__", "formats", "tiles", "config", "backend", "deepgemm", "deferred", "operators", "probe")
# Kernel files whose arithmetic is all in other kernel files, which have references: name -> what it composes.
COMPOSITIONS = {
    "fp8_linear": ("gemm_fp8", "gemm_grouped", "quantize", "swiglu"),
    "experts_in_chunks": ("gather", "gemm_grouped", "permute", "swiglu"),
}
# Functions that may read a device value inside the step, and why.
HOST_READS = {
    "kernels/deepgemm.py:_microseconds": "a clock, at the start of a run",
    "kernels/gemm_grouped.py:group_rows": "plain torch and Transformer Engine slice by group; a device kernel does not",
    "kernels/attention.py:documents_of": "document ids are on the host, which is asserted",
    "train/optim/offload.py:wait": "before a checkpoint reads or fills the state, not in a step",
    "train/optim/ema.py:_fold": "its own thread waits for a copy, beside the step",
    "parallel/hops.py:_read_counts": "split sizes of the uneven all-to-all: one read a MoE layer and micro-batch",
    "parallel/zero.py:nonfinite": "on a step that is skipped, to name what is not finite",
    "parallel/collectives.py:texts_of": "on a step that is skipped",
}
# Where the environment may be read.
ENVIRONMENT_HOMES = ("launch/", "kernels/backend.py")


def none_of(offenders: list[str], cure: str) -> None:
    """Fail with every offender on a line of its own."""
    assert not offenders, "\n".join([cure, *sorted(set(offenders))])


def sources(*rooms: str) -> list[Path]:
    """Python files below some folders of the repository."""
    return sorted(path for room in rooms for path in (ROOT / room).rglob("*.py"))


def kernel_files() -> list[Path]:
    """Files of `kernels/` that compute something; device code is apart, in `kernels/gpu/`."""
    return [path for path in sources("kernels") if path.parent.name == "kernels" and path.stem not in NOT_KERNELS]


@pytest.fixture(scope="module", autouse=True)
def parsed_once() -> Iterator[None]:
    """900,000 nodes, none of them garbage: collections while they are made take four times as long as making them."""
    gc.disable()
    yield
    for cache in (tree, nodes, functions):
        cache.cache_clear()
    gc.enable()


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


@functools.cache
def nodes(path: Path) -> tuple[ast.AST, ...]:
    """Every node of a file, walked once for all rules."""
    return tuple(ast.walk(tree(path)))


def place(path: Path, node: ast.AST | None = None) -> str:
    line = f":{node.lineno}" if node is not None and hasattr(node, "lineno") else ""
    return f"{path.relative_to(ROOT)}{line}"


@functools.cache
def functions(path: Path) -> tuple[ast.FunctionDef | ast.AsyncFunctionDef, ...]:
    """Every function of a file but device code (`@triton.jit`, `@gluon.jit`)."""
    found = []
    for node in nodes(path):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            decorators = {ast.unparse(decorator).partition("(")[0] for decorator in node.decorator_list}
            if not decorators & {"triton.jit", "gluon.jit"}:
                found.append(node)
    return tuple(found)


def imported(path: Path) -> Iterator[tuple[ast.AST, str]]:
    """(node, dotted name) of everything a file imports: `import a.b` and `from a import b` both give a.b."""
    for node in nodes(path):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node, f"{node.module}.{alias.name}") for alias in node.names)


def mentioned(path: Path) -> Iterator[tuple[ast.AST, str]]:
    """(node, dotted name) of everything a file imports, and of every expression such as os.environ."""
    yield from imported(path)
    for node in nodes(path):
        if isinstance(node, ast.Attribute | ast.Name) and (name := dotted(node)):
            yield node, name


def dotted(node: ast.expr) -> str | None:
    """`os.environ` of such an expression; None where a call or an index is in it, which has its own name inside."""
    names = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(names)]) if isinstance(node, ast.Name) else None


def test_a_long_file_says_why_it_is_one_idea() -> None:
    offenders = [
        f"{place(path)}: {length} lines"
        for path in sources(*ROOMS, "tests")
        if (length := len(path.read_text().splitlines())) > MAX_FILE_LINES
        and "one idea" not in (ast.get_docstring(tree(path)) or "")
    ]
    none_of(offenders, f"past {MAX_FILE_LINES} lines: split by idea, or let the docstring say why it is one idea")


def test_no_function_is_longer_than_the_limit() -> None:
    offenders = [
        f"{place(path, node)}: {node.name} has {length} lines"
        for path in sources(*ROOMS, "tests")
        for node in functions(path)
        if (length := (node.end_lineno or 0) - node.lineno + 1) > MAX_FUNCTION_LINES
    ]
    none_of(offenders, f"split by idea: {MAX_FUNCTION_LINES} lines a function")


def test_no_function_has_more_parameters_than_the_limit() -> None:
    offenders = []
    for path in sources(*ROOMS):
        for node in functions(path):
            names = {a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)}
            if len(names := names - {"self", "cls", "ctx"}) > MAX_PARAMETERS:
                offenders.append(f"{place(path, node)}: {node.name} takes {len(names)}")
    none_of(offenders, "group them in a frozen dataclass")


def test_init_files_hold_a_docstring_only() -> None:
    offenders = [
        f"{place(path)}: {len(tree(path).body)} statements, expected one docstring"
        for path in sources(*ROOMS)
        if path.name == "__init__.py" and (len(tree(path).body) != 1 or not ast.get_docstring(tree(path)))
    ]
    none_of(offenders, "move the code to a module of its own")


def test_tests_are_no_packages() -> None:
    """pytest imports them by file (importmode=importlib), so basenames may repeat."""
    none_of([place(path) for path in sources("tests") if path.name == "__init__.py"], "delete it")


def test_every_folder_of_code_is_a_package() -> None:
    folders = {path.parent for path in sources(*ROOMS)}
    offenders = [place(folder) for folder in folders if not (folder / "__init__.py").exists()]
    none_of(offenders, "add an __init__.py with a docstring: packaging and mypy look for it")


def test_every_module_says_what_it_is() -> None:
    none_of([place(path) for path in sources(*ROOMS) if not ast.get_docstring(tree(path))], "write its docstring")


def public_doors() -> Iterator[tuple[Path, ast.FunctionDef | ast.ClassDef]]:
    """Functions and classes that another file of the product imports, by name or through their module."""
    used: set[str] = set()
    for path in sources(*ROOMS):
        modules = {name for _, name in imported(path)}
        used |= modules
        aliases = {name.rpartition(".")[2]: name for name in modules}
        for node in nodes(path):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases:
                used.add(f"{aliases[node.value.id]}.{node.attr}")
    for path in sources(*ROOMS):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for node in tree(path).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and f"{module}.{node.name}" in used:
                yield path, node


def test_public_doors_have_docstrings() -> None:
    """What another file uses is described where it is defined; what only its own file uses may speak for itself."""
    offenders = [f"{place(path, node)}: {node.name}" for path, node in public_doors() if not ast.get_docstring(node)]
    none_of(
        offenders, "write its docstring: one line, then shapes, units, errors and source where they are not obvious"
    )


def docstring_lines(path: Path) -> set[int]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [node.body[0] for node in nodes(path) if isinstance(node, kinds) and ast.get_docstring(node)]
    return {line for node in found for line in range(node.lineno, (node.end_lineno or 0) + 1)}


def code_lines(path: Path) -> set[int]:
    """Lines that hold a token other than a comment, docstrings apart."""
    blank = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    with tokenize.open(path) as file:
        tokens = [token for token in tokenize.generate_tokens(file.readline) if token.type not in blank]
    return {line for token in tokens for line in range(token.start[0], token.end[0] + 1)} - docstring_lines(path)


def test_docstrings_stay_short() -> None:
    """Over the product; an explanation belongs beside the line that needs it."""
    files = sources(*ROOMS)
    docstrings, code = (sum(len(lines(path)) for path in files) for lines in (docstring_lines, code_lines))
    assert docstrings <= MAX_DOCSTRING_RATIO * code, (
        f"{docstrings} lines of docstrings, {code} of code: train/ and more"
    )


def test_no_class_name_is_used_twice() -> None:
    places: dict[str, list[str]] = defaultdict(list)
    for path in sources(*ROOMS):
        for node in nodes(path):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(place(path, node))
    repeated = [f"{name}: {', '.join(at)}" for name, at in places.items() if len(at) > 1]
    none_of(repeated, "one name, one idea: rename one")


def test_nothing_is_a_stub() -> None:
    """A function does what it says: no NotImplementedError, no empty body outside a Protocol."""
    offenders = []
    for path in sources(*ROOMS):
        classes = [node for node in nodes(path) if isinstance(node, ast.ClassDef)]
        protocols = [node for node in classes if any("Protocol" in ast.unparse(base) for base in node.bases)]
        promised = [statement for protocol in protocols for statement in protocol.body]
        for node in functions(path):
            body = [s for s in node.body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]
            if all(isinstance(statement, ast.Pass) for statement in body) and node not in promised:
                offenders.append(f"{place(path, node)}: {node.name} is empty")
        if "NotImplementedError" in path.read_text():
            offenders.append(f"{place(path)}: NotImplementedError")
    none_of(offenders, "write it or leave it out")


@pytest.mark.parametrize("path", kernel_files(), ids=lambda path: path.stem)
def test_every_kernel_has_a_reference_a_test_and_a_bench_entry(path: Path) -> None:
    """A hand-written kernel or backward is checked against a `*_reference` in its own file.

    A file of plain torch that autograd differentiates is its own reference; a composition imports its own.
    """
    from train.studies.bench import rows

    source = path.read_text()
    has_reference = any(node.name.endswith("_reference") for node in functions(path))
    hand_written = "autograd.Function" in source or "triton.jit" in source or "gluon.jit" in source
    if path.stem in COMPOSITIONS:
        names = {name for _, name in imported(path)}
        for part in COMPOSITIONS[path.stem]:
            assert any(name.startswith(f"kernels.{part}.") for name in names), f"does not compose {part}"
    else:
        assert has_reference or not hand_written, f"{place(path)} needs a *_reference"
    assert (ROOT / f"tests/kernels/test_{path.stem}.py").exists(), f"tests/kernels/test_{path.stem}.py is missing"
    assert rows.ROWS.get(path.stem), f"{place(path)} has no row in train/studies/bench/rows.py"
    measured = {name for _, name in imported(Path(rows.__file__))}
    assert any(name.startswith(f"kernels.{path.stem}.") for name in measured), f"no row runs anything of {place(path)}"


def test_all_device_code_is_run_by_a_test() -> None:
    """Each file of `kernels/gpu/` and each launcher in it: in the interpreters by a test, by the compiler as a case."""
    tests = {path.name: path.read_text() for path in sources("tests") if path.parent.name == "kernels"}
    registered = set(re.findall(r'operator\(\s*"(\w+)"', "".join(path.read_text() for path in sources("kernels"))))
    offenders = []
    for path in sources("kernels/gpu"):
        name = re.compile(rf"from kernels\.gpu(\.{path.stem} import| import (\([\w,\s]*|[\w, ]*)\b{path.stem}\b)")
        launchers = registered & {function.name for function in functions(path)}
        if path.stem != "__init__":
            for prefix, suffix in (("test_", ".py"), ("", "_cases.py")):
                texts = [text for test, text in tests.items() if test.startswith(prefix) and test.endswith(suffix)]
                using = "".join(text for text in texts if name.search(text))
                where = f"in no tests/kernels/{prefix}*{suffix}"
                offenders += [] if using else [f"{place(path)}: {where}"]
                missing = [launcher for launcher in sorted(launchers) if not re.search(rf"\.{launcher}\b", using)]
                offenders += [f"{place(path)}: {launcher} {where}" for launcher in missing if using]
    none_of(offenders, "run it in an interpreter (tests/kernels/test_*.py) and add a case to tests/kernels/*_cases.py")


def test_the_rooms_are_ours() -> None:
    """PyPI has a package called `kernels`; if it is installed, one of the two hides the other."""
    offenders = []
    for room in ROOMS:
        spec = importlib.util.find_spec(room)
        if spec is None or spec.origin is None or not Path(spec.origin).is_relative_to(ROOT):
            offenders.append(f"{room} resolves to {spec}")
    none_of(offenders, "reinstall: pip install --no-deps --editable .")
    installed = {(distribution.name or "").lower() for distribution in importlib.metadata.distributions()}
    assert "kernels" not in installed, "a foreign package hides ours: run `pip uninstall kernels`"


def test_no_entrypoint_shadows_an_installed_module() -> None:
    """`python launch/x.py` puts launch/ first on the path: any `import x` would find the script."""
    scripts = [path for path in sources("launch") if path.stem != "__init__"]
    none_of([place(path) for path in scripts if importlib.util.find_spec(path.stem)], "rename the script")


def test_entrypoints_are_short() -> None:
    offenders = [
        f"{place(path)}: {length} lines"
        for path in sources("launch")
        if (length := len(path.read_text().splitlines())) >= MAX_ENTRYPOINT_LINES
    ]
    none_of(offenders, f"parse, build the configuration, call one function: under {MAX_ENTRYPOINT_LINES} lines")


def test_the_environment_is_read_at_the_door() -> None:
    offenders = [
        f"{place(path, node)}: {name}"
        for path in sources(*ROOMS)
        if not place(path).startswith(ENVIRONMENT_HOMES)
        for node, name in mentioned(path)
        if name in ("os.environ", "os.getenv", "os.putenv")
    ]
    none_of(offenders, "pass a field of the configuration")


def test_nothing_unpickles() -> None:
    forbidden = ("pickle.", "cloudpickle.", "dill.", "joblib.", "shelve.", "marshal.", "torch.load.", "torch.save.")
    offenders = []
    for path in sources(*ROOMS):
        for node, name in mentioned(path):
            if f"{name}.".startswith(forbidden):
                offenders.append(f"{place(path, node)}: {name}")
        if "allow_pickle=True" in path.read_text():
            offenders.append(f"{place(path)}: allow_pickle=True")
    none_of(offenders, "tensors go through safetensors, the rest through JSON")


def test_the_step_never_waits_for_the_device() -> None:
    """No value is read back inside forward, backward and update; references may."""
    step = sources("kernels", "parallel", "train/model", "train/optim")
    step += [path for path in sources("train") if place(path) in ("train/step.py", "train/losses.py")]
    offenders = [
        f"{place(path, node)}: .{node.attr} in {function.name}"
        for path in step
        for function in functions(path)
        if not function.name.endswith("_reference") and f"{place(path)}:{function.name}" not in HOST_READS
        for node in ast.walk(function)
        if isinstance(node, ast.Attribute) and node.attr in ("item", "tolist", "cpu", "synchronize")
    ]
    none_of(offenders, "keep it on the device, or read it back after the step")


def test_no_assert_has_an_effect() -> None:
    """Under `python -O` it would be lost."""
    effects = ("next", "append", "extend", "add", "update", "pop", "popleft", "popitem", "remove", "setdefault")
    offenders = [
        place(path, check)
        for path in sources(*ROOMS)
        for check in nodes(path)
        if isinstance(check, ast.Assert)
        for node in ast.walk(check.test)
        if isinstance(node, ast.NamedExpr)
        or (isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in effects)
    ]
    none_of(offenders, "do it on the line before")


@pytest.mark.parametrize("key", sorted(HOST_READS))
def test_each_exception_is_still_needed(key: str) -> None:
    file, _, name = key.partition(":")
    assert name in [node.name for node in functions(ROOT / file)]


def text_files() -> list[Path]:
    """What people read or run: code, configs, documents, build files."""
    found = [p for d in (*ROOMS, "tests", "configs", "docs", "requirements", ".ci") for p in (ROOT / d).rglob("*")]
    found += [p for p in ROOT.glob("*") if p.suffix in (".md", ".toml", ".yaml") or p.name == "Makefile"]
    return sorted(p for p in found if p.is_file() and p.suffix not in (".pyc", ".png", ".svg", ".html", ".safetensors"))


def test_no_file_names_a_folder_of_one_machine() -> None:
    machine = re.compile(r"(?<![\w.~/}-])/(?:home|root|work|Users|mnt|opt|scratch)/\w")
    offenders = [
        f"{place(path)}:{number}: {line.strip()}"
        for path in text_files()
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if machine.search(line)
    ]
    none_of(offenders, "derive it from __file__ or take it from the configuration")


def named_paths(path: Path) -> Iterator[tuple[int, str]]:
    """(line, path) of each file of ours that a text names, and of each relative Markdown link."""
    folders = "|".join((*ROOMS, "tests", "configs", "docs", "requirements", r"\.ci"))
    mention = re.compile(rf"(?<![\w./*-])(?:{folders})/[\w./*-]*\.(?:py|md|yaml|txt|png|jsonl|html)\b")
    link = re.compile(r"\]\((?!\w+:|#)([^)\s#]+)")
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        yield from ((number, match) for match in mention.findall(line))
        if path.suffix == ".md":
            targets = [(path.parent / target).resolve() for target in link.findall(line)]
            yield from ((number, str(target.relative_to(ROOT.resolve()))) for target in targets)


def test_every_file_that_a_text_names_exists() -> None:
    offenders = [
        f"{place(path)}:{number}: {name}"
        for path in text_files()
        # pyproject.toml names the homes of banned interfaces before they are built.
        if path.name not in ("CHANGELOG.md", "pyproject.toml") and path != Path(__file__)
        for number, name in named_paths(path)
        if not any(ROOT.glob(name))
    ]
    none_of(offenders, "the file is gone or was never there")


def test_every_test_that_a_document_names_exists() -> None:
    """docs/promises.md says which test proves what: `tests/model/test_oracle.py::test_name`."""
    reference = re.compile(r"(tests/[\w/]+\.py)::(test_\w+)")
    offenders = []
    for document in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for file, name in reference.findall(document.read_text()):
            path = ROOT / file
            if not path.exists() or name not in [node.name for node in functions(path)]:
                offenders.append(f"{place(document)}: {file}::{name}")
    none_of(offenders, "the promise has lost its test")


def names_in(path: Path) -> set[str]:
    """Every identifier and every whole text constant of a Python file."""
    fields = ("name", "id", "arg", "attr", "value")
    found = {getattr(node, field, None) for node in nodes(path) for field in fields}
    return {each for each in found if isinstance(each, str)}


def test_a_guide_shows_the_code_as_it_is() -> None:
    """docs/add_*.md: a name in backticks and a Python excerpt are in one of the files that the page names."""
    offenders = []
    for guide in (ROOT / "docs").glob("add_*.md"):
        text = guide.read_text()
        files = [ROOT / name for _, name in named_paths(guide) if name.endswith(".py") and (ROOT / name).is_file()]
        code, known = "\n".join(path.read_text() for path in files), set().union(*map(names_in, files))
        excerpts = re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
        offenders += [f"{place(guide)}: {each}" for each in excerpts if each not in code]
        prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
        spans = re.findall(r"`([A-Za-z_][\w.]*)`", prose)
        offenders += [f"{place(guide)}: {name}" for name in spans if not set(name.split(".")) <= known]
    none_of(offenders, "the guide shows what is not there: mend it")


def pins() -> dict[str, str]:
    """Package -> exact version, from requirements/."""
    found: dict[str, str] = {}
    for path in sorted((ROOT / "requirements").glob("*.txt")):
        for line in path.read_text().splitlines():
            if line and not line.startswith(("#", "-")):
                requirement = Requirement(line)
                (clause,) = requirement.specifier
                assert clause.operator == "==", f"{place(path)}: {line} is no exact version"
                assert requirement.name not in found, f"{requirement.name} is pinned twice"
                found[requirement.name] = clause.version
    return found


def test_the_pins_are_exact_and_inside_the_supported_ranges() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = pins()
    optional = project["optional-dependencies"]
    # pre-commit, deepspeed and Transformer Engine are for those who want them; neither command installs them.
    wanted = [*project["dependencies"], *optional["deepseek"], *optional["dev"]]
    for requirement in map(Requirement, wanted):
        if requirement.name != "pre-commit":
            assert requirement.specifier.contains(pinned[requirement.name]), f"{requirement}: {pinned}"
    assert (pinned["torch"], pinned["triton"]) == ("2.13.0", "3.7.1")


def test_the_commands_are_executable() -> None:
    for name in (".ci/run", ".ci/setup"):
        assert (ROOT / name).stat().st_mode & 0o111, f"chmod +x {name}"
    make = subprocess.run(["make", "--dry-run", "demo", "test"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert make.returncode == 0, make.stderr
    for command in ("ruff check", "ruff format --check", "mypy", "lint-imports", "pytest", "launch/demo.py"):
        assert command in make.stdout


def test_uninitialised_memory_is_poisoned_and_algorithms_are_deterministic() -> None:
    """tests/conftest.py switches both on; a kernel that leaves a hole shows NaN in every test."""
    assert torch.empty(1000).isnan().all()
    assert torch.empty(10, dtype=torch.bfloat16).isnan().all()
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.get_num_threads() == 1


# Rule -> an offence against it, as file and text below an otherwise empty repository.
OFFENCES = [
    (test_a_long_file_says_why_it_is_one_idea, "train/a.py", '"""Two ideas."""\n' + "x = 1\n" * 600),
    (test_no_function_is_longer_than_the_limit, "train/a.py", "def f():\n" + "    x = 1\n" * 80),
    (test_no_function_has_more_parameters_than_the_limit, "train/a.py", "def f(a, b, c, d, e, *, f, g, h, i): 1"),
    (test_init_files_hold_a_docstring_only, "train/__init__.py", '"""Room."""\n__version__ = "1"\n'),
    (test_tests_are_no_packages, "tests/__init__.py", ""),
    (test_every_folder_of_code_is_a_package, "train/data/a.py", ""),
    (test_every_module_says_what_it_is, "train/a.py", "x = 1\n"),
    (test_public_doors_have_docstrings, "train/a.py", "from train.a import f\ndef f(): return 1\n"),
    (test_docstrings_stay_short, "train/a.py", '"""One\n\ntwo."""\nx = 1\n'),
    (test_no_class_name_is_used_twice, "train/a.py", "class A: pass\nclass B:\n    class A: pass\n"),
    (test_nothing_is_a_stub, "train/a.py", 'def f():\n    """Later."""\n    ...\n'),
    (test_nothing_is_a_stub, "train/a.py", "def f():\n    raise NotImplementedError\n"),
    (test_no_entrypoint_shadows_an_installed_module, "launch/numpy.py", ""),
    (test_entrypoints_are_short, "launch/a.py", "x = 1\n" * 120),
    (test_the_environment_is_read_at_the_door, "train/a.py", "import os\nos.environ['A']\n"),
    (test_the_environment_is_read_at_the_door, "train/a.py", "from os import getenv\n"),
    (test_nothing_unpickles, "train/a.py", "import pickle\n"),
    (test_nothing_unpickles, "train/a.py", "import torch as t, torch\ntorch.load('a')\n"),
    (test_the_step_never_waits_for_the_device, "kernels/a.py", "def f(x):\n    return x.sum().item()\n"),
    (test_no_assert_has_an_effect, "train/a.py", "assert next(x, None) is None\n"),
    (test_no_file_names_a_folder_of_one_machine, "configs/a.yaml", "store: /" + "home/me/text\n"),
    (test_every_file_that_a_text_names_exists, "docs/a.md", "See `train/" + "gone.py`.\n"),
    (test_every_file_that_a_text_names_exists, "docs/a.md", "[there](gone.md)\n"),
    (test_a_guide_shows_the_code_as_it_is, "docs/add_a.md", "`gone`\n"),
    (test_a_guide_shows_the_code_as_it_is, "docs/add_a.md", "```python\ngone = 1\n```\n"),
    (test_every_test_that_a_document_names_exists, "docs/a.md", "tests/" + "gone.py::test_x\n"),
]


def test_the_kernel_rule_turns_red(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hand-written backward without a reference, one with a reference and no test, one without a bench row."""
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    kernel = tmp_path / "kernels/a.py"
    kernel.parent.mkdir()
    kernel.write_text("class A(torch.autograd.Function):\n    pass\n")
    with pytest.raises(AssertionError, match="needs a \\*_reference"):
        test_every_kernel_has_a_reference_a_test_and_a_bench_entry(kernel)
    referenced = kernel.with_name("b.py")
    referenced.write_text("class A(torch.autograd.Function):\n    pass\ndef a_reference(): 1\n")
    with pytest.raises(AssertionError, match=r"test_b\.py is missing"):
        test_every_kernel_has_a_reference_a_test_and_a_bench_entry(referenced)
    (tmp_path / "tests/kernels").mkdir(parents=True)
    (tmp_path / "tests/kernels/test_b.py").touch()
    with pytest.raises(AssertionError, match=r"b\.py has no row in"):
        test_every_kernel_has_a_reference_a_test_and_a_bench_entry(referenced)


def test_the_name_guard_turns_red(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A distribution called `kernels` appears on the path."""
    metadata = tmp_path / "kernels-0.17.2.dist-info/METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.17.2\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(AssertionError, match="pip uninstall kernels"):
        test_the_rooms_are_ours()


@pytest.mark.parametrize(
    ("rule", "file", "text"), OFFENCES, ids=[f"{rule.__name__}-{file}" for rule, file, _ in OFFENCES]
)
def test_each_rule_turns_red(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: Callable[[], None], file: str, text: str
) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    rule()
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(text)
    with pytest.raises(AssertionError, match=re.escape(file.rpartition("/")[0])):
        rule()
