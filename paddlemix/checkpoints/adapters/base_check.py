"""Whether a base model is the one that an adapter was trained on, and what differs if it is not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import paddle

from paddlemix.checkpoints.adapters.adapter import AdapterFiles, fingerprint, weight_shapes
from paddlemix.checkpoints.identity.declared_identity import changed_config
from paddlemix.checkpoints.identity.weight_identity import differing
from paddlemix.checkpoints.pretrained import Pretrained
from paddlemix.checkpoints.source import open_source
from paddlemix.errors import UserError
from paddlemix.identity import listed
from paddlemix.parallel.tensor.parts import part_of

_PARTS = ("vision_tower", "projector", "language_model", "lm_head", "image_newline")


def base_mark(base: Pretrained) -> str:
    """The fingerprint of a base that was just loaded."""
    # float16 lacks small numbers that bfloat16 and the files have, and a process of a tensor group has a part of the
    # rows: the files are read once more
    embedding = base.model.language_model.embed_tokens.weight
    if embedding.dtype != paddle.float16 and part_of(embedding) is None:
        return fingerprint(base.model)
    return fingerprint(base.model, open_source(base.directory, inside=True).tensors())


def base_digests(base: Pretrained) -> dict[str, str]:
    """Our name -> digest of every weight that a loaded base uses; {} if it was not read from files."""
    if base.files is None:
        return {}
    built = weight_shapes(base.model)
    return {name: digest for name, digest in base.files.digests().items() if name in built}


def check_base(base: Pretrained, adapter: AdapterFiles) -> None:
    """Compares a base that was just loaded with the one that an adapter was trained on.

    Every weight counts that is not the adapter's own, and every value that the base's computation uses.

    | adapter of          | is compared by                                                   |
    |---------------------|------------------------------------------------------------------|
    | this version        | declared values, then the digest of every weight                 |
    | an earlier version  | the fingerprint of some weights                                  |
    | another program     | nothing: it says nothing about its base's weights                |

    Raises:
        UserError: they differ; names the values and their file, or the weights.
    """
    if adapter.foreign is not None:
        return
    # declared values first: comparing them costs nothing, digests may take a minute
    changed = changed_config(adapter.base_values(), base.model.config, base.declared_directories)
    if changed:
        raise UserError(f"{_other_base(base, adapter)}: {'; '.join(changed)}{_USE}")
    then, complete = adapter.base_digests(), False
    if then and base.files is not None:
        own = adapter.tensors().keys()
        names = {name for name in weight_shapes(base.model) if name not in own}
        wrong, complete = differing(then, base_digests(base), names)
        if wrong:
            raise UserError(
                f"{_other_base(base, adapter)}: {describe_weights(wrong)}{_advice(wrong, len(names), adapter)}"
            )
    # some weights could not be compared, e.g. codes of unknown origin with floats: the fingerprint covers the rest
    if not complete and base_mark(base) != adapter.fingerprint:
        raise UserError(f"{_other_base(base, adapter)}: its norms or its token embeddings differ{_USE}")


_USE = "; use the model that it was trained on, or what `paddlemix convert` or `paddlemix quantize` makes of it"


def _other_base(base: Pretrained, adapter: AdapterFiles) -> str:
    return f"the adapter {adapter.directory} was trained on another base than {base.directory}"


def _advice(wrong: Sequence[str], compared: int, adapter: AdapterFiles) -> str:
    # The likeliest causes, each with its sign: only adapted weights differ: something was merged into them; all differ:
    # another program rounded them.
    adapted = {f"{module}.weight" for module in adapter.config.modules}
    if set(wrong) <= adapted and len(wrong) > 1:
        return (
            ". All of these are weights that the adapter adapts: the base may be a model that this or another adapter "
            f"was merged into already{_USE}"
        )
    if len(wrong) == compared:
        return f". Every weight differs: it may be a copy in another dtype that another program made{_USE}"
    return _USE


def describe_weights(names: Sequence[str]) -> str:
    """Weights by part, in words: "lm_head: weight; vision_tower: layers.0.mlp.fc1.weight and 4 more"."""
    parts: dict[str, list[str]] = {}
    for name in names:
        part, _, rest = name.partition(".")
        parts.setdefault(part, []).append(rest or part)
    order = sorted(parts, key=lambda part: _PARTS.index(part) if part in _PARTS else len(_PARTS))
    return "; ".join(f"{part}: {listed(parts[part], 3)}" for part in order) + " differ" * bool(parts)


def changed_weights(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Names of the weights that both have and that differ."""
    wrong, _ = differing(then, now, then.keys() & now.keys())
    return wrong
