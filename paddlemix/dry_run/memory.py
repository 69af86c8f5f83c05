"""How much memory a training run takes on each device, part by part, before anything is loaded.

    weights           as they are held: 4 bytes a number, 2 in bfloat16 or float16, codes where the base is quantised
    gradients         of what trains, in the weights' type; 4 bytes with amp_master_grad
    optimiser states  AdamW's two means in float32: 8 bytes for each number that trains
    master weights    4 bytes for each that trains, where weights are held in 2
    activations       see `activations.py`

Sharding divides by its degree: stage 1 states and master weights, stage 2 gradients too, stage 3 weights too; with
offload, states and master weights are in host memory.  It reads no file.

Sources: Rajbhandari et al. 2020, "ZeRO", section 3.1 (16 bytes for each weight in mixed precision); the formulas'
constants are those of our code, the overhead on CPU is measured by `benchmarks/memory.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from paddlemix.dry_run.activations import Activations
from paddlemix.dry_run.step_sizes import FLOAT32
from paddlemix.trainer.trainable import PARTS

# What the CPU's heap holds above its tensors: a freed block seldom fits the next request of its size, because paddle
# asks for blocks that begin at a page.  Fitted to five kinds of runs by `benchmarks/memory.py`, glibc 2.36: a share of
# what each step makes, and this number of the largest blocks.
HEAP_SHARE, HEAP_BLOCKS = 0.65, 9
_STATES = 2 * FLOAT32  # AdamW: means of gradient and squared gradient


@dataclass(frozen=True, kw_only=True)
class Weight:
    """One parameter, or one weight that is held in few bits.

    Args:
        name: of the parameter.
        part: one of `PARTS`.
        count: numbers.
        num_bytes: as it is held.
        trained: whether it gets gradients.
    """

    name: str
    part: str
    count: int
    num_bytes: int
    trained: bool


@dataclass(frozen=True, kw_only=True)
class Training:
    """How weights are trained and spread.

    Args:
        master_weights: float32 copies of trained weights that are held in 2 bytes.
        float32_gradients: gradients are kept in float32 whatever the weights are.
        sharding_stage: 0 to 3.
        sharding_degree: devices that share one copy, >= 1.
        offload: states and master weights are in host memory.
        accumulates: gradients stay while the next micro-batch goes forward.  Else they are freed after every step, and
            grow while activations are freed.
    """

    master_weights: bool = False
    float32_gradients: bool = False
    sharding_stage: int = 0
    sharding_degree: int = 1
    offload: bool = False
    accumulates: bool = True


@dataclass(frozen=True, kw_only=True)
class PartMemory:
    """Bytes of one part on each device, and its numbers in all."""

    part: str
    count: int
    trained: int
    weights: int
    gradients: int
    states: int
    master: int
    activations: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.gradients + self.states + self.master + self.activations


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes on each device.

    Args:
        parts: those that the model has.
        shared: activations that belong to no part: rotary tables and masks.
        working: what the most expensive moment of a step takes on top: logits of the loss, or a layer's backward pass;
            with sharding stage 3 also a whole layer's weights.
        wide: quantised weights of a layer that are in use, and their decoded scales; on CPU they are few at a time.
        never_together: by how much activations and gradients together stay below their sum.
        overhead: of the allocator.
        program: of the process without a model; of a GPU's own context.
    """

    parts: tuple[PartMemory, ...]
    shared: int
    working: int
    wide: int
    never_together: int
    overhead: int
    program: int

    @property
    def tensors(self) -> int:
        """Of all tensors at the most expensive moment."""
        return sum(part.total for part in self.parts) + self.shared + self.working + self.wide - self.never_together

    @property
    def total(self) -> int:
        """What the device needs."""
        return self.tensors + self.overhead + self.program


def estimate_memory(
    weights: Sequence[Weight],
    activations: Activations,
    training: Training,
    on_cpu: bool,
    program: int = 0,
    wide: int = 0,
) -> MemoryEstimate:
    """Memory of a training step on each device.

    Args:
        weights: of the whole model.
        activations: of the largest micro-batch.
        training: how weights are trained and spread.
        on_cpu: the heap's overhead is then added.
        program: bytes of the process without a model.
        wide: bytes of quantised weights that are made wide, off the CPU.
    """
    kept = {part: getattr(activations, part) for part in PARTS}
    working = activations.working + (_largest_group(weights) if training.sharding_stage == 3 else 0)
    parts = tuple(
        _part_memory(part, [weight for weight in weights if weight.part == part], training, kept[part])
        for part in PARTS
    )
    made_anew = activations.kept + working
    return MemoryEstimate(
        parts=tuple(part for part in parts if part.count),
        shared=activations.shared,
        working=working,
        wide=wide,
        # Without accumulation gradients grow in the backward pass while activations are freed: the smaller of the two
        # never adds to the peak.
        never_together=0 if training.accumulates else min(sum(part.gradients for part in parts), activations.kept),
        # An accelerator's allocator takes what it has freed before it asks for more; its overhead is not modelled.
        overhead=round(HEAP_SHARE * made_anew + HEAP_BLOCKS * activations.block) if on_cpu else 0,
        program=program,
    )


def _largest_group(weights: Sequence[Weight]) -> int:
    """Bytes of the largest layer, which stage 3 gathers whenever it is used."""
    groups: dict[str, int] = {}
    for weight in weights:
        # "language_model.layers.3.mlp.up_proj.weight" belongs to the group "language_model.3"
        head, inside, rest = weight.name.partition(".layers.")
        name = f"{head}.{rest.partition('.')[0]}" if inside else weight.name
        groups[name] = groups.get(name, 0) + weight.num_bytes
    return max(groups.values(), default=0)


def _part_memory(part: str, weights: Sequence[Weight], training: Training, activations: int) -> PartMemory:
    trained = [weight for weight in weights if weight.trained]
    numbers = sum(weight.count for weight in trained)
    gradients = sum(FLOAT32 * weight.count if training.float32_gradients else weight.num_bytes for weight in trained)
    # Only weights held in two bytes get a float32 master copy.
    narrow = sum(weight.count for weight in trained if weight.num_bytes < FLOAT32 * weight.count)

    # ZeRO's stages: 1 shares states and master weights, 2 gradients too, 3 weights too.
    def share(num_bytes: int, first_stage: int) -> int:
        degree = training.sharding_degree if training.sharding_stage >= first_stage else 1
        return -(-num_bytes // degree)

    return PartMemory(
        part=part,
        count=sum(weight.count for weight in weights),
        trained=numbers,
        weights=share(sum(weight.num_bytes for weight in weights), 3),
        gradients=share(gradients, 2),
        states=0 if training.offload else share(_STATES * numbers, 1),
        master=share(FLOAT32 * narrow, 1) if training.master_weights and not training.offload else 0,
        activations=activations,
    )
