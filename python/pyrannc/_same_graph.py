"""Says where the graphs of processes differ."""

from __future__ import annotations

import itertools
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import _core
    from .comm import Communicator


def first_difference(comm: Communicator, graph: _core.Graph) -> str:
    """What differs first between the graphs of rank 0 and of another rank; collective."""
    graphs = comm.all_gather_objects(_described(json.loads(graph.to_json())))
    for rank, other in enumerate(graphs):
        for here, there in itertools.zip_longest(graphs[0], other, fillvalue="nothing more"):
            if here != there:
                return f"rank 0 has {here}, rank {rank} has {there}"
    return "their graphs differ"


def _described(graph: dict[str, Any]) -> list[str]:
    """The parts of a graph, one after the other, in words."""
    values = graph["values"]
    names = {index: value["name"] for index, value in enumerate(values)}
    parts = [f"a batch that {graph['batch'].get('reason', 'can be split')}"]
    parts += [
        f"the {value['kind']} `{value['name']}`, {_type(value)}"
        for value in values
        if value["kind"] != "activation"
    ]
    for node in graph["nodes"]:
        read = ", ".join(f"`{names[index]}`" for index in node["inputs"])
        names.update(dict.fromkeys(node["outputs"], node["key"]))
        made = ", ".join(_type(values[index]) for index in node["outputs"])
        parts.append(f"`{node['key']}` of {read or 'nothing'}, giving {made or 'nothing'}")
    results = ", ".join(f"`{names[index]}`" for index in graph["outputs"])
    return [*parts, f"the results {results}"]


def _type(value: dict[str, Any]) -> str:
    gradient = " with gradient" if value["requires_grad"] else ""
    return f"{value['dtype']}{value['shape']} by {value['rows']}{gradient}"
