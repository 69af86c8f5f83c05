"""How much memory a training run takes on each device, part by part, before anything is loaded.

    weights           as they are held: 4 bytes a number, 2 in bfloat16 or float16, codes where the base is quantised
    gradients         of what trains, in the weights' type; 4 bytes with amp_master_grad
    optimiser states  AdamW's two means in float32: 8 bytes for each number that trains
    master weights    4 bytes for each that trains, where weights are held in 2
    activations       see `activations.py`

What several devices share of these, and what they need to exchange it, is in `sharing.py`.  It reads no file.

Sources: Rajbhandari et al. 2020, "ZeRO", section 3.1 (16 bytes for each weight in mixed precision); the formulas'
constants are those of our code, the overhead on CPU is measured by `benchmarks/memory.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from paddlemix.dry_run.activations import Activations
from paddlemix.dry_run.sharing import Training, Weight, buffers_in_passes, exchanged_afterwards, held, own_names
from paddlemix.trainer.trainable import PARTS

# What the CPU's heap holds above its tensors: a freed block seldom fits the next request of its size, because paddle
# asks for blocks that begin at a page.  Fitted to five kinds of runs by `benchmarks/memory.py`, glibc 2.36: a share of
# what each step makes, and this number of the largest blocks.
HEAP_SHARE, HEAP_BLOCKS = 0.65, 9


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
        working: what the most expensive moment of a step takes on top: logits of the loss, or a layer's backward pass.
        communication: gradients and weights on their way between devices, see `sharing.py`.
        wide: quantised weights of a layer that are in use, and their decoded scales; on CPU they are few at a time.
        never_together: by how much activations and what follows them stay below their sum.
        overhead: of the allocator.
        program: of the process without a model; of a GPU's own context.
    """

    parts: tuple[PartMemory, ...]
    shared: int
    working: int
    wide: int
    communication: int
    never_together: int
    overhead: int
    program: int

    @property
    def tensors(self) -> int:
        """Of all tensors at the most expensive moment."""
        together = sum(part.total for part in self.parts) + self.shared + self.working + self.wide
        return together + self.communication - self.never_together

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
    own = own_names(weights, training)
    parts = tuple(
        _part_memory(part, [weight for weight in weights if weight.part == part], own, training, activations)
        for part in PARTS
    )
    afterwards = exchanged_afterwards(weights, training)
    gradients = 0 if training.keeps_gradients else sum(part.gradients for part in parts)
    working = activations.working
    # Gradients come while activations go, and what is exchanged comes after both: the sum of all never exists.
    highest = max(
        activations.kept + activations.loss,
        max(activations.kept, gradients) + activations.backward - activations.released,
        gradients + afterwards,
    )
    made_anew = activations.kept + working
    return MemoryEstimate(
        parts=tuple(part for part in parts if part.count),
        shared=activations.shared,
        working=working,
        wide=wide,
        communication=buffers_in_passes(weights, training) + afterwards,
        never_together=activations.kept + working + gradients + afterwards - highest,
        # An accelerator's allocator takes what it has freed before it asks for more; its overhead is not modelled.
        overhead=round(HEAP_SHARE * made_anew + HEAP_BLOCKS * activations.block) if on_cpu else 0,
        program=program,
    )


def _part_memory(
    part: str, weights: Sequence[Weight], own: frozenset[str], training: Training, activations: Activations
) -> PartMemory:
    found = held(weights, own, training)
    return PartMemory(
        part=part,
        count=sum(weight.in_all or weight.count for weight in weights),
        trained=sum(weight.in_all or weight.count for weight in weights if weight.trained),
        weights=found.weights,
        gradients=found.gradients,
        states=found.states,
        master=found.master,
        activations=getattr(activations, part),
    )
