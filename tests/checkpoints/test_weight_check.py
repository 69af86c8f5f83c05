"""A tokenizer against the rows of an embedding."""

from __future__ import annotations

import pytest

from paddlemix.checkpoints.weight_check import check_vocabulary
from paddlemix.errors import UserError


def test_a_tokenizer_may_be_smaller_than_the_embedding_but_not_larger() -> None:
    check_vocabulary(31, 32, "x")
    check_vocabulary(32, 32, "x")
    with pytest.raises(UserError, match="tokenizer of x has 33 tokens, but the embedding only 32 rows"):
        check_vocabulary(33, 32, "x")
