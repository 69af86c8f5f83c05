"""Names of weights: ours <-> those of each checkpoint layout.

A layout is a table of prefixes and, for the tower, a second table of what follows the prefix; both are used in both
directions.  Which layout a directory has is decided in `recognise.py`.

Our own names are those of the model's parameters: `language_model.`, `lm_head.`, `projector.`, `vision_tower.`,
`image_newline`.  Linear weights are [in, out] with us and in PaddleMIX, [out, in] in torch layouts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

Pairs = tuple[tuple[str, str], ...]

# what follows the tower's prefix: ours, transformers' CLIPVisionModel ("pre_layrnorm" is spelt so there)
_TOWER_TORCH: Pairs = (
    ("class_embedding", "embeddings.class_embedding"),
    ("patch_embedding", "embeddings.patch_embedding.weight"),
    ("position_embedding", "embeddings.position_embedding.weight"),
    ("pre_layernorm.", "pre_layrnorm."),
    ("layers.", "encoder.layers."),
    ("post_layernorm.", "post_layernorm."),
)
# the same for PaddleMIX; its feed-forward and norms have other names inside a layer
_TOWER_PADDLEMIX: Pairs = (
    ("class_embedding", "class_embedding"),
    ("patch_embedding", "conv1.weight"),
    ("position_embedding", "positional_embedding.weight"),
    ("pre_layernorm.", "ln_pre."),
    ("layers.", "transformer.layers."),
    ("post_layernorm.", "ln_post."),
)
_LAYER_PADDLEMIX: Pairs = (
    (".mlp.fc1.", ".linear1."),
    (".mlp.fc2.", ".linear2."),
    (".layer_norm1.", ".norm1."),
    (".layer_norm2.", ".norm2."),
)
# the same for InternViT, which joins query, key and value; see `towers.split_tower`
_TOWER_INTERN_VIT: Pairs = (
    ("class_embedding", "embeddings.class_embedding"),
    ("patch_embedding", "embeddings.patch_embedding.weight"),
    ("patch_bias", "embeddings.patch_embedding.bias"),
    ("position_embedding", "embeddings.position_embedding"),
    ("layers.", "encoder.layers."),
)
_LAYER_INTERN_VIT: Pairs = (
    (".self_attn.out_proj.", ".attn.proj."),
    (".self_attn.", ".attn."),
    (".layer_norm1.", ".norm1."),
    (".layer_norm2.", ".norm2."),
    (".layer_scale1.weight", ".ls1"),
    (".layer_scale2.weight", ".ls2"),
)
# buffers that some files carry and no model needs
_IGNORED = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|embeddings\.position_ids|rope_emb\..*)")


@dataclass(frozen=True)
class KeyMap:
    """One layout's names.

    Args:
        name: for messages.
        prefixes: (ours, theirs), the longer of two that begin alike first.
        tower: (ours, theirs) after the tower's prefix.
        inside_layers: (ours, theirs) inside a tower layer's name.
        language: (ours, theirs) inside the name of a language model's weight.
        transposed: whether linear weights are [out, in].
        ignored: prefixes of weights that the layout has and no model of ours needs.
    """

    name: str
    prefixes: Pairs
    tower: Pairs = _TOWER_TORCH
    inside_layers: Pairs = ()
    language: Pairs = ()
    transposed: bool = True
    ignored: tuple[str, ...] = ()

    def to_ours(self, key: str) -> str | None:
        """Our name of one of the layout's weights; None for one that no model needs.

        Raises:
            KeyError: the layout has no such weight.
        """
        if _IGNORED.fullmatch(key) or key.startswith(self.ignored):
            return None
        for ours, theirs in self.prefixes:  # in order: "model." is a prefix of "model.mm_projector."
            if key.startswith(theirs):
                rest = key[len(theirs) :]
                if ours == "language_model.":
                    rest = _replaced(rest, tuple((new, old) for old, new in self.language))
                return ours + (self._tower_to_ours(rest) if ours == "vision_tower." else rest)
        raise KeyError(key)

    def to_theirs(self, name: str) -> str:
        """The layout's name of one of our weights.

        Raises:
            KeyError: the layout has no place for it.
        """
        for ours, theirs in self.prefixes:
            if name.startswith(ours):
                rest = name[len(ours) :]
                if ours == "language_model.":
                    rest = _replaced(rest, self.language)
                return theirs + (self._tower_to_theirs(rest) if ours == "vision_tower." else rest)
        raise KeyError(name)

    def _tower_to_ours(self, rest: str) -> str:
        for ours, theirs in self.tower:
            if rest.startswith(theirs):
                rest = ours + rest[len(theirs) :]
                for our_part, their_part in self.inside_layers:
                    rest = rest.replace(their_part, our_part)
                return rest
        raise KeyError(rest)

    def _tower_to_theirs(self, rest: str) -> str:
        for our_part, their_part in self.inside_layers:
            rest = rest.replace(our_part, their_part)
        for ours, theirs in self.tower:
            if rest.startswith(ours):
                return theirs + rest[len(ours) :]
        raise KeyError(rest)


def _replaced(name: str, pairs: Pairs) -> str:
    """A name in which the first matching pair's old part is replaced by its new one."""
    for old, new in pairs:
        if old in name:
            return name.replace(old, new, 1)
    return name


