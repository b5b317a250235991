"""The documentation says what the code does: the reference page, links, paths, keys, and commands that compose."""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from configs import SECTIONS, compose, reference
from configs.messages import schema_keys
from scripts.bench_implementations import parse_implementation

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "BENCHMARKS.md", *sorted((ROOT / "docs").glob("*.md"))]
KEYS = {key for kind in SECTIONS.values() for key in schema_keys(kind)}
TOOLS = {
    "train.py": "config",
    "mfu_report.py": "config",
    "prepare_data.py": "config",
    "inspect_data.py": "config",
    "train_tokenizer.py": "config",
    "compare_attention.py": "compare",
    "scaling.py": "scaling",
    "forecast.py": "forecast",
}
"""Commands whose arguments are keys -> their primary config."""
ARGPARSE = ("bench_attention", "bench_norms", "sample", "export_hf", "import_hf", "profile_host", "compile_check")
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def test_the_reference_is_made_of_the_schema() -> None:
    """Every key, its values, its default and what it means; each option of each group."""
    shown = (ROOT / "docs" / "configuration.md").read_text()
    missing = [key for key in KEYS if f"| `{key}` |" not in shown]
    assert not missing, f"python -m configs.reference > docs/configuration.md: it lacks {missing}"
    assert shown == reference.page(), "stale: python -m configs.reference > docs/configuration.md"


def prose(page: Path) -> str:
    """A page without its code."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"^    .*$", "", text, flags=re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the headings: lower case, dashes for spaces, no other punctuation."""
    titles = re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pages
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if link.startswith("http"):
            continue
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), f"{page.name}: {link} is not there"
        assert not anchor or anchor in anchors(target), f"{page.name}: {target.name} has no heading {anchor}"


def test_every_picture_is_shown_somewhere() -> None:
    text = "".join(page.read_text() for page in PAGES)
    assert not [picture.name for picture in (ROOT / "docs").glob("*.png") if f"{picture.name})" not in text]


@pages
def test_paths_and_keys_exist(page: Path) -> None:
    text = page.read_text()
    for path in re.findall(
        r"\b(?:configs|data|docs|kernels|model|scripts|tests|training)/[\w/.-]*\.(?:py|md|png|json)\b", text
    ):
        assert (ROOT / path).exists() or (ROOT / "docs" / path).exists(), f"{page.name}: {path} is not there"
    for module in re.findall(r"python -m ((?:tests|training|configs)[\w.]*)", text):
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").exists(), f"{page.name}: no module {module}"
    sections = "|".join({key.split(".")[0] for key in KEYS if "." in key})
    for code in re.findall(r"`([^`\n]+)`", prose(page)):
        for key in re.findall(rf"(?<![\w./])(?:{sections})\.(?!py\b|json\b|png\b)[a-z0-9_]+\b(?=$|[= ,)])", code):
            module = ROOT / key.replace(".", "/")
            known = key in KEYS or module.is_dir() or module.with_suffix(".py").exists()
            assert known, f"{page.name}: there is no key {key}"


def commands(page: Path) -> Iterator[tuple[str, list[str]]]:
    """Commands of a page that can be read as they stand: the tool's file name and its arguments."""
    text = page.read_text()
    for name, value in re.findall(r'\b([TRM])="([^"]*)"', text):  # what a page abbreviates
        text = text.replace(f"${name} ", f"{value} ")
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    blocks += re.findall(r"(?:^    .*\n)+", text, flags=re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(page))]
    for line in lines:
        found = re.search(
            r"(?:python|train\.py|torchrun|deepspeed|srun).*?\b(\w+\.py)\b(.*)", re.sub(r"\s#\s.*", "", line)
        )
        if found and not re.search(r"…|\.\.\.|\bKEY\b|\$|python -c|^[TRM]=.torchrun", line):
            yield found[1], shlex.split(found[2])


@pages
def test_commands_compose(page: Path) -> None:
    """Keys and values of every command that takes keys, as the command line would read them."""
    for tool, arguments in commands(page):
        if tool in TOOLS:
            swept = "--multirun" in arguments
            given = [a for a in arguments if "=" in a and not a.startswith(("-", "hydra"))]
            compose([a for a in given if not (swept and "," in a)], TOOLS[tool])


@pytest.mark.parametrize("name", ARGPARSE)
def test_flags_exist(name: str) -> None:
    """Every flag of every command in the documentation that is not Hydra's."""
    used = {a for page in PAGES for tool, arguments in commands(page) if tool == f"{name}.py" for a in arguments}
    given = subprocess.run(
        [sys.executable, f"scripts/{name}.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    unknown = {flag for flag in used if re.match(r"--?[a-z]", flag)} - set(re.findall(r"--?[a-z][\w-]*", given.stdout))
    assert not unknown, f"scripts/{name}.py has no {unknown}"


def test_variants_of_tiles_exist() -> None:
    """Every `hopper[...]` and `portable[...]`, also of the bench's own documentation, names fields that are there."""
    texts = [*(page.read_text() for page in PAGES), (ROOT / "scripts" / "bench_attention.py").read_text()]
    variants = {v for text in texts for v in re.findall(r"\b(?:hopper|portable)\[\w+=[^\].]*\]", text)}
    assert len(variants) > 10
    for variant in sorted(variants):
        with parse_implementation("".join(variant.split()))[1]():
            pass
