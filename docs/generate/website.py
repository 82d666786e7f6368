"""The documentation as a small website with a search: the pages of docs/ and the API from the docstrings.

    make docs                                  # or: python docs/generate/website.py [--out docs/site]
    python -m http.server -d docs/site         # http://127.0.0.1:8000/

Needs the extra `docs` (MkDocs Material and mkdocstrings). The API pages list what the folders of the package offer, in
the order of the pipeline; mkdocstrings reads the sources, so nothing is imported and no torch is needed. Links of the
pages to files of the repository stay text. Works without network: no fonts and no scripts from elsewhere.
"""

import argparse
import ast
import re
import shutil
import sys
import tempfile
from pathlib import Path

from tree import FOLDERS, ROOT, first_sentence

PAGES = (
    ("Start", "README.md"),
    ("Which objective", "docs/objectives.md"),
    ("Data", "docs/data.md"),
    ("Training", "docs/training.md"),
    ("Evaluation", "docs/evaluation.md"),
    ("Mixture of experts", "docs/moe.md"),
    ("Cost", "docs/cost.md"),
    ("Scale", "docs/scale.md"),
    ("The article, claim by claim", "docs/claims.md"),
    ("Claims with real language models", "docs/claims-language.md"),
    ("Claims of the combination", "docs/claims-combination.md"),
    ("Every key of a recipe", "docs/recipes.md"),
    ("Troubleshooting", "docs/troubleshooting.md"),
    ("Glossary", "docs/glossary.md"),
    ("Workshop", "recipes/workshop/README.md"),
    ("Contributing", "CONTRIBUTING.md"),
    ("中文：开始", "README.zh-CN.md"),
    ("中文：工作坊", "recipes/workshop/README.zh-CN.md"),
)
PICTURES = "docs/pictures"


def offered(face: Path) -> dict[str, list[str]]:
    """{module: names} that a face hands on, read from its source."""
    for node in ast.walk(ast.parse(face.read_text(encoding="utf-8"))):
        if isinstance(node, ast.keyword) and node.arg == "submod_attrs":
            return ast.literal_eval(node.value)
    return {}


def api_page(folder: str) -> str | None:
    """One folder's page: its sentence, then every name that its face offers with its docstring. None for none."""
    face = ROOT / "distill" / folder / "__init__.py"
    names = offered(face)
    if not names:
        return None
    package = ".".join(["distill", *filter(None, folder.split("/"))])
    lines = [f"# {package}", "", f"{first_sentence(face)}.", ""]
    for module, public in names.items():
        for name in public:
            lines += [
                f"::: {package}.{module}.{name}",
                "    options:",
                f"      heading: {package}.{name}",
                "",
            ]
    return "\n".join(lines)


def site_page(file: str, text: str) -> str:
    """A page of the repository as a page of the site: links between pages kept, links to other files made text."""
    places = {page: _name(page) for _, page in PAGES}
    text = re.sub(r"(?m)^```(\w+) slow$", r"```\1", text)  # how a block is tested is no language of a fence

    def link(match: re.Match) -> str:
        words, target = match[1], match[2]
        if "://" in target or target.startswith("#"):
            return match[0]
        path, hash_, anchor = target.partition("#")
        whole = (ROOT / file).parent / path
        try:
            known = places.get(str(whole.resolve().relative_to(ROOT)))
        except ValueError:
            known = None
        return f"[{words}]({known}{hash_}{anchor})" if known else words

    return re.sub(r"\[([^\[\]]+)\]\(([^()\s]+)\)", link, text)


def configuration(work: Path, out: Path, api: list[str]) -> dict:
    nav = [{title: _name(file)} for title, file in PAGES]
    return {
        "site_name": "distill",
        "docs_dir": str(work / "pages"),
        "site_dir": str(out),
        "use_directory_urls": False,
        "theme": {
            "name": "material",
            "font": False,
            "features": ["navigation.sections", "toc.follow", "content.code.copy", "search.suggest"],
            "palette": [
                {"media": "(prefers-color-scheme: light)", "scheme": "default", "primary": "indigo"},
                {"media": "(prefers-color-scheme: dark)", "scheme": "slate", "primary": "indigo"},
            ],
        },
        "plugins": [
            "search",
            {
                "mkdocstrings": {
                    "handlers": {
                        "python": {
                            "paths": [str(ROOT)],
                            "options": {
                                "docstring_style": None,
                                "show_root_heading": True,
                                "show_source": False,
                                "separate_signature": True,
                                "show_signature_annotations": True,
                                "heading_level": 2,
                            },
                        }
                    }
                }
            },
        ],
        "markdown_extensions": ["tables", "admonition", "toc", "pymdownx.superfences", "md_in_html"],
        "nav": [*nav, {"From Python": api}],
        "validation": {"links": {"not_found": "info", "anchors": "info"}},
    }


def _name(file: str) -> str:
    if file == "README.md":
        return "index.md"
    lessons = "recipes/workshop/"
    return file.removeprefix(lessons).replace("README", "workshop") if lessons in file else Path(file).name


def build(out: Path) -> None:
    """Write the site to `out`, whole or not at all."""
    from mkdocs.commands.build import build as mkdocs_build
    from mkdocs.config import load_config

    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        (work / "pages" / "api").mkdir(parents=True)
        for _, file in PAGES:
            text = site_page(file, (ROOT / file).read_text(encoding="utf-8"))
            (work / "pages" / _name(file)).write_text(text, encoding="utf-8")
        shutil.copytree(ROOT / PICTURES, work / "pages" / PICTURES)
        api = []
        for folder in FOLDERS:
            if page := api_page(folder):
                name = f"api/{folder.replace('/', '-') or 'distill'}.md"
                (work / "pages" / name).write_text(page, encoding="utf-8")
                api.append(name)
        made = work / "site"
        # MkDocs wants a configuration file to be somewhere; everything it says is given here.
        (work / "mkdocs.yml").write_text("site_name: distill\n", encoding="utf-8")
        mkdocs_build(load_config(str(work / "mkdocs.yml"), **configuration(work, made, api)))
        shutil.rmtree(out, ignore_errors=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(made, out)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "site", metavar="FOLDER")
    arguments = parser.parse_args(argv)
    try:
        build(arguments.out)
    except ImportError:
        print("the site needs an extra: pip install -e '.[docs]'", file=sys.stderr)
        return 2
    print(f"{arguments.out / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