OURS = KeyMap(
    "paddlemix",
    tuple((name, name) for name in ("language_model.", "lm_head.", "projector.", "vision_tower.", "image_newline")),
    tower=(("", ""),),
    transposed=False,
)
# Source: LlavaLlamaForCausalLM of haotian-liu/LLaVA
ORIGINAL = KeyMap(
    "original LLaVA",
    (
        ("image_newline", "model.image_newline"),
        ("projector.", "model.mm_projector."),
        ("vision_tower.", "model.vision_tower.vision_tower.vision_model."),
        ("lm_head.", "lm_head."),
        ("language_model.", "model."),
    ),
)
# the same with InternViT.  Source: internvl_chat_llava of OpenGVLab/InternVL
ORIGINAL_INTERN_VIT = KeyMap(
    "InternVL-Chat-LLaVA",
    tuple((ours, theirs.replace(".vision_model.", ".")) for ours, theirs in ORIGINAL.prefixes),
    tower=_TOWER_INTERN_VIT,
    inside_layers=_LAYER_INTERN_VIT,
)
_HF_PROJECTOR: Pairs = (("projector.0.", "linear_1."), ("projector.2.", "linear_2."))
# Source: LlavaForConditionalGeneration of transformers, as saved before and since version 4.52
HF_OLD = KeyMap(
    "llava-hf",
    (
        *((ours, f"multi_modal_projector.{theirs}") for ours, theirs in _HF_PROJECTOR),
        ("vision_tower.", "vision_tower.vision_model."),
        ("lm_head.", "language_model.lm_head."),
        ("language_model.", "language_model.model."),
        ("image_newline", "image_newline"),
    ),
)
HF_NEW = KeyMap(
    "llava-hf (4.52 and later)",
    (
        *((ours, f"model.multi_modal_projector.{theirs}") for ours, theirs in _HF_PROJECTOR),
        ("vision_tower.", "model.vision_tower.vision_model."),
        ("language_model.", "model.language_model."),
        ("image_newline", "model.image_newline"),
        ("lm_head.", "lm_head."),
    ),
)
# What an adapter that was trained with transformers 5 calls the layers; its checkpoints have those of HF_5_SAVED.
HF_5 = KeyMap(
    "llava-hf (transformers 5)",
    tuple((ours, theirs.replace(".vision_model.", ".")) for ours, theirs in HF_NEW.prefixes),
)
# A checkpoint of transformers 5: the old names, but the tower has lost a level.  Source: 5.24.0, save_pretrained
HF_5_SAVED = KeyMap(
    "llava-hf (saved by transformers 5)",
    tuple((ours, theirs.replace(".vision_model.", ".")) for ours, theirs in HF_OLD.prefixes),
)
# Source: PaddleMIX paddlemix/models/llava and clip (commit 6afaf05d)
PADDLEMIX = KeyMap(
    "PaddleMIX",
    (
        ("image_newline", "llama.image_newline"),
        ("projector.", "llama.mm_projector."),
        ("vision_tower.", "llama.vision_tower.vision_tower.vision_model."),
        ("lm_head.", "lm_head."),
        ("language_model.", "llama."),
    ),
    tower=_TOWER_PADDLEMIX,
    inside_layers=_LAYER_PADDLEMIX,
    transposed=False,
)
LLAMA = KeyMap("Llama", (("lm_head.", "lm_head."), ("language_model.", "model.")))
# Source: modeling_internlm2.py of internlm/internlm2-7b; query, key and value are joined, see `joined_weights.py`
INTERNLM2 = KeyMap(
    "InternLM2",
    (("lm_head.", "output."), ("language_model.", "model.")),
    language=(
        ("embed_tokens.", "tok_embeddings."),
        (".self_attn.qkv_proj.", ".attention.wqkv."),
        (".self_attn.o_proj.", ".attention.wo."),
        (".mlp.gate_proj.", ".feed_forward.w1."),
        (".mlp.up_proj.", ".feed_forward.w3."),
        (".mlp.down_proj.", ".feed_forward.w2."),
        (".input_layernorm.", ".attention_norm."),
        (".post_attention_layernorm.", ".ffn_norm."),
    ),
)
# what LLaVA's LoRA training writes besides the adapter
PEFT_PROJECTOR = KeyMap(
    "LLaVA LoRA",
    (
        ("projector.", "base_model.model.model.mm_projector."),
        ("image_newline", "base_model.model.model.image_newline"),
    ),
)
# the projector that XTuner saves on its own; more layers than it ever has
XTUNER_PROJECTOR = KeyMap(
    "XTuner projector", tuple((f"projector.{number}.", f"model.{number}.") for number in range(0, 16, 2))
)
# a whole CLIP model is a tower too: its text half and the two projections into the common space are skipped
CLIP = KeyMap(
    "CLIP",
    (("vision_tower.", "vision_model."),),
    ignored=("text_model.", "text_projection.", "visual_projection.", "logit_scale"),
)
# a CLIPVisionModel as transformers 5 saves it
CLIP_5 = KeyMap("CLIP (transformers 5)", (("vision_tower.", ""),))
# the same as PaddleMIX keeps it
CLIP_PADDLEMIX = KeyMap(
    "PaddleMIX CLIP",
    (("vision_tower.", "vision_model."),),
    tower=_TOWER_PADDLEMIX,
    inside_layers=_LAYER_PADDLEMIX,
    transposed=False,
    ignored=("text_model.", "text_projection", "visual_projection", "vision_projection", "logit_scale"),
)
# Source: InternVisionModel of OpenGVLab/InternVL
INTERN_VIT = KeyMap("InternViT", (("vision_tower.", ""),), tower=_TOWER_INTERN_VIT, inside_layers=_LAYER_INTERN_VIT)


def is_linear_weight(name: str, shape: tuple[int, ...]) -> bool:
    """Whether one of our weights is a linear layer's, i.e. [in, out] with us and [out, in] in torch layouts."""
    # the embedding is a table of rows in every layout, [vocabulary, width]
    return len(shape) == 2 and name.endswith(".weight") and not name.endswith("embed_tokens.weight")
