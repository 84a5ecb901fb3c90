"""
The Rust half of RaNNC.
"""

from _typeshed import SupportsGetItem
from os import PathLike
from typing import SupportsFloat, SupportsIndex, final

__all__ = ["Action", "Graph", "PlacedStage", "PlacedUnit", "Placement", "Plan", "Program", "Slot", "ValueInfo", "canonical_order", "plan"]

@final
class Action:
    """
    One step of one rank.
    """
    def __repr__(self, /) -> str: ...
    def __str__(self, /) -> str: ...
    def gradient_slot(self, /, value: SupportsIndex) -> Slot:
        """
        The slot that holds the gradient of such a value.
        """
    @property
    def group(self, /) -> int:
        """
        The gradient group that it reduces; -1 for other kinds.
        """
    @property
    def kind(self, /) -> str:
        """
        What to do: `forward`, `backward`, `send`, `recv`, `copy`, `reduce_gradients`,
        `reduce_output`.
        """
    @property
    def microbatch(self, /) -> int:
        """
        The microbatch that it runs; 0 for other kinds.
        """
    @property
    def peer(self, /) -> int:
        """
        The other rank of a transfer; -1 for other kinds.
        """
    @property
    def release(self, /) -> bool:
        """
        Whether it is the last use of `slot` on this rank.
        """
    @property
    def rows(self, /) -> int:
        """
        How many rows it computes; 0 for other kinds.
        """
    @property
    def slot(self, /) -> Slot:
        """
        The slot that it sends from, receives into, copies from or reduces.

        An `AttributeError` for other kinds.
        """
    @property
    def slot_rows(self, /) -> tuple[int, int] | None:
        """
        First and last-but-one row of `slot`; none for tensors that have no rows.
        """
    @property
    def stage(self, /) -> int:
        """
        The stage that it runs, or whose slot it moves; -1 where there is none.
        """
    @property
    def to_rows(self, /) -> tuple[int, int] | None:
        """
        The rows of `to_slot`.
        """
    @property
    def to_slot(self, /) -> Slot:
        """
        The slot that it copies to; an `AttributeError` for other kinds.
        """
    @property
    def total(self, /) -> int:
        """
        Rows of the full slot that is received or copied into.
        """
    def value_slot(self, /, value: SupportsIndex) -> Slot:
        """
        The slot that holds a value of the stage and microbatch that it runs.

        A `ValueError` if it runs no stage.
        """

@final
class Graph:
    """
    A captured graph.
    """
    def fingerprint(self, /) -> str:
        """
        A hash that is equal on all ranks that captured the same graph.
        """
    @staticmethod
    def from_json(text: str) -> Graph:
        """
        Reads and checks the JSON form.
        """
    @property
    def inputs(self, /) -> list[int]:
        """
        Ids of the model's tensor arguments.
        """
    @property
    def name(self, /) -> str:
        """
        The model's class name.
        """
    @property
    def num_nodes(self, /) -> int:
        """
        The number of operators.
        """
    @property
    def outputs(self, /) -> list[int]:
        """
        Ids of the model's tensor results.
        """
    @property
    def splittable(self, /) -> bool:
        """
        Whether the model may run on parts of the batch.
        """
    def to_json(self, /) -> str:
        """
        The JSON form.
        """
    @property
    def unsplittable_reason(self, /) -> str | None:
        """
        Why it may not.
        """
    @property
    def values(self, /) -> list[ValueInfo]:
        """
        All values, by id.
        """

@final
class PlacedStage:
    """
    One stage of a placement.
    """
    @property
    def inputs(self, /) -> list[int]:
        """
        Ids of the values it receives.
        """
    @property
    def nodes(self, /) -> list[str]:
        """
        Keys of its operators in the order in which they run.
        """
    @property
    def outputs(self, /) -> list[int]:
        """
        Ids of the values it hands on or returns.
        """
    @property
    def ranks(self, /) -> list[int]:
        """
        The processes that hold a replica.
        """
    @property
    def recompute(self, /) -> list[list[str]]:
        """
        Groups of these whose inner values are computed again in backward; each is together in
        `nodes`.
        """
    @property
    def units(self, /) -> list[PlacedUnit]:
        """
        Its parts, which run one after the other: one, unless gradients or parameters are divided.
        """

