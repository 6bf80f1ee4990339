"""The import graphs of `docs/architecture.md`, drawn from the code: `python -m docs.diagram` writes them anew.

An arrow points at what a module stands on; one that follows from others is left out.
"""

import re
from pathlib import Path

import grimp
import networkx

PAGE = Path(__file__).with_name("architecture.md")
PROGRAMS = ("__main__", "__init__")


def rooms() -> networkx.DiGraph:
    """What each module of the library and of the service imports, without what it has at second hand anyway."""
    code = grimp.build_graph("sdxl_lab", "service")
    graph = networkx.DiGraph()
    for module in code.modules:
        for other in code.find_modules_directly_imported_by(module):
            user, used = (".".join(name.split(".")[:2]) for name in (module, other))
            if "." in used and user != used and not user.endswith(PROGRAMS):
                graph.add_edge(user, used)
    graph.remove_nodes_from([node for node in graph if node == "sdxl_lab.nano"])
    return networkx.transitive_reduction(graph)


def diagram(graph: networkx.DiGraph, package: str) -> str:
    """The modules of a package and what of others they import, in mermaid's notation."""
    edges = sorted((user, used) for user, used in graph.edges if user.startswith(package))
    lines = [
        f"  {user.split('.')[1]} --> {used if package not in used else used.split('.')[1]}" for user, used in edges
    ]
    return "\n".join(["```mermaid", "flowchart TB", *lines, "```"])


def page(text: str) -> str:
    """The page with its diagrams drawn anew."""
    graph = rooms()
    found = re.compile(r"<!-- imports of (\w+) -->\n```mermaid\n.*?```", re.S)
    return found.sub(lambda match: f"<!-- imports of {match[1]} -->\n{diagram(graph, match[1])}", text)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
