"""What each of several devices holds, and the buffers in which they exchange gradients and weights.

    layout         held by one device                                     buffers
    data parallel  everything                                             all gradients once more
    stage 1        states and master weights of its own parameters        none; with data replicas as data parallel
    stage 2        the same, and their gradients                          pieces of the others' gradients, and the
                                                                          largest gradient until it is sent
    stage 3        a slice of every weight above 2**20 numbers, of its    the weight in use, the next, and the
                   gradient, states and master weight; smaller ones and   gradient of the one in use
                   codes of a quantised base whole
    tensor group   its part of the decoder; stages share these parts      gradients of the weights that are not split

Stages 1 and 2 give whole parameters to devices, so one may hold more than its part: the fullest is counted.

Sources: paddle 3.3.1, `dygraph_sharding_optimizer.py`, `group_sharded_stage2.py`, `group_sharded_storage.py` and
`group_sharded_stage3.py`; PaddleNLP 3.0.0b4, `trainer.py`, for when gradients of replicas are added up by hand.  A test
compares them with what runs allocate on stand-in NPUs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from paddlemix.dry_run.step_sizes import FLOAT32
from paddlemix.parallel.deferred import LARGE

PIECE = 2**23  # numbers of stage 2's buffer for the gradients of one other device
JOINED_AT_ONCE = 2**25  # numbers of a tensor group's message of gradients, as in trainer/steps/partial_gradients.py
STATES = 2 * FLOAT32  # bytes of AdamW's means of gradient and squared gradient, a number


@dataclass(frozen=True, kw_only=True)
class Weight:
    """One parameter, or one weight that is held in few bits.

    Args:
        name: of the parameter.
        part: one of `PARTS`.
        count: numbers, of the part that a device of a tensor group has.
        num_bytes: as it is held.
        trained: whether it gets gradients.
        coded: whether it is held in few bits.
        in_all: numbers of the whole; 0 where it is not split.
        joined: all devices of a tensor group have it whole, and make its gradient one.
    """

    name: str
    part: str
    count: int
    num_bytes: int
    trained: bool
    coded: bool = False
    in_all: int = 0
    joined: bool = False


@dataclass(frozen=True, kw_only=True)
class Training:
    """How weights are trained and spread.

    Args:
        master_weights: float32 copies of trained weights that are held in 2 bytes.
        float32_gradients: gradients are kept in float32 whatever the weights are.
        devices: that share the data, >= 1; a tensor group is one of them.
        sharding_stage: 0 to 3.
        sharding_degree: devices that share one copy, >= 1.
        accumulates: gradients stay while the next micro-batch goes forward.  Else they are freed after every step, and
            grow while activations are freed.
        recompute: replicas then add their gradients up after the last backward pass, and so with float32 gradients and
            with tensor groups.
        tensor_degree: devices of a tensor group, >= 1.
    """

    master_weights: bool = False
    float32_gradients: bool = False
    devices: int = 1
    sharding_stage: int = 0
    sharding_degree: int = 1
    accumulates: bool = True
    recompute: bool = False
    tensor_degree: int = 1

    @property
    def stage(self) -> int:
        """The stage in force: one device alone shares nothing."""
        return self.sharding_stage if self.sharding_degree > 1 else 0

    @property
    def replicas(self) -> int:
        """Copies of what a group of devices shares."""
        return self.devices // self.sharding_degree if self.stage else self.devices

    @property
    def adds_up_afterwards(self) -> bool:
        """Whether replicas exchange gradients in one go, when activations are free again."""
        return self.stage > 0 or self.recompute or self.float32_gradients or self.tensor_degree > 1

    @property
    def keeps_gradients(self) -> bool:
        """Whether gradients have memory while the next activations are made."""
        return self.accumulates or self.stage == 2 or (self.replicas > 1 and not self.adds_up_afterwards)


@dataclass(frozen=True, kw_only=True)
class Held:
    """Bytes of weights on one device."""

    weights: int
    gradients: int
    states: int
    master: int


def gradient_bytes(weight: Weight, training: Training) -> int:
    """Of a trained weight's gradient, whole."""
    return FLOAT32 * weight.count if training.float32_gradients else weight.num_bytes


def own_names(weights: Sequence[Weight], training: Training) -> frozenset[str]:
    """The trained parameters that stage 1 or 2 gives to the device with most of them; all of them without."""
    trained = [weight for weight in weights if weight.trained]
    if training.stage not in (1, 2):
        return frozenset(weight.name for weight in trained)
    # Stage 2 takes them in their order; all devices of a tensor group have to agree, so they count the whole.
    if training.stage == 1 or training.tensor_degree > 1:
        trained.sort(key=lambda weight: weight.in_all or weight.count, reverse=True)
    sizes = [0] * training.sharding_degree
    owners: list[list[Weight]] = [[] for _ in sizes]
    for weight in trained:
        owner = sizes.index(min(sizes))
        sizes[owner] += weight.in_all or weight.count
        owners[owner].append(weight)
    fullest = max(owners, key=lambda own: sum(weight.count for weight in own))
    return frozenset(weight.name for weight in fullest)