@final
class PlacedUnit:
    """
    A part of a stage that runs by itself, with only its own divided parameters whole.
    """
    @property
    def inputs(self, /) -> list[int]:
        """
        Ids of the values it is given.
        """
    @property
    def nodes(self, /) -> list[str]:
        """
        Keys of its operators in the order in which they run.
        """
    @property
    def outputs(self, /) -> list[int]:
        """
        Ids of the values it hands on to later units or out of the stage.
        """

@final
class Placement:
    """
    A plan applied to a graph.
    """
    @property
    def divided(self, /) -> dict[str, str]:
        """
        What the holders of each divided parameter divide, by its name: `optimizer`, `gradients` or
        `parameters`.
        """
    @property
    def gradient_groups(self, /) -> list[tuple[list[int], list[str]]]:
        """
        For each gradient group its ranks and the names of its parameters.
        """
    @property
    def group_sharding(self, /) -> list[str]:
        """
        What the ranks of each gradient group divide among themselves: `none`, `optimizer`,
        `gradients` or `parameters`.
        """
    @property
    def holders(self, /) -> dict[str, list[int]]:
        """
        The ranks that hold each parameter and buffer that a stage uses, by name.
        """
    def program(self, /, rows: SupportsGetItem[int, SupportsIndex], *, gather: bool, training: bool, reduce: bool = True, seeded: bool = True) -> Program:
        """
        Every rank's actions for a batch with these rows per rank, checked.

        In training, gradients are added up between ranks unless `reduce` is false, and backward waits
        for the caller's gradients unless `seeded`, where the plan allows it.
        """
    def reduction(self, /) -> Program:
        """
        Every rank's actions that add up what programs without `reduce` have left, checked; all are in
        the forward pass.
        """
    @property
    def stages(self, /) -> list[PlacedStage]:
        """
        The stages, in the order in which values flow.
        """

@final
class Plan:
    """
    What was decided: a deployment.
    """
    def __str__(self, /) -> str: ...
    def check(self, /, graph: Graph, world_size: SupportsIndex) -> None:
        """
        Raises unless the plan is one for this graph and this many processes.
        """
    @staticmethod
    def from_json(text: str) -> Plan:
        """
        Reads the JSON form.
        """
    @staticmethod
    def load(path: str | PathLike[str]) -> Plan:
        """
        Reads a deployment file.
        """
    @property
    def microbatches(self, /) -> int:
        """
        How many parts the batch is cut into.
        """
    @property
    def num_stages(self, /) -> int:
        """
        The number of stages.
        """
    def place(self, /, graph: Graph, divided: dict[str, str] | None = None) -> Placement:
        """
        Applies the plan to a graph of its model. `divided` is that of the placement in force, if there
        is one.
        """
    @property
    def predicted_bytes(self, /) -> list[int] | None:
        """
        Predicted peak bytes by rank; none for a plan written by hand.
        """
    @property
    def predicted_step_ns(self, /) -> int | None:
        """
        Predicted nanoseconds of a step; none for a plan written by hand.
        """
    def report(self, /, rows: SupportsIndex | None = None) -> str:
        """
        The report that people read; for a global batch of `rows` also how it is cut.
        """
    def save(self, /, path: str | PathLike[str]) -> None:
        """
        Writes a deployment file.
        """
    @property
    def schedule(self, /) -> str:
        """
        `fill_drain` or `1f1b`.
        """
    def shard_at_least(self, /, level: str) -> Plan:
        """
        The same plan with every stage that has several replicas sharded at least so far; the
        estimates stay as they are.
        """
    @property
    def stage_ranks(self, /) -> list[list[int]]:
        """
        The ranks of each stage.
        """
    @property
    def stage_sharding(self, /) -> list[str]:
        """
        What the replicas of each stage divide among themselves: `none`, `optimizer`, `gradients` or
        `parameters`.
        """
    def to_json(self, /) -> str:
        """
        The JSON form.
        """
    @property
    def world_size(self, /) -> int:
        """
        The number of processes.
        """

