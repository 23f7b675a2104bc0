"""The solvers behind the policies, as pure arithmetic: numbers in, plans with proofs out."""

from lightning_hetero.placement.solve.chain import solve_chain
from lightning_hetero.placement.solve.chain_bottleneck import ChainAnswer
from lightning_hetero.placement.solve.chain_local import Effort
from lightning_hetero.placement.solve.chain_order import least_bottleneck_in_order, search_orders
from lightning_hetero.placement.solve.chain_problem import (
    ChainDevice,
    ChainLink,
    ChainPlan,
    ChainProblem,
    ChainStage,
)
from lightning_hetero.placement.solve.graph import solve_graph
from lightning_hetero.placement.solve.graph_calls import latency_s
from lightning_hetero.placement.solve.graph_latency import solve_latency
from lightning_hetero.placement.solve.graph_problem import GraphDevice, GraphPlan, GraphProblem
from lightning_hetero.placement.solve.graph_search import GraphAnswer
from lightning_hetero.placement.solve.heft import HeftAnswer, heft
from lightning_hetero.placement.solve.pipeline import StageCost, step_formula_s, step_time_s
from lightning_hetero.placement.solve.proof import Proof
from lightning_hetero.placement.solve.shares import Share, ShareDevice, SharesAnswer, solve_shares

__all__ = [
    "ChainAnswer",
    "ChainDevice",
    "ChainLink",
    "ChainPlan",
    "ChainProblem",
    "ChainStage",
    "Effort",
    "GraphAnswer",
    "GraphDevice",
    "GraphPlan",
    "GraphProblem",
    "HeftAnswer",
    "Proof",
    "Share",
    "ShareDevice",
    "SharesAnswer",
    "StageCost",
    "heft",
    "latency_s",
    "least_bottleneck_in_order",
    "search_orders",
    "solve_chain",
    "solve_graph",
    "solve_latency",
    "solve_shares",
    "step_formula_s",
    "step_time_s",
]