def held(weights: Sequence[Weight], own: frozenset[str], training: Training) -> Held:
    """What a device holds of some weights.

    Args:
        weights: of a part of the model.
        own: see `own_names`.
    """
    parts = {weight.name: _slices(weight, training) for weight in weights}
    own_weights = [weight for weight in weights if weight.name in own]
    trained = own_weights if training.stage == 2 else [weight for weight in weights if weight.trained]
    # Only weights held in two bytes get a float32 master copy.
    narrow = [weight for weight in own_weights if weight.num_bytes < FLOAT32 * weight.count]
    return Held(
        weights=sum(-(-weight.num_bytes // parts[weight.name]) for weight in weights),
        gradients=sum(-(-gradient_bytes(weight, training) // parts[weight.name]) for weight in trained),
        states=sum(-(-STATES * weight.count // parts[weight.name]) for weight in own_weights),
        master=sum(-(-FLOAT32 * weight.count // parts[weight.name]) for weight in narrow)
        if training.master_weights
        else 0,
    )


def _slices(weight: Weight, training: Training) -> int:
    """Devices that a weight is sliced over."""
    sliced = training.stage == 3 and weight.count > LARGE and not weight.coded
    return training.sharding_degree if sliced else 1


def exchanged_afterwards(weights: Sequence[Weight], training: Training) -> int:
    """Bytes of gradients in one piece, made when the backward passes are over; 0 where none are.

    Replicas exchange all; a tensor group then those of weights that it does not split.
    """
    joined = _joined_message(weights, training)
    if training.replicas < 2 or not training.adds_up_afterwards:
        return joined
    return max(joined, held(weights, own_names(weights, training), training).gradients)


def _joined_message(weights: Sequence[Weight], training: Training) -> int:
    """Bytes of the largest message of gradients that a tensor group makes one: in float32, and copied into pieces."""
    sizes = [weight.count for weight in weights if weight.joined and weight.trained]
    if training.tensor_degree == 1 or not sizes:
        return 0
    return 2 * FLOAT32 * min(sum(sizes), max(JOINED_AT_ONCE, *sizes))


def buffers_in_passes(weights: Sequence[Weight], training: Training) -> int:
    """Bytes of the buffers that exist while activations do."""
    trained = [weight for weight in weights if weight.trained]
    if training.stage == 2:
        return _pieces(trained, training)
    if training.stage == 3:
        return _gathered(weights, training)
    if training.replicas > 1 and not training.adds_up_afterwards:
        return sum(gradient_bytes(weight, training) for weight in trained)
    return 0


def _pieces(trained: Sequence[Weight], training: Training) -> int:
    """Of stage 2: the buffers of the other devices' gradients, and the largest gradient that is in none of them."""
    own = own_names(trained, training)
    numbers = sum(weight.count for weight in trained if weight.name in own)
    number = max((gradient_bytes(weight, training) // weight.count for weight in trained), default=0)
    pieces = (training.sharding_degree - 1) * min(PIECE, numbers) * number
    # Small gradients fill the buffers; where all find room there, none is sent by itself.
    alone = trained if numbers > PIECE else []
    return pieces + max((_passing(weight, training) for weight in alone), default=0)


def _passing(weight: Weight, training: Training) -> int:
    """Bytes of a trained weight's whole gradient while it is sent, and of that in the weight's own type."""
    return weight.num_bytes + (FLOAT32 * weight.count if training.float32_gradients else 0)


def _gathered(weights: Sequence[Weight], training: Training) -> int:
    """Of stage 3: the weight in use with its gradient, and the one that is gathered for the next layer.

    At least a decoder layer: copies of its outputs, which paddle makes to notice a layer's end, take about as much.
    """
    sliced = [weight for weight in weights if _slices(weight, training) > 1]
    in_use = max((w.num_bytes + (_passing(w, training) if w.trained else 0) for w in sliced), default=0)
    following = max((w.num_bytes for w in sliced if ".layers." in w.name), default=0)
    return max(in_use + following, _largest_layer(sliced))


def _largest_layer(weights: Sequence[Weight]) -> int:
    """Bytes of the largest decoder or tower layer, or of a weight outside of them."""
    layers: dict[str, int] = {}
    for weight in weights:
        # "language_model.layers.3.mlp.up_proj.weight" belongs to "language_model.3"
        head, inside, rest = weight.name.partition(".layers.")
        name = f"{head}.{rest.partition('.')[0]}" if inside else weight.name
        layers[name] = layers.get(name, 0) + weight.num_bytes
    return max(layers.values(), default=0)
