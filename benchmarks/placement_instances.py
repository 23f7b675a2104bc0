"""Reads the public placement instances, and makes problems of any size.

Three formats of JSON are known: that of "Efficient Algorithms for Device Placement of DNN Graph Operators" (Tarnawski
et al., NeurIPS 2020; github.com/msr-fiddle/dnn-partitioning), which has no name and is called "dnnp" here,
"hetero-chain/1" and "dp-shares/1".
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from lightning_hetero.placement.solve import (
    ChainDevice,
    ChainLink,
    ChainPlan,
    ChainProblem,
    GraphDevice,
    GraphPlan,
    GraphProblem,
    ShareDevice,
    SharesAnswer,
)

Json = dict[str, Any]


@dataclass(frozen=True)
class SharesProblem:
    """A batch to share out; `sync_s` comes on top of the slowest device."""

    devices: list[ShareDevice]
    rows: int
    sync_s: float


@dataclass(frozen=True)
class Graph:
    """A graph instance: `throughput` has a device for each core of the host, `latency` one for all of them."""

    throughput: GraphProblem
    latency: GraphProblem
    ids: list[int]


def read(path: Path) -> Graph | ChainProblem | SharesProblem:
    """Read an instance of any of the three formats.

    Raises:
        ValueError: The file says that it has another format.
    """
    instance = json.loads(path.read_text(encoding="utf-8"))
    form = instance.get("format", "dnnp")
    if form == "dnnp":
        return read_graph(instance)
    if form == "hetero-chain/1":
        return read_chain(instance)
    if form == "dp-shares/1":
        return read_shares(instance)
    raise ValueError(f"{path} has the format {form!r}; known are dnnp (no format named), hetero-chain/1, dp-shares/1")


def read_graph(instance: Json) -> Graph:
    nodes = instance["nodes"]
    ids = [int(node["id"]) for node in nodes]
    spot = {node: index for index, node in enumerate(ids)}
    transfer_s = [0.0] * len(nodes)
    edges, colours = [], defaultdict(list)
    for edge in instance["edges"]:
        maker, user = spot[int(edge["sourceId"])], spot[int(edge["destId"])]
        edges.append((maker, user))
        transfer_s[maker] = float(edge["cost"])
    for index, node in enumerate(nodes):
        if "colorClass" in node:
            colours[node["colorClass"]].append(index)
    accelerators = [
        GraphDevice(name=f"acc{index}", kind="accelerator", memory_bytes=float(instance["maxSizePerFPGA"]))
        for index in range(int(instance["maxFPGAs"]))
    ]
    cores = [GraphDevice(name=f"cpu{index}", kind="cpu") for index in range(int(instance["maxCPUs"]))]
    throughput = GraphProblem(
        seconds={
            "accelerator": [float(n["fpgaLatency"]) if n["supportedOnFpga"] else float("inf") for n in nodes],
            "cpu": [float(node["cpuLatency"]) for node in nodes],
        },
        transfer_s={"accelerator": transfer_s},
        size_bytes=[float(node.get("size", 0.0)) for node in nodes],
        edges=edges,
        devices=(*accelerators, *cores),
        together=list(colours.values()),
        backward=frozenset(index for index, node in enumerate(nodes) if node["isBackwardNode"]),
    )
    host = GraphDevice(name="cpu0", kind="cpu")
    return Graph(throughput=throughput, latency=replace(throughput, devices=(*accelerators, host)), ids=ids)


def read_chain(instance: Json) -> ChainProblem:
    layers, devices = instance["layers"], instance["devices"]
    kinds = sorted({device["type"] for device in devices})
    allowed = {d["name"]: d.get("allow_layers") for d in devices}
    return ChainProblem(
        forward_s={kind: [layer["fwd_s"][kind] for layer in layers] for kind in kinds},
        backward_s={kind: [layer["bwd_s"][kind] for layer in layers] for kind in kinds},
        update_s={kind: [layer.get("update_s", {}).get(kind, 0.0) for layer in layers] for kind in kinds},
        state_bytes=[layer["param_bytes"] * instance["state_multiplier"] for layer in layers],
        activation_bytes=[layer["act_mem_bytes"] for layer in layers],
        output_bytes=[layer["act_out_bytes"] for layer in layers],
        devices=tuple(
            ChainDevice(
                name=device["name"],
                kind=device["type"],
                memory_bytes=device["mem_bytes"],
                allowed=None if allowed[device["name"]] is None else frozenset(allowed[device["name"]]),
            )
            for device in devices
        ),
        links={
            (one["name"], other["name"]): read_link(instance["links"], one, other)
            for one in devices
            for other in devices
            if one is not other
        },
        micro_batches=instance["micro_batches"],
        schedule=instance.get("schedule", "1f1b"),
        fixed_bytes=instance.get("fixed_bytes", 0),
    )


def read_link(links: Json, sender: Json, receiver: Json) -> ChainLink:
    """The link of a pair of devices if it is named, else that within a node or between nodes."""
    node = sender.get("node")
    within = "intra" in links and node is not None and node == receiver.get("node")
    link = links.get("pairs", {}).get(f"{sender['name']}->{receiver['name']}") or links["intra" if within else "inter"]
    if "by_type" in link:
        by_type = link["by_type"]
        link = by_type.get(f"{sender['type']}->{receiver['type']}") or by_type["default"]
    return ChainLink(latency_s=link["lat_s"], bytes_per_s=link["bw_Bps"])


def read_shares(instance: Json) -> SharesProblem:
    largest = instance["max_micro_batch"]
    tables = {
        kind: {int(rows): seconds for rows, seconds in table.items() if int(rows) <= largest[kind]}
        for kind, table in instance["step_s"].items()
    }
    devices = [ShareDevice(name=d["name"], seconds=tables[d["type"]]) for d in instance["devices"]]
    return SharesProblem(devices, int(instance["global_batch"]), float(instance.get("sync_s", 0.0)))


def graph_placement(graph: Graph, plan: GraphPlan) -> Json:
    """A plan as the tools of the dnnp format read it."""
    return {"assignment": {str(node): device for node, device in zip(graph.ids, plan, strict=True)}}


def chain_placement(plan: ChainPlan) -> Json:
    return {"stages": [{"device": stage.device, "layers": [stage.first, stage.stop]} for stage in plan]}


def shares_placement(answer: SharesAnswer) -> Json:
    return {"shares": {share.device: share.rows for share in answer.shares}}


def made_chain(layers: int, counts: tuple[int, ...]) -> ChainProblem:
    """Layers of unequal size on so many devices of each kind; each kind slower than the one before, links unequal."""
    random = Random(0)
    kinds = [f"kind{index}" for index in range(len(counts))]
    work = [random.uniform(0.5, 1.5) * 1e-3 for _ in range(layers)]
    pace = {kind: 1.0 + 1.3 * index for index, kind in enumerate(kinds)}
    devices = tuple(
        ChainDevice(name=f"{kind}-{index}", kind=kind, memory_bytes=40e9 / sum(counts))
        for kind, count in zip(kinds, counts, strict=True)
        for index in range(count)
    )
    near, far = ChainLink(latency_s=1e-5, bytes_per_s=1e10), ChainLink(latency_s=5e-5, bytes_per_s=1e9)
    return ChainProblem(
        forward_s={kind: [seconds * pace[kind] for seconds in work] for kind in kinds},
        backward_s={kind: [2 * seconds * pace[kind] * random.uniform(0.9, 1.1) for seconds in work] for kind in kinds},
        state_bytes=[random.uniform(0.5, 1.5) * 8e9 / layers for _ in range(layers)],
        activation_bytes=[random.uniform(0.5, 1.5) * 50e6 / layers for _ in range(layers)],
        output_bytes=[random.uniform(0.5, 1.5) * 1e6 for _ in range(layers)],
        devices=devices,
        links={(a.name, b.name): near if a.kind == b.kind else far for a in devices for b in devices if a != b},
        micro_batches=16,
    )


def made_graph(operators: int, counts: tuple[int, ...]) -> GraphProblem:
    """Blocks of twelve operators in the manner of a transformer, on so many devices of each kind."""
    random = Random(0)
    # Within a block: input, three branches that meet, a product, a path around them, two wide layers, a path again.
    block = [(0, 1), (0, 2), (0, 3), (1, 4), (2, 4), (4, 5), (5, 6), (3, 6), (6, 7), (7, 8), (0, 8), (8, 9), (9, 10)]
    block += [(10, 11), (8, 11)]
    edges = [(first + a, first + b) for first in range(0, operators - 11, 12) for a, b in block]
    edges += [(node - 1, node) for node in range(12, operators) if node % 12 == 0 or node >= operators - operators % 12]
    work = [random.uniform(0.1, 2.0) for _ in range(operators)]
    pace = {f"kind{index}": 1.0 + 0.7 * index for index in range(len(counts))}
    transfer = [random.uniform(0.05, 0.5) for _ in range(operators)]
    return GraphProblem(
        seconds={kind: [seconds * factor for seconds in work] for kind, factor in pace.items()},
        transfer_s=dict.fromkeys(pace, transfer),
        size_bytes=[1.0] * operators,
        edges=edges,
        devices=tuple(
            GraphDevice(name=f"{kind}-{index}", kind=kind, memory_bytes=2.0 * operators / sum(counts))
            for kind, count in zip(pace, counts, strict=True)
            for index in range(count)
        ),
    )