@final
class Program:
    """
    What every rank does in one step.
    """
    def __str__(self, /) -> str: ...
    def backward(self, /, rank: SupportsIndex) -> list[Action]:
        """
        What `rank` does when the loss is differentiated.
        """
    def forward(self, /, rank: SupportsIndex) -> list[Action]:
        """
        What `rank` does when the model is called.
        """
    @property
    def fused(self, /) -> bool:
        """
        Whether the backward runs within the call of the model, with a gradient of 1 for the loss.
        """

@final
class Slot:
    """
    Where one tensor is in assembly on one rank: a place, a microbatch, a value and a pass.
    """
    def __eq__(self, value: object, /) -> bool: ...
    def __hash__(self, /) -> int: ...
    def __ne__(self, value: object, /) -> bool: ...
    def __repr__(self, /) -> str: ...
    def __str__(self, /) -> str: ...
    @staticmethod
    def sink(value: SupportsIndex, *, gradient: bool = False) -> Slot:
        """
        The slot of one of the model's outputs, or of its gradient.
        """
    @staticmethod
    def source(value: SupportsIndex, *, gradient: bool = False) -> Slot:
        """
        The slot of one of the model's inputs, or of its gradient.
        """
    @property
    def value(self, /) -> int:
        """
        The value in assembly.
        """

@final
class ValueInfo:
    """
    What is known of one tensor of a graph.
    """
    @property
    def dim(self, /) -> int:
        """
        The dimension that holds the rows.
        """
    @property
    def dtype(self, /) -> str:
        """
        The element type as torch spells it.
        """
    @property
    def inner(self, /) -> int:
        """
        How many consecutive entries of that dimension belong to one row.
        """
    @property
    def name(self, /) -> str:
        """
        The parameter's or buffer's qualified name, or the capture's name.
        """
    @property
    def outer(self, /) -> int:
        """
        How many runs of rows that dimension holds.
        """
    @property
    def requires_grad(self, /) -> bool:
        """
        Whether a gradient flows through it.
        """
    def shape(self, /, rows: SupportsIndex) -> list[int]:
        """
        The sizes for a batch of `rows`.
        """
    @property
    def transport(self, /) -> str:
        """
        How it depends on the rows of the batch: `split`, `sum`, or `whole`.
        """

def canonical_order(steps: SupportsGetItem[int, tuple[SupportsGetItem[int, tuple[SupportsIndex, bool]], str, SupportsGetItem[int, SupportsIndex], SupportsGetItem[int, SupportsIndex]]]) -> list[int]:
    """
    The positions of operators in the order that does not depend on when they ran.

    `steps` are in an order in which they can run, each with its place in the program (numbers of the
    calls and loops around it, and whether they are loops), a label, the
    positions of what it reads, and those of what else it must follow.
    """

def plan(graph: Graph, cluster: str, *, profile_json: str | None = None, batch_size: SupportsIndex, optimizer_state_factor: SupportsFloat | SupportsIndex = 2.0, partition_num: SupportsIndex = 0, replica_num: SupportsIndex = 0, pipeline_num: SupportsIndex = 0, min_pipeline: SupportsIndex = 1, max_pipeline: SupportsIndex = 512, max_partition_num: SupportsIndex = 32, mem_limit_gb: SupportsFloat | SupportsIndex = 0.0, mem_margin: SupportsFloat | SupportsIndex = 0.1, schedule: str = "auto", recompute: bool = True, sharding: str = "none", least_sharding: str = "none", progress: bool = False) -> Plan:
    """
    Plans a deployment.

    `cluster` is a cluster's JSON, or a preset as `kind:nodesxdevices`: `a100-40gb:1x8`. The costs are those of `profile_json`, or, without one, estimated for the cluster's devices. With
    `progress`, a search of more than a second shows on a terminal how far it is.
    """
